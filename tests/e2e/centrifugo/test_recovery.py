"""Clients that are cut repeatedly receive each message once and in order.

`recovered` is never true if a message is missing."""

from __future__ import annotations

import asyncio
import os
import random
import re
import signal
import time
from collections.abc import Iterator
from functools import partial

import pytest

from tests.support.centrifuge_js import JsClient, Node, Said, running_node
from tests.support.clients import stream_key, until
from tests.support.cutter import Cutter, cutting
from tests.support.relay import RelayProcess
from tests.support.valkey import Server
from tests.support.workers import workers

# Seconds during which clients are cut. Set RELAY_CUT_S=60 for a full minute.
CUT_S = float(os.environ.get("RELAY_CUT_S", "4"))
pytestmark = [pytest.mark.redis, pytest.mark.slow, pytest.mark.timeout(120 + int(CUT_S) * 2)]
SECRET = "a secret of the application"
CLIENTS = 100
# A busy machine takes its time to start a worker and to let all clients reconnect.
START_S = 40.0


@pytest.fixture(scope="module")
def relay(valkey: Server) -> Iterator[RelayProcess]:
    settings = {
        "secret": SECRET,
        "recover": "true",
        "history_size": "5000",
        "history_lifetime": "60",
    }
    process = RelayProcess(
        valkey,
        settings=[f"protocol:centrifugo.{key}={value}" for key, value in settings.items()],
        flags=["--workers", "2"],
    ).start()
    yield process
    process.kill()


@pytest.fixture
def channels(request: pytest.FixtureRequest) -> list[str]:
    """Return channels that no other test uses, because their histories are kept."""
    name = re.sub("[^a-z0-9]+", "-", request.node.name)
    return [f"{name}{number}" for number in range(20)]


class Follower:
    """The numbered messages that one client has received from its channel."""

    def __init__(self, client: JsClient, channel: str) -> None:
        self.client = client
        self.channel = channel
        self.last: int | None = None
        self.holes: list[tuple[int, int]] = []
        self.wrong: list[str] = []
        self.subscribed = 0
        self.unrecovered = 0
        client.on_said = self.hear

    def hear(self, said: Said) -> None:
        match said:
            case {"on": "message", "data": int(number)}:
                if self.last is not None and number <= self.last:
                    self.wrong.append(f"{number} after {self.last}")
                elif self.last is not None and number != self.last + 1:
                    self.holes.append((self.last, number))
                self.last = number
            case {"on": "subscribe", "recovered": bool(recovered)}:
                # centrifuge-js delivers the recovered messages before this.
                self.subscribed += 1
                if self.subscribed > 1 and not recovered:
                    self.unrecovered += 1
                    self.holes.clear()
                elif self.holes:
                    self.wrong.append(f"recovered, but {self.holes} are missing")
                    self.holes.clear()
            case _:
                pass


class Producer:
    """Appends messages with XADD, numbered within each channel."""

    def __init__(
        self, server: Server, channels: list[str], *, per_s: int = 500, data_bytes: int = 0
    ) -> None:
        self._redis = server.client()
        self.numbers = dict.fromkeys(channels, 0)
        self.channels = channels
        self.per_s = per_s
        self.data_bytes = data_bytes

    def add(self, count: int) -> None:
        pipeline = self._redis.pipeline(transaction=False)
        for channel in random.choices(self.channels, k=count):
            self.numbers[channel] += 1
            # Fill with white space, which JSON ignores: only the size matters.
            data = str(self.numbers[channel]).ljust(self.data_bytes)
            pipeline.xadd(stream_key(channel), {"data": data})
        pipeline.execute()


async def produce(producer: Producer, ended: asyncio.Event) -> None:
    begun, sent = time.monotonic(), 0
    while not ended.is_set():
        due = int((time.monotonic() - begun) * producer.per_s) - sent
        if due > 0:
            await asyncio.to_thread(producer.add, min(due, 500))
            sent += min(due, 500)
        await asyncio.sleep(0.01)


async def cut_at_random(cutter: Cutter) -> None:
    end = time.monotonic() + CUT_S
    while time.monotonic() < end:
        cutter.cut(random.randrange(1 << 20))
        # Cut each client about every four seconds.
        await asyncio.sleep(random.expovariate(CLIENTS / 4))


async def kill_one(relay: RelayProcess) -> None:
    """Kill one of the workers."""
    await asyncio.sleep(CUT_S / 2)
    os.kill(workers(relay)[1], signal.SIGKILL)


async def kill_all_in_turn(
    relay: RelayProcess, producer: Producer, followers: list[Follower]
) -> None:
    """Kill each worker once, after the previous one has been replaced."""
    for number in (1, 2):
        await received(followers, producer.per_s // 4)
        killed = workers(relay)[number]
        os.kill(killed, signal.SIGKILL)
        await until(partial(replaced, relay, number, killed), START_S)
    await received(followers, producer.per_s // 4)


def replaced(relay: RelayProcess, number: int, pid: int) -> bool:
    return workers(relay).get(number, pid) != pid


async def received(followers: list[Follower], count: int) -> None:
    """Wait until each client has received this many messages since now."""
    goals = [(each, (each.last or 0) + count) for each in followers]
    async with asyncio.timeout(START_S):
        while any((each.last or 0) < goal for each, goal in goals):
            await asyncio.sleep(0.05)


async def settled(followers: list[Follower], producer: Producer) -> None:
    """Wait until all clients have received the last message of their channel."""
    async with asyncio.timeout(60):
        while any(each.last != producer.numbers[each.channel] for each in followers):
            await asyncio.sleep(0.05)


def make(
    node: Node, cutter: Cutter, transports: list[str], number: int, channels: list[str]
) -> Follower:
    path = "/connection" if transports else "/connection/websocket"
    scheme = "http" if transports else "ws"
    url = f"{scheme}://127.0.0.1:{cutter.port}{path}"
    # All waiting times are a tenth of the default ones.
    client = node.client(url, f"u{number}", transports=transports, options={"retry": 100})
    return Follower(client, channels[number % len(channels)])


@pytest.mark.parametrize(
    "transports",
    [[], ["xhr-streaming"], ["xhr-polling"]],
    ids=["raw", "xhr-streaming", "xhr-polling"],
)
async def test_cut_clients_lose_nothing(
    relay: RelayProcess, valkey: Server, transports: list[str], channels: list[str]
) -> None:
    producer, ended = Producer(valkey, channels), asyncio.Event()
    async with (
        running_node(SECRET) as node,
        cutting(relay.port) as cutter,
        asyncio.TaskGroup() as group,
    ):
        followers = [make(node, cutter, transports, number, channels) for number in range(CLIENTS)]
        for each in followers:
            each.client.tell("subscribe", channel=each.channel, only=True)
            each.client.tell("connect")
        async with asyncio.timeout(30):
            while not all(each.subscribed for each in followers):
                await asyncio.sleep(0.05)
        producing = group.create_task(produce(producer, ended))
        if not transports:
            group.create_task(kill_one(relay))
        await cut_at_random(cutter)
        ended.set()
        await producing
        await settled(followers, producer)
        wrong = {each.client.name: each.wrong for each in followers if each.wrong or each.holes}
        assert not wrong
        # The missed messages are always within the history.
        assert not [each.client.name for each in followers if each.unrecovered]
        # Many cut connections of polling clients were idle.
        assert sum(each.subscribed for each in followers) > CLIENTS + cutter.cuts / 20
        assert cutter.cuts > CUT_S * 5


@pytest.mark.parametrize("transport", ["eventsource", "xhr-streaming", "xhr-polling"])
async def test_clients_of_killed_workers_lose_nothing(
    relay: RelayProcess, valkey: Server, transport: str, channels: list[str]
) -> None:
    """Responses reach their size limit frequently, many of them passed on by another worker."""
    # Each response is full after two thirds of a second. With more or longer messages the clients
    # cannot keep up on a busy machine: those that reconnect need all messages that they missed.
    producer = Producer(valkey, channels[:1], per_s=50, data_bytes=4000)
    ended = asyncio.Event()
    async with running_node(SECRET) as node, asyncio.TaskGroup() as group:
        followers = [
            Follower(
                node.client(
                    f"{relay.url}/connection",
                    f"u{number}",
                    transports=[transport],
                    package=("centrifuge", "centrifuge-1.4.9")[number % 2],
                    # A sockjs-client in Node does not detect an incomplete response.
                    options={"retry": 100, "pingInterval": 3000},
                ),
                channels[0],
            )
            for number in range(10)
        ]
        for each in followers:
            each.client.tell("subscribe", channel=each.channel, only=True)
            each.client.tell("connect")
        async with asyncio.timeout(30):
            while not all(each.subscribed for each in followers):
                await asyncio.sleep(0.05)
        producing = group.create_task(produce(producer, ended))
        await kill_all_in_turn(relay, producer, followers)
        ended.set()
        await producing
        await settled(followers, producer)
        wrong = {each.client.name: each.wrong for each in followers if each.wrong or each.holes}
        assert not wrong
        assert not [each.client.name for each in followers if each.unrecovered]
        assert sum(each.subscribed for each in followers) > len(followers)
