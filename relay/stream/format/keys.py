"""The names of all keys in Redis.

`<p>` is the prefix, `relay:` by default. The braces put all keys of one channel into one Redis
Cluster slot. A command or transaction with several keys uses keys of one channel only.

| key                       | type    | content                             | removed by           |
| ------------------------- | ------- | ----------------------------------- | -------------------- |
| `<p>stream:{C}`           | stream  | the events of channel C             | its owner; jobs (1)  |
| `<p>rights:{C}`           | hash    | user -> `r`, `rw` or `-` (revoked)  | the application      |
| `<p>control`              | stream  | commands to all workers             | trimmed by XADD      |
| `<p>revoked:{C}`          | hash    | revoked user -> the previous right  | `relay grant`        |
| `<p>ephemeral:{C}`        | pub/sub | ephemeral events of C; no key       | not stored           |
| `<p>dead-letters`         | stream  | entries that could not be delivered | trimmed by XADD      |
| `<p>dead-letter:{C}:<id>` | string  | set when the dead letter is written | expires after a day  |
| `<p>requeued:{C}:<id>`    | string  | ID of the dead letter's new entry   | expires after a day  |
| `<p>nodes`                | set     | registered workers                  | the worker; jobs (2) |
| `<p>node:<instance>`      | string  | heartbeat of a worker, JSON         | the worker; 15 s     |
| `<p>users:<instance>`     | hash    | user -> connections to that worker  | the worker; 6 s      |
| `<p>presence:{C}`         | hash    | client -> worker, newline, its info | the worker; jobs (2) |
| `<p>present:<instance>`   | set     | channels with clients of the worker | the worker; jobs (2) |
| `<p>canary:<instance>`    | string  | written to test invalidations       | the worker; expires  |
| `<p>lease:<name>`         | string  | the worker that does this job       | its holder; expires  |
| `<p>store:<name>`         | string  | a value that a protocol stores      | expires              |
| `<p>group:<name>`         | set     | the users of a group                | the application      |
| `<p>store:internal-key`   | string  | authenticates workers to each other | kept                 |
| `<p>journal:<instance>`   | stream  | what happened to a worker's clients | expires after 1 h    |
| `<p>journals`             | zset    | workers with a journal, expiry ms   | the workers          |
| `<p>bus:<address>`        | pub/sub | messages to one worker; no key      | not stored           |
| `<p>uid:{C}:<uid>`        | string  | ID of the entry with this uid       | expires: its window  |
| `<p>tap:<name>`           | string  | position in an external source      | kept                 |
| `<p>queue:<name>`         | string  | number of commands ever removed (3) | kept                 |
| `<p>queue:{<name>}`       | hash    | number and ID of a queue's batch (3) | kept                |
| `<p>taken:{<name>}`       | list    | commands that are being executed (3) | workers             |
| `<p>applied:{C}:<name>`   | hash    | last batch of a queue for C (3)     | expires after a day  |
| `<p>servers`              | string  | list of servers; on each of several | kept                 |
| `<p>takers`               | zset    | workers that read queues, expiry ms | the worker; expires  |
| `<name>`, `<name>.<n>`    | list    | queue of commands; no prefix        | workers              |

(3) A single server has the string. Several servers or a Redis Cluster have the three others, see
`queue_steps.py`. With several servers, `<name>` in `applied` ends with `@` and the queue's server,
and the marks of the control stream and the dead letters are `<p>{site}applied:<stream>:<name>`.

With several servers or a Redis Cluster, the names of all keys without `{C}`, except the canary and
the queues, begin with `<p>{site}`: `relay:{site}control`. They are on the server of this tag. The
canary's key then ends with a tag of the server that it tests: `<p>canary:<instance>:{tag}`.

`{C}` is the channel's name between braces. Within it, white space (ASCII), control characters, `{`
and `}` are written as `%XX`, for example `relay:stream:{ws-ü%20&%20co}`. `%` itself is escaped only
if it would look like such an escape (see `escape`). All other names are not changed.

(1) Retention trims entries. Workers and a job remove streams that were never appended to and are
not followed (`unused.py`). (2) The job for dead workers removes their groups, registration and
clients.
"""

from __future__ import annotations

import re
from functools import lru_cache

from relay.core.model import Channel, EntryID, parse_channel

# A brace would change the hash slot. White space and control characters would make the key hard to
# type or unsafe to print. The set is ASCII only, because all producers must escape in the same way.
_ESCAPED = "[01][0-9A-F]|2[05]|7[BDF]"
_OUT_OF_PLACE = re.compile(rf"[\x00-\x20{{}}\x7f]|%(?={_ESCAPED})")
_ESCAPE = re.compile(rf"%({_ESCAPED})")
# The wildcards of SCAN MATCH and ACL patterns (Redis `stringmatchlen`).
_GLOB = re.compile(rb"([*?\[\]\\^])")


@lru_cache(maxsize=65536)
def escape(name: str) -> str:
    """Escape `name` for keys. Names without special characters are unchanged."""
    return _OUT_OF_PLACE.sub(lambda found: f"%{ord(found[0]):02X}", name)


def unescape(text: str) -> str:
    """Reverse `escape`."""
    return _ESCAPE.sub(lambda found: chr(int(found[1], 16)), text)


class Keys:
    """Builds and parses key names with one prefix. Keys are bytes, as Redis returns them."""

    __slots__ = (
        "_site",
        "_stream",
        "_text",
        "any_stream_pattern",
        "control",
        "dead_letters",
        "ephemeral_pattern",
        "has_site_tag",
        "internal_key",
        "journals",
        "nodes",
        "pattern_of_all",
        "prefix",
        "servers",
        "stream_pattern",
        "takers",
    )

    def __init__(self, prefix: str, *, has_site_tag: bool = False) -> None:
        """`has_site_tag`: tag the keys that belong to no channel, so that they share one slot."""
        self._text = prefix
        self.has_site_tag = has_site_tag
        self._site = prefix + "{site}" if has_site_tag else prefix
        site = self._site.encode()
        self.prefix = prefix.encode()
        self._stream = self.prefix + b"stream:{"
        self.control = site + b"control"
        self.dead_letters = site + b"dead-letters"
        self.nodes = site + b"nodes"
        self.internal_key = site + b"store:internal-key"
        # On each server of a list.
        self.servers = self.prefix + b"servers"
        self.takers = site + b"takers"
        self.journals = site + b"journals"
        self.stream_pattern = self.streams_matching("*")
        # Keys of streams, and keys that look like them.
        self.any_stream_pattern = _GLOB.sub(rb"\\\1", self.prefix + b"stream:") + b"*"
        # All keys with the prefix.
        self.pattern_of_all = _GLOB.sub(rb"\\\1", self.prefix) + b"*"
        # For PUBSUB CHANNELS.
        self.ephemeral_pattern = _GLOB.sub(rb"\\\1", self.prefix + b"ephemeral:{") + b"*}"

    def stream(self, channel: Channel) -> bytes:
        """Return the stream of a channel."""
        return f"{self._text}stream:{{{escape(channel)}}}".encode()

    def rights(self, channel: Channel) -> bytes:
        """Return the hash of user -> `r`, `rw` or `-`."""
        return f"{self._text}rights:{{{escape(channel)}}}".encode()

    def revoked(self, channel: Channel) -> bytes:
        """Return the hash of user -> value that a revocation has replaced in the rights hash."""
        return f"{self._text}revoked:{{{escape(channel)}}}".encode()

    def ephemeral(self, channel: Channel) -> bytes:
        """Return the pub/sub channel of a channel's ephemeral events."""
        return f"{self._text}ephemeral:{{{escape(channel)}}}".encode()

    def dead_letter_mark(self, channel: Channel, entry_id: EntryID) -> bytes:
        """Return the key that the one worker sets that writes the dead letter of this entry."""
        return f"{self._text}dead-letter:{{{escape(channel)}}}:{entry_id}".encode()

    def requeued(self, channel: Channel, letter_id: EntryID) -> bytes:
        """Return the key with the ID of the entry that was appended for this dead letter."""
        return f"{self._text}requeued:{{{escape(channel)}}}:{letter_id}".encode()

    def uid(self, channel: Channel, uid: str) -> bytes:
        """Return the key with the ID of the first entry with this `uid`."""
        return f"{self._text}uid:{{{escape(channel)}}}:{uid}".encode()

    def streams_matching(self, pattern: str) -> bytes:
        """Return the SCAN pattern for streams whose channel matches the glob `pattern`."""
        return (
            _GLOB.sub(rb"\\\1", self._stream)
            + escape(pattern).encode(errors="surrogateescape")
            + b"}"
        )

    def node(self, instance: str) -> bytes:
        """Return the key of a worker's heartbeat."""
        return f"{self._site}node:{instance}".encode()

    def bus(self, address: str) -> bytes:
        """Return the pub/sub channel on which one worker receives messages from the others."""
        return f"{self._site}bus:{address}".encode()

    def store(self, name: str) -> bytes:
        """Return the key of a protocol's value. `name` is `<protocol>:<kind>:<id>`."""
        return f"{self._site}store:{escape(name)}".encode()

    def users(self, instance: str) -> bytes:
        """Return the hash of user -> connections to one worker."""
        return f"{self._site}users:{instance}".encode()

    def presence(self, channel: Channel) -> bytes:
        """Return the hash of a channel's clients: client -> worker and info."""
        return f"{self._text}presence:{{{escape(channel)}}}".encode()

    def present(self, instance: str) -> bytes:
        """Return the set of channels in which clients of one worker are present."""
        return f"{self._site}present:{instance}".encode()

    def journal(self, instance: str) -> bytes:
        """Return the stream with the journal of a worker."""
        return f"{self._site}journal:{instance}".encode()

    def canary(self, instance: str, tag: str = "") -> bytes:
        """Return the key that a worker writes periodically to test invalidations of one server."""
        end = f":{{{tag}}}" if tag else ""
        return f"{self._text}canary:{instance}{end}".encode()

    def group(self, name: str) -> bytes:
        """Return the set of a group's users, which the application maintains."""
        return f"{self._site}group:{name}".encode()

    def lease(self, name: str) -> bytes:
        """Return the key of the lease for the job `name`."""
        return f"{self._site}lease:{name}".encode()

    def source_position(self, name: str) -> bytes:
        """Return the key with the last position that was read from an external source."""
        return f"{self._site}tap:{name}".encode()

    def queue_count(self, queue: str) -> bytes:
        """Return the key with the number of commands that were ever removed from this queue."""
        return f"{self._site}queue:{queue}".encode()

    def queue_state(self, queue: str) -> bytes:
        """Return the key with the present batch of a queue, in the queue's slot."""
        return f"{self._text}queue:{{{queue}}}".encode()

    def queue_taken(self, queue: str) -> bytes:
        """Return the list of commands that are being executed, in the queue's slot."""
        return f"{self._text}taken:{{{queue}}}".encode()

    def applied(self, channel: Channel, queue: str) -> bytes:
        """Return the key with the last batch of a queue that was appended to this channel."""
        return f"{self._text}applied:{{{escape(channel)}}}:{queue}".encode()

    def site_applied(self, stream: bytes, queue: str) -> bytes:
        """Return the same for a stream that belongs to no channel."""
        name = stream.removeprefix(self._site.encode()).decode()
        return f"{self._site}applied:{name}:{queue}".encode()

    def channel_of_stream(self, key: bytes) -> Channel | None:
        """Return the channel of a stream's key, or None for any other key."""
        return self._channel_of(self._stream, key)

    def meant_by(self, key: bytes) -> Channel | None:
        """Return the channel that a program meant which broke the rules for keys."""
        text = key.removeprefix(self.prefix + b"stream:").decode(errors="replace")
        try:
            return parse_channel(unescape(text.removeprefix("{").removesuffix("}")))
        except ValueError:  # empty or too long
            return None

    def channel_of_rights(self, key: bytes) -> Channel | None:
        """Return the channel of a rights hash's key, or None for any other key."""
        return self._channel_of(self.prefix + b"rights:{", key)

    def channel_of_ephemeral(self, name: bytes) -> Channel | None:
        """Return the channel whose ephemeral events are published on `name`, or None."""
        return self._channel_of(self.prefix + b"ephemeral:{", name)

    @staticmethod
    def _channel_of(start: bytes, key: bytes) -> Channel | None:
        if not (key.startswith(start) and key.endswith(b"}")):
            return None
        try:
            text = key[len(start) : -1].decode()
            channel = parse_channel(unescape(text))
        except ValueError:  # not UTF-8, empty or too long
            return None
        # A name that is not escaped as above is invalid: its channel has another key.
        return channel if escape(channel) == text else None
