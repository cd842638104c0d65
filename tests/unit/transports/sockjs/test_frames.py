"""Frames arrive unchanged in every browser."""

from __future__ import annotations

import json
import re

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.transports.sockjs import frames
from relay.transports.sockjs.frames import BadFrame, Framing, element, parse_messages

# The characters that sockjs-protocol calls escapable_by_server, except those that UTF-8 lacks.
UNSAFE = re.compile("[\x00-\x1f\u200c-\u200f\u2028-\u202f\u2060-\u206f\ufff0-\uffff]")
texts = st.text(st.characters(exclude_categories=["Cs"]))


@given(st.lists(texts, min_size=1))
def test_messages_arrive_unchanged_in_one_frame(messages: list[str]) -> None:
    frame = frames.array_frame(b"".join(element(each.encode()) for each in messages))
    assert frame[:1] == b"a"
    assert json.loads(frame[1:]) == messages
    assert orjson.loads(frame[1:]) == messages
    assert not UNSAFE.search(frame.decode())


@given(
    st.text(st.characters(min_codepoint=0x1FF0, max_codepoint=0xFFFF, exclude_categories=["Cs"]))
)
def test_characters_that_browsers_change_are_escaped(text: str) -> None:
    encoded = element(text.encode()).decode()
    assert not UNSAFE.search(encoded)
    assert json.loads(encoded[1:]) == text
    # Other characters are not escaped, because each escape takes six bytes.
    assert encoded.count("\\u") == len(UNSAFE.findall(text))


def test_every_character_of_the_protocols_list_is_escaped() -> None:
    killers = [chr(each) for each in range(256, 65536) if UNSAFE.match(chr(each))]
    wanted = "".join(f"\\u{ord(each):04x}" for each in killers)
    assert element("".join(killers).encode()) == f',"{wanted}"'.encode()


@given(st.binary())
def test_invalid_utf_8_is_rejected(data: bytes) -> None:
    try:
        text = data.decode()
    except UnicodeDecodeError:
        with pytest.raises(UnicodeDecodeError):
            element(data)
    else:
        assert json.loads(element(data)[1:]) == text


@given(st.integers(1000, 4999), texts)
def test_a_close_frame_is_json(code: int, reason: str) -> None:
    frame = frames.close_frame(code, reason)
    assert frame[:1] == b"c"
    assert json.loads(frame[1:]) == [code, reason]


@given(st.lists(texts))
def test_a_clients_messages_are_read(messages: list[str]) -> None:
    wanted = [each.encode() for each in messages]
    assert parse_messages(json.dumps(messages).encode()) == wanted
    assert parse_messages(b" " + orjson.dumps(messages) + b"\n") == wanted


@pytest.mark.parametrize(
    ("body", "wanted"),
    [
        (rb'["\ud83d\ude00"]', ["😀"]),
        (rb'["a\uD800b"]', ["a\ufffdb"]),
        (rb'["\udc00","x"]', ["\ufffd", "x"]),
        (rb'["\u0000"]', ["\0"]),
    ],
)
def test_only_pairs_of_surrogates_are_characters(body: bytes, wanted: list[str]) -> None:
    assert parse_messages(body) == [each.encode() for each in wanted]


@pytest.mark.parametrize("body", [b"", b"  \n"])
def test_an_empty_body_is_no_payload(body: bytes) -> None:
    with pytest.raises(BadFrame, match=r"^Payload expected\.$"):
        parse_messages(body)


@pytest.mark.parametrize(
    "body",
    [
        b'["x',
        b'"x"',
        b"null",
        b"{}",
        b"[1]",
        b'["a",null]',
        b'["\xff"]',
        b'["\\ud800"',
        b"[NaN]",
        b'["\\ud800",NaN]',
        b'["\\ud800"' + b"[" * 100_000,
        b"[" * 100_000,
    ],
)
def test_a_body_other_than_an_array_of_strings_is_rejected(body: bytes) -> None:
    with pytest.raises(BadFrame, match=r"^Broken JSON encoding\.$"):
        parse_messages(body)


def test_each_transport_frames_messages_in_its_own_format() -> None:
    frame = frames.array_frame(element(b"<x> & 'y'"))
    assert frame == b"""a["<x> & 'y'"]"""
    assert frames.xhr(frame) == frame + b"\n"
    assert frames.eventsource(frame) == b"data: " + frame + b"\r\n\r\n"
    script = rb"""a[\"\u003cx\u003e \u0026 'y'\"]"""
    assert frames.htmlfile(frame) == b'<script>\np("' + script + b'");\n</script>\r\n'
    assert frames.jsonp("a.b", frame) == b'/**/a.b("' + script + b'");\r\n'
    assert frames.websocket(frame) == bytes([0x81, len(frame)]) + frame


@given(texts)
def test_a_message_cannot_end_the_script_that_contains_it(text: str) -> None:
    page = frames.htmlfile(frames.array_frame(element(text.encode())))
    inner = page.removeprefix(b"<script>\np(").removesuffix(b");\n</script>\r\n")
    assert b"<" not in inner
    assert json.loads(json.loads(inner)[1:]) == [text]


def test_an_event_for_many_clients_is_encoded_once() -> None:
    made: list[bytes] = []

    def wrap(frame: bytes) -> bytes:
        made.append(frame)
        return frame + b"\n"

    framing = Framing(wrap)
    made.clear()
    shared = element(b"to all") + element(b"again")
    first = framing.messages(shared)
    assert all(framing.messages(shared) is first for _ in range(100))
    assert made == [b'a["to all","again"]']
    # An equal but different object is encoded again.
    assert framing.messages(bytes(bytearray(shared))) == first
    assert len(made) == 2
