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


# KEYS stream, uid key; ARGV window in ms, then XADD's words after the key. The entry's ID, the
# first one where the uid is known.
APPEND_ONCE = Script("""\
local known = redis.call('GET', KEYS[2])
if known then return known end
local id = redis.call('XADD', KEYS[1], unpack(ARGV, 2))
redis.call('SET', KEYS[2], id, 'PX', ARGV[1])
return id
""")

# KEYS stream; ARGV a type, a field's name, its value, then XADD's words after the key. The entry's
# ID, or that of the newest entry of the type where that one has the same value in the field. What
# lies deeper than the second look is as good as not there.
APPEND_CHANGED = Script("""\
local latest = nil
for _, count in ipairs({16, 1024}) do
  local entries = redis.call('XREVRANGE', KEYS[1], '+', '-', 'COUNT', count)
  for _, entry in ipairs(entries) do
    local fields = {}
    for i = 1, #entry[2], 2 do fields[entry[2][i]] = entry[2][i + 1] end
    if fields['type'] == ARGV[1] then
      if fields[ARGV[2]] == ARGV[3] then return entry[1] end
      latest = entry
      break
    end
  end
  if latest or #entries < count then break end
end
return redis.call('XADD', KEYS[1], unpack(ARGV, 4))
""")

# KEYS stream; ARGV a command, then the names of groups that do not count. Runs the command on the
# stream if nothing was ever appended to it and it has no other groups, and returns its reply; else
# returns 0.
REMOVE_UNUSED = Script("""\
if redis.call('EXISTS', KEYS[1]) == 0 or redis.call('XLEN', KEYS[1]) > 0 then return 0 end
local info = redis.call('XINFO', 'STREAM', KEYS[1])
for i = 1, #info, 2 do
  if info[i] == 'entries-added' and info[i + 1] > 0 then return 0 end
  if info[i] == 'last-generated-id' and info[i + 1] ~= '0-0' then return 0 end
end
local markers = {}
for i = 2, #ARGV do markers[ARGV[i]] = true end
for _, group in ipairs(redis.call('XINFO', 'GROUPS', KEYS[1])) do
  for i = 1, #group, 2 do
    if group[i] == 'name' and not markers[group[i + 1]] then return 0 end
  end
end
return redis.call(ARGV[1], KEYS[1])
""")

# KEYS who takes part, then leases; ARGV holder, time to live in ms (0: give up). Which of the
# leases the holder has now, as 1 or 0: its own first, then free ones, up to its fair share. A time
# beyond the longest is of another server's clock, before a failover: the dead must not hold shares.
HOLD = Script("""\
local me, ttl, leases = ARGV[1], tonumber(ARGV[2]), #KEYS - 1
local time = redis.call('TIME')
local now, share, own, held, free = time[1] * 1000 + math.floor(time[2] / 1000), 0, 0, {}, {}
if ttl == 0 then redis.call('ZREM', KEYS[1], me)
else
  redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now)
  redis.call('ZREMRANGEBYSCORE', KEYS[1], '(' .. now + ttl, '+inf')
  redis.call('ZADD', KEYS[1], now + ttl, me)
  redis.call('EXPIRE', KEYS[1], math.ceil(ttl / 1000))
  share = math.ceil(leases / redis.call('ZCARD', KEYS[1]))
end
for i = 1, leases do
  local holder = redis.call('GET', KEYS[i + 1])
  held[i] = 0
  if not holder then free[#free + 1] = i
  elseif holder == me and own < share then
    redis.call('SET', KEYS[i + 1], me, 'PX', ttl)
    held[i], own = 1, own + 1
  elseif holder == me then redis.call('DEL', KEYS[i + 1]) end
end
for _, i in ipairs(free) do
  if own == share then break end
  redis.call('SET', KEYS[i + 1], me, 'PX', ttl)
  held[i], own = 1, own + 1
end
return held
""")

# KEYS queue, its count, dead letters, then of each operation the stream and, if it has a uid, the
# uid's key. ARGV the count as read, how many items, the first and the last of them, window in ms,
# dead letters kept, node, time, then of each operation: entries kept (0: all), 1 if it has a uid,
# index of its item, number of words, words. -1 where the head of the queue is not what was read
# and nothing was done, else how many operations ended as dead letters.
#
# INCRBY comes first because Redis checks memory, disk and replicas at a script's first write only:
# once it has gone through, nothing of that kind stops the script half way. What still can, a
# stream's key of another type or an ACL, concerns one operation and must not stop the others.
APPLY = Script("""\
local queue, n = KEYS[1], tonumber(ARGV[2])
if (redis.call('GET', KEYS[2]) or '0') ~= ARGV[1]
  or redis.call('LINDEX', queue, 0) ~= ARGV[3]
  or redis.call('LINDEX', queue, n - 1) ~= ARGV[4] then return -1 end
redis.call('INCRBY', KEYS[2], n)
local k, a, failed, keys, argv = 4, 9, 0, #KEYS, ARGV
while k <= keys do
  local stream, uid, known = KEYS[k], nil, nil
  local keep, from = argv[a], a + 4
  local to = from + argv[a + 3] - 1
  k = k + 1
  if argv[a + 1] == '1' then
    uid = KEYS[k]
    k = k + 1
    known = redis.pcall('GET', uid)
    if type(known) == 'table' then known = nil end
  end
  if not known then
    local id
    if keep == '0' then id = redis.pcall('XADD', stream, '*', unpack(argv, from, to))
    else id = redis.pcall('XADD', stream, 'MAXLEN', '~', keep, '*', unpack(argv, from, to)) end
    if type(id) == 'table' then
      failed = failed + 1
      local item = redis.call('LINDEX', queue, argv[a + 2])
      redis.pcall('XADD', KEYS[3], 'MAXLEN', '~', argv[6], '*', 'queue', queue,
        'reason', id.err, 'node', argv[7], 'at', argv[8],
        'fields', cjson.encode({{'command', string.sub(item, 1, 65536)}}))
    elseif uid then redis.pcall('SET', uid, id, 'PX', argv[5]) end
  end
  a = to + 1
end
redis.call('LTRIM', queue, n, -1)
return failed
""")

# KEYS a tap's mark, dead letters, the stream of each entry; ARGV the mark as read, its new value,
# dead letters kept, node, time, then of each emit either `p`, a pub/sub channel and a payload, or
# `x`, entries kept (0: all), number of words, words, number of copies, and of each copy the number
# of its own words and these. A later copy gets the IDs of those before it. -1 where the mark is
# another and nothing was done, else how many appends Redis refused: each has become a dead letter
# with the beginning of its `data`, which must be the first of its fields.
EMITS = Script("""\
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
      local words = {}
      if keep ~= '0' then words = {'MAXLEN', '~', keep} end
      words[#words + 1] = '*'
      for i = from, from + n - 1 do words[#words + 1] = argv[i] end
      local own = tonumber(argv[a])
      for i = a + 1, a + own do words[#words + 1] = argv[i] end
      a = a + 1 + own
      if copy > 1 then
        words[#words + 1] = 'copies'
        words[#words + 1] = earlier
      end
      local id = redis.pcall('XADD', KEYS[k], unpack(words))
      if type(id) == 'table' then
        failed = failed + 1
        redis.pcall('XADD', KEYS[2], 'MAXLEN', '~', argv[3], '*', 'queue', KEYS[k],
          'reason', id.err, 'node', argv[4], 'at', argv[5], 'truncated', '1',
          'fields', cjson.encode({{'data', string.sub(argv[from + 1], 1, 65536)}}))
        id = '0-0'
      end
      k = k + 1
      earlier = copy > 1 and earlier .. ' ' .. id or id
    end
  end
end
return failed
""")
