"""Events, subscriptions and publish requests pass through the documented files."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sys
from collections.abc import Sequence
from itertools import groupby

import pytest

from tests.support.centrifugo_client import SECRET, centrifugo
from tests.support.clients import Native, native, stream_key, until
from tests.support.relay import ROOT, RelayProcess
from tests.support.valkey import Server

# The tracer makes the relay several times slower.
pytestmark = [pytest.mark.redis, pytest.mark.timeout(60)]

MOST_FILES, MOST_CALLS = 14, 45
# Commands of one HTTP request or in one queue, and the calls for each of them.
BATCH, MOST_CALLS_BY_HTTP, MOST_CALLS_BY_QUEUE = 100, 46, 13
COMMAND = {"method": "publish", "params": {"channel": "other", "data": {"number": 1}}}
# The hub calls the protocol's encoder, which calls the transport for the frame, and the metrics.
ROOMS = ["stream", "hub", "protocols", "transports", "hub", "core", "hub", "transports"]
TIMES = 5
QUEUE = "centrifugo.api"

Calls = list[tuple[str, str]]


async def _receive_events(door: Native, server: Server) -> None:
    client = await door.ws("news")
    assert (await client.next())["reply"] == "subscribe"
    with server.client() as admin:
        for number in range(TIMES):
            await asyncio.to_thread(admin.xadd, stream_key("news"), {"data": number})
            await client.next()


async def _subscribe(door: Native) -> None:
    for _ in range(TIMES):
        client = await door.ws("news", last="0-0")
        assert (await client.next())["reply"] == "subscribe"
        await client.take(TIMES)


async def _publish(relay: RelayProcess) -> None:
    async with centrifugo(relay.url) as door:
        for number in range(TIMES):
            reply = await door.api("publish", channel="other", data={"number": number})
            assert reply["error"] is None
        for _ in range(TIMES):
            answer = await door.request(json.dumps([COMMAND] * BATCH).encode())
            assert [reply["error"] for reply in json.loads(answer.body)] == [None] * BATCH


async def _queue(server: Server) -> None:
    with server.client() as admin:
        for _ in range(TIMES):
            await asyncio.to_thread(admin.rpush, QUEUE, *[json.dumps(COMMAND)] * BATCH)
            await until(lambda: not admin.exists(QUEUE))


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory) -> Calls:
    """Return all calls of a relay that serves each path several times."""
    folder = tmp_path_factory.mktemp("paths")
    server, written = Server(folder), folder / "calls"
    tracer = ["env", f"RELAY_CALLS={written}", sys.executable, "tests/support/call_trace.py"]
    settings = [f"protocol:centrifugo.secret={SECRET}", "producer:queue.enabled=yes"]
    relay = RelayProcess(server, flags=["--insecure"], settings=settings, prefix=tracer)

    async def run() -> None:
        async with native(relay) as door:
            await _receive_events(door, server)
            await _subscribe(door)
            await _publish(relay)
            await _queue(server)
            os.kill(relay.pid, signal.SIGRTMIN)
            await until(written.exists)

    server.start()
    relay.start()
    try:
        asyncio.run(run())
    finally:
        relay.kill()
        server.kill()
    lines = written.read_text().splitlines()
    return [(line.partition(" ")[0], line.partition(" ")[2]) for line in lines]


def shortest(calls: Calls, first: str, proof: str, last: str) -> Calls:
    """Return the shortest path from a call of `first` through `proof` to the next call of `last`.

    Timers may run during some of the paths, so the shortest path has the fewest other calls.
    """
    names = [name for _, name in calls]
    found = []
    for at in (at for at, name in enumerate(names) if name == proof):
        if last in names[at:]:
            start = max(before for before in range(at) if names[before] == first)
            found.append(calls[start : names.index(last, at) + 1])
    return min(found, key=len)


def files_of(path: Calls) -> list[str]:
    """Return the files in the order of their first call."""
    return list(dict.fromkeys(file for file, _ in path))


def documented(heading: str) -> list[str]:
    """Return the files in the table below this heading."""
    page = (ROOT / "docs" / "architecture.md").read_text()
    section = page.partition(f"## {heading}")[2].partition("\n## ")[0]
    cells = re.findall(r"^\| \d+ \| (.*?) \|", section, re.MULTILINE)
    return [file for cell in cells for file in re.findall(r"`(.*?)`", cell)]


def not_in_order(files: Sequence[str], path: Calls) -> list[str]:
    """Return those of `files` that the path does not use after the one before."""
    calls = iter([file for file, _ in path])
    return [file for file in files if file not in calls]


def test_an_event_takes_the_documented_path_in_few_calls(calls: Calls) -> None:
    path = shortest(
        calls, "PipelineConnection.data_received", "StreamReader._on_keys", "ClientSocket.write"
    )
    assert len(path) <= MOST_CALLS, path
    assert len(files_of(path)) <= MOST_FILES
    assert [room for room, _ in groupby(file.split("/")[1] for file, _ in path)] == ROOMS
    assert files_of(path) == documented("Follow an event")


def test_a_subscription_takes_the_documented_path(calls: Calls) -> None:
    path = shortest(calls, "_Gate.__init__", "SharedPage.serve", "ClientSocket.write")
    assert not_in_order(documented("Follow a subscription"), path) == []


def test_a_publish_request_takes_the_documented_path(calls: Calls) -> None:
    path = shortest(
        calls,
        "HttpConnection.data_received",
        "ApiRoutes._commands",
        "HttpConnection.finish_response",
    )
    assert not_in_order(documented("Follow a publish request"), path) == []


def calls_per_command(calls: Calls, first: str, each: str, last: str) -> float:
    """Return the calls for a command in the best batch, from `first` to `last`."""
    names = [name for _, name in calls]
    counts: list[int] = []
    start = 0
    for at, name in enumerate(names):
        if name == first:
            start = at
        elif name == last and names[start:at].count(each) == BATCH:
            counts.append(at - start)
    return min(counts) / BATCH


def test_a_command_of_a_batch_takes_few_calls(calls: Calls) -> None:
    path = "HttpConnection.data_received", "Appender.append", "HttpConnection.finish_response"
    assert calls_per_command(calls, *path) <= MOST_CALLS_BY_HTTP


def test_a_command_in_a_queue_takes_few_calls(calls: Calls) -> None:
    path = "CommandQueues.head", "plain_publish", "PipelineConnection.data_received"
    assert calls_per_command(calls, *path) <= MOST_CALLS_BY_QUEUE
