"""JSON as Go's encoding/json writes it (read in Go 1.9's source): what v1's clients are used to.

Inside of texts `<`, `>`, `&` and the two line separators of JavaScript are written as escapes, so
that an answer can stand in a page.
"""

from __future__ import annotations

import re

import orjson

_ESCAPED = re.compile(rb"[<>&]|\xe2\x80[\xa8\xa9]").sub
_ESCAPES = {
    b"<": b"\\u003c",
    b">": b"\\u003e",
    b"&": b"\\u0026",
    b"\xe2\x80\xa8": b"\\u2028",
    b"\xe2\x80\xa9": b"\\u2029",
}
# A text as a whole, which is kept, or white space between values.
_LOOSE = re.compile(rb'("(?:[^"\\]|\\.)*")|[ \t\r\n]+', re.DOTALL).sub


def text(value: str) -> bytes:
    """A JSON text. A lone surrogate becomes U+FFFD, as in Go."""
    try:
        written = orjson.dumps(value)
    except orjson.JSONEncodeError:
        written = orjson.dumps(
            value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        )
    return escaped(written)


def escaped(written: bytes) -> bytes:
    """JSON with the five characters as escapes; outside of texts there are none of them."""
    return _ESCAPED(lambda found: _ESCAPES[found[0]], written)


def compact(written: bytes) -> bytes:
    """JSON without white space between values, and escaped; numbers keep their spelling."""
    return escaped(_LOOSE(lambda found: found[1] or b"", written))


def is_json(written: str) -> bool:
    """Whether it is one JSON value."""
    try:
        orjson.loads(written)
    except ValueError:
        return False
    return True
