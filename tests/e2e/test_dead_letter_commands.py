"""`relay dead-letters` lists, shows and requeues dead letters of a running relay."""

from __future__ import annotations

import json

import pytest

from tests.support.cli import Cli
from tests.support.clients import Native, redis, stream_key, until
from tests.support.relay import RelayProcess
from tests.support.valkey import Server

pytestmark = [pytest.mark.redis, pytest.mark.timeout(60)]
LETTERS = "relay:dead-letters"


@pytest.fixture
def cli(valkey: Server) -> Cli:
    redis(valkey, "DEL", LETTERS)
    return Cli(valkey)


async def written(valkey: Server, count: int) -> list[str]:
    """Wait for `count` dead letters and return their IDs."""
    await until(lambda: redis(valkey, "XLEN", LETTERS) >= count)
    return [raw.decode() for raw, _ in redis(valkey, "XRANGE", LETTERS, "-", "+")]


async def test_a_letter_is_listed_shown_and_requeued_as_it_was(
    cli: Cli, relay: RelayProcess, door: Native, valkey: Server, channel: str
) -> None:
    client = await door.sse(channel)
    # The schema of a later version, which this version cannot read.
    broken = relay.xadd(channel, data="1", v="2")
    (letter,) = await written(valkey, 1)
    (listed,) = await cli.objects("dead-letters", "list")
    assert (listed["id"], listed["channel"], listed["entry"]) == (letter, channel, broken)
    assert (listed["reason"], listed["truncated"]) == ("unknown schema 2", False)
    head, row = (await cli.out("dead-letters", "list")).splitlines()
    assert head.split() == ["ID", "FROM", "ENTRY", "AGE", "REASON"]
    assert row.split()[:3] == [letter, channel, broken]
    assert row.endswith("unknown schema 2")
    shown = (await cli.out("dead-letters", "show", letter)).splitlines()
    assert shown[0].split() == ["letter", letter]
    assert shown[-2:] == ["field       data = 1", "field       v = 2"]
    (raw,) = await cli.objects("dead-letters", "show", letter)
    assert json.loads(raw["fields"]) == [["data", "1"], ["v", "2"]]
    done = await cli.run("dead-letters", "requeue", letter)
    assert done.returncode == 0
    assert done.stderr == (
        "relay: 1 of them cannot be delivered by this version and will be dead letters again\n"
    )
    new = done.stdout.split()[-1]
    assert done.stdout == f"{letter} is {channel} {new}\n"
    ((_, fields),) = redis(valkey, "XRANGE", stream_key(channel), new, new)
    assert fields == {b"data": b"1", b"v": b"2"}
    (again,) = await written(valkey, 1)
    assert again != letter
    relay.xadd(channel, data="2")
    assert (await client.next()).data == "2"


async def test_what_was_mended_meanwhile_arrives_when_it_is_requeued(
    cli: Cli, relay: RelayProcess, door: Native, valkey: Server, channel: str
) -> None:
    client = await door.sse(channel)
    for number in range(3):
        # Dead letters of an older version, which could not read these entries.
        redis(
            valkey, "XADD", LETTERS, "*", "stream", stream_key(channel), "id", f"1-{number + 1}",
            "reason", "unknown", "fields", f'[["data", "{number}"], ["uid", "u{number}"]]',
        )  # fmt: skip
    assert await cli.out("dead-letters", "requeue", "--all") == "3 requeued\n"
    assert [block.data for block in await client.take(3)] == ["0", "1", "2"]
    assert redis(valkey, "XLEN", LETTERS) == 0


async def test_a_requeue_that_was_interrupted_appends_once(
    cli: Cli, valkey: Server, channel: str
) -> None:
    letter = [LETTERS, "5-5", "stream", stream_key(channel), "fields", '[["data", "1"]]']
    redis(valkey, "XADD", *letter)
    first = (await cli.out("dead-letters", "requeue", "5-5")).split()[-1]
    # Restore the letter, as if the command was killed between the append and the removal.
    redis(valkey, "DEL", LETTERS)
    redis(valkey, "XADD", *letter)
    assert (await cli.out("dead-letters", "requeue", "5-5")).split()[-1] == first
    assert redis(valkey, "XLEN", stream_key(channel)) == 1
    assert redis(valkey, "XLEN", LETTERS) == 0


async def test_a_cut_letter_is_requeued_from_its_entry_or_not_at_all(
    cli: Cli, relay: RelayProcess, door: Native, valkey: Server, channel: str
) -> None:
    await door.sse(channel)
    data = "x" * 100_000
    entry = relay.xadd(channel, data=data, type="relay:no")
    (letter,) = await written(valkey, 1)
    assert (await cli.objects("dead-letters", "list"))[0]["truncated"]
    new = (await cli.out("dead-letters", "requeue", letter)).split()[-1]
    ((_, fields),) = redis(valkey, "XRANGE", stream_key(channel), new, new)
    assert fields == {b"data": data.encode(), b"type": b"relay:no"}
    (letter,) = await written(valkey, 1)
    redis(valkey, "XTRIM", stream_key(channel), "MAXLEN", 0)
    line = await cli.run("dead-letters", "requeue", letter)
    assert (line.returncode, line.stdout) == (1, "")
    assert "the entry no longer exists; skipped" in line.stderr
    assert entry != new
    assert redis(valkey, "XLEN", LETTERS) == 1


async def test_bytes_that_are_no_text_come_back_as_they_were(
    cli: Cli, relay: RelayProcess, door: Native, valkey: Server, channel: str
) -> None:
    await door.sse(channel)
    redis(valkey, "XADD", stream_key(channel), "*", "data", b"\xff\x00")
    (letter,) = await written(valkey, 1)
    assert "data = \\xff\\x00" in await cli.out("dead-letters", "show", letter)
    done = await cli.run("dead-letters", "requeue", letter, "--json")
    new = json.loads(done.stdout)["id"]
    ((_, fields),) = redis(valkey, "XRANGE", stream_key(channel), new, new)
    assert fields == {b"data": b"\xff\x00"}


async def test_letters_are_dropped_one_by_one_or_all(cli: Cli, valkey: Server) -> None:
    for number in range(250):
        redis(valkey, "XADD", LETTERS, f"{number + 1}-0", "queue", "q.0", "reason", "not JSON")
    assert "no dead letter 999-0" in await cli.refused("dead-letters", "drop", "1-0", "999-0")
    assert redis(valkey, "XLEN", LETTERS) == 250
    assert await cli.out("dead-letters", "drop", "1-0", "2-0") == "2 dropped\n"
    assert len(await cli.objects("dead-letters", "list")) == 248
    done = await cli.run("dead-letters", "requeue", "3-0")
    assert done.returncode == 1
    assert done.stderr == "relay: dead letter 3-0 is not an entry of a stream; skipped\n"
    assert await cli.out("dead-letters", "show", "3-0") == (
        "letter      3-0\nqueue       q.0\nreason      not JSON\n"
    )
    assert await cli.objects("dead-letters", "drop", "--all") == [{"dropped": 248}]
    done = await cli.run("dead-letters", "list")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "relay: no dead letters\n")


async def test_a_letter_that_is_not_there_is_one_line(cli: Cli) -> None:
    for action in ("show", "requeue", "drop"):
        assert "no dead letter 1-1" in await cli.refused("dead-letters", action, "1-1")
    for words in (["show", "one"], ["drop"], ["requeue", "--all", "1-1"], []):
        done = await cli.run("dead-letters", *words)
        assert (done.returncode, done.stdout) == (2, "")
