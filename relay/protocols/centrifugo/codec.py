"""Bytes of API replies. The keys stand in v1's order: uid, method, error, advice, body."""

from __future__ import annotations

from dataclasses import dataclass

import orjson

FIX = "fix"
RETRY = "retry"


@dataclass(frozen=True, slots=True)
class Reply:
    """The answer to one command; `error` is '' where it succeeded."""

    method: str
    uid: str = ""
    error: str = ""
    advice: str = ""


def encode(replies: list[Reply]) -> bytes:
    """The body of a response: always an array."""
    return b"[" + b",".join(_SUCCESS.get(reply) or _encode(reply) for reply in replies) + b"]"


def _encode(reply: Reply) -> bytes:
    members: dict[str, str | None] = {}
    if reply.uid:
        members["uid"] = reply.uid
    members |= {"method": reply.method, "error": reply.error or None}
    if reply.advice:
        members["advice"] = reply.advice
    members["body"] = None
    return orjson.dumps(members)


_SUCCESS = {reply: _encode(reply) for reply in (Reply("publish"), Reply("broadcast"))}
