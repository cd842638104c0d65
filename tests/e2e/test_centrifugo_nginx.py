"""The nginx recipes of docs/centrifugo.md between clients and relay."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import closing
from http.client import HTTPConnection
from urllib.parse import urlsplit

import aiohttp
import pytest

from tests.support.centrifugo_site import SECRET, V1, fetch, publish, redis_flags, site
from tests.support.clients import within
from tests.support.nginx import nginx, recipes
from tests.support.valkey import Server, free_port

pytestmark = [
    pytest.mark.redis,
    pytest.mark.timeout(120),
    pytest.mark.single_server("options of Centrifugo v1, which has no Redis Cluster"),
]
LIMIT_S = 20.0
# A loopback address that the recipes do not allow.
ELSEWHERE = ("127.0.0.2", 0)
RECIPES = recipes("docs/centrifugo.md")
# Recipe, the path in nginx, and relay's own prefix.
CASES = [
    ("Use a separate domain", "", ""),
    ("Use a path of an existing site", "/centrifugo", "/centrifugo"),
    ("Use a path of an existing site 2", "/centrifugo", ""),
]


def test_the_list_contains_all_recipes() -> None:
    assert list(RECIPES) == [name for name, _, _ in CASES]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case[0])
def base(
    request: pytest.FixtureRequest, valkey: Server, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """The URL of the paths of a relay behind nginx, with each recipe."""
    recipe, path, prefix = request.param
    folder = tmp_path_factory.mktemp("behind")
    config = {"secret": SECRET, "http_prefix": prefix, "admin": True, "insecure_admin": True}
    (folder / "config.json").write_text(json.dumps(config))
    port = free_port()
    with (
        # Two workers: requests over nginx's connections reach either of them.
        site(folder, "centrifugo", f"--port={port}", "--workers", "2", *redis_flags(valkey)),
        nginx(folder, RECIPES[recipe], {8000: port}) as url,
    ):
        yield url + path


def test_the_api(base: str) -> None:
    for _ in range(3):
        status, text = publish(base, "nginx", {"text": "x" * 100_000})
        assert (status, json.loads(text)[0]["error"]) == (200, None)
    # Relay's error responses are passed on.
    assert publish(base, "nginx", 1, secret="wrong") == (401, b"Unauthorized\n")


@pytest.mark.parametrize("base", CASES[:2], indirect=True, ids=lambda case: case[0])
def test_only_the_protected_paths_are_denied(base: str) -> None:
    address = urlsplit(base)

    def status(path_below: str) -> int:
        connection = HTTPConnection(address.hostname or "", address.port, LIMIT_S, ELSEWHERE)
        with closing(connection):
            connection.request("POST", f"{address.path}{path_below}", "[]")
            return connection.getresponse().status

    assert status("/socket") == 403
    # This path belongs to Socket.IO.
    assert status("/socket.io/") == 404
    assert status("/connection/info") == 405
    assert status("/api/") == 403


async def test_a_raw_websocket(base: str) -> None:
    async with aiohttp.ClientSession() as session:
        url = f"{base}/connection/websocket"
        async with session.ws_connect(url) as socket:
            client = V1(socket)
            await client.connect("ann")
            assert (await client.ask("subscribe", channel="ngx"))["status"] is True
            await asyncio.to_thread(publish, base, "ngx", {"n": 1})
            assert (await client.next("message"))["data"] == {"n": 1}


async def test_sockjs(base: str) -> None:
    """The info URL, and a stream that nginx does not buffer."""
    status, text, headers = await asyncio.to_thread(
        fetch, f"{base}/connection/info", headers={"Origin": "http://elsewhere.example"}
    )
    assert status == 200
    assert json.loads(text)["websocket"] is True
    assert headers["Access-Control-Allow-Origin"] == "http://elsewhere.example"
    async with aiohttp.ClientSession() as session:
        stream = f"{base}/connection/000/abcdefgh/xhr_streaming"
        async with session.post(stream) as answer:
            assert answer.status == 200
            assert len(await within(LIMIT_S, answer.content.readline())) == 2049
            assert await within(LIMIT_S, answer.content.readline()) == b"o\n"
        for number in range(5):
            await _poll(session, f"{base}/connection/000/session{number}")


async def _poll(session: aiohttp.ClientSession, address: str) -> None:
    """Run a complete polling session through nginx."""

    async def post(transport: str, body: str = "") -> str:
        async with session.post(f"{address}/{transport}", data=body) as answer:
            assert answer.status in {200, 204}
            text: str = await within(LIMIT_S, answer.text())
            return text

    assert await post("xhr") == "o\n"
    await post("xhr_send", json.dumps([json.dumps({"uid": "7", "method": "nothing"})]))
    closing = '{"reason":"unauthorized","reconnect":false}'
    assert await post("xhr") == f"c[3000,{json.dumps(closing)}]\n"


async def test_the_admin_socket(base: str) -> None:
    async with aiohttp.ClientSession() as session, session.ws_connect(f"{base}/socket") as ws:
        await ws.send_json({"uid": "1", "method": "connect", "params": {"watch": True}})
        reply = await within(LIMIT_S, ws.receive_json())
        assert reply[0]["body"] is True
