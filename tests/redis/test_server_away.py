"""What operators see if one of several Redis servers is away."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import pytest
from aiohttp.test_utils import make_mocked_request

from producers.registry import producer_settings
from relay.cli.operator_context import OperatorContext
from relay.cli.streams import streams
from relay.cli.workers import status
from relay.config.loading import load
from relay.console.channels import channels
from relay.console.overview import overview as console_overview
from relay.console.services import ApiRequest, ConsoleServices
from relay.core.model import Channel
from relay.inspect.connections import ConnectionFilter, find_connections
from relay.inspect.questions import Questions, asking
from relay.process.doctor.at_start import log_faults
from relay.process.doctor.examination import examine
from relay.process.site_metrics import SiteMetrics
from relay.protocols import door_settings
from relay.stream.cluster.bus import ClusterBus
from relay.stream.connection.connect import command
from relay.stream.shards.clients import shard_clients
from relay.stream.shards.making import keys_of
from relay.stream.shards.server_errors import ServerErrors
from relay.stream.upkeep import overview, reports
from tests.support.relay import KEY
from tests.support.valkey import Server, free_port, running

pytestmark = pytest.mark.redis

NAMES = [Channel(f"c{number}") for number in range(40)]
QUEUE = "centrifugo.api"


class Site(OperatorContext):
    """Two servers, of which one is away."""

    away: str
    there: dict[str, set[Channel]]


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    """Return a site whose server that belongs to channels only is away."""
    async with started(tmp_path, home_is_away=False) as found:
        yield found


@pytest.fixture
async def homeless(tmp_path: Path) -> AsyncIterator[Site]:
    """Return a site whose server with the list of workers is away."""
    async with started(tmp_path / "homeless", home_is_away=True) as found:
        yield found


@asynccontextmanager
async def started(tmp_path: Path, *, home_is_away: bool) -> AsyncIterator[Site]:
    servers = [Server(tmp_path / str(number), acl=False) for number in range(2)]
    with running(*servers):
        urls = ",".join(each.url() for each in servers)
        config = load(
            None,
            environ={},
            overrides=[f"redis.url={urls}", f"jwt.key={KEY}", f"server.port={free_port()}"],
            flags={},
            doors=door_settings(),
            producers=producer_settings(),
        )
        async with shard_clients(config.redis) as clients:
            found = Site(config=config, clients=clients, keys=keys_of(config.redis))
            there: dict[str, set[Channel]] = {each.name: set() for each in clients.shards.shards}
            for name in NAMES:
                key = found.keys.stream(name)
                await command(clients.for_key(key), "XADD", key, "*", "data", "1")
                there[clients.shards.shard_of(key).name].add(name)
                await command(clients.for_key(key), "RPUSH", QUEUE, "{}")
            assert all(there.values())
            home = clients.shards.home.name
            (away,) = {home} if home_is_away else {*there} - {home}
            object.__setattr__(found, "away", away)
            object.__setattr__(found, "there", there)
            next(each for each in servers if away.endswith(str(each.port))).kill()
            yield found


async def test_channels_of_the_other_server_are_listed(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    home = site.clients.shards.home.name
    options = argparse.Namespace(pattern="*", json=True)
    assert await streams(site, options) == 1
    printed = capsys.readouterr()
    rows = [json.loads(line) for line in printed.out.splitlines()]
    assert {each["channel"] for each in rows} == site.there[home]
    assert {each["server"] for each in rows} == {home}
    assert "the list is not complete" in printed.err
    assert site.away in printed.err
    # The console reads pages, and reads the shown channels again.
    errors = ServerErrors()
    seen, cursor = set(), ""
    while True:
        page, cursor = await overview.page(site.clients, site.keys, "*", cursor, 5, errors)
        seen |= {each.channel for each in page}
        if not cursor:
            break
    assert seen == site.there[home]
    assert site.away in errors.lines()[0]
    again = await overview.of_channels(site.clients, site.keys, NAMES, ServerErrors())
    assert {each.channel for each in again} == site.there[home]


async def test_the_server_is_named(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    options: Any = argparse.Namespace(json=True, min_workers=0, max_lag=10.0, max_dead_letters=None)
    assert await status(site, options) == 1
    printed = capsys.readouterr()
    values = json.loads(printed.out)
    assert values["redis"] is True
    assert [each["address"] for each in values["servers"] if not each["answers"]] == [site.away]
    assert site.away in printed.err
    servers = {each["address"]: each for each in await reports.servers(site.clients)}
    assert "error" in servers[site.away]
    assert servers[site.clients.shards.home.name]["role"] == "master"
    found = {each.name: each for each in await examine(site.config, site.clients, site.keys)}
    assert site.away in found["redis.unreachable"].what
    assert "of a channel on this server" in found["redis.unreachable"].why
    home = site.clients.shards.home.name
    assert found["redis.maxmemory"].what.startswith(f"{home}: ")
    assert f"redis-cli -h 127.0.0.1 -p {home.rpartition(':')[2]} CONFIG SET" in (
        found["redis.maxmemory"].fix
    )


async def test_questions_need_the_server_of_the_bus_only(site: Site) -> None:
    async with asking(site.config.redis, site.clients, site.keys) as questions:
        page = await find_connections(questions, ConnectionFilter())
    assert (page.connections, page.silent) == ([], [])


async def test_serve_logs_the_faults_of_each_server(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    home = site.clients.shards.home
    await command(site.clients.home, "CONFIG", "SET", "maxmemory", "100mb")
    await command(site.clients.home, "CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
    with caplog.at_level(logging.INFO):
        await log_faults(site.config, site.clients)
    errors = [each.getMessage() for each in caplog.records if each.levelno == logging.ERROR]
    assert len(errors) == 1
    assert errors[0].startswith(f"{home.name}: ")
    assert "CONFIG SET maxmemory-policy noeviction" in errors[0]
    # Weaknesses are one line per server.
    await command(site.clients.home, "CONFIG", "SET", "maxmemory", "0")
    caplog.clear()
    with caplog.at_level(logging.INFO):
        await log_faults(site.config, site.clients)
    (line,) = [each.getMessage() for each in caplog.records if each.levelno == logging.INFO]
    # Redis 7.0 has the weakness redis.version, too.
    assert line.startswith(f"Redis at {home.name} has weaknesses (")
    assert line.endswith("redis.maxmemory): run relay doctor")


def request(site: Site, query: str) -> ApiRequest:
    """Return a request of the console to a worker of this site."""
    bus = ClusterBus(
        shards=site.clients.shards, redis=site.config.redis, keys=site.keys, instance="test:1:1"
    )
    unused = cast("Any", None)
    services = ConsoleServices(
        config=lambda: site.config,
        clients=site.clients,
        keys=site.keys,
        publish=unused,
        presence=unused,
        store=unused,
        attempts=unused,
        questions=Questions(bus, client=site.clients.home, keys=site.keys, spawn=unused),
        examine=unused,
    )
    return ApiRequest(make_mocked_request("GET", f"/console/api/?{query}"), services)


async def test_the_console_shows_channels_without_the_server_of_the_workers(
    homeless: Site,
) -> None:
    (other,) = {*homeless.there} - {homeless.away}
    named = "&".join(f"channel={name}" for name in NAMES)
    for query in (named, "count=200", "count=200&cursor=1"):
        found = cast("Any", await channels(request(homeless, query)))
        assert {each["channel"] for each in found["channels"]} <= homeless.there[other]
        assert all(each["followers"] is None for each in found["channels"])
        (problem,) = found["missing"]
        assert homeless.away in problem
        if query == named:
            assert len(found["channels"]) == len(homeless.there[other])
    shown = cast("Any", await console_overview(request(homeless, "")))
    assert homeless.away in shown["redis_error"]
    assert [each["address"] for each in shown["servers"] if "error" not in each] == [other]


async def test_the_doctor_checks_the_data_of_the_other_servers(site: Site) -> None:
    await command(site.clients.home, "SET", "relay:stream:news", "no stream")
    await command(site.clients.home, "XADD", "relay:stream:other", "*", "data", "1")
    found = {each.name: each for each in await examine(site.config, site.clients, site.keys)}
    assert "relay:stream:other" in found["data.misnamed"].what
    assert QUEUE in found["data.queue"].what
    assert site.away in found["data.unreadable"].what


async def test_the_doctor_checks_the_data_without_the_server_of_the_workers(
    homeless: Site,
) -> None:
    (other,) = {*homeless.there} - {homeless.away}
    server = next(each for each, _ in await homeless.clients.each() if each.name == other)
    client = dict(await homeless.clients.each())[server]
    await command(client, "XADD", "relay:stream:other", "*", "data", "1")
    name = next(iter(homeless.there[other]))
    stream = homeless.keys.stream(name)
    await command(client, "XGROUP", "CREATE", stream, "relay:worker:gone:1", "0")
    found = {
        each.name: each for each in await examine(homeless.config, homeless.clients, homeless.keys)
    }
    assert "relay:stream:other" in found["data.misnamed"].what
    assert QUEUE in found["data.queue"].what
    assert homeless.away in found["data.unreadable"].what
    # Which workers are alive is not known.
    assert "data.orphaned_groups" not in found


async def test_queues_of_the_other_servers_are_counted(site: Site, homeless: Site) -> None:
    for each in (site, homeless):
        metrics = SiteMetrics(each.clients, each.keys, [QUEUE])
        families = {family.name: family.samples for family in await metrics.collected()}
        (other,) = {*each.there} - {each.away}
        counted = {("relay_queue_length", (("queue", QUEUE),)): len(each.there[other])}
        assert families["relay_queue_length"] == counted
        assert ("relay_dead_letter_entries" in families) == (each is site)
