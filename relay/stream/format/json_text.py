"""Check whether bytes are JSON text, for readers and producers."""

from __future__ import annotations

import re

import msgspec
import orjson

# The first bytes that JSON text can have. Large XML and prose are rejected without being parsed.
_STARTS = frozenset(b' \t\r\n{["-0123456789tfn')
# Validates without creating an object for each value: 3 to 6 ms per MB. orjson needs up to 126 ms.
_validate = msgspec.json.Decoder(msgspec.Raw).decode
# Escapes such as \ud800, which may be unpaired: the grammar, browsers, Go and Python accept them.
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F][0-9a-fA-F]{2}")
# msgspec's nesting limit depends on the stack and is below that of orjson.
_SMALL_BYTES = 65536


def is_json(data: bytes) -> bool:
    """Return True if `data` is one JSON value by the grammar of RFC 8259.

    It may be nested 1024 levels deep up to 64 KiB, and about 900 levels beyond that.
    """
    if not data or data[0] not in _STARTS:
        return False
    try:
        _validate(data)
    except msgspec.DecodeError:
        if b"\\u" not in data or not _is_valid(with_surrogates_replaced(data)):
            return False
    except RecursionError:
        return _is_deep_json(data)
    return data.isascii() or _is_utf8(data)


def with_surrogates_replaced(data: bytes) -> bytes:
    """Return JSON text of the same length without unpaired surrogates, which msgspec rejects.

    It is valid JSON if `data` is.
    """
    # Replace them by another escape, which is invalid outside of a string as well. If `ud800`
    # follows an escaped backslash, it is plain text.
    return _SURROGATE.sub(rb"\\u0041", data.replace(b"\\\\", b"\\/"))


def _is_valid(data: bytes) -> bool:
    try:
        _validate(data)
    except (msgspec.DecodeError, RecursionError):
        return False
    return True


def _is_deep_json(data: bytes) -> bool:
    if len(data) > _SMALL_BYTES:
        return False
    try:
        orjson.loads(data)
    except orjson.JSONDecodeError:
        return False
    return True


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True
