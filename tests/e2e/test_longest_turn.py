"""The heaviest requests of each protocol do not hold a worker's event loop."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import io
import json
import os
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import cast

import aiohttp
import pytest
from redis import Redis

from relay.protocols import protocol_names
from tests.support.pydio import KEY as PYDIO_KEY
from tests.support.relay import ROOT, RelayProcess
from tests.support.seafile import KEY as SEAFILE_KEY
from tests.support.seafile import new_library, subscribe_token
from tests.support.socketio import SECRET as SOCKETIO_SECRET
from tests.support.valkey import Server

pytestmark = [pytest.mark.redis, pytest.mark.timeout(60)]

SECRET = "a secret of the Centrifugo protocol"
# The aim is 10 ms. One full garbage collection may take 100 ms.
LONGEST_MS = 250
MB = 1_000_000
# The JSON text whose parsing takes longest.
LISTS = "[" + "[]," * (MB // 3) + "[]]"


@pytest.fixture(scope="module")
def turns(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("turns") / "turns"


@pytest.fixture(scope="module")
def relay(valkey: Server, turns: Path) -> Iterator[RelayProcess]:
    settings = [f"protocol:centrifugo.secret={SECRET}", f"protocol:pydio.key={PYDIO_KEY}"]
    settings += ["protocol:centrifugo.history_size=20", "protocol:centrifugo.history_lifetime=600"]
    settings += [
        f"protocol:seafile.key={SEAFILE_KEY}",
        f"protocol:socketio.secret={SOCKETIO_SECRET}",
    ]
    settings += ["producer:queue.enabled=yes"]
    settings += ["protocol:pydio.auth_url=http://127.0.0.1:9/"]
    path = f"PYTHONPATH={ROOT}:{ROOT / 'tests' / 'support' / 'turn_monitor'}"
    prefix = ["env", path, f"RELAY_TURNS={turns}"]
    process = RelayProcess(valkey, settings=settings, prefix=prefix).start()
    yield process
    process.kill()


class Site:
    """A relay and an HTTP session for its clients."""

    def __init__(self, relay: RelayProcess, http: aiohttp.ClientSession) -> None:
        self.relay = relay
        self.http = http

    async def post(self, path: str, body: bytes, **headers: str) -> tuple[int, bytes]:
        # A rejected request may be closed before it has been sent.
        with suppress(aiohttp.ClientError):
            url = self.relay.url + path
            async with self.http.post(url, data=io.BytesIO(body), headers=headers) as reply:
                return reply.status, await reply.read()
        return 0, b""

    async def follow(self, channel: str) -> aiohttp.ClientResponse:
        headers = {"Authorization": f"Bearer {self.relay.token('ann', ['*'])}"}
        url = f"{self.relay.url}/sse?channel={channel}"
        return await self.http.get(url, headers=headers)

    def append(self, channel: str, data: str) -> None:
        redis = cast("Redis", self.relay.redis())
        redis.xadd(f"relay:stream:{{{channel}}}", {"data": data})

    async def api(self, body: str) -> bytes:
        sign = hmac.new(SECRET.encode(), body.encode(), hashlib.sha256).hexdigest()
        headers = {"Content-Type": "application/json", "X-API-Sign": sign}
        status, answer = await self.post("/api/", body.encode(), **headers)
        assert status == 200
        return answer


async def centrifugo(site: Site) -> None:
    """Send bodies with invalid signatures, batches, queue items and large events, and request
    their history. The members of commands have any order."""
    wrong = {"Content-Type": "application/json", "X-API-Sign": "0" * 64}
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    async with asyncio.TaskGroup() as tasks:
        for _ in range(12):
            tasks.create_task(site.post("/api/", b"x" * (8 * MB), **wrong))
            tasks.create_task(site.post("/api/", b"sign=a&data=" + b"%41" * MB, **form))
    publish = '{"method":"publish","params":{"channel":"%s","data":%s}}'
    await site.api("[" + ",".join(publish % (f"c{n % 100}", n) for n in range(5000)) + "]")
    await site.api(f'{{"params":{{"data":{LISTS},"channel":"large"}},"method":"publish"}}')
    batch = [json.loads(publish % (f"q{n % 50}", n)) for n in range(15_000)]
    redis = cast("Redis", site.relay.redis())
    redis.rpush("centrifugo.api", json.dumps({"data": batch}))
    while redis.llen("centrifugo.api"):
        await asyncio.sleep(0.05)
    spaced = LISTS.replace(",", ", ")
    for _ in range(10):
        await site.api(publish % ("large", spaced))
    answer = await site.api('{"method":"history","params":{"channel":"large"}}')
    assert len(json.loads(answer)[0]["body"]["data"]) == 11


async def native(site: Site) -> None:
    """Send a large entry, a long cursor, and many subscriptions at once."""
    reader = await site.follow("large-native")
    site.append("large-native", LISTS)
    site.append("large-native", '["\\ud800",' + LISTS + "]")
    while b"ud800" not in await reader.content.readany():
        pass
    reader.close()
    async with site.http.ws_connect(f"{site.relay.url}/ws") as socket:
        for number in range(1000):
            await socket.send_str(json.dumps({"cmd": "subscribe", "channel": f"n{number}"}))
        await socket.receive(timeout=30)
    await site.http.get(f"{site.relay.url}/sse?channel=a&last_event_id=" + "A" * 60_000)


async def pydio(site: Site) -> None:
    """Send large messages to the private path, with and without a valid key."""
    body = json.dumps({"REPO_ID": "w", "CONTENT": "x"})[:-1] + ',"more":' + LISTS[:900_000] + "]}"
    arrays = 80_000
    php = b's:7:"REPO_ID";s:1:"w";s:7:"CONTENT";s:1:"x";s:4:"more";a:%d:{' % arrays
    php = b"a:3:{" + php + b"".join(b"i:%d;a:0:{}" % n for n in range(arrays)) + b"}}"
    for key in ("wrong:wrong", PYDIO_KEY):
        async with asyncio.TaskGroup() as tasks:
            for each in (body.encode(), php, php):
                headers = {"Content-Type": "application/json", "Admin-Key": key}
                tasks.create_task(site.post("/private", each, **headers))


async def seafile(site: Site) -> None:
    """Send a message that subscribes to 10,000 libraries, half of them with invalid tokens."""
    token = subscribe_token(new_library())
    repos = [{"id": new_library(), "jwt_token": token + "x" * (n % 2)} for n in range(10_000)]
    async with site.http.ws_connect(f"{site.relay.url}/notification") as socket:
        await socket.send_str(json.dumps({"type": "subscribe", "content": {"repos": repos}}))
        await socket.send_str(json.dumps({"type": "subscribe", "content": {"repos": []}}))
        with suppress(TimeoutError):
            await socket.receive(timeout=3)


async def socketio(site: Site) -> None:
    """Send a request with 160,000 packets, and a large packet before login."""
    url = f"{site.relay.url}/socket.io/?EIO=4&transport=polling"
    for packets in (b"\x1e".join([b"40/a,"] * 160_000), b'40/axr,{"token":' + LISTS.encode()[:MB]):
        async with site.http.get(url) as reply:
            sid = json.loads((await reply.text())[1:])["sid"]
        await site.post(f"/socket.io/?EIO=4&transport=polling&sid={sid}", packets)
    reader = await site.follow("axr:room")
    site.append("axr:room", LISTS)
    await reader.content.readany()
    reader.close()


HEAVIEST: dict[str, Callable[[Site], Awaitable[None]]] = {
    each.__name__: each for each in (centrifugo, native, pydio, seafile, socketio)
}


@pytest.mark.parametrize("protocol", protocol_names())
async def test_no_request_holds_the_event_loop(
    protocol: str, relay: RelayProcess, turns: Path
) -> None:
    before = os.path.getsize(turns)
    async with aiohttp.ClientSession() as http:
        site = Site(relay, http)
        await HEAVIEST[protocol](site)
        # This reply arrives after a beat of the timer, so that the last turn is measured.
        async with http.get(f"{relay.url}/healthz") as reply:
            assert reply.status == 200
    measured = [float(line) for line in turns.read_text()[before:].split()]
    assert max(measured, default=0.0) < LONGEST_MS
