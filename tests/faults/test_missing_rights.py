"""A Redis that rejects some of relay's commands: one line names them, and the rest works."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import aiohttp
import pytest

from relay.core.errors import RedisUnavailable
from relay.stream.connection.connect import discover
from relay.stream.connection.pipeline_connection import PipelineConnection
from tests.support.centrifugo_client import SECRET, centrifugo
from tests.support.cli import Cli
from tests.support.clients import native, redis, until
from tests.support.relay import ROOT, RelayProcess
from tests.support.valkey import Flavour, Server, free_port, running

pytestmark = [pytest.mark.redis, pytest.mark.timeout(90)]
LINE = "rejects commands of relay ("


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("valkey"), options=("--appendonly", "no"))
    with running(server):
        yield server


@asynccontextmanager
async def relay_without(server: Server, *rules: str) -> AsyncIterator[RelayProcess]:
    """Run a relay whose Redis user has these additional ACL rules at the start."""
    redis(server, "FLUSHALL")
    redis(server, "ACL", "LOAD")
    if rules:
        redis(server, "ACL", "SETUSER", "relay", *rules)
    relay = RelayProcess(server)
    try:
        await asyncio.to_thread(relay.start)
        yield relay
    finally:
        await asyncio.to_thread(relay.kill)
        redis(server, "ACL", "LOAD")


async def readyz(relay: RelayProcess) -> tuple[int, str]:
    async with aiohttp.ClientSession() as http, http.get(f"{relay.url}/readyz") as reply:
        return reply.status, await reply.text()


async def ready_when(relay: RelayProcess, status: int, text: str, *, shown: bool = True) -> None:
    async with asyncio.timeout(30):
        while True:
            found, body = await readyz(relay)
            if found == status and (text in body) is shown:
                return
            await asyncio.sleep(0.05)


def errors(relay: RelayProcess) -> list[str]:
    return [line for line in relay.log if " error " in line]


def newest_connection(server: Server) -> int:
    """Return the ID of the newest connection that is logged in as relay. 0 means there is none."""
    clients = redis(server, "CLIENT LIST")
    return max((int(each["id"]) for each in clients if each["user"] == "relay"), default=0)


def _is_connected_since(server: Server, connection: int) -> bool:
    return newest_connection(server) > connection


def reconnect(server: Server) -> None:
    redis(server, "CLIENT", "KILL", "USER", "relay")


@pytest.mark.parametrize(
    ("rules", "named", "loss"),
    [
        (["-xreadgroup"], "xreadgroup", "streams are read without consumer groups"),
        (["-multi"], "multi", "streams are read without consumer groups"),
        (["-exec"], "exec", "streams are read without consumer groups"),
        (["-xgroup"], "xgroup|create, xgroup|setid", "streams are read without consumer groups"),
        (["-client"], "client|tracking", "streams are polled"),
        (["-subscribe"], "subscribe", "no ephemeral events"),
        (["-evalsha", "-script"], "evalsha, script|load", "publishing with a uid is rejected"),
        (["-sadd"], "sadd", "other workers and relay status"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
async def test_one_line_names_what_is_missing_and_the_rest_works(
    server: Server, rules: list[str], named: str, loss: str
) -> None:
    async with relay_without(server, *rules) as relay, native(relay) as door:
        # Missing at the start.
        (line,) = errors(relay)
        assert LINE in line
        assert f"{named}: {loss}" in line.replace(" (key relay:nodes)", "")
        assert line.endswith("section 'Create Redis users'")
        assert any(line.startswith("relay is ready on") for line in relay.log)
        assert (await readyz(relay))[1].startswith("ready\nRedis rejects commands of relay")
        client = await door.sse("news")
        relay.xadd("news", data="1")
        assert (await client.next()).json() == 1
        # Restored at a reconnect.
        redis(server, "ACL", "LOAD")
        reconnect(server)
        await ready_when(relay, 200, "rejects", shown=False)
        assert any("accepts all commands of relay again" in line for line in relay.log)
        relay.xadd("news", data="2")
        assert (await client.next()).json() == 2
        # Missing at a reconnect.
        redis(server, "ACL", "SETUSER", "relay", *rules)
        reconnect(server)
        await ready_when(relay, 200, "rejects")
        relay.xadd("news", data="3")
        assert (await client.next()).json() == 3
        # The same line within a minute is counted, not repeated.
        assert errors(relay) == [line]


@pytest.mark.parametrize("rule", ["-xinfo", "-xrange", "-hmget"])
async def test_a_relay_that_cannot_read_is_not_ready(server: Server, rule: str) -> None:
    async with relay_without(server, rule) as relay, native(relay) as door:
        assert (await readyz(relay))[0] == 503
        assert not any(line.startswith("relay is ready on") for line in relay.log)
        (line,) = errors(relay)
        assert f"{rule[1:]}" in line
        assert "no stream can be read" in line
        redis(server, "ACL", "LOAD")
        reconnect(server)
        await until(lambda: any(line.startswith("relay is ready on") for line in relay.log), 30)
        client = await door.sse("news")
        relay.xadd("news", data="1")
        assert (await client.next()).json() == 1


async def test_rights_change_without_a_new_connection(server: Server) -> None:
    async with relay_without(server) as relay, native(relay) as door:
        client = await door.sse("news")
        redis(server, "ACL", "SETUSER", "relay", "-xreadgroup", "-publish", "-subscribe")
        relay.xadd("news", data="1")
        assert (await client.next()).json() == 1
        await ready_when(relay, 200, "publish: ephemeral events are not sent")
        # A command that is used rarely: another channel is followed.
        redis(server, "ACL", "SETUSER", "relay", "+xreadgroup", "+publish")
        await ready_when(relay, 200, "publish: ephemeral", shown=False)
        await door.sse("other")
        await ready_when(relay, 200, "subscribe: no ephemeral events")
        assert any("xreadgroup: streams are read" in line for line in errors(relay))
        redis(server, "ACL", "LOAD")
        # Nothing remains from a command that is accepted again.
        await ready_when(relay, 200, "Redis", shown=False)
        relay.xadd("news", data="2")
        assert (await client.next()).json() == 2
        assert "Traceback" not in "".join(relay.log)


async def test_status_shows_what_is_missing(server: Server) -> None:
    async with relay_without(server, "-publish") as relay:
        assert (await readyz(relay))[0] == 200
        cli = Cli(server)
        async with asyncio.timeout(30):
            while "publish: ephemeral events are not sent" not in (await cli.run("status")).stderr:
                await asyncio.sleep(0.1)


def _has_new(relay: RelayProcess, count: int, text: str) -> bool:
    return any(text in line for line in relay.log[count:])


async def test_a_rotated_password_is_used_after_a_reload(server: Server, tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_text("relay-secret\n")
    relay = RelayProcess(
        server,
        settings=[f"redis.password_file={file}"],
        flags=["--redis", f"redis://relay@127.0.0.1:{server.port}/0"],
    )
    await asyncio.to_thread(relay.start)
    try:
        for password in ("second", "third"):
            redis(server, "ACL", "SETUSER", "relay", "resetpass", f">{password}")
            file.write_text(f"{password}\n")
            count = len(relay.log)
            relay.send(signal.SIGHUP)
            await until(partial(_has_new, relay, count, "reloaded"))
            assert not _has_new(relay, count, "at a restart")
            before = newest_connection(server)
            reconnect(server)
            # The time without a connection can be too short to be seen in /readyz.
            await until(partial(_is_connected_since, server, before), 30)
            await ready_when(relay, 200, "ready")
            async with native(relay) as door:
                client = await door.sse(password)
                relay.xadd(password, data="1")
                assert (await client.next()).json() == 1
        # The clients of redis-py use it too.
        assert not errors(relay)
        await until(lambda: redis(server, "EXISTS", *redis(server, "KEYS", "relay:node:*")))
    finally:
        await asyncio.to_thread(relay.kill)
        redis(server, "ACL", "LOAD")


@pytest.mark.parametrize("rules", [["-info"], ["resetpass", ">another"]], ids=" ".join)
async def test_a_rejected_login_is_named_and_tried_again(server: Server, rules: list[str]) -> None:
    async with relay_without(server) as relay, native(relay) as door:
        redis(server, "ACL", "SETUSER", "relay", *rules)
        reconnect(server)
        await ready_when(relay, 503, "not being read")
        advice = "Check user and password in" if len(rules) > 1 else "Compare the ACL user"
        await until(lambda: any(advice in line for line in relay.log))
        redis(server, "ACL", "LOAD")
        await ready_when(relay, 200, "ready")
        client = await door.sse("news")
        relay.xadd("news", data="1")
        assert (await client.next()).json() == 1


async def test_an_idle_relay_without_rights_asks_at_most_twice_as_often(server: Server) -> None:
    async def commands_in(seconds: float) -> int:
        before = redis(server, "INFO", "stats")["total_commands_processed"]
        await asyncio.sleep(seconds)
        return int(redis(server, "INFO", "stats")["total_commands_processed"] - before)

    async with relay_without(server) as relay:
        assert (await readyz(relay))[0] == 200
        usual = await commands_in(3)
    async with relay_without(server, "-client", "-subscribe", "-xreadgroup") as relay:
        assert (await readyz(relay))[0] == 200
        assert await commands_in(3) <= 2 * usual + 50


@pytest.mark.parametrize(
    ("flavour", "command", "loss"),
    [
        ("valkey", "XREADGROUP", "xreadgroup: streams are read without consumer groups"),
        # The connection stays in its transaction if EXEC does not exist.
        ("redis", "EXEC", "exec: streams are read without consumer groups"),
        ("redis", "SCRIPT", "script|load: publishing with a uid is rejected"),
    ],
)
async def test_a_renamed_command_is_named(
    tmp_path: Path, flavour: Flavour, command: str, loss: str
) -> None:
    renamed = Server(tmp_path, flavour, options=("--rename-command", command, ""))
    with running(renamed):
        relay = RelayProcess(renamed, settings=[f"protocol:centrifugo.secret={SECRET}"])
        await asyncio.to_thread(relay.start)
        try:
            async with native(relay) as door, centrifugo(relay.url) as site:
                client = await door.sse("news")
                relay.xadd("news", data="1")
                assert (await client.next()).json() == 1
                assert (await site.api("publish", channel="news", data=2))["error"] is None
                assert (await client.next()).json() == 2
                (line,) = errors(relay)
                assert loss in line
                assert "Traceback" not in "".join(relay.log)
        finally:
            await asyncio.to_thread(relay.kill)


class OldRedis:
    """Answers as Redis 6.2 does to a greeting: no such server can be installed here."""

    info = b"# Server\r\nredis_version:6.2.14\r\nredis_mode:standalone\r\nrun_id:1\r\n"

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer):
            while line := await reader.readline():
                words = [await self._word(reader) for _ in range(int(line[1:]))]
                match words[0].upper():
                    case b"HELLO":
                        writer.write(b"%2\r\n+server\r\n+redis\r\n+version\r\n+6.2.14\r\n")
                    case b"INFO":
                        writer.write(b"$%d\r\n%s\r\n" % (len(self.info), self.info))
                    case _:
                        writer.write(b"+OK\r\n")
                await writer.drain()

    @staticmethod
    async def _word(reader: asyncio.StreamReader) -> bytes:
        size = int((await reader.readline())[1:])
        return (await reader.readexactly(size + 2))[:-2]


@pytest.mark.parametrize("workers", ["1", "2"])
async def test_a_redis_before_7_is_named_at_the_start(workers: str) -> None:
    async with await asyncio.start_server(OldRedis().answer, "127.0.0.1", port := free_port()):
        words = ["--redis", f"redis://127.0.0.1:{port}", "--set", "log.level=error"]
        words += ["--port", "0", "--workers", workers]
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "relay", "serve", *words),
            cwd=ROOT,
            env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)},
            stderr=asyncio.subprocess.PIPE,
        )
        _, error = await process.communicate()
    assert process.returncode == 1
    expected = f"127.0.0.1:{port} is Redis 6.2.14; relay needs Redis 7.0 or newer, or Valkey"
    assert error.count(b"\n") == 1, error
    assert expected in error.decode()


async def test_a_redis_before_7_is_named_at_a_reconnect(server: Server) -> None:
    async with await asyncio.start_server(OldRedis().answer, "127.0.0.1", port := free_port()):
        settings = server.settings().model_copy(update={"url": f"redis://127.0.0.1:{port}"})
        with pytest.raises(RedisUnavailable, match=r"is Redis 6.2.14; relay needs Redis 7.0"):
            await PipelineConnection.open(await discover(settings), settings=settings)
