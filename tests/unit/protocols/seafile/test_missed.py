"""What is remembered of a client, and what it needs when it is back."""

from __future__ import annotations

from relay.model import Channel, EntryID, Event
from relay.protocols.seafile import missed

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
    places: missed.Places = {"a": (EntryID(5, 1), "w:1"), "b": (EntryID(6, 0), "w:2")}
    assert missed.read(missed.write(places)) == places
    for rubbish in (None, b"", b"[]", b"{", b'{"a":1}', b'{"a":["x","y"]}', b'{"a":["1"]}', b"1"):
        assert missed.read(rubbish) == {}


def test_of_two_connections_with_one_memory_the_rearmost_place_counts() -> None:
    stored: missed.Places = {"a": (EntryID(5, 0), "one"), "b": (EntryID(5, 0), "two")}
    mine = {"a": EntryID(9, 0), "b": EntryID(9, 0), "c": EntryID(9, 0)}
    assert missed.merged(stored, mine, "one") == {
        "a": (EntryID(9, 0), "one"),
        "b": (EntryID(5, 0), "two"),
        "c": (EntryID(9, 0), "one"),
    }


def test_one_memory_for_a_user_and_program() -> None:
    names = {missed.name(user, agent) for user in ("a", "b") for agent in ("", "Seafile/9")}
    assert len(names) == 4
    assert all(name.startswith("seafile:seen:") and len(name) < 64 for name in names)


def test_browsers_are_known() -> None:
    assert missed.is_browser("Mozilla/5.0 (X11; Linux x86_64) Chrome/126.0")
    assert not missed.is_browser("Seafile/9.0.20 (Linux)")
    assert not missed.is_browser("")
