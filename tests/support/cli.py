"""Run `relay COMMAND` as an operator does, with the documented maintenance user."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any
from unittest.mock import patch

from relay.cli.commands import main
from tests.support.clients import within
from tests.support.relay import ROOT
from tests.support.valkey import Server, User

# Starting a process may take seconds on a busy machine.
LIMIT_S = 40.0


def _environment(server: Server, user: User) -> dict[str, str]:
    environment = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    environment["PYTHONPATH"] = str(ROOT)
    # Pass the password as docs/redis.md recommends, so that it is not in the list of processes.
    environment["RELAY_REDIS_URL"] = server.url(user)
    return environment


def run_here(
    words: Sequence[str],
    environment: Mapping[str, str],
    *,
    stdin: bytes = b"",
    encoding: str = "utf-8",
) -> subprocess.CompletedProcess[str]:
    """Run a command in this process. One command runs at a time.

    Starting a process would take longer than most commands.
    """
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding) for _ in range(2))
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        patch.dict(os.environ, environment),
        patch.object(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin))),
    ):
        try:
            code = main(words)
        except SystemExit as left:  # argparse
            code = int(left.code or 0)
    texts = []
    for stream in (out, err):
        stream.flush()
        texts.append(stream.buffer.getvalue().decode(encoding))
    return subprocess.CompletedProcess(words, code, *texts)


class Cli:
    """Runs commands on one Redis server."""

    def __init__(self, server: Server, user: User = "maintenance", encoding: str = "utf-8") -> None:
        self._encoding = encoding
        self._server = server
        self._user: User = user

    async def run(self, *words: str, stdin: bytes = b"") -> subprocess.CompletedProcess[str]:
        """Run a command to its end in this process."""
        environment = _environment(self._server, self._user)
        return await asyncio.to_thread(
            run_here, words, environment, stdin=stdin, encoding=self._encoding
        )

    async def process(self, *words: str, stdin: bytes = b"") -> subprocess.CompletedProcess[str]:
        """Run a command in its own process."""
        done = await asyncio.to_thread(
            subprocess.run,
            [sys.executable, "-m", "relay", *words],
            env=_environment(self._server, self._user),
            input=stdin,
            capture_output=True,
            check=False,
        )
        return subprocess.CompletedProcess(
            done.args, done.returncode, done.stdout.decode(), done.stderr.decode()
        )

    async def out(self, *words: str) -> str:
        """Run a command that must succeed without standard error. Return its output."""
        done = await self.run(*words)
        assert (done.returncode, done.stderr) == (0, ""), done
        return done.stdout

    async def objects(self, *words: str) -> list[dict[str, Any]]:
        """Run a command with --json and return the objects that it prints."""
        text = await self.out(*words, "--json")
        return [json.loads(line) for line in text.splitlines()]

    async def refused(self, *words: str, code: int = 1) -> str:
        """Run a command that must fail. Return the single line of its error."""
        done = await self.run(*words)
        assert done.returncode == code, done
        assert done.stdout == ""
        assert done.stderr.count("\n") == 1
        assert done.stderr.startswith("relay: ")
        return done.stderr

    @asynccontextmanager
    async def tail(self, *words: str) -> AsyncIterator[Tail]:
        """Run `relay tail`, and kill it at the end."""
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "relay",
            "tail",
            *words,
            env=_environment(self._server, self._user),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        try:
            yield Tail(process)
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()
            # Python would report a pipe that was not read to its end as unclosed.
            process._transport.close()  # type: ignore[attr-defined]  # no public way


class Tail:
    """A running `relay tail`."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    async def line(self) -> str:
        """Return the next line of its output."""
        assert self.process.stdout
        line: bytes = await within(LIMIT_S, self.process.stdout.readline())
        return line.decode().rstrip("\n")

    async def said(self) -> str:
        """Return the next line on standard error."""
        assert self.process.stderr
        line: bytes = await within(LIMIT_S, self.process.stderr.readline())
        return line.decode().rstrip("\n")

    async def interrupt(self) -> int:
        """Send SIGINT and return the exit code."""
        self.process.send_signal(signal.SIGINT)
        return await self.ended()

    async def ended(self) -> int:
        """Return the exit code."""
        code: int = await within(LIMIT_S, self.process.wait())
        return code
