"""Append entries to channels: build the commands, send them and parse the replies.

An entry without a uid is a plain XADD. An entry with a uid is appended by a script that stores the
ID of the first entry in `<prefix>uid:{C}:<uid>` for a limited time and returns that ID instead of
appending again. An append whose reply was lost may therefore be repeated.

`relay.stream.write.appender` batches the appends of a relay process. `send` and `send_one` are for
programs that append on a connection of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple, cast

from relay.core.durability import FAST, Durability
from relay.core.errors import (
    DurabilityUnavailable,
    LimitExceeded,
    NotDurable,
    RelayError,
)
from relay.core.model import RESERVED_NAMESPACES, Channel, EntryID, namespace_of
from relay.stream.connection.connect import refusal
from relay.stream.connection.pipeline_connection import ReplyError
from relay.stream.connection.scripts import Script, is_missing
from relay.stream.write.confirmations import execute, unconfirmable

if TYPE_CHECKING:
    from relay.config.settings import NamespaceSettings
    from relay.stream.connection.pipeline_connection import PipelineConnection, RedisCommand
    from relay.stream.format.keys import Keys
    from relay.stream.write.confirmations import Missing

UID_BYTES = 255
# How long `send` waits for confirmations. Keep it below the timeout of the connection.
WAIT_MS = 1000

# WAIT and WAITAOF confirm the last write of their connection. A script that appends nothing
# therefore writes its third key, the mark, if it has one: that is replicated after everything that
# Redis has executed before. Not a publish: a Redis Cluster does not replicate it. Not a command
# behind the script: while the slot is being moved, Redis may accept one and reject the other.
_WRITE_MARK = "if KEYS[3] then redis.call('SET', KEYS[3], '', 'PX', 1000) end"

# KEYS stream, uid key, perhaps the mark; ARGV window in ms, then the words of XADD after the key.
# Returns the ID of the entry, or the ID of the first entry if the uid is known. The producers in
# other languages contain the same text.
APPEND_ONCE = Script(f"""\
local known = redis.call('GET', KEYS[2])
if known then
  {_WRITE_MARK}
  return known
end
local id = redis.call('XADD', KEYS[1], unpack(ARGV, 2))
redis.call('SET', KEYS[2], id, 'PX', ARGV[1])
return id
""")

# KEYS stream, perhaps the uid key of an append before this one (or the stream again), perhaps the
# mark; ARGV a type, the name and value of a field, then the words of XADD after the key. Returns
# the ID of the entry, or the ID of the newest entry of this type if that entry has the same value
# in the field. Only the newest 1024 entries are searched.
APPEND_CHANGED = Script(
    """\
local latest = nil
for _, count in ipairs({16, 1024}) do
  local entries = redis.call('XREVRANGE', KEYS[1], '+', '-', 'COUNT', count)
  for _, entry in ipairs(entries) do
    local fields = {}
    for i = 1, #entry[2], 2 do fields[entry[2][i]] = entry[2][i + 1] end
    if fields['type'] == ARGV[1] then
      if fields[ARGV[2]] == ARGV[3] then
        WRITE_MARK
        return entry[1]
      end
      latest = entry
      break
    end
  end
  if latest or #entries < count then break end
end
return redis.call('XADD', KEYS[1], unpack(ARGV, 4))
""".replace("WRITE_MARK", _WRITE_MARK)
)

# KEYS stream, perhaps the uid key of an append before this one; ARGV the words of XADD after the
# key.
APPEND_BEHIND = Script("return redis.call('XADD', KEYS[1], unpack(ARGV))")

# For scripts that append several entries and continue after one that Redis refuses. Returns the ID,
# or a table with the error. `uid` is the key of the uid or nil, `keep` 0 for no limit.
APPEND_FUNCTION = """\
local function append(stream, keep, fields, uid, window)
  local known = uid and redis.pcall('GET', uid)
  if type(known) == 'string' then return known end
  local id
  if keep == '0' then id = redis.pcall('XADD', stream, '*', unpack(fields))
  else id = redis.pcall('XADD', stream, 'MAXLEN', '~', keep, '*', unpack(fields)) end
  if uid and type(id) == 'string' then redis.pcall('SET', uid, id, 'PX', window) end
  return id
end
"""


class Append(NamedTuple):
    """One append: its command, the script if it has one, its durability, and keys.

    An append with a script may be repeated after its reply was lost.
    """

    command: RedisCommand
    script: Script | None
    durability: Durability
    stream: bytes
    uid_key: bytes | None = None

    def behind(self, uid_key: bytes | None) -> RedisCommand:
        """Return the command in a form that Redis rejects if it rejects the append before this one.

        Redis rejects appends with a script if its scripts were removed. While a slot is being
        moved, it rejects a command with several keys if one of them does not exist, such as the key
        of a new uid. It would still accept a plain append behind it.

        Args:
            uid_key: The uid key of the last append before this one that has one.
        """
        script, keys, words = APPEND_BEHIND, [self.stream], self.command[2:]
        if self.script is not None:
            end = 3 + int(self.command[2])
            script, words = self.script, self.command[end:]
            keys = cast("list[bytes]", list(self.command[3:end]))
        if uid_key is not None:
            keys[1:2] = [uid_key]
        return ("EVALSHA", script.sha, len(keys), *keys, *words)

    def with_script_text(self) -> RedisCommand:
        """Return the command in a form that needs no loaded script."""
        if self.script is None:
            return self.command
        return ("EVAL", self.script.text, *self.command[2:])


class AppendCommands:
    """Builds appends: stream limit, uid and durability follow the settings of the namespace."""

    def __init__(
        self,
        keys: Keys,
        namespace_of: Callable[[Channel], NamespaceSettings],
        *,
        uid_window_s: float,
    ) -> None:
        self._keys = keys
        self._namespace_of = namespace_of
        self._window_ms = int(uid_window_s * 1000)

    def durability(self, channel: Channel) -> Durability:
        """Return the durability of the channel's namespace."""
        return Durability.parse(self._namespace_of(channel).durability)

    def build(
        self,
        channel: Channel,
        fields: Sequence[bytes],
        uid: str | None = None,
        *,
        unless_latest: bytes | None = None,
        durability: Durability | None = None,
    ) -> Append:
        """Return the append of an entry with these flat fields.

        Args:
            channel: The channel to whose stream the entry is appended.
            fields: Names and values, as `entry.encode` returns them.
            uid: Append only the first entry with this uid, if the namespace has unique uids.
            unless_latest: Name of a field. Append nothing if the newest entry of the same type has
                the same value in this field. The uid is then only a field.
            durability: Overrides the durability of the namespace.

        Raises:
            LimitExceeded: The uid is too long.
        """
        rules = self._namespace_of(channel)
        words = _words(rules, fields)
        stream = self._keys.stream(channel)
        if durability is None:
            durability = Durability.parse(rules.durability)
        if unless_latest is not None:
            values = dict(zip(fields[::2], fields[1::2], strict=True))
            same = values.get(b"type", b""), unless_latest, values[unless_latest]
            keys = [stream]
            if durability is not FAST:
                keys += stream, self._mark(channel)
            return Append(
                ("EVALSHA", APPEND_CHANGED.sha, len(keys), *keys, *same, *words),
                APPEND_CHANGED,
                durability,
                stream,
            )
        if uid and (uid_key := self.uid_key(channel, uid)) is not None:
            return self._once(channel, stream, uid_key, words, durability)
        return Append(("XADD", stream, *words), None, durability, stream)

    def build_once(self, channel: Channel, fields: Sequence[bytes], key: bytes) -> Append:
        """Return the append of an entry that has this key in place of the key of a uid."""
        rules = self._namespace_of(channel)
        wanted = Durability.parse(rules.durability)
        stream = self._keys.stream(channel)
        return self._once(channel, stream, key, _words(rules, fields), wanted)

    def _once(
        self,
        channel: Channel,
        stream: bytes,
        uid_key: bytes,
        words: Sequence[bytes | str | int],
        durability: Durability,
    ) -> Append:
        keys = [stream, uid_key]
        if durability is not FAST:
            keys.append(self._mark(channel))
        once = ("EVALSHA", APPEND_ONCE.sha, len(keys), *keys, self._window_ms, *words)
        return Append(once, APPEND_ONCE, durability, stream, uid_key)

    def _mark(self, channel: Channel) -> bytes:
        """Return the mark: the key of an empty uid. Those who publish with a uid may write it."""
        return self._keys.uid(channel, "")

    def uid_key(self, channel: Channel, uid: str) -> bytes | None:
        """Return the key of the uid, or None if the channel may have entries with equal uids.

        In channels of other protocols uids are always unique, because relay sets them.

        Raises:
            LimitExceeded: The uid is too long.
        """
        rules = self._namespace_of(channel)
        unique = rules.unique_uids or namespace_of(channel) in RESERVED_NAMESPACES
        if not (unique and self._window_ms > 0):
            return None
        if len(uid.encode(errors="replace")) > UID_BYTES:
            raise LimitExceeded(f"uid must have at most {UID_BYTES} bytes")
        return self._keys.uid(channel, uid)


class Appended(NamedTuple):
    """The ID of an entry. `is_new` is False if an entry with this uid existed already."""

    id: EntryID
    is_new: bool


async def send(
    connection: PipelineConnection,
    appends: Sequence[Append],
    *,
    script_known: bool = False,
    wait_ms: int = WAIT_MS,
) -> list[EntryID | RelayError]:
    """Append entries in order in one pipeline. Return the ID or the error of each.

    Args:
        connection: The connection to send on.
        appends: One append, or several that all use the same script.
        script_known: The server has the script. If it does not, the text is sent.
        wait_ms: The longest wait for confirmations.

    Raises:
        RedisUnavailable: The connection was lost. Any number of the appends, counted from the
            first, may have been carried out.
        DurabilityUnavailable: Redis cannot confirm one of the appends. Nothing was appended.
    """
    if len(appends) > 1 and any(each.script is None for each in appends):
        raise ValueError("several entries at once need a uid each")
    await _check_durability(connection, appends)
    results: list[EntryID | RelayError] = []
    while len(results) < len(appends):
        rest = appends[len(results) :]
        commands = [each.command for each in rest]
        if not script_known:
            commands[0] = rest[0].with_script_text()
        replies, missing = await _execute(connection, commands, rest, wait_ms)
        for append, reply in zip(rest, replies, strict=True):
            if script_known and is_missing(reply):
                # The script was removed by SCRIPT FLUSH or evicted by Redis 7.4. Repeat from here
                # on. Later entries may have been appended already; their uids prevent duplicates.
                break
            results.append(parse_reply(append, reply, missing))
        script_known = False
    return results


async def send_one(connection: PipelineConnection, append: Append) -> Appended:
    """Append one entry and report whether it is new. Needs no right to load scripts.

    Raises:
        RedisUnavailable: The connection was lost. The entry may have been appended.
        CommandRefused, RefusedForNow: Redis rejected the entry.
        NotDurable: The entry was appended, but not confirmed in time.
        DurabilityUnavailable: Redis cannot confirm it. Nothing was appended.
    """
    await _check_durability(connection, [append])
    commands = [append.with_script_text()]
    if (uid_key := append.uid_key) is not None:
        # One transaction, so that of two producers with the same uid exactly one finds no key.
        commands = [("MULTI",), ("GET", uid_key), *commands, ("EXEC",)]
    replies, missing = await _execute(connection, commands, [append], WAIT_MS)
    reply, is_new = replies[-1], True
    if isinstance(reply, list):
        known, reply = reply
        is_new = known is None
    elif len(replies) > 1:
        # EXECABORT does not give the reason. The reply to the rejected command does.
        reply = next(each for each in replies if isinstance(each, ReplyError))
    result = parse_reply(append, reply, missing)
    if isinstance(result, RelayError):
        raise result
    return Appended(result, is_new)


def parse_reply(append: Append, reply: object, missing: Missing) -> EntryID | RelayError:
    """Return the ID of the entry or the error."""
    if not isinstance(reply, bytes):
        return refusal("XADD", str(reply))
    entry_id = EntryID.parse(reply)
    if append.durability is FAST:
        return entry_id
    return outcome(entry_id, missing[append.durability])


def outcome(entry_id: EntryID, missing: str) -> EntryID | NotDurable:
    """Return the ID of the entry, or the error if something has not been confirmed."""
    return NotDurable(f"appended as {entry_id}, but {missing}", entry_id) if missing else entry_id


def _words(rules: NamespaceSettings, fields: Sequence[bytes]) -> list[bytes | str | int]:
    words: list[bytes | str | int] = []
    if rules.retention_count:
        words += "MAXLEN", "~", rules.retention_count
    words.append("*")
    words += fields
    return words


async def _check_durability(connection: PipelineConnection, appends: Sequence[Append]) -> None:
    """Raise DurabilityUnavailable if this server cannot confirm one of the appends."""
    for level in {each.durability.level for each in appends}:
        if problem := await unconfirmable(connection, level):
            raise DurabilityUnavailable(f"{problem}. Nothing was appended")


async def _execute(
    connection: PipelineConnection,
    commands: Sequence[RedisCommand],
    appends: Sequence[Append],
    wait_ms: int,
) -> tuple[list[object], Missing]:
    """Send the commands. Return their replies, and what Redis has not confirmed about them."""
    wanted = {each.durability for each in appends if each.durability.waits}
    return await execute(connection, commands, wanted, wait_ms)
