"""centrifuge-js 1.x in Node: many clients in one process, controlled by lines."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from tests.support import npm

DRIVER = Path(__file__).with_name("centrifuge_driver.js")
LIMIT_S = 30.0
Said = dict[str, Any]


class JsClient:
    """One centrifuge-js client and the events that it has reported."""

    def __init__(self, node: Node, name: str) -> None:
        self._node = node
        self.name = name
        self.said: list[Said] = []
        self._taken: dict[str, int] = {}
        self.news = asyncio.Event()
        # If set, it is called for each event instead of storing it.
        self.on_said: Callable[[Said], None] | None = None

    def tell(self, do: str, **order: Any) -> None:
        """Send one command."""
        self._node.tell(id=self.name, do=do, **order)

    async def next(self, on: str, limit_s: float = LIMIT_S) -> Said:
        """Return the next event of this kind. Other events are kept."""
        async with asyncio.timeout(limit_s):
            while True:
                for index in range(self._taken.get(on, 0), len(self.said)):
                    self._taken[on] = index + 1
                    if self.said[index]["on"] == on:
                        return self.said[index]
                self.news.clear()
                await self.news.wait()

    async def ask(self, do: str, channel: str, **order: Any) -> Any:
        """Call publish, presence or history. Return the reply or the error."""
        self.tell(do, channel=channel, **order)
        found = await self.next(do)
        return found.get("answer", found.get("failed"))

    async def connected(self) -> JsClient:
        """Connect and wait for the connection."""
        self.tell("connect")
        await self.next("connect")
        return self

    async def subscribed(self, channel: str, **order: Any) -> Said:
        """Subscribe and wait for the reply."""
        self.tell("subscribe", channel=channel, **order)
        return await self.next("subscribe")


class Node:
    """One Node process with any number of clients."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.clients: dict[str, JsClient] = {}

    def tell(self, **order: Any) -> None:
        """Send one line."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order).encode() + b"\n")

    def client(
        self, url: str, user: str = "u1", *, transports: Sequence[str] = (), **order: Any
    ) -> JsClient:
        """Create a client that is not connected yet."""
        client = JsClient(self, f"c{len(self.clients) + 1}")
        self.clients[client.name] = client
        client.tell("new", url=url, user=user, transports=list(transports) or None, **order)
        return client

    async def listen(self) -> None:
        """Read the events of the clients. Runs until cancelled."""
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            said = json.loads(line)
            client = self.clients[said.pop("id")]
            if client.on_said is not None:
                client.on_said(said)
            else:
                client.said.append(said)
            client.news.set()


@asynccontextmanager
async def running_node(secret: str) -> AsyncIterator[Node]:
    """Run a process whose clients sign with this secret."""
    program, environment = await asyncio.to_thread(lambda: (npm.node(), npm.environment()))
    process = await asyncio.create_subprocess_exec(
        program,
        str(DRIVER),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env=environment,
        limit=1 << 24,
    )
    node = Node(process)
    node.tell(do="secret", secret=secret)
    async with asyncio.TaskGroup() as group:
        listening = group.create_task(node.listen())
        try:
            yield node
        finally:
            # Before the process ends, because it may end within a line.
            listening.cancel()
            process.kill()
            await process.wait()
