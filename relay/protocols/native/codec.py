"""What the native door says and understands, as bytes and values; no I/O.

Events are encoded once for all clients, so these functions depend on the event only. `data` that
is JSON is spliced in as the producer wrote it: no number changes its spelling, no key its order.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, NoReturn

import orjson

from relay.core.errors import BadRequest, ClientError, Unavailable
from relay.core.model import Channel, Event, parse_channel
from relay.hub.recovery import NoticeKind

Ref = str | int | float | None
ReplyName = Literal["subscribe", "unsubscribe", "refresh", "ping"]


def requested_channel(text: str) -> Channel:
    """Return `text` as a channel to follow; raise ValueError if it is none, or a pattern.

    `*` is a wildcard in tokens. A client that expects one here would wait for events in vain.
    """
    if "*" in text:
        raise ValueError(
            f"{text[:100]!r} is a pattern; `*` matches in tokens only, so name each channel"
        )
    return parse_channel(text)


# The names of our own SSE events begin with it, so an entry's type may not: it could pretend
# that events were lost, or hide that they were.
NOTICE_PREFIX = "relay:"
_REF_CHARS = 200
# What every JSON reader, JavaScript's too, reads back unchanged.
_SAFE_INTEGER = 2**53 - 1
_LINE_BREAKS = str.maketrans({"\r": " ", "\n": " ", "\0": " "})

# --- server to client -----------------------------------------------------------------------


def event_object(event: Event) -> bytes:
    """`{"channel","id","type","data","client"}`: what the websocket and the envelope show."""
    out = [b'{"channel":', orjson.dumps(event.channel)]
    if event.id is not None:
        out.append(b',"id":"%d-%d"' % event.id)
    if event.type is not None:
        out += (b',"type":', orjson.dumps(event.type))
    out += (b',"data":', event.data if event.is_json else orjson.dumps(event.data.decode()))
    if event.client is not None:
        out += (b',"client":', orjson.dumps(event.client))
    out.append(b"}")
    return b"".join(out)


def notice_object(
    name: NoticeKind,
    *,
    channel: Channel | None = None,
    from_: str | None = None,
    to: str | None = None,
    reason: str | None = None,
) -> bytes:
    """A notice as the websocket shows it; what is not known is left out."""
    return _dump({"notice": name, **_notice_fields(channel, from_, to, reason)})


def reply_object(
    name: ReplyName, ref: Ref, *, channel: Channel | None = None, position: str | None = None
) -> bytes:
    """The answer to a command that was carried out."""
    return _dump({"reply": name, "ref": ref} | _known(channel=channel, id=position))


def error_object(
    error: ClientError | Unavailable, ref: Ref = None, channel: str | None = None
) -> bytes:
    """The answer to a command that was refused."""
    return _dump({"error": _error_fields(error), "ref": ref} | _known(channel=channel))


def refusal(error: ClientError | Unavailable, channel: str | None = None) -> bytes:
    """The body of an HTTP refusal, before a stream or a websocket begins."""
    return _dump({"error": _error_fields(error) | _known(channel=channel)})


# An SSE event is `id: <id>\n` and a tail. The tail is the same for everybody, the ID is not: a
# connection with several channels has a cursor of its own there.


def sse_id(position: bytes | str) -> bytes:
    """The line that makes the browser remember `position`."""
    return b"id: " + (position.encode() if isinstance(position, str) else position) + b"\n"


def sse_tail(event: Event) -> bytes:
    """The event as a browser's `EventSource` takes it: its type and its data."""
    kind = b""
    if event.type and not event.type.startswith(NOTICE_PREFIX):
        # A line break in a type would begin another field, or another event.
        kind = b"event: " + event.type.translate(_LINE_BREAKS).encode() + b"\n"
    return kind + _sse_data(event.data)


def envelope_tail(event: Event) -> bytes:
    """The event with channel, ID, type and client in its data (`?envelope=1`).

    It has no `event:` line: a page that wants to see every type cannot listen to each by name.
    """
    return _sse_data(event_object(event))


def sse_notice(
    name: NoticeKind,
    *,
    channel: Channel | None = None,
    from_: str | None = None,
    to: str | None = None,
    reason: str | None = None,
) -> bytes:
    """A notice's tail; what is not known is left out."""
    fields = _notice_fields(channel, from_, to, reason)
    return _named(name, _dump(fields))


def sse_error(error: ClientError | Unavailable, channel: str | None = None) -> bytes:
    """The tail that says why a stream that had begun ends."""
    return _named("error", _dump(_error_fields(error) | _known(channel=channel)))


def first_block(position: bytes | str, retry_ms: int) -> bytes:
    """How a stream begins: a client that drops before its first event resumes from `position`."""
    return b"retry: %d\n" % retry_ms + sse_id(position) + b"\n"


def first_envelope_block(
    position: bytes | str, retry_ms: int, positions: Iterable[tuple[Channel, str]]
) -> bytes:
    """The same where envelopes were asked for, as an event that a script can see.

    A browser keeps the ID of a block without data to itself; a script that wants to resume after
    a reload needs it too.
    """
    opened = {
        "retry_ms": retry_ms,
        "channels": [{"channel": channel, "id": at} for channel, at in positions],
    }
    return b"retry: %d\n" % retry_ms + sse_id(position) + _named("open", _dump(opened))


def empty_stream(retry_ms: int, reason: str) -> bytes:
    """Return a whole stream without events: the client reconnects after `retry_ms`.

    The reason is a comment for people who look at the answer; a client ignores it.
    """
    return b"retry: %d\n: %b\n\n" % (retry_ms, reason.translate(_LINE_BREAKS).encode())


HEARTBEAT = b":\n\n"


def _sse_data(data: bytes) -> bytes:
    """`data` in lines. A client joins them with LF again, so CR LF and CR arrive as LF; between
    the tokens of JSON that changes nothing, and inside its strings neither can stand."""
    lines = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    return b"data: " + lines.replace(b"\n", b"\ndata: ") + b"\n\n"


def _named(name: str, data: bytes) -> bytes:
    return b"event: " + (NOTICE_PREFIX + name).encode() + b"\n" + _sse_data(data)


def _notice_fields(
    channel: Channel | None, from_: str | None, to: str | None, reason: str | None
) -> dict[str, object]:
    return _known(channel=channel) | _known(**{"from": from_, "to": to, "reason": reason})


def _error_fields(error: ClientError | Unavailable) -> dict[str, object]:
    return {"code": error.code, "message": str(error)}


def _known(**fields: str | None) -> dict[str, object]:
    return {name: value for name, value in fields.items() if value is not None}


def _dump(fields: Mapping[str, object]) -> bytes:
    return orjson.dumps(fields)


# --- client to server -----------------------------------------------------------------------


class BadCommand(BadRequest):
    """A frame that is no command; `ref` and `channel` as far as they could be read."""

    def __init__(self, message: str, ref: Ref = None, channel: str | None = None) -> None:
        super().__init__(message)
        self.ref = ref
        self.channel = channel


@dataclass(frozen=True, slots=True, kw_only=True)
class SubscribeCommand:
    """Send this channel's events, after `last_event_id` or from now."""

    channel: Channel
    last_event_id: str | None = None
    ref: Ref = None


@dataclass(frozen=True, slots=True, kw_only=True)
class UnsubscribeCommand:
    """No more of this channel."""

    channel: Channel
    ref: Ref = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RefreshCommand:
    """A new token for the same user."""

    token: str = field(repr=False)
    ref: Ref = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PingCommand:
    """Answer, so that the client sees that the connection lives."""

    ref: Ref = None


Command = SubscribeCommand | UnsubscribeCommand | RefreshCommand | PingCommand

_FIELDS = {
    "subscribe": {"cmd", "ref", "channel", "last_event_id"},
    "unsubscribe": {"cmd", "ref", "channel"},
    "refresh": {"cmd", "ref", "token"},
    "ping": {"cmd", "ref"},
}


def parse_command(text: str | bytes) -> Command:
    """The command in one text frame; BadCommand says what is wrong with any other."""
    frame = _load(text)
    ref = _ref(frame.get("ref"))
    channel = frame.get("channel")
    shown = channel if isinstance(channel, str) and len(channel) <= 255 else None

    def refuse(message: str) -> NoReturn:
        raise BadCommand(message, ref, shown)

    def required(name: str) -> str:
        value = frame.get(name)
        if not isinstance(value, str) or not value:
            refuse(f"{cmd} needs {name}, a string that is not empty")
        return value

    def asked_channel() -> Channel:
        try:
            name = required("channel")
            return requested_channel(name)
        except ValueError as exc:
            refuse(str(exc))

    cmd = frame.get("cmd")
    if not isinstance(cmd, str) or cmd not in _FIELDS:
        refuse("cmd is one of subscribe, unsubscribe, refresh, ping")
    # A misspelt last_event_id would otherwise lose events without a word.
    unknown = sorted(frame.keys() - _FIELDS[cmd])
    if unknown:
        refuse(f"{cmd} has no field {unknown[0][:50]!r}")
    match cmd:
        case "subscribe":
            position = frame.get("last_event_id")
            if position is not None and (not isinstance(position, str) or not position):
                refuse("last_event_id is a string that is not empty, or null")
            return SubscribeCommand(channel=asked_channel(), last_event_id=position, ref=ref)
        case "unsubscribe":
            return UnsubscribeCommand(channel=asked_channel(), ref=ref)
        case "refresh":
            return RefreshCommand(token=required("token"), ref=ref)
        case _:
            return PingCommand(ref=ref)


def _load(text: str | bytes) -> dict[str, object]:
    """A JSON object. orjson is strict (depth, NaN, half a surrogate pair), but of two equal keys
    it takes the last in silence and makes floats of large integers; json does neither."""
    try:
        orjson.loads(text)
        frame: object = json.loads(text, object_pairs_hook=_unique)
    except BadCommand:
        raise
    except (ValueError, RecursionError):
        raise BadCommand("a frame is one JSON object") from None
    if not isinstance(frame, dict):
        raise BadCommand("a frame is one JSON object")
    return frame


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise BadCommand("a field is there twice")
    return found


def _ref(value: object) -> Ref:
    match value:
        case None:
            return None
        case bool():
            pass
        case str() if len(value) <= _REF_CHARS:
            return value
        case int() if abs(value) <= _SAFE_INTEGER:
            return value
        case float() if math.isfinite(value):
            return value
        case _:
            pass
    raise BadCommand(
        f"ref is a string of at most {_REF_CHARS} characters or a number that JSON keeps exactly"
    )
