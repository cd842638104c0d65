"""Concurrent steps of a connection, which transcripts cannot contain."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from relay.core.errors import RedisUnavailable, Unavailable
from relay.core.model import Channel
from relay.protocols.centrifugo.clients.connection import CentrifugoConnection
from relay.protocols.centrifugo.clients.interfaces import ReadControl
from relay.protocols.centrifugo.settings import CentrifugoSettings
from relay.stream.format import entry
from tests.support.centrifugo import SECRET, Bench, Socket

RULES: dict[str, Any] = {
    "secret": SECRET,
    "insecure": True,
    "publish": True,
    "recover": True,
    "history_size": 100,
    "history_lifetime": 60,
}


@pytest.fixture
def bench() -> Bench:
    return Bench(CentrifugoSettings.model_validate(RULES))


def say(connection: CentrifugoConnection, *commands: tuple[str, dict[str, object]]) -> None:
    """Send one frame."""
    found = [
        {"uid": str(number), "method": method, "params": params}
        for number, (method, params) in enumerate(commands)
    ]
    connection.on_frame(json.dumps(found if len(found) > 1 else found[0]).encode())


def append(bench: Bench, channel: str, data: str) -> None:
    bench.context.streams.append(Channel(channel), entry.encode(data.encode()))


def heard(socket: Socket) -> list[Any]:
    lines, socket.lines[:] = list(socket.lines), []
    return [json.loads(line[2:]) if line.startswith("<") else line for line in lines]


async def connected(
    bench: Bench, name: str = "A", read_control: ReadControl | None = None
) -> tuple[CentrifugoConnection, Socket]:
    connection = bench.connection(name, read_control)
    say(connection, ("connect", {}))
    await bench.settle()
    socket = bench.sockets[name]
    assert heard(socket)[0]["body"]["client"]
    return connection, socket


async def test_no_push_precedes_the_reply_to_its_batch(bench: Bench) -> None:
    streams = bench.context.streams
    append(bench, "a", "1")
    connection, socket = await connected(bench)
    other, _ = await connected(bench, "B")
    say(other, ("subscribe", {"channel": "a"}))
    await bench.settle()
    # The first subscription begins at once. The other stream has not been read yet.
    held = bench.context.history

    async def late(channel: Channel, count: int) -> Any:
        if channel == "b":
            await opened.wait()
        return await held(channel, count)

    opened = asyncio.Event()
    bench.context.history = late
    say(
        connection,
        ("subscribe", {"channel": "a", "recover": True, "last": "0-0"}),
        ("subscribe", {"channel": "b", "recover": True, "last": "0-0"}),
    )
    await bench.settle()
    for data in ("2", "3"):
        append(bench, "a", data)
        await bench.settle()
    assert heard(socket) == []
    opened.set()
    await bench.settle()
    (replies, *pushes) = heard(socket)
    assert [reply["body"]["channel"] for reply in replies] == ["a", "b"]
    assert [each["data"] for each in replies[0]["body"]["messages"]] == [1]
    assert [push["body"]["data"] for push in pushes] == [2, 3]
    assert streams.followed


async def test_events_between_snapshot_and_subscription_are_sent_once(bench: Bench) -> None:
    append(bench, "a", "1")
    append(bench, "a", "2")
    other, _ = await connected(bench, "B")
    say(other, ("subscribe", {"channel": "a"}))
    await bench.settle()
    connection, socket = await connected(bench)
    streams = bench.context.streams
    streams.frozen = True
    say(connection, ("subscribe", {"channel": "a", "recover": True, "last": "0-0"}))
    await bench.settle()
    # The snapshot has been read, and the subscription is pending.
    append(bench, "a", "3")
    streams.frozen = False
    streams.answer()
    append(bench, "a", "4")
    await bench.settle()
    reply, *pushes = heard(socket)
    messages = [each["data"] for each in reversed(reply["body"]["messages"])]
    assert messages + [push["body"]["data"] for push in pushes] == [1, 2, 3, 4]
    assert reply["body"]["recovered"] is True


async def test_reading_pauses_while_commands_wait(bench: Bench) -> None:
    reading: list[str] = []

    class Control:
        def pause_reading(self) -> None:
            reading.append("paused")

        def resume_reading(self) -> None:
            reading.append("resumed")

    connection, socket = await connected(bench, read_control=Control())
    socket.full = True
    for _ in range(100):
        say(connection, ("ping", {}))
    assert heard(socket) == []
    assert reading == ["paused"]
    socket.full = False
    connection.on_drained()
    await bench.settle()
    assert len(heard(socket)) == 100
    assert reading == ["paused", "resumed"]


async def test_a_transport_that_cannot_pause_is_closed(bench: Bench) -> None:
    connection, socket = await connected(bench)
    socket.full = True
    frame = b"[" + b",".join([b'{"method":"ping"}'] * 3000) + b"]"
    for _ in range(6):
        connection.on_frame(frame)
    while not connection.closed:
        await asyncio.sleep(0)
    assert heard(socket) == ['x 3000 {"reason":"limit exceeded","reconnect":false}']


async def test_many_commands_are_executed_in_several_turns_in_order(bench: Bench) -> None:
    connection, socket = await connected(bench)
    pings = [b'{"uid":"%d","method":"ping"}' % number for number in range(2000)]
    turns = 0

    def count() -> None:
        nonlocal turns
        turns += 1
        if not connection.closed:
            loop.call_soon(count)

    loop = asyncio.get_running_loop()
    connection.on_frame(b"[" + b",".join(pings) + b"]")
    # A later frame waits. An invalid frame closes the connection.
    connection.on_frame(b'{"uid":"last","method":"ping"}')
    connection.on_frame(b"[" + b",".join([*pings, b"7"]) + b"]")
    count()
    while not connection.closed:
        await asyncio.sleep(0)
    batch, single, end = heard(socket)
    assert end == 'x 3000 {"reason":"invalid message","reconnect":false}'
    assert [each["uid"] for each in batch] == [str(number) for number in range(2000)]
    assert single["uid"] == "last"
    assert turns > 20


async def test_only_a_client_that_does_not_read_is_closed_as_slow(bench: Bench) -> None:
    connection, socket = await connected(bench)
    socket.full, socket.waiting = True, 1000
    connection.on_full()
    for _ in range(5):
        socket.waiting -= 1
        bench.pass_(60)
    assert heard(socket) == []
    bench.pass_(60)
    assert heard(socket) == ['x 3000 {"reason":"slow","reconnect":false}']


async def test_a_shorter_write_timeout(bench: Bench) -> None:
    settings = CentrifugoSettings.model_validate(RULES | {"client_message_write_timeout": 2})
    bench = Bench(settings)
    connection, socket = await connected(bench)
    socket.full, socket.waiting = True, 1000
    connection.on_full()
    bench.pass_(1)
    connection.on_full()
    bench.pass_(1)
    assert heard(socket) == ['x 3000 {"reason":"error sending message","reconnect":true}']


async def test_redis_is_unreachable_during_recovery(bench: Bench) -> None:
    connection, socket = await connected(bench)

    async def away(channel: Channel, count: int) -> Any:
        raise Unavailable("Redis is away")

    bench.context.history = away
    say(connection, ("subscribe", {"channel": "a", "recover": True, "last": "0-0"}))
    await bench.settle()
    assert heard(socket) == ['x 3000 {"reason":"internal server error","reconnect":true}']


async def test_the_server_of_one_channel_is_unreachable(bench: Bench) -> None:
    connection, socket = await connected(bench)
    bench.context.away = {Channel("a")}
    say(connection, ("subscribe", {"channel": "a"}), ("subscribe", {"channel": "b"}))
    await bench.settle()
    (replies,) = heard(socket)
    assert [each.get("error") for each in replies] == ["internal server error", None]
    bench.pass_(5)
    assert heard(socket) == []
    bench.context.away.clear()
    bench.pass_(2)
    # centrifuge-js subscribes again only when it has reconnected.
    assert heard(socket) == ['x 3000 {"reason":"internal server error","reconnect":true}']


@pytest.mark.parametrize("does", ["subscribe", "unsubscribe"])
async def test_a_client_that_has_tried_again_stays_connected(bench: Bench, does: str) -> None:
    connection, socket = await connected(bench)
    bench.context.away = {Channel("a")}
    say(connection, ("subscribe", {"channel": "a"}))
    await bench.settle()
    bench.context.away.clear()
    say(connection, (does, {"channel": "a"}))
    await bench.settle()
    heard(socket)
    bench.pass_(5)
    assert heard(socket) == []


@pytest.mark.parametrize("fails", ["before", "during"])
async def test_the_server_of_one_channel_is_unreachable_during_recovery(
    bench: Bench, fails: str
) -> None:
    connection, socket = await connected(bench)
    held = bench.context.history

    async def away(channel: Channel, count: int) -> Any:
        if channel == "b":
            return await held(channel, count)
        bench.context.away.add(channel)
        raise Unavailable("Redis is away")

    bench.context.history = away
    if fails == "before":
        bench.context.away.add(Channel("a"))
    for channel in "ab":
        say(connection, ("subscribe", {"channel": channel, "recover": True, "last": "0-0"}))
        await bench.settle()
    assert [each.get("error") for each in heard(socket)] == ["internal server error", None]
    append(bench, "b", "1")
    await bench.settle()
    assert [each["body"]["data"] for each in heard(socket)] == [1]
    bench.pass_(5)
    assert heard(socket) == []
    bench.context.away.clear()
    bench.pass_(2)
    assert heard(socket) == ['x 3000 {"reason":"internal server error","reconnect":true}']


@pytest.mark.parametrize("recover", [False, True])
async def test_a_connection_stays_open_while_a_second_subscribe_is_pending(
    bench: Bench, *, recover: bool
) -> None:
    connection, socket = await connected(bench)
    held, read = bench.context.history, asyncio.Event()

    async def late(channel: Channel, count: int) -> Any:
        await read.wait()
        return await held(channel, count)

    bench.context.history = late
    bench.context.away = {Channel("a")}
    say(connection, ("subscribe", {"channel": "a"}))
    await bench.settle()
    assert [each["error"] for each in heard(socket)] == ["internal server error"]
    bench.context.away.clear()
    bench.context.streams.frozen = True
    say(connection, ("subscribe", {"channel": "a", "recover": recover, "last": "0-0"}))
    await bench.settle()
    bench.pass_(5)
    assert heard(socket) == []
    bench.context.streams.frozen = False
    read.set()
    bench.context.streams.answer()
    await bench.settle()
    assert [each["body"]["status"] for each in heard(socket)] == [True]


async def test_redis_is_unreachable_during_queries_and_publishing(bench: Bench) -> None:
    connection, socket = await connected(bench)
    say(connection, ("subscribe", {"channel": "a"}))
    await bench.settle()
    heard(socket)

    async def away(channel: Channel, count: int) -> Any:
        raise Unavailable("Redis is away")

    bench.context.history = away
    bench.context.refusing = RedisUnavailable("away")
    say(connection, ("history", {"channel": "a"}), ("publish", {"channel": "a", "data": 1}))
    await bench.settle()
    (replies,) = heard(socket)
    assert [(each["error"], each["advice"]) for each in replies] == [
        ("internal server error", "retry")
    ] * 2
    assert [each["body"] for each in replies] == [
        {"channel": "a", "data": None},
        {"channel": "a", "status": False},
    ]


async def test_a_client_that_disconnects_during_admission_leaves_no_state(bench: Bench) -> None:
    connection = bench.connection("A")
    say(connection, ("connect", {"user": "ann"}))
    connection.on_closed()
    await bench.settle()
    assert bench.context.hub.total == 0
    connection, _ = await connected(bench, "B")
    say(connection, ("subscribe", {"channel": "a", "recover": True, "last": "0-0"}))
    connection.on_closed()
    await bench.settle()
    assert bench.context.hub.total == 0
    assert not bench.context.streams.followed


async def test_after_a_failover_no_client_has_recovered(bench: Bench) -> None:
    append(bench, "a", "1")
    connection, socket = await connected(bench)
    say(connection, ("subscribe", {"channel": "a"}))
    await bench.settle()
    last = heard(socket)[0]["body"]["last"]
    bench.context.streams.promote()
    await bench.settle()
    reason = '{"reason":"insufficient state","reconnect":true}'
    assert heard(socket) == [f"x 3000 {reason}"]
    # The client's entry exists and nothing was appended, but entries may be lost.
    again, socket = await connected(bench, "B")
    say(again, ("subscribe", {"channel": "a", "recover": True, "last": last}))
    await bench.settle()
    body = heard(socket)[0]["body"]
    assert (body["recovered"], [each["data"] for each in body["messages"]]) == (False, [1])
    # Clients that were notified, and later events, are not affected.
    append(bench, "a", "2")
    await bench.settle()
    last = heard(socket)[0]["body"]["uid"]
    third, socket = await connected(bench, "C")
    say(third, ("subscribe", {"channel": "a", "recover": True, "last": last}))
    await bench.settle()
    assert heard(socket)[0]["body"]["recovered"] is True


async def test_the_server_of_a_pending_subscription_becomes_unreachable(bench: Bench) -> None:
    connection, socket = await connected(bench)
    say(connection, ("subscribe", {"channel": "b"}))
    await bench.settle()
    assert [each.get("error") for each in heard(socket)] == [None]
    bench.context.streams.frozen = True
    say(connection, ("subscribe", {"channel": "a"}))
    # It waits for the reply to the other command.
    say(connection, ("ping", {}))
    await bench.settle()
    assert heard(socket) == []
    bench.context.away = {Channel("a")}
    bench.pass_(2)
    await bench.settle()
    assert [(each["method"], each.get("error")) for each in heard(socket)] == [
        ("subscribe", "internal server error"),
        ("ping", None),
    ]
    bench.context.streams.frozen = False
    bench.context.away.clear()
    bench.pass_(2)
    assert heard(socket) == ['x 3000 {"reason":"internal server error","reconnect":true}']


@pytest.mark.parametrize("concerns", ["stream", "server"])
async def test_redis_refuses_to_read_one_channel(bench: Bench, concerns: str) -> None:
    connection, socket = await connected(bench)
    say(connection, ("subscribe", {"channel": "b"}))
    await bench.settle()
    heard(socket)
    bench.context.streams.frozen = True
    say(connection, ("subscribe", {"channel": "a"}))
    await bench.settle()
    followed = bench.context.streams.followed[Channel("a")]
    followed.on_examine_failed(followed.examine_request(), "the channel's stream cannot be read")
    await bench.settle()
    (reply,) = heard(socket)
    assert (reply["error"], reply["advice"]) == ("internal server error", "retry")
    bench.context.streams.frozen = False
    if concerns == "server":
        bench.context.away = {Channel("a")}
        bench.pass_(5)
        assert heard(socket) == []
        bench.context.away.clear()
        bench.pass_(2)
        # As above.
        assert heard(socket) == ['x 3000 {"reason":"internal server error","reconnect":true}']
    else:
        bench.pass_(60)
        append(bench, "b", "1")
        await bench.settle()
        assert [each["body"]["data"] for each in heard(socket)] == [1]
