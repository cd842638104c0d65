"""Parts of the protocol that belong to SockJS: sizes, close frames, URLs."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator

import aiohttp
import pytest

from tests.support.centrifugo_client import SECRET, sign
from tests.support.relay import RelayProcess
from tests.support.valkey import Server

pytestmark = pytest.mark.redis


@pytest.fixture(scope="module")
def relay(valkey: Server) -> Iterator[RelayProcess]:
    settings = [f"secret={SECRET}", "client_request_max_size=1000", "sockjs_url=/here.js"]
    settings = [f"protocol:centrifugo.{each}" for each in settings]
    process = RelayProcess(valkey, settings=settings).start()
    yield process
    process.kill()


class Polls:
    """One xhr session."""

    def __init__(self, session: aiohttp.ClientSession, relay: RelayProcess, name: str) -> None:
        self._session = session
        self._url = f"{relay.url}/connection/000/{name}"

    async def poll(self) -> str:
        async with self._session.post(f"{self._url}/xhr") as answer:
            assert answer.status == 200
            return (await answer.text()).removesuffix("\n")

    async def send(self, *frames: str) -> int:
        async with self._session.post(f"{self._url}/xhr_send", data=json.dumps(frames)) as answer:
            return answer.status


@pytest.fixture
async def polls(relay: RelayProcess, request: pytest.FixtureRequest) -> AsyncIterator[Polls]:
    async with aiohttp.ClientSession() as session:
        one = Polls(session, relay, request.node.name)
        assert await one.poll() == "o"
        yield one


def connect() -> str:
    given = {"user": "ann", "timestamp": "1", "info": "", "token": sign("ann", "1", "")}
    return json.dumps({"uid": "1", "method": "connect", "params": given})


async def test_frames_of_one_request_are_answered_together_or_in_order(polls: Polls) -> None:
    assert await polls.send(connect(), '{"uid":"2","method":"ping"}') == 204
    heard: list[str] = []
    while len(heard) < 2:
        frame = await polls.poll()
        assert frame[0] == "a"
        heard += [json.loads(each)["uid"] for each in json.loads(frame[1:])]
    assert heard == ["1", "2"]


async def test_a_fatal_error_is_a_close_frame_that_is_repeated(polls: Polls) -> None:
    assert await polls.send('{"method":"ping"}') == 204
    wanted = r'c[3000,"{\"reason\":\"unauthorized\",\"reconnect\":false}"]'
    assert await polls.poll() == wanted
    assert await polls.poll() == wanted


async def test_a_too_large_frame(polls: Polls) -> None:
    assert await polls.send(connect()) == 204
    assert (await polls.poll())[0] == "a"
    # The body contains several escaped frames, so that it may be larger than one frame.
    assert await polls.send(*['{"method":"ping","params":{"data":"%s"}}' % ("x" * 900)] * 3) == 204
    assert await polls.send('{"method":"ping","params":{"data":"%s"}}' % ("x" * 1000)) == 204
    frames = ""
    while not (frame := await polls.poll()).startswith("c"):
        frames += frame
    assert frame == r'c[3000,"{\"reason\":\"limit exceeded\",\"reconnect\":false}"]'


async def test_a_too_large_body(polls: Polls) -> None:
    await polls.send("x" * 100_000)
    assert "limit exceeded" in await polls.poll()


async def test_the_other_urls_of_sockjs(relay: RelayProcess) -> None:
    async with aiohttp.ClientSession() as session:
        for path, status, text in [
            ("/connection/", 200, "Welcome to SockJS!\n"),
            ("/connection/info", 200, '"websocket":true'),
            ("/connection/iframe.html", 200, "/here.js"),
            ("/connection/websocket", 400, "Bad Request"),
            ("/connection/000/abc/nothing", 404, ""),
        ]:
            async with session.get(relay.url + path) as answer:
                assert answer.status == status, path
                assert text in (await answer.text()).replace(": ", ":"), path
