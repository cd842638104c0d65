"""HTTP responses in the tables of the wire facts, except redirects and plain `GET /`."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator

import pytest

from tests.support.clients import redis, stream_key, until
from tests.support.relay import RelayProcess
from tests.support.seafile import (
    KEY,
    Seafile,
    new_library,
    seafile,
    sender_token,
    sign,
    subscribe_token,
)
from tests.support.valkey import Server, free_port

pytestmark = pytest.mark.redis
TOKEN = "xP7GGgGPVCQu8r0xNJ+k4Q=="
SETTINGS = [f"protocol:seafile.key={KEY}", f"protocol:seafile.notification_token={TOKEN}"]
NO_MATCH = b"Notification token not match\n"
PLAIN = "text/plain; charset=utf-8"


@pytest.fixture(scope="module")
def relay(valkey: Server) -> Iterator[RelayProcess]:
    process = RelayProcess(valkey, settings=SETTINGS).start()
    yield process
    process.kill()


@pytest.fixture
async def door(relay: RelayProcess) -> AsyncIterator[Seafile]:
    async with seafile(relay) as one:
        yield one


def forms(name: str) -> list[str]:
    roots = ["/", "//", "/notification/", "//notification/", "/notification//", "//notification//"]
    return [root + name + end for root in roots for end in ("", "/", "//")]


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE", "OPTIONS"])
async def test_ping_with_any_method(door: Seafile, method: str) -> None:
    answer = await door.request(method, "/ping")
    assert (answer.status, answer.body) == (200, b'{"ret": "pong"}\n')
    assert answer.headers["content-type"] == PLAIN


async def test_head_of_ping(door: Seafile) -> None:
    answer = await door.request("HEAD", "/ping")
    assert (answer.status, answer.body) == (200, b"")


async def test_all_forms_of_all_paths_without_a_redirect(door: Seafile) -> None:
    for path in forms("ping"):
        answer = await door.request("GET", path)
        assert (answer.status, answer.body) == (200, b'{"ret": "pong"}\n'), path
    headers = {"Seafile-Repo-Token": TOKEN}
    for path in forms("events"):
        answer = await door.request("POST", path, b'{"type":"x"}', headers)
        assert (answer.status, answer.body) == (200, b""), path
    for path in ("/", "//", "/notification", "/notification/", "//notification//"):
        client = await door.connect(path)
        await client.settle()


async def test_the_handshake_has_three_headers(door: Seafile) -> None:
    client = await door.connect(compress=15)
    assert client.socket.protocol is None
    assert not client.socket.compress


@pytest.mark.parametrize("path", ["/notification", "/notification/", "//"])
async def test_a_websocket_path_without_upgrade(door: Seafile, path: str) -> None:
    for method in ("GET", "POST"):
        answer = await door.request(method, path)
        assert (answer.status, answer.body) == (400, b"Bad Request\n")
        assert answer.headers["content-type"] == PLAIN


async def test_a_plain_get_of_the_root_returns_the_live_page(door: Seafile) -> None:
    answer = await door.request("GET", "/")
    assert answer.status == 200
    assert answer.headers["content-type"].startswith("text/html")
    assert (await door.request("POST", "/")).status == 400


async def test_other_paths_below_notification_do_not_exist(door: Seafile) -> None:
    for path in ("/notification/x", "/notification/ping/x", "/notification/subscriptions"):
        answer = await door.request("GET", path)
        assert (answer.status, answer.body) == (404, b"404 page not found\n"), path
    # This path belongs to Socket.IO.
    assert (await door.request("GET", "/notificationsx")).body != b"404 page not found\n"


# Valid for a whole run, because parameters are created before the first test.
GOOD = sender_token(86400)
LATER = int(time.time()) + 86400


@pytest.mark.parametrize(
    ("headers", "good"),
    [
        ({"Seafile-Repo-Token": TOKEN}, True),
        ({"Seafile-Repo-Token": TOKEN[:-1]}, False),
        ({"Seafile-Repo-Token": GOOD}, True),
        ({"Authorization": f"Token {GOOD}"}, True),
        ({"Authorization": f"Bearer {GOOD}"}, True),
        ({"Authorization": f"any {GOOD} more words"}, True),
        ({"Authorization": GOOD}, False),
        ({"Authorization": f"Token  {GOOD}"}, False),
        ({"Authorization": f"Token {sign(KEY, 'HS512', exp=LATER)}"}, True),
        ({"Authorization": f"Token {sign(KEY, 'none', exp=LATER)}"}, False),
        ({"Authorization": f"Token {sign(KEY, exp=LATER + 0.5)}"}, False),
        ({"Authorization": f"Token {sign(KEY)}"}, False),
        ({"Authorization": f"Token {sign(KEY, exp=int(time.time()) - 1)}"}, False),
        ({"Authorization": f"Token {sign('another', exp=LATER)}"}, False),
        # Go's file server.
        (
            {"Authorization": "Token " + sign(KEY, exp=LATER, repo_id="r", username="")},
            True,
        ),
        # A client's token, which Seafile's server accepts too.
        ({"Authorization": f"Token {subscribe_token('r')}"}, False),
        ({}, False),
    ],
)
async def test_tokens_that_allow_posting(
    door: Seafile, headers: dict[str, str], good: bool
) -> None:
    answer = await door.request("POST", "/events", b'{"type":"x"}', headers)
    assert (answer.status, answer.body) == ((200, b"") if good else (400, NO_MATCH))
    if good:
        assert "content-type" not in answer.headers
    else:
        assert answer.headers["content-type"] == PLAIN


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"no json",
        b"[]",
        b"\xff\xfe",
        b'{"type":1}',
        b'{"type":"x","content":{}} more',
        b'{"type":"x","content":' + b"[" * 50_000,
    ],
)
async def test_a_body_that_is_not_an_event(door: Seafile, body: bytes) -> None:
    answer = await door.request("POST", "/events", body, {"Seafile-Repo-Token": TOKEN})
    assert (answer.status, answer.body) == (500, b"\n")


@pytest.mark.parametrize(
    "body",
    [b"{}", b'{"type":"x"}', b'{"type":"x","content":null}', b'{"type":"x","content":[1]}'],
)
async def test_an_object_without_a_library(door: Seafile, body: bytes) -> None:
    for method in ("POST", "GET"):
        answer = await door.request(method, "/events", body, {"Seafile-Repo-Token": TOKEN})
        assert (answer.status, answer.body) == (200, b"")


@pytest.mark.parametrize(
    "body",
    [
        b'{"type":"relay:revoked","content":{"repo_id":"r"}}',
        b'{"type":"a\\u0000b","content":{"repo_id":"r"}}',
    ],
)
async def test_an_event_that_a_stream_cannot_store_is_an_error(door: Seafile, body: bytes) -> None:
    answer = await door.request("POST", "/events", body, {"Seafile-Repo-Token": TOKEN})
    assert answer.status == 503
    assert (await door.request("GET", "/ping")).status == 200


async def test_unusual_headers_are_rejected_like_others(door: Seafile) -> None:
    for value in ("\u00ff", "a.b.c", "x" * 20_000, "Token", " "):
        for name in ("Seafile-Repo-Token", "Authorization"):
            answer = await door.request("POST", "/events", b"{}", {name: value})
            assert (answer.status, answer.body) == (400, NO_MATCH), value


async def test_any_content_type_and_unknown_event_types_are_accepted(
    door: Seafile, valkey: Server
) -> None:
    library = new_library()
    body = json.dumps({"type": "new-in-14", "content": {"repo_id": library, "x": [1]}}).encode()
    headers = {
        "Seafile-Repo-Token": TOKEN,
        "Content-Type": "application/x-www-form-urlencoded",
        "User-Agent": "Seafile/10.0.1 (Linux)",
    }
    assert (await door.request("POST", "/events", body, headers)).status == 200
    ((_, fields),) = redis(valkey, "XRANGE", stream_key(f"seafile:{library}"), "-", "+")
    assert fields == {
        b"type": b"new-in-14",
        b"data": json.dumps({"repo_id": library, "x": [1]}).encode(),
    }


async def test_an_event_beyond_the_limit(door: Seafile) -> None:
    body = b'{"type":"x","content":{"repo_id":"r","x":"%s"}}' % (b"x" * 1_100_000)
    answer = await door.request("POST", "/events", body, {"Seafile-Repo-Token": TOKEN})
    assert answer.status == 413
    await until(lambda: any("events_max_bytes (1048576 bytes)" in line for line in door.relay.log))


async def test_while_redis_is_frozen_the_response_is_in_time(door: Seafile, valkey: Server) -> None:
    library = new_library()
    await door.commit(library, "c0")
    valkey.freeze()
    try:
        begun = time.monotonic()
        answer = await door.post("repo-update", {"repo_id": library, "commit_id": "c1"})
        seconds = time.monotonic() - begun
    finally:
        valkey.thaw()
    assert answer.status == 503
    # The limit is 0.9 s. The rest is tolerance for a busy machine.
    assert seconds < 2.5
    outcome = f"repo-update on seafile:{library} was not confirmed by Redis within 0.9 s"
    await until(lambda: any(outcome in line for line in door.relay.log))


async def test_an_update_from_two_sources_is_appended_once(door: Seafile, valkey: Server) -> None:
    library = new_library()
    async with asyncio.TaskGroup() as tasks:
        for _ in range(4):
            tasks.create_task(door.commit(library, "a"))
    for commit in ("b", "b", "a"):
        await door.commit(library, commit)
    # Other events are never treated as repetitions.
    for _ in range(2):
        await door.lock(library, "f.txt")
    entries = redis(valkey, "XRANGE", stream_key(f"seafile:{library}"), "-", "+")
    assert [fields.get(b"commit", fields[b"type"]) for _, fields in entries] == [
        b"a",
        b"b",
        b"a",
        b"file-lock-changed",
        b"file-lock-changed",
    ]


def test_a_client_may_post_if_the_setting_allows_it(valkey: Server) -> None:
    strict = [*SETTINGS, "protocol:seafile.client_tokens_post=yes"]
    process = RelayProcess(valkey, settings=strict).start()

    async def ask() -> int:
        async with seafile(process) as door:
            headers = {"Authorization": f"Token {subscribe_token('r')}"}
            return (await door.request("POST", "/events", b"{}", headers)).status

    try:
        assert asyncio.run(ask()) == 200
    finally:
        process.kill()


def test_a_separate_port_serves_this_protocol_only(valkey: Server) -> None:
    port = free_port()
    process = RelayProcess(valkey, settings=[*SETTINGS, f"protocol:seafile.port={port}"]).start()

    async def ask() -> None:
        async with seafile(process, port) as own, seafile(process) as shared:
            assert (await own.request("GET", "/ping")).status == 200
            assert (await shared.request("GET", "/ping")).status == 404
            for path in ("/", "//"):
                answer = await own.request("GET", path)
                assert (answer.status, answer.body) == (400, b"Bad Request\n")
            for path in ("/sse", "/other", "/healthz"):
                answer = await own.request("GET", path)
                assert (answer.status, answer.body) == (404, b"404 page not found\n")

    try:
        asyncio.run(ask())
    finally:
        process.kill()


def test_the_root_without_the_live_page(valkey: Server) -> None:
    settings = [*SETTINGS, "protocol:native.page=no"]
    process = RelayProcess(valkey, settings=settings).start()

    async def ask() -> None:
        async with seafile(process) as door:
            answer = await door.request("GET", "/")
            assert (answer.status, answer.body) == (400, b"Bad Request\n")
            await (await door.connect("/")).settle()

    try:
        asyncio.run(ask())
    finally:
        process.kill()


def test_without_a_key_the_protocol_is_not_served(relay: RelayProcess, valkey: Server) -> None:
    process = RelayProcess(valkey).start()

    async def ask() -> None:
        async with seafile(process) as door:
            for path in ("/ping", "/events", "/notification"):
                assert (await door.request("GET", path)).status == 404

    try:
        asyncio.run(ask())
        assert any("Protocol seafile is disabled" in line for line in process.log)
    finally:
        process.kill()
