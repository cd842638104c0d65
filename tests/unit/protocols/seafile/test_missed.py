"""What is remembered of a client, and what it needs when it is back."""

from __future__ import annotations

from relay.core.model import Channel, EntryID, Event
from relay.protocols.seafile import missed
from relay.protocols.seafile.missed import Place

ALICE = frozenset({"user:alice"})


def event(ms: int, kind: str, to: str | None = None) -> Event:
    recipients = None if to is None else frozenset({to})
    return Event(
        Channel("seafile:a"), EntryID(ms, 0), b"{}", is_json=True, type=kind, to=recipients
    )


def test_the_last_update_and_all_locks_and_permissions_in_their_order() -> None:
    newest_first = [
        event(9, "file-lock-changed"),
        event(8, "comment-update"),
        event(7, "repo-update"),
        event(6, "folder-perm-changed", "user:alice"),
        event(5, "folder-perm-changed", "user:bob"),
        event(4, "repo-update"),
        event(3, "file-lock-changed"),
        event(2, "file-lock-changed"),
        event(1, "repo-update"),
    ]
    found = missed.needed(newest_first, EntryID(2, 0), ALICE)
    assert [each.id and each.id.ms for each in found] == [3, 6, 7, 9]
    assert missed.needed(newest_first, EntryID(9, 0), ALICE) == []


def test_an_update_that_was_seen_is_not_sent_again() -> None:
    assert missed.needed([event(1, "repo-update")], EntryID(1, 0), ALICE) == []


def test_what_is_stored_is_read_again_and_rubbish_is_nothing() -> None:
    stored: missed.Stored = {}
    places = [place(5, "w:1", 7, ended=True), place(6, "w:2", 2**32 - 1)]
    for each in places:
        missed.put(stored, "a", each)
    (again,) = missed.read(b"".join(missed.write(stored)))
    assert missed.places_of(again, "a") == places
    assert missed.places_of(again, "b") == []
    for rubbish in (
        None,
        b"",
        b"[]",
        b"{",
        b'{"a":1}',
        b'{"a":["x","y"]}',
        b'{"a":["1"]}',
        b"1",
        b'{"a":["1-0","w:1"]}',
        b'{"a":null}',
    ):
        stored = {name: found for part in missed.read(rubbish) for name, found in part.items()}
        assert missed.places_of(stored, "a") == []
        missed.put(stored, "a", places[0])
        assert missed.places_of(stored, "a") == [places[0]]


def test_many_libraries_are_stored_in_parts_that_are_short_work() -> None:
    stored: missed.Stored = {}
    for number in range(10_000):
        missed.put(stored, f"{number:036}", place(number, "w:1"))
    parts = list(missed.write(stored))
    assert len(parts) == 20
    again = list(missed.read(b"".join(parts)))
    assert len(again) == 20
    assert missed.places_of(again[19], f"{9_999:036}") == [place(9_999, "w:1")]
    # One value of an earlier version.
    old = b'{"a":[["5-0","w:1",7,true]],"b":[]}'
    assert [missed.places_of(each, "a") for each in missed.read(old)] == [
        [place(5, "w:1", 7, ended=True)]
    ]


def place(ms: int, connection: str, token: int = 0, *, ended: bool = False) -> Place:
    return Place(EntryID(ms, 0), connection, token, ended)


def stored_with(*places: Place) -> missed.Stored:
    stored: missed.Stored = {}
    for each in places:
        missed.put(stored, "a", each)
    return stored


def test_a_connections_own_place_is_replaced_and_those_of_others_stay() -> None:
    other, mine = place(5, "two", 2), place(9, "one", 1, ended=True)
    stored = stored_with(place(5, "one", 1), other, mine)
    assert missed.places_of(stored, "a") == [other, mine]


def test_the_same_token_is_the_same_client_and_its_latest_place_counts() -> None:
    earlier, later = place(5, "one", 1, ended=True), place(9, "two", 1)
    # The end of a connection may be noticed when the next one has begun.
    for order in ((earlier, later), (later, earlier)):
        assert missed.places_of(stored_with(*order), "a") == [later]


def test_few_places_are_kept_of_a_library() -> None:
    stored = stored_with(*(place(number, str(number), number) for number in range(9)))
    assert [each.at.ms for each in missed.places_of(stored, "a")] == [5, 6, 7, 8]


def test_a_client_resumes_its_own_place() -> None:
    places = [
        place(3, "asleep", 1),
        place(5, "restarted", 2, ended=True),
        place(7, "again", 3, ended=True),
        place(9, "other machine", 4),
    ]
    for token, ms in ((1, 3), (2, 5), (4, 9), (99, 7)):
        assert missed.resumed(places, token) == EntryID(ms, 0)
    # Connections of a worker that was killed.
    assert missed.resumed([places[0], places[3]], 99) == EntryID(3, 0)
    assert missed.resumed([], 99) is None


def test_one_memory_for_a_user_and_program() -> None:
    names = {missed.name(user, agent) for user in ("a", "b") for agent in ("", "Seafile/9")}
    assert len(names) == 4
    assert all(name.startswith("seafile:seen:") and len(name) < 64 for name in names)


def test_browsers_are_known() -> None:
    assert missed.is_browser("Mozilla/5.0 (X11; Linux x86_64) Chrome/126.0")
    assert not missed.is_browser("Seafile/9.0.20 (Linux)")
    assert not missed.is_browser("")
