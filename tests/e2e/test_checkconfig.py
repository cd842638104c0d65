"""`checkconfig` rejects what `serve` rejects, with the same line: both run the same checks."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import pytest

from tests.support.relay import KEY, ROOT
from tests.support.valkey import Server, free_port

pytestmark = [pytest.mark.redis, pytest.mark.timeout(60)]


async def run(*words: str, **environment: str) -> tuple[int, str]:
    """Exit code and standard error of one command."""
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


@pytest.mark.parametrize(
    "sets",
    [
        ["protocol:socketio.secret=short"],
        ["protocol:socketio.namespace=/x", "producer:socketio_emitter.namespace=/y"],
        ["protocol:native.port={port}", "server.port={port}"],
        ["producer:seaf_hooks.redis_url=http://seafile"],
        ["protocol:centrifugo.secret=the one that signs X-API-Sign"],
    ],
    ids=lambda sets: sets[0].partition("=")[0],
)
async def test_the_same_line_as_serve(valkey: Server, sets: list[str]) -> None:
    words = ["--set", f"redis.url={valkey.url('relay')}", "--set", f"jwt.key={KEY}"]
    words += ["--set", "log.level=error"]
    port = free_port()
    for each in ["server.port=0", *sets]:
        words += ["--set", each.format(port=port)]
    async with asyncio.TaskGroup() as tasks:
        checking = tasks.create_task(run("checkconfig", *words))
        serving = tasks.create_task(run("serve", *words))
    checked, served = checking.result(), serving.result()
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


async def test_checkconfig_neither_listens_nor_connects(tmp_path: Path) -> None:
    code, text = await run("checkconfig", "--set", "redis.url=redis://127.0.0.1:1/0")
    assert (code, text) == (0, "")
    code, text = await run("checkconfig", "--set", f"redis.embedded_dir={tmp_path / 'data'}")
    assert (code, text) == (0, "")
    assert not (tmp_path / "data").exists()
