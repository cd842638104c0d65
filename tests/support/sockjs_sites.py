"""Echo workers as processes, each on its own port or all on the same one."""

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
    """The worker with the instance `host:<number>`."""

    process: asyncio.subprocess.Process
    port: int

    async def kill(self) -> None:
        """Send SIGKILL."""
        if self.process.returncode is None:
            self.process.kill()
        await self.process.wait()


@asynccontextmanager
async def workers(server: Server, ports: Sequence[int]) -> AsyncIterator[list[WorkerProcess]]:
    """Run workers, and yield them when they listen. Stop all of them at exit."""
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
            async with asyncio.timeout(60):
                assert await each.process.stdout.readline() == b"ready\n"
        yield started
    finally:
        for each in started:
            await each.kill()
