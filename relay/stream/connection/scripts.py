"""Lua scripts for steps that must be atomic. Each script is defined beside its only user.

Scripts do not parse data: JSON in Lua turns `[]` into `{}` and 12345678901234567890 into 1.23e19.
Redis checks the rights of the user for each command in a script, so scripts need no further rights.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Final, cast

from relay.stream.connection.connect import CommandRefused

if TYPE_CHECKING:
    from relay.stream.connection.pipeline_connection import PipelineConnection


class Script:
    """A script and its SHA-1. EVALSHA works after `load` was called on the server."""

    __slots__ = ("sha", "text")

    def __init__(self, text: str) -> None:
        self.text: Final = text
        self.sha: Final = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()


async def load(connection: PipelineConnection, *scripts: Script) -> None:
    """Load scripts into the server. Raise CommandRefused if an ACL forbids it."""
    for script in scripts:
        sha = cast(bytes, await connection.call("SCRIPT", "LOAD", script.text))
        if sha.decode() != script.sha:
            raise CommandRefused("SCRIPT LOAD", "the server returned a different SHA-1")
