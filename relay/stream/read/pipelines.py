"""Build the pipelines of the reader and process their replies: live reads and pages.

These classes do no I/O, so that tests can delay, drop and interleave replies. Call `commands()`,
send them, and pass the replies to `on_replies()` before the next call of `commands()`.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from relay.core.stream_interface import ExamineRequest, Followed, PageRequest
from relay.stream.connection.connect import CommandRefused
from relay.stream.connection.pipeline_connection import ReplyError
from relay.stream.connection.primary import Replication
from relay.stream.connection.refusals import Effect, rule_of
from relay.stream.connection.scripts import is_missing
from relay.stream.read import stream_commands
from relay.stream.read.groups import CERTIFY, certify_commands, group_of
from relay.stream.read.read_mode import ReadMode
from relay.stream.shards.shard import is_misplaced

if TYPE_CHECKING:
    from relay.config.settings import StreamSettings
    from relay.core.metrics import Metrics
    from relay.stream.connection.pipeline_connection import RedisCommand
    from relay.stream.connection.primary import Primary
    from relay.stream.format.keys import Keys
    from relay.stream.read.control_reader import ControlReader

_log = logging.getLogger(__name__)

_EXAMINE_BATCH = 64
_READ_BATCH = 256
# Streams of which one pipeline reads a page each.
_PAGE_STREAMS = 4
# Entries in the first read of a stream. If there are more, the next read is for twice as many. A
# stream that was not read to its end since the last connect may have many unread entries. The
# others have few, because each invalidation is followed by a read. A burst of 100 entries fits one
# read. If entries are known to be large, `[stream] page_bytes` makes the reads smaller.
_UNKNOWN_COUNT, _FIRST_COUNT = 8, 128
# MEMORY USAGE visits every block of a stream. It takes less than 1 ms for this number.
_MEASURED_BLOCKS = 10_000
# Bytes of the replies to one pipeline, estimated from average sizes.
_PIPELINE_BYTES = 16 << 20
# Bytes of one live read, and of all pages of one pipeline, if every entry has the largest size.
_LIVE_BYTES, _PAGES_BYTES = 64 << 20, 32 << 20
# A read that keeps the group reads one entry again, unless entries are larger than this.
_REREAD_BYTES = 16 << 10
_MAX_COUNT = 1000
_LOAD: RedisCommand = ("SCRIPT", "LOAD", CERTIFY.text)


class LivePipelines:
    """Examinations, live reads and reads of the control stream on one connection."""

    def __init__(
        self,
        *,
        keys: Keys,
        instance: str,
        primary: Primary,
        settings: StreamSettings,
        metrics: Metrics,
        decode: stream_commands.Decode,
        control: ControlReader | None,
        mode: ReadMode | None = None,
        on_groups_restored: Callable[[], None] = lambda: None,
        on_misplaced: Callable[[], None] = lambda: None,
    ) -> None:
        """`on_groups_restored` is called when Redis accepts reads by consumer group again,
        `on_misplaced` when a stream was parked. `control` is None if another server has the control
        stream."""
        self._on_misplaced = on_misplaced
        # Streams that this server does not have, or not now, and the requests of examinations.
        self._parked: list[tuple[Followed, ExamineRequest | None]] = []
        # Certificates of the servers from which streams were moved to this one.
        self._moved_from: dict[Followed, frozenset[int]] = {}
        self._mode = mode or ReadMode()
        self._on_groups_restored = on_groups_restored
        self._keys = keys
        self._primary = primary
        self._instance = instance
        self._group = group_of(instance).decode()
        self._settings = settings
        self._metrics = metrics
        self._decode = decode
        self._control = control
        self._control_changed = True
        # Examine streams first that have new entries or clients that wait for the examination.
        self._urgent: dict[Followed, None] = {}
        self._examine: dict[Followed, None] = {}
        # Only urgent streams are examined while this is set.
        self.only_urgent = False
        self._settling = False
        self._read: dict[Followed, None] = {}
        self._swept: set[Followed] = set()
        # The number of entries to read next, for streams whose last read did not return all.
        self._counts: dict[Followed, int] = {}
        # Streams that were read to their end at least once on this connection.
        self._caught_up: set[Followed] = set()
        self._most = _most_entries(settings, _LIVE_BYTES)
        self._unknown = min(_UNKNOWN_COUNT, self._most)
        # Streams whose groups were moved in this second, and those of them that were read again.
        # The value is the number of entries up to the worker's position, if it is known. A move is
        # replicated and written to the append-only file, so each group is moved at most once a
        # second: 0.5 kB per event with 200 workers on a stream, instead of 28 kB.
        self._groups_moved: set[Followed] = set()
        self._groups_behind: dict[Followed, int | None] = {}
        self._groups_due: dict[Followed, int | None] = {}
        # Streams whose newest entries are removed, so that there is none to read again. Their
        # groups are moved with each read, for the rest of this second.
        self._moving: set[Followed] = set()
        self._certify: list[RedisCommand] = []
        self._sent: _SentPipeline | None = None

    # ---- requests ---------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        """Return True if there is anything to read."""
        others = self._examine and not self.only_urgent
        if self._urgent or others or self._read:
            return True
        if self._control_changed and self._control is not None:
            return True
        return bool(self._certify or self._groups_due)

    @property
    def settling(self) -> bool:
        """Return True after a reconnect until all streams were checked for new entries and those
        with new entries were examined. From then on, invalidations report later entries."""
        return self._settling

    def want_examine(self, stream: Followed) -> None:
        """Examine the stream: a client is waiting, or the position must be checked again."""
        if stream.has_waiting:
            self._examine.pop(stream, None)
            self._urgent[stream] = None
        elif stream not in self._urgent:
            self._examine[stream] = None

    def want_read(self, stream: Followed, *, swept: bool = False) -> None:
        """Read the stream. `swept`: no invalidation has announced new entries."""
        if swept:
            if stream in self._read:
                return
            self._swept.add(stream)
        else:
            self._swept.discard(stream)
        self._read[stream] = None

    def want_control(self) -> None:
        """Read the control stream."""
        self._control_changed = True

    def set_control(self, control: ControlReader | None) -> None:
        """Read the control stream on this server, or no longer."""
        if control is not self._control:
            self._control = control
            self._control_changed = True

    def park(self, stream: Followed, request: ExamineRequest | None = None) -> None:
        """Wait until the shard map was read again: the stream is, or will be, on another server."""
        if request is None:
            stream.settled = False
        self._parked.append((stream, request))
        self._on_misplaced()

    def unpark(self) -> None:
        """Examine the parked streams, on the servers that have them now."""
        parked, self._parked = self._parked, []
        for stream, request in parked:
            if request is not None:
                stream.on_examine_lost(request)
            else:
                stream.on_unsettled()
        if self._control is not None:
            self._control_changed = True

    def moved_here(self, stream: Followed, certificates: frozenset[int]) -> None:
        """The stream was moved to this server while it was connected, from one with these."""
        self._moved_from[stream] = certificates

    def drop(self, stream: Followed) -> None:
        """Drop all requests, and ignore replies that are still expected: another server has it."""
        self.discard(stream)
        if self._sent is None:
            return
        for other, request, *_ in self._sent.examined:
            if other is stream:
                self._parked.append((stream, request))
        self._sent.examined = [each for each in self._sent.examined if each[0] is not stream]
        self._sent.read = [each for each in self._sent.read if each[0] is not stream]

    def discard(self, stream: Followed) -> None:
        """Drop all requests for the stream after its last client left."""
        self._examine.pop(stream, None)
        self._urgent.pop(stream, None)
        self._read.pop(stream, None)
        self._swept.discard(stream)
        self._counts.pop(stream, None)
        self._caught_up.discard(stream)
        self._moved_from.pop(stream, None)
        self._groups_moved.discard(stream)
        self._groups_behind.pop(stream, None)
        self._groups_due.pop(stream, None)
        self._moving.discard(stream)
        self._mode.paused.pop(stream, None)

    def _move_groups(self, sent: _SentPipeline, commands: list[RedisCommand]) -> None:
        """Move groups to this worker's positions. A group that is gone shows that the stream may
        be another one, even if it has the same newest entry."""
        for stream in list(itertools.islice(self._groups_due, _READ_BATCH)):
            read = self._groups_due.pop(stream)
            if stream.settled and not stream.misaligned:
                at = ("XGROUP", "SETID", stream.key, self._group, str(stream.position))
                sent.moved.append((stream, len(commands)))
                # Without this number, XINFO GROUPS shows no lag.
                commands.append(at if read is None else (*at, "ENTRIESREAD", read))

    def retry_paused(self) -> bool:
        """Examine the streams again whose reads were rejected. Return True if there are any.

        Call this once a second. It also moves the groups of the streams that were read since then.
        """
        self._groups_due |= self._groups_behind
        self._groups_behind = {}
        self._groups_moved.clear()
        self._moving.clear()
        streams = [stream for stream in self._mode.pop_paused() if stream.alive]
        for stream in streams:
            self.want_examine(stream)
        return bool(streams)

    def connected(self) -> None:
        """Discard everything sent on the old connection. Call `all_unsettled` next."""
        sent, self._sent = self._sent, None
        for stream, request, *_ in sent.examined if sent else ():
            stream.on_examine_lost(request)
        self._read.clear()
        self._swept.clear()
        self._counts.clear()
        self._caught_up.clear()
        self._groups_moved.clear()
        self._groups_behind.clear()
        self._groups_due.clear()
        self._moving.clear()
        self._certify.clear()
        self._moved_from.clear()
        self._mode.paused.clear()
        self._control_changed = True

    def all_unsettled(self, streams: Iterable[Followed]) -> None:
        """Examine all streams again, since they may have changed without an invalidation."""
        for stream in streams:
            self._settling = True
            stream.on_unsettled()

    # ---- one pipeline -----------------------------------------------------------------------

    def commands(self) -> list[RedisCommand]:
        """Return one pipeline for all requests, up to a limit."""
        control = self._control if self._control_changed else None
        sent = _SentPipeline(control)
        self._control_changed = False
        commands = control.commands() if control else []
        sent.control_end = len(commands)
        if self._certify:
            sent.certify = slice(len(commands), len(commands) + len(self._certify))
            sent.certified, self._certify = self._certify, []
            commands += sent.certified
        if self._groups_due:
            self._move_groups(sent, commands)
        if self._urgent or self._examine:
            self._add_examinations(sent, commands)
        for stream in _pop_streams(self._read, _READ_BATCH, _UNKNOWN_COUNT):
            if not stream.settled:
                # The examination requests the read. Request an examination, because the last one
                # may have failed: the key had another type, and has been deleted since.
                self._examine.pop(stream, None)
                self._urgent[stream] = None
                continue
            aligning, keeps_group = stream.misaligned, False
            plain = self._mode.plain and self._mode.is_plain_for(stream)
            is_behind = stream in self._groups_behind or stream in self._groups_due
            if not (aligning or plain) and (is_behind or stream in self._groups_moved):
                keeps_group = (
                    stream.digest is not None
                    and stream.average_bytes <= _REREAD_BYTES
                    and stream not in self._moving
                )
                # If there is no entry to read again, the group must be at the position.
                stream.misaligned = aligning = is_behind and not keeps_group
            form = _Form(aligning, plain, keeps_group)
            if form.aligning and not form.plain:
                self._counts.pop(stream, None)
                self._caught_up.discard(stream)
            most = self._counts.get(stream)
            if most is None:
                most = _FIRST_COUNT if stream in self._caught_up else self._unknown
            count = stream_commands.count_for(stream, self._settings.page_bytes, most)
            start = len(commands)
            commands += stream_commands.read_commands(
                stream,
                self._group,
                self._instance,
                count,
                plain=form.plain,
                keeps_group=form.keeps_group,
            )
            if not (form.plain or form.keeps_group):
                self._groups_moved.add(stream)
                self._groups_behind.pop(stream, None)
                self._groups_due.pop(stream, None)
            stream.misaligned = False
            sent.read.append((stream, count, form, start, len(commands)))
        self._sent = sent
        return commands

    def _add_examinations(self, sent: _SentPipeline, commands: list[RedisCommand]) -> None:
        examine = _pop_streams(self._urgent, _EXAMINE_BATCH)
        if not self.only_urgent and not self._urgent:
            examine += _pop_streams(self._examine, _EXAMINE_BATCH - len(examine))
        if examine:
            # Read this first: the replication ID may change while the connection lasts.
            sent.replication = len(commands)
            commands.append(("INFO", "replication"))
        for stream in examine:
            request = stream.examine_request()
            plain = self._mode.plain
            start = len(commands)
            commands += stream_commands.examine_commands(
                self._keys, stream, self._group, request, self._primary, plain=plain
            )
            sent.examined.append((stream, request, plain, start, len(commands)))

    def on_replies(self, replies: Sequence[object]) -> None:
        """Process the replies in the order of the pipeline.

        So rights that were read before an entry are applied before the entry is delivered.
        """
        sent, self._sent = self._sent, None
        if sent is None:
            return
        if sent.control and sent.control.on_replies(replies[: sent.control_end]):
            self._control_changed = True
        if sent.certified and sent.certified[0] != _LOAD:
            again = zip(sent.certified, replies[sent.certify], strict=True)
            if missing := [command for command, reply in again if is_missing(reply)]:
                # SCRIPT FLUSH was called. Load the script and repeat once.
                self._certify += [_LOAD, *missing]
        info = None if sent.replication is None else replies[sent.replication]
        if isinstance(info, bytes):
            self._primary.observe(Replication.parse(info))
        for stream, request, plain, start, end in sent.examined:
            self._on_examined(stream, request, plain, replies[start:end])
        for stream, at in sent.moved:
            reply = replies[at]
            if not isinstance(reply, ReplyError) or not (stream.alive and stream.settled):
                continue
            if self._mode.is_gone(CommandRefused("XGROUP SETID", str(reply))):
                stream.on_unsettled()
        for stream, count, form, start, end in sent.read:
            self._on_read(stream, count, form, replies[start:end])
            if form.plain:
                # A plain read does not advance the group in Redis.
                stream.misaligned = True
        if self._settling and not (self._urgent or self.only_urgent):
            self._settling = False

    def _on_examined(
        self,
        stream: Followed,
        request: ExamineRequest,
        plain: bool,
        replies: Sequence[object],
    ) -> None:
        try:
            examined = stream_commands.parse_examined(
                request,
                self._primary,
                replies,
                plain=plain,
                moved_from=self._moved_from.get(stream, ()),
            )
        except stream_commands.StreamChanged:
            stream.on_examine_lost(request)
            return
        except CommandRefused as exc:
            if is_misplaced(exc.reply):
                self.park(stream, request)
                return
            if self._mode.try_plain(exc, plain=plain):
                stream.on_examine_lost(request)
                return
            if rule_of(exc.reply).effect is Effect.ONE:
                _log.error("Channel %s cannot be read: %s", stream.channel, exc)
            else:
                self._mode.pause(stream, exc)
            stream.on_examine_failed(request, "the channel's stream cannot be read")
            return
        if not self._mode.refusals.lacks("evalsha"):
            self._certify += certify_commands(stream.key, examined.state, self._primary.certificate)
        stream.on_examined(request, examined)
        if stream.alive and stream.settled and stream.misaligned:
            self._read[stream] = None

    def _on_read(
        self, stream: Followed, count: int, form: _Form, replies: Sequence[object]
    ) -> None:
        swept = stream in self._swept
        self._swept.discard(stream)
        # A stream that was rewound or unsettled in the meantime will read these entries again.
        if not stream.alive or not stream.settled or stream.misaligned:
            return
        aligning, plain, keeps_group = form
        own = (stream.position, stream.digest) if keeps_group else None
        try:
            state, entries = stream_commands.parse_read(
                replies, self._primary, aligning=aligning, plain=plain, own=own
            )
        except stream_commands.EntryMissing:
            # It was trimmed or deleted, or the stream was. The next read checks the incarnation.
            self._moving.add(stream)
            stream.misaligned = True
            self._read[stream] = None
            return
        except stream_commands.StreamChanged:
            self._read[stream] = None
            return
        except CommandRefused as exc:
            stream.misaligned = True
            if is_misplaced(exc.reply):
                self.park(stream)
            elif self._mode.is_gone(exc):
                stream.on_unsettled()
            elif self._mode.try_plain(exc, plain=plain):
                self._read[stream] = None
            else:
                self._mode.pause(stream, exc)
            return
        if (self._mode.plain or self._mode.blocked) and self._mode.on_read(plain=plain):
            self._on_groups_restored()
        if (aligning or plain) and not stream.has_same_incarnation(state):
            # The stream was deleted and created again after the examination.
            stream.on_unsettled()
            return
        if swept and entries:
            self._metrics.lost_wakeups.inc()
        complete = len(entries) < count
        if keeps_group:
            behind = self._groups_due if stream in self._groups_due else self._groups_behind
            behind[stream] = state.added if complete else None
        records = stream_commands.decode_all(stream, entries, self._decode)
        first = records[0].id if records else None
        if first is not None and first <= stream.position:
            # Another program has moved the group back.
            stream.misaligned = True
            self._read[stream] = None
            return
        following = len(entries) if complete else None
        if stream.has_gap(state, following):
            stream.on_gap(state, first, following)
            return
        if not complete:
            self._read[stream] = None
            most = _MAX_COUNT if stream in self._caught_up else self._most
            self._counts[stream] = min(2 * count, most)
        else:
            self._caught_up.add(stream)
            if 2 * len(entries) < count and stream in self._counts:
                self._counts[stream] //= 2
                if self._counts[stream] <= _FIRST_COUNT:
                    del self._counts[stream]
        if records:
            stream.on_records(records)
        if complete:
            if stream.position < state.last:
                stream.on_end(state.last)
            stream.on_read_to_end()


class PagePipelines:
    """Reads pages for clients that are behind, a few streams at a time to limit memory.

    Redis cannot limit a reply in bytes, and entries may be larger than all before them. So a page
    has few entries unless the whole stream is small: MEMORY USAGE returns its size in bytes.
    """

    def __init__(
        self,
        *,
        primary: Primary,
        settings: StreamSettings,
        decode: stream_commands.Decode,
        mode: ReadMode | None = None,
        on_misplaced: Callable[[Followed], None] = lambda _: None,
    ) -> None:
        """`on_misplaced` is called for a stream that is, or will be, on another server."""
        self._on_misplaced = on_misplaced
        self._mode = mode or ReadMode()
        self._primary = primary
        self._settings = settings
        self._decode = decode
        self._most = _most_entries(settings, _PAGES_BYTES)
        self._pages: dict[Followed, None] = {}
        self._sent: list[_SentPage] = []
        self._plain = False
        # Streams whose last page was read just now: number of blocks, size in bytes if measured.
        self._sizes: dict[Followed, tuple[int, int | None]] = {}

    @property
    def has_work(self) -> bool:
        """Return True if a client is behind and has room for more entries."""
        return bool(self._pages)

    def want(self, stream: Followed) -> None:
        """Read a page of this stream."""
        self._pages[stream] = None

    def discard(self, stream: Followed) -> None:
        """Drop the request for the stream after its last client left."""
        self._pages.pop(stream, None)
        self._sizes.pop(stream, None)
        # Another server has the stream now, or a new client may follow it again.
        self._sent = [page for page in self._sent if page.stream is not stream]

    def commands(self) -> list[RedisCommand]:
        """Return commands for one page of each of the next few streams."""
        self._sent.clear()
        self._plain = self._mode.plain
        commands: list[RedisCommand] = []
        streams = _pop_streams(self._pages, min(_PAGE_STREAMS, self._most))
        for stream in streams:
            request = stream.page_request()
            if request is None:
                continue
            blocks, size_bytes = self._sizes.pop(stream, (_MEASURED_BLOCKS + 1, None))
            if size_bytes is not None and size_bytes <= _PAGES_BYTES // len(streams):
                most = _MAX_COUNT
            else:
                most = self._most // len(streams)
            count = stream_commands.count_for(stream, self._settings.page_bytes, most)
            size_at = None
            if blocks <= _MEASURED_BLOCKS and not self._mode.refusals.lacks("memory|usage"):
                size_at = len(commands)
                commands.append(stream_commands.size_command(stream))
            start = len(commands)
            commands += stream_commands.page_commands(stream, request, count, plain=self._plain)
            self._sent.append(_SentPage(stream, request, count, size_at, start, len(commands)))
        return commands

    def on_replies(self, replies: Sequence[object]) -> None:
        """Pass each page to its stream."""
        for stream, request, count, size_at, start, end in self._sent:
            size_bytes = None if size_at is None else replies[size_at]
            try:
                page = stream_commands.parse_page(
                    stream,
                    self._primary,
                    replies[start:end],
                    count,
                    self._decode,
                    plain=self._plain,
                )
            except stream_commands.StreamChanged:
                self._pages[stream] = None
                continue
            except CommandRefused as exc:
                if is_misplaced(exc.reply):
                    self._on_misplaced(stream)
                elif self._mode.try_plain(exc, plain=self._plain):
                    self._pages[stream] = None
                elif rule_of(exc.reply).effect is Effect.ONE:
                    stream.on_unsettled()
                else:
                    # After the pause the stream is examined, which requests pages again.
                    self._mode.pause(stream, exc)
                continue
            stream.on_page(request, page)
            if stream in self._pages:
                # Use the size for the next page only. Later the stream may have grown.
                size_bytes = size_bytes if isinstance(size_bytes, int) else None
                self._sizes[stream] = page.state.blocks, size_bytes
        self._sent.clear()


class _SentPage(NamedTuple):
    """A page in a pipeline, with its position and that of the stream's size in the replies."""

    stream: Followed
    request: PageRequest
    most_entries: int
    size_at: int | None
    start: int
    end: int


class _Form(NamedTuple):
    """The form of a read: it moves the group first, uses no group, or leaves the group behind."""

    aligning: bool
    plain: bool
    keeps_group: bool


class _SentPipeline:
    """The contents of a pipeline, with the position of each part in the replies."""

    __slots__ = (
        *("certified", "certify", "control", "control_end"),
        *("examined", "moved", "read", "replication"),
    )

    def __init__(self, control: ControlReader | None) -> None:
        self.control = control
        self.control_end = 0
        self.replication: int | None = None
        self.examined: list[tuple[Followed, ExamineRequest, bool, int, int]] = []
        self.read: list[tuple[Followed, int, _Form, int, int]] = []
        self.moved: list[tuple[Followed, int]] = []
        self.certified: list[RedisCommand] = []
        self.certify = slice(0)


def _most_entries(settings: StreamSettings, most_bytes: int) -> int:
    """Return how many entries may be read at once if each has the maximum size."""
    return max(1, min(_MAX_COUNT, most_bytes // settings.max_entry_bytes))


def _pop_streams(waiting: dict[Followed, None], most: int, entries: int = 1) -> list[Followed]:
    """Remove streams from `waiting` whose replies, of about `entries` each, fit one pipeline."""
    taken: list[Followed] = []
    expected_bytes = 0.0
    for stream in waiting:
        if len(taken) >= most or expected_bytes >= _PIPELINE_BYTES:
            break
        taken.append(stream)
        # XINFO STREAM returns the first and the last entry.
        expected_bytes += (2 + entries) * stream.average_bytes
    for stream in taken:
        del waiting[stream]
    return taken
