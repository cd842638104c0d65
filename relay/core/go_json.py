"""Write JSON as Go's encoding/json does (Go 1.9), which clients of Centrifugo v1 receive.

In strings, `<`, `>`, `&` and the two line separators of JavaScript are escaped, so that JSON can be
embedded in a page.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import orjson

from relay.core.slices import in_slices

_ESCAPES = (
    (b"<", b"\\u003c"),
    (b">", b"\\u003e"),
    (b"&", b"\\u0026"),
    (b"\xe2\x80\xa8", b"\\u2028"),
    (b"\xe2\x80\xa9", b"\\u2029"),
)
_SPACE = b" \t\r\n"
_has_space = re.compile(rb"[ \t\r\n]").search
_PART_BYTES = 65536
# Temporary marks for an escaped backslash and quote in a string, where JSON allows no control
# characters.
_BACKSLASH, _QUOTE = b"\0\0", b"\0\1"


def text(value: str) -> bytes:
    """Encode a JSON string. An unpaired surrogate becomes U+FFFD, as in Go."""
    try:
        written = orjson.dumps(value)
    except orjson.JSONEncodeError:
        written = orjson.dumps(
            value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        )
    return escaped(written)


def escaped(written: bytes) -> bytes:
    """Escape the five characters. They do not occur outside of strings."""
    for plain, escape in _ESCAPES:
        if plain in written:
            written = written.replace(plain, escape)
    return written


def compact(written: bytes) -> bytes:
    """Remove white space between values and escape strings. Numbers keep their notation."""
    return escaped(_unmarked(b"".join(_compacted(written))))


async def compact_in_slices(written: bytes) -> bytes:
    """Like `compact`, in slices of time."""
    parts = [part async for part in in_slices(_compacted(written))]
    return escaped(_unmarked(b"".join(parts)))


def _compacted(written: bytes) -> Iterator[bytes]:
    if not _has_space(written):
        yield written
        return
    # A regular expression that matches each string would take several times as long.
    marked = written.replace(b"\\\\", _BACKSLASH).replace(b'\\"', _QUOTE)
    inside = 0
    for start in range(0, len(marked), _PART_BYTES):
        pieces = marked[start : start + _PART_BYTES].split(b'"')
        # Every other piece is between two strings.
        pieces[inside::2] = [piece.translate(None, _SPACE) for piece in pieces[inside::2]]
        inside ^= (len(pieces) - 1) & 1
        yield b'"'.join(pieces)


def _unmarked(marked: bytes) -> bytes:
    return marked.replace(_QUOTE, b'\\"').replace(_BACKSLASH, b"\\\\")
