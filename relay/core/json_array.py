"""Divides the text of a long JSON array, a slice of time after the other.

A JSON parser handles a text in one step, and no other client of the worker is served meanwhile: a
message of 8 MB that asks for thousands of things takes seconds. Here the text is scanned for the
array's commas in slices (`relay.core.slices`), so that its elements can be parsed a few at a time.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from relay.core.slices import next_slice

# A string, or a character that gives the text its structure. A string that is longer than the
# pattern allows is found as a lone quote.
_TOKEN = re.compile(rb'"[^"\\]{0,1048576}(?:\\.[^"\\]{0,1048576}){0,65536}"|[\[\]{},"]', re.DOTALL)
_OPENING, _CLOSING = b"[{", b"]}"
_TOKENS_PER_LOOK = 500


class Array(NamedTuple):
    """Where an array's elements stand in a text.

    `begin` and `end` are the places behind the opening and of the closing bracket. `parts` are
    begin and end of one or several whole elements, with the commas between them.
    """

    begin: int
    end: int
    parts: list[tuple[int, int]]


async def divide(text: bytes | bytearray, depth: int, part_bytes: int) -> Array:
    """Find the first array that is `depth` brackets deep, and divide it.

    A part ends with the first element that makes it at least `part_bytes` long. The text is not
    checked otherwise: what is not JSON is found when the parts are parsed.

    Raises:
        ValueError: There is no such array, or it has no end.
    """
    level = begin = part = 0
    parts: list[tuple[int, int]] = []
    for count, token in enumerate(_TOKEN.finditer(text), 1):
        if not count % _TOKENS_PER_LOOK:
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
                    raise ValueError("a comma before the end of the array")
                return Array(begin, token.start(), parts)
            level -= 1
        elif found == 44:
            if begin and level == depth and token.start() - part >= part_bytes:
                parts.append((part, token.start()))
                part = token.end()
        elif token.end() - token.start() == 1:
            raise ValueError("a string that is too long or has no end")
    raise ValueError("no array, or no end of it")
