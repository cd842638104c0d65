"""Events that PHP, shell and Node spool during an outage arrive once and in order, despite
kills."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from producers.publisher import AsyncPublisher, PublishFailed
from producers.spool import Spool
from tests.support.clients import redis, stream_key, until
from tests.support.producer import ProducerProcess
from tests.support.relay import RelayProcess
from tests.support.tools import TOOLS, Tool
from tests.support.valkey import Server, User, free_port, running

pytestmark = [pytest.mark.redis, pytest.mark.timeout(120)]
# An unreachable Redis is detected at once. The rest is for the lock, on a busy machine.
EASY = ("--limit-ms", "9000")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """Run a server that the test may freeze and kill."""
    server = Server(tmp_path / "valkey")
    with running(server):
        yield server


@pytest.fixture
def spool(tmp_path: Path) -> Path:
    return tmp_path / "spool"


@asynccontextmanager
async def delivering(
    server: Server, spool: Path, user: User = "producer"
) -> AsyncIterator[ProducerProcess]:
    process = ProducerProcess(server, "spool")
    process.command[4:] = [str(spool), "--redis", server.url(user)]
    process.start()
    try:
        yield process
    finally:
        await asyncio.to_thread(process.kill)


async def delivered(server: Server, spool: Path) -> list[str]:
    await until(lambda: not spool.stat().st_size, 60)
    return data(server)


def data(server: Server) -> list[str]:
    found = redis(server, "XRANGE", stream_key("news"), "-", "+")
    return [fields[b"data"].decode() for _, fields in found]


@pytest.mark.parametrize("how", ["frozen", "dead"])
async def test_what_each_tool_spooled_arrives_in_order_once(
    server: Server, spool: Path, how: str
) -> None:
    tools = [Tool.of(name, server) for name in TOOLS]
    kept = ("--spool", str(spool))
    sent = ["before"]
    assert (await tools[0].run("news", "before", *EASY, *kept)).code == 0
    server.freeze() if how == "frozen" else server.kill()
    for number in range(4):
        for tool in tools:
            # Only the reply to the first one may be lost: it is late, and the event appears once.
            done = await tool.run("news", f"{tool.name} {number}", *kept)
            assert done.code == 3, done
            assert not done.out
            assert len(done.err.splitlines()) == 1
            assert ("the spool contains earlier events" in done.err) == (len(sent) > 1)
            sent.append(f"{tool.name} {number}")
    await asyncio.to_thread(server.thaw if how == "frozen" else server.start)
    late = await tools[1].run("news", "behind", *EASY, *kept)
    assert late.code == 3, "no event overtakes those that wait"
    async with delivering(server, spool):
        assert await delivered(server, spool) == [*sent, "behind"]
    for tool in tools:
        assert (await tool.run("news", "after", *EASY, *kept)).code == 0
    assert data(server) == [*sent, "behind", *["after"] * 3]


@pytest.mark.parametrize("name", TOOLS)
async def test_a_line_says_all_that_was_given(server: Server, spool: Path, name: str) -> None:
    tool = Tool.of(name, server)
    server.kill()
    hard = 'a"b\\c\td\x01\x7f\r\n$HOME `x` %s \\n zwölf 🎻\n\n'
    options = ("--type", 't"y', "--uid", "u\\1", "--to", '["Anna Li","bob"]', "--client", "c\\n")
    assert (await tool.run("a:\\n", hard, *options, "--spool", str(spool), *EASY)).code == 3
    again = await tool.run("b", "-", "--spool", str(spool), *EASY, given=hard)
    assert again.code == 3
    first, second = Spool(spool, limit_s=1, limit_bytes=1 << 20).batch().lines
    assert first.event is not None
    assert second.event is not None
    assert first.event.channel == "a:\\n"
    assert first.event.data.decode() == second.event.data.decode() == hard
    assert (first.event.type, first.event.uid, first.event.client) == ('t"y', "u\\1", "c\\n")
    assert first.event.to == ("user:Anna Li", "user:bob")
    assert len(second.event.uid or "") >= 32
    assert spool.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("name", TOOLS)
async def test_twenty_at_once_lose_nothing_and_repeat_nothing(
    server: Server, spool: Path, name: str
) -> None:
    tool = Tool.of(name, server)
    server.kill()
    async with asyncio.TaskGroup() as tasks:
        calls = [
            tasks.create_task(tool.run("news", str(number), "--spool", str(spool), *EASY))
            for number in range(20)
        ]
    assert [call.result().code for call in calls] == [3] * 20
    await asyncio.to_thread(server.start)
    async with delivering(server, spool):
        assert sorted(map(int, await delivered(server, spool))) == list(range(20))


async def test_a_delivery_that_is_killed_again_and_again_keeps_order_and_repeats_nothing(
    server: Server, spool: Path
) -> None:
    server.kill()
    tool = Tool.of("sh", server)
    assert (await tool.run("news", "0", "--spool", str(spool), *EASY)).code == 3
    count = 20_000
    line = json.loads(spool.read_bytes())
    with spool.open("a") as file:
        for number in range(1, count):
            file.write(json.dumps({**line, "uid": f"n{number}", "data": str(number)}) + "\n")
    await asyncio.to_thread(server.start)
    kills = 0
    reached = 0
    while reached < count and kills < 4:
        async with delivering(server, spool) as process:

            def killed(beyond: int = reached) -> bool:
                found: int = redis(server, "XLEN", stream_key("news"))
                if found > beyond:
                    process.kill()
                return found > beyond

            # In the same thread, because the delivery takes less than a second.
            await until(killed, 30)
        kills += 1
        reached = redis(server, "XLEN", stream_key("news"))
    assert kills >= 2, "delivered before it could be killed"
    async with delivering(server, spool):
        assert await delivered(server, spool) == [str(number) for number in range(count)]


async def test_an_answer_that_was_lost_makes_no_second_event(server: Server, spool: Path) -> None:
    tool = Tool.of("php", server)
    server.freeze()  # data that was sent waits in the socket and is executed afterwards
    assert (await tool.run("news", "1", "--spool", str(spool))).code == 3
    server.thaw()
    async with delivering(server, spool):
        assert await delivered(server, spool) == ["1"]


@pytest.mark.parametrize("name", TOOLS)
async def test_a_spool_that_cannot_be_written_is_a_clear_error(
    server: Server, tmp_path: Path, name: str
) -> None:
    tool = Tool.of(name, server)
    server.kill()
    (tmp_path / "full").symlink_to("/dev/full")
    for place, reason in (
        ("missing/spool", "(?i)no such file|nonexistent"),
        (".", "(?i)directory"),
        ("full", "(?i)no space|I/O error|errno=28"),
    ):
        done = await tool.run("news", "1", "--spool", str(tmp_path / place), *EASY)
        assert done.code == 1, done
        assert len(done.err.splitlines()) == 1
        assert re.search(reason, done.err), done.err
        assert "spool" in done.err


@pytest.mark.parametrize("name", TOOLS)
async def test_a_disk_with_room_for_a_part_keeps_what_was_there(
    server: Server, spool: Path, name: str
) -> None:
    tool = Tool.of(name, server)
    server.kill()
    assert (await tool.run("news", "1", "--spool", str(spool), *EASY)).code == 3
    before = spool.read_bytes()
    limited = ["sh", "-c", 'trap "" XFSZ; ulimit -f 1; exec "$@"', "sh", *tool.command()]
    done = await asyncio.to_thread(
        subprocess.run,
        [*limited, "news", "x" * 5000, "--spool", str(spool), *EASY],
        env={"PATH": os.environ["PATH"], **tool.environment},
        capture_output=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 1, done
    assert spool.read_bytes() == before


@pytest.mark.parametrize("name", TOOLS)
async def test_the_end_of_a_writer_that_died_spoils_no_other_line(
    server: Server, spool: Path, name: str
) -> None:
    tool = Tool.of(name, server)
    spool.write_bytes(b'{"channel":"news","da')
    assert (await tool.run("news", "1", "--spool", str(spool), *EASY)).code == 3
    async with delivering(server, spool):
        assert await delivered(server, spool) == ["1"]
    assert "invalid spool line" in spool.with_name("spool.refused").read_text()


@pytest.mark.parametrize("name", TOOLS)
async def test_after_rm_no_line_counts_as_delivered(server: Server, spool: Path, name: str) -> None:
    spool.with_name("spool.state").write_text(f"{9:020} {2:020}\n")
    tool = Tool.of(name, server)
    server.kill()
    assert (await tool.run("news", "1", "--spool", str(spool), *EASY)).code == 3
    assert spool.with_name("spool.state").read_text() == f"{10:020} {0:020}\n"
    await asyncio.to_thread(server.start)
    async with delivering(server, spool):
        assert await delivered(server, spool) == ["1"]


@pytest.mark.parametrize("name", TOOLS)
async def test_what_would_be_refused_later_too_is_an_error_and_no_spool(
    server: Server, spool: Path, name: str
) -> None:
    tool = Tool.of(name, server)
    redis(server, "SET", stream_key("news"), "not a stream")
    done = await tool.run("news", "1", "--spool", str(spool), *EASY)
    assert done.code == 1
    assert "WRONGTYPE" in done.err
    assert not spool.exists()
    tool.environment["RELAY_REDIS_PASSWORD"] = "wrong"
    assert (await tool.run("other", "1", "--spool", str(spool), *EASY)).code == 3


async def test_a_login_without_the_rights_costs_no_event(server: Server, spool: Path) -> None:
    tool = Tool("php", {"RELAY_REDIS_URL": f"redis://127.0.0.1:{free_port()}/0"})
    for number in range(3):
        assert (await tool.run("news", str(number), "--spool", str(spool), *EASY)).code == 3
    redis(server, "ACL", "SETUSER", "poor", "on", ">poor", "~*", "+xadd", "+get", "+set")
    poor = f"redis://poor:poor@127.0.0.1:{server.port}/0"
    async with AsyncPublisher(poor, spool=spool) as publisher:
        with pytest.raises(PublishFailed, match="NOPERM"):
            await publisher.flush()
    assert not spool.with_name("spool.refused").exists()
    async with delivering(server, spool, "relay"):
        assert await delivered(server, spool) == ["0", "1", "2"]


async def test_the_shell_spools_what_http_does_not_take_and_python_delivers_it(
    server: Server, spool: Path
) -> None:
    secret = "the secret of the api"
    tool = Tool("sh", {"PUBLISH_API_SECRET": secret})
    away = f"http://127.0.0.1:{free_port()}"
    for number in range(3):
        options = ("--http", away, "--spool", str(spool), *EASY)
        assert (await tool.run("news", str(number), *options)).code == 3
    relay = RelayProcess(server, settings=[f"protocol:centrifugo.secret={secret}"])
    await asyncio.to_thread(relay.start)
    try:
        async with AsyncPublisher(http=relay.url, secret=secret, spool=spool) as publisher:
            await publisher.flush()
    finally:
        await asyncio.to_thread(relay.kill)
    assert data(server) == ["0", "1", "2"]


async def test_the_relay_delivers_a_spool_of_its_own_host(server: Server, spool: Path) -> None:
    relay = RelayProcess(server, settings=[f"producer:spool.path={spool}"])
    await asyncio.to_thread(relay.start)
    try:
        dead = Tool("php", {"RELAY_REDIS_URL": f"redis://127.0.0.1:{free_port()}/0"})
        assert (await dead.run("news", "1", "--spool", str(spool), *EASY)).code == 3
        assert await delivered(server, spool) == ["1"]
    finally:
        await asyncio.to_thread(relay.kill)
