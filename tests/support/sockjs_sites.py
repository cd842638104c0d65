"""Echo workers as processes, each on its own port or all on the same one."""

from __future__ import annotations

import asyncio
import secrets
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.support.valkey import Server

_ROOT = Path(__file__).parents[2]


@dataclass
class WorkerProcess:
    """A worker that serves an echo page over SockJS."""

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
        for port in ports:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "tests.support.sockjs_worker",
                server.url(),
                str(port),
                # Unique as in relay: heartbeats of killed workers remain for some seconds.
                f"host:{secrets.token_hex(4)}",
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
