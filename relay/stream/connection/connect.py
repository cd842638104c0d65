"""Redis addresses: parse the URL, ask Sentinel for the primary, create redis-py clients.

A URL with one of the schemes of `_SCHEMES` becomes one `RedisEndpoint`. With `rediss+sentinel://`,
both the Sentinels and the primary are reached over TLS. Call `discover` again before each new
connection, because Sentinel's answer changes with a failover. Several URLs, and the nodes of a
Redis Cluster, belong to a shard map, see `relay.stream.shards`.
"""

from __future__ import annotations

import ast
import re
import ssl
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field, replace
from ipaddress import ip_address
from typing import Any, cast
from urllib.parse import SplitResult, parse_qs, unquote, urlsplit

from pydantic import SecretStr
from redis.asyncio import Redis
from redis.asyncio.client import Pipeline
from redis.asyncio.retry import Retry
from redis.backoff import EqualJitterBackoff, NoBackoff
from redis.credentials import CredentialProvider
from redis.exceptions import (
    BusyLoadingError,
    ClusterDownError,
    MasterDownError,
    ReadOnlyError,
    RedisClusterException,
    RedisError,
    ResponseError,
    WatchError,
)
from redis.maint_notifications import MaintNotificationsConfig
from typing_extensions import override

from relay.config.settings import RedisSettings
from relay.core.errors import ConfigError, RedisUnavailable, RelayError, StartError
from relay.stream.connection import sentinel
from relay.stream.connection.addresses import (
    AnyAddress,
    AnyAddressOfPrimary,
    AnyAddressOfPrimaryTls,
    AnyAddressTls,
    UnixSocket,
)
from relay.stream.connection.cancellation import cancellation_kept
from relay.stream.connection.cluster_client import ClusterClient
from relay.stream.connection.refusals import (
    TEMPORARY_CODES,
    Effect,
    code_of,
    codes,
    leaves_transaction,
    without_arguments,
)

# The client that redis-py provides for everything except reading and appending.
RedisClient = Redis

# After one of these errors, discover the address of Redis and connect again.
UNAVAILABLE_CODES = codes(Effect.RECONNECT)
_OLDEST_VERSION = 7
# The text of an error in a redis-py pipeline contains the repr of a tuple with the reply.
_PIPELINED = re.compile(
    r"Command # \d+ \(.*?\) of pipeline caused error: \((?P<text>.*),\)", re.DOTALL
)

_ENCODE = (
    "; percent-encode special characters in user and password: # is %23, / is %2F, ? is %3F,"
    " [ is %5B, @ is %40, a comma is %2C"
)
_AUTHORITY = re.compile(r"[^/?#]*")
_SEPARATOR = re.compile(r"[\s,;|]")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_SCHEMES = (
    "embedded, redis://, rediss://, unix://, redis+sentinel://, rediss+sentinel://,"
    " redis+cluster:// or rediss+cluster://"
)
# sentinel:// is the older name of redis+sentinel://.
_SENTINEL_SCHEMES = ("redis+sentinel", "rediss+sentinel", "sentinel")
_CLUSTER_SCHEMES = ("redis+cluster", "rediss+cluster")
# The comma before another URL, in a list of servers. Addresses of Sentinels have commas, too.
_NEXT_URL = re.compile(r"\s*,\s*(?=[a-z][a-z+]*://)", re.IGNORECASE)
# redis-py follows redirections for as long as a slot may take to move: about 2 s.
_CLUSTER_ATTEMPTS, _CLUSTER_PAUSE_S = 8, 0.5
# Limit of `with_short_timeouts`, in seconds.
_SHORT_S = 1.0


class CommandRefused(RelayError):
    """Redis refused a command. `code` is the first word of its reply.

    The text of a missing right says where the users and their rights are described.
    """

    def __init__(self, command: str, answer: str) -> None:
        answer = without_arguments(answer)
        self.reply = answer
        self.code = code_of(answer)
        advice = "; see the ACL users in docs/redis.md" if self.code == "NOPERM" else ""
        super().__init__(f"{command}: {answer}{advice}")
        self.command = command


class RefusedForNow(RedisUnavailable):
    """Redis refuses a command now but may accept it later. `reply` is its reply."""

    def __init__(self, command: str, reply: str) -> None:
        super().__init__(f"{command} is refused now: {reply}")
        self.reply = reply


# New passwords by those that the settings of this process contain.
_changed_passwords: dict[str, str] = {}


def change_password(old: SecretStr, new: SecretStr) -> None:
    """Use another password for new connections: `[redis] password` was changed and reloaded."""
    known, present = old.get_secret_value(), new.get_secret_value()
    if known and known != present:
        for first, latest in list(_changed_passwords.items()):
            if latest == known:
                _changed_passwords[first] = present
        _changed_passwords[known] = present


def _present(password: str) -> str:
    return _changed_passwords.get(password, password)


class _Credentials(CredentialProvider):
    """User and present password, for each new connection of a redis-py client."""

    def __init__(self, endpoint: RedisEndpoint) -> None:
        self._endpoint = endpoint

    @override
    def get_credentials(self) -> tuple[str] | tuple[str, str]:
        user, password = self._endpoint.username, _present(self._endpoint.password)
        return (user, password) if user else (password,)

    @override
    async def get_credentials_async(self) -> tuple[str] | tuple[str, str]:
        return self.get_credentials()


def refusal_text(exc: ResponseError) -> str:
    """Return the error reply as Redis sent it, code included."""
    text = str(exc)
    pipelined = _PIPELINED.fullmatch(text)
    if pipelined is not None:
        with suppress(ValueError, SyntaxError):
            text = str(ast.literal_eval(pipelined["text"]))
    # redis-py removes the code of errors that it has a class for.
    code = exc.status_code
    return f"{code} {text}" if code and code_of(text) != code else text


def refusal(command: str, reply: str) -> RelayError:
    """Return the error that an error reply to `command` means."""
    code = code_of(reply)
    if code in UNAVAILABLE_CODES:
        return RedisUnavailable(f"Redis cannot serve now: {reply}")
    if code in TEMPORARY_CODES:
        return RefusedForNow(command, reply)
    return CommandRefused(command, reply)


def error_reply(reply: object) -> str | None:
    """Return the text of an error in the result of a redis-py pipeline, or None for no error."""
    return refusal_text(reply) if isinstance(reply, ResponseError) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class RedisEndpoint:
    """One server to connect to. `path` is a unix socket; if set, host and port are ignored.

    `site` names the Sentinels that have named this primary; see `relay.stream.connection.sentinel`.
    """

    host: str = ""
    port: int = 6379
    path: str = ""
    db: int = 0
    username: str = ""
    password: str = field(default="", repr=False)
    tls: ssl.SSLContext | None = field(default=None, repr=False, compare=False)
    site: str = field(default="", repr=False, compare=False)

    def __str__(self) -> str:
        """Return the address for logs and errors, without the password."""
        if self.path:
            return f"unix:{self.path}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sentinels:
    """Some Sentinels, the name of a primary, and how to connect to it, except its address."""

    addresses: tuple[tuple[str, int], ...]
    master: str
    endpoint: RedisEndpoint

    @property
    def site(self) -> str:
        """The name of this primary in `relay.stream.connection.sentinel`."""
        return f"{self.master} by Sentinel at {', '.join(f'{h}:{p}' for h, p in self.addresses)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Cluster:
    """Some nodes of a Redis Cluster. They report the others."""

    seeds: tuple[RedisEndpoint, ...]


def servers_of(settings: RedisSettings) -> list[RedisSettings]:
    """Return the settings of each server: `[redis] url` may be a list of URLs.

    Raises:
        ConfigError: A URL is invalid, two are of the same server, or one is of a Redis Cluster.
    """
    urls = _NEXT_URL.split(settings.url)
    servers = [settings.model_copy(update={"url": url}) for url in urls]
    if len(servers) == 1:
        return servers
    names: set[str] = set()
    for server in servers:
        if server.url == "embedded" or server.url.lower().startswith(_CLUSTER_SCHEMES):
            what = "the embedded one" if server.url == "embedded" else "a Redis Cluster"
            raise ConfigError(
                f"[redis] url: each of several servers must be an independent one, not {what}."
                " Nodes of a Cluster are one URL: redis+cluster://HOST1,HOST2"
            )
        name = server_name(server)
        if name in names:
            target = _parse_server(server)
            remedy = (
                "; Sentinels must monitor each primary under a name of its own"
                if isinstance(target, _Sentinels)
                else ""
            )
            raise ConfigError(f"[redis] url: the list contains {name} twice{remedy}")
        names.add(name)
    return servers


def server_name(settings: RedisSettings) -> str:
    """Return the name by which all workers identify this server.

    It is the same for all ways to write an address, and without user and password.
    """
    target = _parse_server(settings)
    if isinstance(target, _Sentinels):
        return f"{target.master}/{target.endpoint.db}"
    host = target.host.lower().removesuffix(".")
    with suppress(ValueError):
        host = ip_address(host).compressed
    return f"{replace(target, host=host)}/{target.db}"


def cluster_seeds(settings: RedisSettings) -> tuple[RedisEndpoint, ...]:
    """Return the nodes of a Redis Cluster that the URL names. Empty if it is another URL."""
    if not settings.url.lower().startswith(_CLUSTER_SCHEMES):
        return ()
    if _NEXT_URL.search(settings.url):
        servers_of(settings)  # raises an error
    target = _parse(settings)
    return target.seeds if isinstance(target, _Cluster) else ()


def check(settings: RedisSettings, setting: str) -> None:
    """Raise the ConfigError that `discover` would raise, with the name of the URL's setting."""
    with url_of(setting):
        _parse_server(settings)


@contextmanager
def url_of(setting: str) -> Iterator[None]:
    """Replace the name of the setting in a ConfigError about a URL that is in another setting."""
    try:
        yield
    except ConfigError as exc:
        raise ConfigError(str(exc).replace("[redis] url", setting)) from None


def describe(settings: RedisSettings) -> str:
    """Return the server's address for logs and errors, without the password."""
    if len(servers := servers_of(settings)) > 1:
        return ", ".join(map(describe, servers))
    target = _parse(settings)
    if isinstance(target, _Cluster):
        return f"cluster at {', '.join(map(str, target.seeds))}"
    if isinstance(target, RedisEndpoint):
        return str(target).removesuffix(":6379") + (f"/{target.db}" if target.db else "")
    return f"primary {target.site}"


def watched_sentinels(settings: RedisSettings) -> tuple[str, str, list[RedisEndpoint]]:
    """Return site, name of the primary and the Sentinels. All are empty without Sentinels."""
    target = _parse(settings)
    if not isinstance(target, _Sentinels):
        return "", "", []
    login = _login_to_sentinels(target, settings)
    endpoints = [replace(login, host=host, port=port) for host, port in target.addresses]
    return target.site, target.master, endpoints


def _login_to_sentinels(target: _Sentinels, settings: RedisSettings) -> RedisEndpoint:
    """Return how to connect to a Sentinel, without its address."""
    tls = target.endpoint.tls
    if settings.sentinel_tls != "same":
        tls = _tls_context(settings) if settings.sentinel_tls == "yes" else None
    password = settings.sentinel_password.get_secret_value()
    return RedisEndpoint(username=settings.sentinel_user, password=password, tls=tls)


def version_error(server: str, version: str) -> str:
    """Return the error if the server's version is too old, or an empty string."""
    major = version.partition(".")[0]
    if not major.isdigit() or int(major) >= _OLDEST_VERSION:
        return ""
    return f"{server.title()} {version}; relay needs Redis {_OLDEST_VERSION}.0 or newer, or Valkey"


async def check_server(client: RedisClient, settings: RedisSettings) -> None:
    """Raise StartError if the server is too old, or part of a Redis Cluster and the URL does not
    say so. Ignore other errors."""
    try:
        information = await command(client, "INFO", "server")
    except RelayError:
        return
    # Valkey reports here the version of Redis that it is compatible with.
    problem = version_error("Redis", str(information.get("redis_version", "")))
    if problem:
        raise StartError(f"[redis] url: {describe(settings)} is {problem}")
    modes = {str(information.get(f"{name}_mode")) for name in ("redis", "server", "valkey")}
    if "cluster" in modes and not cluster_seeds(settings):
        target = _parse_server(settings)
        tls = isinstance(target, RedisEndpoint) and target.tls is not None
        raise StartError(
            f"[redis] url: {describe(settings)} runs in cluster mode (cluster-enabled yes); set"
            f" url = {'rediss' if tls else 'redis'}+cluster://{describe(settings)}"
        )


def with_short_timeouts(settings: RedisSettings) -> RedisSettings:
    """Return settings for a question that others wait for, and that will be asked again."""
    limit_s = min(_SHORT_S, settings.connect_timeout_s, settings.command_timeout_s)
    limits = {"connect_timeout_s": limit_s, "command_timeout_s": limit_s}
    return settings.model_copy(update=limits)


async def discover(settings: RedisSettings) -> RedisEndpoint:
    """Return the server to connect to now.

    Raises:
        RedisUnavailable: No Sentinel returned a primary.
        ConfigError: The URL is invalid.
    """
    target = _parse_server(settings)
    if isinstance(target, RedisEndpoint):
        return target
    async with _sentinel(target, settings) as asked_all:
        try:
            with cancellation_kept():
                host, port = await asked_all.discover_master(target.master)
        except (RedisError, OSError) as exc:
            asked = ", ".join(f"{host}:{port}" for host, port in target.addresses)
            raise RedisUnavailable(
                f"no Sentinel at {asked} returned a primary named {target.master}: {exc}"
            ) from exc
    return replace(target.endpoint, host=host, port=port, site=target.site)


@asynccontextmanager
async def redis_client(settings: RedisSettings) -> AsyncIterator[Redis]:
    """Open a redis-py client of one server and close it at the end. Replies are bytes."""
    target = _parse_server(settings)
    if isinstance(target, _Sentinels):
        async with _sentinel(target, settings) as asked_all:
            # Asks the Sentinels again at each new connection.
            tls = target.endpoint.tls is not None
            client = asked_all.master_for(
                target.master,
                connection_class=AnyAddressOfPrimaryTls if tls else AnyAddressOfPrimary,
                **_options(target.endpoint, settings),
                **_tls_options(target.endpoint, settings),
            )
            sentinel.follow_with_client(target.site, client)
            async with client:
                yield client
        return
    async with endpoint_client(target, settings) as client:
        yield client


def endpoint_client(endpoint: RedisEndpoint, settings: RedisSettings) -> Redis:
    """Return a redis-py client for one server."""
    options = _options(endpoint, settings)
    if endpoint.path:
        client = Redis(unix_socket_path=endpoint.path, **options)
        client.connection_pool.connection_class = UnixSocket
        return client
    tls = _tls_options(endpoint, settings)
    client = Redis(host=endpoint.host, port=endpoint.port, **options, **tls)
    client.connection_pool.connection_class = AnyAddressTls if tls else AnyAddress
    return client


@asynccontextmanager
async def cluster_client(settings: RedisSettings) -> AsyncIterator[RedisClient]:
    """Open redis-py's client of a Redis Cluster and close it at the end.

    It sends each command to the server that has its key and follows redirections. All keys of a
    pipeline must be in one slot.
    """
    seeds = cluster_seeds(settings)
    options = _options(seeds[0], settings)
    del options["db"]
    options["retry"] = Retry(EqualJitterBackoff(cap=_CLUSTER_PAUSE_S, base=0.02), _CLUSTER_ATTEMPTS)
    client = ClusterClient(
        [(seed.host, seed.port) for seed in seeds],
        **options,
        **_tls_options(seeds[0], settings),
    )
    try:
        # It has the methods of a client of one server that relay uses.
        yield cast(RedisClient, client)
    finally:
        await client.aclose()


@contextmanager
def translated() -> Iterator[None]:
    """Translate exceptions of redis-py into relay's. Keep cancellations, which it may swallow."""
    try:
        with cancellation_kept():
            yield
    except (ReadOnlyError, MasterDownError, ClusterDownError, BusyLoadingError) as exc:
        raise RedisUnavailable(f"Redis cannot serve now: {exc}") from exc
    except ResponseError as exc:
        raise refusal("Redis", refusal_text(exc)) from exc
    except (RedisError, RedisClusterException, OSError) as exc:
        raise RedisUnavailable(f"Redis: {exc}") from exc
    except (AttributeError, TypeError) as exc:
        if not _is_closed(exc):
            raise
        raise RedisUnavailable("Redis: the connection was closed") from exc


def _is_closed(exc: AttributeError | TypeError) -> bool:
    """Return True if redis-py has used a connection, or a server of a Cluster, that is gone.

    redis-py 8.1 then uses None (its issues 3546, 3835 and 4287).
    """
    trace = exc.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    raised_in = trace.tb_frame.f_globals["__name__"] if trace is not None else ""
    return str(exc).startswith("'NoneType' object ") and not raised_in.startswith("relay.")


async def command(client: RedisClient, *words: bytes | str | int) -> Any:
    """Send one command through redis-py and return its reply, parsed as redis-py does."""
    # Without this option, redis-py's parser replaces the value that SET ... GET returns by False.
    options = {"get": True} if words[0] == "SET" and "GET" in words[3:] else {}
    with translated():
        return await client.execute_command(*words, **options)  # type: ignore[no-untyped-call]


@asynccontextmanager
async def transaction(client: RedisClient) -> AsyncIterator[Pipeline]:
    """Collect commands for a transaction, to be executed inside the block.

    Raises:
        RedisUnavailable, CommandRefused: Redis rejected the transaction.
    """
    try:
        with translated():
            # The client of a Redis Cluster connects here.
            async with client.pipeline(transaction=True) as pipeline:
                yield pipeline
    except CommandRefused as exc:
        if leaves_transaction(exc.reply) and isinstance(client, Redis):
            # The connection is back in the pool, and would only queue its next commands.
            await client.connection_pool.disconnect(inuse_connections=False)
        raise


@asynccontextmanager
async def pipelined(client: RedisClient) -> AsyncIterator[Pipeline]:
    """Collect commands for one pipeline, to be executed inside the block. Translate errors."""
    with translated():
        # The client of a Redis Cluster connects here.
        async with client.pipeline(transaction=False) as pipeline:
            yield pipeline


async def executed(pipeline: Pipeline) -> bool:
    """Execute a transaction. Return False if a watched key has changed: then nothing was done."""
    try:
        await pipeline.execute()
    except WatchError:
        return False
    return True


async def command_if_equal(
    client: RedisClient, key: bytes, value: bytes, *words: bytes | str | int
) -> bool:
    """Run one command if `key` has this value, in one step. Return whether it was run."""
    # WATCH, because the key may expire and be written by another worker between GET and the
    # command. Valkey has SET IFEQ for this, Redis 7 does not.
    async with transaction(client) as pipeline:
        await pipeline.watch(key)
        if await command(pipeline, "GET", key) != value:
            return False
        pipeline.multi()  # type: ignore[no-untyped-call]
        pipeline.execute_command(*words)
        try:
            await pipeline.execute()
        except WatchError:
            return False
    return True


async def time_ms(client: RedisClient) -> int:
    """Return the time of Redis, which entry IDs are made of, in milliseconds."""
    seconds, micros = await command(client, "TIME")
    return int(seconds) * 1000 + int(micros) // 1000


async def scan(client: RedisClient, pattern: bytes, count: int) -> AsyncIterator[list[bytes]]:
    """Yield matching keys in batches. A key may come twice. Concurrent changes may be missed."""
    cursor = 0
    while True:
        with translated():
            cursor, found = await client.scan(cursor, match=pattern, count=count)
        yield cast(list[bytes], found)
        if not cursor:
            return


async def scan_page(
    client: RedisClient, cursor: int, pattern: bytes, count: int
) -> tuple[int, list[bytes]]:
    """Return the next cursor, 0 at the end, and the matching ones of about `count` keys."""
    with translated():
        following, found = await client.scan(cursor, match=pattern, count=count)
    return int(following), cast(list[bytes], found)


@asynccontextmanager
async def _sentinel(
    target: _Sentinels, settings: RedisSettings
) -> AsyncIterator[sentinel.ConcurrentSentinels]:
    login = _login_to_sentinels(target, settings)
    tls = _tls_options(login, settings)
    asked_all = sentinel.ConcurrentSentinels(  # type: ignore[no-untyped-call]
        target.addresses,
        sentinel_kwargs={
            "username": login.username or None,
            "password": login.password or None,
            "socket_connect_timeout": settings.connect_timeout_s,
            "socket_timeout": settings.connect_timeout_s,
            # Don't retry: the next Sentinel is used instead.
            "retry": Retry(NoBackoff(), 0),
            **tls,
        },
    )
    for client in asked_all.sentinels:
        client.connection_pool.connection_class = AnyAddressTls if tls else AnyAddress
    try:
        yield asked_all
    finally:
        for client in asked_all.sentinels:
            await client.aclose()


def _tls_options(endpoint: RedisEndpoint, settings: RedisSettings) -> dict[str, Any]:
    if endpoint.tls is None:
        return {}
    return {
        "ssl": True,
        "ssl_ca_certs": settings.tls_ca or None,
        "ssl_certfile": settings.tls_cert or None,
        "ssl_keyfile": settings.tls_key or settings.tls_cert or None,
    }


def _options(endpoint: RedisEndpoint, settings: RedisSettings) -> dict[str, Any]:
    return {
        "db": endpoint.db,
        "credential_provider": _Credentials(endpoint) if endpoint.password else None,
        "username": None if endpoint.password else endpoint.username or None,
        "socket_connect_timeout": settings.connect_timeout_s,
        "socket_timeout": settings.command_timeout_s,
        "protocol": 3,
        # One retry, for a pooled connection that was closed unnoticed. Callers do further retries.
        "retry": Retry(NoBackoff(), 1),
        # Don't send CLIENT SETINFO and CLIENT MAINT_NOTIFICATIONS: the ACL user would need rules
        # for them.
        "driver_info": None,
        "maint_notifications_config": MaintNotificationsConfig(enabled=False),
    }


def _parse_server(settings: RedisSettings) -> RedisEndpoint | _Sentinels:
    """Parse the URL of one server. ConfigError if it names several."""
    if _NEXT_URL.search(settings.url):
        raise ConfigError("[redis] url: must be one server here, not a list of servers")
    target = _parse(settings)
    if isinstance(target, _Cluster):
        raise ConfigError("[redis] url: must be one server here, not a Redis Cluster")
    return target


def _parse(settings: RedisSettings) -> RedisEndpoint | _Sentinels | _Cluster:
    if settings.url == "embedded":
        return RedisEndpoint(host="127.0.0.1", port=settings.embedded_port)
    scheme, _, rest = settings.url.partition("://")
    authority = _AUTHORITY.match(rest)[0]  # type: ignore[index]  # matches any text
    # `urlsplit` does not get the authority: some versions reject a list with an IPv6 address, and
    # it converts the host to lower case.
    url = urlsplit(f"{scheme}://{rest[len(authority) :]}")
    # `urlsplit` removes tabs and line breaks without an error.
    if "@" in url.path + url.query + url.fragment or _CONTROL.search(settings.url):
        raise ConfigError(f"[redis] url is not a valid URL{_ENCODE}")
    login, _, location = authority.rpartition("@")
    if "[" in login or "]" in login:
        raise ConfigError(f"[redis] url is not a valid URL{_ENCODE}")
    user, _, password = login.partition(":")
    try:
        user, password = unquote(user, errors="strict"), unquote(password, errors="strict")
    except UnicodeDecodeError:
        raise ConfigError("[redis] url: user or password is not UTF-8") from None
    if "@" in login and "," in login and url.scheme in (*_SENTINEL_SCHEMES, *_CLUSTER_SCHEMES):
        raise ConfigError(
            "[redis] url: write user and password once, before the first address" + _ENCODE
        )
    configured = settings.password.get_secret_value()
    base = RedisEndpoint(username=user or settings.user, password=password or _present(configured))
    if url.scheme == "unix":
        db = parse_qs(url.query).get("db", ["0"])[0]
        if not url.path or location:
            raise ConfigError("[redis] url: unix:// needs an absolute path, unix:///path?db=0")
        return replace(base, path=unquote(url.path), db=_db(db))
    if url.scheme in ("rediss", "rediss+sentinel", "rediss+cluster"):
        base = replace(base, tls=_tls_context(settings))
    if url.scheme in _SENTINEL_SCHEMES:
        return _sentinels(base, location, url)
    if url.scheme in _CLUSTER_SCHEMES:
        if url.path.strip("/") or url.query or url.fragment:
            raise ConfigError("[redis] url: a Redis Cluster has one database, use host:port only")
        addresses = [_address(part.strip(), 6379) for part in location.split(",")]
        return _Cluster(seeds=tuple(replace(base, host=h, port=p) for h, p in addresses))
    if url.scheme not in ("redis", "rediss") or url.query or url.fragment:
        raise ConfigError(f"[redis] url: must be {_SCHEMES}")
    host, port = _address(location, 6379)
    return replace(base, host=host, port=port, db=_db(url.path.removeprefix("/") or "0"))


def _tls_context(settings: RedisSettings) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=settings.tls_ca or None)
    except (OSError, ssl.SSLError) as exc:
        raise ConfigError(f"[redis] tls_ca: cannot be read: {exc}") from exc
    if settings.tls_cert:
        try:
            context.load_cert_chain(settings.tls_cert, settings.tls_key or None)
        except (OSError, ssl.SSLError) as exc:
            raise ConfigError(f"[redis] tls_cert or tls_key: cannot be read: {exc}") from exc
    return context


def _sentinels(base: RedisEndpoint, location: str, url: SplitResult) -> _Sentinels:
    name, _, db = url.path.strip("/").partition("/")
    master = unquote(name)
    if not master:
        raise ConfigError(
            "[redis] url: redis+sentinel:// needs the primary's name after the addresses"
        )
    addresses = tuple(_address(part.strip(), 26379) for part in location.split(","))
    return _Sentinels(addresses=addresses, master=master, endpoint=replace(base, db=_db(db or "0")))


def _address(text: str, default_port: int) -> tuple[str, int]:
    if _SEPARATOR.search(text):
        raise ConfigError(
            "[redis] url: address must be host:port. Several servers are one URL each, separated by"
            " commas: redis://HOST1, redis://HOST2"
        )
    host, colon, port = text.rpartition(":")
    if not colon or "]" in port:  # no port, or the colons are those of [::1]
        host, port = text, ""
    if bracketed := host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    if "[" in host or "]" in host:
        raise ConfigError(f"[redis] url is not a valid URL{_ENCODE}")
    if ":" in host and not bracketed:
        raise ConfigError("[redis] url: an IPv6 address must be in brackets, as in [::1]")
    host = unquote(host)
    if not host or (port and not (port.isascii() and port.isdigit() and 0 < int(port) < 65536)):
        raise ConfigError("[redis] url: address must be host:port")
    return host, int(port) if port else default_port


def _db(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise ConfigError("[redis] url: database must be a number")
    return int(text)
