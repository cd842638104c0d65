"""Echo workers as processes, each on a port of its own or all on one."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.support.valkey import Server

_ROOT = Path(__file__).parents[2]


@dataclass
class WorkerProcess:
    """Instance `host:<number>`."""

    process: asyncio.subprocess.Process
    port: int

    async def kill(self) -> None:
        """kill -9."""
        if self.process.returncode is None:
            self.process.kill()
        await self.process.wait()


@asynccontextmanager
async def workers(server: Server, ports: Sequence[int]) -> AsyncIterator[list[WorkerProcess]]:
    """They listen when this begins; none is left when it ends."""
    started: list[WorkerProcess] = []
    try:
        for number, port in enumerate(ports):
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "tests.support.sockjs_worker",
                server.url(),
                str(port),
                f"host:{number}",
                cwd=_ROOT,
                stdout=asyncio.subprocess.PIPE,
            )
            started.append(WorkerProcess(process, port))
        for each in started:
            assert each.process.stdout is not None
            async with asyncio.timeout(15):
                assert await each.process.stdout.readline() == b"ready\n"
        yield started
    finally:
        for each in started:
            await each.kill()
