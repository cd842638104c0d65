"""The operator's commands on a running relay, as the maintenance user of docs/redis.md."""

from __future__ import annotations

import asyncio
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from relay.cli.commands import main
from relay.cli.output import Progress
from tests.support.cli import Cli
from tests.support.clients import Native, redis, stream_key, until
from tests.support.relay import RelayProcess
from tests.support.valkey import Server, free_port, running

pytestmark = [pytest.mark.redis, pytest.mark.timeout(90)]

ID = re.compile(r"\d+-\d+")


@pytest.fixture
def cli(valkey: Server) -> Cli:
    return Cli(valkey)


# ---- publish --------------------------------------------------------------------------------


async def test_what_is_published_reaches_a_client_and_its_id_is_printed(
    cli: Cli, door: Native, channel: str
) -> None:
    client = await door.sse(channel)
    printed = await cli.out("publish", channel, '{"n":12345678901234567890}', "--type", "note")
    event = await client.next()
    assert (event.id, event.event) == (printed.strip(), "note")
    assert event.data == '{"n":12345678901234567890}'


async def test_only_the_recipients_get_it(
    cli: Cli, relay: RelayProcess, door: Native, channel: str
) -> None:
    anna = await door.sse(channel, token=relay.token("anna"))
    kitchen = await door.sse(channel, token=relay.token("ben", groups=["kitchen"]))
    carl = await door.sse(channel, token=relay.token("carl"))
    await cli.out("publish", channel, "1", "--to", "anna,group:kitchen", "--client", "c1")
    await cli.out("publish", channel, "2")
    assert [block.data for block in await anna.take(2)] == ["1", "2"]
    assert [block.data for block in await kitchen.take(2)] == ["1", "2"]
    assert (await carl.next()).data == "2"


async def test_one_uid_is_one_event_however_many_publish_it(
    cli: Cli, valkey: Server, channel: str
) -> None:
    async with asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(
                cli.process("publish", channel, "1", "--uid", "order 7"), name=str(each)
            )
            for each in range(3)
        ]
    (first,) = {task.result().stdout for task in tasks}
    assert redis(valkey, "XLEN", stream_key(channel)) == 1
    (again,) = await cli.objects("publish", channel, "another", "--uid", "order 7")
    assert again == {"channel": channel, "id": first.strip(), "appended": False}
    (other,) = await cli.objects("publish", channel, "1", "--uid", "order 8")
    assert other["appended"]
    assert 500 < redis(valkey, "TTL", f"relay:uid:{{{channel}}}:order 7") <= 600


async def test_the_window_and_the_length_are_those_configured(
    cli: Cli, valkey: Server, channel: str
) -> None:
    sets = ["--set", "publish.uid_window_s=1", "--set", "namespace.retention_count=100"]
    first = await cli.out("publish", channel, "1", "--uid", "u", *sets)
    await until(lambda: not redis(valkey, "EXISTS", f"relay:uid:{{{channel}}}:u"))
    assert await cli.out("publish", channel, "1", "--uid", "u", *sets) != first
    for _ in range(300):
        redis(valkey, "XADD", stream_key(channel), "*", "data", "1")
    await cli.out("publish", channel, "1", *sets)
    assert redis(valkey, "XLEN", stream_key(channel)) < 250


async def test_data_may_come_from_standard_input(cli: Cli, valkey: Server, channel: str) -> None:
    done = await cli.process("publish", channel, "-", stdin="<a>\n ä</a>".encode())
    assert ID.fullmatch(done.stdout.strip())
    ((_, fields),) = redis(valkey, "XRANGE", stream_key(channel), "-", "+")
    assert fields == {b"data": "<a>\n ä</a>".encode()}


async def test_what_no_relay_could_deliver_is_not_published(
    cli: Cli, valkey: Server, channel: str
) -> None:
    assert "reserved type" in await cli.refused("publish", channel, "1", "--type", "relay:x")
    assert "to has no recipients" in await cli.refused("publish", channel, "1", "--to", ",")
    limit = ["--set", "stream.max_entry_bytes=1024"]
    assert "at most 1024" in await cli.refused("publish", channel, "x" * 2000, *limit)
    done = await cli.run("publish", channel, "-", stdin=b"\xff")
    assert (done.returncode, done.stderr) == (
        1, "relay: not published: field data is not UTF-8\n",
    )  # fmt: skip
    assert "1 to 255 characters" in await cli.refused("publish", "", "1")
    for uid in ("", "x" * 256):
        assert "uid must have 1 to 255 bytes" in await cli.refused(
            "publish", channel, "1", "--uid", uid
        )
    assert not redis(valkey, "EXISTS", stream_key(channel))


async def test_an_event_that_no_replica_confirms_is_an_error_that_names_its_id(
    cli: Cli, channel: str
) -> None:
    line = await cli.refused("publish", channel, "1", "--set", "namespace.durability=replicated")
    assert re.search(r"appended as \d+-\d+, but 0 of 1 replicas", line)
    line = await cli.refused("publish", channel, "1", "--durability", "replicated:2:50")
    assert re.search(r"appended as \d+-\d+, but 0 of 2 replicas .* within 50 ms", line)
    line = await cli.refused("publish", channel, "1", "--durability", "disk")
    assert "not published: durability must be fast, replicated, replicated:REPLICAS:MS" in line


# ---- tail -----------------------------------------------------------------------------------


async def test_tail_shows_what_was_there_and_what_comes_a_line_each(
    cli: Cli, relay: RelayProcess, channel: str
) -> None:
    first = relay.xadd(channel, data="0")
    second = relay.xadd(channel, data="a\n\x1b[31mb", type="chat", client="c1")
    async with cli.tail(channel, "--after", first) as tail:
        assert await tail.line() == f"{second}  chat  c1  a\\n\\x1b[31mb"
        revoked = relay.xadd(channel, revoke="anna")
        granted = relay.xadd(channel, grant="anna")
        broken = relay.xadd(channel, nothing="here")
        assert await tail.line() == f"{revoked}  relay:revoke  -  anna"
        assert await tail.line() == f"{granted}  relay:grant  -  anna"
        assert await tail.line() == f"{broken}  relay:broken  -  no data"
        assert await tail.interrupt() == 0
        assert await tail.said() == ""


async def test_tail_without_a_place_begins_now_and_with_json_says_everything(
    cli: Cli, relay: RelayProcess, channel: str
) -> None:
    async with cli.tail(channel, "--json") as tail:
        assert (
            await tail.said() == f"relay: {channel} has no stream yet; waiting for its first event"
        )
        entry = relay.xadd(channel, data='{"n":1.0}', to="anna", uid="u")
        assert await tail.line() == (
            f'{{"id":"{entry}","type":null,"client":null,"data":{{"n":1.0}},"uid":"u",'
            '"to":["user:anna"]}'
        )
        text = relay.xadd(channel, data="plain", type="t")
        assert json.loads(await tail.line()) == {
            "id": text, "type": "t", "client": None, "data": "plain",
        }  # fmt: skip


async def test_tail_reads_pages_of_a_long_stream(cli: Cli, valkey: Server, channel: str) -> None:
    for number in range(120):
        redis(valkey, "XADD", stream_key(channel), "*", "data", number)
    async with cli.tail(channel, "--after", "0") as tail:
        lines = [await tail.line() for _ in range(120)]
    assert [line.split()[-1] for line in lines] == [str(number) for number in range(120)]


async def test_tail_ends_when_nobody_reads_on_even_without_an_event(
    cli: Cli, relay: RelayProcess, channel: str
) -> None:
    relay.xadd(channel, data="1")
    async with cli.tail(channel, "--after", "0") as tail:
        await tail.line()
        tail.process._transport.get_pipe_transport(1).close()  # type: ignore[attr-defined]
        assert await tail.ended() == 0
        assert await tail.said() == ""


async def test_tail_says_what_may_be_missing(
    cli: Cli, relay: RelayProcess, valkey: Server, channel: str
) -> None:
    first = relay.xadd(channel, data="1")
    relay.xadd(channel, data="2")
    third = relay.xadd(channel, data="3")
    redis(valkey, "XTRIM", stream_key(channel), "MAXLEN", 1)
    async with cli.tail(channel, "--after", first) as tail:
        assert (
            await tail.said() == f"relay: entries after {first} were removed; the oldest is {third}"
        )
        assert (await tail.line()).endswith("3")
        redis(valkey, "DEL", stream_key(channel))
        assert f"entries after {third} may be missing" in await tail.said()
        relay.xadd(channel, data="4")
        assert (await tail.line()).endswith("4")


async def test_tail_outlives_redis_and_misses_nothing(tmp_path: Path) -> None:
    server = Server(tmp_path)
    with running(server):
        redis(server, "XADD", stream_key("c"), "*", "data", "1")
        async with Cli(server).tail("c", "--after", "0") as tail:
            assert (await tail.line()).endswith("1")
            await asyncio.to_thread(server.stop)
            assert "retrying" in await tail.said()
            await asyncio.to_thread(server.start)
            redis(server, "XADD", stream_key("c"), "*", "data", "2")
            assert await tail.said() == "relay: reconnected to Redis"
            assert (await tail.line()).endswith("2")
            assert await tail.interrupt() == 0


# ---- streams and trim -----------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
async def test_letters_that_the_terminal_lacks_are_escaped(valkey: Server, encoding: str) -> None:
    channel = f"é漢-{encoding}"
    redis(valkey, "XADD", stream_key(channel), "*", "data", '"é漢"')
    cli = Cli(valkey, encoding=encoding)
    shown = channel.encode(encoding, "backslashreplace").decode(encoding)
    assert shown in await cli.out("streams", channel)
    (stream,) = await cli.objects("streams", channel)
    assert stream["channel"] == channel


async def test_streams_shows_how_far_each_worker_is(
    cli: Cli, relay: RelayProcess, door: Native, valkey: Server, channel: str
) -> None:
    client = await door.sse(channel)
    first = relay.xadd(channel, data="1")
    last = relay.xadd(channel, data="2")
    await client.take(2)
    redis(valkey, "XGROUP", "CREATE", stream_key(channel), "relay:gone:5f0c9a31", first)
    redis(valkey, "XGROUP", "CREATE", stream_key(channel), "mine", "0")
    stream: dict[str, Any] = {}
    async with asyncio.timeout(30):
        # A worker moves its group once a second.
        while not any(each["last"] == last for each in stream.get("groups", ())):
            words = ("streams", channel, "--set", "namespace.retention_age_s=0")
            (stream,) = await cli.objects(*words)
    assert (stream["channel"], stream["entries"]) == (channel, 2)
    assert (stream["first"], stream["last"]) == (first, last)
    assert (stream["retention_count"], stream["retention_age_s"]) == (10000, None)
    assert 0 <= stream["age_ms"] < 30000
    groups = {group["name"]: group for group in stream["groups"]}
    gone, mine = groups.pop("relay:gone:5f0c9a31"), groups.pop("mine")
    (living,) = groups.values()
    assert (living["alive"], living["behind"], living["lag_ms"], living["last"]) == (
        True, 0, 0, last,
    )  # fmt: skip
    assert (gone["alive"], gone["behind"], gone["worker"]) == (False, 1, "gone:5f0c9a31")
    assert (mine["behind"], mine["worker"]) == (2, None)
    assert 0 <= gone["lag_ms"] <= mine["lag_ms"]
    head, row, *remarks = (await cli.out("streams", channel)).splitlines()
    columns = head.split()
    assert columns[:8] == [
        "CHANNEL", "ENTRIES", "FIRST", "LAST", "AGE", "RETENTION", "WORKERS", "BEHIND",
    ]  # fmt: skip
    # With several Redis servers only.
    assert columns[8:] in ([], ["SERVER"])
    assert row.split()[:4] == [channel, "2", first, last]
    assert "10000, 7 d" in row
    assert sorted(re.sub(r", .* \(", " (", remark) for remark in remarks) == [
        "  mine: 2 (not a worker's group)",
        "  relay:gone:5f0c9a31: 1 (no heartbeat)",
    ]


async def test_streams_takes_a_pattern_and_says_where_none_matches(
    cli: Cli, relay: RelayProcess, channel: str
) -> None:
    relay.xadd(f"{channel}:a", data="1")
    relay.xadd(f"{channel}:b", data="1")
    found = await cli.objects("streams", f"{channel}:[ab]")
    assert [stream["channel"] for stream in found] == [f"{channel}:a", f"{channel}:b"]
    assert "no stream" in await cli.refused("streams", "nobody:*")


async def test_without_a_terminal_there_is_no_progress(valkey: Server, channel: str) -> None:
    with valkey.client() as admin, admin.pipeline(transaction=False) as pipeline:
        for number in range(4000):
            pipeline.execute_command("XADD", stream_key(f"{channel}:{number}"), "*", "data", "1")
        pipeline.execute()
    try:
        quiet = await Cli(valkey).run("streams", f"{channel}:*")
    finally:
        redis(valkey, "FLUSHALL")
    assert (quiet.returncode, quiet.stderr) == (0, "")
    assert len(quiet.stdout.splitlines()) == 4001
    assert "\x1b" not in quiet.stdout


def test_on_a_terminal_long_work_shows_its_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    # Use a real terminal, and show progress from the first step.
    monkeypatch.setattr("relay.cli.output._PROGRESS_S", 0.0)
    terminal, end = os.openpty()
    try:
        with os.fdopen(end, "w") as screen:
            monkeypatch.setattr(sys, "stderr", screen)
            progress = Progress("streams")
            progress(1200)
            progress.end()
            # One write may take several reads. The last write erases the line.
            shown = ""
            while not shown.endswith("\x1b[2K"):
                shown += os.read(terminal, 65536).decode()
    finally:
        os.close(terminal)
    assert "1,200 streams" in shown
    assert "\x1b[?25h" in shown, "the cursor must be visible again"


async def test_trim_is_exact_and_clients_go_on(
    cli: Cli, relay: RelayProcess, door: Native, valkey: Server, channel: str
) -> None:
    client = await door.sse(channel)
    for number in range(5):
        relay.xadd(channel, data=str(number))
    await client.take(5)
    assert await cli.out("trim", channel, "--max-entries", "2") == (
        f"3 entries removed from {channel}\n"
    )
    relay.xadd(channel, data="5")
    assert (await client.next()).data == "5"
    assert await cli.objects("trim", channel, "--max-age", "3600") == [
        {"channel": channel, "removed": 0}
    ]
    redis(valkey, "XADD", stream_key(f"{channel}:old"), "1-1", "data", "1")
    assert await cli.out("trim", f"{channel}:old") == f"1 entry removed from {channel}:old\n"
    assert "no stream" in await cli.refused("trim", "nothing-here", "--max-entries", "1")


# ---- errors -----------------------------------------------------------------------------

EVERY = [
    ["publish", "c", "1"],
    ["publish", "c", "1", "--uid", "u"],
    ["tail", "c"],
    ["streams"],
    ["workers"],
    ["dead-letters", "list"],
    ["dead-letters", "requeue", "--all"],
    ["trim", "c", "--max-entries", "1"],
    ["disconnect", "u"],
    ["unsubscribe", "c", "u"],
]


def said(capfd: pytest.CaptureFixture[str], *words: str) -> str:
    """Run a command that must fail in this process. Return the single line of its error."""
    assert main(words) == 1
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize("words", EVERY, ids=" ".join)
def test_redis_away_is_one_line(words: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    away = f"redis://user:secret@127.0.0.1:{free_port()}"
    line = said(capfd, *words, "--redis", away)
    assert "127.0.0.1" in line
    assert "secret" not in line


@pytest.mark.parametrize("words", EVERY, ids=" ".join)
def test_no_rights_is_one_line_that_says_who_has_them(
    words: list[str], valkey: Server, capfd: pytest.CaptureFixture[str]
) -> None:
    line = said(capfd, *words, "--redis", valkey.url("producer"))
    assert "no permissions" in line.lower()
    assert "docs/redis.md" in line


def test_status_without_redis_or_rights_is_1(
    valkey: Server, capfd: pytest.CaptureFixture[str]
) -> None:
    away = f"redis://127.0.0.1:{free_port()}"
    for url, word in ((away, "127.0.0.1"), (valkey.url("producer"), "no permissions")):
        assert main(["status", "--json", "--redis", url]) == 1
        out, err = capfd.readouterr()
        assert json.loads(out)["redis"] is False
        assert err.count("\n") == 1
        assert word in err
        assert ("docs/redis.md" in err) == (url != away)


async def test_a_wrong_password_is_one_line(valkey: Server) -> None:
    url = f"redis://maintenance:wrong@127.0.0.1:{valkey.port}"
    line = await Cli(valkey).refused("streams", "--redis", url)
    assert "wrong" not in line.replace("wrong username", "").replace("invalid", "")
