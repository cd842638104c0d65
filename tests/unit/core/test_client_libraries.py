"""What client libraries decode, split, reserve and send."""

from __future__ import annotations

import json
import time

import pytest

from relay.core.client_libraries import (
    SOCKETIO_RESERVED,
    event_source_type,
    keeps_offsets,
    one_line,
    position_in,
    sockjs_event_source,
)


def base36(number: int) -> str:
    digits = ""
    while number:
        number, digit = divmod(number, 36)
        digits = "0123456789abcdefghijklmnopqrstuvwxyz"[digit] + digits
    return digits


@pytest.mark.parametrize(
    ("mark", "offsets"),
    [
        ("k4x0q9zb", True),  # engine.io-client 6.6: random
        ("", False),
        (str(int(time.time())), False),  # C++ and .NET: seconds
        (f"{time.time():.4f}", False),  # Python
        (base36(int(time.time() * 1000)), False),  # Dart: milliseconds
        (base36(int(time.time() * 1000) - 3_600_000), False),  # its clock is late
        ("Pq3Y7aB", False),  # Java and older ones: base 64
        ("12345678", False),
    ],
)
def test_only_a_certain_client_gets_cursors_in_its_events(mark: str, offsets: bool) -> None:
    query = {"t": mark} if mark else {}
    assert keeps_offsets(query, {}) is offsets
    # A client that sends the ID of a session has kept it.
    assert keeps_offsets(query, {"pid": "x"})


@pytest.mark.parametrize(
    ("query", "position"),
    [
        ([("channel", "a")], None),
        ([("last_event_id", "1-1")], "1-1"),
        ([("last_event_id", "1-1"), ("lastEventId", "2-1")], "2-1"),
        ([("Last-Event-ID", "1-1"), ("last_event_id", "")], "1-1"),
        ([("evs_last_event_id", "1-1"), ("evs_preamble", "1")], "1-1"),
        ([("_", "1700000000000"), ("id", "7"), ("t", "abc"), ("lastname", "x")], None),
    ],
)
def test_positions_are_found_in_every_spelling(
    query: list[tuple[str, str]], position: str | None
) -> None:
    assert position_in(query, {"channel"}) == position


@pytest.mark.parametrize(
    "parameter",
    [
        ("since", "1"),
        ("lastId", "1"),
        ("last-message-id", "1"),
        ("cursor", ""),
        ("offset", "0"),
        ("eventId", "x"),
        ("x", "1700000000000-0"),
        ("x", "c1.AAAA"),
    ],
)
def test_an_unknown_position_is_an_error(parameter: tuple[str, str]) -> None:
    with pytest.raises(ValueError, match="send the position as last_event_id"):
        position_in([parameter], {"channel"})
    assert position_in([parameter], {parameter[0]}) is None


def test_characters_that_libraries_change() -> None:
    assert sockjs_event_source(b'a["100%41"]') == b'a["100%2541"]'
    text = '{"\u2028":"\u0085\u2029é\\u2028"}'
    assert len(one_line(text.encode()).decode().splitlines()) == 1
    assert json.loads(one_line(text.encode())) == json.loads(text)
    assert event_source_type("a\r\nb") == "a  b"
    assert event_source_type("error") is None


def test_reserved_names_of_each_generation() -> None:
    assert {"error", "reconnect", "ping"} <= SOCKETIO_RESERVED[3]
    assert {"connect", "disconnect"} <= SOCKETIO_RESERVED[3] & SOCKETIO_RESERVED[4]
    assert "error" not in SOCKETIO_RESERVED[4]
