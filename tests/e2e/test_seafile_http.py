"""The wire facts' tables of HTTP answers, byte for byte, but for redirects and plain `GET /`."""

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
async def test_ping_of_any_method(door: Seafile, method: str) -> None:
    answer = await door.request(method, "/ping")
    assert (answer.status, answer.body) == (200, b'{"ret": "pong"}\n')
    assert answer.headers["content-type"] == PLAIN


async def test_head_of_ping(door: Seafile) -> None:
    answer = await door.request("HEAD", "/ping")
    assert (answer.status, answer.body) == (200, b"")


async def test_every_form_of_every_path_without_a_redirect(door: Seafile) -> None:
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


async def test_the_handshake_has_three_headers_and_chooses_nothing(door: Seafile) -> None:
    client = await door.connect(compress=15)
    assert client.socket.protocol is None
    assert not client.socket.compress


@pytest.mark.parametrize("path", ["/notification", "/notification/", "//"])
async def test_a_websocket_path_without_upgrade(door: Seafile, path: str) -> None:
    for method in ("GET", "POST"):
        answer = await door.request(method, path)
        assert (answer.status, answer.body) == (400, b"Bad Request\n")
        assert answer.headers["content-type"] == PLAIN


async def test_the_root_is_the_live_page_for_everyone_else(door: Seafile) -> None:
    answer = await door.request("GET", "/")
    assert answer.status == 200
    assert answer.headers["content-type"].startswith("text/html")
    assert (await door.request("POST", "/")).status == 400


async def test_below_notification_there_is_nothing_else(door: Seafile) -> None:
    for path in ("/notification/x", "/notification/ping/x", "/notification/subscriptions"):
        answer = await door.request("GET", path)
        assert (answer.status, answer.body) == (404, b"404 page not found\n"), path
    # Socket.IO's, not Seafile's.
    assert (await door.request("GET", "/notificationsx")).body != b"404 page not found\n"


# For as long as a run may take: parameters are made before the first test begins.
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
        # A client's, which authorises upstream too.
        ({"Authorization": f"Token {subscribe_token('r')}"}, False),
        ({}, False),
    ],
)
async def test_who_may_post(door: Seafile, headers: dict[str, str], good: bool) -> None:
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
async def test_a_body_that_is_no_event(door: Seafile, body: bytes) -> None:
    answer = await door.request("POST", "/events", body, {"Seafile-Repo-Token": TOKEN})
    assert (answer.status, answer.body) == (500, b"\n")


@pytest.mark.parametrize(
    "body",
    [b"{}", b'{"type":"x"}', b'{"type":"x","content":null}', b'{"type":"x","content":[1]}'],
)
async def test_an_object_that_concerns_no_library(door: Seafile, body: bytes) -> None:
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
async def test_what_no_stream_can_hold_is_an_error(door: Seafile, body: bytes) -> None:
    answer = await door.request("POST", "/events", body, {"Seafile-Repo-Token": TOKEN})
    assert answer.status == 503
    assert (await door.request("GET", "/ping")).status == 200


async def test_odd_headers_are_refused_like_any_other(door: Seafile) -> None:
    for value in ("\u00ff", "a.b.c", "x" * 20_000, "Token", " "):
        for name in ("Seafile-Repo-Token", "Authorization"):
            answer = await door.request("POST", "/events", b"{}", {name: value})
            assert (answer.status, answer.body) == (400, NO_MATCH), value


async def test_any_content_type_and_unknown_types_pass(door: Seafile, valkey: Server) -> None:
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


async def test_while_redis_is_frozen_the_sender_gets_its_answer_in_time(
    door: Seafile, valkey: Server
) -> None:
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
    # The limit itself is 0.9 s; the rest is a busy machine's.
    assert seconds < 2.5
    await until(
        lambda: any(f"repo-update of seafile:{library} is lost" in line for line in door.relay.log)
    )


async def test_an_update_that_two_tell_of_is_appended_once(door: Seafile, valkey: Server) -> None:
    library = new_library()
    async with asyncio.TaskGroup() as tasks:
        for _ in range(4):
            tasks.create_task(door.commit(library, "a"))
    for commit in ("b", "b", "a"):
        await door.commit(library, commit)
    # Nothing else is ever a repetition.
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


def test_a_client_may_post_where_the_switch_says_so(valkey: Server) -> None:
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


def test_a_port_of_its_own_opens_this_door_only(valkey: Server) -> None:
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


def test_without_the_live_page_the_root_is_seafiles_alone(valkey: Server) -> None:
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


def test_without_a_key_the_door_is_shut(relay: RelayProcess, valkey: Server) -> None:
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
