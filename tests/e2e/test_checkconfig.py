"""`checkconfig` and `serve` reject the same errors with the same line."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from pathlib import Path

import pytest

from tests.support.cli import run_here
from tests.support.relay import KEY, ROOT, RelayProcess
from tests.support.valkey import Server, free_port

pytestmark = [pytest.mark.redis, pytest.mark.timeout(60)]


async def run(*words: str, **environment: str) -> tuple[int, str]:
    """Run one command, and return its exit code and standard error."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "relay", *words),
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), **environment},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    _, text = await process.communicate()
    assert process.returncode is not None
    return process.returncode, text.decode()


async def check(*words: str, **environment: str) -> tuple[int, str]:
    """Run `relay checkconfig` in this process, which is faster. Return as `run` does."""
    done = await asyncio.to_thread(run_here, ["checkconfig", *words], environment)
    return done.returncode, done.stderr


# Several workers find these only when they start to listen.
LISTENERS = [
    ["server.host=192.0.2.1"],
    ["protocol:native.port={port}", "protocol:native.host=203.0.113.9"],
    ["server.port={taken}"],
    ["metrics.port={taken}"],
    ["protocol:pydio.key=a key of this test", "protocol:pydio.private_port={taken}"],
    ["server.tls_cert=/etc/hostname"],
    ["node.internal_address=203.0.113.9:1234"],
]
SETTINGS = [
    ["protocol:socketio.secret=short"],
    ["producer:socketio_emitter.redis_host=[::1"],
    ["protocol:native.port={port}", "server.port={port}"],
    ["producer:seaf_hooks.redis_url=http://seafile"],
    ["protocol:centrifugo.secret=the one that signs X-API-Sign"],
    ["server.host=no-such-host.invalid"],
    ["metrics.port={port}", "metrics.host=no-such-host.invalid"],
]


@pytest.mark.parametrize(
    ("sets", "workers"),
    [
        *((sets, "1") for sets in (*SETTINGS, *LISTENERS)),
        *((sets, "2") for sets in (*SETTINGS[:1], *LISTENERS)),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
async def test_the_same_line_as_serve(valkey: Server, sets: list[str], workers: str) -> None:
    words = ["--set", f"redis.url={valkey.url('relay')}", "--set", f"jwt.key={KEY}"]
    words += ["--set", "log.level=error", "--set", f"node.workers={workers}"]
    port = free_port()
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = other.getsockname()[1]
        for each in ["server.port=0", *sets]:
            words += ["--set", each.format(port=port, taken=taken)]
        checked = await check(*words)
        served = await run("serve", *words)
    assert checked[0] == 1, checked
    assert checked[1].count("\n") == 1, checked
    assert served == checked


async def test_unknown_variables_are_errors_of_checkconfig_and_of_a_strict_start(
    valkey: Server,
) -> None:
    words = ["--redis", valkey.url("relay"), "--port", "0", "--set", "log.level=error"]
    code, line = await run("checkconfig", RELAY_SERVER_PROT="81")
    assert code == 1
    assert "RELAY_SERVER_PROT: no setting has this name, did you mean RELAY_SERVER_PORT?" in line
    assert await run("serve", "--strict", *words, RELAY_SERVER_PROT="81") == (code, line)


async def test_removed_settings_are_reported_once_and_do_not_stop_a_start(
    valkey: Server, tmp_path: Path
) -> None:
    path = tmp_path / "relay.ini"
    path.write_text("[server]\nbacklog = 100\n[stream]\nresume_concurrency = many\n")
    words = ["-c", str(path), "--set", f"jwt.key={KEY}"]
    words += ["--set", "protocol:native.commands_burst=9"]
    variable = "RELAY_PROTOCOL_SOCKETIO_UPGRADE_TIMEOUT_S"
    expected = (
        f"{path}: [server] backlog is no longer read",
        f"{path}: [stream] resume_concurrency is no longer read",
        "--set protocol:native.commands_burst is no longer read",
        f"environment variable {variable} is no longer read",
    )
    code, lines = await run("checkconfig", *words, **{variable: "1"})
    assert code == 0, lines
    assert [lines.count(each) for each in expected] == [1, 1, 1, 1]
    relay = RelayProcess(valkey, flags=words)
    try:
        relay.start()
    finally:
        relay.kill()
    log = "\n".join(relay.log)
    # The last line concerns an environment variable. RelayProcess passes no variables to relay.
    assert [log.count(each) for each in expected] == [1, 1, 1, 0]


async def test_checkconfig_neither_listens_nor_connects(tmp_path: Path) -> None:
    free = ["--set", "server.port=0", "--set", f"redis.embedded_port={free_port()}"]
    code, text = await check(*free, "--set", "redis.url=redis://127.0.0.1:1/0")
    assert (code, text) == (0, "")
    data = f"redis.embedded_dir={tmp_path / 'data'}"
    code, text = await check(*free, "--set", data)
    assert (code, text) == (0, "")
    assert not (tmp_path / "data").exists()


async def test_the_embedded_port_and_later_metrics_ports_are_checked(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        words = ["--set", "server.port=0", "--set", "log.level=error"]
        words += ["--set", f"redis.embedded_dir={tmp_path / 'data'}"]
        embedded = [*words, "--set", f"redis.embedded_port={port}"]
        code, line = await check(*embedded)
        assert (code, line) == await run("serve", *embedded)
        assert code == 1
        assert f"port {port} of 127.0.0.1 is used by another program" in line
        metrics = [*words, "--set", f"metrics.port={port - 1}", "--set", "node.workers=2"]
        metrics += ["--set", f"redis.embedded_port={free_port()}"]
        code, line = await check(*metrics)
        assert (code, line) == await run("serve", *metrics)
        assert code == 1
        assert f"port {port} of 127.0.0.1 is taken by another process" in line


async def test_the_configuration_of_a_running_relay_is_accepted_with_a_note(
    valkey: Server,
) -> None:
    relay = RelayProcess(valkey, settings=[f"protocol:native.port={free_port()}"])
    await asyncio.to_thread(relay.start)
    words = ["--set", f"server.port={relay.port}", "--set", f"redis.url={valkey.url('relay')}"]
    words += ["--set", relay.settings[0]]
    try:
        code, line = await check(*words)
        assert code == 0
        assert f"a relay is running on port {relay.port} of 127.0.0.1: reload it" in line
        assert line.count("\n") == 1, line
    finally:
        relay.kill()


@pytest.mark.parametrize("workers", ["1", "2"])
async def test_a_redis_cluster_is_named_as_the_problem(tmp_path: Path, workers: str) -> None:
    server = Server(
        tmp_path,
        acl=False,
        options=("--cluster-enabled", "yes", "--cluster-port", str(free_port())),
    )
    await asyncio.to_thread(server.start)
    try:
        words = ["--redis", f"redis://127.0.0.1:{server.port}/0", "--set", "log.level=error"]
        code, line = await run("serve", *words, "--port", "0", "--workers", workers)
    finally:
        server.kill()
    assert code == 1
    assert line.count("\n") == 1, line
    assert f"127.0.0.1:{server.port} runs in cluster mode" in line
    assert f"set url = redis+cluster://127.0.0.1:{server.port}" in line


async def test_a_port_that_another_file_has_set_is_named(valkey: Server, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    port = free_port()
    file.write_text(f'{{"secret": "a secret of this test", "port": "{port}"}}')
    with socket.create_server(("0.0.0.0", port)):  # noqa: S104  # another server
        words = ["-c", str(file), "--set", f"redis.url={valkey.url('relay')}"]
        code, line = await run("serve", *words, "--set", "log.level=error")
    assert code == 1
    assert f"port {port} of :: is taken by another process" in line
    assert f"change [protocol:centrifugo] port (set by {file}: port)" in line
    assert "--port N" not in line
