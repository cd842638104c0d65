"""Stored positions of clients, and the events that they have missed."""

from __future__ import annotations

from relay.core.model import Channel, EntryID, Event
from relay.protocols.seafile import missed
from relay.protocols.seafile.missed import ClientPosition

ALICE = frozenset({"user:alice"})


def event(ms: int, kind: str, to: str | None = None) -> Event:
    recipients = None if to is None else frozenset({to})
    return Event(
        Channel("seafile:a"), EntryID(ms, 0), b"{}", is_json=True, type=kind, to=recipients
    )


def test_needs_the_last_update_and_all_locks_and_permissions_in_order() -> None:
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


def test_does_not_repeat_a_received_update() -> None:
    assert missed.needed([event(1, "repo-update")], EntryID(1, 0), ALICE) == []


def test_reads_a_stored_record_and_ignores_invalid_ones() -> None:
    stored: missed.Stored = {}
    places = [place(5, "w:1", 7, ended=True), place(6, "w:2", 2**32 - 1)]
    for each in places:
        missed.put(stored, "a", each)
    (again,) = missed.read(b"".join(missed.write(stored)))
    assert missed.positions_of(again, "a") == places
    assert missed.positions_of(again, "b") == []
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
        assert missed.positions_of(stored, "a") == []
        missed.put(stored, "a", places[0])
        assert missed.positions_of(stored, "a") == [places[0]]


def test_many_libraries_are_stored_in_parts_of_limited_size() -> None:
    stored: missed.Stored = {}
    for number in range(10_000):
        missed.put(stored, f"{number:036}", place(number, "w:1"))
    parts = list(missed.write(stored))
    assert len(parts) == 20
    again = list(missed.read(b"".join(parts)))
    assert len(again) == 20
    assert missed.positions_of(again[19], f"{9_999:036}") == [place(9_999, "w:1")]
    # A record of an earlier version is a single part.
    old = b'{"a":[["5-0","w:1",7,true]],"b":[]}'
    assert [missed.positions_of(each, "a") for each in missed.read(old)] == [
        [place(5, "w:1", 7, ended=True)]
    ]


def place(ms: int, connection: str, token: int = 0, *, ended: bool = False) -> ClientPosition:
    return ClientPosition(EntryID(ms, 0), connection, token, ended)


def stored_with(*places: ClientPosition) -> missed.Stored:
    stored: missed.Stored = {}
    for each in places:
        missed.put(stored, "a", each)
    return stored


def test_replaces_only_the_position_of_the_same_connection() -> None:
    other, mine = place(5, "two", 2), place(9, "one", 1, ended=True)
    stored = stored_with(place(5, "one", 1), other, mine)
    assert missed.positions_of(stored, "a") == [other, mine]


def test_keeps_the_latest_position_of_a_token() -> None:
    earlier, later = place(5, "one", 1, ended=True), place(9, "two", 1)
    # The end of a connection may be detected after the next one has begun.
    for order in ((earlier, later), (later, earlier)):
        assert missed.positions_of(stored_with(*order), "a") == [later]


def test_keeps_few_positions_per_library() -> None:
    stored = stored_with(*(place(number, str(number), number) for number in range(9)))
    assert [each.at.ms for each in missed.positions_of(stored, "a")] == [5, 6, 7, 8]


def test_a_client_resumes_at_its_own_position() -> None:
    places = [
        place(3, "asleep", 1),
        place(5, "restarted", 2, ended=True),
        place(7, "again", 3, ended=True),
        place(9, "other machine", 4),
    ]
    for token, ms in ((1, 3), (2, 5), (4, 9), (99, 7)):
        assert missed.resumed(places, token) == EntryID(ms, 0)
    # Connections of a killed worker.
    assert missed.resumed([places[0], places[3]], 99) == EntryID(3, 0)
    assert missed.resumed([], 99) is None


def test_one_record_per_user_and_program() -> None:
    names = {missed.name(user, agent) for user in ("a", "b") for agent in ("", "Seafile/9")}
    assert len(names) == 4
    assert all(name.startswith("seafile:seen:") and len(name) < 64 for name in names)


def test_recognizes_browsers() -> None:
    assert missed.is_browser("Mozilla/5.0 (X11; Linux x86_64) Chrome/126.0")
    assert not missed.is_browser("Seafile/9.0.20 (Linux)")
    assert not missed.is_browser("")
