"""Conversion of emits to entries and back, and the recipients of an emit to several rooms."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.config.settings import StreamSettings
from relay.core.model import Channel, EntryID, Event
from relay.protocols.socketio import entry_format
from relay.protocols.socketio.entry_format import (
    Audience,
    Emit,
    UnusableEmit,
    audience,
    channel_of,
    room_of,
)
from relay.stream.format import entry

ID = EntryID(5, 0)
CHANNEL = Channel("axr:r")


def back(emit: Emit) -> tuple[str, Any, list[bytes]]:
    """Return the emit as a client receives it, after conversion to an entry and back."""
    what = entry_format.contents(emit)
    fields = entry.encode(what.data, type=what.type, extra=what.extra)
    event = entry.decode(CHANNEL, ID, fields, 1 << 20).body
    assert isinstance(event, Event), event
    name, (packet, attachments) = entry_format.encode_event(event)
    return name, orjson.loads(packet), attachments


def test_an_emit_of_one_argument_equals_an_xadd() -> None:
    what = entry_format.contents(Emit(name="msg", args=({"n": 1},), rooms=("r",)))
    assert (what.data, what.type, what.extra) == (b'{"n":1}', "msg", {})


def test_an_xadd_is_an_emit() -> None:
    def said(*fields: bytes) -> Any:
        event = entry.decode(CHANNEL, ID, fields, 1000).body
        assert isinstance(event, Event)
        return orjson.loads(entry_format.encode_event(event)[1].packet)

    assert said(b"data", b'{"a":1}', b"type", b"msg") == ["msg", {"a": 1}]
    assert said(b"data", b"no JSON") == ["message", "no JSON"]
    # Malformed fields that were written by hand instead of by the tap.
    assert said(b"data", b"1", b"args", b"2") == ["message", 1]
    assert said(b"data", b"1", b"packet", b"nonsense") == ["message", 1]
    assert said(b"data", b"1", b"packet", b"[1]", b"attachment.0", b"*") == ["message", 1]
    for packet in (b"[]", b"[1]", b"{}", b'"x"'):
        assert said(b"data", b"1", b"packet", packet) == ["message", 1]
    # A client that cannot fill a placeholder reconnects and receives the same event again.
    missing = b'["m",{"_placeholder":true,"num":1}]'
    assert said(b"data", b"1", b"packet", missing, b"attachment.0", b"AQI=") == ["message", 1]
    swapped = b'{"num":5,"_placeholder":true}'
    event = entry.decode(CHANNEL, ID, [b"data", swapped, b"binary.0", b"x"], 1000).body
    assert isinstance(event, Event)
    assert entry_format.encode_event(event)[1].attachments == []


@pytest.mark.parametrize(
    "key", [rb"\u005fplaceholder", rb"_placehol\u0064er", rb"_p\u006Caceholder"]
)
def test_an_escaped_placeholder_without_an_attachment_is_not_sent_with_attachments(
    key: bytes,
) -> None:
    """A 2.x client raises an exception for it, which stops its page or process."""
    first = entry.placeholder(0)
    for number in (b"7", b"0"):
        data = b'[%b,{"%b":true,"num":%b}]' % (first, key, number)
        event = entry.decode(CHANNEL, ID, [b"data", data, b"binary.0", b"x"], 1000).body
        assert isinstance(event, Event)
        assert entry_format.encode_event(event)[1].attachments == []
    # An escaped backslash makes a different key.
    other = b'[%b,{"\\%b":true}]' % (first, key)
    event = entry.decode(CHANNEL, ID, [b"data", other, b"binary.0", b"x"], 1000).body
    assert isinstance(event, Event)
    assert entry_format.encode_event(event)[1].attachments == [b"x"]


def test_the_name_in_a_packet_of_an_earlier_version_is_the_events_name() -> None:
    fields = [b"data", b"1", b"type", b"fine", b"packet", b'["connect",1]']
    event = entry.decode(CHANNEL, ID, fields, 1000).body
    assert isinstance(event, Event)
    # The encoder drops events with names that clients emit themselves.
    assert entry_format.encode_event(event)[0] == "connect"


json_values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53)
    | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.text(st.characters(codec="utf-8")), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


@given(st.text(st.characters(codec="utf-8")), st.lists(json_values, max_size=3))
def test_names_and_arguments_survive_encoding_and_decoding(name: str, args: list[Any]) -> None:
    emit = Emit(name=name, args=tuple(args), rooms=("r",))
    assert back(emit) == (name, [name, *args], [])


def test_binary_arguments_survive_and_are_base64_for_other_protocols() -> None:
    emit = Emit(name="b", args=({"x": [b"\1\2"]}, b"\xff"), rooms=("r",))
    place = {"_placeholder": True, "num": 0}
    assert back(emit) == (
        "b", ["b", {"x": [place]}, {**place, "num": 1}], [b"\1\2", b"\xff"],
    )  # fmt: skip
    what = entry_format.contents(emit)
    assert what.extra == {b"args": b"2", b"binary.0": b"\1\2", b"binary.1": b"\xff"}
    event = entry.decode(CHANNEL, ID, entry.encode(what.data, extra=what.extra), 1 << 20).body
    assert isinstance(event, Event)
    assert event.data == b'[{"x":["AQI="]},"/w=="]'


def test_binary_data_of_a_megabyte_fits_into_the_default_limit() -> None:
    what = entry_format.contents(Emit(name="b", args=(bytes(1_000_000),), rooms=("r",)))
    fields = entry.encode(what.data, type=what.type, extra=what.extra)
    assert entry.size(fields) < 1_000_200
    assert StreamSettings().max_entry_bytes >= 1_000_200


def test_entries_of_earlier_versions_can_be_read() -> None:
    packet = b'["b",{"x":[{"_placeholder":true,"num":0}]},{"_placeholder":true,"num":1}]'
    fields = [b"data", b'[{"x":["AQI="]},"/w=="]', b"type", b"b", b"args", b"2"]
    fields += b"packet", packet, b"attachment.0", b"AQI=", b"attachment.1", b"/w=="
    event = entry.decode(CHANNEL, ID, fields, 1000).body
    assert isinstance(event, Event)
    assert entry_format.encode_event(event) == ("b", (packet, [b"\1\2", b"\xff"]))
    assert event.data == b'[{"x":["AQI="]},"/w=="]'


def test_a_placeholder_is_filled_once() -> None:
    place = entry.placeholder(0)
    fields = [b"data", b"[" + b",".join([place] * 3) + b"]", b"binary.0", b"x" * 90]
    event = entry.decode(CHANNEL, ID, fields, 1000).body
    assert isinstance(event, Event)
    assert event.data.count(place) == 2


@pytest.mark.parametrize("name", ["a b", "{x}", "100%", "\t", "ü", "a#b", "~x", "\u2028"])
def test_every_room_maps_to_a_channel_and_back(name: str) -> None:
    assert room_of(channel_of(name)) == name


def test_a_room_that_is_too_long_is_unusable() -> None:
    with pytest.raises(UnusableEmit):
        channel_of("x" * 300)


def test_sockets_have_no_stream_of_their_own() -> None:
    emit = Emit(name="m", rooms=("a", "~id", "/axr#~id.w"))
    assert [tuple(copy) for copy in entry_format.copies(emit)] == [
        ("axr:a", None), ("axr:allusers", "~id"), ("axr:allusers", "/axr#~id.w"),
    ]  # fmt: skip
    assert [copy.channel for copy in entry_format.copies(Emit(name="m"))] == ["axr:allusers"]


def test_of_several_rooms_a_client_receives_the_first_it_can_read() -> None:
    extra = {b"rooms": b'["a","b","c"]', b"copies": b"5-0 5-1"}
    third = audience(extra)
    assert third == Audience(("a", "b", "c"), (("a", ID), ("b", EntryID(5, 1))))
    in_c = {"c": EntryID(1, 0)}
    assert third.wants("c", in_c, ())
    assert not third.wants("c", {**in_c, "a": EntryID(4, 0)}, ())
    # The client joined `a` after the copy there, so it never receives that copy.
    assert third.wants("c", {**in_c, "a": EntryID(5, 0)}, ())
    assert not third.wants("c", {**in_c, "b": EntryID(5, 0)}, ())


def test_except_names_rooms_and_sockets() -> None:
    found = audience({b"except": b'["x","~me"]'})
    assert found.wants("r", {"r": ID}, ("~you",))
    assert not found.wants("r", {"r": ID, "x": ID}, ("~you",))
    assert not found.wants("r", {"r": ID}, ("~me",))


def test_an_event_for_everybody_includes_clients_that_left_the_room() -> None:
    assert audience({b"rooms": b"[]"}).wants("allusers", {}, ())
    assert not audience({}).wants("allusers", {}, ())


@given(st.dictionaries(st.sampled_from([b"rooms", b"copies", b"except"]), st.binary()))
def test_invalid_fields_are_ignored(extra: dict[bytes, bytes]) -> None:
    assert isinstance(audience(extra), Audience)
