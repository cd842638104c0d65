"""Encode events, notices and replies of the native protocol, and parse its commands. No I/O.

Events are encoded once for all clients, so these functions depend on the event only. JSON `data` is
inserted as the producer wrote it: the notation of numbers and the order of keys do not change.
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
    """Return `text` as a channel. Raise ValueError if it is invalid or contains `*`.

    `*` is a wildcard in tokens only. A client that uses it as one here would receive no events.
    """
    if "*" in text:
        raise ValueError(
            f"{text[:100]!r} is a pattern; `*` matches in tokens only, so name each channel"
        )
    return parse_channel(text)


# Prefix of relay's own SSE events. The type of an entry must not begin with it, because it could
# imitate a notice.
NOTICE_PREFIX = "relay:"
_REF_CHARS = 200
# The largest integer that JavaScript, too, represents exactly.
_SAFE_INTEGER = 2**53 - 1
_LINE_BREAKS = str.maketrans({"\r": " ", "\n": " ", "\0": " "})

# --- server to client -----------------------------------------------------------------------


def event_object(event: Event) -> bytes:
    """Encode `{"channel","id","type","data","client"}` for WebSocket and the SSE envelope."""
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
    """Encode a notice for WebSocket. Unknown fields are omitted."""
    return _dump({"notice": name, **_notice_fields(channel, from_, to, reason)})


def reply_object(
    name: ReplyName, ref: Ref, *, channel: Channel | None = None, position: str | None = None
) -> bytes:
    """Encode the reply to a successful command."""
    return _dump({"reply": name, "ref": ref} | _known(channel=channel, id=position))


def error_object(
    error: ClientError | Unavailable, ref: Ref = None, channel: str | None = None
) -> bytes:
    """Encode the reply to a rejected command."""
    return _dump({"error": _error_fields(error), "ref": ref} | _known(channel=channel))


def refusal(error: ClientError | Unavailable, channel: str | None = None) -> bytes:
    """Encode the body of an HTTP error response."""
    return _dump({"error": _error_fields(error) | _known(channel=channel)})


# An SSE event consists of `id: <id>\n` and a tail. The tail is the same for all clients. The ID is
# not, because a connection with several channels has its own cursor as ID.


def sse_id(position: bytes | str) -> bytes:
    """Encode the `id:` line. Browsers send its value as Last-Event-ID when they reconnect."""
    return b"id: " + (position.encode() if isinstance(position, str) else position) + b"\n"


def sse_tail(event: Event) -> bytes:
    """Encode type and data of an event for a browser's `EventSource`."""
    kind = b""
    if event.type and not event.type.startswith(NOTICE_PREFIX):
        # A line break in a type would begin another field or event.
        kind = b"event: " + event.type.translate(_LINE_BREAKS).encode() + b"\n"
    return kind + _sse_data(event.data)


def envelope_tail(event: Event) -> bytes:
    """Encode the event with channel, ID, type and client in its data (`?envelope=1`).

    There is no `event:` line, because a page cannot listen to types that it does not know.
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
    """Encode the tail of a notice. Unknown fields are omitted."""
    fields = _notice_fields(channel, from_, to, reason)
    return _named(name, _dump(fields))


def sse_error(error: ClientError | Unavailable, channel: str | None = None) -> bytes:
    """Encode the tail of the error that ends a stream."""
    return _named("error", _dump(_error_fields(error) | _known(channel=channel)))


def first_block(position: bytes | str, retry_ms: int) -> bytes:
    """Encode the beginning of a stream. Its ID lets a client resume that receives no event."""
    return b"retry: %d\n" % retry_ms + sse_id(position) + b"\n"


def first_envelope_block(
    position: bytes | str, retry_ms: int, positions: Iterable[tuple[Channel, str]]
) -> bytes:
    """Encode the beginning of a stream with envelopes as an event.

    Browsers do not pass the ID of a block without data to scripts. A script needs the ID to resume
    after the page was reloaded.
    """
    opened = {
        "retry_ms": retry_ms,
        "channels": [{"channel": channel, "id": at} for channel, at in positions],
    }
    return b"retry: %d\n" % retry_ms + sse_id(position) + _named("open", _dump(opened))


def empty_stream(retry_ms: int, reason: str) -> bytes:
    """Encode a complete stream without events. The client reconnects after `retry_ms`.

    The reason is a comment, which clients ignore.
    """
    return b"retry: %d\n: %b\n\n" % (retry_ms, reason.translate(_LINE_BREAKS).encode())


HEARTBEAT = b":\n\n"


def _sse_data(data: bytes) -> bytes:
    """Encode `data` as lines. A client joins them with LF, so that CR LF and CR become LF.

    This does not change JSON, because its strings contain no line breaks.
    """
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
    """A frame that is not a command, with `ref` and `channel` if they could be parsed."""

    def __init__(self, message: str, ref: Ref = None, channel: str | None = None) -> None:
        super().__init__(message)
        self.ref = ref
        self.channel = channel


@dataclass(frozen=True, slots=True, kw_only=True)
class SubscribeCommand:
    """Subscribe to a channel, after `last_event_id` or from now on."""

    channel: Channel
    last_event_id: str | None = None
    ref: Ref = None


@dataclass(frozen=True, slots=True, kw_only=True)
class UnsubscribeCommand:
    """Unsubscribe from a channel."""

    channel: Channel
    ref: Ref = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RefreshCommand:
    """Use a new token of the same user."""

    token: str = field(repr=False)
    ref: Ref = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PingCommand:
    """Request a reply, to test the connection."""

    ref: Ref = None


Command = SubscribeCommand | UnsubscribeCommand | RefreshCommand | PingCommand

_FIELDS = {
    "subscribe": {"cmd", "ref", "channel", "last_event_id"},
    "unsubscribe": {"cmd", "ref", "channel"},
    "refresh": {"cmd", "ref", "token"},
    "ping": {"cmd", "ref"},
}


def parse_command(text: str | bytes) -> Command:
    """Parse the command in a text frame. Raise BadCommand with the reason if it is invalid."""
    frame = _load(text)
    ref = _ref(frame.get("ref"))
    channel = frame.get("channel")
    shown = channel if isinstance(channel, str) and len(channel) <= 255 else None

    def reject(message: str) -> NoReturn:
        raise BadCommand(message, ref, shown)

    def required(name: str) -> str:
        value = frame.get(name)
        if not isinstance(value, str) or not value:
            reject(f"{cmd} needs {name}, a non-empty string")
        return value

    def channel_field() -> Channel:
        try:
            name = required("channel")
            return requested_channel(name)
        except ValueError as exc:
            reject(str(exc))

    cmd = frame.get("cmd")
    if not isinstance(cmd, str) or cmd not in _FIELDS:
        reject("cmd must be subscribe, unsubscribe, refresh or ping")
    # Reject unknown fields: with a misspelt last_event_id, events would be lost silently.
    unknown = sorted(frame.keys() - _FIELDS[cmd])
    if unknown:
        reject(f"{cmd} has no field {unknown[0][:50]!r}")
    match cmd:
        case "subscribe":
            position = frame.get("last_event_id")
            if position is not None and (not isinstance(position, str) or not position):
                reject("last_event_id must be a non-empty string or null")
            return SubscribeCommand(channel=channel_field(), last_event_id=position, ref=ref)
        case "unsubscribe":
            return UnsubscribeCommand(channel=channel_field(), ref=ref)
        case "refresh":
            return RefreshCommand(token=required("token"), ref=ref)
        case _:
            return PingCommand(ref=ref)


def _load(text: str | bytes) -> dict[str, object]:
    """Parse a JSON object with orjson and json.

    orjson rejects deep nesting, NaN and unpaired surrogates. json keeps large integers, and lets
    duplicate keys be rejected.
    """
    try:
        orjson.loads(text)
        frame: object = json.loads(text, object_pairs_hook=_unique)
    except BadCommand:
        raise
    except (ValueError, RecursionError):
        raise BadCommand("frame must be one JSON object") from None
    if not isinstance(frame, dict):
        raise BadCommand("frame must be one JSON object")
    return frame


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise BadCommand("duplicate field")
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
        f"ref must be a string of at most {_REF_CHARS} characters or a number that JavaScript"
        " represents exactly"
    )
