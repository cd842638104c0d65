"""The lines that `relay serve` prints when it is ready. Each can be copied as a whole."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from urllib.parse import parse_qs, urlsplit, urlunsplit

from relay.cli.local_key import uses_local_key
from relay.config.loading import Config
from relay.config.settings import RedisSettings
from relay.core.model import Channel
from relay.process.addresses import hosts_of
from relay.stream.connection.connect import servers_of
from relay.stream.format.keys import Keys
from relay.stream.shards.hash_map import HashMap

_CHANNEL = Channel("news")
# Browsers cannot open these addresses.
_LOOPBACK = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1"}  # noqa: S104  # not bound


def banner(
    config: Config,
    *,
    port: int,
    redis_address: str | None,
    token: str | None,
    options: Sequence[str] = (),
    launcher: Sequence[str] = ("python", "-m", "relay"),
) -> str:
    """Return the lines: page, token, Redis, curl and protocols with a port of their own.

    No password of Redis is in them. Lines that would not work are left out.

    Args:
        port: that of the shared listener.
        redis_address: the URL of Redis, None if it must not be shown.
        token: the token to print. Without it, the lines describe how to create one.
        options: with which `relay token` finds the same configuration.
        launcher: the command that runs relay.
    """
    base = _url(config.server.host, port, tls=bool(config.server.tls_cert))
    make = [*launcher, "token", "--user", "me", "--channel", _CHANNEL, *options]
    rows = [*_native(config, base, token or _token_hint(config, make), is_token=token is not None)]
    redis = _redis_cli(redis_address) if redis_address else None
    if redis is not None:
        key = Keys(config.redis.prefix).stream(_CHANNEL).decode()
        command = ["redis-cli", *redis, "XADD", key, "*", "data", '{"hello":1}']
        at = next((at for at, (name, _) in enumerate(rows) if name == "watch"), len(rows))
        rows.insert(at, ("append", shlex.join(command)))
        if config.redis.url == "embedded":
            rows.insert(at, ("valkey", f"127.0.0.1:{config.redis.embedded_port}"))
    rows += _doors(config)
    hosts = hosts_of(config.server.host)[1:]
    others = (_url(host, port, tls=bool(config.server.tls_cert)) for host in hosts)
    lines = [f"relay is ready on {', '.join([base, *others])}"]
    if config.insecure:
        lines.append("INSECURE: anyone may read every channel over SSE and WebSocket")
    width = max((len(name) for name, _ in rows), default=0) + 1
    return "\n".join([*lines, *(f"  {name:<{width}} {text}" for name, text in rows)])


def _native(config: Config, base: str, token: str, *, is_token: bool) -> Iterator[tuple[str, str]]:
    """Yield the lines of the native protocol, which may be disabled or have a separate port."""
    native = config.doors.get("protocol:native")
    if native is not None and not native.is_open:
        return
    if native is not None and int(getattr(native, "port", 0)):
        base = dict(_doors(config))["native"]
    if bool(getattr(native, "page", True)):
        fragment = f"#token={token}&channel={_CHANNEL}" if is_token else f"#channel={_CHANNEL}"
        yield "page", f"{base}/{fragment}"
    curl = ["curl", "-N", f"{base}/sse?channel={_CHANNEL}"]
    if is_token or not config.insecure:
        yield "token", token
        curl[2:2] = ["-H", f"Authorization: Bearer {token if is_token else 'TOKEN'}"]
    yield "watch", shlex.join(curl)


def _token_hint(config: Config, make: Sequence[str]) -> str:
    if not config.jwt.algorithm.startswith("HS"):
        return f"sign tokens with your private key ({config.jwt.algorithm})"
    if not config.jwt.key.get_secret_value() and not uses_local_key(config):
        return "set [jwt] key to accept tokens"
    command = shlex.join(make)
    variables = sorted(
        name
        for setting, origin in config.origins.items()
        if setting.startswith(("[jwt] ", "[redis] embedded_"))
        for name in [origin.removeprefix("environment variable ")]
        if name != origin
    )
    return f"{command}  # needs {', '.join(variables)}" if variables else command


def _doors(config: Config) -> Iterator[tuple[str, str]]:
    """Yield the name and URL of each protocol with a separate listener."""
    for name, section in config.doors.items():
        port = int(getattr(section, "port", 0))
        if port and section.is_open:
            host, cert = (str(getattr(section, key, "")) for key in ("host", "tls_cert"))
            tls = bool(cert or config.server.tls_cert)
            yield name.removeprefix("protocol:"), _url(host or config.server.host, port, tls=tls)


def _url(host: str, port: int, *, tls: bool) -> str:
    return f"{'https' if tls else 'http'}://{_host(host)}:{port}"


def _host(host: str) -> str:
    host = next(iter(hosts_of(host)), "")
    host = _LOOPBACK.get(host, host)
    return f"[{host}]" if ":" in host else host


def _redis_cli(url: str) -> list[str] | None:
    """Return redis-cli's options for this URL, or None if it needs more than one command."""
    servers = servers_of(RedisSettings(url=url))
    if len(servers) > 1:
        # The one that has the channel's stream.
        shard = HashMap(servers).shard_of(Keys("").stream(_CHANNEL))
        url = shard.settings.url
    parts = urlsplit(url)
    user = ["--user", parts.username, "--askpass"] if parts.username else []
    if not user and parts.password:
        user = ["--askpass"]
    match parts.scheme:
        case "unix":
            db = parse_qs(parts.query).get("db", [""])[0]
            return ["-s", parts.path, *user, *_db(db)]
        case "redis+cluster" | "rediss+cluster":
            # Any node will do. -c follows the redirection to the node that has the key.
            first = parts._replace(netloc=parts.netloc.partition(",")[0])
            options = _redis_cli(urlunsplit(first._replace(scheme=parts.scheme.split("+")[0])))
            return None if options is None else ["-c", *options]
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
