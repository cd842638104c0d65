"""All commands of Centrifugo v1's HTTP API byte for byte, and their effect on clients."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from tests.support.centrifugo_client import SECRET, Centrifugo, V1Client, centrifugo, sign
from tests.support.clients import native, redis
from tests.support.relay import RelayProcess
from tests.support.valkey import Server, free_port

pytestmark = pytest.mark.redis
RULES = [
    f"protocol:centrifugo.secret={SECRET}",
    "protocol:centrifugo:hist.history_size=3",
    "protocol:centrifugo:hist.history_lifetime=60",
    "protocol:centrifugo:short.history_size=3",
    "protocol:centrifugo:short.history_lifetime=1",
    "protocol:centrifugo:drop.history_size=3",
    "protocol:centrifugo:drop.history_lifetime=60",
    "protocol:centrifugo:drop.history_drop_inactive=true",
    "protocol:centrifugo:here.presence=true",
    "protocol:centrifugo:bare.publish=true",
]


@pytest.fixture(scope="module")
def relay(valkey: Server) -> Iterator[RelayProcess]:
    process = RelayProcess(valkey, settings=RULES).start()
    yield process
    process.kill()


@pytest.fixture
async def site(relay: RelayProcess) -> AsyncIterator[Centrifugo]:
    async with centrifugo(relay.url) as one:
        yield one


async def exact(site: Centrifugo, body: str) -> str:
    answer = await site.request(body.encode())
    assert answer.status == 200, answer
    return answer.body.decode()


@pytest.mark.parametrize(
    ("method", "params", "wanted"),
    [
        ("unsubscribe", '{"user":"u","channel":"hist:a"}', '"error":null,"body":null'),
        ("unsubscribe", '{"user":"u"}', '"error":null,"body":null'),
        ("unsubscribe", '{"channel":"hist:a"}', '"error":"invalid message","body":null'),
        (
            "unsubscribe",
            '{"user":"u","channel":"no:a"}',
            '"error":"namespace not found","body":null',
        ),
        ("disconnect", '{"user":"nobody"}', '"error":null,"body":null'),
        ("disconnect", "{}", '"error":"invalid message","body":null'),
        (
            "presence",
            '{"channel":""}',
            '"error":"invalid message","body":{"channel":"","data":null}',
        ),
        ("presence", "null", '"error":"invalid message","body":{"channel":"","data":null}'),
        (
            "presence",
            '{"channel":"no:<a>"}',
            '"error":"namespace not found","body":{"channel":"no:\\u003ca\\u003e","data":null}',
        ),
        (
            "presence",
            '{"channel":"bare:a"}',
            '"error":"not available","body":{"channel":"bare:a","data":null}',
        ),
        (
            "presence",
            '{"channel":"here:nobody"}',
            '"error":null,"body":{"channel":"here:nobody","data":{}}',
        ),
        ("history", "{}", '"error":"invalid message","body":{"channel":"","data":null}'),
        (
            "history",
            '{"channel":"bare:a"}',
            '"error":"not available","body":{"channel":"bare:a","data":null}',
        ),
        (
            "history",
            '{"channel":"seafile:a"}',
            '"error":"namespace not found","body":{"channel":"seafile:a","data":null}',
        ),
        (
            "history",
            '{"channel":"hist:nothing"}',
            '"error":null,"body":{"channel":"hist:nothing","data":[]}',
        ),
        (
            "publish",
            '{"channel":"no:a","data":1}',
            '"error":"namespace not found","advice":"fix","body":null',
        ),
    ],
)
async def test_replies_are_those_of_v1(
    site: Centrifugo, method: str, params: str, wanted: str
) -> None:
    command = f'{{"uid":"7","method":"{method}","params":{params}}}'
    assert await exact(site, command) == f'[{{"uid":"7","method":"{method}",{wanted}}}]'
    # Without params, or with params of a wrong type, the whole request is rejected.
    for bad in (f'{{"method":"{method}"}}', f'{{"method":"{method}","params":1}}'):
        assert (await site.request(bad.encode())).status == 400


async def test_history_is_newest_first_and_has_exactly_history_size_messages(
    site: Centrifugo,
) -> None:
    assert (
        await exact(
            site,
            '[{"method":"publish","params":{"channel":"hist:x","data":0}},'
            '{"method":"publish","params":{"channel":"hist:x","data":{"a": "<&>"}, "client":"c1"}},'
            '{"method":"publish","params":{"channel":"hist:x","data":[1, 12345678901234567890]}},'
            '{"method":"publish","params":{"channel":"hist:x","data":null}},'
            '{"method":"publish","params":{"channel":"hist:other","data":1}}]',
        )
        == "[" + ",".join(['{"method":"publish","error":null,"body":null}'] * 5) + "]"
    )
    text = await exact(site, '{"method":"history","params":{"channel":"hist:x"}}')
    (reply,) = json.loads(text)
    uids = [each["uid"] for each in reply["body"]["data"]]
    assert text == (
        '[{"method":"history","error":null,"body":{"channel":"hist:x","data":['
        f'{{"uid":"{uids[0]}","channel":"hist:x","data":null}},'
        f'{{"uid":"{uids[1]}","channel":"hist:x","data":[1,12345678901234567890]}},'
        f'{{"uid":"{uids[2]}","channel":"hist:x","data":{{"a":"\\u003c\\u0026\\u003e"}},'
        '"client":"c1"}]}}]'
    )


async def test_later_commands_of_a_batch_see_its_publications(site: Centrifugo) -> None:
    text = await exact(
        site,
        '[{"method":"publish","params":{"channel":"hist:b","data":1}},'
        '{"uid":"2","method":"history","params":{"channel":"hist:b"}},'
        '{"method":"publish","params":{"channel":"hist:b","data":2}}]',
    )
    replies = json.loads(text)
    assert [each["data"] for each in replies[1]["body"]["data"]] == [1]
    # Commands before an invalid one have been executed.
    body = b'[{"method":"publish","params":{"channel":"hist:b","data":3}},{"method":"nonsense"}]'
    assert (await site.request(body)).status == 400
    found = (await site.api("history", channel="hist:b"))["body"]["data"]
    assert [each["data"] for each in found] == [3, 2, 1]


async def test_history_expires_a_lifetime_after_the_last_message(site: Centrifugo) -> None:
    async def kept() -> list[Any]:
        found = (await site.api("history", channel="short:x"))["body"]["data"]
        return [each["data"] for each in found]

    await site.api("publish", channel="short:x", data=1)
    assert await kept() == [1]
    async with asyncio.timeout(30):
        while await kept():
            await asyncio.sleep(0.05)
    # Each publication renews the whole list, but expired messages do not return.
    await site.api("publish", channel="short:x", data=2)
    assert (await kept())[0] == 2


async def test_publications_to_an_inactive_channel_are_dropped(
    site: Centrifugo, relay: RelayProcess
) -> None:
    async def kept(channel: str) -> list[Any]:
        found = (await site.api("history", channel=channel))["body"]["data"]
        return [each["data"] for each in found]

    async def publish(channel: str, *data: int) -> None:
        commands = [
            {"method": "publish", "params": {"channel": channel, "data": each}} for each in data
        ]
        answer = json.loads(await exact(site, json.dumps(commands)))
        assert [each["error"] for each in answer] == [None] * len(data)

    await publish("drop:x", 1, 2)
    assert await kept("drop:x") == []
    assert redis(relay.server, "EXISTS", "relay:stream:{drop:x}") == 0
    anna = await site.client("anna")
    await anna.subscribe("drop:x")
    await publish("drop:x", 3, 4)
    assert [(await anna.push("message"))["data"] for _ in range(2)] == [3, 4]
    assert await kept("drop:x") == [4, 3]
    await anna.ask("unsubscribe", channel="drop:x")
    # The channel has a history, so that the message is appended.
    await publish("drop:x", 5)
    assert await kept("drop:x") == [5, 4, 3]
    # There is no history, but a client has left recently.
    await anna.subscribe("drop:y")
    await anna.stop()
    async with asyncio.timeout(30):
        while not redis(relay.server, "EXISTS", "relay:store:centrifugo:touched:drop:y"):
            await asyncio.sleep(0.01)
    await publish("drop:y", 6)
    assert await kept("drop:y") == [6]


async def test_a_user_is_unsubscribed_and_disconnected(site: Centrifugo) -> None:
    anna, tablet, bob = [await site.client(user) for user in ("anna", "anna", "bob")]
    for each in (anna, bob):
        await each.subscribe("bare:x")
    await anna.subscribe("bare:y")
    reply = await site.api("unsubscribe", user="anna", channel="bare:x")
    assert reply == {"method": "unsubscribe", "error": None, "body": None}
    # With and without a subscription.
    for each in (anna, tablet):
        assert await each.push("unsubscribe") == {"channel": "bare:x", "status": True}
    await site.api("publish", channel="bare:x", data=1)
    await site.api("publish", channel="bare:y", data=2)
    assert (await bob.push("message"))["data"] == 1
    assert (await anna.push("message"))["data"] == 2
    assert await anna.subscribe("bare:x")
    await site.api("unsubscribe", user="anna")
    assert {(await anna.push("unsubscribe"))["channel"] for _ in range(2)} == {"bare:x", "bare:y"}
    assert tablet.pushes == []

    await site.api("disconnect", user="anna")
    for each in (anna, tablet):
        code, _reason = await each.until_closed()
        assert code == 3000
    assert bob.closed is None


async def test_refusals_are_counted(site: Centrifugo, relay: RelayProcess) -> None:
    async with native(relay) as door:
        names = [
            f'relay_rejections_total{{protocol="centrifugo",reason="{code}"}}'
            for code in ("permission_denied", "namespace_not_found", "invalid_message")
        ]
        before = [await door.metric(name) for name in names]
        anna = await site.client("anna")
        for channel in ("$private", "$other", "no:a"):
            assert (await anna.ask("subscribe", channel=channel))["error"]
        await anna.socket.send_str("[]")
        await anna.until_closed()
        assert [await door.metric(name) for name in names] == [
            known + more for known, more in zip(before, (2, 1, 1), strict=True)
        ]


async def test_channels_are_those_with_subscribers_of_this_protocol(
    site: Centrifugo, relay: RelayProcess
) -> None:
    anna = await site.client("anna")
    for channel in ("bare:<1>", "plain", "$none"):
        if not channel.startswith("$"):
            await anna.subscribe(channel)
    found = (await site.api("channels"))["body"]["data"]
    assert {"bare:<1>", "plain"} <= set(found)
    await anna.stop()
    async with asyncio.timeout(30):
        while "plain" in (await site.api("channels"))["body"]["data"]:
            await asyncio.sleep(0.01)
    # Params are not required.
    assert (await exact(site, '{"method":"channels"}')).startswith('[{"method":"channels","error"')


@pytest.mark.timeout(60)
async def test_commands_act_on_all_workers_and_hosts(valkey: Server) -> None:
    flags = ["--workers", "2"]
    hosts = [RelayProcess(valkey, settings=RULES, flags=flags) for _ in range(2)]
    for host in hosts:
        await asyncio.to_thread(host.start)
    try:
        async with centrifugo(hosts[0].url) as site:
            clients = [await site.client("anna", url=host.url) for host in hosts for _ in range(8)]
            for each in clients:
                await each.subscribe("here:all")
            for host in hosts:
                # The other host receives it shortly after the reply to the client.
                async with asyncio.timeout(30):
                    while True:
                        reply = await site.api("presence", url=host.url, channel="here:all")
                        if set(reply["body"]["data"]) == {each.id for each in clients}:
                            break
                        await asyncio.sleep(0.05)
                assert "here:all" in (await site.api("channels", url=host.url))["body"]["data"]
            await site.api("unsubscribe", user="anna", channel="here:all")
            for each in clients:
                assert (await each.push("unsubscribe"))["channel"] == "here:all"
            await site.api("disconnect", url=hosts[1].url, user="anna")
            for each in clients:
                assert (await each.until_closed())[0] == 3000
    finally:
        for host in hosts:
            host.kill()


ORDER = [
    ("publish", {"channel": "bare:q", "data": "last"}),
    ("unsubscribe", {"user": "anna", "channel": "bare:q"}),
    ("publish", {"channel": "bare:q", "data": "unsubscribed"}),
    ("publish", {"channel": "bare:r", "data": "bye"}),
    ("disconnect", {"user": "anna"}),
]


async def receives_order(client: V1Client) -> None:
    """Check that each of the commands in ORDER takes effect at its position."""
    assert (await client.until_closed())[0] == 3000
    found = [(push["method"], push["body"].get("data")) for push in client.pushes]
    assert found.index(("message", "last")) < found.index(("unsubscribe", None))
    assert {*found} == {("message", "last"), ("unsubscribe", None), ("message", "bye")}


async def test_a_command_takes_effect_after_the_publications_before_it(site: Centrifugo) -> None:
    for _ in range(5):
        anna = await site.client("anna")
        await anna.subscribe("bare:q")
        await anna.subscribe("bare:r")
        for method, params in ORDER:
            await site.api(method, **params)
        await receives_order(anna)


async def test_the_queue_unsubscribes_and_disconnects_too(valkey: Server) -> None:
    queue = ["producer:queue.enabled=true", "producer:queue.name=centrifugo.api.e2e"]
    relay = RelayProcess(valkey, settings=[*RULES, *queue], flags=["--workers", "2"])
    await asyncio.to_thread(relay.start)
    try:
        async with centrifugo(relay.url) as site:
            clients = [await site.client("anna") for _ in range(12)]
            for each in clients:
                await each.subscribe("bare:q")
                await each.subscribe("bare:r")
            items = [json.dumps({"method": method, "params": params}) for method, params in ORDER]
            redis(valkey, "RPUSH", "centrifugo.api.e2e", *items)
            for each in clients:
                await receives_order(each)
    finally:
        relay.kill()


async def test_a_separate_port_and_requests_without_a_signature(valkey: Server) -> None:
    port = free_port()
    more = [f"protocol:centrifugo.{each}" for each in ("insecure_api=true", f"api_port={port}")]
    relay = RelayProcess(
        valkey, settings=[*RULES, *more, "protocol:centrifugo.http_prefix=/centrifugo"]
    )
    await asyncio.to_thread(relay.start)
    try:
        async with centrifugo(f"http://127.0.0.1:{port}") as site:
            body = b'{"method":"channels"}'
            kind = {"Content-Type": "application/json"}
            answer = await site.request(body, kind, path="/centrifugo/api/")
            assert answer.status == 200
            assert (await site.request(b"", kind, path="/centrifugo/api/")).status == 400
            moved = await site.request(b"", kind, path="/centrifugo/api")
            assert (moved.status, moved.headers["Location"]) == (301, "/centrifugo/api/")
            for url in (relay.url, site.url):
                answer = await site.request(body, kind, url=url)
                assert answer.status == 404
            answer = await site.request(body, kind, url=relay.url, path="/centrifugo/api/")
            assert answer.status == 404
            form = {"Content-Type": "application/x-www-form-urlencoded"}
            answer = await site.request(
                b"data=%7B%22method%22%3A%22channels%22%7D", form, path="/centrifugo/api/any"
            )
            assert answer.status == 200
            assert sign("x") != sign("y")
    finally:
        relay.kill()


@pytest.mark.timeout(60)
async def test_stats_describe_all_nodes_and_change_once_per_interval(valkey: Server) -> None:
    intervals = ["node_ping_interval=0.2", "node_metrics_interval=1"]
    settings = [*RULES, *(f"protocol:centrifugo.{each}" for each in intervals)]
    hosts = [
        RelayProcess(valkey, settings=settings, flags=["--workers", "2"]),
        RelayProcess(valkey, settings=settings),
    ]
    for host in hosts:
        await asyncio.to_thread(host.start)
    try:
        async with centrifugo(hosts[0].url) as site:

            async def stats() -> list[Any]:
                body = (await site.api("stats", url=hosts[1].url))["body"]["data"]
                assert list(body) == ["nodes", "metrics_interval"]
                assert body["metrics_interval"] == 1
                # Workers that other tests have killed are listed for some seconds.
                return [each for each in body["nodes"] if port_of(each) in ports]

            def port_of(node: Any) -> str:
                name: str = node["name"]
                return name.rpartition("_")[2].partition("-")[0]

            ports = [str(host.port) for host in hosts]
            async with asyncio.timeout(30):
                while len(nodes := await stats()) < 3:
                    await asyncio.sleep(0.05)
            names = sorted(each["name"].rpartition("_")[2] for each in nodes)
            assert names == sorted([f"{ports[0]}-1", f"{ports[0]}-2", f"{ports[1]}"])
            for node in nodes:
                assert list(node) == ["uid", "version", "name", "started_at", "metrics"]
                assert node["version"] == "1.8.0"
                metrics = node["metrics"]
                assert list(metrics) == sorted(metrics)
                assert {type(each) for each in metrics.values()} == {int}
                assert len(metrics) == 74
                assert metrics["node_memory_sys"] > 1_000_000

            clients = [await site.client(f"u{n % 2}", url=hosts[1].url) for n in range(4)]
            for each in clients:
                await each.subscribe("here:stats")
            for _ in range(3):
                await site.api("publish", url=hosts[1].url, channel="here:stats", data=1)
            for each in [*clients] * 3:
                await each.push("message")
            node = (await site.api("node", url=hosts[1].url))["body"]["data"]
            raw = node["metrics"]
            gauges = [raw[f"node_num_{each}"] for each in ("clients", "unique_clients", "channels")]
            assert gauges == [4, 2, 1]
            assert [raw[f"client_num_{each}"] for each in ("connect", "subscribe")] == [4, 4]
            assert raw["client_api_num_requests"] == 8
            assert raw["client_num_msg_sent"] == 8 + 12
            assert raw["node_num_client_msg_published"] == 3
            assert raw["node_num_add_presence"] == 4
            assert raw["http_raw_ws_num_requests"] == 4
            assert raw["http_api_num_requests"] >= 3

            async def of_an_interval() -> Any:
                found = next(each for each in await stats() if each["uid"] == node["uid"])
                assert found["metrics"]["node_num_clients"] == 4
                return found["metrics"]

            seen: set[tuple[int, int]] = set()
            async with asyncio.timeout(30):
                # An event is counted in one snapshot, or in two if it took longer.
                while (found := await of_an_interval())["client_num_subscribe"] or not seen:
                    if found["client_num_subscribe"]:
                        seen.add((found["client_num_subscribe"], found["client_api_15_count"]))
                    await asyncio.sleep(0.02)
            assert sum(subscribed for subscribed, _ in seen) == 4
            assert found["client_api_15_count"] == 8
            assert found["client_api_1_count"] == 0
            # `node` counts since the start.
            raw = (await site.api("node", url=hosts[1].url))["body"]["data"]["metrics"]
            assert raw["client_num_subscribe"] == 4

            hosts[0].kill()
            async with asyncio.timeout(30):
                while [port_of(each) for each in await stats()] != [ports[1]]:
                    await asyncio.sleep(0.05)
    finally:
        for host in hosts:
            host.kill()
