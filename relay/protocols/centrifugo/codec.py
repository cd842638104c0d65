"""What clients of Centrifugo v1 send and are sent, as bytes. Pure.

A frame is one command object or an array of them. Its first byte decides which: white space before
it is an error, as in v1 (libcentrifugo/conns/clientconn/conn.go of v1.8.0). A reply has its keys in
v1's order: uid, method, error, advice, body; what is empty of the first four is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import orjson

from relay.core.go_json import compact, text
from relay.core.json_array import divide
from relay.core.model import Event
from relay.core.slices import in_slices
from relay.protocols.centrifugo import commands
from relay.protocols.centrifugo.commands import CentrifugoCommand, InvalidCommand

# Clients of v1 are told the version that this door is compatible with.
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


class ConnectParams(NamedTuple):
    """The parameters of connect and of refresh."""

    user: str
    timestamp: str
    info: str
    token: str


class SubscribeParams(NamedTuple):
    """The parameters of subscribe."""

    channel: str
    client: str
    last: str
    recover: bool
    info: str
    sign: str


def parse(frame: bytes) -> list[CentrifugoCommand]:
    """The commands of a frame, at least one; Invalid where it is not understood as a whole."""
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
    """Parse as `parse` does, in slices of time."""
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


def credentials(params: str | None) -> ConnectParams:
    """Invalid where they are missing or of a wrong type."""
    names = ConnectParams._fields
    given = commands.fields(params, strings=names)
    return ConnectParams(*(given.get(name, "") for name in names))


def subscribe(params: str | None) -> SubscribeParams:
    """Invalid where they are missing or of a wrong type."""
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
    """The one parameter of unsubscribe, presence and history; Invalid as above."""
    channel: str = commands.fields(params, strings=("channel",)).get("channel", "")
    return channel


def publish(params: str | None) -> tuple[str, bytes]:
    """Channel and data, whose bytes are kept; both may be missing. Invalid as above."""
    given = commands.fields(params, strings=("channel",), raws=("data",))
    return given.get("channel", ""), given.get("data", "").encode()


def ping(params: str | None) -> str:
    """What is to be sent back. The only command that needs no parameters."""
    data: str = commands.fields(params or "{}", strings=("data",)).get("data", "")
    return data


# ---- to the client ------------------------------------------------------------------------------


def reply(
    command: CentrifugoCommand, body: bytes | None = None, error: str = "", advice: str = ""
) -> bytes:
    """The answer to one command."""
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
    """The answer to one frame: an array only where there were several commands."""
    return replies[0] if len(replies) == 1 else b"[" + b",".join(replies) + b"]"


def connect_body(client: str, ttl: int, *, expired: bool = False) -> bytes:
    """Of connect and refresh; `ttl` 0 stands for a token that does not expire."""
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
    """`messages` as `message` writes them, newest first; None where none were asked for."""
    found = b"null" if messages is None else b"[" + b",".join(messages) + b"]"
    return b'{"channel":%b,"status":%b,"last":%b,"messages":%b,"recovered":%b}' % (
        text(channel),
        _bool(status),
        text(last),
        found,
        _bool(recovered),
    )


def status_body(channel: str, *, status: bool) -> bytes:
    """Of unsubscribe and publish."""
    return b'{"channel":%b,"status":%b}' % (text(channel), _bool(status))


def data_body(channel: str, data: bytes | None = None) -> bytes:
    """Of presence and history."""
    return b'{"channel":%b,"data":%b}' % (text(channel), b"null" if data is None else data)


def ping_body(data: str) -> bytes | None:
    """Nothing where nothing was sent."""
    return b'{"data":%b}' % text(data) if data else None


def message(event: Event, compacted: bytes | None = None) -> bytes:
    """An element of `messages` and of history: keys in the order of v1's struct, and everything
    written anew. `compacted` is the event's data if it is JSON and compact already."""
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
    """A publication on its way: `data` keeps its bytes."""
    parts = _head(event)
    if event.client:
        parts.append(b'"client":' + text(event.client))
    if event.info is not None and client_info(event.info):
        parts.append(b'"info":' + event.info)
    parts.append(b'"channel":' + text(event.channel))
    parts.append(b'"data":' + (event.data if event.is_json else text(event.data.decode())))
    return b'{"method":"message","body":{' + b",".join(parts) + b"}}"


def _head(event: Event) -> list[bytes]:
    # The ephemeral kind has no ID, but clients ask for what follows the last uid that they had.
    uid = event.after if event.id is None else event.id
    return [] if uid is None else [b'"uid":"%b"' % str(uid).encode()]


def presence_push(method: str, channel: str, info: bytes) -> bytes:
    """`join` or `leave`; `info` as `info_json` writes it."""
    return b'{"method":"%b","body":{"channel":%b,"data":%b}}' % (
        method.encode(),
        text(channel),
        info,
    )


def unsubscribe_push(channel: str) -> bytes:
    """The server has ended the subscription."""
    return b'{"method":"unsubscribe","body":%b}' % status_body(channel, status=True)


def close_reason(reason: str, *, reconnect: bool) -> str:
    """The reason of a close frame, whose code is 3000."""
    return f'{{"reason":"{reason}","reconnect":{"true" if reconnect else "false"}}}'


# ---- who a client is ----------------------------------------------------------------------------


def info_json(user: str, client: str, default: str, channel: str) -> bytes:
    """Who published or came: as v1's pushes have it. `default` and `channel` are JSON or ''."""
    parts = []
    if default:
        parts.append(b'"default_info":' + default.encode())
    if channel:
        parts.append(b'"channel_info":' + channel.encode())
    parts += b'"user":' + text(user), b'"client":' + text(client)
    return b"{" + b",".join(parts) + b"}"


def client_info(info: bytes) -> bytes | None:
    """`info` as history and presence have it: v1's members alone, in their order there. None where
    it is not such an object: any producer may write it, and clients in typed languages would fail
    at another form."""
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
