import asyncio
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest

from relay.core.connection import ConnectionInfo
from relay.core.errors import BadRequest, LimitExceeded, Unauthorized
from relay.core.model import (
    ZERO_ID,
    Channel,
    EntryID,
    Position,
    Principal,
    Record,
    Revocation,
    StreamState,
)
from relay.core.reasons import Reason
from relay.core.stream_interface import Examined, Page
from relay.hub.hub import Hub
from relay.hub.session import Subscription, SubscriptionMode
from tests.support.hub import (
    INCARNATION,
    NEWS,
    Client,
    Reads,
    Words,
    event,
    examine,
    join,
    make_hub,
)

ANN = Principal(user="ann")
# Of the hub for an idle client: session, subscription, and the description of its connection.
MOST_BYTES = 1100


def test_a_user_has_so_many_connections_and_no_more() -> None:
    hub = make_hub(Reads(), most=2)
    first = join(hub, ANN, Words())[0]
    join(hub, ANN, Words())
    with pytest.raises(LimitExceeded):
        join(hub, ANN, Words())
    first.end()
    first.end()
    join(hub, ANN, Words())


def test_anonymous_clients_are_not_one_user() -> None:
    hub = make_hub(Reads(), most=1)
    assert [join(hub, Principal(), Words()) for _ in range(3)]


def test_an_idle_client_takes_little_memory() -> None:
    hub, encoder, client = make_hub(Reads()), Words(), Client()

    def open_one() -> None:
        info = ConnectionInfo(".".join(["10", "0", "0", "1"]))
        hub.subscribe(hub.open(Principal(), encoder, client, info), NEWS, None)

    open_one()
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        for _ in range(1000):
            open_one()
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (after - before) / 1000 <= MOST_BYTES


def test_a_channel_is_subscribed_to_once() -> None:
    hub = make_hub(Reads())
    session = join(hub, ANN, Words())[0]
    with pytest.raises(BadRequest):
        hub.subscribe(session, NEWS, None)
    with pytest.raises(BadRequest):
        hub.reserve(session, NEWS)
    hub.unsubscribe(session, NEWS)
    with pytest.raises(BadRequest):
        hub.unsubscribe(session, NEWS)


def test_the_last_one_to_leave_releases_the_stream() -> None:
    reads = Reads()
    hub = make_hub(reads)
    sessions = [join(hub, ANN, Words())[0] for _ in range(2)]
    feed = hub.feed(NEWS)
    sessions[0].end()
    assert not reads.released
    sessions[1].end()
    assert reads.released == [feed]
    assert hub.feed(NEWS) is None


def test_a_refused_client_hears_it_and_does_not_stay() -> None:
    hub = make_hub(Reads())
    session, client, _ = join(hub, ANN, Words())
    examine(hub, ann=b"-")
    assert client.told == ["refused news: Forbidden"]
    assert not session.subscriptions


def test_a_lost_right_drops_at_the_next_look() -> None:
    hub = make_hub(Reads())
    _, client, outbox = join(hub, ANN, Words())
    examine(hub)
    hub.recheck(NEWS)
    examine(hub, ann=b"-")
    assert client.told[-1] == "dropped news: revoked"
    assert outbox.writes == [b"!news:revoked "]


def test_who_waits_while_the_link_is_lost_waits_again() -> None:
    reads = Reads()
    hub = make_hub(reads)
    _, client, _ = join(hub, ANN, Words())
    feed = hub.feed(NEWS)
    assert feed
    feed.on_examine_lost(feed.examine_request())
    assert len(reads.examine) == 2
    examine(hub)
    assert client.told == ["subscribed news"]


def test_a_credential_ends_at_its_time_unless_it_was_refreshed() -> None:
    hub = make_hub(Reads())
    ends, client, outbox = join(hub, Principal(user="ann", expires_at=10.0), Words())
    refreshed = join(hub, Principal(user="bob", expires_at=10.0), Words())[0]
    join(hub, Principal(user="carol", expires_at=5.0), Words())[0].end()
    examine(hub)
    hub.change_principal(refreshed, Principal(user="bob", expires_at=20.0))
    assert hub.sessions_expiring(9.0) == []
    assert hub.sessions_expiring(10.0) == [ends]
    hub.expire(ends)
    assert client.told[-2:] == ["dropped news: expired", "expired"]
    assert outbox.writes == [b"!news:expired "]
    assert hub.sessions_expiring(20.0) == [refreshed]


def test_a_refreshed_credential_is_the_same_users() -> None:
    hub = make_hub(Reads())
    session = join(hub, ANN, Words())[0]
    with pytest.raises(Unauthorized):
        hub.change_principal(session, Principal(user="bob"))


def test_who_does_not_follow_the_channel_is_told_where_the_door_wants_it() -> None:
    hub = make_hub(Reads())
    follows = join(hub, Principal(user="ann", door="v1"), Words())[0]
    other = join(hub, ANN, Words())[0]
    idle = hub.open(Principal(user="ann", door="v1"), other.encoder, other.client)
    told: list[object] = []
    hub.on_not_subscribed["v1"] = lambda session, channel: told.append((session, channel))
    hub.unsubscribe(other, NEWS)
    hub.drop_subscription(NEWS, "ann", Reason.UNSUBSCRIBED)
    assert told == [(idle, NEWS)]
    assert not follows.subscriptions
    hub.drop_subscription(None, "ann", Reason.UNSUBSCRIBED)
    assert len(told) == 1


def test_a_marker_is_requested_only_for_a_client_with_a_right() -> None:
    hub = make_hub(Reads())
    _, ann, _ = join(hub, ANN, Words())
    _, ben, _ = join(hub, Principal(user="ben"), Words())
    request = examine(hub, marker=None, ben=b"-")
    assert not request.mark
    assert (ann.told, ben.told) == ([], ["refused news: Forbidden"])
    request = examine(hub)
    assert request.mark
    assert request.users == ("ann",)
    assert ann.told == ["subscribed news"]


def test_no_marker_is_requested_where_nobody_has_a_right() -> None:
    reads = Reads()
    hub = make_hub(reads)
    join(hub, ANN, Words())
    examine(hub, marker=None, ann=b"-")
    assert hub.feed(NEWS) is None
    assert len(reads.examine) == 1


def test_a_right_that_is_lost_before_the_marker_is_written_is_seen() -> None:
    hub = make_hub(Reads())
    _, client, _ = join(hub, ANN, Words())
    examine(hub, marker=None)
    examine(hub, ann=b"-")
    assert client.told == ["refused news: Forbidden"]


MANY = [Channel(f"many:{number}") for number in range(1000)]


async def until(done: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not done():
            await asyncio.sleep(0)


async def test_a_client_of_many_channels_leaves_them_in_slices() -> None:
    reads = Reads()
    hub = make_hub(reads)
    session = join(hub, ANN, Words(), *MANY)[0]
    feeds = hub.feeds()
    session.end()
    assert hub.total == 0
    assert not session.subscriptions
    assert not reads.released
    again = join(hub, ANN, Words(), MANY[0])[0]
    await until(lambda: len(reads.released) == len(MANY) - 1)
    # The client that reconnected has kept the stream.
    assert reads.released == feeds[1:]
    assert hub.feed(MANY[0]) is feeds[0]
    again.end()
    assert reads.released[-1] is feeds[0]


def is_live(subscription: Subscription) -> bool:
    return subscription.mode is SubscriptionMode.LIVE


async def test_a_client_of_many_channels_stalls_and_catches_up_in_slices() -> None:
    hub = make_hub(Reads())
    session = join(hub, ANN, Words(), *MANY)[0]
    for channel in MANY:
        examine(hub, channel)
    subscriptions = list(session.subscriptions.values())
    assert all(is_live(each) for each in subscriptions)
    session.pause()
    assert all(is_live(each) for each in subscriptions)
    await until(lambda: not any(is_live(each) for each in subscriptions))
    assert hub.behind_count == len(MANY)
    session.resume()
    await until(lambda: all(is_live(each) for each in subscriptions))
    assert hub.behind_count == 0
    # The last call is effective, regardless of the order.
    session.pause()
    session.resume()
    session.pause()
    await until(lambda: not any(is_live(each) for each in subscriptions))
    session.resume()
    session.pause()
    session.resume()
    await until(lambda: all(is_live(each) for each in subscriptions))
    session.pause()
    await until(lambda: hub.behind_count == len(MANY))
    hub.close(session)
    await until(lambda: hub.behind_count == 0)


async def test_what_concerns_all_channels_or_clients_is_done_in_slices() -> None:
    reads = Reads()
    hub = make_hub(reads)
    clients = [join(hub, ANN, Words(), *MANY[:2])[1] for _ in range(200)]
    session, client, _ = join(hub, ANN, Words(), *MANY)
    reads.examine.clear()
    hub.recheck(None)
    assert not reads.examine
    await until(lambda: len(reads.examine) == len(MANY))
    hub.drop_subscription(None, "ann", Reason.UNSUBSCRIBED)
    assert len(session.subscriptions) == len(MANY)
    await until(lambda: not session.subscriptions)
    assert client.told == [f"dropped {channel}: unsubscribed" for channel in MANY]
    hub.disconnect_user("ann", Reason.DISCONNECTED)
    assert "disconnect: disconnected" not in clients[0].told
    # In no order.
    everyone = [client, *clients]
    await until(lambda: all(each.told[-1] == "disconnect: disconnected" for each in everyone))


def read(hub: Hub, *records: Record) -> None:
    """Reply to a read of all new entries, and flush."""
    feed = hub.feed(NEWS)
    assert feed
    if records:
        feed.on_records(records)
    feed.on_read_to_end()
    hub.flush()


def page(hub: Hub, *records: Record) -> None:
    """Reply to the feed's page request."""
    feed = hub.feed(NEWS)
    assert feed
    request = feed.page_request()
    assert request
    state = StreamState(
        exists=True,
        first=records[0].id,
        last=feed.position,
        length=len(records),
        added=feed.added or 0,
        max_deleted=ZERO_ID,
        incarnation=INCARNATION,
    )
    after = [record for record in records if record.id > request.start]
    feed.on_page(request, Page(state=state, records=after, complete=True))
    hub.flush()


def test_a_held_client_receives_the_entries_before_the_command_and_no_later_ones() -> None:
    reads = Reads()
    hub = make_hub(reads)
    session, _, outbox = join(hub, ANN, Words())
    other = join(hub, Principal(user="bob"), Words())[2]
    examine(hub)
    reached: list[str] = []
    subscription = session.subscriptions[NEWS]
    subscription.feed.hold(subscription, EntryID(2, 0), lambda: reached.append("command"))
    assert reads.reads == [hub.feed(NEWS)]
    records = event("one", 1), event("two", 2), event("three", 3)
    read(hub, *records)
    assert other.writes == [b"one two three "]
    assert not reached
    page(hub, *records)
    assert outbox.writes == [b"one two "]
    assert reached == ["command"]
    subscription.feed.release(subscription)
    page(hub, *records)
    assert outbox.writes == [b"one two ", b"three "]
    assert subscription.mode is SubscriptionMode.LIVE


def test_a_hold_ends_when_nothing_is_left_to_read_or_the_client_leaves() -> None:
    hub = make_hub(Reads())
    reached: list[str] = []
    sessions = [join(hub, Principal(user=user), Words())[0] for user in ("ann", "bob")]
    examine(hub)
    for session in sessions:
        subscription = session.subscriptions[NEWS]
        user = session.principal.user
        subscription.feed.hold(subscription, EntryID(5, 0), partial(reached.append, user))
    sessions[1].end()
    assert reached == ["bob"]
    read(hub)
    assert reached == ["bob", "ann"]


def revocation(user: str, number: int) -> Record:
    entry_id = EntryID(number, 0)
    return Record(entry_id, 0, 0, Revocation(user=user, id=entry_id))


@pytest.mark.parametrize("has_entry", [True, False])
def test_events_before_a_revocation_are_delivered(has_entry: bool) -> None:
    """The change of the hash is often read before the entries that precede it."""
    hub = make_hub(Reads())
    _, client, outbox = join(hub, ANN, Words())
    examine(hub)
    feed = hub.feed(NEWS)
    assert feed
    feed.on_rights_changed()
    examine(hub, last=EntryID(2, 0), ann=b"-")
    assert outbox.writes == []
    last = revocation("ann", 2) if has_entry else event("secret", 2)
    read(hub, event("one", 1), last, event("secret", 3))
    words = b"one !news:revoked " if has_entry else b"!news:revoked "
    assert outbox.writes == [words]
    assert client.told[-1] == "dropped news: revoked"


def test_a_deferred_client_receives_later_events_and_a_notice_unless_none_can_be_missing() -> None:
    reads = Reads()
    hub = make_hub(reads)
    now = EntryID(1000, 0)
    session, client, outbox = join(hub, ANN, Words())
    unknown = session.subscriptions[NEWS]
    feed = hub.feed(NEWS)
    assert feed
    unknown.defer(now)
    assert unknown.position == Position(now)
    # Reads that are rejected for a while do not end it.
    feed.on_examine_failed(feed.examine_request(), "the server is loading its data")
    assert (session.subscriptions, client.told) == ({NEWS: unknown}, [])
    records = [event("new", 1100)]
    state = StreamState(
        exists=True,
        first=records[0].id,
        last=records[-1].id,
        length=1,
        added=1,
        max_deleted=ZERO_ID,
        incarnation=INCARNATION,
    )

    def answer() -> None:
        request = feed.examine_request()
        own = {each.id: each.digest for each in records if each.id in request.own}
        feed.on_examined(request, Examined(state=state, rights={}, own=own))
        while (page := feed.page_request()) is not None:
            after = [each for each in records if each.id > page.start]
            feed.on_page(page, Page(state=state, records=after, complete=True))
        hub.flush()

    answer()
    # There is one notice, although the first event is later than the position.
    assert client.told == ["subscribed news"]
    assert b"".join(outbox.writes) == b"!news:unknown_position new "
    # The feed's position is known now.
    feed.on_unsettled()
    other, told, box = join(hub, ANN, Words())
    other.subscriptions[NEWS].defer(now)
    records.append(event("newest", 1200))
    state = replace(state, last=records[-1].id, length=2, added=2)
    answer()
    feed.on_records(records[-1:])
    hub.flush()
    assert told.told == ["subscribed news"]
    assert b"".join(box.writes) == b"newest "
    assert b"".join(outbox.writes) == b"!news:unknown_position new newest "
