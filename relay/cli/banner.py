"""The few lines that `relay serve` prints when it is ready, each complete to copy."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from urllib.parse import parse_qs, urlsplit

from relay.config import Config
from relay.model import Channel
from relay.stream.keys import Keys

_CHANNEL = Channel("news")
_ANY_HOST = {"0.0.0.0", "::", ""}  # noqa: S104  # compared with, not bound


def banner(config: Config, *, port: int, redis_address: str | None, token: str | None) -> str:
    """Page, token, Redis, curl lines and doors with a port of their own. No password of Redis is in
    them.

    `redis_address` is its URL, None where it shall not be shown. Without `token` the lines say
    how to make one; with --insecure none is needed.
    """
    base = _url(config.server.host, port, tls=bool(config.server.tls_cert))
    fragment = f"#token={token}&channel={_CHANNEL}" if token else f"#channel={_CHANNEL}"
    curl = ["curl", "-N", f"{base}/sse?channel={_CHANNEL}"]
    if token:
        curl[2:2] = ["-H", f"Authorization: Bearer {token}"]
    elif not config.insecure:
        curl[2:2] = ["-H", "Authorization: Bearer TOKEN"]
    rows = [("page", f"{base}/{fragment}")]
    if token:
        rows.append(("token", token))
    elif not config.insecure:
        rows.append(("token", f"python -m relay token --user me --channel {_CHANNEL}"))
    options = _redis_cli(redis_address) if redis_address else None
    if options is not None:
        key = Keys(config.redis.prefix).stream(_CHANNEL).decode()
        command = ["redis-cli", *options, "XADD", key, "*", "data", '{"hello":1}']
        if config.redis.url == "embedded":
            rows.append(("valkey", f"127.0.0.1:{config.redis.embedded_port}"))
        rows.append(("append", shlex.join(command)))
    rows.append(("watch", shlex.join(curl)))
    rows += _doors(config)
    lines = [f"relay is ready on {base}"]
    if config.insecure:
        lines.append("INSECURE: anyone may read every channel of the native door")
    width = max(len(name) for name, _ in rows) + 1
    return "\n".join([*lines, *(f"  {name:<{width}} {text}" for name, text in rows)])


def _doors(config: Config) -> Iterator[tuple[str, str]]:
    """The doors that have a listener of their own."""
    for name, section in config.doors.items():
        port = int(getattr(section, "port", 0))
        if port and section.is_open:
            host, cert = (str(getattr(section, key, "")) for key in ("host", "tls_cert"))
            tls = bool(cert or config.server.tls_cert)
            yield name.removeprefix("protocol:"), _url(host or config.server.host, port, tls=tls)


def _url(host: str, port: int, *, tls: bool) -> str:
    return f"{'https' if tls else 'http'}://{_host(host)}:{port}"


def _host(host: str) -> str:
    # A browser cannot open "any address".
    if host in _ANY_HOST:
        return "127.0.0.1"
    return f"[{host}]" if ":" in host else host


def _redis_cli(url: str) -> list[str] | None:
    """What redis-cli needs to reach it; None where one command cannot say it."""
    parts = urlsplit(url)
    user = ["--user", parts.username, "--askpass"] if parts.username else []
    if not user and parts.password:
        user = ["--askpass"]
    match parts.scheme:
        case "unix":
            db = parse_qs(parts.query).get("db", [""])[0]
            return ["-s", parts.path, *user, *_db(db)]
        case "redis" | "rediss":
            options = ["--tls"] if parts.scheme == "rediss" else []
            if parts.hostname and parts.hostname not in {"127.0.0.1", "localhost"}:
                options += ["-h", parts.hostname]
            if parts.port and parts.port != 6379:
                options += ["-p", str(parts.port)]
            return [*options, *user, *_db(parts.path.strip("/"))]
        case _:
            return None


def _db(number: str) -> list[str]:
    return ["-n", number] if number not in {"", "0"} else []
