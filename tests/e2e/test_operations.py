"""Operation of a running relay: health, metrics, signals, logs, TLS and ports."""

from __future__ import annotations

import asyncio
import os
import signal
import ssl
import stat
import subprocess
import sys
import urllib.request
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import aiohttp
import jwt
import pytest

from tests.support.certificate import certificate
from tests.support.clients import (
    Native,
    Refused,
    native,
    publish_ephemeral,
    redis,
    stream_key,
    until,
)
from tests.support.relay import KEY, ROOT, RelayProcess
from tests.support.valkey import Server, free_port

pytestmark = pytest.mark.redis


@asynccontextmanager
async def running(
    server: Server, *settings: str, flags: Sequence[str] = (), key: str = KEY
) -> AsyncIterator[tuple[RelayProcess, Native]]:
    """Run a relay for one test, and yield it with its clients."""
    relay = RelayProcess(server, settings=settings, flags=flags, key=key)
    await asyncio.to_thread(relay.start)
    try:
        async with native(relay) as door:
            yield relay, door
    finally:
        relay.kill()


async def test_health_and_readiness(door: Native) -> None:
    assert (await door.get("/healthz")).status == 200
    assert (await door.get("/readyz")).status == 200


async def test_every_metric_counts_what_clients_received(
    relay: RelayProcess, door: Native, valkey: Server, channel: str
) -> None:
    before = await door.metrics()
    readers = [await door.sse(channel), await door.sse(channel, token=relay.token(channel))]
    for fields in (
        {"data": "1"},
        {"data": "2"},
        {"data": "3", "to": "user:nobody"},
        {"nothing": "here"},
        {"data": "4"},
    ):
        relay.xadd(channel, **fields)
    for reader in readers:
        assert [block.json() for block in await reader.take(3)] == [1, 2, 4]
    await publish_ephemeral(valkey, channel, '{"data":5}')
    for reader in readers:
        assert (await reader.next()).json() == 5
    replay = await door.sse(channel, last="0-0")
    assert [block.json() for block in await replay.take(3)] == [1, 2, 4]
    with pytest.raises(Refused):
        await door.sse(channel, token="bad")
    words = ("command", "unsubscribe", "user", channel, "channel", channel)
    redis(valkey, "XADD", "relay:control", "*", *words)
    assert [block.event for block in await readers[1].ended()] == ["relay:revoked"]
    async with asyncio.timeout(30):
        while (await door.metrics())["relay_dead_letters_total"] == before.get(
            "relay_dead_letters_total", 0
        ):
            await asyncio.sleep(0.01)
    after = await door.metrics()
    for sample, number in {
        "relay_events_total": 5,
        'relay_deliveries_total{way="live"}': 6,
        'relay_deliveries_total{way="ephemeral"}': 2,
        'relay_deliveries_total{way="catch_up"}': 3,
        'relay_notices_total{kind="revoked",reason="unsubscribed"}': 1,
        'relay_rejections_total{protocol="native",reason="unauthorized"}': 1,
        'relay_resumes_total{outcome="complete"}': 1,
        'relay_connections{protocol="native"}': 2,
        "relay_dead_letters_total": 1,
        "relay_subscriptions": 2,
        "relay_catch_up_clients": 0,
        "relay_followed_streams": 1,
        "relay_redis_reconnects_total": 0,
        "relay_lost_wakeups_total": 0,
    }.items():
        assert after.get(sample, 0) - before.get(sample, 0) == number, sample
    sizes = 'relay_delivered_bytes_total{protocol="native"}'
    # One observation for each batch of entries.
    assert after['relay_delivery_lag_seconds_count{protocol="native"}'] >= 1
    assert after[sizes] > before.get(sizes, 0)
    assert after["relay_dead_letter_entries"] >= 1
    assert after[f'relay_redis_up{{server="127.0.0.1:{valkey.port}"}}'] == 1
    assert after["process_open_fds"] > 0
    assert any(name.startswith("relay_build_info{") for name in after)
    assert not [name for name in after if "_created" in name]
    assert after["relay_lag_seconds_count"] > before["relay_lag_seconds_count"]
    assert {name.partition("{")[0] for name in after} >= {"relay_redis_round_trips_total"}
    for reader in (readers[0], replay):
        reader.drop()
    async with asyncio.timeout(30):
        while await door.metric("relay_followed_streams"):
            await asyncio.sleep(0.01)
    assert await door.metric("relay_subscriptions") == 0
    assert await door.metric('relay_connections{protocol="native"}') == 0


async def _becomes(door: Native, status: int) -> None:
    async with asyncio.timeout(30):
        while await door.status("/readyz") != status:
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("how", ["freeze", "kill"])
async def test_readiness_says_the_truth_about_redis(tmp_path: Path, how: str) -> None:
    server = Server(tmp_path).start()
    try:
        async with running(server) as (relay, door):
            client = await door.sse("news")
            server.freeze() if how == "freeze" else server.kill()
            await _becomes(door, 503)
            assert await door.status("/healthz") == 200
            late = await door.sse("news")
            assert late.opened is not None
            assert (late.opened.comment, late.opened.id) == (True, None)
            assert late.opened.retry is not None
            assert 1000 <= late.opened.retry <= 5000
            with pytest.raises(EOFError):
                await late.block()
            server.thaw() if how == "freeze" else await asyncio.to_thread(server.start)
            await _becomes(door, 200)
            if how == "kill":
                assert (await client.next()).event == "relay:reset"
            relay.xadd("news", data="1")
            assert (await client.next()).json() == 1
    finally:
        server.kill()


async def _said(relay: RelayProcess, text: str, count: int = 1) -> None:
    await until(lambda: sum(text in line for line in relay.log) >= count)


async def test_reload_changes_rights_limits_and_keys_and_drops_nobody(
    valkey: Server, tmp_path: Path
) -> None:
    file = tmp_path / "relay.ini"
    new_key = "another test key that is long enough"
    (tmp_path / "keys").write_text(KEY)
    text = f"[jwt]\nkey_file = {tmp_path}/keys\n"
    file.write_text(text)
    async with running(valkey, flags=["-c", str(file)], key="") as (relay, door):
        stream, websocket = await door.sse("open:a"), await door.ws("open:a")
        await websocket.next()
        fresh = jwt.encode({"sub": "bob", "channels": ["*"]}, new_key, algorithm="HS256")
        for token in ("", fresh):
            with pytest.raises(Refused):
                await door.sse("open:a", token=token)

        # Both keys are valid while tokens signed with the old key are in use.
        (tmp_path / "keys").write_text(f"{new_key}\n---\n{KEY}")
        file.write_text(text + "[namespace:open]\nrights = anonymous\n[log]\nlevel = debug\n")
        relay.send(signal.SIGHUP)
        await _said(relay, "reloaded")
        for token in ("", fresh, door.token):
            (await door.sse("open:a", token=token)).drop()
        with pytest.raises(Refused):
            await door.sse("shut:a", token="")

        file.write_text(text + "[namespace:open]\nrights = everyone\n")
        relay.send(signal.SIGHUP)
        await _said(relay, "not reloaded")
        complaint = next(line for line in relay.log if "not reloaded" in line)
        assert "[namespace:open] rights" in complaint
        (await door.sse("open:a", token="")).drop()

        relay.xadd("open:a", data="1")
        assert (await stream.next()).json() == 1
        assert (await websocket.next())["data"] == 1

        # Remove the old key and anonymous access. Clients that depend on either are disconnected.
        anonymous = await door.sse("open:a", token="")
        (tmp_path / "keys").write_text(new_key)
        file.write_text(text)
        relay.send(signal.SIGHUP)
        await _said(relay, " reloaded", 2)
        assert [block.event for block in await anonymous.ended()] == ["relay:revoked"]
        with pytest.raises(Refused):
            await door.sse("open:a")
        (await door.sse("open:a", token=fresh)).drop()


async def test_stop_tells_the_clients_and_takes_the_groups_away(
    valkey: Server, channel: str
) -> None:
    async with running(valkey) as (relay, door):
        streams = [await door.sse(channel) for _ in range(20)]
        websocket = await door.ws(channel)
        await websocket.next()
        assert len(redis(valkey, "XINFO", "GROUPS", stream_key(channel))) == 2
        async with asyncio.TaskGroup() as tasks:
            code = tasks.create_task(asyncio.to_thread(relay.stop))
            told = [tasks.create_task(stream.ended()) for stream in streams]
            closed = await websocket.closed()
        assert closed == ([{"notice": "closing", "reason": "stopping"}], 1001)
        for task in told:
            (block,) = task.result()
            assert (block.event, block.json()) == ("relay:closing", {"reason": "stopping"})
            assert block.retry is not None
            assert block.id is None
        assert code.result() == 0
        groups = redis(valkey, "XINFO", "GROUPS", stream_key(channel))
        assert len(groups) == 1  # the group that marks the stream's incarnation
        assert not redis(valkey, "KEYS", f"relay:node:*_{relay.port}:*")


async def test_a_second_signal_ends_it_at_once(valkey: Server, channel: str) -> None:
    async with running(valkey, "node.drain_per_s=1", "node.drain_s=60") as (relay, door):
        for _ in range(40):
            await door.sse(channel)
        relay.send(signal.SIGTERM)
        # Draining takes a minute here. A balancer sees it while the port is still open. New clients
        # are served until it sends them to another relay. Later they are not answered.
        served_while = []
        with suppress(aiohttp.ClientError, ConnectionError, EOFError):
            while True:
                status = await door.status("/readyz")
                await door.sse(channel)
                served_while.append(status)
        assert 503 in served_while
        assert await asyncio.to_thread(relay.stop) == 1


async def test_the_log_file_is_opened_again(valkey: Server, tmp_path: Path) -> None:
    path, moved = tmp_path / "relay.log", tmp_path / "relay.log.1"
    async with running(valkey, f"log.file={path}", "log.format=json") as (relay, _):
        await until(path.exists)
        path.rename(moved)
        relay.send(signal.SIGUSR1)
        await until(path.exists)
        before = moved.read_text()
        relay.send(signal.SIGHUP)
        await until(lambda: "reloaded" in path.read_text())
        assert moved.read_text() == before


async def test_no_token_and_no_payload_in_the_log(valkey: Server, channel: str) -> None:
    secret = "payload-that-nobody-logs"
    async with running(valkey, "log.level=debug") as (relay, door):
        stream = await door.sse(channel)
        websocket = await door.ws(channel, f"{channel}-b")
        await websocket.take(2)
        await door.get(f"/sse?channel={channel}x&token={door.token}x")
        relay.xadd(channel, data=secret, v="9")
        relay.xadd(channel, nothing=secret)
        relay.xadd(channel, data=secret, type="relay:x")
        redis(valkey, "PUBLISH", f"relay:ephemeral:{{{channel}}}", secret)
        redis(valkey, "XADD", "relay:control", "*", "command", "no-such")
        await websocket.send(cmd="refresh", token=f"{door.token}x")
        await websocket.socket.send_str(secret)
        relay.xadd(channel, data=f'"{secret}"')
        assert (await stream.next()).json() == secret
        await asyncio.to_thread(relay.stop)
        log = "\n".join(relay.log)
        assert "no-such" in log
    assert secret not in log
    # Only the signature is secret. The header and the claims may appear in the log.
    assert door.token.rpartition(".")[2] not in log
    assert KEY not in log
    assert "secret@" not in log


async def test_pid_file(valkey: Server, tmp_path: Path) -> None:
    path = tmp_path / "relay.pid"
    async with running(valkey, f"node.pid_file={path}") as (relay, _):
        assert path.read_text() == f"{relay.pid}\n"
        assert not path.stat().st_mode & stat.S_IWOTH
        await asyncio.to_thread(relay.stop)
        assert not path.exists()


async def test_a_second_start_leaves_the_first_ones_pid_file(
    valkey: Server, tmp_path: Path
) -> None:
    path = tmp_path / "relay.pid"
    async with running(valkey, f"node.pid_file={path}") as (relay, _):
        words = [sys.executable, "-m", "relay", "serve", "--port", "0", "--redis"]
        words += [valkey.url("relay"), "--set", f"node.pid_file={path}"]
        run = await asyncio.to_thread(
            subprocess.run, words, cwd=ROOT, capture_output=True, text=True, timeout=60
        )
        assert run.returncode == 1
        assert f"belongs to process {relay.pid}, which is running" in run.stderr
        assert path.read_text() == f"{relay.pid}\n"
        # A new relay replaces the file of a killed relay.
        await asyncio.to_thread(relay.kill)
        assert path.exists()
        await asyncio.to_thread(relay.start)
        assert path.read_text() == f"{relay.pid}\n"


@pytest.mark.parametrize(("output", "workers"), [("/dev/full", "1"), ("| true", "2")])
async def test_it_serves_although_its_lines_cannot_be_printed(
    valkey: Server, tmp_path: Path, output: str, workers: str
) -> None:
    port, log = free_port(), tmp_path / "relay.log"
    command = f"exec {sys.executable} -m relay serve --port {port} --workers {workers}"
    command += f" --redis {valkey.url('relay')} --set jwt.key='{KEY}' --set node.drain_s=0"
    full = output.startswith("/")
    shell = f"{command} >{output} 2>{log}" if full else f"{{ {command}; }} 2>{log} | true"
    shell += "" if full else "; exit ${PIPESTATUS[0]}"
    process = await asyncio.create_subprocess_exec("bash", "-c", shell, cwd=ROOT)
    try:
        await until(lambda: log.exists() and "Could not print the banner" in log.read_text())
        assert await asyncio.to_thread(_answers, port)
        os.kill(_listener(process.pid), signal.SIGTERM)
        assert await process.wait() == 0
        assert "Traceback" not in log.read_text()
        assert "Exception ignored" not in log.read_text()
    finally:
        if process.returncode is None:
            process.kill()


def _listener(shell: int) -> int:
    """Return the relay's PID: that of the shell, or of the shell's first child in a pipeline."""
    children = Path(f"/proc/{shell}/task/{shell}/children").read_text().split()
    if b"relay" in Path(f"/proc/{shell}/cmdline").read_bytes().split(b"\0")[:4]:
        return shell
    return int(children[0])


def _answers(port: int) -> bool:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz") as answer:
        return bool(answer.status == 200)


async def test_tls(valkey: Server, tmp_path: Path, channel: str) -> None:
    path = certificate(tmp_path)
    context = ssl.create_default_context(cafile=str(path))
    setting = f"server.tls_cert={path}"
    async with running(valkey, setting) as (relay, _), native(relay, tls=context) as door:
        assert await door.status("/readyz") == 200
        stream, websocket = await door.sse(channel), await door.ws(channel)
        await websocket.next()
        relay.xadd(channel, data=f'"{"x" * 100_000}"')
        assert (await stream.next()).json() == (await websocket.next())["data"]


async def test_the_door_and_the_metrics_on_ports_of_their_own(valkey: Server, channel: str) -> None:
    own, metrics = free_port(), free_port()
    settings = [f"protocol:native.port={own}", f"metrics.port={metrics}"]
    async with running(valkey, *settings) as (relay, shared):
        assert await shared.status("/sse") == 404
        assert await shared.status("/metrics") == 404
        async with native(relay, port=own) as door, native(relay, port=metrics) as health:
            client = await door.sse(channel)
            relay.xadd(channel, data="1")
            assert (await client.next()).json() == 1
            assert await door.status("/metrics") == 404
            for name in ("healthz", "readyz", "metrics"):
                assert await health.status(f"/{name}") == 200
            assert await health.status("/sse") == 404


async def test_a_taken_port_is_one_line_and_exit_code_1(relay: RelayProcess) -> None:
    words = [sys.executable, "-m", "relay", "serve", "--port", str(relay.port)]
    words += ["--redis", relay.server.url("relay"), "--set", f"jwt.key={KEY}"]
    run = await asyncio.to_thread(
        subprocess.run, words, cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert run.returncode == 1
    last = run.stderr.strip().splitlines()[-1]
    assert f"port {relay.port}" in last
    assert "--port" in last
    assert "Traceback" not in run.stderr


@pytest.mark.slow
@pytest.mark.timeout(40)
async def test_the_groups_of_a_worker_that_died_are_removed(tmp_path: Path) -> None:
    # Use a separate server: on a shared one, another relay may hold the job's lease.
    server = Server(tmp_path).start()
    try:
        await _dead_groups_go(server, "news")
    finally:
        server.kill()


async def _dead_groups_go(server: Server, channel: str) -> None:
    client = server.client()
    async with running(server, "jobs.dead_nodes_s=1"), running(server) as (dying, door):
        await door.sse(channel)
        relay_groups = redis(server, "XINFO", "GROUPS", stream_key(channel))
        assert len(relay_groups) == 2
        redis(server, "XADD", stream_key(channel), "*", "data", "1")
        os.kill(dying.pid, signal.SIGKILL)
        # Delete the heartbeat instead of waiting 15 s until it expires.
        (key,) = redis(server, "KEYS", f"relay:node:*_{dying.port}:*")
        client.delete(key)
        await until(
            lambda: len(redis(server, "XINFO", "GROUPS", stream_key(channel))) == 1, limit_s=20
        )
        instance = key.removeprefix(b"relay:node:")
        await until(lambda: not client.sismember("relay:nodes", instance))
