"""Check the configuration: secrets, allowed origins, and settings that contradict each other.

`relay.process.app.check` finds settings that `serve` rejects. This module finds settings that
`serve` accepts although they are probably a mistake.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from pydantic import SecretStr

from relay.config.lists import split
from relay.process.doctor.finding import Finding, error, note, warning

if TYPE_CHECKING:
    from relay.config.loading import Config
    from relay.config.settings import Section

# RFC 7518, section 3.2: a key for HS256 has at least 256 bits.
_KEY_BYTES, _GUESSABLE_BYTES = 32, 16
# Parts of secrets that are tried first.
_WORDS = ("secret", "password", "passwort", "changeme", "admin", "example", "test", "12345", "qwer")
_DISTINCT = 8
_GENERATE = "openssl rand -base64 32"
# Settings whose value signs something: with it, anyone can forge credentials.
_SIGNING = frozenset({"key", "secret", "admin_secret", "notification_token"})
# Passwords of other servers. Relay does not judge their strength.
_FOREIGN = frozenset(
    {"password", "sentinel_password", "redis_password", "db_password", "http_token"}
)
_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})


def check(config: Config) -> list[Finding]:
    """Return what is wrong with a configuration that `serve` accepts."""
    found = [*_notes(config), *of_secrets(config), *_origins(config), *_insecure(config)]
    doors = config.doors
    for name, look in (
        ("centrifugo", _centrifugo),
        ("pydio", _pydio),
        ("seafile", _seafile),
        ("socketio", _socketio),
    ):
        section = doors.get(f"protocol:{name}")
        if section is not None and section.is_open:
            found += look(config, section)
    found += _emitters(config)
    found += _paths(config)
    return found


def _notes(config: Config) -> Iterator[Finding]:
    for line in config.notes:
        if "namespace applies" in line:
            yield warning(
                "configuration.socketio_namespace",
                f"The namespace of the emitters is set, but not read: {line}",
                "relay listens for emitters in the namespace of its clients. Emitters that use"
                " another one are ignored.",
                "[protocol:socketio]\nnamespace = the one that the emitters use; remove the other"
                " setting",
            )
        else:
            yield warning(
                "configuration.unused",
                line,
                "This line has no effect.",
                "Remove it, or correct its name",
            )


# ---- secrets ------------------------------------------------------------------------------------


def of_secrets(config: Config) -> Iterator[Finding]:
    """Yield secrets that can be guessed, and secrets that two protocols share."""
    used: dict[str, str] = {}
    for name, section in {"jwt": config.jwt, "console": config.console, **config.doors}.items():
        foreign = {"redis_url"} if name == "console" else _FOREIGN
        for key, value in section:
            if not isinstance(value, SecretStr) or key in foreign:
                continue
            setting = f"[{name}] {key}"
            for part in _keys_of(value.get_secret_value()):
                yield from _secret(setting, part, is_key=key in _SIGNING)
                if key in _SIGNING and (other := used.setdefault(part, setting)) != setting:
                    yield warning(
                        "configuration.shared_secret",
                        f"{other} and {setting} are the same secret",
                        "A program that can sign tokens for one of them can do so for the other.",
                        f"Set another secret, for example the output of: {_GENERATE}",
                    )


def _keys_of(text: str) -> Iterator[str]:
    """Yield the secrets of a setting that may contain several for rotation. PEM keys are public."""
    for part in text.split("\n---\n"):
        if part.strip() and not part.lstrip().startswith("-----BEGIN"):
            yield part.strip()


def _secret(setting: str, text: str, *, is_key: bool) -> Iterator[Finding]:
    size = len(text.encode())
    lower = text.lower()
    fix = f"Set the output of: {_GENERATE}"
    if is_key:
        fix += " (in both programs that use the secret)"
    is_common = any(each in lower for each in _WORDS)
    forge = (
        "Anyone who tries common words can sign tokens and read every channel that a token can"
        " grant."
        if is_key
        else "Anyone who tries common words can log in."
    )
    if size < _GUESSABLE_BYTES and (is_common or is_key or len(set(lower)) < _DISTINCT):
        what = f"{setting} has {size} bytes"
        if is_common:
            what += " and contains a common word"
        yield error("configuration.weak_secret", what, forge, fix)
    elif len(set(lower)) < _DISTINCT:
        yield error(
            "configuration.weak_secret",
            f"{setting} consists of {len(set(lower))} different characters",
            forge,
            fix,
        )
    elif is_key and size < _KEY_BYTES:
        yield warning(
            "configuration.short_secret",
            f"{setting} has {size} bytes; a key for HS256 should have {_KEY_BYTES}",
            "Anyone who has one token can try keys offline, without sending requests to relay.",
            fix,
        )


# ---- browsers -----------------------------------------------------------------------------------


def _origins(config: Config) -> Iterator[Finding]:
    """Yield protocols with cookies that accept pages of relay's own origin only."""
    for name, section in config.doors.items():
        if not section.is_open or getattr(section, "allowed_origins", None) != "":
            continue
        fix = f"[{name}]\nallowed_origins = https://the-host-of-your-pages"
        what = f"[{name}] allowed_origins is empty"
        if name == "protocol:pydio":
            yield warning(
                "configuration.allowed_origins",
                what,
                "Browsers authenticate with Pydio's cookie, so pages of other origins are rejected"
                " with status 403. This is right only if Pydio and relay have the same scheme, host"
                " and port for browsers.",
                fix,
            )
        else:
            yield note(
                "configuration.allowed_origins",
                what,
                "Pages of another origin than relay's are rejected if they authenticate with a"
                " cookie. This is right if they have the same scheme, host and port, or use tokens"
                " in a header or in the URL.",
                fix,
            )


def _insecure(config: Config) -> Iterator[Finding]:
    if config.insecure:
        yield error(
            "configuration.insecure",
            "relay runs with --insecure",
            "Anyone may read all channels over SSE and WebSocket.",
            "Remove --insecure, and set [jwt] key",
        )


# ---- protocols ----------------------------------------------------------------------------------


def _centrifugo(config: Config, section: Section) -> Iterator[Finding]:
    settings: Any = section
    host = settings.host or config.server.host
    open_to_all = host not in _LOOPBACK
    for key, allows in (
        ("insecure", "anyone may connect as anyone, subscribe to and publish to every channel"),
        ("insecure_api", "anyone may publish, disconnect users and read presence"),
        ("insecure_admin", "anyone may read all events and publish"),
    ):
        if getattr(settings, key):
            where = f" ({host})" if open_to_all else ""
            yield (error if open_to_all else warning)(
                "configuration.centrifugo_insecure",
                f"[protocol:centrifugo] {key} is on{where}",
                f"Without a credential, {allows}.",
                f"[protocol:centrifugo]\n{key} = no",
            )
    admin = settings.admin or settings.web
    if admin and not settings.insecure_admin:
        missing = [
            key
            for key in ("admin_password", "admin_secret")
            if not getattr(settings, key).get_secret_value()
        ]
        if missing:
            yield error(
                "configuration.centrifugo_admin",
                f"[protocol:centrifugo] admin or web is on, but {' and '.join(missing)} is not set",
                "Every login is rejected.",
                "[protocol:centrifugo]\n" + "\n".join(f"{key} = ..." for key in missing),
            )
    names = {"protocol:centrifugo": settings}
    names |= {f"protocol:centrifugo:{name}": each for name, each in settings.namespaces.items()}
    for name, rules in names.items():
        yield from _history(config, name, rules)


def _history(config: Config, name: str, rules: Any) -> Iterator[Finding]:
    size, lifetime = rules.history_size, rules.history_lifetime
    if bool(size) != bool(lifetime):
        unset = "history_lifetime" if size else "history_size"
        yield error(
            "configuration.centrifugo_history",
            f"[{name}] has history_size {size} and history_lifetime {lifetime}",
            "Both are needed: there is no history and no recovery.",
            f"[{name}]\n{unset} = {'300' if size else '100'}",
        )
    elif rules.recover and not size:
        yield error(
            "configuration.centrifugo_history",
            f"[{name}] recover is on, but there is no history",
            "Clients that reconnect receive nothing of what they missed.",
            f"[{name}]\nhistory_size = 100\nhistory_lifetime = 300",
        )
    short = name.removeprefix("protocol:centrifugo").removeprefix(":")
    kept = config.namespaces.get(short) or config.namespaces[""]
    section = f"namespace:{short}" if short in config.namespaces and short else "namespace"
    if kept.retention_count and size > kept.retention_count:
        yield warning(
            "configuration.centrifugo_history",
            f"[{name}] history_size is {size}, but [{section}] keeps"
            f" {kept.retention_count} entries",
            "The history is shorter than configured.",
            f"[{section}]\nretention_count = {size}",
        )
    if kept.retention_age_s and lifetime > kept.retention_age_s:
        yield warning(
            "configuration.centrifugo_history",
            f"[{name}] history_lifetime is {lifetime} s, but [{section}] keeps entries for"
            f" {kept.retention_age_s} s",
            "The history is shorter than configured.",
            f"[{section}]\nretention_age_s = {lifetime}",
        )


def _pydio(_config: Config, section: Section) -> Iterator[Finding]:
    settings: Any = section
    key, auth = settings.key.get_secret_value(), urlsplit(settings.auth_url)
    if not settings.auth_url:
        yield error(
            "configuration.pydio_auth_url",
            "[protocol:pydio] key is set, but auth_url is not",
            "PHP can send events, but every browser is rejected.",
            "[protocol:pydio]\nauth_url = http://127.0.0.1/pydio/?get_action=ws_authenticate",
        )
        return
    is_old = "get_action=" in auth.query
    if not is_old and "/api/" in auth.path and ":" not in key:
        yield error(
            "configuration.pydio_key",
            "[protocol:pydio] auth_url is that of Pydio 6.5 to 8, but key is not TOKEN:SECRET",
            "Pydio rejects relay's requests, so every browser is rejected.",
            "[protocol:pydio]\nkey = TOKEN:SECRET, the key pair of Pydio's Booster",
        )
    if is_old and settings.private_path != settings.public_path and not settings.private_port:
        yield warning(
            "configuration.pydio_paths",
            f"[protocol:pydio] auth_url is that of Pydio 6.4, but public_path"
            f" ({settings.public_path}) and private_path ({settings.private_path}) differ",
            "Pydio 6.4 has a single path, so either PHP or the browsers use the wrong one.",
            f"[protocol:pydio]\nprivate_path = {settings.public_path}",
        )
    hosts = set(split(settings.authorised_hosts))
    if auth.hostname not in _LOOPBACK and hosts <= _LOOPBACK:
        yield warning(
            "configuration.pydio_hosts",
            f"Pydio runs on {auth.hostname}, but [protocol:pydio] authorised_hosts allows this host"
            " only",
            "Events from PHP are rejected.",
            f"[protocol:pydio]\nauthorised_hosts = {auth.hostname}",
        )


def _seafile(config: Config, section: Section) -> Iterator[Finding]:
    settings: Any = section
    if settings.groups == "redis" and settings.model_fields_set & {"db_host", "db_user", "db_name"}:
        yield warning(
            "configuration.seafile_groups",
            "[protocol:seafile] has a database for groups, but groups is redis",
            "The database is not asked, and events for groups are not delivered unless the"
            " application keeps the sets in Redis.",
            "[protocol:seafile]\ngroups = database",
        )
    if settings.groups == "database" and not settings.db_password.get_secret_value():
        yield warning(
            "configuration.seafile_groups",
            "[protocol:seafile] groups is database, but db_password is not set",
            "MySQL usually rejects a login without password; events for groups are then not"
            " delivered.",
            "[protocol:seafile]\ndb_password = the password of db_user",
        )
    kept = config.namespaces.get("seafile") or config.namespaces[""]
    if kept.retention_age_s and settings.missed_s > kept.retention_age_s:
        yield warning(
            "configuration.seafile_missed",
            f"[protocol:seafile] missed_s is {settings.missed_s} s, but entries are kept for"
            f" {kept.retention_age_s} s",
            "A sync client that was away longer than that gets no missed events.",
            f"[namespace:seafile]\nretention_age_s = {settings.missed_s}",
        )


def _socketio(config: Config, section: Section) -> Iterator[Finding]:
    settings: Any = section
    pydio: Any = config.doors.get("protocol:pydio")
    if pydio is None or not pydio.is_open:
        return
    if pydio.npm_namespace == settings.namespace and settings.namespace != "/":
        yield warning(
            "configuration.socketio_namespace",
            f"[protocol:socketio] namespace and [protocol:pydio] npm_namespace are both"
            f" {settings.namespace}",
            "The two settings are for different clients: AcceleratXR's clients join /axr, and those"
            " of Pydio's npm package join /. Clients with another namespace are rejected.",
            "[protocol:socketio]\nnamespace = /axr\n\n[protocol:pydio]\nnpm_namespace = /",
        )


def _paths(config: Config) -> Iterator[Finding]:
    """Yield the paths that two protocols on one listener want. `serve` accepts them."""
    wanted: dict[tuple[int, str], str] = {}
    for name, section in config.doors.items():
        settings: Any = section
        if not settings.is_open:
            continue
        for path in _paths_of(name, settings):
            other = wanted.setdefault((settings.port, path.rstrip("/")), name)
            if other != name:
                yield error(
                    "configuration.paths",
                    f"[{other}] and [{name}] both use the path {path}",
                    "Clients of one protocol reach the other.",
                    f"Change the path in [{name}], or set [{name}] port to another port",
                )


def _paths_of(name: str, settings: Any) -> list[str]:
    match name:
        case "protocol:native":
            return ["/sse", "/ws"]
        case "protocol:pydio":
            return [settings.public_path]
        case "protocol:seafile":
            return ["/notification", "/events", "/ping"]
        case "protocol:socketio":
            return split(settings.paths)
        case _:
            return []


def _emitters(config: Config) -> Iterator[Finding]:
    emitter: Any = config.producers["producer:socketio_emitter"]
    socketio = config.doors.get("protocol:socketio")
    if emitter.is_enabled and socketio is not None and not socketio.is_open:
        yield warning(
            "configuration.socketio_emitter",
            "[producer:socketio_emitter] is on, but [protocol:socketio] is not served",
            "Emits are stored in streams axr:..., but no Socket.IO client can connect.",
            "[protocol:socketio]\nsecret = the secret that signs the clients' tokens",
        )
