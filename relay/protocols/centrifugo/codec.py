"""Parsing of client frames, and encoding of replies and pushes in Centrifugo v1. Pure functions.

A frame is one command object or an array of them. As in v1, its first byte decides which, so
leading white space is an error (libcentrifugo/conns/clientconn/conn.go of v1.8.0). The keys of a
reply have v1's order: uid, method, error, advice, body. Of the first four, empty ones are omitted.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import orjson

from relay.core.go_json import compact, text
from relay.core.json_array import divide
from relay.core.model import Event
from relay.core.reasons import Reason
from relay.core.slices import in_slices
from relay.protocols.centrifugo import commands
from relay.protocols.centrifugo.commands import CentrifugoCommand, InvalidCommand

# The version that is reported to clients.
VERSION = "1.8.0"

# A frame up to this size is parsed in one step.
SMALL_BYTES = 8192
_PART_BYTES = 2048

FIX = "fix"
RETRY = "retry"

INVALID_MESSAGE = "invalid message"
INVALID_TOKEN = "invalid token"  # noqa: S105 - v1's text
UNAUTHORIZED = "unauthorized"
METHOD_NOT_FOUND = "method not found"
LIMIT_EXCEEDED = "limit exceeded"
ALREADY_SUBSCRIBED = "already subscribed"
PERMISSION_DENIED = "permission denied"
NAMESPACE_NOT_FOUND = "namespace not found"
NOT_AVAILABLE = "not available"
INTERNAL_ERROR = "internal server error"
ERRORS = frozenset(
    {
        INVALID_MESSAGE,
        INVALID_TOKEN,
        UNAUTHORIZED,
        METHOD_NOT_FOUND,
        LIMIT_EXCEEDED,
        ALREADY_SUBSCRIBED,
        PERMISSION_DENIED,
        NAMESPACE_NOT_FOUND,
        NOT_AVAILABLE,
        INTERNAL_ERROR,
    }
)

# v1 has no message for missing events. The client reconnects, recovers from its last message and
# receives `recovered: false`.
_MISSING = (
    Reason.TRIMMED,
    Reason.DELETED,
    Reason.OTHER_INCARNATION,
    Reason.POSITION_AHEAD,
    Reason.FAILOVER,
    Reason.UNKNOWN_POSITION,
)
# Why a connection is closed: v1's text, and whether the client reconnects.
CLOSES = {
    Reason.BAD_MESSAGE: (INVALID_MESSAGE, False),
    Reason.UNKNOWN_COMMAND: (METHOD_NOT_FOUND, False),
    Reason.UNAUTHORIZED: (UNAUTHORIZED, False),
    Reason.INVALID_TOKEN: (INVALID_TOKEN, False),
    Reason.LIMIT_EXCEEDED: (LIMIT_EXCEEDED, False),
    Reason.UNAVAILABLE: (INTERNAL_ERROR, True),
    Reason.NO_CREDENTIAL: ("stale", False),
    Reason.SLOW: ("slow", False),
    Reason.WRITE_TIMEOUT: ("error sending message", True),
    Reason.EXPIRED: ("expired", True),
    Reason.DISCONNECTED: ("disconnect", False),
    Reason.STOPPING: ("shutting down", True),
    **dict.fromkeys(_MISSING, ("insufficient state", True)),
}
CLOSE_CODE = 3000


class ConnectParams(NamedTuple):
    """Parameters of connect and refresh."""

    user: str
    timestamp: str
    info: str
    token: str


class SubscribeParams(NamedTuple):
    """Parameters of subscribe."""

    channel: str
    client: str
    last: str
    recover: bool
    info: str
    sign: str


def parse(frame: bytes) -> list[CentrifugoCommand]:
    """Return the commands of a frame, at least one. Raise InvalidCommand if any part is invalid."""
    first = frame[:1]
    if first == b"{":
        return [commands.one(frame)]
    if first != b"[":
        raise InvalidCommand("neither an object nor an array")
    found = commands.many(frame)
    if not found:
        raise InvalidCommand("no commands")
    return found


async def parse_in_slices(frame: bytes) -> list[CentrifugoCommand]:
    """Parse a long frame in slices of time. See `parse`."""
    if frame[:1] != b"[":
        return parse(frame)
    try:
        array = await divide(frame, 1, _PART_BYTES)
    except ValueError as exc:
        raise InvalidCommand(str(exc)) from None
    if not array.parts or frame[array.end + 1 :].strip(b" \t\r\n"):
        raise InvalidCommand("not an array of commands")
    found: list[CentrifugoCommand] = []
    async for begin, end in in_slices(array.parts):
        found += commands.many(b"[%b]" % frame[begin:end])
    return found


def connect_params(params: str | None) -> ConnectParams:
    """Parse the parameters of connect and refresh. Raise InvalidCommand if they are invalid."""
    names = ConnectParams._fields
    given = commands.fields(params, strings=names)
    return ConnectParams(*(given.get(name, "") for name in names))


def subscribe(params: str | None) -> SubscribeParams:
    """Parse the parameters of subscribe. Raise InvalidCommand if they are invalid."""
    given = commands.fields(
        params, strings=("channel", "client", "last", "info", "sign"), bools=("recover",)
    )
    return SubscribeParams(
        given.get("channel", ""),
        given.get("client", ""),
        given.get("last", ""),
        given.get("recover", False),
        given.get("info", ""),
        given.get("sign", ""),
    )


def channel_of(params: str | None) -> str:
    """Parse the channel of unsubscribe, presence and history. Raise InvalidCommand if invalid."""
    channel: str = commands.fields(params, strings=("channel",)).get("channel", "")
    return channel


def publish(params: str | None) -> tuple[str, bytes]:
    """Return channel and data of a publish, of which both may be empty.

    The bytes of the data are unchanged. Raise InvalidCommand if the parameters are invalid.
    """
    given = commands.fields(params, strings=("channel",), raws=("data",))
    return given.get("channel", ""), given.get("data", "").encode()


def ping(params: str | None) -> str:
    """Return the data of a ping, the only command whose parameters are optional."""
    data: str = commands.fields(params or "{}", strings=("data",)).get("data", "")
    return data


# ---- to the client ------------------------------------------------------------------------------


def reply(
    command: CentrifugoCommand, body: bytes | None = None, error: str = "", advice: str = ""
) -> bytes:
    """Encode the reply to one command."""
    parts = [b'{"uid":' + text(command.uid)] if command.uid else []
    parts.append(b'"method":' + text(command.method))
    if error:
        parts.append(b'"error":' + text(error))
    if advice:
        parts.append(b'"advice":' + text(advice))
    if body is not None:
        parts.append(b'"body":' + body)
    joined = b",".join(parts)
    return (joined if command.uid else b"{" + joined) + b"}"


def batch(replies: Sequence[bytes]) -> bytes:
    """Join the replies to one frame. They are an array only if there were several commands."""
    return replies[0] if len(replies) == 1 else b"[" + b",".join(replies) + b"]"


def connect_body(client: str, ttl: int, *, expired: bool = False) -> bytes:
    """Encode the body of connect and refresh. `ttl` is in seconds; 0 means no expiry."""
    return orjson.dumps(
        {
            "version": VERSION,
            "client": client,
            "expires": ttl > 0,
            "expired": expired,
            "ttl": ttl,
        }
    )


def subscribe_body(
    channel: str,
    *,
    status: bool,
    last: str = "",
    messages: Sequence[bytes] | None = None,
    recovered: bool = False,
) -> bytes:
    """Encode the body of subscribe.

    `messages` are encoded by `message`, newest first. They are None if the client has not requested
    recovery.
    """
    found = b"null" if messages is None else b"[" + b",".join(messages) + b"]"
    return b'{"channel":%b,"status":%b,"last":%b,"messages":%b,"recovered":%b}' % (
        text(channel),
        _bool(status),
        text(last),
        found,
        _bool(recovered),
    )


def status_body(channel: str, *, status: bool) -> bytes:
    """Encode the body of unsubscribe and publish."""
    return b'{"channel":%b,"status":%b}' % (text(channel), _bool(status))


def data_body(channel: str, data: bytes | None = None) -> bytes:
    """Encode the body of presence and history."""
    return b'{"channel":%b,"data":%b}' % (text(channel), b"null" if data is None else data)


def list_body(channel: str, items: Iterable[bytes]) -> bytes:
    """Encode the body of history. The items, which may be large, are copied once."""
    parts = list(items) or [b""]
    parts[0] = b'{"channel":%b,"data":[%b' % (text(channel), parts[0])
    parts[-1] += b"]}"
    return b",".join(parts)


def ping_body(data: str) -> bytes | None:
    """Encode the body of a ping, or return None if the client has sent no data."""
    return b'{"data":%b}' % text(data) if data else None


def message(event: Event, compacted: bytes | None = None) -> bytes:
    """Encode an element of `messages` and of history, with the keys in the order of v1's struct.

    `compacted` is the event's data as compact JSON, if it has already been computed.
    """
    parts = _head(event)
    parts.append(b'"channel":' + text(event.channel))
    if compacted is None:
        compacted = compact(event.data) if event.is_json else text(event.data.decode())
    parts.append(b'"data":' + compacted)
    if event.client:
        parts.append(b'"client":' + text(event.client))
    if event.info is not None and (info := client_info(event.info)):
        parts.append(b'"info":' + info)
    return b"{" + b",".join(parts) + b"}"


def message_push(event: Event) -> bytes:
    """Encode a `message` push. The bytes of the data are unchanged."""
    parts = _head(event)
    if event.client:
        parts.append(b'"client":' + text(event.client))
    if event.info is not None and client_info(event.info):
        parts.append(b'"info":' + event.info)
    parts.append(b'"channel":' + text(event.channel))
    parts.append(b'"data":' + (event.data if event.is_json else text(event.data.decode())))
    return b'{"method":"message","body":{' + b",".join(parts) + b"}}"


def _head(event: Event) -> list[bytes]:
    # Ephemeral events have no ID. They carry the previous event's, because clients recover from the
    # last uid that they have received.
    uid = event.after if event.id is None else event.id
    return [] if uid is None else [b'"uid":"%b"' % str(uid).encode()]


def presence_push(method: str, channel: str, info: bytes) -> bytes:
    """Encode a `join` or `leave` push. `info` is encoded by `info_json`."""
    return b'{"method":"%b","body":{"channel":%b,"data":%b}}' % (
        method.encode(),
        text(channel),
        info,
    )


def unsubscribe_push(channel: str) -> bytes:
    """Encode the push for a subscription that the server has ended."""
    return b'{"method":"unsubscribe","body":%b}' % status_body(channel, status=True)


def close_reason(reason: Reason, *, reconnects: bool = False) -> str:
    """Encode the reason of a close frame. `reconnects`: the client reconnects in any case."""
    text, reconnect = CLOSES[reason]
    shown = "true" if reconnect or reconnects else "false"
    return f'{{"reason":"{text}","reconnect":{shown}}}'


# ---- client info --------------------------------------------------------------------------------


def info_json(user: str, client: str, default: str, channel: str) -> bytes:
    """Encode a client's info as in v1's pushes. `default` and `channel` are JSON text or ''."""
    parts = []
    if default:
        parts.append(b'"default_info":' + default.encode())
    if channel:
        parts.append(b'"channel_info":' + channel.encode())
    parts += b'"user":' + text(user), b'"client":' + text(client)
    return b"{" + b",".join(parts) + b"}"


def client_info(info: bytes) -> bytes | None:
    """Return `info` as in v1's history and presence, without unknown members.

    Return None if it does not have v1's structure. Any producer can write it, and clients in typed
    languages would fail to decode another structure.
    """
    try:
        members = commands.fields(
            info.decode(),
            strings=("user", "client"),
            raws=("default_info", "channel_info"),
        )
    except ValueError:
        return None
    if "user" not in members and "client" not in members:
        return None
    found = {name: text(members.get(name, "")) for name in ("user", "client")}
    for name in ("default_info", "channel_info"):
        if members.get(name, "null") != "null":
            found[name] = compact(members[name].encode())
    return b"{" + b",".join(b'"%b":%b' % (n.encode(), v) for n, v in found.items()) + b"}"


def _bool(value: bool) -> bytes:
    return b"true" if value else b"false"
