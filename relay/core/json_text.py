"""Whether bytes are JSON text, for readers and producers alike."""

from __future__ import annotations

import json

import orjson

# The first bytes that JSON text can have; spares large XML and prose a parse that must fail.
_STARTS = frozenset(b' \t\r\n{["-0123456789tfn')
# JSON that orjson rejects although the grammar allows it: an escape such as \ud800 without its
# other half, and numbers beyond a double. Browsers, Go and Python accept both.
_TOO_STRICT = ("surrogate", "infinity")


def is_json(data: bytes) -> bool:
    """Return True if `data` is one JSON value by the grammar of RFC 8259, at most 1024 deep."""
    if not data or data[0] not in _STARTS:
        return False
    try:
        orjson.loads(data)
    except orjson.JSONDecodeError as exc:
        return any(word in exc.msg for word in _TOO_STRICT) and _by_grammar(data)
    return True


def _by_grammar(data: bytes) -> bool:
    try:
        json.loads(data.decode(), parse_int=float, parse_constant=_reject)
    except (ValueError, RecursionError):
        return False
    return True


def _reject(word: str) -> None:
    raise ValueError(word)
