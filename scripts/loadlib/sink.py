"""Runs wsink.c, a C program that simulates many WebSocket clients and measures latency."""

from __future__ import annotations

import asyncio
import json
from asyncio.subprocess import DEVNULL, PIPE, Process
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from scripts.loadlib.processes import LoadError, tool


class Sink:
    """One wsink process. `async with` starts it and waits until every client is subscribed."""

    def __init__(
        self,
        program: Path,
        *,
        core: int,
        port: int,
        path: str,
        clients: int,
        subscribed: str,
        limit_s: float,
        quiet_s: float = 0,
        expect: int = 0,
        greeting: str = "",
    ) -> None:
        """Prepare the command line. wsink stops as soon as one of its limits is reached.

        Args:
            program: The compiled wsink.
            core: The CPU core that wsink runs on.
            port: The server's port.
            path: The path of the WebSocket. `%d` stands for a number per client.
            clients: The number of clients.
            subscribed: A text in the server's reply to a subscription. If empty, a client counts as
                subscribed after its handshake.
            limit_s: Stop after this time.
            quiet_s: Stop this long after the last event; 0 for no limit.
            expect: Stop when all clients together have received this number of events; 0 for no
                limit.
            greeting: A text that each client sends first.
        """
        argv = [tool("taskset", "util-linux"), "-c", str(core), str(program), "-r", "-P"]
        argv += ["-p", str(port), "-u", path, "-n", str(clients), "-d", str(limit_s)]
        if greeting:
            argv += ["-s", greeting]
        if subscribed:
            argv += ["-g", subscribed]
        if quiet_s:
            argv += ["-q", str(quiet_s)]
        if expect:
            argv += ["-e", str(expect)]
        self._argv = argv
        self._limit_s = limit_s
        self._process: Process | None = None

    async def __aenter__(self) -> Self:
        self._process = await asyncio.create_subprocess_exec(
            *self._argv, stdin=DEVNULL, stdout=PIPE, stderr=PIPE
        )
        try:
            await self._wait_until_ready()
        except BaseException:
            await self._end()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._end()

    async def result(self) -> dict[str, Any]:
        """Wait until wsink has finished and return its counts and latencies."""
        line = await self._line(self._limit_s + 60)
        try:
            found: dict[str, Any] = json.loads(line)
        except ValueError:
            raise await self._failed(line) from None
        return found

    async def _wait_until_ready(self) -> None:
        line = await self._line(120)
        if line != b"READY\n":
            raise await self._failed(line)
        # If some clients are not subscribed within a minute, wsink continues without them and
        # prints a warning to stderr.
        if self._process is not None and self._process.stderr is not None:
            try:
                async with asyncio.timeout(0.05):
                    line = await self._process.stderr.readline()
            except TimeoutError:
                return
            raise await self._failed(line)

    async def _line(self, limit_s: float) -> bytes:
        if self._process is None or self._process.stdout is None:
            raise LoadError("wsink was not started")
        try:
            async with asyncio.timeout(limit_s):
                return await self._process.stdout.readline()
        except TimeoutError:
            raise LoadError(
                "wsink printed nothing in time; check whether the server rejects its clients"
            ) from None

    async def _failed(self, line: bytes) -> LoadError:
        await self._end()
        errors = b""
        if self._process is not None and self._process.stderr is not None:
            errors = await self._process.stderr.read()
        return LoadError(f"wsink failed: {(line + errors).decode(errors='replace')[:1000]}")

    async def _end(self) -> None:
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            await self._process.wait()
