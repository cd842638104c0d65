"""Converts Centrifugo v1's configuration file, variables and command line to relay's settings.

Centrifugo's defaults are preserved: it listens on all interfaces at port 8000, and events are not
kept for long unless a history is configured. Options without an equivalent whose absence would
change the service are errors: ACME certificates, custom web pages and several Redis servers.
"""

from __future__ import annotations

import json
import re
import secrets
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from typing_extensions import override

from relay.config.imported import (
    ConfigurationImport,
    Flag,
    ImportedConfiguration,
    ImportedSetting,
)
from relay.core.errors import ConfigError
from relay.core.model import RESERVED_NAMESPACES
from relay.protocols.centrifugo.configuration.option_sources import (
    SUFFIXES,
    CollectedOptions,
    OptionValue,
    gather,
)
from relay.protocols.centrifugo.configuration.options import (
    CHANNEL_OPTIONS,
    OPTIONS,
    OptionHandling,
    OptionKind,
)

_SECTION = "protocol:centrifugo"
_VERSION = "Centrifugo v1.8.0"
# Centrifugo stores only the configured history. One hour is enough for slow and reconnecting
# clients, and many quiet channels do not fill Redis.
_MIN_RETENTION_S = 3600
_MAX_RETENTION = 1_000_000_000
_LEVELS = {"trace": "debug", "debug": "debug", "info": "info"} | dict.fromkeys(
    ("error", "critical", "fatal", "none"), "error"
)


class CentrifugoImport(ConfigurationImport):
    """Imports Centrifugo's configuration file and flags."""

    suffixes = SUFFIXES
    option = ""
    option_about = ""
    command = "centrifugo"
    flags = tuple(
        Flag(
            name=each.name, about=each.flag, short=each.short, switch=each.kind is OptionKind.SWITCH
        )
        for each in OPTIONS.values()
        if each.flag
    )
    default_path = "config.json"
    version = _VERSION
    by_environment = False

    @override
    def read(
        self, path: Path | None, environ: Mapping[str, str], flags: Mapping[str, str]
    ) -> ImportedConfiguration:
        given = gather(path, environ, flags)
        _reject_unsupported(given)
        settings = [
            *_protocol(given),
            *_namespaces(given),
            *_retention(given),
            *_node(given),
            *_redis(given),
        ]
        return ImportedConfiguration(
            settings=settings, notes=[*given.notes, *_notes(given)], missing=given.missing
        )

    @override
    def example(self, path: Path) -> str:
        # With a random secret, like `centrifugo genconfig`.
        secret = str(uuid.UUID(bytes=secrets.token_bytes(16), version=4))
        match path.suffix.lower():
            case ".json":
                return json.dumps({"secret": secret}, indent=2) + "\n"
            case ".toml":
                return f'secret = "{secret}"\n'
            case ".yaml" | ".yml":
                return f'secret: "{secret}"\n'
            case _:
                raise ConfigError(f"{path}: must have one of the suffixes {', '.join(SUFFIXES)}")


IMPORT = CentrifugoImport()


def _reject_unsupported(given: CollectedOptions) -> None:
    if given.on("ssl_autocert"):
        raise given.values["ssl_autocert"].wrong(
            "relay does not obtain ACME certificates. Remove ssl_autocert, and terminate TLS in a"
            " proxy or set ssl_cert and ssl_key"
        )
    if given.on("web") and (value := given.first("web_path")):
        raise value.wrong("relay does not serve custom web pages. Remove web_path or web")
    if given.on("ssl"):
        for name in ("ssl_cert", "ssl_key"):
            if not given.text(name):
                raise given.values["ssl"].wrong(f"needs {name}")


def _protocol(given: CollectedOptions) -> Iterator[ImportedSetting]:
    """Yield the options that are settings of [protocol:centrifugo], in the table's order."""
    for name, value in given.values.items():
        option = OPTIONS[name]
        if (
            option.handling is not OptionHandling.MAPPED
            or option.made
            or (not value.text and _is_number(name))
        ):
            continue
        section, _, key = option.to[0].rpartition(".")
        yield _setting(section, key, value)
    port = given.first("port") or OptionValue(f"{_VERSION}'s port = ", "8000")
    yield _setting(_SECTION, "port", port)
    # In Centrifugo, an empty address means all interfaces. In relay, it would be that of [server].
    address = given.first("address") or OptionValue(f"{_VERSION}'s address = ", "::")
    yield _setting(_SECTION, "host", address)
    if prefix := given.first("http_prefix"):
        yield _setting(_SECTION, "http_prefix", prefix, f"/{prefix.text.strip('/')}".rstrip("/"))
    if given.on("web"):
        yield _setting(_SECTION, "web", given.values["web"])
    if given.on("ssl"):
        yield _setting(_SECTION, "tls_cert", given.values["ssl_cert"])
        yield _setting(_SECTION, "tls_key", given.values["ssl_key"])


def _is_number(name: str) -> bool:
    return OPTIONS[name].kind is OptionKind.NUMBER


def _namespaces(given: CollectedOptions) -> Iterator[ImportedSetting]:
    for name, values in given.namespaces.items():
        if name in RESERVED_NAMESPACES:
            raise ConfigError(
                f"namespaces: {name}: this name is reserved for another protocol of relay"
            )
        for key in CHANNEL_OPTIONS:
            # Write the section even if all its settings have their default values.
            value = values.get(key) or OptionValue(f"namespace {name}: {key} = ", _default(key))
            yield _setting(f"{_SECTION}:{name}", key, value)


def _default(key: str) -> str:
    # pydantic takes a tenth of a second to import, and the command line imports this module.
    from relay.protocols.centrifugo.settings import CentrifugoSettings

    default = CentrifugoSettings.model_fields[key].default
    return str(default) if CHANNEL_OPTIONS[key] is OptionKind.NUMBER else "no"


def _retention(given: CollectedOptions) -> Iterator[ImportedSetting]:
    """Yield retention settings: the configured history, but at least one hour."""
    top = _retained(given.values)
    kept = {name: _retained(values) for name, values in given.namespaces.items()}
    if given.text("namespace_channel_boundary", ":") != ":":
        # Relay's namespaces always end in ':', so all of these channels belong to [namespace].
        top = tuple(max(pair) for pair in zip(top, *kept.values(), strict=True))
        kept = {}
    sections = {"namespace": top}
    for name, each in kept.items():
        if each != top:
            sections[f"namespace:{name}"] = each
            prefix = given.text("private_channel_prefix", "$")
            if ":" not in prefix:
                sections[f"namespace:{prefix}{name}"] = each
    why = (
        "Centrifugo stores only its history. Relay keeps events for an hour, for slow and"
        " reconnecting clients."
    )
    for section, (count, age_s) in sections.items():
        where = f"history of [{section}]: "
        yield ImportedSetting(
            section=section, key="retention_count", text=str(count), where=where, why=why
        )
        yield ImportedSetting(section=section, key="retention_age_s", text=str(age_s), where=where)
        yield ImportedSetting(
            section=section,
            key="unique_uids",
            text="no",
            where=f"{_VERSION}'s uid = ",
            why="Backends of Centrifugo may publish several messages with the same uid.",
        )


def _retained(values: Mapping[str, OptionValue]) -> tuple[int, int]:
    from relay.config.settings import NamespaceSettings

    size, lifetime = (
        int(value.text) if (value := values.get(key)) and value.text.isdecimal() else 0
        for key in ("history_size", "history_lifetime")
    )
    default: int = NamespaceSettings.model_fields["retention_count"].default
    # Out-of-range values are reported for Centrifugo's own option.
    return max(default, min(size, _MAX_RETENTION)), max(
        _MIN_RETENTION_S, min(lifetime, _MAX_RETENTION)
    )


def _node(given: CollectedOptions) -> Iterator[ImportedSetting]:
    if value := given.first("name"):
        yield _setting("node", "name", value)
    if value := given.first("log_level"):
        yield _setting("log", "level", value, _LEVELS.get(value.text.lower(), "info"))
    # The configured port is for this protocol only. Everything else listens on loopback.
    yield ImportedSetting(
        section="server",
        key="port",
        text="0",
        where="port of all other protocols = ",
        why="Centrifugo's port serves the Centrifugo protocol only. Health, metrics and other"
        " protocols use this listener: a free port on loopback, unless host is set.",
    )


def _redis(given: CollectedOptions) -> Iterator[ImportedSetting]:
    engine = given.text("engine", "memory")
    if engine not in {"memory", "redis"}:
        raise given.values["engine"].wrong("must be memory or redis")
    prefix = given.text("redis_prefix", "centrifugo")
    if engine == "memory":
        where = given.values.get("engine") or OptionValue(f"{_VERSION}'s engine = ", engine)
        yield _setting("redis", "url", where, "embedded")
        return
    yield from _address(given)
    for name, key in (
        ("redis_connect_timeout", "connect_timeout_s"),
        ("redis_read_timeout", "command_timeout_s"),
    ):
        # In Centrifugo, 0 means no timeout. Relay needs timeouts to recover from failures.
        if (value := given.first(name)) and value.text != "0":
            yield _setting("redis", key, value)
    if value := given.first("redis_prefix"):
        yield _setting("producer:queue", "name", value, f"{prefix}.api")
        if prefix != "centrifugo":
            # Another prefix means another installation on the same Redis, with separate streams.
            yield _setting("redis", "prefix", value, f"relay:{prefix}:")
    if given.on("redis_api"):
        yield _setting("producer:queue", "enabled", given.values["redis_api"])
        if value := given.first("redis_api_num_shards"):
            yield _setting("producer:queue", "shards", value)


def _address(given: CollectedOptions) -> Iterator[ImportedSetting]:
    master, sentinels = given.first("redis_master_name"), given.first("redis_sentinels")
    password = given.first("redis_password")
    if master or sentinels:
        if not (master and sentinels):
            lone = master or sentinels
            raise ConfigError(
                f"{lone.where if lone else ''}(alone): redis_master_name and redis_sentinels must"
                " be set together"
            )
        hosts = ",".join(
            f"127.0.0.1{part}" if part.startswith(":") else part
            for part in (each.strip() for each in sentinels.text.split(","))
            if part
        )
        names, databases = _shards(given, ("redis_master_name", ""), ("redis_db", "0"))
        urls = [
            f"sentinel://{hosts}/{quote(name)}/{db}"
            for name, db in zip(names, databases, strict=True)
        ]
        yield _setting("redis", "url", sentinels, ", ".join(urls))
    elif url := given.first("redis_url"):
        found = [_split_url(OptionValue(url.where, part.strip())) for part in url.text.split(",")]
        # The other options are ignored if redis_url is set (engines.md of the documentation).
        password = None
        passwords = {secret for _, _, secret in found}
        if len(passwords) == 1:
            urls = [f"{start}{end}" for start, end, _ in found]
            if secret := passwords.pop():
                password = OptionValue(url.where, secret)
        else:
            urls = [_with_password(*each) for each in found]
        yield _setting("redis", "url", url, ", ".join(urls))
    else:
        where = given.first("redis_host", "redis_port", "redis_db") or given.values["engine"]
        lists = _shards(
            given, ("redis_host", "127.0.0.1"), ("redis_port", "6379"), ("redis_db", "0")
        )
        urls = [
            f"redis://[{host}]:{port}/{db}" if ":" in host else f"redis://{host}:{port}/{db}"
            for host, port, db in zip(*lists, strict=True)
        ]
        yield _setting("redis", "url", where, ", ".join(urls))
    if password:
        yield _setting("redis", "password", password)


# The values of an option that may be a list, and what they must be.
_VALUES = {
    "redis_host": (re.compile(r"[^\s/@;]+"), "must be a host, or hosts separated by commas"),
    "redis_port": (re.compile(r"[1-9][0-9]{0,4}"), "must be a port, or ports separated by commas"),
    "redis_db": (re.compile(r"[0-9]{1,7}"), "must be a number, or numbers separated by commas"),
    "redis_master_name": (re.compile(r".+"), "must be a name, or names separated by commas"),
}


def _shards(given: CollectedOptions, *options: tuple[str, str]) -> list[list[str]]:
    """Return the values of these options for each server, as v1 does.

    Each is one value for all servers, or a list with one value per server, separated by commas.
    """
    lists = {
        name: [part.strip() for part in given.text(name, default).split(",")]
        for name, default in options
    }
    for name, values in lists.items():
        form, problem = _VALUES[name]
        if (value := given.first(name)) and not all(map(form.fullmatch, values)):
            raise value.wrong(problem)
    longest = max(lists, key=lambda name: len(lists[name]))
    count = len(lists[longest])
    for name, values in lists.items():
        if len(values) not in (1, count):
            value = given.first(name)
            raise ConfigError(
                f"{value.where if value else name}({len(values)} values): must have one value, or"
                f" {count} as {longest}"
            )
    return [values * count if len(values) == 1 else values for values in lists.values()]


def _with_password(start: str, end: str, password: str) -> str:
    """Return a URL that contains its password, because another server has another one."""
    scheme, _, user = start.partition("//")
    login = f"{user.removesuffix('@')}:{quote(password, safe='')}@" if password else user
    return f"{scheme}//{login}{end}"


def _split_url(value: OptionValue) -> tuple[str, str, str]:
    """Return the URL's part up to the user, the part after the password, and the password."""
    parts = urlsplit(value.text)
    try:
        port = parts.port or 6379
    except ValueError:
        port = 0
    db = parts.path.strip("/") or "0"
    if parts.scheme not in {"redis", "rediss"} or not parts.hostname or not port:
        raise ConfigError(f"{value.where}(hidden): must be redis://:PASSWORD@HOST:PORT/DB")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    user = f"{parts.username}@" if parts.username else ""
    return f"{parts.scheme}://{user}", f"{host}:{port}/{db}", unquote(parts.password or "")


def _notes(given: CollectedOptions) -> Iterator[str]:
    if given.on("web") and not given.text("admin_password"):
        yield (
            f"{given.values['web'].where}true: relay's console replaces Centrifugo's page, and"
            " needs admin_password or [console] password"
        )
    level = given.first("log_level")
    if level and level.text.lower() not in _LEVELS:
        yield f"{level.where}{level.text}: unknown level; info applies, as in {_VERSION}"


def _setting(
    section: str, key: str, value: OptionValue, text: str | None = None
) -> ImportedSetting:
    return ImportedSetting(
        section=section, key=key, text=value.text if text is None else text, where=value.where
    )
