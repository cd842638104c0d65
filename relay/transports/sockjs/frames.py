"""SockJS frames, and what each transport makes of one on its wire. Without I/O.

Source: the protocol's definition, sockjs-protocol 0.3.3 and its successor for 1.x; sockjs-go v1
where it leaves a choice.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable

import orjson

from relay.transports.socket.websocket import frame_text

OPEN = b"o"
HEARTBEAT = b"h"

# What browsers were found to mangle on their way in ("JSON Unicode Encoding" in sockjs-protocol).
# Control characters are escaped in any JSON, and lone surrogates are no UTF-8.
_UNSAFE = re.compile("[\u200c-\u200f\u2028-\u202f\u2060-\u206f\ufff0-\uffff]")
_SURROGATE = re.compile("[\ud800-\udfff]")
# Inside a page a string must not end the script that it stands in.
_MARKUP = re.compile(b"[<>&]")


class BadFrame(ValueError):
    """The client sent something else than messages. The text is the protocol's own."""


def element(payload: bytes) -> bytes:
    """One message for `SockJsSession.write`: a comma and the JSON string. UnicodeDecodeError.

    It is the same for all clients and transports: made once per event.
    """
    return b"," + _string(payload.decode())


def _string(text: str) -> bytes:
    encoded = orjson.dumps(text)
    if encoded.isascii():
        return encoded
    return _UNSAFE.sub(lambda match: f"\\u{ord(match[0]):04x}", encoded.decode()).encode()


def array_frame(elements: bytes) -> bytes:
    """One frame with messages that `element` made, joined."""
    return b"a[" + elements[1:] + b"]"


def close_frame(code: int, reason: str) -> bytes:
    """The frame that ends a session."""
    return b"c[%d,%b]" % (code, _string(reason))


GO_AWAY = close_frame(3000, "Go away!")
STILL_OPEN = close_frame(2010, "Another connection still open")


def parse_messages(body: bytes) -> list[bytes]:
    """The messages of a request or a websocket frame: a JSON array of strings. BadFrame.

    A lone surrogate, which is no character but may stand in JSON, becomes U+FFFD.
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
        # Takes them, where orjson refuses them.
        return json.loads(body)
    except (ValueError, RecursionError):
        raise BadFrame("Broken JSON encoding.") from None


class Framing:
    """A transport's way to write a frame.

    What was made last is kept: most events go to many clients, and each is given the same object.
    """

    __slots__ = ("_elements", "_framed", "heartbeat", "wrap")

    def __init__(self, wrap: Callable[[bytes], bytes]) -> None:
        self.wrap = wrap
        self.heartbeat = wrap(HEARTBEAT)
        self._elements = b""
        self._framed = b""

    def messages(self, elements: bytes) -> bytes:
        """One frame with all of `elements`, on the wire."""
        if elements is not self._elements:
            self._framed = self.wrap(array_frame(elements))
            self._elements = elements
        return self._framed


def xhr(frame: bytes) -> bytes:
    """A line."""
    return frame + b"\n"


def eventsource(frame: bytes) -> bytes:
    """A server-sent event."""
    return b"data: " + frame + b"\r\n\r\n"


def htmlfile(frame: bytes) -> bytes:
    """A script that hands the frame to the page around it."""
    return b"<script>\np(" + _script_string(frame) + b");\n</script>\r\n"


def jsonp(callback: str, frame: bytes) -> bytes:
    """A script that calls `callback`. The comment is against files that are also Flash."""
    return b"/**/" + callback.encode() + b"(" + _script_string(frame) + b");\r\n"


def websocket(frame: bytes) -> bytes:
    """A text message."""
    return frame_text(frame)


def _script_string(frame: bytes) -> bytes:
    quoted = orjson.dumps(frame.decode())
    return _MARKUP.sub(lambda match: b"\\u%04x" % match[0][0], quoted)
