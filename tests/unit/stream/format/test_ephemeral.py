"""relay/stream/format/ephemeral.py: payload to event, or a reason."""

from __future__ import annotations

import pytest

from relay.core.model import Channel, Event
from relay.stream.format import entry
from relay.stream.format.ephemeral import decode, encode

NEWS = Channel("news")


def event(payload: bytes) -> Event:
    made = decode(NEWS, payload, 1000)
    assert isinstance(made, Event), made
    return made


def test_an_event_without_an_id() -> None:
    made = event(b'{"data":{"a":[1,2.0]},"type":"typing","client":"c1","to":["anna","group:x"]}')
    assert (made.channel, made.id, made.is_json) == (NEWS, None, True)
    assert made.data == b'{"a":[1,2.0]}'
    assert (made.type, made.client, made.to) == (
        "typing",
        "c1",
        frozenset({"user:anna", "group:x"}),
    )
    assert event(b'{"data":null,"to":"anna ben"}').to == frozenset({"user:anna", "user:ben"})


def test_text_that_is_not_json() -> None:
    made = event(b'{"text":"<a/>"}')
    assert (made.data, made.is_json) == (b"<a/>", False)


@pytest.mark.parametrize(
    "made",
    [
        Event(NEWS, None, b'{"a":1}', True, type="t", client="c", to=frozenset({"user:a b"})),
        Event(NEWS, None, "grüß".encode(), False),
        Event(NEWS, None, b"[1]", True, extra={b"args": b"1"}),
    ],
)
def test_decode_gives_back_what_was_encoded(made: Event) -> None:
    again = event(encode(made))
    for name in ("channel", "id", "data", "is_json", "type", "client", "to", "uid", "info"):
        assert getattr(again, name) == getattr(made, name)


def test_binary_parts_travel_as_base64_and_are_text_in_the_data() -> None:
    placed = b'["a",%b]' % entry.placeholder(0)
    made = Event(NEWS, None, placed, True, extra={b"binary.0": b"\xff\0", b"args": b"2"})
    again = event(encode(made))
    assert again.data == b'["a","/wA="]'
    assert again.extra == {b"binary.0": b"\xff\0", b"args": b"2", b"data": placed}


def test_data_that_nests_deeper_than_can_be_written_is_rejected() -> None:
    deep = b"[" * 500 + b"]" * 500
    assert decode(NEWS, b'{"data":' + deep + b"}", 10_000) == "Recursion limit reached"


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (b'{"data":1,"binary":["*"]}', "binary is not a list of base64 strings"),
        (b'{"data":1,"binary":5}', "binary is not a list of base64 strings"),
        (b'{"data":1,"binary":[5]}', "binary is not a list of base64 strings"),
        (b"hello", "not JSON"),
        (b'"\xff"', "not JSON"),
        (b"[1]", "not a JSON object"),
        (b"{}", "no data"),
        (b'{"data":1,"text":"x"}', "both data and text"),
        (b'{"data":1,"type":5}', "type, client, text and door must be strings"),
        (b'{"data":1,"type":"relay:gap"}', "reserved type"),
        (b'{"data":1,"to":[]}', "to has no recipients"),
        (b'{"data":1,"to":{}}', "to is not a list of names"),
        (b" " * 1001, "too large: 1001 bytes"),
    ],
)
def test_reasons(payload: bytes, reason: str) -> None:
    assert decode(NEWS, payload, 1000) == reason


def test_what_decode_would_refuse_is_not_encoded() -> None:
    with pytest.raises(ValueError, match="reserved type"):
        encode(Event(NEWS, None, b"1", True, type="relay:x"))
    with pytest.raises(ValueError, match="surrogate"):
        encode(Event(NEWS, None, b"1", True, client="\ud800"))
