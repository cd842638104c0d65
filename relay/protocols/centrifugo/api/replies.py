"""Encoding of API replies. The keys have v1's order: uid, method, error, advice, body."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import orjson


class Reply(NamedTuple):
    """Reply to one command. `error` is '' on success; `body` is JSON text."""

    method: str
    uid: str = ""
    error: str = ""
    advice: str = ""
    body: bytes = b"null"


def encode(replies: Sequence[Reply]) -> bytes:
    """Return the body of a response, which is always an array. Large bodies are copied once."""
    pieces: list[bytes] = []
    for reply in replies:
        pieces.append(b"," if pieces else b"[")
        # Don't look up large replies, because that computes the hash of their body.
        usual = _SUCCESS.get(reply) if reply.body == b"null" else None
        if usual is None:
            pieces += _head(reply), reply.body, b"}"
        else:
            pieces.append(usual)
    return b"".join((*pieces, b"]")) if pieces else b"[]"


def _head(reply: Reply) -> bytes:
    members: dict[str, str | None] = {}
    if reply.uid:
        members["uid"] = reply.uid
    members |= {"method": reply.method, "error": reply.error or None}
    if reply.advice:
        members["advice"] = reply.advice
    return orjson.dumps(members)[:-1] + b',"body":'


_SUCCESS = {
    reply: _head(reply) + reply.body + b"}" for reply in (Reply("publish"), Reply("broadcast"))
}
