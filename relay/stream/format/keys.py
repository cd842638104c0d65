"""The names of all keys.

`<p>` is the prefix, `relay:` by default. The braces put all keys of one channel into one Redis
Cluster slot. A command or transaction with several keys uses keys of one channel only.

| key                       | type    | holds                               | removed by           |
| ------------------------- | ------- | ----------------------------------- | -------------------- |
| `<p>stream:{C}`           | stream  | the events of channel C             | its owner; jobs (1)  |
| `<p>rights:{C}`           | hash    | user -> `r`, `rw` or `-` (refused)  | the application      |
| `<p>control`              | stream  | commands to all workers             | trimmed by XADD      |
| `<p>revoked:{C}`          | hash    | refused user -> their right before  | `relay grant`        |
| `<p>ephemeral:{C}`        | pub/sub | live-only events of C; no key       | nothing is kept      |
| `<p>dead-letters`         | stream  | entries that could not be read      | trimmed by XADD      |
| `<p>dead-letter:{C}:<id>` | string  | mark: this one is written           | expires after a day  |
| `<p>requeued:{C}:<id>`    | string  | mark: this dead letter's new entry  | expires after a day  |
| `<p>nodes`                | set     | the workers that started            | the worker; jobs (2) |
| `<p>node:<instance>`      | string  | one worker's heartbeat, JSON        | the worker; 15 s     |
| `<p>users:<instance>`     | hash    | user -> connections on that worker  | the worker; 6 s      |
| `<p>presence:{C}`         | hash    | client -> worker, newline, its info | the worker; jobs (2) |
| `<p>present:<instance>`   | set     | channels with clients of the worker | the worker; jobs (2) |
| `<p>canary:<instance>`    | string  | written to prove that wake-ups come | the worker; expires  |
| `<p>lease:<name>`         | string  | who does this job for the site      | its holder; expires  |
| `<p>store:<door>:<w>:<id>` | string | what a door keeps for all   | expires              |
| `<p>group:<name>`         | set     | the users of a group                | the application      |
| `<p>bus:<address>`        | pub/sub | one worker's ear; no key            | nothing is kept      |
| `<p>uid:{C}:<uid>`        | string  | ID of the entry appended with it    | expires: its window  |
| `<p>tap:<name>`           | string  | how far a tap on others' Redis came | stays                |
| `<p>queue:<name>`         | string  | how many commands were taken of it  | stays                |
| `<p>takers`               | zset    | who takes commands, until when (ms) | them; expires        |
| `<name>`, `<name>.<n>`    | list    | queue of commands; no prefix        | who takes them       |

`{C}` is the channel's name between braces. Within it, white space (ASCII), control characters, `{`
and `}` are written as `%XX`, for example `relay:stream:{ws-ü%20&%20co}`; `%` itself only where it
would look like one of these (see `escape`). All other names stand as they are.

(1) Retention trims entries. Workers and a job remove streams that were never appended to and have
no follower (`unused.py`). (2) The job for dead workers removes their groups, registration and
clients.
"""

from __future__ import annotations

import re
from functools import lru_cache

from relay.core.model import Channel, EntryID, parse_channel

# A brace would move the hash slot, and white space or a control character would make the key hard
# to type or unsafe to show. The set is ASCII only: producers in every language have to agree on it.
_ESCAPED = "[01][0-9A-F]|2[05]|7[BDF]"
_OUT_OF_PLACE = re.compile(rf"[\x00-\x20{{}}\x7f]|%(?={_ESCAPED})")
_ESCAPE = re.compile(rf"%({_ESCAPED})")
# The wildcards of SCAN MATCH and ACL patterns (Redis `stringmatchlen`).
_GLOB = re.compile(rb"([*?\[\]\\^])")


@lru_cache(maxsize=65536)
def escape(name: str) -> str:
    """Return `name` as keys contain it; names without the escaped characters are unchanged."""
    return _OUT_OF_PLACE.sub(lambda found: f"%{ord(found[0]):02X}", name)


def unescape(text: str) -> str:
    """Return the name of which `escape` made `text`."""
    return _ESCAPE.sub(lambda found: chr(int(found[1], 16)), text)


class Keys:
    """The names under one prefix; keys are bytes, as Redis returns them."""

    __slots__ = (
        "_stream",
        "_text",
        "any_stream_pattern",
        "control",
        "dead_letters",
        "ephemeral_pattern",
        "nodes",
        "prefix",
        "stream_pattern",
        "takers",
    )

    def __init__(self, prefix: str) -> None:
        self._text = prefix
        self.prefix = prefix.encode()
        self._stream = self.prefix + b"stream:{"
        self.control = self.prefix + b"control"
        self.dead_letters = self.prefix + b"dead-letters"
        self.nodes = self.prefix + b"nodes"
        self.takers = self.prefix + b"takers"
        self.stream_pattern = self.streams_matching("*")
        # Keys of streams, and keys that look like them.
        self.any_stream_pattern = _GLOB.sub(rb"\\\1", self.prefix + b"stream:") + b"*"
        # For PUBSUB CHANNELS.
        self.ephemeral_pattern = _GLOB.sub(rb"\\\1", self.prefix + b"ephemeral:{") + b"*}"

    def stream(self, channel: Channel) -> bytes:
        """The stream of one channel."""
        return f"{self._text}stream:{{{escape(channel)}}}".encode()

    def rights(self, channel: Channel) -> bytes:
        """Hash of user -> `r`, `rw` or `-`."""
        return f"{self._text}rights:{{{escape(channel)}}}".encode()

    def revoked(self, channel: Channel) -> bytes:
        """Hash of user -> the value in the rights hash that a revocation has replaced."""
        return f"{self._text}revoked:{{{escape(channel)}}}".encode()

    def ephemeral(self, channel: Channel) -> bytes:
        """The pub/sub channel of one channel's live-only events."""
        return f"{self._text}ephemeral:{{{escape(channel)}}}".encode()

    def dead_letter_mark(self, channel: Channel, entry_id: EntryID) -> bytes:
        """Set by the one worker that writes the dead letter of this entry."""
        return f"{self._text}dead-letter:{{{escape(channel)}}}:{entry_id}".encode()

    def requeued(self, channel: Channel, letter_id: EntryID) -> bytes:
        """The ID of the entry that this dead letter, as one of the site's, has become again."""
        return f"{self._text}requeued:{{{escape(channel)}}}:{letter_id}".encode()

    def uid(self, channel: Channel, uid: str) -> bytes:
        """The ID of the first entry that its producer gave this `uid`."""
        return f"{self._text}uid:{{{escape(channel)}}}:{uid}".encode()

    def streams_matching(self, pattern: str) -> bytes:
        """For SCAN MATCH: the streams of the channels that match the glob `pattern`."""
        return (
            _GLOB.sub(rb"\\\1", self._stream)
            + escape(pattern).encode(errors="surrogateescape")
            + b"}"
        )

    def node(self, instance: str) -> bytes:
        """The heartbeat of one worker."""
        return f"{self._text}node:{instance}".encode()

    def bus(self, address: str) -> bytes:
        """Return the pub/sub channel on which one worker receives messages from the others."""
        return f"{self._text}bus:{address}".encode()

    def store(self, name: str) -> bytes:
        """A small value of a door: `<door>:<what>:<id>`."""
        return f"{self._text}store:{escape(name)}".encode()

    def users(self, instance: str) -> bytes:
        """How many connections each user has on one worker."""
        return f"{self._text}users:{instance}".encode()

    def presence(self, channel: Channel) -> bytes:
        """The clients of one channel: client -> worker and info."""
        return f"{self._text}presence:{{{escape(channel)}}}".encode()

    def present(self, instance: str) -> bytes:
        """The channels in which clients of one worker are present."""
        return f"{self._text}present:{instance}".encode()

    def canary(self, instance: str) -> bytes:
        """Written again and again by the worker that waits for its invalidation."""
        return f"{self._text}canary:{instance}".encode()

    def group(self, name: str) -> bytes:
        """The users of a group that the application keeps."""
        return f"{self._text}group:{name}".encode()

    def lease(self, name: str) -> bytes:
        """Held by the one worker that does the job `name`."""
        return f"{self._text}lease:{name}".encode()

    def tap(self, name: str) -> bytes:
        """How far a tap has come in what others publish."""
        return f"{self._text}tap:{name}".encode()

    def queue_count(self, queue: str) -> bytes:
        """How many commands were ever taken of this queue."""
        return f"{self._text}queue:{queue}".encode()

    def channel_of_stream(self, key: bytes) -> Channel | None:
        """The channel whose stream `key` is; None for every other key."""
        return self._channel_of(self._stream, key)

    def meant_by(self, key: bytes) -> Channel | None:
        """Return the channel that a program meant which broke the rules for keys."""
        text = key.removeprefix(self.prefix + b"stream:").decode(errors="replace")
        try:
            return parse_channel(unescape(text.removeprefix("{").removesuffix("}")))
        except ValueError:  # empty or too long
            return None

    def channel_of_rights(self, key: bytes) -> Channel | None:
        """The channel whose rights hash `key` is; None for every other key."""
        return self._channel_of(self.prefix + b"rights:{", key)

    def channel_of_ephemeral(self, name: bytes) -> Channel | None:
        """The channel whose live-only events the pub/sub channel `name` carries, or None."""
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
        # A name that was not escaped as above belongs to nobody: its channel has another key.
        return channel if escape(channel) == text else None
