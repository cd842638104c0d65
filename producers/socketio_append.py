"""Append a batch of emits: entries, ephemeral events, commands and the position.

On one server a script does so in one step. On several servers or a Redis Cluster no script may use
all keys. Each entry is then appended once, with a uid that follows from the identity of its
message, and then the position is moved. A listener that takes over in between appends the same
entries, which changes nothing, even if its batch begins or ends with another message.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from hashlib import blake2b
from typing import TYPE_CHECKING, NamedTuple, cast

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
from relay.stream.connection.connect import CommandRefused
from relay.stream.connection.pipeline_connection import ReplyError
from relay.stream.connection.refusals import Effect, rule_of
from relay.stream.connection.scripts import Script
from relay.stream.format import entry as entries
from relay.stream.format import ephemeral
from relay.stream.write import control, dead_letters
from relay.stream.write.append import APPEND_FUNCTION
from relay.stream.write.confirmations import UnconfirmedLog, confirm

if TYPE_CHECKING:
    from relay.config.settings import NamespaceSettings
    from relay.stream.format.keys import Keys
    from relay.stream.shards.links import Connections, ShardLinks

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


# KEYS: the position. ARGV: its value as read, its new value. Returns 1 if it was moved, else 0.
_MOVE = Script("""\
if (redis.call('GET', KEYS[1]) or '') ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[2])
return 1
""")
# KEYS: a stream, and the uid key of each entry. ARGV: how long uids are kept (ms), then for each
# entry the number of entries to keep (0: all), the number of words and the words. Returns the ID of
# each entry, of the first one with its uid if that is known. After an error no other entry is
# appended, to keep their order: they have the same error. It writes one key even if all uids are
# known, because WAIT confirms the last write of its connection.
_ALL_ONCE = Script(
    APPEND_FUNCTION
    + """\
local found, a, failed = {}, 2, nil
for i = 2, #KEYS do
  local last = a + 1 + tonumber(ARGV[a + 1])
  if not failed then
    local id = append(KEYS[1], ARGV[a], {unpack(ARGV, a + 2, last)}, KEYS[i], ARGV[1])
    if type(id) == 'table' then failed = id end
    found[i - 1] = id
  else
    found[i - 1] = failed
  end
  a = last + 1
end
if type(found[1]) == 'string' then redis.pcall('SET', KEYS[2], found[1], 'PX', ARGV[1]) end
return found
"""
)
# Longer than a listener is suspended before its connections are lost.
_ONCE_MS = 600_000

Words = list[bytes | str | int]


class _Entry(NamedTuple):
    """Copies of one entry: their streams and the fields that only this copy has."""

    keep: int
    fields: Sequence[bytes]
    copies: Sequence[tuple[bytes, Sequence[bytes]]]
    identity: bytes


class _Ephemeral(NamedTuple):
    name: bytes
    payload: bytes


class _ControlCommand(NamedTuple):
    """A command to all workers, which takes effect after the newest entries of these channels."""

    fields: Sequence[bytes]
    channels: Sequence[Channel]
    identity: bytes


class EmitBatch:
    """Collects what one step appends.

    The `identity` of a message is the same for all listeners, and no other message of the same
    position has it.
    """

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
        self._parts: list[_Entry | _Ephemeral | _ControlCommand] = []
        self._wanted: set[Durability] = set()
        # The connections that carried the entries.
        self._written: Connections = {}

    def add(self, emit: Emit, identity: bytes) -> None:
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
        streams: list[tuple[bytes, Sequence[bytes]]] = []
        for channel, socket in targets:
            to = [] if socket is None else [b"to", orjson.dumps([f"client:{socket}"])]
            streams.append((self._keys.stream(channel), to))
            durability = Durability.parse(self._namespace_of(channel).durability)
            if durability.waits:
                self._wanted.add(durability)
        self._parts.append(_Entry(keep, fields, streams, identity))

    def _add_ephemeral(self, emit: Emit, content: EmitContents) -> None:
        always = str(_ALWAYS).encode()
        published: list[_Ephemeral] = []
        for number, (channel, socket) in enumerate(copies(emit)):
            extra = dict(content.extra)
            if number:
                extra[b"copies"] = b" ".join([always] * number)
            to = None if socket is None else frozenset({f"client:{socket}"})
            event = Event(channel, None, content.data, True, type=content.type, to=to, extra=extra)
            payload = ephemeral.encode(event)
            if len(payload) > self._max_entry_bytes:
                raise UnusableEmit(self._too_large(len(payload)))
            published.append(_Ephemeral(self._keys.ephemeral(channel), payload))
        self._parts += published

    def _too_large(self, size: int) -> str:
        return f"too large: {size} bytes, [stream] max_entry_bytes is {self._max_entry_bytes}"

    def reject(self, source: str, message: bytes, reason: str, identity: bytes) -> None:
        """Add a dead letter for a message from which no entry can be made."""
        letter = dead_letters.of_command(source, message, reason, node=self._node)
        to = self._keys.dead_letters
        self._parts.append(_Entry(dead_letters.KEEP, letter, [(to, [])], identity))

    def add_command(
        self, command: Control, joined: Sequence[tuple[str, str]], identity: bytes
    ) -> None:
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
        self._parts.append(_ControlCommand(fields, channels, identity))

    async def apply(self, links: ShardLinks, mark_key: bytes, old: bytes, new: bytes) -> int | None:
        """Append everything and set the mark to `new`, if the mark is still `old`.

        Returns:
            The number of entries that Redis rejected and that became dead letters; None if the mark
            had another value and nothing was done.

        Raises:
            Unavailable: The outcome is unknown.
            CommandRefused: Redis rejected the whole step.
        """
        try:
            if self._keys.has_site_tag:
                rejected = await self._append_in_steps(links, mark_key, old, new)
            else:
                rejected = await self._append_at_once(links, mark_key, old, new)
            if self._wanted and rejected >= 0:
                missing = await confirm(self._written, self._wanted, _WAIT_MS)
                self._unconfirmed.report(missing)
        except RedisUnavailable as exc:
            raise Unavailable(str(exc)) from exc
        return rejected if rejected >= 0 else None

    async def _append_at_once(
        self, links: ShardLinks, mark_key: bytes, old: bytes, new: bytes
    ) -> int:
        at = datetime.now(UTC).isoformat(timespec="milliseconds")
        keys = [mark_key, self._keys.dead_letters]
        words: Words = [old, new, dead_letters.KEEP, self._node, at]
        for part in self._parts:
            if isinstance(part, _Ephemeral):
                words += "p", part.name, part.payload
            elif isinstance(part, _ControlCommand):
                keys += self._keys.control, *map(self._keys.stream, part.channels)
                words += "c", control.KEEP, len(part.fields), *part.fields
                words += len(part.channels), *map(control.at_field, part.channels)
            else:
                words += "x", part.keep, len(part.fields), *part.fields, len(part.copies)
                for stream, own in part.copies:
                    keys.append(stream)
                    words += len(own), *own
        (reply,) = await links.evaluate([(EMITS, keys, words)])
        if isinstance(reply, ReplyError):
            raise Unavailable(f"Redis refused EVALSHA: {reply}")
        self._written = links.connections_of([mark_key])
        return cast(int, reply)

    async def _append_in_steps(
        self, links: ShardLinks, mark_key: bytes, old: bytes, new: bytes
    ) -> int:
        if (await links.call("GET", mark_key) or b"") != old:
            return -1
        steps = _Steps(links, self._keys, self._node, mark_key)
        self._written = steps.written
        # Entries without copies are collected, and appended before anything that depends on them.
        singles: list[_Once] = []
        for part in self._parts:
            if isinstance(part, _Ephemeral):
                continue
            if isinstance(part, _Entry) and len(part.copies) == 1:
                ((stream, own),) = part.copies
                words = [*part.fields, *own]
                singles.append(steps.entry(stream, part.keep, words, part.identity))
                continue
            await steps.append(singles)
            singles = []
            if isinstance(part, _Entry):
                earlier: list[bytes] = []
                for number, (stream, own) in enumerate(part.copies):
                    fields = [*part.fields, *own]
                    if earlier:
                        fields += b"copies", b" ".join(earlier)
                    identity = b"%s %d" % (part.identity, number)
                    copy = steps.entry(stream, part.keep, fields, identity)
                    earlier += await steps.append([copy])
                continue
            fields = [*part.fields]
            for channel in part.channels:
                newest_of = ("XREVRANGE", self._keys.stream(channel), "+", "-", "COUNT", 1)
                (found,) = await links.execute([newest_of])
                if not isinstance(found, ReplyError):
                    newest = cast("list[list[bytes]]", found)
                    fields += control.at_field(channel), newest[0][0] if newest else b"0-0"
            # The positions differ if the step is repeated, so they are no part of the uid.
            command = steps.entry(
                self._keys.control, control.KEEP, fields, part.identity, uid_of=part.fields
            )
            await steps.append([command])
        await steps.append(singles)
        (moved,) = await links.evaluate([(_MOVE, [mark_key], [old, new])])
        if isinstance(moved, ReplyError):
            raise Unavailable(f"Redis refused EVALSHA: {moved}")
        if not moved:
            return -1
        # Only the listener that moves the mark publishes them.
        for part in self._parts:
            if isinstance(part, _Ephemeral):
                links.publish(part.name, part.payload)
        return steps.rejected


class _Once(NamedTuple):
    """An entry that is appended once."""

    stream: bytes
    keep: int
    fields: Sequence[bytes]
    uid: bytes


class _Steps:
    """Appends the entries of a batch, each once.

    `rejected` counts those that Redis refused, and `written` has the connections that carried them.
    """

    def __init__(self, links: ShardLinks, keys: Keys, node: str, position: bytes) -> None:
        self.rejected = 0
        self.written: Connections = {}
        self._links = links
        self._keys = keys
        self._node = node
        self._position = position

    def entry(
        self,
        stream: bytes,
        keep: int,
        fields: Sequence[bytes],
        identity: bytes,
        *,
        uid_of: Sequence[bytes] = (),
    ) -> _Once:
        """Return an entry. Its uid depends on `identity`, and on `uid_of` or `fields`."""
        parts = (self._position, identity, stream, *(uid_of or fields[:2]))
        uid = "emit:" + blake2b(b"\0".join(parts), digest_size=16).hexdigest()
        return _Once(stream, keep, fields, self._uid_key(stream, uid))

    def _uid_key(self, stream: bytes, uid: str) -> bytes:
        channel = self._keys.channel_of_stream(stream)
        if channel is None:
            return self._keys.site_applied(stream, uid)
        return self._keys.uid(channel, uid)

    async def append(self, entries: Sequence[_Once]) -> list[bytes]:
        """Append entries in order. Return their IDs, 0-0 for those that became dead letters."""
        replies = await self._once(entries)
        refused = [
            (each, str(reply))
            for each, reply in zip(entries, replies, strict=True)
            if isinstance(reply, ReplyError)
        ]
        for _, text in refused:
            if rule_of(text).effect is not Effect.ONE:
                raise CommandRefused("EVALSHA", text)
        self.rejected += len(refused)
        for reply in await self._once([self._letter(each, reply) for each, reply in refused]):
            if isinstance(reply, ReplyError):
                raise CommandRefused("EVALSHA", str(reply))
        return [reply if isinstance(reply, bytes) else b"0-0" for reply in replies]

    async def _once(self, entries: Sequence[_Once]) -> list[object]:
        """Append entries, those of each stream in one step, and return their IDs or errors."""
        by_stream: dict[bytes, list[int]] = {}
        for index, each in enumerate(entries):
            by_stream.setdefault(each.stream, []).append(index)
        calls: list[tuple[Script, Sequence[bytes], Words]] = []
        for stream, own in by_stream.items():
            words: Words = [_ONCE_MS]
            for index in own:
                _, keep, fields, _ = entries[index]
                words += keep, len(fields), *fields
            calls.append((_ALL_ONCE, [stream, *[entries[index].uid for index in own]], words))
        replies: list[object] = [None] * len(entries)
        if calls:
            evaluated = await self._links.evaluate(calls)
            self.written |= self._links.connections_of(by_stream)
            for own, found in zip(by_stream.values(), evaluated, strict=True):
                each_own = found if isinstance(found, list) else [found] * len(own)
                for index, reply in zip(own, each_own, strict=True):
                    replies[index] = reply
        return replies

    def _letter(self, entry: _Once, reason: str) -> _Once:
        stream, _, fields, uid = entry
        letter = dead_letters.of_command(
            stream.decode(errors="replace"), fields[1], reason, node=self._node, field=fields[0]
        )
        name = "refused:" + uid.rpartition(b":")[2].decode()
        key = self._keys.site_applied(self._keys.dead_letters, name)
        return _Once(self._keys.dead_letters, dead_letters.KEEP, letter, key)
