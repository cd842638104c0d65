"""Requests that reach another worker of the host than the session's worker."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import ssl
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest
from aiohttp import ClientError

from tests.support.centrifuge_js import running_node
from tests.support.certificate import certificate
from tests.support.clients import Refused, SseClient, redis, stream_key, until
from tests.support.polling import SECRET, SETTINGS, EngineIoPolling, Xhr, fresh_connections
from tests.support.relay import RelayProcess
from tests.support.socketio import CLIENTS as CLIENTS_JS
from tests.support.socketio import axr_token, connect_options, npm_clients
from tests.support.valkey import Server
from tests.support.workers import running, said, workers

pytestmark = [pytest.mark.redis, pytest.mark.timeout(120)]
# With this number, some requests reach the wrong worker except once in a million runs.
CLIENTS = 20
_NOTIFICATION_BYTES = 4096


@pytest.fixture
def channel(channel: str) -> str:
    """Return a channel name without a namespace."""
    return channel.partition(":")[2]


@contextmanager
def subscriber_to_everything(server: Server) -> Iterator[list[int]]:
    """Subscribe to all messages as an operator may, and yield the sizes of those between
    workers."""
    sizes: list[int] = []

    def on_message(message: dict[str, bytes]) -> None:
        if b":bus:" in message["channel"]:
            sizes.append(len(message["data"]))

    client = server.client("admin")
    subscriber = client.pubsub()  # type: ignore[no-untyped-call]
    subscriber.psubscribe(**{"*": on_message})
    thread = subscriber.run_in_thread(sleep_time=0.01)
    try:
        yield sizes
    finally:
        thread.stop()
        thread.join()
        client.close()


@asynccontextmanager
async def sessions(
    relay: RelayProcess, channel: str, count: int = CLIENTS
) -> AsyncIterator[list[Xhr]]:
    """Yield SockJS clients that are subscribed to the channel."""
    async with fresh_connections() as http:
        clients = [Xhr(http, relay, f"{channel}{number}") for number in range(count)]
        async with asyncio.TaskGroup() as tasks:
            for client in clients:
                tasks.create_task(client.connect("u", channel))
        yield clients


async def publish(clients: list[Xhr], channel: str) -> list[int]:
    """Publish the number of each client. Return the statuses of the requests."""
    async with asyncio.TaskGroup() as tasks:
        sending = [
            tasks.create_task(client.send("publish", channel=channel, data=number))
            for number, client in enumerate(clients)
        ]
    return [task.result() for task in sending]


def published(server: Server, channel: str) -> list[int]:
    """Return the numbers in the stream."""
    entries = redis(server, "XRANGE", stream_key(channel), "-", "+")
    return sorted(int(fields[b"data"]) for _, fields in entries)


async def test_a_subscriber_to_everything_changes_nothing(valkey: Server, channel: str) -> None:
    with subscriber_to_everything(valkey):
        async with running(valkey, *SETTINGS) as (relay, _), sessions(relay, channel) as clients:
            assert await publish(clients, channel) == [204] * CLIENTS
            for client in clients:
                await client.follow(CLIENTS)
            assert published(valkey, channel) == list(range(CLIENTS))


@pytest.mark.slow
async def test_a_publish_to_a_frozen_worker_is_carried_out_once(
    valkey: Server, channel: str
) -> None:
    async with running(valkey, *SETTINGS) as (relay, _), sessions(relay, channel) as clients:
        async with asyncio.TaskGroup() as tasks:
            for client in clients:
                tasks.create_task(client.poll())
            # Wait until the sessions have received these polls. Then freeze the worker.
            await asyncio.sleep(1)
            frozen = workers(relay)[1]
            os.kill(frozen, signal.SIGSTOP)
            asyncio.get_running_loop().call_later(11, os.kill, frozen, signal.SIGCONT)
            statuses = await publish(clients, channel)
        # Sessions of the other worker may have expired, because their polls have been answered.
        assert set(statuses) <= {204, 404}
        expected = [number for number, status in enumerate(statuses) if status == 204]
        await until(lambda: published(valkey, channel) == expected)


@pytest.mark.parametrize("upgrade", ["h2c", "websocket", "x"])
async def test_a_post_that_offers_an_upgrade_is_answered(
    valkey: Server, channel: str, upgrade: str
) -> None:
    headers = {"Upgrade": upgrade, "Connection": "Upgrade, HTTP2-Settings", "HTTP2-Settings": "AA"}
    async with running(valkey, *SETTINGS) as (relay, _), fresh_connections() as http:
        client = EngineIoPolling(http, relay)
        await client.open(channel)
        async with asyncio.timeout(30):
            for _ in range(CLIENTS):
                assert await client.post('42/axr,["x"]', headers) == 200
            # Node's clients send a body without Content-Length in this way.
            for size in (1, 100, 300_000):
                body = '42/axr,["' + "x" * size + '"]'
                for _ in range(4):
                    assert await client.post(body, chunked=True) == 200


@pytest.mark.parametrize("keep", [False, True], ids=["new connections", "kept connections"])
async def test_connections_with_tls_are_copied(
    valkey: Server, channel: str, tmp_path: Path, keep: bool
) -> None:
    path = certificate(tmp_path)
    tls = ssl.create_default_context(cafile=str(path))
    async with (
        running(valkey, f"server.tls_cert={path}", *SETTINGS) as (relay, _),
        fresh_connections(tls, keep=keep) as http,
    ):
        url = relay.url.replace("http:", "https:")
        clients = [EngineIoPolling(http, relay, url) for _ in range(CLIENTS)]
        for client in clients:
            await client.open(channel)
        for number in range(5):
            relay.xadd(f"axr:{channel}", data=json.dumps({"n": number}), type="msg")
            async with asyncio.TaskGroup() as tasks:
                sending = [
                    tasks.create_task(client.post('42/axr,["' + "x" * 60_000 * number + '"]'))
                    for client in clients
                ]
                polls = [tasks.create_task(client.poll()) for client in clients]
            assert {each.result() for each in sending} == {200}
            assert all(f'"n": {number}' in each.result() for each in polls)
        # Upgrade to a WebSocket.
        for client in clients:
            async with http.ws_connect(client.url.replace("polling", "websocket")) as socket_:
                await socket_.send_str("2probe")
                assert await socket_.receive_str() == "3probe"


async def test_events_do_not_travel_between_workers(valkey: Server, channel: str) -> None:
    text = "x" * 200_000
    with subscriber_to_everything(valkey) as sizes:
        async with running(valkey, *SETTINGS) as (relay, _), fresh_connections() as http:
            clients = [EngineIoPolling(http, relay) for _ in range(CLIENTS)]
            for client in clients:
                await client.open(channel)
            for _ in range(3):
                relay.xadd(f"axr:{channel}", data=json.dumps(text), type="msg")
            for client in clients:
                found = ""
                while found.count(text) < 3:
                    found += await client.poll()
        assert max(sizes, default=0) <= _NOTIFICATION_BYTES


async def test_a_client_that_reads_an_answer_slowly_uses_its_connection_again(
    valkey: Server, channel: str
) -> None:
    # Larger than the buffers of the kernel.
    text = "x" * 9_000_000
    large = "stream.max_entry_bytes=10000000"
    async with running(valkey, large, *SETTINGS) as (relay, _), fresh_connections() as http:
        client = EngineIoPolling(http, relay)
        await client.open(channel)
        request = f"GET {client.url.removeprefix(relay.url)} HTTP/1.1\r\nHost: x\r\n\r\n".encode()
        slow = socket.socket()
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.setblocking(False)
        await asyncio.get_running_loop().sock_connect(slow, ("127.0.0.1", relay.port))
        reader, writer = await asyncio.open_connection(sock=slow, limit=1 << 16)
        async with asyncio.timeout(30):
            for _ in range(3):
                writer.write(request)
                await writer.drain()
                # Wait until relay has received the request.
                await asyncio.sleep(0.2)
                relay.xadd(f"axr:{channel}", data=json.dumps(text), type="msg")
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.partition(b"Content-Length: ")[2].partition(b"\r\n")[0])
                assert text.encode() in await reader.readexactly(length)
        writer.close()
        assert not any("Traceback" in line for line in relay.log)


async def test_the_death_of_a_session_s_worker_is_noticed_at_once(
    valkey: Server, channel: str
) -> None:
    async with running(valkey, *SETTINGS) as (relay, _), sessions(relay, channel) as clients:
        lost: set[Xhr] = set()

        async def poll(client: Xhr) -> None:
            try:
                status, frame = await client.poll()
            except ClientError:
                status, frame = 0, b""
            if frame[:1] != b"a":
                # 404: relay received this poll after the worker had died.
                assert status in (0, 404), frame
                lost.add(client)

        async def is_dead(client: Xhr) -> bool:
            return await client.send("ping") == 404

        async with asyncio.TaskGroup() as tasks:
            for client in clients:
                tasks.create_task(poll(client))
            # Let the sessions receive these polls. Then kill the worker.
            await asyncio.sleep(1)
            os.kill(workers(relay)[1], signal.SIGKILL)
            await said(relay, "Worker 1 ready", 2)
            dead = {client for client in clients if await is_dead(client)}
            # Their polls end without an event.
            await until(lambda: lost == dead)
            # The other polls belong to sessions of the other worker, and receive this event.
            relay.xadd(channel, data="1")
        assert lost == dead
        assert 0 < len(dead) < CLIENTS


async def test_users_are_not_locked_out_when_a_worker_dies(valkey: Server, channel: str) -> None:
    transports = ("xhr-polling", "xhr-streaming", "eventsource")
    limit = "protocol:centrifugo.user_connection_limit=1"
    async with running(valkey, limit, *SETTINGS) as (relay, _), running_node(SECRET) as node:
        clients = [
            node.client(f"{relay.url}/connection", f"{channel}{number}", transports=[transport])
            for number, transport in enumerate(transports * 5)
        ]
        for client in clients:
            await client.connected()
            await client.subscribed(channel)
        for number in (1, 2):
            os.kill(workers(relay)[number], signal.SIGKILL)
            await said(relay, f"Worker {number} ready", 2)
        # All clients reconnect.
        async with asyncio.timeout(30):
            for client in clients:
                while not any(each["on"] == "message" for each in client.said):
                    relay.xadd(channel, data="1")
                    await asyncio.sleep(0.1)
        reasons = {each.get("reason") for client in clients for each in client.said}
        assert "limit exceeded" not in reasons


async def test_events_arrive_once_when_a_worker_stops(valkey: Server, channel: str) -> None:
    count = 400
    async with running(valkey, *SETTINGS) as (relay, _), npm_clients() as npm:
        clients = []
        for number, package in enumerate(CLIENTS_JS * 4):
            options = connect_options(package, axr_token(f"{channel}{number}"))
            client = await npm.open(
                f"{relay.url}/axr", package=package, transports=["polling"], **options
            )
            await client.until("connect")
            clients.append((package, client))

        done = asyncio.Event()

        async def produce() -> None:
            number = 0
            while not done.is_set():
                await asyncio.to_thread(
                    relay.xadd, "axr:allusers", data=json.dumps({"n": number}), type="msg"
                )
                number += 1
                if number == count // 2:
                    os.kill(workers(relay)[1], signal.SIGTERM)
                if number > count:
                    await asyncio.sleep(0.01)

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(produce())
            lost = 0
            for package, client in clients:
                numbers: list[int] = []
                while not numbers or numbers[-1] < 2 * count:
                    found = await client.next(20)
                    if found["what"] == "event":
                        numbers.append(found["args"][1]["n"])
                    lost += found["what"] == "disconnect"
                assert sorted(set(numbers)) == numbers, [x for x in numbers if numbers.count(x) > 1]
                if package == "socket.io-client":
                    # Older clients have no recovery.
                    assert numbers == list(range(numbers[-1] + 1))
            done.set()
        assert lost


async def _is_open(stream: SseClient) -> bool:
    try:
        while (await stream.next()).data != "1":
            pass
    except EOFError:
        return False
    return True


def _seats(server: Server) -> int:
    keys = redis(server, "KEYS", "relay:users:*")
    return sum(int(count) for key in keys for count in redis(server, "HVALS", key))


@pytest.mark.slow
async def test_a_worker_that_was_frozen_checks_its_users_again(
    valkey: Server, channel: str
) -> None:
    limit = "hub.connections_per_user=2"
    async with (
        running(valkey, limit, count=1) as (relay, door),
        running(valkey, limit, count=1) as (_, other),
    ):
        before = [await door.sse(channel) for _ in range(2)]
        relay.send(signal.SIGSTOP)
        try:
            # The connections of the suspended worker are still counted for some seconds.
            async with asyncio.timeout(30):
                while True:
                    with contextlib.suppress(Refused):
                        third = await other.sse(channel)
                        break
        finally:
            relay.send(signal.SIGCONT)
        async with asyncio.TaskGroup() as tasks:
            reading = [tasks.create_task(_is_open(each)) for each in before]
            # The worker disconnects the client for which there is no room any more.
            await asyncio.wait(reading, return_when=asyncio.FIRST_COMPLETED)
            assert _seats(valkey) == 2
            relay.xadd(channel, data="1")
            assert (await third.next()).json() == 1
        assert sorted(each.result() for each in reading) == [False, True]
