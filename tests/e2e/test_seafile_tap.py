"""Commits from seafevents' Redis channel, with and without `/events`."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.clients import redis, stream_key, until, within
from tests.support.relay import ROOT, RelayProcess
from tests.support.seafile import KEY, new_library, seafile
from tests.support.valkey import Server, running

pytestmark = pytest.mark.redis


@pytest.fixture(scope="module")
def events(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Run Seafile's own Redis."""
    server = Server(tmp_path_factory.mktemp("seafile"), "redis", acl=False)
    with running(server):
        yield server


@pytest.fixture
def relay(valkey: Server, events: Server) -> Iterator[RelayProcess]:
    process = tapping(valkey, events).start()
    yield process
    process.kill()


def tapping(valkey: Server, events: Server) -> RelayProcess:
    settings = [f"protocol:seafile.key={KEY}", f"producer:seaf_hooks.redis_url={events.url()}"]
    return RelayProcess(valkey, settings=settings)


def old_form(library: str, commit: str) -> str:
    return f"repo-update\t{library}\t{commit}"


def new_form(library: str, commit: str) -> str:
    return json.dumps({"msg_type": "repo-update", "repo_id": library, "commit_id": commit})


def publish(events: Server, text: str) -> int:
    heard: int = redis(events, "PUBLISH", "repo_update", text)
    return heard


def commits(valkey: Server, library: str) -> list[str]:
    found: Any = redis(valkey, "XRANGE", stream_key(f"seafile:{library}"), "-", "+")
    return [fields[b"commit"].decode() for _, fields in found if b"commit" in fields]


def holds(process: RelayProcess) -> bool:
    return any("This process appends the commits" in line for line in process.log)


async def ready(process: RelayProcess, events: Server) -> None:
    await until(lambda: holds(process))
    await until(lambda: publish(events, "ping"))


async def arrived(valkey: Server, library: str, count: int) -> None:
    await until(lambda: len(commits(valkey, library)) >= count)


async def test_both_formats_arrive_in_order_and_other_messages_are_ignored(
    relay: RelayProcess, valkey: Server, events: Server
) -> None:
    library = new_library()
    await ready(relay, events)
    async with seafile(relay) as door:
        client = await door.connect()
        await client.subscribe(library)
        await client.settle()
        for text in (
            old_form(library, "c0"),
            f"repo-upload-sync\tuser\t1.2.3.4\tclient\t{library}\t/",
            "repo-update",
            "{",
            json.dumps({"msg_type": "init-metadata", "repo_id": library}),
            new_form(library, "c1"),
            new_form(library, "c1"),
            old_form(library, "c2"),
        ):
            publish(events, text)
        await until(lambda: len(commits(valkey, library)) >= 3)
        await door.lock(library, "end")
        while (await client.next())["type"] == "repo-update":
            pass
    assert commits(valkey, library) == ["c0", "c1", "c2"]


async def test_both_sources_can_run_together(
    relay: RelayProcess, valkey: Server, events: Server
) -> None:
    library = new_library()
    await ready(relay, events)
    async with seafile(relay) as door:
        for number, commit in enumerate(("a", "b", "a"), 1):
            publish(events, new_form(library, commit))
            await door.commit(library, commit)
            await arrived(valkey, library, number)
    # No earlier event was appended twice.
    publish(events, new_form(library, "end"))
    await arrived(valkey, library, 4)
    assert commits(valkey, library) == ["a", "b", "a", "end"]


async def test_a_takeover_begins_with_the_last_message(valkey: Server, events: Server) -> None:
    """kill -9 the process that appends while another one listens."""
    first, second = tapping(valkey, events), tapping(valkey, events)
    library = new_library()
    try:
        await asyncio.to_thread(first.start)
        await ready(first, events)
        await asyncio.to_thread(second.start)
        await until(lambda: publish(events, "ping") == 2)
        publish(events, new_form(library, "before"))
        await until(lambda: commits(valkey, library) == ["before"])
        await asyncio.to_thread(first.kill)
        publish(events, new_form(library, "while nobody appends"))
        await until(lambda: holds(second))
        publish(events, new_form(library, "after"))
        wanted = ["before", "while nobody appends", "after"]
        await until(lambda: commits(valkey, library) == wanted)
    finally:
        first.kill()
        second.kill()


async def test_the_latest_commit_waits_during_an_outage_of_relays_redis(
    events: Server, tmp_path: Path
) -> None:
    own = Server(tmp_path / "own").start()
    process = tapping(own, events)
    library = new_library()
    try:
        await asyncio.to_thread(process.start)
        await ready(process, events)
        await asyncio.to_thread(own.kill)
        for number in range(3):
            publish(events, new_form(library, f"c{number}"))
        await asyncio.to_thread(own.start)
        # Earlier commits may have been appended or not.
        await until(lambda: commits(own, library)[-1:] == ["c2"])
    finally:
        process.kill()
        own.kill()


async def test_as_a_separate_process(valkey: Server, events: Server) -> None:
    library = new_library()
    command = [sys.executable, "-m", "producers", "seaf_hooks", "--redis", valkey.url("relay")]
    setting = ["--set", f"producer:seaf_hooks.redis_url={events.url()}"]
    process = await asyncio.create_subprocess_exec(
        *command, *setting, cwd=ROOT, stderr=subprocess.DEVNULL
    )
    try:
        await until(lambda: publish(events, old_form(library, "c")))
        await until(lambda: commits(valkey, library) == ["c"])
        process.terminate()
        assert await within(30, process.wait()) == 0
    finally:
        if process.returncode is None:
            process.kill()
