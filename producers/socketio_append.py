"""Append a batch of emits in one step: entries, ephemeral events, commands and the position."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, cast

import orjson

from producers.socketio_wire import Control
from relay.core.durability import Durability
from relay.core.errors import RedisUnavailable, Unavailable
from relay.core.model import Channel, EntryID, Event
from relay.protocols.socketio.entry_format import (
    Emit,
    EmitContents,
    UnusableEmit,
    channels_of,
    contents,
    copies,
)
from relay.stream.connection.scripts import Script
from relay.stream.format import entry as entries
from relay.stream.format import ephemeral
from relay.stream.write import control, dead_letters
from relay.stream.write.append import APPEND_FUNCTION
from relay.stream.write.confirmations import UnconfirmedLog, confirming, parse_confirmations

if TYPE_CHECKING:
    from relay.config.settings import NamespaceSettings
    from relay.stream.connection.reconnecting import ReconnectingConnection
    from relay.stream.format.keys import Keys

_DOOR = "socketio"
# ID of the earlier copies in an ephemeral event: a client that is in several of the rooms receives
# the copy of the first one, no matter when it joined.
_ALWAYS = EntryID(2**64 - 1, 0)

_WAIT_MS = 1000

# KEYS: the position (mark) of a listener, the dead letters, and the stream of each entry.
# ARGV: the mark as read, its new value, the number of dead letters to keep, node, time. Then for
# each emit either `p`, a pub/sub channel and a payload, or `x`, the number of entries to keep
# (0: all), the number of words, the words, the number of copies, and for each copy the number of
# its own words and these words. A later copy contains the IDs of the earlier ones. A command is
# `c`, the number of entries to keep, the number of words, the words, the number of streams and for
# each stream the name of the field for its newest entry; KEYS has the control stream, then these.
# Returns -1 if the mark has another value; then nothing was done. Otherwise it returns the number
# of appends that Redis rejected. Each of them becomes a dead letter with the beginning of its
# `data`, which must be its first field.
EMITS = Script(
    APPEND_FUNCTION
    + """\
if (redis.call('GET', KEYS[1]) or '') ~= ARGV[1] then return -1 end
redis.call('SET', KEYS[1], ARGV[2])
local k, a, failed, argv = 3, 6, 0, ARGV
while a <= #argv do
  if argv[a] == 'p' then
    redis.pcall('PUBLISH', argv[a + 1], argv[a + 2])
    a = a + 3
  elseif argv[a] == 'c' then
    local words, from, stream = {}, a + 3, KEYS[k]
    a = from + tonumber(argv[a + 2])
    for i = from, a - 1 do words[#words + 1] = argv[i] end
    for i = 1, tonumber(argv[a]) do
      k = k + 1
      local newest = redis.pcall('XREVRANGE', KEYS[k], '+', '-', 'COUNT', 1)
      if not newest.err then
        words[#words + 1] = argv[a + i]
        words[#words + 1] = newest[1] and newest[1][1] or '0-0'
      end
    end
    a, k = a + 1 + tonumber(argv[a]), k + 1
    local id = append(stream, argv[from - 2], words)
    if type(id) == 'table' then
      failed = failed + 1
      append(KEYS[2], argv[3], {'queue', stream, 'reason', id.err, 'node', argv[4],
        'at', argv[5], 'fields', cjson.encode({words})})
    end
  else
    local keep, n, from, earlier = argv[a + 1], tonumber(argv[a + 2]), a + 3, ''
    a = from + n
    local copies = tonumber(argv[a])
    a = a + 1
    for copy = 1, copies do
      local words = {unpack(argv, from, from + n - 1)}
      local own = tonumber(argv[a])
      for i = a + 1, a + own do words[#words + 1] = argv[i] end
      a = a + 1 + own
      if copy > 1 then
        words[#words + 1] = 'copies'
        words[#words + 1] = earlier
      end
      local id = append(KEYS[k], keep, words)
      if type(id) == 'table' then
        failed = failed + 1
        append(KEYS[2], argv[3], {'queue', KEYS[k], 'reason', id.err, 'node', argv[4],
          'at', argv[5], 'truncated', '1',
          'fields', cjson.encode({{'data', string.sub(argv[from + 1], 1, 65536)}})})
        id = '0-0'
      end
      k = k + 1
      earlier = copy > 1 and earlier .. ' ' .. id or id
    end
  end
end
return failed
"""
)


Words = list[bytes | str | int]


class EmitBatch:
    """Collects what one step appends."""

    def __init__(
        self,
        keys: Keys,
        namespace_of: Callable[[Channel], NamespaceSettings],
        max_entry_bytes: int,
        node: str,
        unconfirmed: UnconfirmedLog,
    ) -> None:
        self._keys = keys
        self._node = node
        self._unconfirmed = unconfirmed
        self._namespace_of = namespace_of
        self._max_entry_bytes = max_entry_bytes
        self._streams: list[bytes] = []
        self._words: Words = []
        self._wanted: set[Durability] = set()

    def add(self, emit: Emit) -> None:
        """Add an emit. Raise UnusableEmit, without adding anything, if it cannot be an entry."""
        content = contents(emit)
        targets = copies(emit)
        if emit.volatile:
            self._add_ephemeral(emit, content)
            return
        fields = entries.encode(content.data, type=content.type, extra=content.extra, checked=True)
        if entries.size(fields) > self._max_entry_bytes:
            raise UnusableEmit(self._too_large(entries.size(fields)))
        keep = self._namespace_of(targets[0].channel).retention_count
        self._words += "x", keep, len(fields), *fields, len(targets)
        for channel, socket in targets:
            self._streams.append(self._keys.stream(channel))
            to = [] if socket is None else [b"to", orjson.dumps([f"client:{socket}"])]
            self._words += len(to), *to
            durability = Durability.parse(self._namespace_of(channel).durability)
            if durability.waits:
                self._wanted.add(durability)

    def _add_ephemeral(self, emit: Emit, content: EmitContents) -> None:
        always = str(_ALWAYS).encode()
        published: Words = []
        for number, (channel, socket) in enumerate(copies(emit)):
            extra = dict(content.extra)
            if number:
                extra[b"copies"] = b" ".join([always] * number)
            to = None if socket is None else frozenset({f"client:{socket}"})
            event = Event(channel, None, content.data, True, type=content.type, to=to, extra=extra)
            payload = ephemeral.encode(event)
            if len(payload) > self._max_entry_bytes:
                raise UnusableEmit(self._too_large(len(payload)))
            published += "p", self._keys.ephemeral(channel), payload
        self._words += published

    def _too_large(self, size: int) -> str:
        return f"too large: {size} bytes, [stream] max_entry_bytes is {self._max_entry_bytes}"

    def reject(self, source: str, message: bytes, reason: str) -> None:
        """Add a dead letter for a message from which no entry can be made."""
        letter = dead_letters.of_command(source, message, reason, node=self._node)
        self._streams.append(self._keys.dead_letters)
        self._words += "x", dead_letters.KEEP, len(letter), *letter, 1, 0

    def add_command(self, command: Control, joined: Sequence[tuple[str, str]]) -> None:
        """Add a command to all workers. `joined`: rooms to join with their newest entry IDs."""
        payload = {
            "do": command.action,
            "rooms": command.rooms,
            "except": command.without,
            "names": dict(joined) if command.action == "join" else dict.fromkeys(command.names, ""),
        }
        text = orjson.dumps(payload).decode()
        fields = control.encode(control.DoorCommand(door=_DOOR, payload=text))
        # The command takes effect directly after the newest entries of these rooms.
        rooms = {"leave": command.names, "disconnect": command.rooms}.get(command.action, ())
        channels = list(dict.fromkeys(channels_of(rooms)))
        self._streams += self._keys.control, *map(self._keys.stream, channels)
        self._words += "c", control.KEEP, len(fields), *fields
        self._words += len(channels), *map(control.at_field, channels)

    async def apply(
        self, connection: ReconnectingConnection, mark_key: bytes, old: bytes, new: bytes
    ) -> int | None:
        """Append everything and set the mark to `new` in one step, if the mark is still `old`.

        Returns:
            The number of entries that Redis rejected and that became dead letters; None if the mark
            had another value and nothing was done.

        Raises:
            Unavailable: The outcome is unknown.
            CommandRefused: Redis rejected the whole step.
        """
        streams = self._streams
        at = datetime.now(UTC).isoformat(timespec="milliseconds")
        words: Words = ["EVALSHA", EMITS.sha, len(streams) + 2, mark_key]
        words += self._keys.dead_letters, *streams
        words += old, new, dead_letters.KEEP, self._node, at, *self._words
        rejected = cast(int, await connection.call(*words))
        if waits := confirming(self._wanted, _WAIT_MS):
            try:
                replies = await connection.execute(waits)
            except RedisUnavailable as exc:
                raise Unavailable(str(exc)) from exc
            self._unconfirmed.report(self._wanted, parse_confirmations(waits, replies, _WAIT_MS))
        return rejected if rejected >= 0 else None
