"""Divide the text of a long JSON array in slices of time.

A JSON parser processes a text in one step, and the event loop is blocked meanwhile: a message of 8
MB with thousands of elements takes seconds. `divide` searches the text for the array's commas in
slices (`relay.core.slices`), so that a few elements can be parsed at a time.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from relay.core.slices import next_slice

# A string or a structural character. A string that exceeds the limits of the pattern is matched as
# a single quote.
_TOKEN = re.compile(rb'"[^"\\]{0,1048576}(?:\\.[^"\\]{0,1048576}){0,65536}"|[\[\]{},"]', re.DOTALL)
_OPENING, _CLOSING = b"[{", b"]}"
_TOKENS_PER_STEP = 500


class Array(NamedTuple):
    """Positions of an array's elements in a text.

    `begin` is the position after the opening bracket, `end` that of the closing one. `parts` are
    begin and end of one or several complete elements, with the commas between them.
    """

    begin: int
    end: int
    parts: list[tuple[int, int]]


async def divide(text: bytes | bytearray, depth: int, part_bytes: int) -> Array:
    """Find the first array that is `depth` brackets deep, and divide it.

    A part ends with the first element that makes it at least `part_bytes` long. Other errors in the
    text are detected when the parts are parsed.

    Raises:
        ValueError: There is no such array, or it is incomplete.
    """
    level = begin = part = 0
    parts: list[tuple[int, int]] = []
    for count, token in enumerate(_TOKEN.finditer(text), 1):
        if not count % _TOKENS_PER_STEP:
            await next_slice()
        found = text[token.start()]
        if found in _OPENING:
            level += 1
            if level == depth and found == 91 and not begin:
                begin = part = token.end()
        elif found in _CLOSING:
            if begin and level == depth:
                if text[part : token.start()].strip():
                    parts.append((part, token.start()))
                elif parts:
                    raise ValueError("comma before the end of the array")
                return Array(begin, token.start(), parts)
            level -= 1
        elif found == 44:
            if begin and level == depth and token.start() - part >= part_bytes:
                parts.append((part, token.start()))
                part = token.end()
        elif token.end() - token.start() == 1:
            raise ValueError("string is too long or incomplete")
    raise ValueError("array is missing or incomplete")
