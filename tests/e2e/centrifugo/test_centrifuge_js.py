"""centrifuge-js 1.5.0 and 1.4.9 from npm, in Node, over every transport that Node can do."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest

from tests.support.centrifuge_js import JsClient, Node, running_node
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


async def test_messages_there_and_back(
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
