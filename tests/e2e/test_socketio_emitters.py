"""Real emitters from npm through a real Redis to real clients of all generations."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from typing import Any

import aiohttp
import msgpack
import pytest
import redis

from tests.support import pypi
from tests.support.clients import LIMIT_S, native, until
from tests.support.relay import RelayProcess
from tests.support.socketio import (
    CLIENTS,
    GENERATIONS,
    SECRET,
    Driver,
    Emitter,
    NpmClient,
    axr_token,
    connect_options,
    emitter,
    npm_clients,
)
from tests.support.valkey import Server, running

pytestmark = pytest.mark.redis
NEW = "socket.io-client"


@pytest.fixture(scope="module")
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Run the Redis of AcceleratXR's services. It is not relay's, and has no ACL rules."""
    server = Server(tmp_path_factory.mktemp("services"), acl=False)
    with running(server):
        yield server


def axr_settings(services: Server) -> list[str]:
    return [
        f"protocol:socketio.secret={SECRET}",
        f"producer:socketio_emitter.redis_url=redis://127.0.0.1:{services.port}/0",
    ]


@pytest.fixture(scope="module")
def axr(valkey: Server, services: Server) -> Iterator[RelayProcess]:
    process = RelayProcess(valkey, settings=axr_settings(services)).start()
    wait_for_tap(services)
    yield process
    process.kill()


def wait_for_tap(services: Server, count: int = 1) -> None:
    client = services.client()
    while client.execute_command("PUBSUB", "NUMPAT") < count:  # type: ignore[no-untyped-call]
        pass


@pytest.fixture
async def npm() -> AsyncIterator[Driver]:
    async with npm_clients() as driver:
        yield driver


@pytest.fixture(params=GENERATIONS)
async def io(request: pytest.FixtureRequest, services: Server) -> AsyncIterator[Emitter]:
    async with emitter(request.param, services.port) as emitting:
        yield emitting


@pytest.fixture
async def io5(services: Server) -> AsyncIterator[Emitter]:
    async with emitter("5", services.port) as emitting:
        yield emitting


async def join(
    npm: Driver, axr: RelayProcess, uid: str, package: str = NEW, **more: Any
) -> NpmClient:
    options = {**connect_options(package, axr_token(uid)), **more}
    client = await npm.open(f"{axr.url}/axr", package=package, **options)
    await client.until("connect")
    return client


def bare(args: list[Any]) -> list[Any]:
    """Return the arguments without the cursor that a client with recovery receives."""
    return args[:-1] if isinstance(args[-1], str) and args[-1].startswith("c1.") else args


async def seen(client: NpmClient) -> list[Any]:
    return bare(await client.event())


@pytest.mark.parametrize("package", CLIENTS)
async def test_the_documents_own_two_lines(
    axr: RelayProcess, npm: Driver, io: Emitter, package: str, request: pytest.FixtureRequest
) -> None:
    uid = f"doc-{request.node.callspec.id}"
    client = await join(npm, axr, uid, package)
    other = await join(npm, axr, f"{uid}-other", package)
    await io.run('io.to("allusers").emit("msg", {hello: "world", n: 1});')
    await io.run(f'io.to("{uid}").emit("msg", "just you");')
    await io.run('io.to("allusers").emit("end");')
    # Only events of the same room arrive in order.
    mine = [await seen(client) for _ in range(3)]
    mine.remove(["msg", "just you"])
    assert mine == [["msg", {"hello": "world", "n": 1}], ["end"]]
    assert await seen(other) == ["msg", {"hello": "world", "n": 1}]
    assert await seen(other) == ["end"]


PYTHON = """
from socket_io_emitter import Emitter
io = Emitter({"host": "127.0.0.1", "port": %d})
io.Of("/axr").To("python").Emit("one", "é")
io.Of("/axr").Emit("all", {"n": [1]})
"""


async def test_the_emitter_for_python(axr: RelayProcess, npm: Driver, services: Server) -> None:
    """Its emits to the whole namespace have an empty text instead of a list of rooms."""
    client = await join(npm, axr, "python")
    script = ["-c", PYTHON % services.port]
    done = await asyncio.to_thread(pypi.run, "socket.io-emitter-0.1.5.1", script)
    assert done.returncode == 0, done.stderr
    found = sorted([await seen(client) for _ in range(2)])
    assert found == [["all", {"n": [1]}], ["one", "é"]]


@pytest.mark.parametrize("package", CLIENTS)
async def test_several_rooms_reach_each_client_once_and_none_means_everybody(
    axr: RelayProcess, npm: Driver, io: Emitter, package: str, request: pytest.FixtureRequest
) -> None:
    uid = f"rooms-{request.node.callspec.id}"
    client = await join(npm, axr, uid, package)
    await io.run(f'io.to("{uid}").to("allusers").to("nobody").emit("several", 1);')
    await io.run('io.emit("everybody", 2);')
    await io.run(f'io.to("{uid}").to("{uid}").emit("twice", 3);')
    await io.run(f'io.emit("end"); io.to("{uid}").emit("end");')
    got = [await seen(client) for _ in range(5)]
    expected = [["several", 1], ["everybody", 2], ["twice", 3], ["end"], ["end"]]
    assert sorted(map(str, got)) == sorted(map(str, expected))


@pytest.mark.parametrize("package", CLIENTS)
@pytest.mark.parametrize("transports", [["polling"], ["websocket"]], ids="+".join)
async def test_binary_dates_undefined_and_several_arguments(
    axr: RelayProcess,
    npm: Driver,
    io: Emitter,
    package: str,
    transports: list[str],
    request: pytest.FixtureRequest,
) -> None:
    uid = f"values-{request.node.callspec.id}"
    client = await join(npm, axr, uid, package, transports=transports)
    to = f'io.to("{uid}")'
    await io.run(f'{to}.emit("bin", {{a: [Buffer.from([1, 2, 255])]}}, Buffer.from("x"));')
    await io.run(f'{to}.emit("date", new Date(1500000000000), {{at: new Date(5)}});')
    await io.run(f'{to}.emit("undefined", undefined, [undefined, 1], {{u: undefined, k: 1}});')
    await io.run(f'{to}.emit("none");')
    await io.run(f'{to}.emit("many", 1, "two", [3], null, 4.5, true, 9007199254740991);')
    await io.run(f'{to}.emit("list", [1, 2]);')
    await io.run(f'{to}.emit("relay:x", "ü😀\\u2028");')
    assert await seen(client) == ["bin", {"a": [{"hex": "0102ff"}]}, {"hex": "78"}]
    iso = "2017-07-14T02:40:00.000Z"
    assert await seen(client) == ["date", iso, {"at": "1970-01-01T00:00:00.005Z"}]
    assert await seen(client) == ["undefined", None, [None, 1], {"k": 1}]
    assert await seen(client) == ["none"]
    assert await seen(client) == ["many", 1, "two", [3], None, 4.5, True, 9007199254740991]
    assert await seen(client) == ["list", [1, 2]]
    assert await seen(client) == ["relay:x", "ü😀\u2028"]


async def test_other_doors_see_what_an_emit_means(
    axr: RelayProcess, npm: Driver, io: Emitter
) -> None:
    async with native(axr, channels=["axr:*"]) as door:
        stream = await door.sse("axr:allusers")
        await io.run('io.to("allusers").emit("msg", {n: 1});')
        await io.run('io.to("allusers").emit("many", 1, Buffer.from([1, 2]));')
        await io.run('io.to("allusers").volatile.emit("now", "gone");')
        blocks = {block.event: block for block in await stream.take(3)}
        assert blocks["msg"].json() == {"n": 1}
        assert blocks["many"].json() == [1, base64.b64encode(b"\1\2").decode()]
        # A volatile event is not in the stream. It may arrive before events emitted earlier.
        assert (blocks["now"].json(), blocks["now"].id) == ("gone", None)


@pytest.mark.parametrize("package", CLIENTS)
async def test_large_emits_arrive_as_they_are(
    axr: RelayProcess, npm: Driver, io: Emitter, package: str, request: pytest.FixtureRequest
) -> None:
    uid = f"large-{request.node.callspec.id}"
    client = await join(npm, axr, uid, package)
    async with native(axr, channels=["axr:*"]) as door:
        stream = await door.sse(f"axr:{uid}")
        for script, expected in (
            ('"x".repeat(1500000)', "x" * 1_500_000),
            ("Buffer.alloc(1000000, 1)", bytes([1]) * 1_000_000),
            ("Buffer.alloc(9, 1)", bytes([1]) * 9),
        ):
            await io.run(f'io.to("{uid}").emit("large", {script}, "end");')
            name, value, end = await seen(client)
            assert (name, end) == ("large", "end")
            shown = (await stream.next()).json()[0]
            if isinstance(expected, str):
                assert value == shown == expected
            else:
                assert bytes.fromhex(value["hex"]) == expected
                assert base64.b64decode(shown) == expected


@pytest.mark.parametrize("package", CLIENTS)
async def test_more_binary_arguments_than_a_client_accepts_arrive_as_base64(
    axr: RelayProcess, npm: Driver, io5: Emitter, package: str
) -> None:
    """With more than 10, socket.io-parser would close the connection and reconnect in a loop."""
    client = await join(npm, axr, f"many-{package}", package)
    list_of = "Array.from({length: %d}, () => Buffer.from([1]))"
    for count in (10, 11):
        await io5.run(f'io.to("many-{package}").emit("many", {list_of % count});')
    await io5.run(f'io.to("many-{package}").emit("after");')
    assert await seen(client) == ["many", [{"hex": "01"}] * 10]
    assert await seen(client) == ["many", ["AQ=="] * 11]
    assert await seen(client) == ["after"]


async def test_an_emit_that_is_too_large_is_a_dead_letter(
    axr: RelayProcess, npm: Driver, io: Emitter, request: pytest.FixtureRequest
) -> None:
    admin = axr.server.client()
    admin.execute_command("DEL", "relay:dead-letters")  # type: ignore[no-untyped-call]
    uid = f"too-large-{request.node.callspec.id}"
    client = await join(npm, axr, uid)
    # The stream's key has another type, so Redis rejects the entry.
    admin.set(f"relay:stream:{{axr:{uid}-taken}}", "x")
    await io.run(f'io.to("{uid}").emit("large", "x".repeat(5000000));')
    await io.run(f'io.to("{uid}-taken").emit("taken", "text");')
    await io.run(f'io.to("{uid}").emit("small", 1);')
    assert await seen(client) == ["small", 1]

    def dead_letters() -> list[Any]:
        found: list[Any] = admin.execute_command("XRANGE", "relay:dead-letters", "-", "+")  # type: ignore[no-untyped-call]
        return found

    # The small event was appended with the rejected ones or later, so the letters exist now.
    letters = dead_letters()
    assert len(letters) == 2
    reasons = [letter[b"reason"].decode() for _, letter in letters]
    assert reasons[0].startswith("too large: 50000")
    assert "max_entry_bytes" in reasons[0]
    assert letters[0][1][b"queue"].decode() == f"socket.io#/axr#{uid}#"
    assert "WRONGTYPE" in reasons[1]
    assert json.loads(letters[1][1][b"fields"]) == [["data", '"text"']]


@pytest.mark.parametrize("depth", [300, 700, 1000])
async def test_an_emit_that_nests_deeply_costs_nothing(
    axr: RelayProcess, npm: Driver, services: Server, io5: Emitter, depth: int
) -> None:
    client = await join(npm, axr, f"deep-{depth}")
    deep = "[" * depth + "]" * depth
    text = '["emitter",{"type":2,"data":["deep",%s],"nsp":"/axr"},{"rooms":["deep-%d"]}]'
    services.client().publish(f"socket.io#/axr#deep-{depth}#", text % (deep, depth))
    await io5.run(f'io.to("deep-{depth}").emit("after", 1);')
    assert await seen(client) == ["after", 1]
    assert not any("Traceback" in line for line in axr.log)


@pytest.mark.parametrize("package", CLIENTS)
async def test_volatile_emits_are_live_only(
    axr: RelayProcess, npm: Driver, io: Emitter, package: str, request: pytest.FixtureRequest
) -> None:
    uid = f"volatile-{request.node.callspec.id}"
    client = await join(npm, axr, uid, package)
    await io.run(f'io.to("{uid}").volatile.emit("v", "a text at the end");')
    await io.run(f'io.to("{uid}").to("allusers").volatile.emit("v2", {{n: 1}});')
    await io.run('io.to("allusers").volatile.emit("v3", Buffer.from([7]));')
    got = [await seen(client) for _ in range(3)]
    expected = [["v", "a text at the end"], ["v2", {"n": 1}], ["v3", {"hex": "07"}]]
    assert sorted(map(str, got)) == sorted(map(str, expected))
    stream = f"relay:stream:{{axr:{uid}}}"
    assert axr.server.client().execute_command("XLEN", stream) == 0  # type: ignore[no-untyped-call]


async def test_except_and_reserved_names(axr: RelayProcess, npm: Driver, io5: Emitter) -> None:
    inside = await join(npm, axr, "except-in")
    outside = await join(npm, axr, "except-out")
    await io5.run('io.to("allusers").except("except-out").emit("most", 1);')
    await io5.run('io.except(["except-out", "nobody"]).emit("all but", 2);')
    await io5.run('io.to(["except-in", "except-out"]).except("except-in").emit("rest", 3);')
    await io5.run('io.emit("end");')
    assert [await seen(inside) for _ in range(3)] == [["most", 1], ["all but", 2], ["end"]]
    rest = [await seen(outside) for _ in range(2)]
    assert sorted(map(str, rest)) == ["['end']", "['rest', 3]"]


async def test_names_that_clients_fire_themselves_are_not_delivered(
    axr: RelayProcess, npm: Driver, services: Server
) -> None:
    client = await join(npm, axr, "reserved")
    async with emitter("3", services.port) as io:
        for name in ("connect", "disconnect", "connect_error", "newListener"):
            await io.run(f'io.to("reserved").emit("{name}", 1);')
        await io.run('io.to("reserved").emit("end");')
    assert await seen(client) == ["end"]


async def test_rooms_of_every_name(axr: RelayProcess, npm: Driver, io5: Emitter) -> None:
    client = await join(npm, axr, "named")
    rooms = ["a#b", "white space", "{braces}", "100%", "ü:1", "5"]
    await io5.run(f'io.in("named").socketsJoin({json.dumps(rooms)});')
    for number, room in enumerate(rooms):
        await io5.run(f'io.to({json.dumps(room)}).emit("in", {number});')
    got = sorted([(await seen(client))[1] for _ in rooms])
    assert got == list(range(len(rooms)))


async def test_control_messages_join_leave_and_end(
    axr: RelayProcess, npm: Driver, io5: Emitter
) -> None:
    async with AsyncExitStack():
        one, two = await join(npm, axr, "ctl-1"), await join(npm, axr, "ctl-2")
        # An emit immediately after a join reaches the new members.
        await io5.run('io.in("ctl-1").socketsJoin("club"); io.to("club").emit("club", 1);')
        assert await seen(one) == ["club", 1]
        await io5.run('io.in("ctl-1").socketsLeave("club");')
        await io5.run('io.in(["ctl-1", "ctl-2"]).except("ctl-2").socketsLeave("allusers");')
        await asyncio.to_thread(wait_for_commands, axr, 3)
        await io5.run('io.to("club").emit("club", 2); io.to("allusers").emit("users", 3);')
        await io5.run('io.to("ctl-1").to("ctl-2").emit("end"); io.serverSideEmit("hello", 1);')
        await io5.run('io.emit("everybody");')
        got = [await seen(one), await seen(one)]
        assert sorted(map(str, got)) == ["['end']", "['everybody']"]
        assert await seen(two) == ["users", 3]
        await io5.run('io.in("ctl-1").disconnectSockets(true);')
        gone = await one.until("disconnect")
        assert (gone["reason"], gone["active"]) == ("io server disconnect", False)
        await io5.run('io.to("ctl-2").emit("still here");')
        got = [await seen(two) for _ in range(3)]
        assert ["still here"] in got


@pytest.mark.parametrize("transport", ["polling", "websocket"])
async def test_a_command_takes_effect_after_the_emits_before_it(
    axr: RelayProcess, npm: Driver, io5: Emitter, transport: str
) -> None:
    for number in range(10):
        uid, room = f"order-{transport}-{number}", f"room-{transport}-{number}"
        client = await join(npm, axr, uid, transports=[transport])
        await io5.run(f'io.in("{uid}").socketsJoin("{room}");')
        await io5.run(f'io.to("{room}").emit("joined");')
        assert await seen(client) == ["joined"]
        await io5.run(
            f'io.to("{room}").emit("last"); io.in("{uid}").socketsLeave("{room}");'
            f'io.to("{room}").emit("left"); io.to("{uid}").emit("bye");'
            f'io.in("{uid}").disconnectSockets(true); io.to("{uid}").emit("late");'
        )
        assert (await client.until("disconnect"))["reason"] == "io server disconnect"
        assert sorted(map(bare, client.events)) == [["bye"], ["last"]]


def wait_for_commands(axr: RelayProcess, count: int) -> None:
    """Wait until the control stream has `count` entries. Workers read them at once."""
    client = axr.server.client()
    while client.execute_command("XLEN", "relay:control") < count:  # type: ignore[no-untyped-call]
        pass


async def test_a_socket_is_a_room_by_its_id(axr: RelayProcess, npm: Driver, io: Emitter) -> None:
    for package in CLIENTS:
        options = connect_options(package, axr_token("own"))
        one = await npm.open(f"{axr.url}/axr", package=package, **options)
        sid = (await one.until("connect"))["id"]
        other = await join(npm, axr, "own", package)
        await io.run(f'io.to("{sid}").emit("you alone", 1); io.to("own").emit("both", 2);')
        got = [await seen(one) for _ in range(2)]
        assert sorted(map(str, got)) == ["['both', 2]", "['you alone', 1]"]
        assert await seen(other) == ["both", 2]


async def test_a_socket_that_has_left_allusers_still_gets_what_is_sent_to_its_id(
    axr: RelayProcess, npm: Driver, io5: Emitter
) -> None:
    for package in CLIENTS:
        uid = f"left-{package}"
        options = connect_options(package, axr_token(uid))
        client = await npm.open(f"{axr.url}/axr", package=package, **options)
        sid = (await client.until("connect"))["id"]
        commands = axr.server.client().execute_command("XLEN", "relay:control")  # type: ignore[no-untyped-call]
        await io5.run(f'io.in("{uid}").socketsLeave("allusers");')
        await asyncio.to_thread(wait_for_commands, axr, commands + 1)
        await io5.run(
            f'io.to("{sid}").emit("own", 1); io.to("{sid}").volatile.emit("own", 2);'
            f'io.to("allusers").emit("users"); io.to("{sid}").except("{uid}").emit("except");'
            f'io.to("elsewhere").to("{sid}").emit("own", 3);'
        )
        got = [await seen(client) for _ in range(3)]
        assert sorted(map(str, got)) == ["['own', 1]", "['own', 2]", "['own', 3]"]


async def test_a_socket_that_has_left_all_rooms_can_reconnect(
    axr: RelayProcess, npm: Driver, io5: Emitter
) -> None:
    uid = "left-all"
    options = connect_options(NEW, axr_token(uid))
    client = await npm.open(f"{axr.url}/axr", **options)
    sid = (await client.until("connect"))["id"]
    commands = axr.server.client().execute_command("XLEN", "relay:control")  # type: ignore[no-untyped-call]
    await io5.run(f'io.in("{sid}").socketsLeave(["allusers", "{uid}"]);')
    await asyncio.to_thread(wait_for_commands, axr, commands + 1)
    await io5.run(f'io.to("{sid}").emit("before"); io.to("{uid}").emit("room");')
    assert await seen(client) == ["before"]
    await client.do("cut")
    await client.until("disconnect")
    await io5.run(f'io.to("{sid}").emit("away"); io.to("allusers").emit("room");')
    again = await client.until("connect")
    assert (again["id"], again["recovered"]) == (sid, True)
    await io5.run('io.emit("all");')
    assert [await seen(client), await seen(client)] == [["away"], ["all"]]


async def test_an_emit_to_a_socket_and_its_room_arrives_once(
    axr: RelayProcess, npm: Driver, io: Emitter
) -> None:
    client = await npm.open(f"{axr.url}/axr", **connect_options(NEW, axr_token("once")))
    sid = (await client.until("connect"))["id"]
    await io.run(
        f'io.to("{sid}").to("once").emit("first", 1); io.to("once").to("{sid}").emit("first", 2);'
        f'io.to("{sid}").emit("last");'
    )
    names = [await seen(client)]
    while ["last"] not in names or names.count(["first", 2]) < 1 or names.count(["first", 1]) < 1:
        names.append(await seen(client))
    # Events of two rooms have no common order, so wait for both rooms.
    await io.run(f'io.to("{sid}").emit("end"); io.to("once").emit("end");')
    while names.count(["end"]) < 2:
        names.append(await seen(client))
    assert sorted(map(str, names)) == [
        "['end']",
        "['end']",
        "['first', 1]",
        "['first', 2]",
        "['last']",
    ]


async def test_garbage_on_the_channel_costs_nothing(
    axr: RelayProcess, npm: Driver, services: Server, io5: Emitter
) -> None:
    client = await join(npm, axr, "tidy")
    publish = services.client().publish

    def emit(data: list[Any], nsp: str = "/axr", **opts: Any) -> bytes:
        packed: bytes = msgpack.packb(["emitter", {"type": 2, "data": data, "nsp": nsp}, opts])
        return packed

    for payload in (
        *(b"", b"\xc1", b"\x93", b"[1,", b"{}", b"[]", b"\xff" * 1000, b"\x91" * 2000),
        msgpack.packb({"a": 1}),
        emit([]),
        emit([{}]),
        emit(["m"], rooms={"a": 1}),
        emit(["m"], rooms=["x" * 300]),
        emit(["m", msgpack.ExtType(9, b"x")], rooms=["tidy"]),
        emit(["m"], "/other", rooms=["tidy"]),
    ):
        await asyncio.to_thread(publish, "socket.io#/axr#tidy#", payload)
        await asyncio.to_thread(publish, "socket.io-request#/axr#", payload)
    # Send a request of an old server, and JSON as from an emitter with another parser.
    old = b'{"type":2,"requestid":"x","sid":"y"}'
    await asyncio.to_thread(publish, "socket.io-request#/axr#", old)
    plain = json.dumps(["e", {"type": 2, "data": ["json", 1], "nsp": "/axr"}, {"rooms": ["tidy"]}])
    await asyncio.to_thread(publish, "socket.io#/axr#tidy#", plain)
    await io5.run('io.to("tidy").emit("end");')
    assert await seen(client) == ["json", 1]
    assert await seen(client) == ["end"]


async def test_the_streams_emitters_entries(
    axr: RelayProcess, npm: Driver, services: Server, valkey: Server
) -> None:
    client = await join(npm, axr, "streams")
    source: redis.Redis = services.client()
    # The tap begins at the stream's end and then stores its position in relay's Redis.
    await until(lambda: valkey.client().get("relay:tap:socketio_emitter:socket.io") is not None)
    opts = {"rooms": ["streams"], "flags": {}, "except": []}

    def add(kind: int, values: dict[str, Any], *, binary: bool = False) -> None:
        data = json.dumps(values) if not binary else base64.b64encode(msgpack.packb(values))
        fields = {"uid": "emitter", "nsp": "/axr", "type": str(kind), "data": data}
        source.xadd("socket.io", fields)  # type: ignore[arg-type]

    packet = {"type": 2, "data": ["msg", "from a stream"], "nsp": "/axr"}
    await asyncio.to_thread(add, 3, {"packet": packet, "opts": opts})
    binary = {"type": 2, "data": ["bin", b"\1\2"]}
    await asyncio.to_thread(add, 3, {"packet": binary, "opts": opts}, binary=True)
    await asyncio.to_thread(source.xadd, "socket.io", {"garbage": "1"})
    await asyncio.to_thread(add, 4, {"opts": opts, "rooms": ["lounge"]})
    lounge = {"rooms": ["lounge"], "flags": {}, "except": []}
    await asyncio.to_thread(add, 3, {"packet": {"type": 2, "data": ["hi"]}, "opts": lounge})
    assert await seen(client) == ["msg", "from a stream"]
    assert await seen(client) == ["bin", {"hex": "0102"}]
    assert await seen(client) == ["hi"]
    await asyncio.to_thread(add, 6, {"opts": opts, "close": True})
    assert (await client.until("disconnect"))["reason"] == "io server disconnect"


async def packet(socket: aiohttp.ClientWebSocketResponse) -> str:
    """Return the next packet that is neither a ping nor a cursor."""
    async with asyncio.timeout(LIMIT_S):
        while (text := await socket.receive_str()).startswith(("2", '42/axr,["relay:')):
            if text == "2":
                await socket.send_str("3")
    return text


async def test_commands_for_many_clients_keep_their_order(axr: RelayProcess, io5: Emitter) -> None:
    """Commands for more than about 100 clients are executed in several turns of the event loop."""
    url = axr.url.replace("http", "ws") + "/socket.io/?EIO=4&transport=websocket"
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def connected(number: int) -> aiohttp.ClientWebSocketResponse:
            socket = await session.ws_connect(url)
            assert (await packet(socket)).startswith("0{")
            token = json.dumps({"token": axr_token(f"many-{number}")})
            await socket.send_str(f"40/axr,{token}")
            assert (await packet(socket)).startswith("40/axr,")
            return socket

        async with asyncio.TaskGroup() as tasks:
            joining = [tasks.create_task(connected(number)) for number in range(120)]
        *stay, leaves = [task.result() for task in joining]
        await io5.run(
            'io.socketsJoin("one"); io.socketsJoin("two"); io.socketsLeave("one");'
            'io.in("many-0").socketsJoin("one"); io.in("many-119").disconnectSockets();'
        )
        assert await packet(leaves) == "41/axr,"
        await io5.run('io.to("one").emit("msg", 1); io.to("two").emit("msg", 2);')
        both = [await packet(stay[0]), await packet(stay[0])]
        assert sorted(text[:15] for text in both) == ['42/axr,["msg",1', '42/axr,["msg",2']
        for socket in stay[1:]:
            assert (await packet(socket)).startswith('42/axr,["msg",2')
        await io5.run("io.disconnectSockets();")
        for socket in stay:
            assert await packet(socket) == "41/axr,"
