"""The reader's pipelines with hand-written replies: commands, and repetition of unreliable
reads."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import hiredis
import pytest

from relay.config.settings import StreamSettings
from relay.core.metrics import Metrics
from relay.core.model import Channel, EntryID, Principal
from relay.hub.feed import Feed
from relay.hub.session import Session
from relay.stream.connection.pipeline_connection import RedisCommand
from relay.stream.connection.primary import Primary, Replication
from relay.stream.format import entry
from relay.stream.read.control_reader import ControlReader
from relay.stream.read.groups import MARKER_GROUP
from relay.stream.read.pipelines import LivePipelines, PagePipelines
from tests.support.hub import (
    KEYS,
    NEWS,
    Client,
    Outbox,
    Reads,
    Words,
    event,
    examine,
    join,
    make_hub,
)

SETTINGS = StreamSettings(max_entry_bytes=1 << 20)
PRIMARY = Primary()
DECODE = partial(entry.decode, max_bytes=1000)
PRIMARY.observe(Replication(b"master", b"", b""))
NO_GROUP = hiredis.ReplyError("NOGROUP No such key or consumer group")


class Scene:
    def __init__(self) -> None:
        self.reads = Reads()
        self.hub = make_hub(self.reads)
        self.session: Session
        self.client: Client
        self.outbox: Outbox
        self.session, self.client, self.outbox = join(self.hub, Principal(user="ann"), Words())
        feed = self.hub.feed(NEWS)
        assert feed
        self.feed: Feed = feed
        self.turns = LivePipelines(
            keys=KEYS,
            instance="w1",
            primary=PRIMARY,
            settings=SETTINGS,
            metrics=Metrics(),
            decode=partial(entry.decode, max_bytes=1000),
            control=ControlReader(KEYS, lambda _command: None, lambda: None),
        )
        self.turns.commands()
        self.turns.on_replies([0, []])  # the first read of the control stream

    def read(self, exec_reply: object) -> list[RedisCommand]:
        self.turns.want_read(self.feed)
        commands = self._reply(exec_reply)
        if "XRANGE" in names(commands) and self.feed.settled and self.feed.misaligned:
            # The entry at the position is missing.
            self._reply(exec_reply)
        self.hub.flush()
        return commands

    def _reply(self, exec_reply: object) -> list[RedisCommand]:
        commands = self.turns.commands()
        replies = replied_in_form(commands, exec_reply, self.feed)
        self.turns.on_replies([b"OK", *[b"QUEUED"] * (len(commands) - 2), replies])
        return commands


def asked_count(commands: Sequence[RedisCommand]) -> int:
    """Return the number of entries that a read asks for."""
    reads = [each for each in commands if each[0] in ("XREADGROUP", "XRANGE")]
    count = int(reads[-1][reads[-1].index("COUNT") + 1])
    # A read that keeps the group reads one entry again.
    return count - (reads[-1][0] == "XRANGE")


def replied_in_form(commands: Sequence[RedisCommand], replies: object, feed: Feed) -> object:
    """Return the replies to a read by group, as those to a read of another form."""
    if not isinstance(replies, list) or len(replies) != 2:
        return replies
    state, found = replies
    if commands[2][:2] == ("XINFO", "GROUPS"):
        return [state, MARKER, b"OK", b"OK", found]
    if "XRANGE" not in names(commands) or isinstance(found, hiredis.ReplyError):
        return replies
    entries = next(iter(found.values())) if found else []
    first, at = state[b"first-entry"], feed.position
    if first is not None and EntryID.parse(first[0]) <= at:
        entries = [own_entry(at.ms), *entries]
    return [state, entries]


def own_entry(number: int) -> list[object]:
    """Return the entry with this number again, as a read returns it that keeps the group."""
    return [b"%d-0" % number, [b"data", b"%d" % number]]


def info(*numbers: int, added: int, last: int, deleted: int = 0) -> dict[bytes, object]:
    return {
        b"first-entry": [b"%d-0" % numbers[0], []] if numbers else None,
        b"last-generated-id": b"%d-0" % last,
        b"length": len(numbers),
        b"entries-added": added,
        b"max-deleted-entry-id": b"%d-0" % deleted,
    }


def found(*numbers: int) -> dict[bytes, object] | None:
    entries = [[b"%d-0" % number, [b"data", b"%d" % number]] for number in numbers]
    return {KEYS.stream(NEWS): entries} if entries else None


MARKER = [{b"name": MARKER_GROUP, b"last-delivered-id": b"1-0"}]


@pytest.fixture
def scene() -> Scene:
    """A settled feed whose group is at its position, 0-0."""
    made = Scene()
    examine(made.hub)
    made.read([info(added=0, last=0), MARKER, b"OK", b"OK", None])
    return made


def names(commands: Sequence[RedisCommand]) -> list[object]:
    return [command[0] for command in commands]


def test_a_group_is_put_in_its_place_once_and_read_in_the_same_moment() -> None:
    scene = Scene()
    examine(scene.hub)
    first = scene.read([info(added=0, last=0), MARKER, b"OK", b"OK", None])
    assert names(first) == ["MULTI", "XINFO", "XINFO", "XGROUP", "XGROUP", "XREADGROUP", "EXEC"]
    scene.turns.retry_paused()
    then = scene.read([info(1, added=1, last=1), found(1)])
    assert names(then) == ["MULTI", "XINFO", "XREADGROUP", "EXEC"]
    assert scene.outbox.writes == [b"1 "]


def test_the_moves_of_many_groups_are_spread_over_several_pipelines() -> None:
    hub = make_hub(Reads())
    channels = [Channel(f"room{number}") for number in range(300)]
    join(hub, Principal(user="ann"), Words(), *channels)
    turns = LivePipelines(
        keys=KEYS,
        instance="w1",
        primary=PRIMARY,
        settings=SETTINGS,
        metrics=Metrics(),
        decode=DECODE,
        control=None,
    )
    for channel in channels:
        examine(hub, channel)
    for number in (1, 2):  # the second time, the groups are left behind
        for channel in channels:
            feed = hub.feed(channel)
            assert feed
            turns.want_read(feed)
        while turns.has_work:
            replies: list[object] = []
            state = info(*range(1, number + 1), added=number, last=number)
            for part in " ".join(map(str, names(turns.commands()))).split("MULTI ")[1:]:
                done: list[object] = [state, MARKER, b"OK", b"OK", found(1)]
                if "XRANGE" in part:
                    done = [state, [own_entry(1), own_entry(2)]]
                replies += [b"QUEUED"] * len(part.split()) + [done]
            turns.on_replies(replies)
    turns.retry_paused()
    counts = []
    while turns.has_work:
        moves = turns.commands()
        assert {move[1] for move in moves} == {"SETID"}
        counts.append(len(moves))
        turns.on_replies([b"OK"] * len(moves))
    assert counts == [256, 44]


def test_a_group_is_moved_at_most_once_a_second() -> None:
    scene = Scene()
    examine(scene.hub)
    scene.read([info(added=0, last=0), MARKER, b"OK", b"OK", None])
    # There is no entry yet that could be read again.
    first = scene.read([info(1, added=1, last=1), found(1)])
    assert names(first) == ["MULTI", "XINFO", "XREADGROUP", "EXEC"]
    again = scene.read([info(1, 2, added=2, last=2), found(2)])
    assert names(again) == ["MULTI", "XINFO", "XRANGE", "EXEC"]
    assert scene.outbox.writes == [b"1 ", b"2 "]
    # A second later the group is moved, although there are no new entries.
    scene.turns.retry_paused()
    assert scene.turns.has_work
    (move,) = scene.turns.commands()
    assert move[:2] == ("XGROUP", "SETID")
    assert move[4:] == ("2-0", "ENTRIESREAD", 2)
    scene.turns.on_replies([b"OK"])
    # Streams that are read rarely move their groups by reading.
    scene.turns.retry_paused()
    assert not scene.turns.has_work
    rare = scene.read([info(3, added=3, last=3), found(3)])
    assert names(rare) == ["MULTI", "XINFO", "XREADGROUP", "EXEC"]
    # A deleted group is detected when it is moved.
    scene.read([info(3, 4, added=4, last=4), found(4)])
    assert scene.feed.settled
    scene.turns.retry_paused()
    scene.turns.commands()
    scene.turns.on_replies([NO_GROUP])
    assert not scene.feed.settled
    assert scene.outbox.writes == [b"1 ", b"2 ", b"3 ", b"4 "]


@pytest.mark.parametrize("newest", [own_entry(3), [b"2-0", [b"data", b"another"]], None])
def test_another_entry_at_the_position_is_examined(scene: Scene, newest: object) -> None:
    scene.read([info(1, 2, added=2, last=2), found(1, 2)])
    scene.turns.want_read(scene.feed)
    assert names(scene.turns.commands()) == ["MULTI", "XINFO", "XRANGE", "EXEC"]
    # The counters of the stream alone show no difference.
    reply = [info(1, 2, added=2, last=2), [newest] if newest else []]
    scene.turns.on_replies([b"OK", b"QUEUED", b"QUEUED", reply])
    assert scene.feed.misaligned
    # The next read checks the incarnation. The group is used for the rest of the second.
    scene.read([info(1, 2, added=2, last=2), MARKER, b"OK", b"OK", None])
    assert names(scene.read([info(1, 2, 3, added=3, last=3), found(3)])) == [
        *("MULTI", "XINFO", "XREADGROUP", "EXEC")
    ]
    assert scene.outbox.writes == [b"1 2 ", b"3 "]


def test_large_entries_are_not_read_again(scene: Scene) -> None:
    scene.read([info(1, added=1, last=1), found(1)])
    scene.read([info(1, 2, added=2, last=2), found(2)])
    scene.feed.average_bytes = 100_000.0
    # The group was left behind.
    aligning = scene.read([info(1, 2, 3, added=3, last=3), found(3)])
    assert names(aligning)[-2:] == ["XREADGROUP", "EXEC"]
    assert "XGROUP" in names(aligning)
    scene.feed.average_bytes = 100_000.0
    by_group = scene.read([info(1, 2, 3, 4, added=4, last=4), found(4)])
    assert names(by_group) == ["MULTI", "XINFO", "XREADGROUP", "EXEC"]
    assert scene.outbox.writes == [b"1 ", b"2 ", b"3 ", b"4 "]


def test_what_was_removed_unread_is_told_before_anything_is_delivered(scene: Scene) -> None:
    scene.read([info(3, 4, added=4, last=4), found(3, 4)])
    assert scene.outbox.writes == [b"!news:trimmed "]
    assert scene.feed.position < EntryID(3, 0)
    assert not scene.feed.settled


def test_an_entry_deleted_unread_is_told_though_older_ones_are_there(scene: Scene) -> None:
    scene.read([info(1, added=1, last=1), found(1)])
    scene.read([info(1, 2, 4, added=4, last=4, deleted=3), found(2, 4)])
    assert scene.outbox.writes == [b"1 ", b"!news:deleted "]


def test_removal_of_all_that_was_unread_is_told_as_well(scene: Scene) -> None:
    scene.read([info(added=2, last=2), found()])
    assert scene.outbox.writes == [b"!news:trimmed "]
    assert scene.feed.position == EntryID(2, 0)


def test_trimming_what_was_read_is_nobodys_loss(scene: Scene) -> None:
    scene.read([info(1, 2, added=2, last=2), found(1, 2)])
    scene.read([info(added=2, last=2), found()])
    scene.read([info(3, added=3, last=3), found(3)])
    assert scene.outbox.writes == [b"1 2 ", b"3 "]


def test_a_read_that_stopped_at_its_count_goes_on(scene: Scene) -> None:
    scene.feed.average_bytes = SETTINGS.page_bytes / 2
    scene.read([info(1, 2, 3, added=3, last=3), found(1, 2)])
    assert scene.turns.has_work
    assert scene.outbox.writes == [b"1 2 "]


def test_a_read_that_stopped_at_its_count_still_sees_a_trim(scene: Scene) -> None:
    scene.feed.average_bytes = SETTINGS.page_bytes / 2
    scene.read([info(*range(3, 99), added=98, last=98), found(3, 4)])
    assert scene.outbox.writes == [b"!news:trimmed "]


@pytest.mark.parametrize(
    "reply",
    [
        [info(1, added=1, last=1), NO_GROUP],
        [hiredis.ReplyError("ERR no such key"), NO_GROUP],
    ],
)
def test_a_lost_group_or_stream_is_examined(scene: Scene, reply: object) -> None:
    scene.read(reply)
    assert not scene.feed.settled
    assert scene.reads.examine[-1] is scene.feed


def test_a_group_that_was_made_in_another_life_is_not_read() -> None:
    scene = Scene()
    examine(scene.hub)
    other = [{b"name": MARKER_GROUP, b"last-delivered-id": b"2-0"}]
    scene.read([info(1, added=1, last=1), other, b"OK", b"OK", found(1)])
    assert not scene.feed.settled
    assert scene.outbox.writes == []


def test_a_group_that_was_set_back_is_put_right_and_nothing_comes_twice(scene: Scene) -> None:
    scene.turns.retry_paused()
    scene.read([info(1, added=1, last=1), found(1)])
    scene.turns.retry_paused()
    scene.read([info(1, 2, added=2, last=2), found(1, 2)])
    commands = scene.turns.commands()
    assert "XGROUP" in names(commands)
    scene.turns.on_replies(
        [b"OK"] * 6 + [[info(1, 2, added=2, last=2), MARKER, b"", b"", found(2)]]
    )
    scene.hub.flush()
    assert scene.outbox.writes == [b"1 ", b"2 "]


def test_an_unsettled_stream_is_examined_before_it_is_read(scene: Scene) -> None:
    scene.feed.on_unsettled()
    scene.turns.want_read(scene.feed)
    scene.turns.commands()
    assert names(scene.turns.commands())[:4] == ["INFO", "MULTI", "XINFO", "XINFO"]


def test_a_new_link_voids_what_was_asked_on_the_old_one(scene: Scene) -> None:
    scene.turns.want_read(scene.feed)
    scene.turns.commands()
    scene.turns.connected()
    scene.turns.all_unsettled([scene.feed])
    scene.turns.on_replies([b"OK", b"", b"", [info(1, added=1, last=1), found(1)]])
    assert scene.outbox.writes == []
    assert not scene.feed.settled


def test_who_waited_on_the_old_link_is_examined_on_the_new_one() -> None:
    scene = Scene()
    scene.turns.want_examine(scene.feed)
    scene.turns.commands()
    scene.turns.connected()
    scene.turns.all_unsettled([scene.feed])
    request = examine(scene.hub)
    assert request.users == ("ann",)
    assert scene.client.told == ["subscribed news"]


def test_a_page_of_a_stream_that_is_gone_is_examined(scene: Scene) -> None:
    scene.read([info(1, added=1, last=1), found(1)])
    scene.session.pause()
    scene.read([info(1, 2, added=2, last=2), found(2)])
    scene.session.resume()
    pages = PagePipelines(
        primary=PRIMARY, settings=SETTINGS, decode=partial(entry.decode, max_bytes=1000)
    )
    pages.want(scene.feed)
    assert names(pages.commands()) == ["MULTI", "XINFO", "XINFO", "XRANGE", "EXEC"]
    gone = hiredis.ReplyError("ERR no such key")
    pages.on_replies([b"OK", b"", b"", b"", [gone, gone, []]])
    assert not scene.feed.settled


# ---- refusals ----------------------------------------------------------------------------------

FULL = hiredis.ReplyError("OOM command not allowed when used memory > 'maxmemory'.")
ABORTED = hiredis.ReplyError("EXECABORT Transaction discarded because of previous errors.")


def refuse(scene: Scene, refusal: hiredis.ReplyError) -> None:
    scene.turns.want_read(scene.feed)
    commands = scene.turns.commands()
    scene.turns.on_replies([b"OK", *[refusal] * (len(commands) - 2), ABORTED])


@pytest.mark.parametrize(
    "refusal",
    [
        FULL,
        hiredis.ReplyError("MISCONF Errors writing to the AOF file: No space left on device"),
        hiredis.ReplyError("NOREPLICAS Not enough good replicas to write."),
        hiredis.ReplyError("NOPERM User relay has no permissions to run the 'xreadgroup' command"),
        hiredis.ReplyError("ERR unknown command 'MULTI', with args beginning with: "),
    ],
)
def test_where_groups_are_refused_entries_are_read_without_them(
    scene: Scene, refusal: hiredis.ReplyError
) -> None:
    refuse(scene, refusal)
    commands = scene.turns.commands()
    assert names(commands) == ["XINFO", "XINFO", "XRANGE", "XINFO"]
    state = info(1, 2, added=2, last=2)
    entries = [[b"%d-0" % number, [b"data", b"%d" % number]] for number in (1, 2)]
    scene.turns.on_replies([state, MARKER, entries, state])
    scene.hub.flush()
    assert scene.outbox.writes == [b"1 2 "]
    assert scene.feed.position == EntryID(2, 0)


def test_a_plain_look_that_was_no_single_moment_is_repeated(scene: Scene) -> None:
    refuse(scene, FULL)
    scene.turns.commands()
    scene.turns.on_replies([info(added=0, last=0), MARKER, [], info(1, added=1, last=1)])
    assert scene.turns.has_work
    assert names(scene.turns.commands()) == ["XINFO", "XINFO", "XRANGE", "XINFO"]


def test_a_plain_read_sees_a_trim_and_another_life(scene: Scene) -> None:
    refuse(scene, FULL)
    scene.turns.commands()
    state = info(3, added=3, last=3)
    scene.turns.on_replies([state, MARKER, [[b"3-0", [b"data", b"3"]]], state])
    scene.hub.flush()
    assert scene.outbox.writes == [b"!news:trimmed "]


@pytest.mark.parametrize("plain", [False, True])
def test_what_is_refused_in_every_way_is_not_repeated_without_a_pause(
    scene: Scene, plain: bool
) -> None:
    busy = hiredis.ReplyError("BUSY Redis is busy running a script.")
    denied = hiredis.ReplyError("NOPERM User relay has no permissions to run the 'xinfo' command")
    refuse(scene, denied if plain else busy)
    if plain:
        scene.turns.commands()
        scene.turns.on_replies([denied] * 4)
    assert not scene.turns.has_work
    scene.turns.retry_paused()
    assert scene.turns.has_work


# ---- many streams on a new connection ----------------------------------------------------------


def test_streams_with_news_or_waiting_clients_are_examined_before_the_others() -> None:
    reads = Reads()
    hub = make_hub(reads)
    quiet, news, requested = (Channel(name) for name in ("quiet", "news", "requested"))
    session, _, _ = join(hub, Principal(user="ann"), Words(), quiet, news)
    turns = Scene().turns
    feeds = {channel: hub.feed(channel) for channel in (quiet, news)}
    for channel in feeds:
        examine(hub, channel)
    turns.only_urgent = True
    turns.connected()
    turns.all_unsettled([feed for feed in feeds.values() if feed])
    for feed in feeds.values():
        assert feed
        turns.want_examine(feed)
    turns.commands()
    turns.on_replies([0, [], []])
    assert turns.settling
    assert not turns.has_work
    has_news = feeds[news]
    assert has_news
    turns.want_read(has_news)
    hub.subscribe(session, requested, None)
    waiting = hub.feed(requested)
    assert waiting
    turns.want_examine(waiting)
    assert _examined(turns.commands()) == {KEYS.stream(requested)}
    assert _examined(turns.commands()) == {KEYS.stream(news)}
    assert turns.settling
    turns.only_urgent = False
    assert _examined(turns.commands()) == {KEYS.stream(quiet)}


def _examined(commands: Sequence[RedisCommand]) -> set[object]:
    return {command[2] for command in commands if command[:2] == ("XINFO", "STREAM")}


@pytest.mark.parametrize("largest", [1024, 1 << 20, 64 << 20])
def test_a_pipeline_of_pages_is_bounded_though_no_entry_is_known(largest: int) -> None:
    """Entries may be larger than all earlier ones, and Redis has no limit in bytes."""
    hub = make_hub(Reads())
    names = [Channel(f"c{number}") for number in range(6)]
    session, *_ = join(hub, Principal(user="ann"), Words(), *names)
    settings = StreamSettings(max_entry_bytes=largest)
    pages = PagePipelines(primary=PRIMARY, settings=settings, decode=DECODE)
    for name in names:
        examine(hub, name)
        feed = hub.feed(name)
        assert feed
        feed.average_bytes = 50.0
        session.pause()
        feed.on_records([event("1", 1)])
        session.resume()
        pages.want(feed)
    counts = [command[-1] for command in pages.commands() if command[0] == "XRANGE"]
    assert counts
    total = sum(int(count) for count in counts)
    assert total * largest <= 32 << 20 or total == 1
    assert total >= min(1000, 32) or largest > 1 << 20
    assert pages.has_work


def test_a_live_read_asks_for_more_only_after_one_that_was_full(scene: Scene) -> None:
    def count() -> int:
        scene.turns.want_read(scene.feed)
        commands[:] = scene.turns.commands()
        return asked_count(commands)

    def reply(state: object, entries: object) -> None:
        replies = replied_in_form(commands, [state, entries], scene.feed)
        scene.turns.on_replies([*[b""] * (len(commands) - 1), replies])

    commands: list[RedisCommand] = []
    scene.feed.average_bytes = 50.0
    counts, last = [], 0
    for _ in range(6):
        counts.append(count())
        numbers = range(last + 1, last + counts[-1] + 1)
        last += counts[-1]
        state = info(*range(1, 9999), added=9998, last=9998)
        reply(state, found(*numbers))
    assert counts == [128, 256, 512, 1000, 1000, 1000]
    assert count() == 1000
    reply(info(*range(1, last + 2), added=last + 1, last=last + 1), found(last + 1))
    # A stream whose reads are seldom full is read in small steps again.
    assert count() == 500


def test_a_read_after_a_new_connection_is_bounded_though_no_entry_is_known(scene: Scene) -> None:
    """New entries may be larger than all earlier ones."""
    scene.turns.connected()
    scene.turns.all_unsettled([scene.feed])
    examine(scene.hub)
    scene.feed.average_bytes = 50.0
    counts, last = [], 0
    for _ in range(5):
        scene.turns.want_read(scene.feed)
        commands = scene.turns.commands()
        counts.append(asked_count(commands))
        numbers = range(last + 1, last + counts[-1] + 1)
        last += counts[-1]
        state = info(*range(1, 9999), added=9998, last=9998)
        groups = [MARKER, b"", b""] if "XGROUP" in names(commands) else []
        replies = replied_in_form(commands, [state, *groups, found(*numbers)], scene.feed)
        scene.turns.on_replies([*[b""] * (len(commands) - 1), replies])
    assert counts == [8, 16, 32, 64, 64]


@pytest.mark.parametrize(
    ("size", "counts"), [(1 << 20, [32, 32, 1000]), (1 << 26, [32, 32, 32]), (None, [32, 32, 32])]
)
def test_a_small_stream_is_read_in_large_pages(size: int | None, counts: list[int]) -> None:
    hub = make_hub(Reads())
    session, *_ = join(hub, Principal(user="ann"), Words())
    pages = PagePipelines(primary=PRIMARY, settings=SETTINGS, decode=DECODE)
    examine(hub)
    feed = hub.feed(NEWS)
    assert feed
    session.pause()
    feed.on_records([event(str(number), number) for number in range(1, 5000)])
    session.resume()
    found_counts, last = [], 0
    for number in range(3):
        feed.average_bytes = 50.0
        pages.want(feed)
        commands = pages.commands()
        (asked,) = [command for command in commands if command[0] == "XRANGE"]
        found_counts.append(int(asked[-1]))
        numbers = range(last + 1, last + found_counts[-1] + 1)
        last += found_counts[-1]
        entries = [[b"%d-0" % each, [b"data", b"1"]] for each in numbers]
        state = info(*range(1, 5000), added=4999, last=4999) | {b"radix-tree-keys": 50}
        answers: list[object] = [*[b""] * (len(commands) - 1), [state, MARKER, entries]]
        if commands[0][0] == "MEMORY":
            answers[0] = hiredis.ReplyError("NOPERM") if size is None else size
        # The first page returns how many blocks MEMORY USAGE would visit.
        assert (commands[0][0] == "MEMORY") == (number > 0)
        pages.want(feed)
        pages.on_replies(answers)
    assert found_counts == counts
