"""Limits and counts per user or per site include all workers and relays."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from pathlib import Path

import pytest

from tests.support.clients import Native, Refused, redis, until
from tests.support.valkey import Server
from tests.support.workers import over_both, running, said, workers

pytestmark = [pytest.mark.redis, pytest.mark.timeout(60)]


async def test_operators_disconnect_and_unsubscribe_over_workers_and_relays(
    valkey: Server, channel: str
) -> None:
    async with running(valkey) as (_, door), running(valkey) as (_, other):
        streams = [*await over_both(door, channel), *await over_both(other, channel)]
        sockets = [await each.ws(channel) for each in (door, other) for _ in range(12)]
        for socket_ in sockets:
            await socket_.next()
        command = ["command", "unsubscribe", "channel", channel, "user", "alice"]
        redis(valkey, "XADD", "relay:control", "*", *command)
        for stream in streams:
            assert [block.event for block in await stream.ended()] == ["relay:revoked"]
        for socket_ in sockets:
            notice = await socket_.next()
            assert (notice["notice"], notice["reason"]) == ("revoked", "unsubscribed"), notice
        redis(valkey, "XADD", "relay:control", "*", "command", "disconnect", "user", "alice")
        for socket_ in sockets:
            notices, code = await socket_.closed()
            assert (notices[-1]["reason"], code) == ("disconnected", 4403), json.dumps(notices)


async def _answers(door: Native, channel: str, attempts: int) -> list[str]:
    """Try to connect several times in sequence, and return the results."""
    found = []
    for _ in range(attempts):
        try:
            await door.sse(channel)
            found.append("open")
        except Refused as exc:
            found.append(exc.answer.error["code"])
    return found


async def test_the_connections_of_a_user_are_limited_over_workers_and_relays(
    valkey: Server, channel: str
) -> None:
    limit = "hub.connections_per_user=5"
    async with running(valkey, limit) as (_, door), running(valkey, limit) as (_, other):
        opened = [await each.sse(channel) for each in (door, other, door, other, door)]
        assert await _answers(door, channel, 6) == ["limit_exceeded"] * 6
        assert await _answers(other, channel, 6) == ["limit_exceeded"] * 6
        refused, code = await (await other.ws(channel)).closed()
        assert (refused[-1]["error"]["code"], code) == ("limit_exceeded", 4429)
        # A client that disconnects makes room on any worker.
        opened[0].drop()
        async with asyncio.timeout(30):
            while await _answers(other, channel, 1) != ["open"]:
                pass
        assert await _answers(door, channel, 3) == ["limit_exceeded"] * 3
        # The limit also holds for simultaneous attempts. A rejected attempt is counted for a moment
        # and may cause another rejection.
        for stream in [*opened, *other.streams]:
            stream.drop()
        await until(lambda: not any(_counts(valkey)))
        async with asyncio.TaskGroup() as tasks:
            several = [tasks.create_task(_answers(door, channel, 3)) for _ in range(4)]
            several += [tasks.create_task(_answers(other, channel, 3)) for _ in range(4)]
        got_in = sum(task.result().count("open") for task in several)
        assert 1 <= got_in <= 5
        await until(lambda: sum(_counts(valkey)) == got_in)
        assert await _answers(door, channel, 6 - got_in) == ["open"] * (5 - got_in) + [
            "limit_exceeded"
        ]


def _counts(server: Server) -> list[int]:
    keys = redis(server, "KEYS", "relay:users:*")
    return [int(count) for key in keys for count in redis(server, "HVALS", key)]


async def test_the_connections_of_a_killed_worker_are_not_counted(
    valkey: Server, channel: str
) -> None:
    async with running(valkey, "hub.connections_per_user=8") as (relay, door):
        streams = await over_both(door, channel, 8)
        assert await _answers(door, channel, 1) == ["limit_exceeded"]
        for number in (1, 2):
            os.kill(workers(relay)[number], signal.SIGKILL)
            await said(relay, f"Worker {number} exited")
        for stream in streams:
            with pytest.raises((asyncio.IncompleteReadError, ConnectionError, EOFError)):
                await stream.next()
        await said(relay, "ready (pid", 4)
        assert await _answers(door, channel, 9) == ["open"] * 8 + ["limit_exceeded"]


async def test_a_limit_holds_from_a_reload_on(valkey: Server, tmp_path: Path, channel: str) -> None:
    file = tmp_path / "relay.ini"
    file.write_text("")
    async with running(valkey, flags=["-c", str(file)]) as (relay, door):
        await over_both(door, channel, 4)
        assert not redis(valkey, "KEYS", f"relay:users:*_{relay.port}-*")
        file.write_text("[hub]\nconnections_per_user = 6\n")
        relay.send(signal.SIGHUP)
        await said(relay, "Configuration reloaded", 2)
        await until(lambda: sum(_counts(valkey)) == 4)
        assert await _answers(door, channel, 4) == ["open"] * 2 + ["limit_exceeded"] * 2
