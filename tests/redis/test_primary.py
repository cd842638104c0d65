"""stream/connection/primary.py on real servers: starts, promotions, new replicas."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import cast

import pytest

from relay.stream.connection.connect import discover
from relay.stream.connection.pipeline_connection import PipelineConnection
from relay.stream.connection.primary import (
    Primaries,
    Primary,
    Replication,
    certificate_of,
)
from tests.support.clients import until
from tests.support.valkey import Flavour, Server, running

pytestmark = pytest.mark.redis


@asynccontextmanager
async def opened(server: Server) -> AsyncIterator[PipelineConnection]:
    settings = server.settings()
    connection = await PipelineConnection.open(await discover(settings), settings=settings)
    try:
        yield connection
    finally:
        connection.close()


async def observe(primary: Primary, connection: PipelineConnection) -> None:
    info = cast(bytes, await connection.call("INFO", "replication"))
    primary.observe(Replication.parse(info))


@pytest.mark.parametrize("flavour", ["valkey", "redis"])
@pytest.mark.parametrize("options", [("--appendonly", "yes"), ("--appendonly", "no")])
async def test_entries_may_have_been_lost_before_a_start(
    tmp_path: Path, flavour: Flavour, options: tuple[str, ...]
) -> None:
    """A server does not report whether it has loaded all of its data."""
    server = Server(tmp_path, flavour, options=options)
    primary = Primary()
    certificates: list[int] = []
    with running(server):
        for how in ("kill", "kill", "stop", "stop"):
            async with opened(server) as connection:
                primary.connected(connection.run_id, connection.replication)
            assert not any(primary.is_without_loss_since(each) for each in certificates)
            certificates.append(primary.certificate)
            await asyncio.to_thread(server.client().save)
            await asyncio.to_thread(getattr(server, how))
            await asyncio.to_thread(server.start)
            primary.disconnected()
    assert len(set(certificates)) == 4


@pytest.mark.parametrize("flavour", ["valkey", "redis"])
async def test_a_first_replica_changes_the_replication_id_and_loses_nothing(
    tmp_path: Path, flavour: Flavour
) -> None:
    server = Server(tmp_path / "primary", flavour)
    replica = Server(tmp_path / "replica", flavour, replica_of=server)
    away = Server(tmp_path / "away", flavour)
    clock = [0.0]
    primary, late = Primary(lambda: clock[0]), Primary()
    with running(server):
        async with opened(server) as connection:
            primary.connected(connection.run_id, connection.replication)
            before = primary.certificate
            with running(replica):
                await until(lambda: server.client().info("replication")["connected_slaves"] == 1)
                await observe(primary, connection)
                assert primary.certificate != before
                assert primary.is_without_loss_since(before)
                late.connected(connection.run_id, connection.replication)
                await observe(late, connection)
                alone = primary.certificate
                # Promoted: entries that the primary acknowledged meanwhile may be missing here.
                replica.client().replicaof("NO", "ONE")
                async with opened(replica) as other:
                    promoted = Primary()
                    promoted.connected(other.run_id, other.replication)
                    assert not promoted.is_without_loss_since(alone)
        primary.disconnected()
        clock[0] += 10
        async with opened(server) as connection:
            primary.connected(connection.run_id, connection.replication)
            assert primary.is_without_loss_since(before)
            # The same process was a replica for a moment and was promoted again.
            with running(away):
                server.client().replicaof("127.0.0.1", away.port)
                server.client().replicaof("NO", "ONE")
            await observe(primary, connection)
            assert not primary.is_without_loss_since(before)
            assert not primary.is_without_loss_since(alone)
            last = primary.certificate
        primary.disconnected()
        clock[0] += 3600
        async with opened(server) as connection:
            primary.connected(connection.run_id, connection.replication)
            assert primary.is_without_loss_since(last)
            assert not primary.is_without_loss_since(before)


def test_streams_that_were_moved_here() -> None:
    """The cases are those of slots of a Redis Cluster."""
    one, two, other = (b"1" * 40, b"2" * 40, b"3" * 40)

    def connect(primaries: Primaries, replid: bytes, previous: bytes = b"") -> Primary:
        primary = Primary(others=primaries)
        primary.connected(b"run of " + replid, Replication(b"master", replid, previous))
        return primary

    primaries = Primaries()
    source, target = connect(primaries, one), connect(primaries, two, other)
    primaries.is_starting = False
    added = connect(primaries, other)
    for primary in (target, added):
        assert primary.is_without_loss_since(source.certificate)
        assert not primary.is_without_loss_since(certificate_of(b"9" * 40))
    source.disconnected()
    assert not target.is_without_loss_since(source.certificate)
    source.connected(b"run of " + one, Replication(b"master", one, b""))
    assert target.is_without_loss_since(source.certificate)
    # Its replica was promoted. Streams may have been moved to it before that.
    promoted = connect(primaries, b"4" * 40, two)
    assert not promoted.is_without_loss_since(source.certificate)
    assert promoted.is_without_loss_since(source.certificate, source.kept())
    # And from it to the others.
    assert not added.is_without_loss_since(source.certificate)
