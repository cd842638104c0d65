"""Clients of Centrifugo and other protocols on the same streams, and their rights."""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import AsyncIterator, Iterator

import aiohttp
import pytest

from tests.support.centrifuge_js import JsClient, Node, running_node
from tests.support.clients import Native, Refused, native, redis, rights_key
from tests.support.relay import RelayProcess
from tests.support.valkey import Server

pytestmark = [pytest.mark.redis, pytest.mark.timeout(60)]
SECRET = "a secret of the application"


@pytest.fixture(scope="module")
def relay(valkey: Server) -> Iterator[RelayProcess]:
    settings = {
        "secret": SECRET,
        "publish": "true",
        "recover": "true",
        "history_size": "100",
        "history_lifetime": "60",
    }
    settings = {f"protocol:centrifugo.{key}": value for key, value in settings.items()}
    settings["namespace:staff.rights"] = "claims, hash"
    settings["protocol:centrifugo:staff.publish"] = "true"
    process = RelayProcess(valkey, settings=[f"{k}={v}" for k, v in settings.items()]).start()
    yield process
    process.kill()


@pytest.fixture
async def node() -> AsyncIterator[Node]:
    async with running_node(SECRET) as found:
        yield found


def make(node: Node, relay: RelayProcess, user: str = "ann") -> JsClient:
    return node.client(f"ws://127.0.0.1:{relay.port}/connection/websocket", user)


async def api(relay: RelayProcess, **command: object) -> object:
    body = json.dumps(command).encode()
    headers = {
        "Content-Type": "application/json",
        "X-API-Sign": hmac.digest(SECRET.encode(), body, "sha256").hex(),
    }
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{relay.url}/api/", data=body, headers=headers) as answer,
    ):
        return await answer.json()


async def test_a_publish_reaches_an_event_source(
    node: Node, relay: RelayProcess, door: Native
) -> None:
    sse = await door.sse("both-ways")
    ann = await make(node, relay).connected()
    await ann.subscribed("both-ways")
    await ann.ask("publish", "both-ways", data={"by": "ann"})
    await api(relay, method="publish", params={"channel": "both-ways", "data": {"by": "api"}})
    blocks = await sse.take(2)
    assert [block.json() for block in blocks] == [{"by": "ann"}, {"by": "api"}]
    # The ID is the same in all protocols.
    assert [(await ann.next("message"))["uid"] for _ in blocks] == [block.id for block in blocks]


async def test_an_xadd_reaches_centrifuge_js(node: Node, relay: RelayProcess) -> None:
    ann = await make(node, relay).connected()
    await ann.subscribed("appended")
    for data in ('{"a":1}', "<xml/>", "null"):
        relay.xadd("appended", data=data)
    assert [(await ann.next("message"))["data"] for _ in range(3)] == [{"a": 1}, "<xml/>", None]
    assert await ann.ask("history", "appended") == {
        "channel": "appended",
        "data": [
            {key: value for key, value in said.items() if key != "on"}
            for said in reversed(ann.said)
            if said["on"] == "message"
        ],
    }


@pytest.mark.parametrize("channel", ["seafile:lib", "pydio:7", "axr:room"])
async def test_a_channel_of_another_protocol_requires_a_right(
    node: Node, relay: RelayProcess, valkey: Server, channel: str
) -> None:
    ann = await make(node, relay).connected()
    ann.tell("subscribe", channel=channel)
    assert (await ann.next("error"))["error"] == "namespace not found"
    for method in ("publish", "history"):
        assert "error" in await ann.ask(method, channel, data=1)
    await asyncio.to_thread(redis, valkey, "HSET", rights_key(channel), "ann", "r")
    ann.tell("unsubscribe", channel=channel)
    ann.tell("resubscribe", channel=channel)
    await ann.next("subscribe")
    relay.xadd(channel, data="1")
    assert (await ann.next("message"))["data"] == 1
    # The right ends at the position of the revocation.
    await asyncio.to_thread(redis, valkey, "HSET", rights_key(channel), "ann", "-")
    await api(relay, method="publish", params={"channel": "ping", "data": 1})
    await ann.next("unsubscribe")


async def test_the_protocols_rule_does_not_apply_if_the_namespace_does_not_list_it(
    node: Node, relay: RelayProcess, valkey: Server
) -> None:
    ann = await make(node, relay).connected()
    ann.tell("subscribe", channel="staff:room")
    assert (await ann.next("error"))["error"] == "permission denied"
    await asyncio.to_thread(redis, valkey, "HSET", rights_key("staff:room"), "ann", "r")
    ann.tell("unsubscribe", channel="staff:room")
    ann.tell("resubscribe", channel="staff:room")
    await ann.next("subscribe")


async def test_a_native_user_needs_a_right_to_a_centrifugo_channel(relay: RelayProcess) -> None:
    async with native(relay) as clients:
        with pytest.raises(Refused) as refused:
            await clients.sse("$private#ann", token=relay.token("eve", ["other"]))
        assert refused.value.answer.status == 403
