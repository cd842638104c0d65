"""SockJS frames, and their encoding for each transport. Pure functions.

Sources: sockjs-protocol 0.3.3 and its successor for 1.x; sockjs-go v1 where they leave a choice.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable

import orjson

from relay.core.client_libraries import sockjs_event_source
from relay.transports.socket.websocket import frame_text

OPEN = b"o"
HEARTBEAT = b"h"

# Characters that some browsers corrupt on receipt ("JSON Unicode Encoding" in sockjs-protocol).
# Any JSON encoder escapes control characters, and lone surrogates cannot be UTF-8.
_UNSAFE = re.compile("[\u200c-\u200f\u2028-\u202f\u2060-\u206f\ufff0-\uffff]")
_SURROGATE = re.compile("[\ud800-\udfff]")
# Inside a page, a string must not end the script element around it.
_MARKUP = re.compile(b"[<>&]")


class BadFrame(ValueError):
    """The client's request has no valid messages. The text is that of sockjs-protocol."""


def element(payload: bytes) -> bytes:
    """Encode one message for `SockJsSession.write`: a comma and a JSON string.

    The result is the same for all clients and transports, so it can be made once per event. Raise
    UnicodeDecodeError if the message is not UTF-8.
    """
    return b"," + _string(payload.decode())


def _string(text: str) -> bytes:
    encoded = orjson.dumps(text)
    if encoded.isascii():
        return encoded
    return _UNSAFE.sub(lambda match: f"\\u{ord(match[0]):04x}", encoded.decode()).encode()


def array_frame(elements: bytes) -> bytes:
    """Return one frame with one or more messages encoded by `element`."""
    return b"a[" + elements[1:] + b"]"


def close_frame(code: int, reason: str) -> bytes:
    """Return the frame that closes a session."""
    return b"c[%d,%b]" % (code, _string(reason))


GO_AWAY = close_frame(3000, "Go away!")
STILL_OPEN = close_frame(2010, "Another connection still open")


def parse_messages(body: bytes) -> list[bytes]:
    """Return the messages of a request or WebSocket frame, which is a JSON array of strings.

    Lone surrogates, which are valid in JSON, are replaced by U+FFFD. Raise BadFrame.
    """
    if not body.strip():
        raise BadFrame("Payload expected.")
    try:
        found = orjson.loads(body)
    except orjson.JSONDecodeError:
        found = _with_surrogates(body)
    if not isinstance(found, list) or not all(isinstance(each, str) for each in found):
        raise BadFrame("Broken JSON encoding.")
    return [_SURROGATE.sub("\ufffd", each).encode() for each in found]


def _with_surrogates(body: bytes) -> object:
    if b"\\ud" not in body.lower():
        raise BadFrame("Broken JSON encoding.")
    try:
        # Unlike orjson, json accepts lone surrogates.
        return json.loads(body)
    except (ValueError, RecursionError):
        raise BadFrame("Broken JSON encoding.") from None


class Framing:
    """Encodes frames for one transport.

    The last result is cached, because most events are sent to many clients.
    """

    __slots__ = ("_elements", "_framed", "heartbeat", "wrap")

    def __init__(self, wrap: Callable[[bytes], bytes]) -> None:
        self.wrap = wrap
        self.heartbeat = wrap(HEARTBEAT)
        self._elements = b""
        self._framed = b""

    def messages(self, elements: bytes) -> bytes:
        """Return one frame with all of `elements`, encoded for the transport."""
        if elements is not self._elements:
            self._framed = self.wrap(array_frame(elements))
            self._elements = elements
        return self._framed


def xhr(frame: bytes) -> bytes:
    """Encode a frame as a line."""
    return frame + b"\n"


def eventsource(frame: bytes) -> bytes:
    """Encode a frame as a server-sent event."""
    return b"data: " + sockjs_event_source(frame) + b"\r\n\r\n"


def htmlfile(frame: bytes) -> bytes:
    """Encode a frame as a script that passes it to the surrounding page."""
    return b"<script>\np(" + _script_string(frame) + b");\n</script>\r\n"


def jsonp(callback: str, frame: bytes) -> bytes:
    """Encode a frame as a script that calls `callback`.

    The comment prevents the response from being interpreted as a Flash file.
    """
    return b"/**/" + callback.encode() + b"(" + _script_string(frame) + b");\r\n"


def websocket(frame: bytes) -> bytes:
    """Encode a frame as a WebSocket text message."""
    return frame_text(frame)


def _script_string(frame: bytes) -> bytes:
    quoted = orjson.dumps(frame.decode())
    return _MARKUP.sub(lambda match: b"\\u%04x" % match[0][0], quoted)
