"""Websockets of sync clients and of the Seahub page (wire facts, sections 2, 5)."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import socket
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from relay.cli import access
from relay.config.settings import RedisSettings
from relay.core.model import Channel
from relay.protocols.seafile import missed
from tests.support.clients import Refused, native, redis, rights_key, until
from tests.support.relay import ROOT, RelayProcess
from tests.support.seafile import (
    KEY,
    Client,
    HungUp,
    Seafile,
    followed,
    new_library,
    seafile,
    sign,
    standing,
    subscribe_token,
)
from tests.support.valkey import Server, free_port

pytestmark = pytest.mark.redis
SETTINGS = [f"protocol:seafile.key={KEY}"]
ALICE, BOB = "alice@example.com", "bob@example.com"


@pytest.fixture(scope="module")
def relay(valkey: Server) -> Iterator[RelayProcess]:
    process = RelayProcess(valkey, settings=SETTINGS).start()
    yield process
    process.kill()


@pytest.fixture
async def door(relay: RelayProcess) -> AsyncIterator[Seafile]:
    async with seafile(relay) as one:
        yield one


def expired(repo_id: str) -> dict[str, object]:
    return {"type": "jwt-expired", "content": {"repo_id": repo_id}}


def update(repo_id: str, commit: str) -> dict[str, object]:
    return {"type": "repo-update", "content": {"repo_id": repo_id, "commit_id": commit}}


# ---- the handshake and the frames ------------------------------------------------------------


async def test_the_handshake_has_no_subprotocol_or_extension(door: Seafile) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", door.port)
    writer.write(
        b"GET /notification HTTP/1.1\r\nHost: 127.0.0.1\r\nOrigin: http://127.0.0.1\r\n"
        b"Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
        b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
        b"Sec-WebSocket-Protocol: notification.seafile.com\r\n"
        b"Sec-WebSocket-Extensions: permessage-deflate\r\n\r\n"
    )
    head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
    names = [line.partition(":")[0] for line in head.strip().split("\r\n")[1:]]
    assert head.startswith("http/1.1 101 ")
    assert sorted(names) == ["connection", "sec-websocket-accept", "upgrade"]
    # The pong repeats the ping's payload. The server's own ping follows after a second of silence.
    writer.write(b"\x89\x82\0\0\0\0hi")
    assert await reader.readexactly(4) == b"\x8a\x02hi"
    assert await reader.readexactly(2) == b"\x89\x00"
    writer.close()


async def test_a_close_frame_is_echoed(door: Seafile) -> None:
    client = await door.connect()
    await client.socket.close(code=3001)
    assert client.socket.close_code == 3001


async def test_binary_messages_are_read_like_text(door: Seafile) -> None:
    client = await door.connect()
    mark = new_library()
    content = {"repos": [{"id": mark, "jwt_token": ""}]}
    await client.socket.send_bytes(json.dumps({"type": "subscribe", "content": content}).encode())
    assert await client.next() == expired(mark)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no json",
        "[]",
        "{}",
        '{"type":"hello","content":{}}',
        '{"type":"subscribe"}',
        '{"type":"subscribe","content":1}',
        '{"type":"subscribe","content":{"repos":["x"]}}',
        '{"type":"unsubscribe","content":{"repos":[1]}}',
    ],
)
async def test_a_malformed_message_closes_only_that_connection(door: Seafile, text: str) -> None:
    library = new_library()
    client = await followed(door, library)
    other = await followed(door, library)
    await client.socket.send_str(text)
    with pytest.raises(HungUp, match="1006"):
        # The probes of the other client's subscription arrive first.
        await client.take(100)
    await door.commit(library, "c")
    assert await other.next() == update(library, "c")


@pytest.mark.parametrize(
    "message",
    [
        {"type": "subscribe", "content": None},
        {"type": "subscribe", "content": {}},
        {"type": "unsubscribe", "content": {"repos": [{"id": "never"}, "subscribed"]}},
    ],
)
async def test_tolerates_what_seafiles_server_tolerates(
    door: Seafile, message: dict[str, object]
) -> None:
    client = await door.connect()
    await client.socket.send_str(json.dumps(message))
    await client.settle()


async def test_a_subscribe_of_seven_megabytes(door: Seafile) -> None:
    """Measured on Seafile's server. All tokens are rejected, and other clients are not delayed."""
    client, other = await door.connect(), await door.connect()
    repos = [{"id": f"r{n}", "jwt_token": "x" * 400} for n in range(16_500)]
    text = json.dumps({"type": "subscribe", "content": {"repos": repos}})
    assert len(text) > 7_000_000
    await client.socket.send_str(text)
    await other.settle()
    for number in range(16_500):
        assert await client.next() == expired(f"r{number}")


async def test_a_message_is_one_frame_and_logged_if_it_is_too_long(door: Seafile) -> None:
    library = new_library()
    client = await followed(door, library)
    name = "n" * 5000
    await door.lock(library, name)
    assert (await client.next())["content"]["path"] == name
    await until(lambda: any("sync clients read at most 4096" in line for line in door.relay.log))


async def test_content_is_unchanged(door: Seafile) -> None:
    library = new_library()
    client = await followed(door, library)
    token = {"Authorization": f"Token {sign(KEY, exp=int(time.time()) + 60)}"}
    content = f'{{ "z":1.0, "repo_id" : "{library}" ,"big":12345678901234567890, "t":"<a&b>" }}'
    body = f'{{"top":1,"content":{content},"type":"file-lock-changed"}}'.encode()
    assert (await door.request("POST", "/events", body, token)).status == 200
    assert await client.text() == (
        f'{{"type":"file-lock-changed","content":{{"z":1.0,"repo_id":"{library}",'
        '"big":12345678901234567890,"t":"\\u003ca\\u0026b\\u003e"}}\n'
    )


async def test_half_a_surrogate_pair_is_unchanged(door: Seafile) -> None:
    library = new_library()
    client = await followed(door, library)
    token = {"Authorization": f"Token {sign(KEY, exp=int(time.time()) + 60)}"}
    for kind, field in (("file-lock-changed", "path"), ("repo-update", "commit_id")):
        content = f'{{"repo_id":"{library}","{field}":"a\\ud800b","n":1e999}}'
        body = f'{{"type":"{kind}","content":{content}}}'.encode()
        assert (await door.request("POST", "/events", body, token)).status == 200
        assert await client.text() == f'{{"type":"{kind}","content":{content}}}\n'


async def test_only_the_protocols_own_events_are_sent(door: Seafile) -> None:
    """Seafile's server ignores other types, and creates `jwt-expired` itself."""
    library = new_library()
    client = await followed(door, library)
    channel = f"seafile:{library}"
    for kind in ("new-in-14", "jwt-expired", "", "Repo-Update"):
        assert (await door.post(kind, {"repo_id": library})).status == 200
        door.relay.xadd(channel, data=json.dumps({"repo_id": library}), type=kind)
    door.relay.xadd(channel, data='{"repo_id": 1}')
    for data in ("text", "[]", '"text"', "1"):
        door.relay.xadd(channel, data=data, type="repo-update")
    await door.commit(library, "c")
    assert await client.next() == update(library, "c")


# ---- subscribing -----------------------------------------------------------------------------


async def test_a_flood_without_a_valid_token_is_read_slowly(door: Seafile) -> None:
    """Each rejected token has a reply, because all tokens of a client may have expired."""
    text = b'{"type":"subscribe","content":{"repos":[{"id":"x","jwt_token":"x"}]}}'
    frame = bytes((0x81, 0x80 | len(text), 0, 0, 0, 0)) + text
    reader, writer = await asyncio.open_connection("127.0.0.1", door.relay.port)
    writer.write(
        b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
    )
    await reader.readuntil(b"\r\n\r\n")
    writer.write(frame * 16_000)
    answers, slow_from = 0, 0.0
    while answers < 16_000:
        await reader.readuntil(b"jwt-expired")
        answers += 1
        if answers == 10_200:
            slow_from = time.monotonic()
    # The first 10,000 messages are read at once, the others at a rate of 1,000 in a second.
    assert time.monotonic() - slow_from > 4
    writer.transport.abort()


async def test_a_bad_token_is_reported_and_other_subscriptions_continue(door: Seafile) -> None:
    good, now = new_library(), int(time.time())
    bad = {
        "signature": sign("another key", repo_id="signature", exp=now + 60),
        "empty": "",
        "expired": sign(repo_id="expired", exp=now - 5),
        "fraction": sign(repo_id="fraction", exp=now + 60.5),
        "no-exp": sign(repo_id="no-exp"),
        "another": sign(repo_id=good, exp=now + 60),
        "none": sign(algorithm="none", repo_id="none", exp=now + 60),
    }
    client = await door.connect()
    repos = [{"id": name, "jwt_token": token} for name, token in bad.items()]
    repos.insert(3, {"id": good, "jwt_token": subscribe_token(good)})
    await client.send("subscribe", {"repos": repos})
    assert await client.take(len(bad)) == [expired(name) for name in bad]
    await standing(door, client, good)


async def test_a_repeated_subscribe_repeats_no_event(door: Seafile) -> None:
    library = new_library()
    client = await followed(door, library)
    await client.subscribe(library, library)
    await client.settle()
    await door.commit(library, "a")
    await door.commit(library, "b")
    assert await client.take(2) == [update(library, "a"), update(library, "b")]


@pytest.mark.parametrize("form", ["objects", "texts"])
async def test_both_forms_of_unsubscribe(door: Seafile, form: str) -> None:
    left, kept = new_library(), new_library()
    client = await followed(door, left, kept)
    await client.send("unsubscribe", {"repos": [left if form == "texts" else {"id": left}]})
    await client.settle()
    await door.commit(left, "c")
    await door.commit(kept, "c")
    assert await client.next() == update(kept, "c")
    # Subscribe again.
    await client.subscribe(left, agent="x")
    await standing(door, client, left)


async def test_a_token_expires_within_a_second_and_another_one_renews_it(door: Seafile) -> None:
    first, second = new_library(), new_library()
    client = await door.connect()
    end = int(time.time()) + 8  # long enough to subscribe on a busy machine
    short = {name: sign(repo_id=name, username=ALICE, exp=end) for name in (first, second)}
    repos = [{"id": name, "jwt_token": token} for name, token in short.items()]
    await client.send("subscribe", {"repos": repos})
    for library in (first, second):
        await standing(door, client, library)
    await client.subscribe(first)
    assert await client.next() == expired(second)
    assert time.time() >= end
    await door.commit(second, "late")
    await door.commit(first, "c")
    assert await client.next() == update(first, "c")
    # The real client does the same after jwt-expired.
    await client.subscribe(second)
    await standing(door, client, second)


async def test_fifty_libraries_at_once(door: Seafile) -> None:
    libraries = [new_library() for _ in range(50)]
    client = await followed(door, *libraries)
    for library in libraries:
        await door.commit(library, "c")
    assert await client.take(50) == [update(library, "c") for library in libraries]


# ---- recipients ------------------------------------------------------------------------------


def permission(library: str, path: str, **to: object) -> dict[str, object]:
    return {
        "repo_id": library,
        "path": path,
        "type": "user",
        "change_event": "add",
        "perm": "r",
        **to,
    }


async def test_all_subscribers_receive_updates_locks_and_comments(door: Seafile) -> None:
    library = new_library()
    clients = [await followed(door, library, user=user) for user in (ALICE, BOB)]
    for client in clients[:1]:
        # Skip the probes of the other clients' subscriptions.
        while True:
            try:
                await client.next(0.2)
            except TimeoutError:
                break
    await door.commit(library, "c")
    await door.lock(library, "f.txt")
    comment = {"repo_id": library, "type": "comment_updated", "file_uuid": "u", "file_path": ""}
    await door.post("comment-update", comment)
    for client in clients:
        kinds = [each["type"] for each in await client.take(3)]
        assert kinds == ["repo-update", "file-lock-changed", "comment-update"]


async def test_permissions_are_delivered_to_the_user_or_the_groups_members(
    door: Seafile, valkey: Server
) -> None:
    library = new_library()
    alice = await followed(door, library)
    bob = await followed(door, library, user=BOB)
    redis(valkey, "SADD", "relay:group:seafile:7", BOB, "carol@example.com")
    sent = [
        permission(library, "/1", user=ALICE, group=-1),
        permission(library, "/2", user="", group=7),
        permission(library, "/3", user="", group=-1),
        # An empty group. A missing group counts as group 0.
        permission(library, "/4", user="", group=8),
        permission(library, "/5", user=""),
        permission(library, "/6", user=ALICE.upper(), group=-1),
        permission(library, "/7", user=BOB, group=7),
    ]
    for content in sent:
        assert (await door.post("folder-perm-changed", content)).status == 200
    await door.commit(library, "end")

    async def paths(client: Client) -> list[str]:
        found: list[str] = []
        while (message := await client.next())["type"] != "repo-update":
            if message["type"] == "folder-perm-changed":
                found.append(message["content"]["path"])
        return found

    assert await paths(alice) == ["/1", "/3"]
    assert await paths(bob) == ["/2", "/3", "/7"]


async def test_a_group_without_a_set_is_logged(door: Seafile, valkey: Server) -> None:
    library = new_library()
    bob = await followed(door, library, user=BOB)
    content = permission(library, "/1", user="", group=4711)
    assert (await door.post("folder-perm-changed", content)).status == 200
    log = door.relay.log
    await until(lambda: any("<prefix>group:seafile:4711 is missing" in line for line in log))
    await until(lambda: any("members of group 4711 are unavailable" in line for line in log))
    # Follow the advice in the log. A missing set is cached for a second.
    redis(valkey, "SADD", "relay:group:seafile:4711", BOB)

    async def sent() -> bool:
        await door.post("folder-perm-changed", content)
        try:
            return bool((await bob.next(0.3))["type"] == "folder-perm-changed")
        except TimeoutError:
            return False

    while not await sent():
        pass


async def test_the_user_of_the_last_token_applies_to_all_libraries(door: Seafile) -> None:
    first, second = new_library(), new_library()
    client = await followed(door, first)
    await client.subscribe(second, user=BOB)
    await standing(door, client, second)
    await standing(door, client, first)
    await door.post("folder-perm-changed", permission(first, "/a", user=ALICE, group=-1))
    await door.post("folder-perm-changed", permission(first, "/b", user=BOB, group=-1))
    assert (await client.next())["content"]["path"] == "/b"


async def test_a_change_of_user_repeats_no_earlier_event(door: Seafile) -> None:
    first, second = new_library(), new_library()
    await door.commit(first, "earlier")
    client = await door.connect()
    repos = [
        {"id": library, "jwt_token": subscribe_token(library, user)}
        for library, user in ((first, ALICE), (second, BOB))
    ]
    # The second token arrives before the first subscription has been confirmed.
    await client.send("subscribe", {"repos": repos})
    sent: list[object] = []
    received = None
    while received is None:
        sent.append(update(first, f"later{len(sent)}"))
        await door.commit(first, f"later{len(sent) - 1}")
        with contextlib.suppress(TimeoutError):
            received = await client.next(0.3)
    assert received in sent


async def test_a_permission_without_recipients_is_not_delivered(
    door: Seafile,
) -> None:
    library = new_library()
    client = await followed(door, library)
    channel = f"seafile:{library}"
    content = json.dumps(permission(library, "/x", user="", group=7))
    door.relay.xadd(channel, data=content, type="folder-perm-changed")
    door.relay.xadd(channel, data='{"any": "program"}', type="repo-update")
    assert await client.next() == {"type": "repo-update", "content": {"any": "program"}}


async def test_a_revoked_right_overrides_valid_tokens(door: Seafile, valkey: Server) -> None:
    library, other = new_library(), new_library()
    client = await followed(door, library, other)
    redis(valkey, "HSET", rights_key(f"seafile:{library}"), ALICE, "-")
    await until(lambda: any(f"to seafile:{library}: " in line for line in door.relay.log))
    await door.commit(library, "secret")
    await client.subscribe(library)
    await client.settle()
    await door.commit(library, "secret too")
    await door.commit(other, "c")
    assert await client.next() == update(other, "c")


async def test_a_grant_makes_the_client_subscribe_again(door: Seafile, valkey: Server) -> None:
    library, other = new_library(), new_library()
    channel = f"seafile:{library}"
    client = await followed(door, library, other)
    settings = RedisSettings(url=valkey.url("maintenance"))
    await access.revoke(settings, Channel(channel), ALICE)
    await door.commit(library, "secret")
    await client.settle()
    # Like a client that has connected meanwhile: its token is valid, but the right is revoked.
    await client.subscribe(library)
    await client.settle()
    assert await access.grant(settings, Channel(channel), ALICE)
    expired = {"type": "jwt-expired", "content": {"repo_id": library}}
    assert await client.next() == expired
    # A real client subscribes again then.
    await client.subscribe(library)
    await client.settle()
    await door.commit(library, "c")
    assert await client.next() == update(library, "c")
    # The client has subscribed again, so that another change of rights sends nothing.
    redis(valkey, "XADD", "relay:control", "*", "command", "drop-rights", "user", ALICE)
    await door.commit(other, "d")
    assert await client.next() == update(other, "d")


def remembered_places(door: Seafile, user: str) -> bytes | None:
    """Return the stored positions of this user's client."""
    name = missed.name(user, "Seafile/9.0.20 (Linux)")
    value: bytes | None = redis(door.relay.server, "GET", f"relay:store:{name}")
    return value


def remembered(server: Server) -> int:
    """Return the number of clients whose positions are stored."""
    return len(redis(server, "KEYS", "relay:store:seafile:seen:*"))


# ---- missed events ---------------------------------------------------------------------------


async def test_a_client_that_reconnects_receives_missed_events(door: Seafile) -> None:
    library, user = new_library(), f"{new_library()}@example.com"
    client = await followed(door, library, user=user)
    before = remembered(door.relay.server)
    await client.socket.close()
    await until(lambda: remembered(door.relay.server) > before)
    await door.lock(library, "a")
    for number in range(3):
        await door.commit(library, f"c{number}")
    await door.post("comment-update", {"repo_id": library})
    await door.post("folder-perm-changed", permission(library, "/u", user=user, group=-1))
    await door.post("folder-perm-changed", permission(library, "/b", user=BOB, group=-1))
    await door.lock(library, "a", "unlocked")
    back = await door.connect()
    await back.subscribe(library, user=user)
    found = await back.take(4)
    assert [each["type"] for each in found] == [
        "file-lock-changed",
        "repo-update",
        "folder-perm-changed",
        "file-lock-changed",
    ]
    assert found[1] == update(library, "c2")
    await door.commit(library, "live")
    assert await back.next() == update(library, "live")


async def noted(door: Seafile, user: str) -> None:
    """Wait until the end of the only connection of this user and program is stored."""

    def ended() -> bool:
        return all(
            place.ended
            for stored in missed.read(remembered_places(door, user))
            for repo in stored
            for place in missed.positions_of(stored, repo)
        )

    await until(ended)


def hang_up(client: Client) -> None:
    """Close the connection without a close frame, like a program that exits."""
    connection = client.socket.get_extra_info("socket")
    connection.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("says_goodbye", [True, False])
@pytest.mark.parametrize("new_tokens", [True, False])
async def test_repeated_reconnects_repeat_no_event(
    door: Seafile, says_goodbye: bool, new_tokens: bool
) -> None:
    library, user = new_library(), f"{new_library()}@example.com"
    for number in range(5):
        client = await door.connect()
        token = subscribe_token(library, user, ttl_s=1000 + number * new_tokens)
        await client.send("subscribe", {"repos": [{"id": library, "jwt_token": token}]})
        if number:
            # The client was disconnected at this time.
            assert (await client.next())["content"]["path"] == f"away{number}"
        else:
            await standing(door, client, library)
        await door.lock(library, f"live{number}")
        assert (await client.next())["content"]["path"] == f"live{number}"
        if says_goodbye:
            await client.socket.close()
        else:
            hang_up(client)
        await noted(door, user)
        await door.lock(library, f"away{number + 1}")


async def test_an_event_before_a_revocation_is_not_sent_again_after_the_grant(
    door: Seafile, valkey: Server
) -> None:
    """An old lock would make the file read-only again."""
    library, user = new_library(), f"{new_library()}@example.com"
    settings = RedisSettings(url=valkey.url("maintenance"))
    repos = {"repos": [{"id": library, "jwt_token": subscribe_token(library, user, ttl_s=1000)}]}
    client = await door.connect()
    await client.send("subscribe", repos)
    await standing(door, client, library)
    await until(lambda: remembered_places(door, user) is not None)
    await door.lock(library, "live")
    assert (await client.next())["content"]["path"] == "live"
    await access.revoke(settings, Channel(f"seafile:{library}"), user)
    await until(lambda: any(f"to seafile:{library}" in line for line in door.relay.log))
    # Relay rejects the subscription, and the client disconnects.
    await client.send("subscribe", repos)
    await client.settle()
    await client.socket.close()
    await noted(door, user)
    assert await access.grant(settings, Channel(f"seafile:{library}"), user)
    client = await door.connect()
    await client.send("subscribe", repos)
    await client.settle()
    await door.lock(library, "new")
    assert (await client.next())["content"]["path"] == "new"


async def test_two_machines_of_one_user_each_receive_missed_events(door: Seafile) -> None:
    library, user = new_library(), f"{new_library()}@example.com"
    tokens = [subscribe_token(library, user, ttl_s=1000 + number) for number in range(2)]

    async def come(token: str) -> Client:
        client = await door.connect()
        await client.send("subscribe", {"repos": [{"id": library, "jwt_token": token}]})
        return client

    async def leave(client: Client) -> None:
        before = remembered_places(door, user)
        await client.socket.close()
        await until(lambda: remembered_places(door, user) != before)

    one = await come(tokens[0])
    await standing(door, one, library)
    two = await come(tokens[1])
    await standing(door, two, library)
    await leave(one)
    await door.lock(library, "a")
    await leave(two)
    await door.lock(library, "b")
    two = await come(tokens[1])
    assert (await two.next())["content"]["path"] == "b"
    one = await come(tokens[0])
    assert [each["content"]["path"] for each in await one.take(2)] == ["a", "b"]
    await door.lock(library, "c")
    for client in (one, two):
        assert (await client.next())["content"]["path"] == "c"


@pytest.mark.parametrize("ahead_s", [0, 120])
async def test_a_suspended_client_receives_all_events_since_its_suspension(
    valkey: Server, tmp_path: Path, ahead_s: int
) -> None:
    """It neither reads nor closes, so that its end is detected seconds later. Entry IDs contain the
    time of Redis, and the clock of relay's host may be ahead of it."""
    (tmp_path / "sitecustomize.py").write_text(
        f"import time\nreal = time.time\ntime.time = lambda: real() + {ahead_s}\n"
    )
    settings = [*SETTINGS, "protocol:seafile.ping_s=0.5", "protocol:seafile.pong_timeout_s=1"]
    process = RelayProcess(
        valkey, settings=settings, prefix=["env", f"PYTHONPATH={tmp_path}:{ROOT}"]
    )
    await asyncio.to_thread(process.start)
    library, user = new_library(), f"{new_library()}@example.com"
    try:
        async with seafile(process) as door, native(process) as clients:
            await followed(door, library, user=user)
            await door.lock(library, "a")
            # Wait until relay has closed the connection.
            async with asyncio.timeout(30):
                while await clients.metric('relay_connections{protocol="seafile"}'):
                    await asyncio.sleep(0.1)
            await door.lock(library, "b")
            back = await door.connect()
            await back.subscribe(library, user=user)
            assert [each["content"]["path"] for each in await back.take(2)] == ["a", "b"]
    finally:
        process.kill()


async def test_browsers_and_new_clients_receive_no_old_events(door: Seafile) -> None:
    library, user = new_library(), f"{new_library()}@example.com"
    agent = "Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36"
    page = await followed(door, library, user=user, agent=agent)
    await page.socket.close()
    await door.lock(library, "a")
    for agent_, user_ in ((agent, user), ("Seafile/9.0.20 (Linux)", f"new-{user}")):
        client = await door.connect(agent=agent_)
        await client.subscribe(library, user=user_)
        await standing(door, client, library)


async def test_clients_may_send_their_position(door: Seafile) -> None:
    library = new_library()
    await door.commit(library, "a")
    await door.lock(library, "f")
    ((first, _), *_) = redis(
        door.relay.server, "XRANGE", f"relay:stream:{{seafile:{library}}}", "-", "+"
    )
    client = await door.connect()
    await client.subscribe(library, user=f"{library}@example.com", after=first.decode())
    assert (await client.next())["type"] == "file-lock-changed"
    await door.commit(library, "b")
    assert await client.next() == update(library, "b")
    # From the beginning of the stream.
    other = await door.connect()
    await other.subscribe(library, user=f"x{library}@example.com", after="0-0")
    assert [each["type"] for each in await other.take(2)] == ["file-lock-changed", "repo-update"]


async def test_a_kill_of_relay_loses_no_event(valkey: Server) -> None:
    """Events of other producers while relay was stopped are in the stream."""
    process = RelayProcess(valkey, settings=SETTINGS)
    await asyncio.to_thread(process.start)
    library, user = new_library(), f"{new_library()}@example.com"
    try:
        async with seafile(process) as door:
            before = remembered(valkey)
            client = await followed(door, library, user=user)
            await until(lambda: remembered(valkey) > before)
            await asyncio.to_thread(process.kill)
            assert await client.hung_up() == 1006
            content = json.dumps({"repo_id": library, "path": "f"})
            process.xadd(f"seafile:{library}", data=content, type="file-lock-changed")
            await asyncio.to_thread(process.start)
            back = await door.connect()
            await back.subscribe(library, user=user)
            assert (await back.next())["type"] == "file-lock-changed"
    finally:
        process.kill()


# ---- several hosts, other protocols ----------------------------------------------------------


async def test_an_event_posted_to_one_host_reaches_a_client_on_another(
    door: Seafile, valkey: Server
) -> None:
    second = RelayProcess(valkey, settings=SETTINGS)
    await asyncio.to_thread(second.start)
    library = new_library()
    try:
        async with seafile(second) as other:
            client = await followed(other, library)
            await door.commit(library, "c")
            assert await client.next() == update(library, "c")
    finally:
        await asyncio.to_thread(second.stop)


async def test_other_protocols_read_a_library_if_they_have_the_right(door: Seafile) -> None:
    library = new_library()
    channel = f"seafile:{library}"
    async with native(door.relay, channels=[channel]) as clients:
        stream = await clients.sse(channel)
        await door.commit(library, "c")
        assert (await stream.next()).json() == {"repo_id": library, "commit_id": "c"}
    async with native(door.relay) as clients:
        socket = await clients.ws(channel)
        assert (await socket.next())["error"]["code"] == "forbidden"


async def test_a_clients_token_gives_access_in_the_native_protocol(door: Seafile) -> None:
    """A web page can follow the library by SSE until the token expires."""
    library, other = new_library(), new_library()
    channel = f"seafile:{library}"
    async with native(door.relay) as clients:
        stream = await clients.sse(channel, token=subscribe_token(library, ttl_s=8))
        await door.commit(library, "c")
        assert (await stream.next()).json()["commit_id"] == "c"
        assert "relay:revoked" in [block.event for block in await stream.ended()]
        for name, token in (
            (f"seafile:{other}", subscribe_token(library)),
            (channel, sign(repo_id=library, exp=int(time.time()) + 60)),
            (channel, sign("another key", repo_id=library, username=ALICE, exp=2**40)),
        ):
            with pytest.raises(Refused):
                await clients.sse(name, token=token)


@pytest.mark.parametrize("pattern", ["*", "{start}*", "*{end}"])
async def test_a_star_in_a_clients_token_is_not_a_pattern(door: Seafile, pattern: str) -> None:
    library = new_library()
    name = pattern.format(start=library[0], end=library[-1])
    async with native(door.relay) as clients:
        with pytest.raises(Refused):
            await clients.sse(f"seafile:{library}", token=subscribe_token(name))


async def test_a_stop_closes_clients_with_and_without_libraries(valkey: Server) -> None:
    process = RelayProcess(valkey, settings=SETTINGS)
    await asyncio.to_thread(process.start)
    try:
        async with seafile(process) as door:
            one, other = await followed(door, new_library()), await door.connect()
            await other.settle()
            async with asyncio.TaskGroup() as tasks:
                ends = [tasks.create_task(each.hung_up()) for each in (one, other)]
                stopped = await asyncio.to_thread(process.stop)
            assert (stopped, *(end.result() for end in ends)) == (0, 1001, 1001)
    finally:
        process.kill()


async def test_an_outage_of_redis(tmp_path_factory: pytest.TempPathFactory) -> None:
    server = Server(tmp_path_factory.mktemp("away")).start()
    process = RelayProcess(server, settings=SETTINGS)
    await asyncio.to_thread(process.start)
    library = new_library()
    try:
        async with seafile(process) as door:
            client = await followed(door, library)
            await asyncio.to_thread(server.kill)
            answer = await door.post("repo-update", {"repo_id": library, "commit_id": "lost"})
            assert answer.status == 503
            await asyncio.to_thread(server.start)

            async def posted() -> bool:
                content = {"repo_id": library, "commit_id": "c"}
                return (await door.post("repo-update", content)).status == 200

            while not await posted():
                await asyncio.sleep(0.1)
            # A restarted server may have lost entries, so that clients are disconnected.
            assert await client.hung_up() == 1001
            # It is disconnected once more if it returns before the position that it had before the
            # restart has been replaced.
            back = None
            while back is None:
                with contextlib.suppress(HungUp):
                    back = await followed(door, library)
            await door.commit(library, "d")
            assert await back.next() == update(library, "d")
    finally:
        process.kill()
        server.kill()


async def test_a_stream_that_lost_something_disconnects_its_clients(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """The protocol has no message for it. A sync client fetches everything when it reconnects."""
    server = Server(tmp_path_factory.mktemp("flushed")).start()
    process = RelayProcess(server, settings=SETTINGS)
    await asyncio.to_thread(process.start)
    library = new_library()
    try:
        async with seafile(process) as door:
            client = await followed(door, library)
            redis(server, "FLUSHALL")
            await door.commit(library, "c")
            with pytest.raises(HungUp):
                await client.take(1000)
            await until(lambda: any("may have missed events of" in line for line in process.log))
            back = await followed(door, library)
            await door.commit(library, "d")
            assert await back.next() == update(library, "d")
    finally:
        process.kill()
        server.kill()


async def test_a_client_that_does_not_answer_pings_is_closed(valkey: Server) -> None:
    """Seafile's server keeps such a connection open, but sends nothing more."""
    short = ["protocol:seafile.ping_s=0.2", "protocol:seafile.pong_timeout_s=1"]
    process = RelayProcess(valkey, settings=[*SETTINGS, *short])
    await asyncio.to_thread(process.start)
    library = new_library()
    try:
        async with seafile(process) as door, native(process) as metrics:
            stalled, other = await followed(door, library), await followed(door, library)
            # The first client does not read, so that its pings are not answered.
            while await metrics.metric('relay_connections{protocol="seafile"}') > 1:
                with contextlib.suppress(TimeoutError):
                    await other.next(0.1)
            await door.commit(library, "c")
            while (message := await other.next())["type"] != "repo-update":
                pass
            assert message == update(library, "c")
            with pytest.raises(HungUp):
                await stalled.take(1000)
            back = await door.connect()
            await back.subscribe(library)
            await standing(door, back, library)
    finally:
        process.kill()


async def test_several_workers_on_the_protocols_own_port(valkey: Server) -> None:
    port = free_port()
    settings = [*SETTINGS, f"protocol:seafile.port={port}"]
    process = RelayProcess(valkey, settings=settings, flags=["--workers", "2"])
    await asyncio.to_thread(process.start)
    library = new_library()
    try:
        async with seafile(process, port) as door:
            clients = [await followed(door, library) for _ in range(8)]
            await door.commit(library, "c")
            for client in clients:
                while (message := await client.next())["type"] != "repo-update":
                    pass
                assert message == update(library, "c")
    finally:
        await asyncio.to_thread(process.stop)


async def test_a_new_key_applies_after_sighup(valkey: Server, tmp_path: Path) -> None:
    path = tmp_path / "relay.ini"
    path.write_text(f"[protocol:seafile]\nkey = {KEY}\n")
    process = RelayProcess(valkey, flags=["-c", str(path)])
    await asyncio.to_thread(process.start)
    try:
        async with seafile(process) as door:
            await door.commit(new_library(), "c")
            path.write_text("[protocol:seafile]\nkey = another key of this site\n")
            process.send(signal.SIGHUP)
            await until(lambda: any("reloaded" in line for line in process.log))
            content = {"repo_id": new_library(), "commit_id": "c"}
            assert (await door.post("repo-update", content)).status == 400
            token = sign("another key of this site", exp=int(time.time()) + 60)
            answer = await door.post("repo-update", content, Authorization=f"Token {token}")
            assert answer.status == 200
    finally:
        process.kill()
