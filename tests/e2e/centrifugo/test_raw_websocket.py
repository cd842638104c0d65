"""The raw websocket: sizes, pings, compression, slow and silent clients, shutdown."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest
from aiohttp import ClientConnectionResetError, WSMsgType

from tests.support.centrifugo_client import SECRET, sign
from tests.support.clients import native, stream_key
from tests.support.relay import RelayProcess
from tests.support.valkey import Server

pytestmark = [pytest.mark.redis, pytest.mark.timeout(60)]
# 20 MB: more than all buffers in between.
COUNT = 10_000
SETTINGS = {
    "secret": SECRET,
    "publish": "true",
    "recover": "true",
    "history_size": "100000",
    "history_lifetime": "60",
    "client_request_max_size": "10000",
    "client_queue_max_size": "100000",
    "client_stalled_s": "2",
    "websocket_compression": "true",
    "websocket_compression_min_size": "100",
}


@pytest.fixture(scope="module")
def relay(valkey: Server) -> Iterator[RelayProcess]:
    settings = [f"protocol:centrifugo.{key}={value}" for key, value in SETTINGS.items()]
    process = RelayProcess(valkey, settings=settings).start()
    yield process
    process.kill()


class Wire:
    """A websocket that returns the server's close frame."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.socket = socket

    async def send(self, text: str) -> None:
        await self.socket.send_str(text)

    async def next(self) -> Any:
        """Return the next text as JSON, or the close frame's code and reason."""
        message = await self.socket.receive(20)
        if message.type is WSMsgType.CLOSE:
            return message.data, message.extra
        assert message.type is WSMsgType.TEXT, message
        return json.loads(message.data)

    async def ask(self, method: str, **params: object) -> Any:
        await self.send(json.dumps({"uid": "1", "method": method, "params": params}))
        while (answer := await self.next()) and isinstance(answer, dict):
            if answer.get("uid") == "1":
                break
        return answer

    async def connect(self, user: str = "ann") -> Wire:
        token = sign(user, "1500000000")
        answer = await self.ask("connect", user=user, timestamp="1500000000", token=token)
        assert answer["body"]["client"]
        return self


@asynccontextmanager
async def wire(relay: RelayProcess, **options: Any) -> AsyncIterator[Wire]:
    async with (
        aiohttp.ClientSession() as session,
        session.ws_connect(
            f"{relay.url}/connection/websocket", autoclose=False, max_msg_size=0, **options
        ) as socket,
    ):
        yield Wire(socket)


async def test_a_plain_request_is_rejected(relay: RelayProcess) -> None:
    url = f"{relay.url}/connection/websocket"
    async with aiohttp.ClientSession() as session, session.get(url) as answer:
        assert (answer.status, await answer.text()) == (400, "Bad Request\n")
        assert answer.headers["X-Content-Type-Options"] == "nosniff"


async def test_binary_frames_are_accepted(relay: RelayProcess) -> None:
    async with wire(relay) as one:
        await one.connect()
        await one.socket.send_bytes(b'{"uid":"7","method":"ping"}')
        assert await one.next() == {"uid": "7", "method": "ping"}


async def test_a_too_large_frame_closes_with_1009(relay: RelayProcess) -> None:
    async with wire(relay) as one:
        await one.connect()
        await one.send(json.dumps({"method": "ping", "params": {"data": "x" * 10000}}))
        assert (await one.next())[0] == 1009


async def test_invalid_utf8_closes_only_its_client(relay: RelayProcess) -> None:
    async with wire(relay) as one, wire(relay) as other:
        await one.connect()
        await other.connect()
        await one.socket.send_bytes(b'{"uid":"\xff","method":"ping"}')
        assert await one.next() == (3000, '{"reason":"invalid message","reconnect":false}')
        assert (await other.ask("ping"))["method"] == "ping"


async def test_large_frames_are_compressed_on_request(relay: RelayProcess, channel: str) -> None:
    name = channel.partition(":")[2]
    async with wire(relay, compress=15) as squeezed, wire(relay) as plain:
        assert squeezed.socket.compress
        assert not plain.socket.compress
        for each in (squeezed, plain):
            await each.connect()
            assert (await each.ask("subscribe", channel=name))["body"]["status"] is True
        # The client's frames are compressed as well.
        data = {"text": "hallo " * 200}
        assert (await plain.ask("publish", channel=name, data=data))["body"]["status"] is True
        assert (await squeezed.next())["body"]["data"] == data
        answer = await squeezed.ask("publish", channel=name, data=1)
        assert answer["body"]["status"] is True
        found = await squeezed.ask("history", channel=name)
        assert [each["data"] for each in found["body"]["data"]] == [1, data]


async def test_many_commands_are_answered_in_order_without_delaying_others(
    relay: RelayProcess, channel: str
) -> None:
    name = channel.partition(":")[2]
    async with wire(relay) as flood, wire(relay) as other:
        await flood.connect()
        await other.connect()
        await flood.ask("subscribe", channel=name)
        count = 1500

        async def pour() -> None:
            for number in range(count):
                method = "publish" if number % 30 else "history"
                command = {"uid": str(number), "method": method}
                await flood.send(json.dumps({**command, "params": {"channel": name, "data": 1}}))

        async with asyncio.TaskGroup() as group:
            group.create_task(pour())
            for number in range(count):
                while "uid" not in (answer := await flood.next()):
                    pass
                assert answer["uid"] == str(number)
                if number % 100 == 0:
                    assert (await other.ask("ping"))["method"] == "ping"


def _append(server: Server, channel: str, first: int, count: int) -> None:
    with server.client() as client, client.pipeline(transaction=False) as pipeline:
        for number in range(first, first + count):
            data = json.dumps({"n": number, "load": "x" * 2000})
            pipeline.xadd(stream_key(channel), {"data": data})
        pipeline.execute()


async def _append_all(server: Server, channel: str) -> None:
    for start in range(0, COUNT, 500):
        await asyncio.to_thread(_append, server, channel, start, 500)


async def test_a_slow_client_receives_everything(
    relay: RelayProcess, valkey: Server, channel: str
) -> None:
    name = channel.partition(":")[2]
    async with wire(relay) as slow, native(relay) as door, asyncio.TaskGroup() as group:
        await slow.connect()
        await slow.ask("subscribe", channel=name)
        appending = group.create_task(_append_all(valkey, name))
        # Read slower than events arrive, so that the client is served from the stream.
        behind = False
        for number in range(COUNT):
            assert (await slow.next())["body"]["data"]["n"] == number
            if number % 100 == 0 and not behind:
                await asyncio.sleep(0.1)
                behind = bool(await door.metric("relay_catch_up_clients"))
        assert behind
        await appending


async def test_a_client_that_does_not_read_is_closed_as_slow(
    relay: RelayProcess, valkey: Server, channel: str
) -> None:
    name = channel.partition(":")[2]
    async with wire(relay) as stuck, native(relay) as door:
        await stuck.connect()
        await stuck.ask("subscribe", channel=name)
        await _append_all(valkey, name)
        # Relay has closed the connection. The pending data ends with the close reason.
        async with asyncio.timeout(30):
            while await door.metric('relay_connections{protocol="centrifugo"}') != 0:
                await asyncio.sleep(0.05)


async def _talk(silent: Wire) -> None:
    async with asyncio.timeout(30):
        while True:
            await silent.send('{"method":"ping"}')
            await asyncio.sleep(0.1)


async def test_only_a_pong_answers_a_ping(valkey: Server) -> None:
    settings = [f"secret={SECRET}", "ping_interval=9"]
    process = RelayProcess(valkey, settings=[f"protocol:centrifugo.{each}" for each in settings])
    await asyncio.to_thread(process.start)
    try:
        async with wire(process, autoping=False) as silent, wire(process) as answering:
            await silent.connect()
            await answering.connect()
            ping = await silent.socket.receive(20)
            assert (ping.type, ping.data) == (WSMsgType.PING, b"ping")
            async with asyncio.TaskGroup() as group:
                # aiohttp answers pings only while it waits for a message.
                waiting = group.create_task(answering.next())
                # A client that sends data but no pong is closed without a close frame.
                with pytest.raises(ClientConnectionResetError):
                    await _talk(silent)
                await answering.send('{"uid":"9","method":"ping"}')
                assert await waiting == {"uid": "9", "method": "ping"}
            while (message := await silent.socket.receive(10)).type is WSMsgType.TEXT:
                pass
            assert message.type is not WSMsgType.CLOSE
    finally:
        process.kill()


async def test_shutdown_closes_clients_with_and_without_authentication(valkey: Server) -> None:
    process = RelayProcess(valkey, settings=[f"protocol:centrifugo.secret={SECRET}"])
    await asyncio.to_thread(process.start)
    try:
        async with wire(process) as known, wire(process) as unknown:
            await known.connect()
            stopping = asyncio.get_running_loop().run_in_executor(None, process.stop)
            reason = '{"reason":"shutting down","reconnect":true}'
            assert await known.next() == (3000, reason)
            await known.socket.close()
            message = await unknown.socket.receive(10)
            assert message.type in (WSMsgType.CLOSED, WSMsgType.ERROR)
            assert await stopping == 0
    finally:
        process.kill()
