"""An event from Redis to the socket passes through the files that the documentation lists."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.support.clients import native, stream_key, until
from tests.support.relay import ROOT, RelayProcess
from tests.support.valkey import Server

pytestmark = pytest.mark.redis

MOST_CALLS = 45
FIRST = "PipelineConnection.data_received"
WAKE_UP, LAST = "StreamReader._on_keys", "ClientSocket.write"


def paths(calls: Sequence[str]) -> Iterator[list[str]]:
    """Yield the calls from each invalidation to the write that follows it."""
    names = [call.partition(" ")[2] for call in calls]
    for wake_up in (at for at, name in enumerate(names) if name == WAKE_UP):
        start = max(at for at in range(wake_up) if names[at] == FIRST)
        if LAST in names[wake_up:]:
            yield list(calls[start : names.index(LAST, wake_up) + 1])


async def test_an_event_takes_the_documented_path_in_few_calls(
    valkey: Server, tmp_path: Path
) -> None:
    written = tmp_path / "calls"
    tracer = ["env", f"RELAY_CALLS={written}", sys.executable, "tests/support/call_trace.py"]
    relay = RelayProcess(valkey, flags=["--insecure"], prefix=tracer)
    await asyncio.to_thread(relay.start)
    try:
        async with native(relay) as door:
            client = await door.sse("news")
            with valkey.client() as admin:
                for number in range(10):
                    await asyncio.to_thread(admin.xadd, stream_key("news"), {"data": number})
                    await client.next()
            os.kill(relay.pid, signal.SIGUSR2)
            await until(written.exists)
    finally:
        relay.kill()
    # Timers may run during some deliveries, so use the shortest path.
    path = min(paths(written.read_text().splitlines()), key=len)
    assert len(path) <= MOST_CALLS, path
    page = (ROOT / "docs" / "architecture.md").read_text()
    section = page.partition("## Follow an event")[2].partition("\n## ")[0]
    listed = re.findall(r"^\| \d+ \| `(.*?)`", section, re.MULTILINE)
    assert list(dict.fromkeys(call.partition(" ")[0] for call in path)) == listed
