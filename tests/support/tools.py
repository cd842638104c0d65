"""Run the producers in other languages as their users do: one process per event."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.programs import program
from tests.support.valkey import Server, password_of

PRODUCERS = Path(__file__).parents[2] / "producers"
_FILES = {
    "php": "php/relay_publish.php",
    "node": "node/relay-publish.mjs",
    "sh": "sh/relay-publish",
}
_PACKAGES = {"php": "php-cli", "node": "nodejs", "sh": "dash"}
TOOLS = tuple(_FILES)


@dataclass(frozen=True, slots=True)
class Ended:
    """The result of a process and its duration."""

    code: int
    out: str
    err: str
    seconds: float


@dataclass(slots=True)
class Tool:
    """One of `TOOLS`, with the credentials of the user `producer`."""

    name: str
    environment: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, name: str, server: Server) -> Tool:
        """Return a tool by name.

        The password is passed separately, as if many users could read the file with the URL.
        """
        return cls(
            name,
            {
                "RELAY_REDIS_URL": f"redis://producer@127.0.0.1:{server.port}/0",
                "RELAY_REDIS_PASSWORD": password_of("producer"),
            },
        )

    def command(self) -> list[str]:
        """Return the command."""
        return [program(self.name, _PACKAGES[self.name]), str(PRODUCERS / _FILES[self.name])]

    async def run(self, *arguments: str, given: str | None = None) -> Ended:
        """Publish one event."""
        return await run([*self.command(), *arguments], self.environment, given)

    async def start_s(self) -> float:
        """Measure the start of the interpreter with a call that uses no network."""
        ended = await self.run()
        assert ended.code == 2
        return ended.seconds


async def run(
    command: Sequence[str], environment: dict[str, str], given: str | None = None
) -> Ended:
    """Run the process to its end."""
    began = time.monotonic()
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.DEVNULL if given is None else pipe,
        stdout=pipe,
        stderr=pipe,
        env={"PATH": os.environ["PATH"], **environment},
    )
    out, err = await process.communicate(None if given is None else given.encode())
    seconds = time.monotonic() - began
    return Ended(process.returncode or 0, out.decode(), err.decode(), seconds)


class Slack:
    """The time that a busy machine may add to a limit: a constant and a measured delay.

    Within the context, a thread sleeps for short times and measures how late it continues.
    """

    def __init__(self) -> None:
        self._late_s = 0.0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Slack:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    @property
    def seconds(self) -> float:
        """Return the delay so far."""
        return 0.5 + 4 * self._late_s

    def _watch(self) -> None:
        while not self._end.is_set():
            began = time.monotonic()
            time.sleep(0.01)
            self._late_s = max(self._late_s, time.monotonic() - began - 0.01)
