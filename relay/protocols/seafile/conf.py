"""Seafile's own configuration: `seafile.conf`, `notification.conf`, `ccnet.conf` and environment.

Where each version keeps what the notification server needs (seafile-server, branches 10.0 to 13.0):

| version          | server's key, address                      | group members                   |
| ---------------- | ------------------------------------------ | ------------------------------- |
| first 10.0       | notification.conf [general]                | ccnet.conf [Database]           |
| 10.0, 11.0       | seafile.conf [notification]                | ccnet.conf [Database]           |
| 12.0, 13.0       | environment                                | environment                     |

A value is the rest of its line, whatever characters it has, as the C server's GKeyFile reads it;
Go's reader took `#` and `;` for comments until May 2023, so that generated keys were cut there.
Quotes around it do not belong to it, nor does a single one at its begin, which is in the manual's
own sample.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from relay.errors import ConfigError

DEFAULT_PORT = "8083"
FILES = ("seafile.conf", "notification.conf", "ccnet.conf")

_SECTION = re.compile(r"\[([^\]]*)\]")
_QUOTES = "\"'"
_NO = frozenset({"false", "0", "no", "off"})
_YES = frozenset({"true", "1", "yes", "on"})
_LEVELS = {
    "trace": "debug",
    "debug": "debug",
    "info": "info",
    "warning": "warning",
    "warn": "warning",
    "error": "error",
    "fatal": "error",
    "panic": "error",
}


@dataclass(slots=True)
class Found:
    """What was found, in the words of [protocol:seafile] and [log]; `where` says from which file or
    variable each setting of the door comes."""

    door: dict[str, str] = field(default_factory=dict)
    where: dict[str, str] = field(default_factory=dict)
    log_level: str = ""

    def put(self, key: str, value: str | None, where: str) -> None:
        """A later source wins; what is empty says nothing."""
        if value:
            self.door[key] = value
            self.where[key] = where


# Section -> name -> value; both in lower case.
_Sections = dict[str, dict[str, str]]


def parse(text: str) -> _Sections:
    """The sections of one file. The last of equal names counts; other lines mean nothing."""
    sections: _Sections = {}
    current: dict[str, str] = {}
    for line in text.removeprefix("\ufeff").splitlines():
        stripped = line.strip()
        if not stripped or stripped[0] in "#;":
            continue
        if heading := _SECTION.fullmatch(stripped):
            current = sections.setdefault(heading[1].strip().lower(), {})
            continue
        name, equals, value = stripped.partition("=")
        if equals:
            current[name.strip().lower()] = unquoted(value.strip())
    return sections


def unquoted(value: str) -> str:
    """Without the quotes around it, or the single one that was left at an end."""
    if len(value) >= 2 and value[0] == value[-1] and value[0] in _QUOTES:
        return value[1:-1]
    if value[:1] == '"' and '"' not in value[1:]:
        return value[1:]
    if value[-1:] == '"' and '"' not in value[:-1]:
        return value[:-1]
    return value


def read(folder: Path | None, environ: Mapping[str, str]) -> Found:
    """Everything that the folder and the environment say. ConfigError where the folder has none of
    the three files, or a value cannot be meant."""
    found = Found()
    if folder is not None:
        files = {name: _file(folder / name) for name in FILES}
        if not any(text is not None for text in files.values()):
            raise ConfigError(f"{folder}: has none of {', '.join(FILES)}")
        parsed = {name: parse(text or "") for name, text in files.items()}
        _first_generation(parsed["notification.conf"].get("general", {}), found)
        _notification(parsed["seafile.conf"].get("notification"), found)
        _database(parsed["ccnet.conf"].get("database", {}), found)
    _environment(environ, found)
    if "port" in found.door and "host" not in found.door:
        # Upstream's default, which containers rest on.
        found.put("host", "0.0.0.0", "the default of Seafile")  # noqa: S104
    return found


def _file(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="surrogateescape")
    except FileNotFoundError:
        return None
    except OSError as exc:
        raise ConfigError(f"{path}: cannot be read: {exc.strerror}") from exc


def _first_generation(general: Mapping[str, str], found: Found) -> None:
    where = "notification.conf [general]"
    found.put("host", general.get("host"), where)
    found.put("port", general.get("port") or (general and DEFAULT_PORT) or "", where)
    _keys(general, found, where)


def _notification(section: Mapping[str, str] | None, found: Found) -> None:
    if section is None:
        return
    where = "seafile.conf [notification]"
    if "enabled" in section:
        found.put("enabled", _boolean(section["enabled"], f"{where} enabled"), where)
    found.put("host", section.get("host"), where)
    # The first generation names the other end: the notification server's address. What its own
    # file says counts first.
    _, _, url_port = section.get("notification_url", "").rpartition(":")
    port = section.get("port") or found.door.get("port") or url_port.strip("/") or DEFAULT_PORT
    found.put("port", port, where)
    _keys(section, found, where)


def _keys(section: Mapping[str, str], found: Found, where: str) -> None:
    found.put("key", section.get("jwt_private_key") or section.get("private_key"), where)
    found.put("notification_token", section.get("notification_token"), where)
    found.log_level = _level(section.get("log_level", "")) or found.log_level


def _database(section: Mapping[str, str], found: Found) -> None:
    where = "ccnet.conf [Database]"
    engine = section.get("engine", "").lower()
    # SQLite and PostgreSQL never had a notification server; groups are then a Redis set.
    if engine not in ("mysql", "mariadb"):
        return
    found.put("groups", "database", where)
    for key, name in (
        ("db_host", "host"),
        ("db_port", "port"),
        ("db_user", "user"),
        ("db_password", "passwd"),
        ("db_name", "db"),
        ("db_socket", "unix_socket"),
    ):
        found.put(key, section.get(name), where)
    if "use_ssl" in section:
        found.put("db_tls", _boolean(section["use_ssl"], f"{where} USE_SSL"), where)


def _environment(environ: Mapping[str, str], found: Found) -> None:
    for key, name in (
        ("key", "JWT_PRIVATE_KEY"),
        ("host", "NOTIFICATION_SERVER_HOST"),
        ("port", "NOTIFICATION_SERVER_PORT"),
        ("db_host", "SEAFILE_MYSQL_DB_HOST"),
        ("db_port", "SEAFILE_MYSQL_DB_PORT"),
        ("db_user", "SEAFILE_MYSQL_DB_USER"),
        ("db_password", "SEAFILE_MYSQL_DB_PASSWORD"),
        ("db_name", "SEAFILE_MYSQL_DB_CCNET_DB_NAME"),
    ):
        found.put(key, environ.get(name), f"environment variable {name}")
    if environ.get("SEAFILE_MYSQL_DB_HOST"):
        found.put("groups", "database", "environment variable SEAFILE_MYSQL_DB_HOST")
    if switch := environ.get("ENABLE_NOTIFICATION_SERVER"):
        name = "environment variable ENABLE_NOTIFICATION_SERVER"
        found.put("enabled", _boolean(switch, name), name)
    # Where the server posts to; its port is ours where nothing else says it.
    name = "INNER_NOTIFICATION_SERVER_URL"
    if (inner := environ.get(name)) and "port" not in found.door:
        try:
            port = urlsplit(inner).port
        except ValueError:
            raise ConfigError(f"environment variable {name}: is not a URL") from None
        found.put("port", str(port or DEFAULT_PORT), f"environment variable {name}")
    found.log_level = _level(environ.get("NOTIFICATION_SERVER_LOG_LEVEL", "")) or found.log_level
    if environ.get("JWT_PRIVATE_KEY") and "port" not in found.door:
        found.put("port", DEFAULT_PORT, "the default of Seafile 12")


def _boolean(text: str, where: str) -> str:
    word = text.strip().lower()
    if word in _NO:
        return "no"
    if word in _YES:
        return "yes"
    raise ConfigError(f"{where} = {text[:40]!r}: must be true or false")


def _level(text: str) -> str:
    return _LEVELS.get(text.strip().lower(), "")
