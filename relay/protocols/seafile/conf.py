"""Seafile's own configuration: `seafile.conf`, `notification.conf`, `ccnet.conf`, `.env` and
environment variables.

Files that contain the notification server's settings (seafile-server, branches 10.0 to 13.0):

| version          | server's key, address                      | group members                   |
| ---------------- | ------------------------------------------ | ------------------------------- |
| first 10.0       | notification.conf [general]                | ccnet.conf [Database]           |
| 10.0, 11.0       | seafile.conf [notification]                | ccnet.conf [Database]           |
| 12.0, 13.0       | environment, or .env in the folder         | environment, or .env            |

A value is the rest of its line, as in the C server's GKeyFile. Until May 2023, Go's parser took `#`
and `;` for the start of a comment and truncated generated keys there. Quotes around a value are
removed, and also a single quote at its beginning, which the manual's sample contains.

Seafile's programs read some keys differently, and therefore sign with different keys. All of these
readings are accepted:

* seafile.conf: seaf-server keeps quotes and resolves escapes; the Go programs do neither.
* .env: the scripts of 12 read up to the next `=`; later ones let the shell read the file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import urlsplit

from relay.core.errors import ConfigError

DEFAULT_PORT = "8083"
FILES = ("seafile.conf", "notification.conf", "ccnet.conf", ".env")

# Minimum length of a reading that is only a part of the key: a shorter one could be guessed.
_LEAST_PART = 16
_KEYS = "\n---\n"
# White space for GLib.
_SPACE = " \t\r\f"
_ESCAPES = {"": "", "s": " ", "n": "\n", "t": "\t", "r": "\r", "\\": "\\"}
_ESCAPE = re.compile(r"\\(.?)", re.DOTALL)
# NAME=value as a shell reads it: in quotes, or up to white space.
_VARIABLE = re.compile(
    r"""\s*(?:export\s+)?([A-Za-z_]\w*)=(?:'([^']*)'|"((?:[^"\\]|\\.)*)"|(\S*))(?:\s.*)?"""
)
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
class SeafileConfiguration:
    """Settings of [protocol:seafile] and [log] that were found.

    `where` has the file or variable of each setting of the protocol.
    """

    settings: dict[str, str] = field(default_factory=dict)
    where: dict[str, str] = field(default_factory=dict)
    log_level: str = ""
    notes: list[str] = field(default_factory=list)

    def put(self, key: str, value: str | None, where: str) -> None:
        """Set a setting, and replace one of an earlier source. Ignore an empty value."""
        if value:
            self.settings[key] = value
            self.where[key] = where


# Section -> name -> value. Sections and names are in lower case.
_Sections = dict[str, dict[str, str]]


def parse(text: str, read_value: Callable[[str], str] | None = None) -> _Sections:
    """Return the sections of one file. The last of equal names applies. Ignore other lines.

    `read_value` converts a value from the file. By default, quotes are removed.
    """
    sections: _Sections = {}
    current: dict[str, str] = {}
    read_value = read_value or unquoted
    for line in text.removeprefix("\ufeff").split("\n"):
        stripped = line.strip(_SPACE)
        if not stripped or stripped[0] in "#;":
            continue
        if heading := _SECTION.fullmatch(stripped):
            current = sections.setdefault(heading[1].strip().lower(), {})
            continue
        name, equals, value = stripped.partition("=")
        if equals:
            current[name.strip(_SPACE).lower()] = read_value(value.strip(_SPACE))
    return sections


def unquoted(value: str) -> str:
    """Remove the quotes around a value, or a single quote at one end.

    Go's parser also removes white space that is not ASCII, such as U+00A0; GLib does not.
    """
    value = value.strip()
    if len(value) >= 2 and value[0] == value[-1] and value[0] in _QUOTES:
        return value[1:-1]
    if value[:1] == '"' and '"' not in value[1:]:
        return value[1:]
    if value[-1:] == '"' and '"' not in value[:-1]:
        return value[:-1]
    return value


def as_seaf_server(value: str) -> str:
    """Return a value as GLib's GKeyFile reads it: with its quotes, escapes resolved."""
    return _ESCAPE.sub(lambda found: _ESCAPES.get(found[1], found[0]), value).rstrip(_SPACE + "\n")


def variables(text: str) -> dict[str, str]:
    """Return the variables of a .env file. Ignore lines that are not assignments."""
    found: dict[str, str] = {}
    for line in text.removeprefix("\ufeff").split("\n"):
        if match := _VARIABLE.fullmatch(line.rstrip("\r")):
            name, single, double, plain = match.groups()
            if double is not None:
                double = re.sub(r'\\(["\\$`])', r"\1", double)
            found[name] = next(each for each in (single, double, plain) if each is not None)
            # The scripts of 12 read it with awk, with `=` between fields.
            part = line.rstrip("\r").split("=")[1]
            if name == "JWT_PRIVATE_KEY" and len(part) >= _LEAST_PART:
                found[name] = readings(found[name], part)
    return found


def readings(*keys: str | None) -> str:
    """Return the different readings of one key in the format of the setting `key`."""
    return _KEYS.join(dict.fromkeys(key for key in keys if key))


def read(folder: Path | None, environ: Mapping[str, str]) -> SeafileConfiguration:
    """Return the settings in the folder and the environment.

    Raises:
        ConfigError: The folder has none of the files, or a value is invalid.
    """
    found = SeafileConfiguration()
    if folder is not None:
        files = {name: _file(folder / name) for name in FILES}
        if not any(text is not None for text in files.values()):
            raise ConfigError(f"{folder}: contains none of {', '.join(FILES)}")
        parsed = {name: parse(text or "") for name, text in files.items()}
        _first_generation(parsed["notification.conf"].get("general", {}), found)
        section = parsed["seafile.conf"].get("notification")
        if section is not None:
            exact = parse(files["seafile.conf"] or "", as_seaf_server)["notification"]
            for name in ("jwt_private_key", "private_key"):
                section[name] = readings(section.get(name), exact.get(name))
        _notification(section, found)
        _database(parsed["ccnet.conf"].get("database", {}), found)
        stored = variables(files[".env"] or "")
        where = dict.fromkeys(stored, f"{folder / '.env'}: ")
    else:
        stored, where = {}, {}
    # A variable of the process wins over the file.
    where |= dict.fromkeys(environ, "environment variable ")
    _environment({**stored, **environ}, where, found)
    if folder is not None and "port" not in found.settings:
        found.put("port", DEFAULT_PORT, "the default of Seafile")
    if "port" in found.settings and "host" not in found.settings:
        # Seafile's default, which its containers require.
        found.put("host", "::", "the default of Seafile")
    return found


def _file(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="surrogateescape")
    except FileNotFoundError:
        return None
    except OSError as exc:
        raise ConfigError(f"{path}: cannot be read: {exc.strerror}") from exc


def _first_generation(general: Mapping[str, str], found: SeafileConfiguration) -> None:
    where = "notification.conf [general]"
    found.put("host", general.get("host"), where)
    found.put("port", general.get("port") or (general and DEFAULT_PORT) or "", where)
    _keys(general, found, where)


def _notification(section: Mapping[str, str] | None, found: SeafileConfiguration) -> None:
    if section is None:
        return
    where = "seafile.conf [notification]"
    if "enabled" in section:
        found.put("enabled", _boolean(section["enabled"], f"{where} enabled"), where)
    host = section.get("host", "")
    if _is_own(host):
        found.put("host", host, where)
    elif host:
        found.notes.append(
            f"{where} host = {host} is a name under which seaf-server reaches the notification"
            " server, not an address of this host: listening on all addresses"
        )
    # In the first generation, seafile.conf contains the URL of the notification server. Its own
    # file, notification.conf, takes precedence.
    _, _, url_port = section.get("notification_url", "").rpartition(":")
    port = section.get("port") or found.settings.get("port") or url_port.strip("/") or DEFAULT_PORT
    found.put("port", port, where)
    _keys(section, found, where)


def _keys(section: Mapping[str, str], found: SeafileConfiguration, where: str) -> None:
    found.put("key", section.get("jwt_private_key") or section.get("private_key"), where)
    found.put("notification_token", section.get("notification_token"), where)
    found.log_level = _level(section.get("log_level", "")) or found.log_level


def _database(section: Mapping[str, str], found: SeafileConfiguration) -> None:
    where = "ccnet.conf [Database]"
    engine = section.get("engine", "").lower()
    # Seafile's notification server requires MySQL. With SQLite or PostgreSQL, relay reads group
    # members from Redis.
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


def _is_own(host: str) -> bool:
    """Return False for a name without a dot.

    With containers it is the name under which seaf-server reaches the notification server.
    """
    try:
        ip_address(host)
    except ValueError:
        return host == "localhost" or "." in host
    return True


def _environment(
    environ: Mapping[str, str], where: Mapping[str, str], found: SeafileConfiguration
) -> None:
    """Apply variables. `where` has the source of each, for messages."""
    # The URL that seaf-server posts to. Its port overrides that of seafile.conf, which Seafile 13
    # ignores.
    name = "INNER_NOTIFICATION_SERVER_URL"
    if inner := environ.get(name):
        try:
            port = urlsplit(inner).port
        except ValueError:
            raise ConfigError(f"{where[name]}{name}: is not a URL") from None
        if port or "port" not in found.settings:
            found.put("port", str(port or DEFAULT_PORT), f"{where[name]}{name}")
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
        found.put(key, environ.get(name), f"{where.get(name)}{name}")
    name = "SEAFILE_MYSQL_DB_HOST"
    if environ.get(name):
        found.put("groups", "database", f"{where[name]}{name}")
    name = "ENABLE_NOTIFICATION_SERVER"
    if switch := environ.get(name):
        found.put("enabled", _boolean(switch, f"{where[name]}{name}"), f"{where[name]}{name}")
    found.log_level = _level(environ.get("NOTIFICATION_SERVER_LOG_LEVEL", "")) or found.log_level
    if environ.get("JWT_PRIVATE_KEY") and "port" not in found.settings:
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
