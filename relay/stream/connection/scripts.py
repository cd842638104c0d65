"""Lua scripts for steps that must be atomic. Each script is defined beside its only user.

Scripts do not parse data: JSON in Lua turns `[]` into `{}` and 12345678901234567890 into 1.23e19.
Redis checks the rights of the user for each command in a script, so scripts need no further rights.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Final

from relay.stream.connection.connect import CommandRefused
from relay.stream.connection.pipeline_connection import ReplyError

if TYPE_CHECKING:
    from relay.stream.connection.pipeline_connection import PipelineConnection


class Script:
    """A script and its SHA-1. EVALSHA works after `load` was called on the server."""

    __slots__ = ("sha", "text")

    def __init__(self, text: str) -> None:
        self.text: Final = text
        self.sha: Final = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()


async def load(connection: PipelineConnection, *scripts: Script) -> None:
    """Load scripts into the server. Raise CommandRefused if an ACL forbids it.

    They are sent together, so that a SCRIPT FLUSH removes either all of them or none.
    """
    replies = await connection.execute([("SCRIPT", "LOAD", script.text) for script in scripts])
    for script, reply in zip(scripts, replies, strict=True):
        if isinstance(reply, ReplyError):
            raise CommandRefused("SCRIPT", str(reply))
        if reply != script.sha.encode():
            raise CommandRefused("SCRIPT LOAD", "the server returned a different SHA-1")


def is_missing(reply: object) -> bool:
    """Return True if the server does not have the script: SCRIPT FLUSH was called, or it is new."""
    return isinstance(reply, ReplyError) and str(reply).startswith("NOSCRIPT")
