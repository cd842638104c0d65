"""Encoding of API replies. The keys have v1's order: uid, method, error, advice, body."""

from __future__ import annotations

from dataclasses import dataclass

import orjson


@dataclass(frozen=True, slots=True)
class Reply:
    """Reply to one command. `error` is '' on success; `body` is JSON text."""

    method: str
    uid: str = ""
    error: str = ""
    advice: str = ""
    body: bytes = b"null"


def encode(replies: list[Reply]) -> bytes:
    """Return the body of a response, which is always an array."""
    return b"[" + b",".join(_SUCCESS.get(reply) or _encode(reply) for reply in replies) + b"]"


def _encode(reply: Reply) -> bytes:
    members: dict[str, str | None] = {}
    if reply.uid:
        members["uid"] = reply.uid
    members |= {"method": reply.method, "error": reply.error or None}
    if reply.advice:
        members["advice"] = reply.advice
    return orjson.dumps(members)[:-1] + b',"body":' + reply.body + b"}"


_SUCCESS = {reply: _encode(reply) for reply in (Reply("publish"), Reply("broadcast"))}
