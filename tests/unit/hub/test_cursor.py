"""Cursors are decoded as encoded, and other text is rejected."""

from __future__ import annotations

from base64 import urlsafe_b64decode, urlsafe_b64encode
from itertools import count

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.core.errors import BadRequest
from relay.core.model import Channel, EntryID, Position, parse_channel
from relay.hub import cursor

U64 = st.integers(0, 2**64 - 1)
POSITIONS = st.builds(
    Position,
    st.builds(EntryID, U64, U64),
    added=st.none() | U64,
    incarnation=st.none() | U64,
    digest=st.none() | st.integers(0, 2**16 - 1),
)
CHANNELS = st.text(st.characters(codec="utf-8", categories=["L", "N", "P"]), min_size=1).map(
    lambda text: parse_channel(text.replace("{", "(").replace("}", ")")[:255])
)
NEWS = Channel("news")
PLACE = Position(EntryID(1763700000000, 3), added=9, incarnation=2**64 - 1, digest=7)


def twins() -> tuple[Channel, Channel]:
    """Return two channels whose hashes are the same."""
    seen: dict[bytes, Channel] = {}
    for number in count():
        channel = Channel(f"c{number}")
        name = cursor.part(channel, PLACE)[:4]
        if name in seen:
            return seen[name], channel
        seen[name] = channel
    raise AssertionError


@given(st.lists(st.tuples(CHANNELS, POSITIONS), min_size=1, max_size=8, unique_by=lambda p: p[0]))
def test_every_position_comes_back(places: list[tuple[Channel, Position]]) -> None:
    """The text is safe in a header, a query and an SSE line."""
    text = cursor.encode(places).decode("ascii")
    assert cursor.decode(text, [channel for channel, _ in places]) == dict(places)
    assert text.replace("-", "").replace("_", "").replace(".", "").isalnum()
    assert text.encode() == cursor.join(cursor.part(*place) for place in places)


def test_it_is_compact() -> None:
    """A cursor is sent with every event."""
    assert len(cursor.part(NEWS, PLACE)) <= 30


@given(st.text(max_size=200) | st.text("c1.-_AB", max_size=50).map("c1.".__add__))
def test_any_other_text_is_a_bad_request_or_a_position(text: str) -> None:
    """No other exception is raised, and accepted text is what the encoder would return."""
    try:
        found = cursor.decode(text, [NEWS])
    except BadRequest:
        return
    if text.startswith("c1.") and len(text.split(".")) == 2:
        for position in found.values():
            if _of_an_earlier_version(text):
                continue
            assert cursor.encode([(NEWS, position)]).decode() == text


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "c1.",
            "c1.AAAA",
            "c2.AAAA",
            "x" * 100_000,
            "c1." + "A" * 60_000,
            "c1." + "." * 60_000,
        ),
        *("c1.\ud800", "-1", "1-", "1-2-3", "9" * 5000, f"{2**64}-0", "$", "1 -2", "١-٢"),
    ],
)
def test_garbage_is_a_bad_request(text: str) -> None:
    """The length does not matter."""
    with pytest.raises(BadRequest):
        cursor.decode(text, [NEWS])


@given(POSITIONS, st.data())
def test_a_cut_or_padded_cursor_is_a_bad_request(position: Position, data: st.DataObject) -> None:
    """A proxy that truncates a header must not change a client's position."""
    text = cursor.encode([(NEWS, position)]).decode()
    with pytest.raises(BadRequest):
        cursor.decode(text[: data.draw(st.integers(3, len(text) - 1))], [NEWS])
    for extra in ("=", ".", " ", "\n", "A", "AAAA"):
        with pytest.raises(BadRequest):
            cursor.decode(text + extra, [NEWS])


def _of_an_earlier_version(text: str) -> bool:
    part = text.removeprefix("c1.")
    return bool(urlsafe_b64decode(part + "=" * (-len(part) % 4))[3] & 1)


def test_a_cursor_of_an_earlier_version_is_a_stream_id_with_a_digest() -> None:
    """Its incarnation cannot be compared with present ones."""
    raw = cursor._name(NEWS) + bytes((7,)) + cursor._varint(0xABCD1234) + b"\x00\x07"
    raw += cursor._varint(9) + cursor._varint(1763700000000) + cursor._varint(3)
    text = "c1." + urlsafe_b64encode(raw).rstrip(b"=").decode()
    assert cursor.decode(text, [NEWS]) == {
        NEWS: Position(EntryID(1763700000000, 3), added=9, digest=7)
    }


def test_what_was_not_asked_for_is_ignored() -> None:
    """A client that removes a channel keeps its cursor."""
    text = cursor.encode([(NEWS, PLACE), (Channel("other"), Position(EntryID(1, 1)))]).decode()
    assert cursor.decode(text, [NEWS]) == {NEWS: PLACE}
    assert cursor.decode(text, [Channel("third"), NEWS]) == {NEWS: PLACE}


def test_a_plain_id_resumes_one_channel_only() -> None:
    """IDs of different streams have no order."""
    assert cursor.decode("12-3", [NEWS]) == {NEWS: Position(EntryID(12, 3))}
    with pytest.raises(BadRequest, match="must be a cursor"):
        cursor.decode("12-3", [NEWS, Channel("other")])


def test_channels_with_the_same_three_bytes_keep_their_places() -> None:
    """They are distinguished by order. Each has a position, because none would mean "from now"."""
    first, second = twins()
    other = Position(EntryID(5, 5))
    text = cursor.encode([(first, PLACE), (second, other)]).decode()
    assert cursor.decode(text, [first, second]) == {first: PLACE, second: other}
    alone = cursor.encode([(second, other)]).decode()
    assert set(cursor.decode(alone, [first, second])) == {first, second}


@pytest.mark.parametrize(
    "position",
    [
        Position(EntryID(2**64, 0)),
        Position(EntryID(1, 0), digest=2**16),
        Position(EntryID(1, 0), added=-1),
    ],
)
def test_a_number_that_does_not_fit_is_our_own_bug(position: Position) -> None:
    """The number is not encoded as an invalid cursor."""
    with pytest.raises(ValueError, match="bits"):
        cursor.part(NEWS, position)
