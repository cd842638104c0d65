"""Four workers without a sticky proxy: requests of a polling client reach any of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.centrifuge_js import running_node
from tests.support.relay import RelayProcess
from tests.support.valkey import Server

pytestmark = [pytest.mark.redis, pytest.mark.timeout(120)]
SECRET = "a secret of the application"
CLIENTS = 12


@pytest.fixture(scope="module")
def relay(valkey: Server) -> Iterator[RelayProcess]:
    settings = ["publish=true", "presence=true", "user_connection_limit=3", f"secret={SECRET}"]
    process = RelayProcess(
        valkey,
        settings=[f"protocol:centrifugo.{each}" for each in settings],
        flags=["--workers", "4"],
    ).start()
    yield process
    process.kill()


@pytest.mark.parametrize("transport", ["xhr-polling", "xhr-streaming", "eventsource"])
async def test_polling_over_four_workers(relay: RelayProcess, transport: str) -> None:
    async with running_node(SECRET) as node:
        clients = [
            node.client(f"{relay.url}/connection", f"{transport}{number}", transports=[transport])
            for number in range(CLIENTS)
        ]
        for each in clients:
            each.tell("subscribe", channel=transport)
            each.tell("connect")
        for each in clients:
            await each.next("subscribe")
        for number, each in enumerate(clients):
            assert (await each.ask("publish", transport, data=number))["status"] is True
        for each in clients:
            heard = [(await each.next("message"))["data"] for _ in clients]
            assert heard == list(range(CLIENTS))
        there = (await clients[0].ask("presence", transport))["data"].values()
        assert {each["user"] for each in there} == {f"{transport}{n}" for n in range(CLIENTS)}
        assert not [said for each in clients for said in each.said if said["on"] == "disconnect"]


async def test_a_users_connections_are_counted_over_all_workers(relay: RelayProcess) -> None:
    url = f"ws://127.0.0.1:{relay.port}/connection/websocket"
    async with running_node(SECRET) as node:
        for _ in range(3):
            await node.client(url, "ann").connected()
        fourth = node.client(url, "ann")
        fourth.tell("connect")
        assert (await fourth.next("disconnect"))["reason"] == "limit exceeded"
        await node.client(url, "bob").connected()
