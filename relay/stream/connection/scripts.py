"""Lua scripts: each is one step that must not be seen half done; the data in it is opaque.

Nothing is parsed in Lua: JSON there turns `[]` into `{}` and 12345678901234567890 into 1.23e19.
A script may do only what the user who runs it may do by itself, so it needs no further rights.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Final, cast

from relay.stream.connection.connect import CommandRefused

if TYPE_CHECKING:
    from relay.stream.connection.pipeline_connection import PipelineConnection


class Script:
    """One script by its hash; `load` must have been called once on the server."""

    __slots__ = ("sha", "text")

    def __init__(self, text: str) -> None:
        self.text: Final = text
        self.sha: Final = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()


async def load(link: PipelineConnection, *scripts: Script) -> None:
    """Make them known to the server behind `link`; CommandRefused where an ACL forbids it."""
    for script in scripts:
        sha = cast(bytes, await link.call("SCRIPT", "LOAD", script.text))
        if sha.decode() != script.sha:
            raise CommandRefused("SCRIPT LOAD", "the server calls it by another name")
