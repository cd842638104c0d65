"""Peculiarities of client libraries that relay takes into account, for all protocols.

Server-sent events:

- Browsers' EventSource dispatches its own events `open` and `error`: `event_source_type`.
- It stores the ID of a block when its empty line arrives: the first ID comes with data.
- It never reconnects after an error status: a position that relay cannot use is a notice.
- @microsoft/fetch-event-source and sseclient call the application for each empty line, and
  applications parse the data as JSON: no block is without data, and a `comment` has no empty line.
- event-source-polyfill and others send the last ID in the query: `position_in`.
- eventsource 1.x and others send more headers than browsers do: `allowed_headers`.
- requests and sseclient take text without a charset for Latin-1: `EVENT_STREAM`.
- They also end a line at U+0085, U+2028 and U+2029: JSON has escapes for these, `one_line`.
- Node's compression and other proxies hold back what they compress: `STREAMED`.

SockJS:

- sockjs-client un-escapes `%xx` of its eventsource transport: `sockjs_event_source`.

Socket.IO:

- Each generation emits events of its own to the application, and socket.io-client 4.x closes with
  "parse error" if it receives one: events with these names are not sent, `SOCKETIO_RESERVED`.
- socket.io-client 4.6 and later stores the last argument of a packet, if it is a text, as its
  offset. Any other client of Engine.IO 4 passes it to the application: `keeps_offsets`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from time import time

# ---- server-sent events ------------------------------------------------------------------------

EVENT_STREAM = "text/event-stream; charset=utf-8"
# `no-transform` stops proxies that compress: they would hold events back.
STREAMED = "no-store, no-transform"
_DISPATCHED = frozenset({"open", "error"})
_SPLIT_AT = "\u0085\u2028\u2029"
_LINE_BREAKS = str.maketrans({"\r": " ", "\n": " ", "\0": " "})


def event_source_type(kind: str) -> str | None:
    """Return the `event` field for an entry's type, or None if the library reserves the name.

    A browser calls `onerror` for an event `error`, and pages cannot tell it from a lost connection.
    Line breaks would begin another field.
    """
    return None if kind in _DISPATCHED else kind.translate(_LINE_BREAKS)


def comment(text: str = "") -> bytes:
    """Return a comment line. No empty line follows, because some libraries dispatch it as an event
    with the data `""`, which applications cannot parse."""
    return b": " + text.translate(_LINE_BREAKS).encode() + b"\n" if text else b":\n"


def one_line(json_text: bytes) -> bytes:
    """Return JSON with escapes for the characters at which Python's `splitlines` splits text.

    sseclient and requests use it. They are valid within strings only, so their meaning is the same.
    """
    if json_text.isascii():
        return json_text
    for character in _SPLIT_AT:
        json_text = json_text.replace(character.encode(), b"\\u%04x" % ord(character))
    return json_text


# `last_event_id` is relay's own. `lastEventId` is sent by event-source-polyfill (Yaffle),
# `evs_last_event_id` by eventsource-polyfill (AmvTek), `Last-Event-ID` and `lastEventID` by clients
# of Mercure. Case and punctuation don't matter.
_POSITIONS = frozenset({"lasteventid", "evslasteventid"})
_LIKE_POSITIONS = re.compile(
    "(?!id$)(?:last|since|after|from|resume|start)?(?:event|message|entry|seen)?"
    "(?:id|cursor|position|offset)|since|after|lastevent|lastseen"
)
# An entry's ID, or a cursor of relay.
_POSITION = re.compile(r"[0-9]{10,20}-[0-9]{1,20}|c1\..+", re.DOTALL)
_PUNCTUATION = re.compile(r"[^a-z0-9]+")


def position_in(query: Iterable[tuple[str, str]], known: Iterable[str]) -> str | None:
    """Return the newest position in a query, or None if there is none.

    Libraries append theirs to the URL of the page, so the last one counts.

    Raises:
        ValueError: A parameter that is not in `known` looks like a position. If relay ignored it,
            the client would lose events without a notice.
    """
    found = None
    for name, value in query:
        plain = _PUNCTUATION.sub("", name.lower())
        if plain in _POSITIONS:
            found = value or found
        elif name not in known and (_LIKE_POSITIONS.fullmatch(plain) or _POSITION.fullmatch(value)):
            raise ValueError(f"unknown parameter {name[:50]!r}: send the position as last_event_id")
    return found


def allowed_headers(headers: Mapping[str, str]) -> dict[str, str]:
    """Return the answer to a preflight request's list of headers, which is accepted as it is.

    Libraries add headers of their own, and relay ignores those that it does not know.
    """
    wanted = headers.get("Access-Control-Request-Headers", "")
    if not wanted or wanted == "null" or not (wanted.isascii() and wanted.isprintable()):
        return {}
    return {"Access-Control-Allow-Headers": wanted}


# ---- SockJS ------------------------------------------------------------------------------------


def sockjs_event_source(frame: bytes) -> bytes:
    """Return a frame as the library's eventsource transport must receive it."""
    return frame.replace(b"%", b"%25")


# ---- Socket.IO ---------------------------------------------------------------------------------

_EVERY_GENERATION = frozenset(
    {"connect", "connect_error", "disconnect", "disconnecting", "newListener", "removeListener"}
)
# Event names that the library emits itself, by Engine.IO version: socket.io-client 2.5
# (lib/socket.js, `events`); socket.io-parser 4.2 and component-emitter.
SOCKETIO_RESERVED: Mapping[int, frozenset[str]] = {
    3: _EVERY_GENERATION
    | {"connect_timeout", "connecting", "error", "ping", "pong"}
    | {"reconnect", "reconnect_attempt", "reconnect_error", "reconnect_failed", "reconnecting"},
    4: _EVERY_GENERATION,
}

# The cache buster `t` of engine.io-client from 6.6 on (socket.io-client 4.8): 8 random digits of
# base 36. Others send a time: seconds (C++, .NET), base 36 (Dart), base 64 (older ones, Java).
_RANDOM = re.compile(r"(?=.*[a-z])[0-9a-z]{7,9}")
_YEAR_MS = 366 * 86_400_000


def keeps_offsets(query: Mapping[str, str], auth: Mapping[str, object]) -> bool:
    """Return True if a client of Engine.IO 4 is socket.io-client 4.6 or later.

    The protocol has no version, so only a client that cannot be another one gets a cursor in its
    events. A client without a sign gets the cursor in a separate event.
    """
    if isinstance(auth.get("pid"), str):
        return True
    mark = query.get("t", "")
    return bool(_RANDOM.fullmatch(mark)) and abs(int(mark, 36) - time() * 1000) > _YEAR_MS
