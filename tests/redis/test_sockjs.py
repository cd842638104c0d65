"""The real sockjs-client with several worker processes, without a sticky proxy."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from tests.support.npm import environment, node
from tests.support.sockjs_sites import workers
from tests.support.topologies import chosen
from tests.support.valkey import Server, free_port

pytestmark = pytest.mark.redis
_SUPPORT = Path(__file__).parents[1] / "support"
_WORKERS = 4
TRANSPORTS = ["websocket", "xhr-streaming", "eventsource", "xhr-polling"]


async def talk(port: int, transport: str, connections: str) -> dict[str, object]:
    process = await asyncio.create_subprocess_exec(
        node(),
        str(_SUPPORT / "sockjs_client.js"),
        f"http://127.0.0.1:{port}/echo",
        transport,
        connections,
        env=environment(),
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(40):
            output, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    found: dict[str, object] = json.loads(output)
    return found


@pytest.mark.timeout(120)
async def test_every_transport_of_node_over_four_workers(server: Server) -> None:
    port = free_port()
    with server.client() as admin:
        async with workers(server, [port] * _WORKERS):
            for connections in ("new", "kept"):
                async with asyncio.TaskGroup() as tasks:
                    talks = [
                        tasks.create_task(talk(port, each, connections)) for each in TRANSPORTS
                    ]
                for transport, done in zip(TRANSPORTS, talks, strict=True):
                    assert done.result() == {
                        "transport": transport,
                        "same": True,
                        "heard": 120,
                        "code": 3001,
                        "reason": "as you wish",
                    }
            # Most of the requests came to another worker. None of them travelled over Redis.
            # Sentinels publish on the servers that they watch.
            if chosen() != "sentinel":
                assert "cmdstat_publish" not in admin.info("commandstats")
        assert admin.acl_log() == []
