"""No rejected request and no unused subscription leaves a key in Redis."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import time
from collections.abc import Iterator
from typing import Any, cast

import aiohttp
import pytest
from redis import Redis

from tests.support.relay import RelayProcess
from tests.support.valkey import Server

pytestmark = pytest.mark.redis
SECRET = "a secret of the Centrifugo protocol"
NAMES = 40


@pytest.fixture(scope="module")
def relay(valkey: Server) -> Iterator[RelayProcess]:
    settings = [f"protocol:centrifugo.secret={SECRET}", "jobs.retention_s=1"]
    process = RelayProcess(valkey, settings=settings).start()
    yield process
    process.kill()


def streams(relay: RelayProcess) -> list[bytes]:
    redis = cast("Redis", relay.redis())
    return list(redis.scan_iter("relay:stream:*", count=1000))


async def ask(socket: aiohttp.ClientWebSocketResponse, command: dict[str, Any]) -> Any:
    await socket.send_json(command)
    return await socket.receive_json(timeout=30)


async def connect(
    http: aiohttp.ClientSession, relay: RelayProcess
) -> aiohttp.ClientWebSocketResponse:
    now = str(int(time.time()))
    token = hmac.new(SECRET.encode(), f"anna{now}".encode(), hashlib.sha256).hexdigest()
    params = {"user": "anna", "timestamp": now, "info": "", "token": token}
    socket = await http.ws_connect(f"{relay.url}/connection/websocket")
    reply = await ask(socket, {"uid": "1", "method": "connect", "params": params})
    assert not reply.get("error"), reply
    return socket


async def test_rejected_requests_create_no_stream(relay: RelayProcess) -> None:
    elsewhere = relay.token("ben", ["other"])
    async with aiohttp.ClientSession() as http:
        for n in range(NAMES):
            url = f"{relay.url}/sse?channel=x{n}"
            async with http.get(url) as reply:
                assert reply.status in (401, 403)
            async with http.get(url, headers={"Authorization": f"Bearer {elsewhere}"}) as reply:
                assert reply.status == 403
        async with http.ws_connect(f"{relay.url}/ws?access_token={elsewhere}") as socket:
            for n in range(NAMES):
                reply = await ask(socket, {"cmd": "subscribe", "channel": f"y{n}"})
                assert "error" in reply
        socket = await connect(http, relay)
        for name in ("$private", "team#bob", "own&somebody", "seafile:1", "pydio:1", "axr:1"):
            reply = await ask(
                socket, {"uid": "2", "method": "subscribe", "params": {"channel": name}}
            )
            assert reply.get("error"), reply
        await socket.close()
    assert streams(relay) == []


async def test_subscriptions_of_one_user_leave_nothing(relay: RelayProcess) -> None:
    async with aiohttp.ClientSession() as http:
        socket = await connect(http, relay)
        for n in range(NAMES):
            params = {"channel": f"c{n}"}
            reply = await ask(socket, {"uid": "2", "method": "subscribe", "params": params})
            assert not reply.get("error"), reply
        assert len(streams(relay)) == NAMES
        relay.xadd("c0", data="1")
        await socket.close()
    async with asyncio.timeout(30):
        while len(streams(relay)) > 1:
            await asyncio.sleep(0.1)
    assert streams(relay) == [b"relay:stream:{c0}"]


@pytest.mark.parametrize("text", ["", "[]", " [ ] "])
async def test_messages_without_effect_close_a_sockjs_websocket(
    relay: RelayProcess, text: str
) -> None:
    """Otherwise a client without credentials could keep a processor core busy."""
    async with (
        aiohttp.ClientSession() as http,
        http.ws_connect(f"{relay.url}/connection/1/abcdefgh/websocket") as socket,
        asyncio.timeout(30),
    ):
        assert await socket.receive_str() == "o"
        with contextlib.suppress(aiohttp.ClientConnectionError):
            for _ in range(400):
                await socket.send_str(text)
        assert (await socket.receive()).type == aiohttp.WSMsgType.CLOSE
        assert socket.close_code == 1008
