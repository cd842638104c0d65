"""Connection state recovery of real 4.x clients that are cut repeatedly, with killed workers."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import Any

import pytest

from tests.support.clients import publish_ephemeral, redis, until
from tests.support.relay import RelayProcess
from tests.support.socketio import (
    SECRET,
    Driver,
    NpmClient,
    axr_token,
    connect_options,
    emitter,
    npm_clients,
)
from tests.support.valkey import Server, running
from tests.support.workers import workers

pytestmark = [pytest.mark.redis, pytest.mark.slow, pytest.mark.timeout(120)]
NEW, OLD = "socket.io-client", "socket.io-client-2"
EVENTS, CUTS = 1200, 12


async def start(server: Server, *settings: str, count: int = 2) -> RelayProcess:
    relay = RelayProcess(
        server,
        settings=[f"protocol:socketio.secret={SECRET}", f"node.workers={count}", *settings],
    )
    await asyncio.to_thread(relay.start)
    return relay


async def connect(
    npm: Driver, relay: RelayProcess, uid: str, package: str = NEW, **more: Any
) -> tuple[NpmClient, dict[str, Any]]:
    options = {**connect_options(package, axr_token(uid)), **more}
    client = await npm.open(f"{relay.url}/axr", package=package, **options)
    return client, await client.until("connect")


class Ledger:
    """The events that a client has received, in order."""

    def __init__(self, client: NpmClient) -> None:
        self.client = client
        self.numbers: list[int] = []
        self.recovered: list[bool] = []
        self.ids: set[str] = set()

    async def read(self, count: int) -> None:
        """Read until the client has received this number of events in total."""
        while len(self.numbers) < count:
            await self._next()

    async def read_until_connected(self, count: int) -> None:
        """Read until the client has reconnected this number of times."""
        while len(self.recovered) < count:
            await self._next()

    async def _next(self) -> None:
        found = await self.client.next(30)
        if found["what"] == "event":
            self.numbers.append(found["args"][1]["n"])
        elif found["what"] == "connect":
            self.recovered.append(found["recovered"])
            self.ids.add(found["id"])


@pytest.mark.parametrize(
    "transports", [["polling", "websocket"], ["polling"], ["websocket"]], ids="+".join
)
async def test_a_client_cut_again_and_again_misses_and_repeats_nothing(
    valkey: Server, transports: list[str]
) -> None:
    relay = await start(valkey)
    uid = f"cut-{'-'.join(transports)}"
    try:
        async with npm_clients() as npm, asyncio.TaskGroup() as tasks:
            client, connected = await connect(npm, relay, uid, transports=transports)
            ledger = Ledger(client)
            # A first event: a client that uses WebSocket only shows at its reconnect that it can
            # recover, and a cut between an event and its offset would repeat that event.
            relay.xadd(f"axr:{uid}", data='{"n":-1}', type="msg")
            await ledger.read(1)
            if transports == ["websocket"]:
                await client.until("offset")
                await client.do("cut")
                assert (await client.until("connect"))["recovered"]

            async def produce(first: int) -> None:
                for number in range(first, first + EVENTS // CUTS):
                    room = uid if number % 2 else "allusers"
                    await asyncio.to_thread(
                        relay.xadd, f"axr:{room}", data=f'{{"n":{number}}}', type="msg"
                    )

            for cut in range(CUTS):
                first = cut * EVENTS // CUTS
                producing = tasks.create_task(produce(first))
                await ledger.read(1 + first + 20)
                connects = len(ledger.recovered)
                if cut in (CUTS // 3, 2 * CUTS // 3):
                    # The worker to which the client is connected.
                    for process in workers(relay).values():
                        os.kill(process, signal.SIGKILL)
                else:
                    await client.do("cut")
                await ledger.read_until_connected(connects + 1)
                await producing
                await ledger.read(1 + (cut + 1) * EVENTS // CUTS)
        for parity in (0, 1):
            mine = [number for number in ledger.numbers[1:] if number % 2 == parity]
            assert mine == list(range(parity, EVENTS, 2))
        assert all(ledger.recovered)
        assert len(ledger.recovered) >= CUTS
        assert ledger.ids <= {connected["id"]}
    finally:
        await asyncio.to_thread(relay.stop)


async def test_polling_clients_that_recover_under_load_have_missed_nothing(valkey: Server) -> None:
    """The response to a poll that was written but never read must be repeated, regardless of its
    size."""
    relay = await start(valkey)
    events, clients, kills = 1200, 8, 2
    filling = "x" * 2000

    async def follow(client: NpmClient) -> list[bool]:
        """Read until the last event. Return for each reconnect whether it was a recovery."""
        next_number, returns = 0, []
        while next_number < events:
            found = await client.next(30)
            if found["what"] == "connect":
                returns.append(found["recovered"])
            elif found["what"] == "event":
                number = found["args"][1]["n"]
                # A client that received a notice may continue anywhere after it.
                assert number == next_number or (not all(returns) and number > next_number)
                next_number = number + 1
        return returns

    def produce(first: int, count: int) -> None:
        with valkey.client() as client, client.pipeline(transaction=False) as pipeline:
            for number in range(first, first + count):
                data = f'{{"n":{number},"filling":"{filling}"}}'
                pipeline.execute_command("XADD", "relay:stream:{axr:allusers}", "*", "data", data)
            pipeline.execute()

    try:
        async with npm_clients() as npm, asyncio.TaskGroup() as tasks:
            followers = []
            for index in range(clients):
                client, _ = await connect(npm, relay, f"load-{index}", transports=["polling"])
                followers.append(tasks.create_task(follow(client)))
            burst = 50
            for first in range(0, events, burst):
                await asyncio.to_thread(produce, first, burst)
                kill, at = divmod(first, events // (kills + 1))
                if kill and not at:
                    await until(lambda: len(workers(relay)) == 2, 30)
                    os.kill(workers(relay)[1 + kill % 2], signal.SIGKILL)
            await asyncio.wait(followers)
        returns = [each for follower in followers for each in follower.result()]
        assert len(returns) >= clients
        assert all(returns)
    finally:
        await asyncio.to_thread(relay.stop)


async def test_a_text_at_the_end_and_volatile_events_do_not_break_recovery(valkey: Server) -> None:
    relay = await start(valkey)
    try:
        async with npm_clients() as npm:
            for transports in (["polling", "websocket"], ["websocket"]):
                uid = f"text-{len(transports)}"
                client, _ = await connect(npm, relay, uid, transports=transports)
                relay.xadd(f"axr:{uid}", data='"a text"', type="msg")
                assert (await client.event())[:2] == ["msg", "a text"]
                await publish_ephemeral(valkey, f"axr:{uid}", '{"data":"live","type":"v"}')
                assert (await client.event())[:2] == ["v", "live"]
                if transports == ["websocket"]:
                    await client.until("offset")
                await client.do("cut")
                relay.xadd(f"axr:{uid}", data="1", type="missed")
                assert (await client.until("connect"))["recovered"]
                assert (await client.event())[:2] == ["missed", 1]
    finally:
        await asyncio.to_thread(relay.stop)


async def test_a_client_that_has_seen_nothing_yet_recovers(valkey: Server) -> None:
    relay = await start(valkey)
    try:
        async with npm_clients() as npm:
            client, connected = await connect(npm, relay, "quiet")
            for number in (1, 2):
                os.kill(workers(relay)[number], signal.SIGKILL)
            relay.xadd("axr:quiet", data="1", type="missed")
            again = await client.until("connect", 30)
            assert (again["recovered"], again["id"]) == (True, connected["id"])
            assert (await client.event())[:2] == ["missed", 1]
    finally:
        await asyncio.to_thread(relay.stop)


async def test_what_is_gone_is_told_by_a_new_session(valkey: Server) -> None:
    relay = await start(valkey, count=1)
    try:
        async with npm_clients() as npm:
            client, connected = await connect(npm, relay, "gone")
            relay.xadd("axr:gone", data="1", type="msg")
            await client.event()
            # The client is disconnected, and its worker does not know it.
            relay.send(signal.SIGSTOP)
            await client.do("cut")
            for number in range(3):
                relay.xadd("axr:gone", data=str(number), type="msg")
            key = "relay:stream:{axr:gone}"
            redis(valkey, "XTRIM", key, "MAXLEN", 1)
            relay.send(signal.SIGCONT)
            again = await client.until("connect", 30)
            assert again["recovered"] is False
            assert again["id"] != connected["id"]
            relay.xadd("axr:gone", data="9", type="msg")
            while (await client.event())[1] != 9:
                pass
    finally:
        await asyncio.to_thread(relay.stop)


async def test_another_user_cannot_take_a_session(valkey: Server) -> None:
    relay = await start(valkey, count=1)
    try:
        async with npm_clients() as npm:
            client, _ = await connect(npm, relay, "victim")
            relay.xadd("axr:victim", data="1", type="msg")
            offset = (await client.event())[-1]
            names = redis(valkey, "KEYS", "relay:store:socketio:session:*")
            (name,) = [each for each in names if b"victim" in redis(valkey, "GET", each)]
            pid = name.decode().rpartition(":")[2]
            auth = {"token": axr_token("thief"), "pid": pid, "offset": offset}
            thief = await npm.open(f"{relay.url}/axr", auth=auth)
            assert (await thief.until("connect"))["recovered"] is False
            relay.xadd("axr:victim", data="2", type="msg")
            relay.xadd("axr:allusers", data="3", type="msg")
            assert (await client.event())[1] == 2
            assert (await thief.event())[1] == 3
            # A revoked right is checked again.
            hash_key = "relay:rights:{axr:victim}"
            redis(valkey, "HSET", hash_key, "victim", "-")
            await client.do("cut")
            await client.until("connect")
            relay.xadd("axr:victim", data="4", type="msg")
            relay.xadd("axr:allusers", data="5", type="msg")
            while (args := await client.event())[1] != 5:
                assert args[1] == 3
    finally:
        await asyncio.to_thread(relay.stop)


async def test_old_clients_get_the_same_over_polling_with_four_workers_and_no_sticky_proxy(
    valkey: Server,
) -> None:
    relay = await start(valkey, count=4)
    try:
        async with npm_clients() as npm:
            for package in ("socket.io-client-2", "socket.io-client-3", NEW):
                for index in range(4):
                    uid = f"four-{package}-{index}"
                    client, _ = await connect(npm, relay, uid, package, transports=["polling"])
                    for number in range(10):
                        relay.xadd(f"axr:{uid}", data=str(number), type="msg")
                        assert (await client.event())[1] == number
                    # The upgrade as well, on whichever worker it arrives.
                    other, found = await connect(npm, relay, uid, package)
                    if found["transport"] == "polling":
                        await other.until("upgrade")
                    relay.xadd(f"axr:{uid}", data="10", type="msg")
                    assert (await client.event())[1] == 10
                    assert (await other.event())[1] == 10
    finally:
        await asyncio.to_thread(relay.stop)


async def test_an_upgrade_moves_to_the_worker_of_its_session(valkey: Server) -> None:
    relay = await start(valkey, count=4)
    try:
        async with npm_clients() as npm:
            clients = []
            for index in range(12):
                client, found = await connect(npm, relay, f"moves-{index}")
                if found["transport"] == "polling":
                    await client.until("upgrade")
                clients.append(client)
            before = published(valkey)
            for number in range(20):
                relay.xadd("axr:allusers", data=str(number), type="msg")
                for client in clients:
                    assert (await client.event())[1] == number
            # No message about it was sent between the workers. Otherwise there would be some 180.
            assert published(valkey) - before < 60
    finally:
        await asyncio.to_thread(relay.stop)


def published(server: Server) -> int:
    """Return the number of messages that the workers have sent."""
    return int(redis(server, "INFO", "commandstats").get("cmdstat_publish", {}).get("calls", 0))


async def test_a_hand_over_of_the_tap_loses_and_repeats_nothing(
    valkey: Server, tmp_path_factory: pytest.TempPathFactory
) -> None:
    services = Server(tmp_path_factory.mktemp("services"), acl=False)
    with running(services):
        tap = [
            f"producer:socketio_emitter.redis_url=redis://127.0.0.1:{services.port}/0",
        ]
        relay = await start(valkey, *tap)
        count = services.client().execute_command
        requests = "socket.io-request#/axr#"
        try:
            await until(lambda: count("PUBSUB", "NUMSUB", requests)[1] >= 2)  # type: ignore[no-untyped-call]
            lease = "relay:lease:socketio_emitter"
            holder = await until(lambda: valkey.client().get(lease))
            async with emitter("5", services.port) as io:
                for number in range(60):
                    await io.run(f'io.to("tap").emit("msg", {number});')
                    if number == 20:
                        # The worker that appends. The ends of the names distinguish the workers.
                        which = int(holder.decode().rpartition(":")[0].rpartition("-")[2])
                        os.kill(workers(relay)[which], signal.SIGKILL)
            stream = "relay:stream:{axr:tap}"

            def appended() -> list[int]:
                found = redis(valkey, "XRANGE", stream, "-", "+")
                return [int(fields[b"data"]) for _, fields in found]

            await until(lambda: len(appended()) >= 60, 30)
            assert appended() == list(range(60))
        finally:
            await asyncio.to_thread(relay.stop)
