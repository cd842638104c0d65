"""Several workers on one port: service, replacement after a crash, and shutdown."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.support.chaos import ChaosClient, produce
from tests.support.clients import Refused, native, redis, until
from tests.support.relay import KEY, ROOT, RelayProcess
from tests.support.valkey import Server, free_port
from tests.support.workers import (
    connections_by_worker,
    neighbours,
    over_both,
    running,
    said,
    workers,
)

pytestmark = [pytest.mark.redis, pytest.mark.timeout(60)]


# ---- service ----------------------------------------------------------------------------


async def test_two_workers_serve_and_say_who_they_are(valkey: Server, channel: str) -> None:
    async with running(valkey) as (relay, door):
        assert sorted(workers(relay)) == [1, 2]
        assert await door.status("/readyz") == 200
        streams = await over_both(door, channel)
        relay.xadd(channel, data="1")
        for stream in streams:
            assert (await stream.next()).json() == 1
        # A scrape adds up both workers, whichever of them it reaches.
        for _ in range(6):
            text = (await door.get("/metrics", Connection="close")).body.decode()
            for each in (1, 2):
                assert f'relay_worker_ready{{worker="{each}"}} 1.0' in text
            assert f'\nrelay_connections{{protocol="native"}} {len(streams)}.0\n' in text
            assert '\nrelay_delivery_lag_seconds_count{protocol="native"} 2.0\n' in text
            assert f'\nrelay_redis_up{{server="127.0.0.1:{valkey.port}"}} 1.0\n' in text
            assert "_created" not in text
        assert min(await connections_by_worker(door, len(streams))) > 0
        names = redis(valkey, "KEYS", f"relay:node:*_{relay.port}-*")
        assert {name.decode().split(":")[2].rpartition("-")[2] for name in names} == {"1", "2"}
        assert any("relay.stream.read.reader[1]: " in line for line in relay.log)
        assert any("relay.stream.read.reader[2]: " in line for line in relay.log)


async def test_clients_are_spread_evenly_and_a_new_worker_gets_its_share(
    valkey: Server, channel: str
) -> None:
    async with running(valkey) as (relay, door):
        await over_both(door, channel, 200)
        counts = await connections_by_worker(door, 200)
        assert max(counts) <= 110
        relay.xadd(channel, data="0")
        for stream in door.streams:
            assert (await stream.next()).json() == 0
        before = await door.metrics()
        os.kill(workers(relay)[1], signal.SIGKILL)
        await said(relay, "Worker 1 ready", 2)
        # The new worker receives most of the reconnecting clients until both have the same number.
        await over_both(door, channel, 100)
        counts = await connections_by_worker(door, 300 - int(counts[0]))
        assert max(counts) <= 1.1 * sum(counts) / 2
        # What the killed worker had counted is kept.
        after = await door.metrics()
        for name in ("relay_events_total", "process_cpu_seconds_total"):
            assert after[name] >= before[name] > 0, name
        relay.xadd(channel, data="1")
        for stream in door.streams[-100:]:
            assert (await stream.next()).json() == 1


# ---- replacement ------------------------------------------------------------------------


async def test_a_killed_worker_is_back_and_its_clients_have_missed_nothing(valkey: Server) -> None:
    rng = random.Random(7)
    channels = [f"killed:{number}" for number in range(10)]
    events = 6000
    totals = dict.fromkeys(channels, events // len(channels))
    async with running(valkey, flags=["--insecure"]) as (relay, door):
        clients = [
            ChaosClient(relay.port, rng.sample(channels, 2), websocket=bool(number % 2))
            for number in range(40)
        ]
        # While this is set, clients do not cut connections. Only the killed worker does.
        stay = asyncio.Event()
        stay.set()
        marks = [threading.Event() for _ in range(2)]

        async def kill(mark: threading.Event, number: int) -> None:
            await asyncio.to_thread(mark.wait)
            os.kill(workers(relay)[number], signal.SIGKILL)
            await said(relay, f"Worker {number} ready", 2)

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(client.run(rng, stay)) for client in clients]
            for client in clients:
                await client.subscribed.wait()
            async with asyncio.TaskGroup() as trouble:
                trouble.create_task(asyncio.to_thread(produce, valkey, channels, events, marks))
                trouble.create_task(kill(marks[0], 1))
                trouble.create_task(kill(marks[1], 2))
            async with asyncio.timeout(30):
                for client in clients:
                    while not client.done(totals):
                        client.progress.clear()
                        await client.progress.wait()
            for task in tasks:
                task.cancel()
        assert await door.status("/readyz") == 200
    for client in clients:
        for name in client.channels:
            assert client.received[name] == list(range(totals[name]))
        assert client.notices == []
    assert any(client.connections > 1 for client in clients)


async def test_no_worker_is_ready_while_one_is_not(valkey: Server) -> None:
    metrics = neighbours()
    async with (
        running(valkey, f"metrics.port={metrics}") as (relay, _),
        native(relay, port=metrics) as first,
        native(relay, port=metrics + 1) as second,
    ):
        for door in (first, second):
            assert await door.status("/readyz") == 200
        # The worker is frozen: its connections stay open, but it does not reply.
        os.kill(workers(relay)[2], signal.SIGSTOP)
        async with asyncio.timeout(30):
            while await first.status("/readyz") == 200:
                await asyncio.sleep(0.02)
        assert (await first.get("/readyz")).body == b"worker 2 is not ready\n"
        # A scrape does not wait for a frozen worker for long, and does not forget what it counted.
        assert await first.metric('relay_worker_ready{worker="2"}') == 0
        os.kill(workers(relay)[2], signal.SIGCONT)
        async with asyncio.timeout(30):
            while await first.status("/readyz") != 200:
                await asyncio.sleep(0.02)
        # Both listeners have the metrics of both workers.
        for door in (first, second):
            assert await door.metric('relay_worker_ready{worker="2"}') == 1


# ---- signals --------------------------------------------------------------------------------


async def test_reload_and_reopen_reach_every_worker(valkey: Server, tmp_path: Path) -> None:
    file, log = tmp_path / "relay.ini", tmp_path / "relay.log"
    file.write_text("")
    async with running(valkey, f"log.file={log}", flags=["-c", str(file)]) as (relay, door):
        with pytest.raises(Refused):
            await door.sse("open:a", token="")
        file.write_text("[namespace:open]\nrights = anonymous\n")
        relay.send(signal.SIGHUP)
        for number in (1, 2):
            mark = f"relay.process.app[{number}]: Configuration reloaded"
            await until(lambda mark=mark: mark in log.read_text())  # type: ignore[misc]
        for _ in range(8):
            (await door.sse("open:a", token="")).drop()
        log.rename(tmp_path / "relay.log.1")
        relay.send(signal.SIGUSR1)
        await until(log.exists)
        relay.send(signal.SIGHUP)
        for number in (1, 2):
            mark = f"relay.process.app[{number}]: Configuration reloaded"
            await until(lambda mark=mark: mark in log.read_text())  # type: ignore[misc]


async def test_stop_tells_the_clients_of_every_worker(valkey: Server, channel: str) -> None:
    async with running(valkey) as (relay, door):
        streams = await over_both(door, channel)
        pids = list(workers(relay).values())
        async with asyncio.TaskGroup() as tasks:
            code = tasks.create_task(asyncio.to_thread(relay.stop))
            told = [tasks.create_task(stream.ended()) for stream in streams]
        assert {task.result()[-1].event for task in told} == {"relay:closing"}
        assert code.result() == 0
        assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
        assert not redis(valkey, "KEYS", f"relay:node:*_{relay.port}-*")


async def test_a_second_signal_ends_every_worker_at_once(valkey: Server, channel: str) -> None:
    async with running(valkey, "node.drain_per_s=1") as (relay, door):
        await over_both(door, channel, 100)
        relay.send(signal.SIGTERM)
        await said(relay, "; stopping", 3)
        pids = list(workers(relay).values())
        assert await asyncio.to_thread(relay.stop) == 1
        await until(lambda: not any(_runs(pid) for pid in pids))


async def test_workers_die_with_their_supervisor(valkey: Server) -> None:
    async with running(valkey) as (relay, _):
        pids = list(workers(relay).values())
        await asyncio.to_thread(relay.kill)
        await until(lambda: not any(_runs(pid) for pid in pids), limit_s=30)
        # The relay's port is free immediately.
        await asyncio.to_thread(relay.start)


def _runs(pid: int) -> bool:
    # A dead process stays a zombie (Z) until its new parent reaps it.
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


# ---- failed starts ----------------------------------------------------------------------


async def _refused(server: Server, *words: str) -> str:
    """Start a relay that must fail. Return the single line of its error."""
    command = [sys.executable, "-m", "relay", "serve", "--workers", "2", "--redis"]
    command += [server.url("relay"), "--set", f"jwt.key={KEY}", "--set", "log.level=error", *words]
    run = await asyncio.to_thread(
        subprocess.run, command, cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert run.returncode == 1
    assert run.stdout == ""
    assert run.stderr.count("\n") == 1, run.stderr
    return run.stderr


async def test_a_taken_port_is_one_line_and_exit_code_1(valkey: Server) -> None:
    async with running(valkey) as (relay, _):
        line = await _refused(valkey, "--port", str(relay.port))
        assert f"port {relay.port}" in line
        own = f"protocol:native.port={relay.port}"
        line = await _refused(valkey, "--port", str(free_port()), "--set", own)
        assert f"port {relay.port}" in line


async def test_what_keeps_a_worker_from_starting_is_said_once(
    valkey: Server, tmp_path: Path
) -> None:
    path = tmp_path / "none.pem"
    line = await _refused(valkey, "--port", "0", "--set", f"server.tls_cert={path}")
    assert "tls_cert" in line


async def test_several_workers_start_on_a_port_that_one_relay_has_just_left(
    valkey: Server, channel: str
) -> None:
    relay = RelayProcess(valkey)
    await asyncio.to_thread(relay.start)
    try:
        async with native(relay) as door:
            await over_both(door, channel)
            # The relay closes first, so each connection stays in TIME_WAIT for a minute.
            assert await asyncio.to_thread(relay.stop) == 0
        relay.flags = ["--workers", "2"]
        await asyncio.to_thread(relay.start)
        assert sorted(workers(relay)) == [1, 2]
    finally:
        relay.kill()


async def test_a_worker_is_replaced_although_the_file_was_broken_since(
    valkey: Server, tmp_path: Path
) -> None:
    file = tmp_path / "relay.ini"
    file.write_text("[namespace:open]\nrights = anonymous\n")
    async with running(valkey, flags=["-c", str(file)]) as (relay, door):
        # The valid reload stays in effect after the reload of a broken file.
        file.write_text("[namespace:open]\nrights = anonymous\n[namespace:b]\nrights = anonymous\n")
        relay.send(signal.SIGHUP)
        for number in (1, 2):
            await said(relay, f"relay.process.app[{number}]: Configuration reloaded")
        file.write_text("[namespace:open]\nrights = everyone\n[server]\nprot = 1\n")
        relay.send(signal.SIGHUP)
        await said(relay, "not reloaded")
        for number in (1, 2):
            os.kill(workers(relay)[number], signal.SIGKILL)
            mark = f"Worker {number} ready"
            await until(lambda mark=mark: sum(mark in line for line in relay.log) == 2, limit_s=30)  # type: ignore[misc]
        async with asyncio.timeout(30):
            while await door.status("/readyz") != 200:
                await asyncio.sleep(0.02)
        for _ in range(8):
            (await door.sse("open:a", "b:a", token="")).drop()
        assert sum("not reloaded" in line for line in relay.log) == 1


@pytest.mark.parametrize("flags", [[], ["--workers", "2"]])
async def test_signals_during_the_start_are_kept_for_later(
    valkey: Server, tmp_path: Path, flags: list[str]
) -> None:
    log = tmp_path / "relay.log"
    relay = RelayProcess(valkey, flags=flags, settings=[f"log.file={log}"])
    try:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(asyncio.to_thread(relay.start))
            await until(lambda: relay._process is not None and _keeps_signals(relay.pid))
            relay.send(signal.SIGUSR1)
            relay.send(signal.SIGHUP)
        await until(lambda: "reloaded" in log.read_text())
    finally:
        relay.kill()


def _keeps_signals(pid: int) -> bool:
    """Return True if relay has blocked SIGHUP or has set its handler.

    It blocks the signal once Python itself has started. On a busy machine, the start may end before
    a test notices that.
    """
    status = Path(f"/proc/{pid}/status").read_text()
    masks = [status.partition(f"{name}:\t")[2].split()[0] for name in ("SigBlk", "SigCgt")]
    return any(int(mask, 16) & 1 << (signal.SIGHUP - 1) for mask in masks)
