"""Two relays on a Redis Cluster of three primaries, with the documented rights.

Each command of relay must name keys of one slot only: the servers would count CROSSSLOT errors.
"""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Iterator

import msgpack
import pytest
from aiohttp import ClientSession

from relay.core.model import Channel
from relay.stream.connection.connect import command
from relay.stream.format.keys import Keys
from relay.stream.shards.clients import ShardClients, shard_clients
from tests.support.centrifugo_client import SECRET, Centrifugo, centrifugo
from tests.support.cli import Cli
from tests.support.clients import Native, Refused, native
from tests.support.polling import SETTINGS, EngineIoPolling, Xhr, fresh_connections
from tests.support.redis_cluster import RedisCluster, running_cluster
from tests.support.relay import RelayProcess
from tests.support.valkey import Server, running

pytestmark = pytest.mark.redis
KEYS = Keys("relay:", has_site_tag=True)
LIMIT = 3
PASSWORD = "a password of operators"
CHANNELS = [f"room{number}" for number in range(12)]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisCluster]:
    with running_cluster(RedisCluster(tmp_path_factory.mktemp("cluster"), acl=True)) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Run the Redis of Socket.IO emitters."""
    server = Server(tmp_path_factory.mktemp("services"), acl=False)
    with running(server):
        yield server


@pytest.fixture(scope="module")
def relays(cluster: RedisCluster, services: Server) -> Iterator[list[RelayProcess]]:
    found = []
    for number in (1, 2):
        settings = [
            *SETTINGS,
            f"protocol:centrifugo.secret={SECRET}",
            f"node.internal_address=127.0.0.{number}",
            f"hub.connections_per_user={LIMIT}",
            "producer:queue.enabled=yes",
            f"producer:socketio_emitter.redis_url=redis://127.0.0.1:{services.port}/0",
            f"console.password={PASSWORD}",
            f"console.redis_url={cluster.servers[0].url('maintenance')}",
            "protocol:centrifugo.presence=true",
            "protocol:centrifugo.history_size=10",
            "protocol:centrifugo.history_lifetime=60",
        ]
        found.append(RelayProcess(cluster.servers[0], settings=settings))
    try:
        for relay in found:
            relay.start()
        yield found
    finally:
        for relay in found:
            relay.kill()


@pytest.mark.timeout(300)
async def test_every_feature_uses_one_slot_at_a_time(
    cluster: RedisCluster,
    relays: list[RelayProcess],
    services: Server,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tests.support.polling.SECRET", SECRET)
    one, two = relays
    async with (
        native(one) as here,
        native(two) as there,
        centrifugo(one.url) as api,
        fresh_connections() as http,
        shard_clients(cluster.servers[0].settings("admin")) as admin,
    ):
        await _limits(here, there)
        await _events(api, here, there, two)
        await _polling(api, http, one, two)
        await _presence(api, two)
        await _operators(Cli(cluster.servers[0]), admin, api, two)
        # The slots of the site and of a channel move. Everything works as before.
        for key in (KEYS.control, KEYS.stream(Channel(CHANNELS[0]))):
            target = (cluster.owner_of(key) + 1) % 3
            await asyncio.to_thread(cluster.move, key, target)
        await _events(api, here, there, two)
        await _queue(admin, here)
        await _emits(services, http, one, two)
    for number in range(3):
        errors = cluster.call(number, "INFO", "errorstats")
        assert not {name for name in errors if "CROSSSLOT" in name or "NOPERM" in name}, errors


async def _events(api: Centrifugo, here: Native, there: Native, two: RelayProcess) -> None:
    """Publish over one relay for clients of the other, in channels of all primaries."""
    streams = [await client.sse(*CHANNELS) for client in (here, there)]
    for name in CHANNELS:
        await api.api("publish", channel=name, data=name, url=two.url)
    for stream in streams:
        events = await stream.take(len(CHANNELS))
        assert sorted(event.json() for event in events) == sorted(CHANNELS)
        stream.drop()
    history = await api.api("history", channel=CHANNELS[0])
    assert history["body"]["data"][0]["data"] == CHANNELS[0]


async def _polling(
    api: Centrifugo, http: ClientSession, one: RelayProcess, two: RelayProcess
) -> None:
    """Poll sessions of one relay through the other."""
    session, same = Xhr(http, one, "clustered"), Xhr(http, two, "clustered")
    await session.connect("sock", "polled")
    # Requests come to both relays in turn, and concern channels of all primaries.
    turns = itertools.cycle((same, session))
    for name in CHANNELS:
        assert await next(turns).send("subscribe", channel=name) == 204
        assert f'\\"channel\\":\\"{name}\\"'.encode() in (await next(turns).poll())[1]
        next(turns)
    for number, name in enumerate(["polled", *CHANNELS]):
        await api.api("publish", channel=name, data=f"polled {number}")
    frames = b""
    while frames.count(b'\\"method\\":\\"message\\"') <= len(CHANNELS):
        frames += (await next(turns).poll())[1]
    for number in range(len(CHANNELS) + 1):
        assert frames.count(f'\\"polled {number}\\"'.encode()) == 1

    polling = EngineIoPolling(http, one)
    await polling.open("eve")
    polling.url = polling.url.replace(one.url, two.url)
    assert await polling.post("3") == 200


async def _presence(api: Centrifugo, two: RelayProcess) -> None:
    anna, ben = await api.client("anna"), await api.client("ben", url=two.url)
    users: set[str] = set()
    for client in (anna, ben):
        await client.subscribe("present")
    for url in ("", two.url):
        async with asyncio.timeout(30):
            users = set()
            while users != {"anna", "ben"}:
                found = await api.api("presence", channel="present", url=url)
                users = {each["user"] for each in found["body"]["data"].values()}
    for url in ("", two.url):
        channels = (await api.api("channels", url=url))["body"]["data"]
        assert "present" in channels
    await ben.socket.close()
    async with asyncio.timeout(30):
        while len(users) > 1:
            found = await api.api("presence", channel="present")
            users = {each["user"] for each in found["body"]["data"].values()}


async def _operators(cli: Cli, admin: ShardClients, api: Centrifugo, relay: RelayProcess) -> None:
    """Use commands and the console, which find the server of a channel by themselves."""
    name = CHANNELS[0]
    async with cli.tail(name, "--after", "0-1", "--json") as tail:
        line = await tail.line()
        assert line, await tail.said()
        first = json.loads(line)
        assert first["data"] == name
        await api.api("publish", channel=name, data="followed")
        while json.loads(await tail.line())["data"] != "followed":
            pass
    (found,) = await cli.objects("explain", "nobody", name, first["id"])
    assert found["outcome"] == "not_connected"
    fields = "stream", KEYS.stream(Channel(name)), "fields", '[["data","again"]]'
    added = await command(admin.home, "XADD", KEYS.dead_letters, "*", *fields)
    requeued = await cli.out("dead-letters", "requeue", added.decode())
    assert requeued.startswith(f"{added.decode()} is {name} ")
    assert {row["channel"] for row in await cli.objects("streams")} >= set(CHANNELS)
    assert len(await cli.objects("workers")) == 2
    async with ClientSession() as http:
        console = f"{relay.url}/console/api/"
        async with http.post(f"{console}login", json={"password": PASSWORD}) as answer:
            assert answer.status == 200, await answer.text()
            cookie = {"Cookie": f"relay_console={answer.cookies['relay_console'].value}"}
        query = {"channel": name, "after": "0-1"}
        async with http.get(f"{console}entries", params=query, headers=cookie) as answer:
            shown = [each["data"] for each in (await answer.json())["entries"]]
            assert (shown[0], shown[-2:]) == (name, ["followed", "again"])


async def _limits(here: Native, there: Native) -> None:
    """Count one user's connections to both relays."""
    streams = [await client.sse("limited") for client in (here, there, here)]
    with pytest.raises(Refused, match="limit_exceeded"):
        await there.sse("limited")
    for stream in streams:
        stream.drop()
    async with asyncio.timeout(30):
        while True:
            try:
                await there.sse("limited")
            except Refused:  # still counted
                await asyncio.sleep(0.05)
            else:
                break


async def _queue(admin: ShardClients, here: Native) -> None:
    stream = await here.sse("queued")
    item = json.dumps({"method": "publish", "params": {"channel": "queued", "data": 7}})
    queue = b"centrifugo.api"
    await admin.for_key(queue).rpush(queue.decode(), item)
    assert (await stream.next(20)).json() == 7


async def _emits(
    services: Server, http: ClientSession, one: RelayProcess, two: RelayProcess
) -> None:
    polling = EngineIoPolling(http, one)
    await polling.open("anna")
    polling.url = polling.url.replace(one.url, two.url)
    emit = {"type": 2, "data": ["news", 1], "nsp": "/axr"}
    options = {"rooms": ["allusers", "anna"], "flags": {}}
    message = msgpack.packb(["emitter", emit, options])
    with services.client() as client:
        client.publish("socket.io#/axr#", message)
    async with asyncio.timeout(30):
        while "news" not in await polling.poll():
            pass
