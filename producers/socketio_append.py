"""One batch of emits as one step in Redis: entries, live-only events, commands, and the mark."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, cast

import orjson

from producers.socketio_wire import Control
from relay.core.model import Channel, EntryID, Event
from relay.protocols.socketio.entry_format import Emit, EmitContents, UnusableEmit, contents, copies
from relay.stream.connection.scripts import Script
from relay.stream.format import entry as entries
from relay.stream.format import ephemeral
from relay.stream.write import control, dead_letters
from relay.stream.write.append import APPEND_FUNCTION

if TYPE_CHECKING:
    from relay.config.settings import NamespaceSettings
    from relay.stream.connection.reconnecting import ReconnectingConnection
    from relay.stream.format.keys import Keys

_DOOR = "socketio"
# In a live-only event: the rooms before this one have their own, whenever a client joined them.
_ALWAYS = EntryID(2**64 - 1, 0)

_WAIT_MS = 1000

# KEYS a tap's mark, dead letters, the stream of each entry; ARGV the mark as read, its new value,
# dead letters kept, node, time, then of each emit either `p`, a pub/sub channel and a payload, or
# `x`, entries kept (0: all), number of words, words, number of copies, and of each copy the number
# of its own words and these. A later copy gets the IDs of those before it. -1 where the mark is
# another and nothing was done, else how many appends Redis refused: each has become a dead letter
# with the beginning of its `data`, which must be the first of its fields.
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
    """What one step is to append, under the names of one set of keys."""

    def __init__(
        self,
        keys: Keys,
        namespace_of: Callable[[Channel], NamespaceSettings],
        max_entry_bytes: int,
        node: str,
    ) -> None:
        self._keys = keys
        self._node = node
        self._namespace_of = namespace_of
        self._max_entry_bytes = max_entry_bytes
        self._streams: list[bytes] = []
        self._words: Words = []
        self._replicas = 0

    def add(self, emit: Emit) -> None:
        """Unusable where no entry can be made of it; then nothing is added."""
        what = contents(emit)
        where = copies(emit)
        if emit.volatile:
            self._whisper(emit, what)
            return
        fields = entries.encode(what.data, type=what.type, extra=what.extra, checked=True)
        if entries.size(fields) > self._max_entry_bytes:
            raise UnusableEmit(self._too_large(entries.size(fields)))
        keep = self._namespace_of(where[0].channel).retention_count
        self._words += "x", keep, len(fields), *fields, len(where)
        for channel, socket in where:
            self._streams.append(self._keys.stream(channel))
            to = [] if socket is None else [b"to", orjson.dumps([f"client:{socket}"])]
            self._words += len(to), *to
            rules = self._namespace_of(channel)
            self._replicas = max(self._replicas, rules.wait_replicas)

    def _whisper(self, emit: Emit, what: EmitContents) -> None:
        always = str(_ALWAYS).encode()
        published: Words = []
        for number, (channel, socket) in enumerate(copies(emit)):
            extra = dict(what.extra)
            if number:
                extra[b"copies"] = b" ".join([always] * number)
            to = None if socket is None else frozenset({f"client:{socket}"})
            event = Event(channel, None, what.data, True, type=what.type, to=to, extra=extra)
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

    def command(self, command: Control, joined: Sequence[tuple[str, str]]) -> None:
        """For all workers' clients; `joined` are rooms and where their streams are now."""
        payload = {
            "do": command.what,
            "rooms": command.rooms,
            "except": command.without,
            "names": dict(joined) if command.what == "join" else dict.fromkeys(command.names, ""),
        }
        text = orjson.dumps(payload).decode()
        fields = control.encode(control.DoorCommand(door=_DOOR, payload=text))
        self._streams.append(self._keys.control)
        self._words += "x", control.KEEP, len(fields), *fields, 1, 0

    async def apply(
        self, link: ReconnectingConnection, mark_key: bytes, old: bytes, new: bytes
    ) -> int | None:
        """Append everything and set the mark to `new` in one step, if the mark is still `old`.

        Returns:
            The number of entries that Redis rejected and that became dead letters; None if the mark
            was another and nothing was done.

        Raises:
            Unavailable: The outcome is unknown.
            CommandRefused: Redis rejected the whole step.
        """
        streams = self._streams
        at = datetime.now(UTC).isoformat(timespec="milliseconds")
        words: Words = ["EVALSHA", EMITS.sha, len(streams) + 2, mark_key]
        words += self._keys.dead_letters, *streams
        words += old, new, dead_letters.KEEP, self._node, at, *self._words
        refused = cast(int, await link.call(*words))
        if self._replicas:
            await link.call("WAIT", self._replicas, _WAIT_MS)
        return refused if refused >= 0 else None
