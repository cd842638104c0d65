"""Appends entries, once for each uid: the producers' half of a workspace's stream.

An entry without a uid is a plain XADD. One with a uid goes through a script that keeps the first
entry's ID in `<prefix>uid:{C}:<uid>` for a window of time, and answers with that ID instead of
appending again. So an append whose answer was lost may be sent again without harm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import hiredis

from relay.core.model import Channel, EntryID
from relay.stream.connection.connect import CommandRefused
from relay.stream.connection.pipeline_connection import PipelineConnection, RedisCommand
from relay.stream.connection.scripts import APPEND_ONCE
from relay.stream.format.keys import Keys


@dataclass(frozen=True, slots=True)
class Entry:
    """What to append: flat fields as `entry.encode` makes them, and their uid once more."""

    channel: Channel
    fields: Sequence[bytes]
    uid: str | None = None


class Appender:
    """Appends over one link, for as long as that lasts.

    `window_s` is how long a uid is remembered; `maxlen` trims the stream to about so many entries
    (0: not at all). `loaded`: the script is known to the server already.
    """

    def __init__(
        self,
        link: PipelineConnection,
        keys: Keys,
        *,
        window_s: int,
        maxlen: int = 0,
        loaded: bool = False,
    ) -> None:
        self._link = link
        self._keys = keys
        self._window_s = window_s
        self._maxlen = maxlen
        # A server that has restarted has forgotten its scripts; but then this link is lost too.
        self._script_sent = loaded

    async def append(self, entries: Sequence[Entry]) -> list[EntryID | CommandRefused]:
        """Append in order, in one pipeline; each entry's ID, or why Redis refused that one.

        Either all entries have a uid, or there is one without. RedisUnavailable where the link is
        lost: then any number of them, from the first on, may have been appended.
        """
        if len(entries) > 1 and any(each.uid is None for each in entries):
            raise ValueError("several entries at once need a uid each")
        found: list[EntryID | CommandRefused] = []
        by_text = not self._script_sent
        while len(found) < len(entries):
            commands = [self._command(each) for each in entries[len(found) :]]
            if by_text and commands[0][0] == "EVALSHA":
                commands[0] = ("EVAL", APPEND_ONCE.text, *commands[0][2:])
                self._script_sent = True
            for reply in await self._link.execute(commands):
                if isinstance(reply, hiredis.ReplyError):
                    text = str(reply)
                    if text.startswith("NOSCRIPT") and not by_text:
                        # SCRIPT FLUSH, or Redis 7.4 made room. From here on once more: what was
                        # appended after this one is known by its uid.
                        break
                    found.append(CommandRefused("append", text))
                else:
                    found.append(EntryID.parse(cast(bytes, reply)))
            by_text = True
        return found

    def _command(self, each: Entry) -> RedisCommand:
        stream = self._keys.stream(each.channel)
        trim = ("MAXLEN", "~", self._maxlen) if self._maxlen else ()
        words = (*trim, "*", *each.fields)
        if each.uid is None:
            return ("XADD", stream, *words)
        mark = self._keys.uid(each.channel, each.uid)
        return ("EVALSHA", APPEND_ONCE.sha, 2, stream, mark, self._window_s * 1000, *words)
