"""Channels on several servers: slots that move, promoted replicas, and a server that is away."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from redis.exceptions import ResponseError

from relay.config.settings import RedisSettings
from relay.core.model import Channel
from relay.stream.shards.making import keys_of, shard_map
from tests.support.clients import Native, native, redis, stream_key, until
from tests.support.pydio import KEY as PYDIO_KEY
from tests.support.pydio import Pydio, standing_in
from tests.support.redis_cluster import RedisCluster, running_cluster
from tests.support.relay import RelayProcess
from tests.support.seafile import KEY, seafile
from tests.support.socketio import SECRET, axr_token, npm_clients
from tests.support.valkey import Flavour, Server, free_port, running

pytestmark = pytest.mark.redis

_FAILOVER_S = 6.0


@contextmanager
def relay_on(
    server: Server, url: str, pids: Path | None = None, *more: str
) -> Iterator[RelayProcess]:
    settings = [*more, f"node.pid_file={pids}"] if pids else [*more]
    relay = RelayProcess(server, flags=["--redis", url], settings=settings)
    try:
        yield relay.start()
    finally:
        relay.kill()
        if pids is not None and pids.exists():
            with contextlib.suppress(ProcessLookupError):
                # After an upgrade.
                os.kill(int(pids.read_text()), signal.SIGKILL)


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("flavour", "replicas"), [("valkey", 1), ("redis", 0)])
async def test_a_moved_slot_or_a_promoted_replica_rejects_no_client(
    tmp_path: Path, flavour: Flavour, replicas: int
) -> None:
    with (
        running_cluster(RedisCluster(tmp_path, flavour, replicas=replicas)) as cluster,
        relay_on(cluster.servers[0], cluster.url) as relay,
    ):
        async with native(relay) as clients:
            await _move(cluster, clients)
            # To the replica and back.
            for _ in range(2 * replicas):
                await _fail_over(cluster, clients)


async def _fail_over(cluster: RedisCluster, clients: Native) -> None:
    """Promote the replica of the server that has a channel, as for maintenance."""
    stream = stream_key("news").encode()
    source = await asyncio.to_thread(cluster.owner_of, stream)
    target = (source + cluster.primaries) % len(cluster.servers)
    sent: list[str] = []

    def append() -> None:
        # The server may have been replaced since it was found, or while the servers were asked.
        with contextlib.suppress(ResponseError, AssertionError):
            owner = cluster.owner_of(stream)
            sent.append(cluster.call(owner, "XADD", stream, "*", "data", len(sent)).decode())

    asked_at = -math.inf

    def promote() -> None:
        nonlocal asked_at
        # A replica gives up after 5 s, and refuses without a connection to its primary.
        if time.monotonic() - asked_at > _FAILOVER_S:
            with contextlib.suppress(ResponseError):
                cluster.call(target, "CLUSTER", "FAILOVER")
                asked_at = time.monotonic()

    def is_promoted() -> bool:
        with contextlib.suppress(AssertionError):
            return cluster.role_of(target) == "master" and cluster.owner_of(stream) == target
        return False

    client = await clients.ws("news")
    assert (await client.next())["reply"] == "subscribe"
    # Clients that subscribe meanwhile wait, too.
    others: list[dict[str, Any]] = []
    enough = asyncio.Event()

    async def subscribe() -> None:
        while not enough.is_set():
            other = await clients.ws("news")
            others.append(await other.next(30))
            await other.socket.close()

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(subscribe())
        await asyncio.to_thread(append)
        while not await asyncio.to_thread(is_promoted):
            await asyncio.to_thread(promote)
            await asyncio.to_thread(append)
        await asyncio.to_thread(append)
        received: list[str] = []
        while not received or received[-1] != sent[-1]:
            message = await client.next(30)
            if "id" in message:
                received.append(message["id"])
        enough.set()
    assert received == sent
    assert [each for each in others if each.get("reply") != "subscribe"] == []


async def _move(cluster: RedisCluster, clients: Native) -> None:
    stream, name = stream_key("news").encode(), b"relay:ephemeral:{news}"
    sent: list[str] = []

    def append(_step: str = "") -> None:
        for number in range(cluster.primaries):
            try:
                found = cluster.call(number, "XADD", stream, "*", "data", len(sent))
            except ResponseError:
                continue  # this server does not have the slot at this step
            sent.append(found.decode())
            return

    client = await clients.ws("news")
    assert (await client.next())["reply"] == "subscribe"
    received: list[dict[str, Any]] = []
    source = await asyncio.to_thread(cluster.owner_of, stream)
    for target in ((source + 1) % 3, (source + 2) % 3, source):
        await asyncio.to_thread(append)
        await asyncio.to_thread(cluster.move, stream, target, append)
        await asyncio.to_thread(append)
        # The move has ended the subscription to the sharded channel.
        payload = json.dumps({"data": f"moved to {target}"})
        await until(partial(cluster.call, target, "SPUBLISH", name, payload), 30)
    while sum("id" in each for each in received) < len(sent):
        received.append(await client.next(20))
    assert [each["id"] for each in received if "id" in each] == sent
    live = [each["data"] for each in received if "id" not in each]
    assert all(str(each).startswith("moved to") for each in live), received
    # A canary is written to one slot of each primary, and to another one after its move.
    shards = shard_map(cluster.settings())
    await shards.refresh()
    ports = [server.port for server in cluster.servers]
    for shard in list(shards.shards):
        target = next(n for n, port in enumerate(ports) if not shard.name.endswith(f":{port}"))
        await asyncio.to_thread(cluster.move, f"{{{shard.tag}}}".encode(), target)
    await asyncio.to_thread(append)
    while "id" not in (last := await client.next(20)):
        pass
    assert last["id"] == sent[-1]
    async with asyncio.timeout(30):
        while await clients.status("/readyz") != 200:
            await asyncio.sleep(0.05)


@pytest.mark.timeout(120)
async def test_a_server_that_is_away_affects_only_its_channels(tmp_path: Path) -> None:
    servers = [Server(tmp_path / name) for name in ("one", "two")]
    url = ", ".join(server.url("admin") for server in servers)
    topology = RedisSettings(url=url)
    shards, keys = shard_map(topology), keys_of(topology)
    home = shards.home.name
    here, away = sorted(servers, key=lambda server: not home.endswith(f":{server.port}"))
    channels = [f"room{number}" for number in range(40)]

    def is_of(server: Server, channel: str) -> bool:
        name = shards.shard_of(keys.stream(Channel(channel))).name
        return name.endswith(f":{server.port}")

    near = next(channel for channel in channels if is_of(here, channel))
    far, other = [channel for channel in channels if is_of(away, channel)][:2]
    pids = tmp_path / "pid"
    near_library = next(each for each in channels if is_of(here, f"seafile:{each}"))
    far_library = next(each for each in channels if is_of(away, f"seafile:{each}"))
    # Every Socket.IO client is also in the room of all users, and every browser has broadcasts.
    elsewhere = away if is_of(here, "axr:allusers") else here
    uid = next(each for each in channels if is_of(elsewhere, f"axr:{each}"))
    far_room, near_room = (uid, "allusers") if elsewhere is away else ("allusers", uid)
    workspace = next(each for each in channels if is_of(here, f"pydio:{each}"))
    pydio_port = free_port()
    settings = [
        f"protocol:seafile.key={KEY}",
        f"protocol:socketio.secret={SECRET}",
        f"protocol:pydio.key={PYDIO_KEY}",
        f"protocol:pydio.auth_url={Pydio(pydio_port).auth_url}",
    ]

    def commit(server: Server, library: str, commit_id: str) -> bytes:
        content = json.dumps({"repo_id": library, "commit_id": commit_id})
        key = stream_key(f"seafile:{library}")
        found: bytes = redis(server, "XADD", key, "*", "type", "repo-update", "data", content)
        return found

    with running(*servers), relay_on(here, url, pids, *settings) as relay:
        async with (
            native(relay) as clients,
            seafile(relay) as site,
            standing_in(pydio_port) as pydio,
            npm_clients() as npm,
        ):
            seen = commit(away, far_library, "seen").decode()
            commit(away, far_library, "missed")
            near_seen = commit(here, near_library, "seen").decode()
            one, two = await clients.sse(near), await clients.sse(far)
            redis(away, "XADD", stream_key(far), "*", "data", "1")
            assert (await two.next()).data == "1"
            away.freeze()
            redis(here, "XADD", stream_key(near), "*", "data", "1")
            assert (await one.next()).data == "1"
            name = f"127.0.0.1:{away.port}"
            async with asyncio.timeout(30):
                ready = ""
                while not (ready.startswith("ready\n") and name in ready):
                    await asyncio.sleep(0.05)
                    ready = (await clients.get("/readyz")).body.decode()
            refused: dict[str, Any] = {}
            async with asyncio.timeout(30):
                while "error" not in refused:
                    # Until the server is silent for long enough, subscriptions wait for it.
                    with contextlib.suppress(TimeoutError):
                        refused = await (await clients.ws(other)).next(1)
            assert refused["error"]["code"] == "unavailable"
            assert name in refused["error"]["message"]
            # Connections with several channels are accepted.
            both = await clients.sse(near, other)
            block = await both.next()
            assert block.event == "relay:error"
            assert block.json()["channel"] == other
            assert name in block.json()["message"]
            auth = {"token": axr_token(uid)}
            player = await npm.open(f"{relay.url}/axr", auth=auth)
            assert (await player.next())["what"] == "connect"
            pydio.login("alice", "/staff").acl[workspace] = "rw"
            headers = {"Cookie": "AjaXplorer=alice", "Origin": relay.url}
            page = await npm.open(relay.url, path="/public", extraHeaders=headers)
            assert (await page.next())["what"] == "connect"
            await page.do("ask", "register", workspace)
            assert (await page.until("answer"))["args"] == [{"ok": True}]
            redis(here, "XADD", stream_key(f"axr:{near_room}"), "*", "type", "near", "data", "1")
            assert (await player.event())[0] == "near"
            syncing = await site.connect()
            await syncing.subscribe(far_library, after=seen)
            await syncing.subscribe(near_library, after=near_seen)
            commit(here, near_library, "near")
            assert (await syncing.next())["content"]["commit_id"] == "near"
            redis(here, "XADD", stream_key(near), "*", "data", "2")
            assert [(await each.next()).data for each in (one, both)] == ["2", "2"]
            away.thaw()
            redis(away, "XADD", stream_key(far), "*", "data", "2")
            redis(away, "XADD", stream_key(other), "*", "data", "1")
            assert (await two.next(30)).data == "2"
            # Nobody on this worker has followed the other channel before.
            blocks = await both.take(2)
            assert [block.event for block in blocks] == ["relay:reset", None]
            assert (blocks[0].json()["channel"], blocks[1].data) == (other, "1")
            assert both.last_id == blocks[1].id
            await player.until("disconnect")
            assert (await player.until("connect"))["recovered"] is False
            redis(away, "XADD", stream_key(f"axr:{far_room}"), "*", "type", "far", "data", "1")
            assert (await player.event())[0] == "far"
            assert (await syncing.next())["content"]["commit_id"] == "missed"
            # It does not prevent an upgrade either.
            await asyncio.to_thread(away.stop)
            old = pids.read_text()
            relay.send(signal.SIGUSR2)
            assert [each.event for each in await one.ended(60)] == ["relay:closing"]
            await until(lambda: pids.read_text() != old, 60)
            redis(here, "XADD", stream_key(near), "*", "data", "3")
            one = await clients.sse(near, last=one.last_id)
            assert (await one.next()).data == "3"
