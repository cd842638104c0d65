"""centrifuge-js 1.5.0 and 1.4.9 from npm, in Node, over every transport that Node supports."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator

import pytest

from tests.support.centrifuge_js import JsClient, Node, Said, running_node
from tests.support.cutter import cutting
from tests.support.relay import RelayProcess
from tests.support.valkey import Server

pytestmark = [pytest.mark.redis, pytest.mark.timeout(60)]
SECRET = "a secret of the application"
SETTINGS = {
    "secret": SECRET,
    "publish": "true",
    "presence": "true",
    "join_leave": "true",
    "recover": "true",
    "history_size": "10",
    "history_lifetime": "60",
}
TRANSPORTS = {
    "raw": (),
    "sockjs-websocket": ("websocket",),
    "sockjs-xhr-streaming": ("xhr-streaming",),
    "sockjs-xhr-polling": ("xhr-polling",),
    "sockjs-eventsource": ("eventsource",),
}


@pytest.fixture(scope="module")
def relay(valkey: Server) -> Iterator[RelayProcess]:
    settings = [f"protocol:centrifugo.{key}={value}" for key, value in SETTINGS.items()]
    settings += ["protocol:centrifugo:open.anonymous=true"]
    process = RelayProcess(valkey, settings=settings).start()
    yield process
    process.kill()


@pytest.fixture
async def node() -> AsyncIterator[Node]:
    async with running_node(SECRET) as found:
        yield found


@pytest.fixture(params=["centrifuge", "centrifuge-1.4.9"])
def package(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=TRANSPORTS)
def transport(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def make(node: Node, relay: RelayProcess, transport: str = "raw", **order: object) -> JsClient:
    if transport == "raw":
        url = f"ws://127.0.0.1:{relay.port}/connection/websocket"
    else:
        url = f"{relay.url}/connection"
    return node.client(url, transports=TRANSPORTS[transport], **order)  # type: ignore[arg-type]


async def test_publish_and_receive(
    node: Node, relay: RelayProcess, transport: str, package: str, channel: str
) -> None:
    name = channel.partition(":")[2]
    ann = await make(node, relay, transport, package=package, info='{"name":"Ann"}').connected()
    wanted = "raw-websocket" if transport == "raw" else transport.removeprefix("sockjs-")
    assert ann.said[0]["transport"] == wanted
    me = ann.said[0]["client"]
    assert (await ann.subscribed(name))["recovered"] is False
    assert await ann.ask("publish", name, data={"text": "<grüß> & \u2028 dich"}) == {
        "channel": name,
        "status": True,
    }
    message = await ann.next("message")
    assert message["data"] == {"text": "<grüß> & \u2028 dich"}
    assert message["client"] == me
    assert message["info"] == {"user": "u1", "client": me, "default_info": {"name": "Ann"}}
    found = await ann.ask("history", name)
    message = {key: value for key, value in message.items() if key != "on"}
    assert found["data"] == [message]
    for number in range(12):
        relay.xadd(name, data=str(number))
    for number in range(12):
        assert (await ann.next("message"))["data"] == number
    assert [each["data"] for each in (await ann.ask("history", name))["data"]] == list(
        range(11, 1, -1)
    )


async def test_a_private_channel_is_signed_by_the_application(
    node: Node, relay: RelayProcess, package: str
) -> None:
    ann = make(node, relay, package=package, channelInfo='{"role":"admin"}')
    ann.tell("startAuthBatching")
    ann.tell("subscribe", channel="$one")
    ann.tell("subscribe", channel="$two")
    ann.tell("stopAuthBatching")
    await ann.connected()
    assert {(await ann.next("subscribe"))["channel"] for _ in range(2)} == {"$one", "$two"}
    asked = [set(said["channels"]) for said in ann.said if said["on"] == "auth"]
    assert asked == [{"$one", "$two"}]
    await ann.ask("publish", "$one", data=1)
    assert (await ann.next("message"))["info"]["channel_info"] == {"role": "admin"}
    eve = await make(node, relay, user="eve", package=package, refuseAuth=True).connected()
    eve.tell("subscribe", channel="$one")
    assert (await eve.next("error"))["error"] == 403


async def test_join_presence_and_leave(
    node: Node, relay: RelayProcess, transport: str, package: str, channel: str
) -> None:
    name = channel.partition(":")[2]
    ann = await make(node, relay, transport, package=package, user="ann").connected()
    await ann.subscribed(name)
    bob = await make(
        node, relay, transport, package=package, user="bob", info='{"age":7}'
    ).connected()
    await bob.subscribed(name)
    his, hers = bob.said[0]["client"], ann.said[0]["client"]
    who = {"user": "bob", "client": his, "default_info": {"age": 7}}

    async def bobs(kind: str) -> Said:
        # Ann may receive her own join first.
        while (said := await ann.next(kind))["data"]["user"] != "bob":
            pass
        return said

    assert (await bobs("join"))["data"] == who
    found = (await ann.ask("presence", name))["data"]
    assert found == {his: who, hers: {"user": "ann", "client": hers}}
    bob.tell("unsubscribe", channel=name)
    assert (await bobs("leave"))["data"] == who
    bob.tell("resubscribe", channel=name)
    assert (await bobs("join"))["data"] == who
    bob.tell("disconnect")
    assert (await bobs("leave"))["data"] == who
    assert list((await ann.ask("presence", name))["data"]) == [hers]


async def test_commands_in_batches(
    node: Node, relay: RelayProcess, transport: str, channel: str
) -> None:
    name = channel.partition(":")[2]
    ann = await make(node, relay, transport).connected()
    ann.tell("startBatching")
    for number in range(10):
        ann.tell("subscribe", channel=f"{name}-{number}")
    ann.tell("ping")
    ann.tell("stopBatching")
    assert {(await ann.next("subscribe"))["channel"] for _ in range(10)} == {
        f"{name}-{number}" for number in range(10)
    }
    ann.tell("startBatching")
    for number in range(10):
        ann.tell("publish", channel=f"{name}-{number}", data=number)
    ann.tell("history", channel=f"{name}-3")
    ann.tell("stopBatching")
    for number in range(10):
        assert (await ann.next("publish"))["answer"]["channel"] == f"{name}-{number}"
    # The history contains what the same batch has published before.
    assert [each["data"] for each in (await ann.next("history"))["answer"]["data"]] == [3]


async def test_errors_reach_the_application(node: Node, relay: RelayProcess, package: str) -> None:
    ann = await make(node, relay, package=package).connected()
    ann.tell("subscribe", channel="nowhere:a")
    refused = await ann.next("error")
    assert (refused["error"], refused["advice"]) == ("namespace not found", "fix")
    await ann.subscribed("open:a")
    assert await ann.ask("publish", "open:a", data=1) == {
        "error": "permission denied",
        "advice": "fix",
    }
    assert await ann.ask("presence", "open:a") == {"error": "not available", "advice": "retry"}
    eve = make(node, relay, options={"token": "f" * 64})
    eve.tell("connect")
    assert await eve.next("disconnect") == {
        "on": "disconnect",
        "reason": "invalid token",
        "reconnect": False,
    }


async def test_a_cut_client_receives_missed_messages(
    node: Node, relay: RelayProcess, transport: str, package: str, channel: str
) -> None:
    name = channel.partition(":")[2]
    async with cutting(relay.port) as cutter:
        scheme, path = (
            ("ws", "/connection/websocket") if transport == "raw" else ("http", "/connection")
        )
        ann = node.client(
            f"{scheme}://127.0.0.1:{cutter.port}{path}",
            transports=TRANSPORTS[transport],
            package=package,
        )
        await ann.connected()
        assert (await ann.subscribed(name))["recovered"] is False
        # Cuts without and with missed messages; at the first, the history is empty.
        number = 0
        for missed in (0, 3, 0, 2):
            cutter.refuses = True
            while len(cutter):
                cutter.cut(0)
            for _ in range(missed):
                relay.xadd(name, data=str(number + 1))
                number += 1
            cutter.refuses = False
            assert (await ann.next("subscribe"))["recovered"] is True
            relay.xadd(name, data=str(number + 1))
            number += 1
            for expected in range(number - missed, number + 1):
                assert (await ann.next("message"))["data"] == expected
        assert len([said for said in ann.said if said["on"] == "message"]) == number


async def test_a_token_is_refreshed_before_it_ends(
    node: Node, valkey: Server, package: str
) -> None:
    settings = ["connection_lifetime=2", "expired_connection_close_delay=1", f"secret={SECRET}"]
    process = RelayProcess(valkey, settings=[f"protocol:centrifugo.{each}" for each in settings])
    await asyncio.to_thread(process.start)
    try:
        ann = await make(node, process, package=package).connected()
        await ann.subscribed("news")
        await ann.next("refresh")
        await ann.next("refresh")
        assert not [said for said in ann.said if said["on"] == "disconnect"]
        process.xadd("news", data="1")
        assert (await ann.next("message"))["data"] == 1
        # An expired token is not an error: the client requests a new one and reconnects.
        bob = make(node, process, package=package, older=-100)
        bob.tell("connect")
        await bob.next("refresh")
        await bob.next("connect")
        # A client without a new token is closed, and may reconnect.
        eve = make(node, process, package=package, options={"refreshAttempts": 0, "retry": 20000})
        await eve.connected()
        assert (await eve.next("disconnect"))["reason"] in ("expired", "refresh failed")
    finally:
        process.kill()
