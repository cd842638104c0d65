"""Read the control stream: commands for a pipeline and the parsing of their replies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

from relay.core.model import EntryID
from relay.stream.connection.pipeline_connection import RedisCommand
from relay.stream.connection.refusals import Effect, Refusals, rule_of
from relay.stream.format.keys import Keys
from relay.stream.write.control import SentCommand, decode

_COUNT = 100
# Name of an area in `Refusals`.
COMMANDS = "reads of the control stream"


class ControlReader:
    """Position of this worker in the control stream.

    A worker begins at the end of the stream, because it has no clients that an older command could
    affect. `on_lost` is called if commands may have been missed.
    """

    def __init__(
        self,
        keys: Keys,
        on_command: Callable[[SentCommand], None],
        on_lost: Callable[[], None],
        refusals: Refusals | None = None,
        on_misplaced: Callable[[], None] = lambda: None,
    ) -> None:
        self._refusals = refusals or Refusals()
        self._key = keys.control
        self._on_command = on_command
        self._on_lost = on_lost
        self._last: EntryID | None = None
        # Called if the control stream is on another server.
        self._on_misplaced = on_misplaced

    def commands(self) -> list[RedisCommand]:
        """Return commands that arm the key, read the last ID and read new entries."""
        commands: list[RedisCommand] = [
            ("XLEN", self._key),
            ("XREVRANGE", self._key, "+", "-", "COUNT", 1),
        ]
        if self._last is not None:
            commands.append(("XRANGE", self._key, f"({self._last}", "+", "COUNT", _COUNT))
        return commands

    def on_replies(self, replies: Sequence[object]) -> bool:
        """Pass on the commands that were read. Return True if there are more."""
        newest = replies[1]
        error = next((reply for reply in replies[1:] if not isinstance(reply, list)), None)
        if error is not None or not isinstance(newest, list):
            # The commands are executed when the stream can be read again.
            if rule_of(str(error)).effect is Effect.MISPLACED:
                self._on_misplaced()
                return False
            self._refusals.refused(COMMANDS, str(error), "disconnect and unsubscribe do nothing")
            return False
        if self._refusals.has(COMMANDS):
            self._refusals.accepted(COMMANDS)
        newest_id = EntryID.parse(newest[0][0]) if newest else EntryID(0, 0)
        if self._last is None:
            self._last = newest_id
            return False
        if newest_id < self._last:
            # The stream was flushed, or a failover has lost its newest entries.
            self._last = newest_id
            self._on_lost()
            return False
        entries = cast(list[tuple[bytes, list[bytes]]], replies[2])
        for raw, fields in entries:
            self._last = EntryID.parse(raw)
            sent = decode(self._last, fields)
            if sent is not None:
                self._on_command(sent)
        return len(entries) >= _COUNT
