"""JSON as Go's encoding/json writes it (read in Go 1.9's source): what v1's clients are used to.

Inside of texts `<`, `>`, `&` and the two line separators of JavaScript are written as escapes, so
that an answer can stand in a page.
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
# Stand for a backslash and a quote inside of a text, where JSON has no control characters.
_PART_BYTES = 65536
_BACKSLASH, _QUOTE = b"\0\0", b"\0\1"


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
    for plain, escape in _ESCAPES:
        if plain in written:
            written = written.replace(plain, escape)
    return written


def compact(written: bytes) -> bytes:
    """JSON without white space between values, and escaped; numbers keep their spelling."""
    return escaped(_unmarked(b"".join(_compacted(written))))


async def compact_in_slices(written: bytes) -> bytes:
    """Do the same as `compact`, in slices of time."""
    parts = [part async for part in in_slices(_compacted(written))]
    return escaped(_unmarked(b"".join(parts)))


def _compacted(written: bytes) -> Iterator[bytes]:
    if not _has_space(written):
        yield written
        return
    # A regular expression with a step for each text takes several times as long.
    marked = written.replace(b"\\\\", _BACKSLASH).replace(b'\\"', _QUOTE)
    inside = 0
    for start in range(0, len(marked), _PART_BYTES):
        pieces = marked[start : start + _PART_BYTES].split(b'"')
        # Every other piece is between two texts.
        pieces[inside::2] = [piece.translate(None, _SPACE) for piece in pieces[inside::2]]
        inside ^= (len(pieces) - 1) & 1
        yield b'"'.join(pieces)


def _unmarked(marked: bytes) -> bytes:
    return marked.replace(_QUOTE, b'\\"').replace(_BACKSLASH, b"\\\\")
