"""The native protocol: encoding of messages, and parsing or rejection of commands."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.core.errors import Forbidden, Unavailable
from relay.core.model import Channel, EntryID, Event
from relay.protocols.native import commands, encoders

NEWS = Channel("news")
TEXTS = st.text(st.characters(codec="utf-8"))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)


def event(data: bytes, *, is_json: bool = True, type: str | None = None) -> Event:
    """Return an event of the channel `news`."""
    return Event(NEWS, EntryID(12, 3), data, is_json, type=type)


def read_sse(text: bytes) -> list[dict[str, str]]:
    """Parse events by the WHATWG's rules. Lines end with CR, LF or CR LF."""
    found: list[dict[str, str]] = []
    block: dict[str, str] = {}
    data: list[str] = []
    for line in re.split("\r\n|\n|\r", text.decode()):
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if not line:
            if data:
                found.append(block | {"data": "\n".join(data)})
            block, data = {}, []
        elif name == "data":
            data.append(value)
        elif name:
            block[name] = value
    return found


@given(JSON, st.sampled_from([None, 1, "\t"]), st.sampled_from(["\n", "\r\n", "\r"]))
def test_json_survives_whatever_its_line_breaks(
    value: object, indent: int | str | None, line_break: str
) -> None:
    """Over WebSocket, as SSE data and in an envelope."""
    data = json.dumps(value, indent=indent).replace("\n", line_break).encode()
    one = event(data, type="note")
    assert json.loads(encoders.event_object(one))["data"] == value
    (block,) = read_sse(encoders.sse_id("12-3") + encoders.sse_tail(one))
    assert (block["id"], block["event"]) == ("12-3", "note")
    assert json.loads(block["data"]) == value
    (block,) = read_sse(encoders.envelope_tail(one))
    assert "event" not in block
    assert json.loads(block["data"]) == {
        "channel": "news", "id": "12-3", "type": "note", "data": value
    }  # fmt: skip


@given(TEXTS)
def test_text_survives(text: str) -> None:
    """Unchanged in JSON; as SSE data with LF for every line break."""
    one = event(text.encode(), is_json=False)
    assert json.loads(encoders.event_object(one))["data"] == text
    (block,) = read_sse(encoders.envelope_tail(one))
    assert json.loads(block["data"])["data"] == text
    (block,) = read_sse(encoders.sse_tail(one))
    assert block == {"data": re.sub("\r\n|\r", "\n", text)}


def test_numbers_and_key_order_are_the_producers() -> None:
    """Data is not parsed and encoded again."""
    data = b'{"b":12345678901234567890123, "a":1.0}'
    assert b'"data":' + data + b"}" in encoders.event_object(event(data))


def test_an_ephemeral_event_has_no_id() -> None:
    """There is no ID to resume from. The client ID is included."""
    one = Event(NEWS, None, b"1", True, client="c7")
    assert json.loads(encoders.event_object(one)) == {"channel": "news", "data": 1, "client": "c7"}


@pytest.mark.parametrize("kind", ["relay:gap", "a\nevent: relay:gap", "a\r\n\r\ndata: x", "a\0b"])
def test_a_type_cannot_pretend(kind: str) -> None:
    """It can imitate neither a notice nor another event."""
    (block,) = read_sse(encoders.sse_tail(event(b"1", type=kind)))
    assert not block.get("event", "").startswith("relay:")
    assert block["data"] == "1"


def test_notices_leave_out_what_is_not_known() -> None:
    """Over WebSocket and SSE."""
    notice = encoders.notice_object("gap", channel=NEWS, from_="1-0", reason="trimmed")
    assert json.loads(notice) == {
        "notice": "gap", "channel": "news", "from": "1-0", "reason": "trimmed"
    }  # fmt: skip
    assert read_sse(encoders.sse_notice("reset", channel=NEWS, to="1-0")) == [
        {"event": "relay:reset", "data": '{"channel":"news","to":"1-0"}'}
    ]
    assert read_sse(encoders.sse_error(Forbidden("no"), "news")) == [
        {"event": "relay:error", "data": '{"code":"forbidden","message":"no","channel":"news"}'}
    ]


def test_replies_and_errors_carry_the_ref() -> None:
    """It is null if the client sent none."""
    reply = encoders.reply_object("subscribe", "r1", channel=NEWS, position="c1.x")
    expected = {"reply": "subscribe", "ref": "r1", "channel": "news", "id": "c1.x"}
    assert json.loads(reply) == expected
    assert json.loads(encoders.error_object(Unavailable("wait"))) == {
        "error": {"code": "unavailable", "message": "wait"}, "ref": None
    }  # fmt: skip
    assert json.loads(encoders.refusal(Forbidden("no"), "news")) == {
        "error": {"code": "forbidden", "message": "no", "channel": "news"}
    }


def test_a_stream_begins_with_its_position() -> None:
    """It has data, because some libraries pass a block without data to the application."""
    (block,) = read_sse(encoders.first_block("c1.x", 2000, [(NEWS, "1-0")]))
    assert (block["id"], block["retry"], block["event"]) == ("c1.x", "2000", "relay:open")
    assert json.loads(block["data"]) == {
        "retry_ms": 2000, "channels": [{"channel": "news", "id": "1-0"}]
    }  # fmt: skip
    assert read_sse(encoders.HEARTBEAT) == []


@pytest.mark.parametrize(
    ("frame", "command"),
    [
        ('{"cmd":"ping"}', commands.PingCommand()),
        ('{"cmd":"ping","ref":null}', commands.PingCommand()),
        ('{"cmd":"ping","ref":1.5}', commands.PingCommand(ref=1.5)),
        ('{"cmd":"ping","ref":-9007199254740991}', commands.PingCommand(ref=-(2**53 - 1))),
        ('{"cmd":"refresh","token":"t","ref":"a"}', commands.RefreshCommand(token="t", ref="a")),
        ('{"cmd":"unsubscribe","channel":"news"}', commands.UnsubscribeCommand(channel=NEWS)),
        (
            '{"cmd":"subscribe","channel":"news","ref":0}',
            commands.SubscribeCommand(channel=NEWS, ref=0),
        ),
        (
            '{"cmd":"subscribe","channel":"news","last_event_id":"1-0"}',
            commands.SubscribeCommand(channel=NEWS, last_event_id="1-0"),
        ),
        (
            '{"cmd":"subscribe","channel":"news","last_event_id":null}',
            commands.SubscribeCommand(channel=NEWS),
        ),
    ],
)
def test_commands_are_understood(frame: str, command: commands.Command) -> None:
    """Each is parsed with its ref."""
    assert commands.parse_command(frame) == command


@pytest.mark.parametrize(
    ("frame", "reason"),
    [
        ("", "one JSON object"),
        ("null", "one JSON object"),
        ("[]", "one JSON object"),
        ('"ping"', "one JSON object"),
        ("[" * 50_000, "one JSON object"),
        ('{"cmd":' * 50_000, "one JSON object"),
        ('{"cmd":"ping","ref":' + "9" * 5000 + "}", "one JSON object"),
        ('{"cmd":"ping","ref":NaN}', "one JSON object"),
        ('{"cmd":"ping","ref":"\\ud800"}', "one JSON object"),
        ('{"cmd":"ping","cmd":"ping"}', "duplicate field"),
        ("{}", "cmd must be"),
        ('{"cmd":null}', "cmd must be"),
        ('{"cmd":["ping"]}', "cmd must be"),
        ('{"cmd":"Ping"}', "cmd must be"),
        ('{"cmd":"ping","ref":true}', "ref must be"),
        ('{"cmd":"ping","ref":{}}', "ref must be"),
        ('{"cmd":"ping","ref":9007199254740993}', "ref must be"),
        ('{"cmd":"ping","ref":1e308e}', "one JSON object"),
        ('{"cmd":"ping","ref":"' + "x" * 201 + '"}', "ref must be"),
        ('{"cmd":"ping","channel":"news"}', "no field 'channel'"),
        ('{"cmd":"subscribe","channel":"news","lastEventId":"1-0"}', "no field 'lastEventId'"),
        ('{"cmd":"subscribe"}', "needs channel"),
        ('{"cmd":"subscribe","channel":null}', "needs channel"),
        ('{"cmd":"subscribe","channel":7}', "needs channel"),
        ('{"cmd":"subscribe","channel":"' + "x" * 256 + '"}', "255 characters"),
        ('{"cmd":"subscribe","channel":"news","last_event_id":5}', "last_event_id must"),
        ('{"cmd":"subscribe","channel":"news","last_event_id":""}', "last_event_id must"),
        ('{"cmd":"refresh","token":""}', "needs token"),
    ],
)
def test_an_invalid_frame_is_rejected_with_the_reason(frame: str, reason: str) -> None:
    with pytest.raises(commands.BadCommand, match=reason):
        commands.parse_command(frame)


def test_a_rejection_contains_ref_and_channel() -> None:
    with pytest.raises(commands.BadCommand) as refused:
        commands.parse_command('{"cmd":"subscribe","channel":"a b","token":"t","ref":7}')
    assert (refused.value.ref, refused.value.channel) == (7, "a b")


@given(st.text() | JSON.map(json.dumps) | st.dictionaries(
    st.sampled_from(["cmd", "ref", "channel", "token", "last_event_id"]),
    JSON | st.sampled_from(["subscribe", "refresh", "ping"]),
).map(json.dumps))  # fmt: skip
def test_no_frame_raises_anything_else(frame: str) -> None:
    """Every accepted ref can be encoded in a reply."""
    try:
        command = commands.parse_command(frame)
    except commands.BadCommand as exc:
        encoders.error_object(exc, exc.ref, exc.channel)
    else:
        assert json.loads(encoders.reply_object("ping", command.ref))["ref"] == command.ref


def test_a_token_is_not_in_a_log() -> None:
    assert "secret" not in repr(commands.parse_command('{"cmd":"refresh","token":"secret"}'))
