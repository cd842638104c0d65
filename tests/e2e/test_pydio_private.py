"""Pydio's private channel: messages of PHP reach the streams, and other requests are rejected."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import AsyncIterator, Iterator

import aiohttp
import pytest

from tests.support.clients import Native, native, redis, until
from tests.support.pydio import KEY, publish, tree
from tests.support.relay import ROOT, RelayProcess
from tests.support.valkey import Server, free_port

# Starting PHP takes time on a machine that runs other tests.
pytestmark = [pytest.mark.redis, pytest.mark.timeout(60)]
ACCEPTED = "HTTP/1.1 101 Switching Protocols"
FORBIDDEN = "HTTP/1.1 403 Forbidden"
SETTINGS = [f"protocol:pydio.key={KEY}", "protocol:pydio.drain_s=0.2"]


@pytest.fixture(scope="module")
def relay(valkey: Server) -> Iterator[RelayProcess]:
    process = RelayProcess(valkey, settings=SETTINGS).start()
    yield process
    process.kill()


@pytest.fixture
async def door(relay: RelayProcess) -> AsyncIterator[Native]:
    async with native(relay) as clients:
        clients = Native(
            clients.port, relay.token(channels=["pydio:*"]), clients.session, clients.streams
        )
        yield clients


async def post(relay: RelayProcess, body: bytes, **headers: str) -> tuple[int, dict[str, object]]:
    async with aiohttp.ClientSession() as session:
        request = session.post(
            f"{relay.url}/private", data=io.BytesIO(body), headers={"Admin-Key": KEY} | headers
        )
        async with request as answer:
            return answer.status, await answer.json()


async def test_100_requests_in_the_real_clients_format_arrive(
    relay: RelayProcess, door: Native
) -> None:
    stream = await door.sse("pydio:junk")
    sent = [
        [{"REPO_ID": "junk", "CONTENT": tree(f"{n}-{m}")} for m in range(2)] for n in range(100)
    ]
    answers = await publish(relay.port, *sent)
    assert answers == [ACCEPTED] * 100
    expected = [str(message["CONTENT"]) for messages in sent for message in messages]
    # Order is kept within each of the two connections.
    found = [block.data or "" for block in await stream.take(200)]
    assert sorted(found) == sorted(expected)
    for first, second in (expected[at : at + 2] for at in range(0, 200, 2)):
        assert found.index(first) < found.index(second)


@pytest.mark.parametrize("form", ["serialize", "json"])
async def test_contents_with_every_frame_length(
    relay: RelayProcess, door: Native, form: str
) -> None:
    stream = await door.sse(f"pydio:sizes-{form}")
    contents = [tree("é" * size) for size in (0, 10, 100, 32_000, 32_600, 33_000, 80_000)]
    assert len(contents[-1].encode()) > 160_000
    messages = [{"REPO_ID": f"sizes-{form}", "CONTENT": content} for content in contents]
    assert await publish(relay.port, messages, form=form) == [ACCEPTED]
    assert [block.data for block in await stream.take(len(contents))] == contents


async def test_two_publishers_at_once_keep_their_own_order(
    relay: RelayProcess, door: Native
) -> None:
    stream = await door.sse("pydio:both")
    sent = {name: [tree(f"{name}{number}") for number in range(200)] for name in ("left", "right")}
    async with asyncio.TaskGroup() as group:
        for contents in sent.values():
            messages = [{"REPO_ID": "both", "CONTENT": content} for content in contents]
            group.create_task(publish(relay.port, messages))
    found = [block.data or "" for block in await stream.take(400)]
    for name, contents in sent.items():
        assert [data for data in found if name in data] == contents


async def test_the_entry_has_recipients_and_paths(relay: RelayProcess) -> None:
    status, answer = await post(
        relay,
        json.dumps(
            {
                "REPO_ID": "entry",
                "CONTENT": tree("x"),
                "GROUP_PATH": "/staff/a b",
                "NODE_PATHES": ["/ü"],
            }
        ).encode(),
    )
    assert (status, answer["channel"]) == (200, "pydio:entry")
    stream = "relay:stream:{pydio:entry}"
    ((entry_id, fields),) = redis(relay.server, "XRANGE", stream, "-", "+")
    assert entry_id.decode() == answer["id"]
    entry = dict(fields)
    assert entry[b"data"] == tree("x").encode()
    assert json.loads(entry[b"to"]) == ["group:/staff/a b"]
    assert json.loads(entry[b"node_paths"]) == ["/ü"]


@pytest.mark.parametrize("key", ["wrong", KEY[:-1], KEY + "x", "ü"])
async def test_a_wrong_key_is_rejected_before_the_upgrade(relay: RelayProcess, key: str) -> None:
    message = {"REPO_ID": "closed", "CONTENT": tree("x")}
    assert await publish(relay.port, [message], key=key) == [FORBIDDEN]
    status, answer = await post(relay, json.dumps(message).encode(), **{"Admin-Key": "wrong"})
    assert status == 403
    assert answer == {"error": {"code": "forbidden", "message": "not allowed"}}
    assert redis(relay.server, "EXISTS", "relay:stream:{pydio:closed}") == 0
    await until(
        lambda: any(
            "127.0.0.1 on Pydio's private path: wrong Admin-Key" in line for line in relay.log
        )
    )
    assert not any(KEY in line for line in relay.log)


async def test_a_rejected_php_client_causes_no_error_in_the_log(relay: RelayProcess) -> None:
    # The eight random bytes after its request are not another request.
    before = len(relay.log)
    message = {"REPO_ID": "closed", "CONTENT": tree("x")}
    for path, key, status in (
        ("/private", "wrong", FORBIDDEN),
        ("/public", KEY, "HTTP/1.1 426 Upgrade Required"),
        ("/nowhere", KEY, "HTTP/1.1 404 Not Found"),
    ):
        answers = await publish(relay.port, *[[message]] * 10, key=key, path=path)
        assert answers == [status] * 10
    async with aiohttp.ClientSession() as session, session.get(f"{relay.url}/healthz") as answer:
        assert answer.status == 200
    said = relay.log[before:]
    assert all(" warning relay.protocols.pydio.private: " in line for line in said)
    assert len(said) <= 3


async def test_without_a_key_the_private_path_does_not_exist(relay: RelayProcess) -> None:
    async with aiohttp.ClientSession() as session, session.get(f"{relay.url}/private") as answer:
        assert answer.status == 403


async def test_the_key_is_not_accepted_on_the_public_path(relay: RelayProcess) -> None:
    message = {"REPO_ID": "outside", "CONTENT": tree("x")}
    answers = await publish(relay.port, [message], path="/public")
    assert answers == ["HTTP/1.1 426 Upgrade Required"]
    async with aiohttp.ClientSession() as session:
        request = session.post(f"{relay.url}/public", json=message, headers={"Admin-Key": KEY})
        async with request as answer:
            assert answer.status == 426
    assert redis(relay.server, "EXISTS", "relay:stream:{pydio:outside}") == 0


async def test_another_host_is_rejected_even_with_the_key(valkey: Server) -> None:
    settings = [*SETTINGS, "protocol:pydio.authorised_hosts=10.0.0.0/8, ::1, php.invalid"]
    process = RelayProcess(valkey, settings=settings).start()
    try:
        message = {"REPO_ID": "host", "CONTENT": tree("x")}
        assert await publish(process.port, [message]) == [FORBIDDEN]
        await until(
            lambda: any("not in [protocol:pydio] authorised_hosts" in each for each in process.log)
        )
        process.settings[-1] = "protocol:pydio.authorised_hosts=127.0.0.0/8"
        process.restart()
        assert await publish(process.port, [message]) == [ACCEPTED]
    finally:
        process.stop()


async def test_a_separate_listener_for_php(valkey: Server) -> None:
    port = free_port()
    settings = [*SETTINGS, f"protocol:pydio.private_port={port}", "protocol:pydio.public_path=/p"]
    process = RelayProcess(valkey, settings=settings).start()
    try:
        message = {"REPO_ID": "own", "CONTENT": tree("x")}
        assert await publish(port, [message]) == [ACCEPTED]
        await until(lambda: redis(valkey, "EXISTS", "relay:stream:{pydio:own}"))
        # The key is not accepted on the other listener then.
        assert await publish(process.port, [message]) == ["HTTP/1.1 404 Not Found"]
        assert await publish(process.port, [message], path="/p") == [
            "HTTP/1.1 426 Upgrade Required"
        ]
    finally:
        process.stop()


async def test_a_malformed_message_does_not_affect_others(
    relay: RelayProcess, door: Native
) -> None:
    stream = await door.sse("pydio:bad")
    good = [{"REPO_ID": "bad", "CONTENT": tree(str(n))} for n in range(2)]
    bad = {"REPO_ID": "bad", "CONTENT": ""}
    assert await publish(relay.port, [good[0], bad, good[1]]) == [ACCEPTED]
    assert [block.data for block in await stream.take(2)] == [tree("0"), tree("1")]
    await until(lambda: any("path: CONTENT is missing" in line for line in relay.log))


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b'a:2:{s:7:"REPO_ID";s:1:"1";s:7:"CONTENT";O:8:"stdClass":0:{}}', 400),
        (b"nonsense", 400),
        (b"x" * 1_100_000, 413),
    ],
)
async def test_a_rejected_post_has_the_reason(
    relay: RelayProcess, body: bytes, status: int
) -> None:
    assert (await post(relay, body))[0] == status


async def test_a_too_large_message_is_lost_alone(relay: RelayProcess, door: Native) -> None:
    stream = await door.sse("pydio:long")
    long = {"REPO_ID": "long", "CONTENT": "x" * 1_100_000}
    short = [{"REPO_ID": "long", "CONTENT": tree(str(number))} for number in range(3)]
    messages = [short[0], long, short[1], long, long, short[2]]
    assert await publish(relay.port, messages) == [ACCEPTED]
    assert [block.data for block in await stream.take(3)] == [tree(str(n)) for n in range(3)]
    await until(
        lambda: any(
            "more than 1048576 bytes, see [protocol:pydio] private_max_bytes" in line
            for line in relay.log
        )
    )


async def test_paths_in_the_encoding_of_the_server(relay: RelayProcess, door: Native) -> None:
    stream = await door.sse("pydio:latin1")
    sent = [
        {"REPO_ID": "latin1", "CONTENT": tree(f"é{number}"), "NODE_PATHES": ["/café", "/a"]}
        for number in range(2)
    ]
    assert await publish(relay.port, sent, form="latin1") == [ACCEPTED]
    assert [block.data for block in await stream.take(2)] == [tree("é0"), tree("é1")]
    entries = redis(relay.server, "XRANGE", "relay:stream:{pydio:latin1}", "-", "+")
    for _, fields in entries:
        assert json.loads(fields[b"node_paths"]) == ["/café", "/a"]


async def test_large_messages_keep_their_order(relay: RelayProcess, door: Native) -> None:
    stream = await door.sse("pydio:order")
    paths = [f"/folder/{number}" for number in range(5000)]
    sent = [
        {"REPO_ID": "order", "CONTENT": tree(str(number)), "NODE_PATHES": paths[:: 1 + number % 9]}
        if number % 2
        else {"REPO_ID": "order", "CONTENT": tree(str(number))}
        for number in range(40)
    ]
    assert await publish(relay.port, sent) == [ACCEPTED]
    assert [block.data for block in await stream.take(40)] == [tree(str(n)) for n in range(40)]


@pytest.mark.parametrize("path", ["/private/", "/private/sub/path"])
async def test_paths_below_the_private_path(relay: RelayProcess, door: Native, path: str) -> None:
    stream = await door.sse("pydio:below")
    message = {"REPO_ID": "below", "CONTENT": tree(path)}
    assert await publish(relay.port, [message], path=path) == [ACCEPTED]
    assert (await stream.next()).data == tree(path)


async def test_a_websocket_client_of_version_13_needs_no_random_bytes(
    relay: RelayProcess, door: Native
) -> None:
    stream = await door.sse("pydio:modern")
    async with (
        aiohttp.ClientSession() as session,
        session.ws_connect(f"{relay.url}/private", headers={"Admin-Key": KEY}) as socket,
    ):
        await socket.send_str(json.dumps({"REPO_ID": "modern", "CONTENT": tree("x")}))
        assert (await stream.next()).data == tree("x")


async def test_the_documented_php_and_curl_work(relay: RelayProcess, door: Native) -> None:
    text = (
        (ROOT / "docs" / "pydio.md")
        .read_text()
        .replace("127.0.0.1:8090", f"127.0.0.1:{relay.port}")
    )
    section = text.partition("## Publish from PHP without a WebSocket")[2]
    php, shell = (
        section.partition(f"```{name}\n")[2].partition("```")[0] for name in ("php", "sh")
    )
    stream = await door.sse("pydio:1")
    for command in (
        ["php", "-r", f"$id = 1; $key = '{KEY}'; {php}"],
        ["sh", "-c", f"KEY={KEY}; {shell}"],
    ):
        process = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE)
        assert await process.wait() == 0
    found = [block.data for block in await stream.take(2)]
    assert found == [
        "<tree><nodes_diff>...</nodes_diff></tree>",
        '<tree><reload_instruction object="data"/></tree>',
    ]
