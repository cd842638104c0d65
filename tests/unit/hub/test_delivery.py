from relay.core.model import (
    ZERO_ID,
    Broken,
    Channel,
    EntryID,
    Event,
    Principal,
    Record,
    Revocation,
    StreamState,
)
from tests.support.hub import NEWS, Reads, Words, event, examine, join, make_hub

ANN = Principal(user="ann")
BOB = Principal(user="bob", groups=frozenset({"kitchen"}), client="c1")


def test_a_batch_is_encoded_once_and_written_once_for_all() -> None:
    hub, words = make_hub(Reads()), Words()
    outboxes = [join(hub, ANN, words)[2] for _ in range(3)]
    examine(hub)
    feed = hub.feed(NEWS)
    assert feed
    feed.on_records([event("one", 1), event("two", 2)])
    hub.flush()
    assert words.encoded == 2
    assert [outbox.writes for outbox in outboxes] == [[b"one two "]] * 3


def test_to_names_users_groups_and_clients() -> None:
    hub, words = make_hub(Reads()), Words()
    ann, bob = join(hub, ANN, words)[2], join(hub, BOB, words)[2]
    examine(hub)
    feed = hub.feed(NEWS)
    assert feed
    names = ["user:ann", "group:kitchen", "client:c1", "user:carol"]
    feed.on_records([event(name, number, name) for number, name in enumerate(names, 1)])
    hub.flush()
    assert ann.writes == [b"user:ann "]
    assert bob.writes == [b"group:kitchen client:c1 "]


def test_a_revocation_within_a_batch_has_its_place() -> None:
    hub, words = make_hub(Reads()), Words()
    _, client, ann = join(hub, ANN, words)
    bob = join(hub, BOB, words)[2]
    examine(hub)
    feed = hub.feed(NEWS)
    assert feed
    place = EntryID(2, 0)
    revocation = Record(place, 0, 9, Revocation(place, "ann"))
    feed.on_records([event("before", 1), revocation, event("after", 3)])
    hub.flush()
    assert b"".join(ann.writes) == b"before !news:revoked "
    assert b"".join(bob.writes) == b"before after "
    assert client.told == ["subscribed news", "dropped news: revoked"]


def test_an_entry_that_cannot_be_decoded_is_set_aside_and_the_next_ones_are_delivered() -> None:
    hub, words = make_hub(Reads()), Words()
    broken = Broken(EntryID(2, 0), "no data", ())
    set_aside: list[tuple[Channel, Broken]] = []
    hub.on_broken = lambda channel, entry: set_aside.append((channel, entry))
    ann = join(hub, ANN, words)[2]
    examine(hub)
    feed = hub.feed(NEWS)
    assert feed
    feed.on_records([event("before", 1), Record(broken.id, 0, 1, broken), event("after", 3)])
    hub.flush()
    assert b"".join(ann.writes) == b"before after "
    assert set_aside == [(NEWS, broken)]
    text = hub.metrics.exposition()
    assert b"relay_events_total 3.0" in text
    assert b"relay_lag_seconds_count 1.0" in text


def test_a_personal_frame_carries_the_place_in_every_channel() -> None:
    hub, work = make_hub(Reads()), Channel("work")
    outbox = join(hub, ANN, Words(personal=True), NEWS, work)[2]
    examine(hub)
    examine(hub, work)
    feed = hub.feed(NEWS)
    assert feed
    feed.on_records([event("one", 5), event("two", 6)])
    hub.flush()
    assert outbox.writes == [b"one news@5-0+1,work@0-0+0 two news@6-0+2,work@0-0+0 "]


def test_a_full_socket_gets_no_events_and_its_place_stays() -> None:
    reads = Reads()
    hub, words = make_hub(reads), Words()
    session, _, outbox = join(hub, ANN, words)
    examine(hub)
    feed = hub.feed(NEWS)
    assert feed
    outbox.full = True
    feed.on_records([event("one", 1)])
    hub.flush()
    feed.on_records([event("two", 2)])
    hub.flush()
    assert outbox.writes == [b"one "]
    assert session.subscriptions[NEWS].position.id == EntryID(1, 0)
    outbox.full = False
    session.resume()
    assert reads.pages == [feed]


def test_a_format_without_words_for_a_gap_has_its_clients_noticed() -> None:
    hub, words = make_hub(Reads()), Words(speechless=True)
    session, client, outbox = join(hub, ANN, words)
    other = join(hub, BOB, words)[1]
    examine(hub)
    feed = hub.feed(NEWS)
    assert feed
    client.on_notice = session.end
    feed.on_gap(
        StreamState(
            exists=True,
            first=EntryID(5, 0),
            last=EntryID(5, 0),
            length=1,
            added=5,
            max_deleted=ZERO_ID,
        ),
        EntryID(5, 0),
        1,
    )
    hub.flush()
    assert client.told[-1] == "noticed news: trimmed"
    assert other.told[-1] == "noticed news: trimmed"
    assert not outbox.writes
    assert hub.total == 1


def test_an_ephemeral_event_of_a_door_reaches_that_doors_clients_only() -> None:
    hub, words, others = make_hub(Reads()), Words(), Words()
    others.door = "other"
    mine, theirs = join(hub, ANN, words)[2], join(hub, ANN, others)[2]
    examine(hub)
    feed = hub.feed(NEWS)
    assert feed
    feed.on_records([event("one ", 7)])
    for door in ("words", None):
        heard = Event(NEWS, None, str(door).encode(), is_json=False, door=door)
        feed.on_ephemeral(heard)
        assert heard.after == EntryID(7, 0)
    hub.flush()
    assert mine.writes == [b"one  words None "]
    assert theirs.writes == [b"one  None "]
