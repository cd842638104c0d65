"""producers/publisher.py against a running relay, with the rights of the `producer` user."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from producers.publisher import AsyncPublisher, Publisher, PublishFailed
from tests.support import pypi
from tests.support.clients import Native, redis, stream_key
from tests.support.relay import RelayProcess
from tests.support.valkey import Server, free_port

pytestmark = pytest.mark.redis
# Much longer than any reply takes, so that the tests pass on a busy machine.
EASY_MS = 5000
SECRET = "the secret of the api"


@pytest.fixture(scope="module")
def relay(valkey: Server) -> Iterator[RelayProcess]:
    process = RelayProcess(valkey, settings=[f"protocol:centrifugo.secret={SECRET}"]).start()
    yield process
    process.kill()


@pytest.fixture
async def publisher(valkey: Server) -> AsyncIterator[AsyncPublisher]:
    async with AsyncPublisher(valkey.url("producer"), limit_ms=EASY_MS) as opened:
        yield opened


@pytest.fixture
def blocking(valkey: Server) -> Iterator[Publisher]:
    with Publisher(valkey.url("producer"), limit_ms=EASY_MS) as opened:
        yield opened


@pytest.fixture
async def by_http(relay: RelayProcess) -> AsyncIterator[AsyncPublisher]:
    async with AsyncPublisher(http=relay.url, secret=SECRET, limit_ms=EASY_MS) as opened:
        yield opened


@pytest.fixture(params=["redis", "http"])
def either(
    request: pytest.FixtureRequest, publisher: AsyncPublisher, by_http: AsyncPublisher
) -> AsyncPublisher:
    """Return a publisher for each transport. Both must behave in the same way."""
    return publisher if request.param == "redis" else by_http


def entries(server: Server, channel: str) -> list[bytes]:
    """Return the data of all entries of the channel."""
    found = redis(server, "XRANGE", stream_key(channel), "-", "+")
    return [fields[b"data"] for _, fields in found]


async def test_an_event_reaches_sse_and_websocket_with_all_that_was_given(
    door: Native, either: AsyncPublisher, channel: str
) -> None:
    sse, ws = await door.sse(channel), await door.ws(channel)
    await ws.next()
    data = {"text": "Grüße", "big": 12345678901234567890}
    entry_id = await either.publish(
        channel, data, type="chat", uid="u1", to="alice, bob", client="c1"
    )
    block, frame = await sse.next(), await ws.next()
    assert (block.id, block.event, block.json()) == (str(entry_id), "chat", data)
    assert frame == {
        "channel": channel,
        "id": str(entry_id),
        "type": "chat",
        "data": data,
        "client": "c1",
    }


async def test_the_blocking_publisher_does_the_same(
    door: Native, blocking: Publisher, channel: str
) -> None:
    sse = await door.sse(channel)
    ids = [await asyncio.to_thread(blocking.publish, channel, data) for data in ("<x/>", b"[1]")]
    blocks = await sse.take(2)
    assert [(block.id, block.data) for block in blocks] == [
        (str(ids[0]), "<x/>"),
        (str(ids[1]), "[1]"),
    ]


async def test_to_keeps_an_event_from_everybody_else(
    door: Native, either: AsyncPublisher, channel: str
) -> None:
    sse = await door.sse(channel)
    await either.publish(channel, {"for": "bob"}, to=["bob"])
    await either.publish(channel, {"for": "alice"}, to=["user:alice", "group:x y"])
    assert (await sse.next()).json() == {"for": "alice"}


async def test_a_uid_is_appended_once_and_gives_the_first_id(
    valkey: Server, publisher: AsyncPublisher, blocking: Publisher, channel: str
) -> None:
    first = await publisher.publish(channel, "one", uid="order 7")
    again = await asyncio.to_thread(blocking.publish, channel, "two", uid="order 7")
    redis(valkey, "SCRIPT", "FLUSH")
    forgotten = await publisher.publish(channel, "three", uid="order 7")
    other = await publisher.publish(f"{channel}:other", "four", uid="order 7")
    assert first == again == forgotten != other
    assert len(entries(valkey, channel)) == 1
    assert 0 < redis(valkey, "PTTL", f"relay:uid:{{{channel}}}:order 7") <= 86_400_000


async def test_maxlen_trims(valkey: Server, channel: str) -> None:
    async with AsyncPublisher(valkey.url("producer"), limit_ms=EASY_MS, maxlen=50) as publisher:
        for number in range(400):
            await publisher.publish(channel, number, uid=str(number) if number % 2 else None)
    assert 50 <= len(entries(valkey, channel)) < 300


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"channel": "x" * 256}, "channel must have"),
        ({"data": b"\xff"}, "field data is not UTF-8"),
        ({"data": float("nan")}, "not JSON compliant"),
        ({"type": "relay:gap"}, "reserved type"),
        ({"to": " , "}, "to has no recipients"),
        ({"to": []}, "to has no recipients"),
        ({"uid": ""}, "uid must have"),
        ({"uid": "x" * 256}, "uid must have"),
    ],
)
async def test_what_no_relay_could_deliver_is_refused_at_once(
    either: AsyncPublisher, arguments: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        await either.publish(**{"channel": "news", "data": 1, **arguments})


async def test_overlapping_calls_share_a_connection_and_keep_their_order(
    valkey: Server, publisher: AsyncPublisher, channel: str
) -> None:
    async with asyncio.TaskGroup() as tasks:
        for number in range(200):
            tasks.create_task(publisher.publish(channel, number))
    assert [int(data) for data in entries(valkey, channel)] == list(range(200))


async def test_a_forked_child_publishes_over_a_connection_of_its_own(
    valkey: Server, blocking: Publisher, channel: str
) -> None:
    await asyncio.to_thread(blocking.publish, channel, "parent")
    code = (
        "import os, sys\n"
        "from producers.publisher import Publisher\n"
        "publisher = Publisher(sys.argv[1], limit_ms=5000)\n"
        "publisher.publish(sys.argv[2], 'before')\n"
        "if os.fork() == 0:\n"
        "    publisher.publish(sys.argv[2], 'child')\n"
        "    os._exit(0)\n"
        "assert os.wait()[1] == 0\n"
        "publisher.publish(sys.argv[2], 'after')\n"
    )
    done = await python(code, valkey.url("producer"), channel)
    assert done == (0, ""), done
    assert entries(valkey, channel) == [b"parent", b"before", b"child", b"after"]


async def test_a_refusal_names_what_redis_said(
    valkey: Server, publisher: AsyncPublisher, channel: str
) -> None:
    redis(valkey, "SET", stream_key(channel), "not a stream")
    with pytest.raises(PublishFailed, match="WRONGTYPE") as failure:
        await publisher.publish(channel, 1)
    assert not failure.value.unknown
    assert await publisher.publish(f"{channel}:other", 1)


async def test_by_http_an_event_arrives_once_by_its_uid(
    door: Native, publisher: AsyncPublisher, by_http: AsyncPublisher, channel: str
) -> None:
    sse = await door.sse(channel)
    first = await by_http.publish(channel, {"n": 1}, uid="same")
    assert first == await by_http.publish(channel, {"n": 2}, uid="same")
    # A repeated uid returns the first ID, even through the other transport.
    assert first == await publisher.publish(channel, {"n": 3}, uid="same")
    last = await by_http.publish(channel, "text", client="c")
    blocks = await sse.take(2)
    assert [(block.id, block.json()) for block in blocks] == [
        (str(first), {"n": 1}),
        (str(last), "text"),
    ]
    with pytest.raises(PublishFailed, match="namespace not found"):
        await by_http.publish("seafile:x", 1)
    with pytest.raises(PublishFailed, match="limit exceeded"):
        await by_http.publish(channel, "x" * (4 << 20))
    with pytest.raises(PublishFailed, match="413"):
        await by_http.publish(channel, "x" * (11 << 20))


async def test_a_spool_is_delivered_by_http_in_order_once(
    valkey: Server, relay: RelayProcess, channel: str, tmp_path: Path
) -> None:
    spool = tmp_path / "spool"
    nowhere = f"http://127.0.0.1:{free_port()}"
    async with AsyncPublisher(http=nowhere, secret=SECRET, spool=spool) as away:
        for number in range(250):
            assert await away.publish(channel, number) is None
        # Relay rejects the whole batch with this event. The other events must still arrive.
        assert await away.publish("seafile:x", 1) is None
    async with AsyncPublisher(http=relay.url, secret=SECRET, spool=spool) as publisher:
        await publisher.flush()
        assert await publisher.publish(channel, 250)
    assert [int(data) for data in entries(valkey, channel)] == list(range(251))
    assert "namespace not found" in (tmp_path / "spool.refused").read_text()


async def test_by_http_a_wrong_secret_is_told(relay: RelayProcess, channel: str) -> None:
    async with AsyncPublisher(http=relay.url, secret="wrong", limit_ms=EASY_MS) as publisher:
        with pytest.raises(PublishFailed, match="401"):
            await publisher.publish(channel, 1)


async def test_by_http_an_answer_of_something_else_is_told() -> None:
    answer = "500 Internal Server Error"

    async def broken(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        head = f"HTTP/1.1 {answer}\r\nContent-Length: 2\r\nConnection: close\r\n\r\n[]"
        writer.write(head.encode())
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(broken, "127.0.0.1", 0) as proxy:
        url = f"http://127.0.0.1:{proxy.sockets[0].getsockname()[1]}"
        async with AsyncPublisher(http=url, secret=SECRET, limit_ms=EASY_MS) as publisher:
            for line, unknown in (
                ("500 Internal Server Error", True),
                ("302 Found", False),
                ("400 Bad Request", False),
                ("200 OK", True),
            ):
                answer = line
                with pytest.raises(PublishFailed) as failure:
                    await publisher.publish("news", 1)
                assert failure.value.unknown is unknown, line


# gevent and eventlet replace threads by greenlets of one thread, which can run one event loop only.
GREEN = """
import sys
kind, url, channel, spool = sys.argv[1:]
if kind == "gevent":
    from gevent import monkey, sleep, spawn
    monkey.patch_all()
    wait = lambda greenlet: greenlet.get()
else:
    import eventlet
    from eventlet import sleep, spawn
    eventlet.monkey_patch()
    wait = lambda greenlet: greenlet.wait()
import asyncio, socket
from producers.publisher import Publisher, PublishFailed
first, second = Publisher(url, limit_ms=9000), Publisher(url, limit_ms=9000, spool=spool)
first.publish(channel, 0)
second.publish(channel, 1)
first.close()
first.publish(channel, 2)
async def own():
    await asyncio.sleep(0.001)
    return 3
first.publish(channel, asyncio.run(own()))
for greenlet in [spawn(second.publish, channel, number) for number in range(4, 24)]:
    wait(greenlet)
silent = socket.create_server(("127.0.0.1", 0))
address = f"redis://127.0.0.1:{silent.getsockname()[1]}/0"
ticks = []
def tick():
    while True:
        ticks.append(1)
        sleep(0.01)
spawn(tick)
try:
    Publisher(address, limit_ms=300).publish(channel, 1)
except PublishFailed:
    print(len(ticks) > 5)
print(Publisher(address, limit_ms=50, spool=spool).publish(channel, "kept"))
second.flush()
"""


@pytest.mark.parametrize("kind", ["gevent", "eventlet"])
async def test_programs_that_replace_threads_by_greenlets(
    valkey: Server, channel: str, tmp_path: Path, kind: str
) -> None:
    words = ["-c", GREEN, kind, valkey.url("producer"), channel, str(tmp_path / "spool")]
    done = await asyncio.to_thread(pypi.run, "green", words)
    assert (done.returncode, done.stdout) == (0, "True\nNone\n"), done
    found = entries(valkey, channel)
    assert found[:4] == [b"0", b"1", b"2", b"3"]
    assert sorted(found[4:24], key=int) == [b"%d" % number for number in range(4, 24)]
    assert found[24:] == [b"kept"]


# The connections of a closed loop cannot be closed any more.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_one_publisher_for_several_event_loops(valkey: Server, channel: str) -> None:
    publisher = AsyncPublisher(valkey.url("producer"), limit_ms=EASY_MS)
    for number in range(3):
        asyncio.run(publisher.publish(channel, number))
    asyncio.run(publisher.close())
    assert entries(valkey, channel) == [b"0", b"1", b"2"]


def test_a_thread_holds_the_lock_while_another_forks(valkey: Server, channel: str) -> None:
    publisher = Publisher(valkey.url("producer"), limit_ms=EASY_MS)
    publisher.publish(channel, "parent")
    with publisher._lock:
        child = os.fork()
        if not child:
            signal.alarm(10)
            publisher.publish(channel, "child")
            os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    publisher.close()
    assert entries(valkey, channel) == [b"parent", b"child"]


@pytest.mark.parametrize("spooled", [False, True])
def test_without_another_thread_an_event_is_spooled_or_rejected(
    valkey: Server, tmp_path: Path, spooled: bool
) -> None:
    code = (
        "import resource, sys, threading\n"
        "from producers.publisher import Publisher, PublishFailed\n"
        "publisher = Publisher(sys.argv[1], limit_ms=5000, spool=sys.argv[2] or None)\n"
        "resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))\n"
        "threading.stack_size(1 << 31)\n"
        "try:\n"
        "    print(publisher.publish('news', 1))\n"
        "except PublishFailed:\n"
        "    print('failed')\n"
    )
    spool = str(tmp_path / "spool") if spooled else ""
    done = subprocess.run(
        [sys.executable, "-c", code, valkey.url("producer"), spool],
        env={**os.environ, "PYTHONPATH": os.getcwd()},
        capture_output=True,
        text=True,
        timeout=15,
        check=False,
    )
    assert done.stdout == ("None\n" if spooled else "failed\n"), done


@pytest.mark.parametrize("data", [object(), float("nan"), "\ud800", b"\xff"])
async def test_an_event_that_cannot_be_sent_is_the_publishers_own_error(
    publisher: AsyncPublisher, data: object
) -> None:
    with pytest.raises(PublishFailed):
        await publisher.publish("news", data)
    nested: list[object] = []
    for _ in range(100_000):
        nested = [nested]
    with pytest.raises(PublishFailed):
        await publisher.publish("news", nested)


async def python(code: str, *arguments: str) -> tuple[int, str]:
    """Run code in a new interpreter. Return its exit code and standard error."""
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, *arguments, stderr=asyncio.subprocess.PIPE, env=environment
    )
    _, text = await process.communicate()
    return process.returncode or 0, text.decode()
