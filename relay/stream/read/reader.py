"""Read the streams of one server that the clients of this worker follow.

One task reads all streams on one connection with client tracking. It collects everything that was
requested since the last pipeline (examinations, reads, the control stream), sends it in one write
and passes on the replies in order. A second connection reads pages for clients that are behind, so
that large replies do not delay live entries. A third one receives ephemeral events.

After a reconnect each stream is examined before anything more is delivered from it.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING

from relay.core.errors import RedisUnavailable
from relay.core.model import ZERO_ID, Channel, Event
from relay.core.slices import in_slices
from relay.core.stream_interface import ExamineRequest, Followed
from relay.stream.connection import scripts
from relay.stream.connection.connect import CommandRefused
from relay.stream.connection.pipeline_connection import PipelineConnection, unawaited
from relay.stream.connection.primary import Continued, Primaries, Primary
from relay.stream.connection.reconnecting import keep_connected, loss_of_connection, wait_for
from relay.stream.connection.refusals import Refusals, needs
from relay.stream.connection.rights import find_rejected
from relay.stream.read import stream_commands
from relay.stream.read.groups import CERTIFY, group_of
from relay.stream.read.invalidations import (
    MISSED_CANARIES,
    Canary,
    sweep_steps,
    swept_streams,
)
from relay.stream.read.join_window import JoinWindow
from relay.stream.read.pipelines import LivePipelines, PagePipelines
from relay.stream.read.poll import poll
from relay.stream.read.read_mode import ReadMode

if TYPE_CHECKING:
    from relay.config.settings import StreamSettings
    from relay.core.metrics import Metrics
    from relay.stream.connection.connect import RedisEndpoint
    from relay.stream.format.keys import Keys
    from relay.stream.read.control_reader import ControlReader
    from relay.stream.shards.shard import Shard
    from relay.stream.upkeep.unused import UnusedStreams

_log = logging.getLogger(__name__)

_MESSAGES = frozenset({b"message", b"smessage"})
_RETRY_S = 1.0
_SILENT_S = 3.0
# Periods of checks of rights: usually, and while rights are missing.
_RIGHTS_S, _RIGHTS_MISSING_S = 60.0, 5.0
_UNREAD_BATCH = (16, 256)
_RESUME_BATCH = 500
_DESTROY_BATCH = 256


class StreamReader:
    """Reads all streams of one shard that the clients of this worker follow."""

    def __init__(
        self,
        *,
        keys: Keys,
        instance: str,
        shard: Shard,
        settings: StreamSettings,
        metrics: Metrics,
        decode: stream_commands.Decode,
        on_turn: Callable[[], None],
        decode_ephemeral: Callable[[Channel, bytes], Event | None],
        control: ControlReader | None,
        unused: UnusedStreams,
        refusals: Refusals | None = None,
        continued: Continued = lambda _: (),
        others: Primaries | None = None,
        on_misplaced: Callable[[], None] = lambda: None,
    ) -> None:
        """`others` are the primaries of the other shards. `on_misplaced` is called if keys are, or
        will be, in another shard."""
        self.shard = shard
        self._on_misplaced = on_misplaced
        self._subscribe_command = "SSUBSCRIBE" if shard.uses_sharded_pubsub else "SUBSCRIBE"
        self.refusals = refusals = refusals or Refusals()
        self._needs = needs(keys, instance, sharded=shard.uses_sharded_pubsub)
        # Set when Redis has rejected a command that was accepted at the last check.
        self._rights_work = asyncio.Event()
        refusals.on_unknown = self._rights_work.set
        self._mode = ReadMode(refusals)
        self._keys = keys
        self._unused = unused
        self._settings = settings
        self._metrics = metrics
        self._reads = metrics.round_trips.labels("read")
        self._page_reads = metrics.round_trips.labels("page")
        self._on_turn = on_turn
        self._decode_ephemeral = decode_ephemeral
        self._group = group_of(instance)
        self._followed: dict[Channel, Followed] = {}
        self._by_key: dict[bytes, Followed] = {}
        self._primary = Primary(continued=continued, others=others)
        self._live = LivePipelines(
            keys=keys,
            instance=instance,
            primary=self._primary,
            settings=settings,
            metrics=metrics,
            decode=decode,
            control=control,
            mode=self._mode,
            on_groups_restored=self._on_groups_restored,
            on_misplaced=on_misplaced,
        )
        self._pages = PagePipelines(
            primary=self._primary,
            settings=settings,
            decode=decode,
            mode=self._mode,
            on_misplaced=self._live.park,
        )
        self._joins = JoinWindow(self.want_examine)
        self._work = asyncio.Event()
        self._page_work = asyncio.Event()
        # Set when every stream must be checked for new entries.
        self._check_all = asyncio.Event()
        # Whether all streams must be examined again, after FLUSHALL for instance.
        self._all_changed = False
        self._connection: PipelineConnection | None = None
        self._messages: PipelineConnection | None = None
        self._canary = Canary(
            keys=keys,
            instance=instance,
            period_s=settings.canary_s,
            refusals=refusals,
            tag=lambda: shard.tag,
            on_misplaced=on_misplaced,
        )
        # Streams whose sharded pub/sub channels are not subscribed to.
        self._unsubscribed: dict[Followed, None] = {}
        self._reading = asyncio.Event()
        # Why the server cannot be read although it can be reached.
        self.problem = ""
        self._stopping = False

    # ---- relay.core.stream_interface.StreamReads --------------------------------------------

    def follow(self, stream: Followed) -> None:
        """Receive ephemeral events of the stream. It is examined when a client joins."""
        stream.key = self._keys.stream(stream.channel)
        self._followed[stream.channel] = self._by_key[stream.key] = stream
        if self._messages is not None:
            self._subscribe(self._messages, stream)

    def want_join(self, stream: Followed) -> None:
        """Examine the stream for a new client, together with others that arrive now."""
        self._joins.join(stream)

    def want_examine(self, stream: Followed) -> None:
        """Examine the stream in the next pipeline."""
        self._live.want_examine(stream)
        self._work.set()

    def want_read(self, stream: Followed) -> None:
        """Read the stream in the next pipeline."""
        self._live.want_read(stream)
        self._work.set()

    def want_page(self, stream: Followed) -> None:
        """Read a page in the next page pipeline."""
        self._pages.want(stream)
        self._page_work.set()

    def release(self, stream: Followed) -> None:
        """Stop reading the stream, destroy its group and unsubscribe from its ephemeral events."""
        if self._followed.get(stream.channel) is not stream:
            return
        del self._followed[stream.channel], self._by_key[stream.key]
        self._live.discard(stream)
        self._pages.discard(stream)
        self._joins.discard(stream)
        if self._connection is not None and self._messages is not None:
            name = self._keys.ephemeral(stream.channel)
            if self.shard.uses_sharded_pubsub:
                self._messages.end_sharded(name)
            else:
                self._messages.post(("UNSUBSCRIBE", name))
            # Use the connection that creates groups: if a client returns immediately, its new group
            # is created after this one was destroyed.
            destroy = ("XGROUP", "DESTROY", stream.key, self._group)
            # The stream may have been deleted, or was never created for a rejected client.
            self._connection.post(destroy, expected="requires the key to exist")
        if stream.exists and stream.position == ZERO_ID:
            self._unused.released(stream.channel)

    # ---- changes of the shard map ----------------------------------------------------------

    def drop(self, stream: Followed) -> None:
        """Forget a stream that another shard has now. Its group has moved with it."""
        if self._followed.get(stream.channel) is stream:
            del self._followed[stream.channel], self._by_key[stream.key]
            self._live.drop(stream)
            self._pages.discard(stream)
            self._joins.discard(stream)

    def moved_here(self, stream: Followed, source: StreamReader) -> None:
        """Follow a stream that was in the shard of `source` until a moment ago.

        If this reader was connected then, the server has not been promoted or restarted since the
        stream arrived, so that it has lost nothing.
        """
        if self._connection is not None and source.has_connection:
            self._live.moved_here(stream, source.certificates())
        self.follow(stream)

    @property
    def has_connection(self) -> bool:
        """True if there is a connection to the server."""
        return self._connection is not None

    def certificates(self) -> frozenset[int]:
        """Return the certificates since which the server has lost nothing."""
        return self._primary.kept()

    def set_control(self, control: ControlReader | None) -> None:
        """Read the control stream in this shard, or no longer."""
        self._live.set_control(control)
        self._work.set()

    def unpark(self) -> None:
        """Examine the parked streams and subscribe again, after the map was read."""
        ended, self._unsubscribed = self._unsubscribed, {}
        for stream in ended:
            if self._messages is not None and self._followed.get(stream.channel) is stream:
                self._subscribe(self._messages, stream)
        self._live.unpark()
        self._work.set()

    # ---- health -----------------------------------------------------------------------------

    def ready(self) -> bool:
        """Return True if streams are being read."""
        cannot_read = self._mode.blocked or self.refusals.cannot_read
        return self._connection is not None and self._canary.is_working() and not cannot_read

    def is_connected(self) -> bool:
        """Return True if there is a connection to Redis on which streams are read.

        Unlike `ready`, this stays True while this worker is only late.
        """
        return self._connection is not None

    def is_silent(self) -> bool:
        """Return True if the server has proved nothing for seconds, although it is connected.

        On a busy host, canaries are often late by more than `ready` allows.
        """
        return self._canary.age_s() > max(_SILENT_S, 2 * MISSED_CANARIES * self._settings.canary_s)

    def settled(self) -> bool:
        """Return False after a reconnect until all streams were checked for new entries."""
        return not self._live.settling

    def is_reading(self) -> bool:
        """Return True if `wait_ready` would return at once."""
        return self._reading.is_set()

    async def wait_ready(self) -> None:
        """Wait until streams are being read."""
        await self._reading.wait()

    # ---- connections ------------------------------------------------------------------------

    async def run(self) -> None:
        """Read until cancelled or stopped. Reconnect after every error of Redis."""
        await keep_connected(self._connected, self._on_error)

    def _on_error(self, exc: BaseException) -> None:
        if not self._stopping:
            self._metrics.reconnects.inc()
            _log.warning("Redis: %s", exc)

    async def stop(self) -> None:
        """Stop reading and destroy the groups of this worker."""
        self._stopping = True
        connection = self._connection
        if connection is None:
            return
        commands = [("XGROUP", "DESTROY", key, self._group) for key in self._by_key]
        try:
            for start in range(0, len(commands), _DESTROY_BATCH):
                await connection.execute(commands[start : start + _DESTROY_BATCH])
        except RedisUnavailable as exc:
            _log.info(
                "Could not destroy all consumer groups (%s); the job for dead workers will", exc
            )

    async def _connected(self, established: Callable[[], None]) -> None:
        if self._stopping:
            return
        endpoint = await self.shard.locate()
        lost, on_lost = loss_of_connection()
        async with contextlib.AsyncExitStack() as connections:

            async def opened(on_push: Callable[[list[object]], None] | None) -> PipelineConnection:
                each = await PipelineConnection.open(
                    endpoint, settings=self.shard.settings, on_push=on_push, on_lost=on_lost
                )
                connections.callback(each.close)
                each.on_no_right = self._on_no_right
                each.on_misplaced = self._on_misplaced
                return each

            connection = await opened(self._on_push)
            pages = await opened(None)
            # Subscribe on a separate connection. Redis applies its output limit for pub/sub (32 MB
            # by default) to all replies on such a connection, and a large read would exceed it.
            messages = await opened(self._on_push)
            tracking = self._settings.tracking == "auto" and await self._canary.start(connection)
            if not tracking and self.shard.uses_sharded_pubsub:
                # A blocking read of many streams would need keys of many slots.
                self.problem = self._canary.refusal or "[stream] tracking is off: set it to auto"
                raise RedisUnavailable(
                    f"Redis at {endpoint} cannot be read: {self.problem}."
                    " A Redis Cluster needs client tracking"
                )
            self.problem = ""
            if not tracking:
                self._canary.touch()
                _log.warning("Client tracking unavailable: polling streams with blocking reads")
            await self._check_rights(endpoint, log=True)
            await self._load_script(connection)
            self._primary.connected(connection.run_id, connection.replication)
            connections.callback(self._primary.disconnected)
            connections.callback(self._disconnected)
            self._connection, self._messages = connection, messages
            await self._resume(messages)
            self._reading.set()
            established()
            _log.info(
                "Reading streams from %s (%s %s)", endpoint, connection.server, connection.version
            )
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._serve(connection), name="streams")
                tasks.create_task(self._find_unread(connection), name="unread streams")
                tasks.create_task(self._serve_pages(pages), name="pages")
                tasks.create_task(self._sweep(), name="sweep")
                tasks.create_task(self._retry(connection), name="retry")
                tasks.create_task(self._watch_rights(endpoint), name="rights")
                tasks.create_task(wait_for(lost), name="lost")
                if tracking:
                    tasks.create_task(self._canary.verify(connection, pages), name="canary")
                else:
                    tasks.create_task(poll(self, self.shard.settings), name="poll")

    async def _check_rights(self, endpoint: RedisEndpoint, *, log: bool) -> None:
        could_subscribe = not self.refusals.lacks(self._subscribe_command.lower())
        rejected = await find_rejected(endpoint, self.shard.settings, self._needs)
        self.refusals.checked(str(endpoint), rejected, log=log)
        self._mode.on_checked()
        if self._messages is not None and not could_subscribe:
            for stream in self.followed():
                self._subscribe(self._messages, stream)

    def _on_no_right(self, reply: str) -> None:
        if not self.refusals.explains(reply):
            self._rights_work.set()

    def _subscribe(self, messages: PipelineConnection, stream: Followed) -> None:
        command = (self._subscribe_command, self._keys.ephemeral(stream.channel))
        if not self.shard.uses_sharded_pubsub:
            messages.post(command)
            return
        unawaited(
            messages.execute([command]),
            on_no_right=self._on_no_right,
            on_misplaced=partial(self._on_unsubscribed, stream),
        )

    def _on_unsubscribed(self, stream: Followed) -> None:
        """Subscribe again after a look at the map.

        Redis also ends subscriptions when an operator assigns a slot to the server that has it.
        """
        self._unsubscribed[stream] = None
        self._on_misplaced()

    async def _watch_rights(self, endpoint: RedisEndpoint) -> None:
        """Check rights rarely, missing ones more often, and all of them after a new rejection."""
        while True:
            missing = self.refusals.rejected
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_RIGHTS_MISSING_S if missing else _RIGHTS_S):
                    await self._rights_work.wait()
            if missing and not self._rights_work.is_set():
                again = [need for need in self._needs if need.opens_transaction or need in missing]
                rejected = await find_rejected(endpoint, self.shard.settings, again)
                if tuple(need for need, _ in rejected) == missing:
                    continue
            self._rights_work.clear()
            await self._check_rights(endpoint, log=False)

    async def _load_script(self, connection: PipelineConnection) -> None:
        # Missing rights were reported by `_check_rights`.
        if not self.refusals.lacks("script|load"):
            with contextlib.suppress(CommandRefused):
                await scripts.load(connection, CERTIFY)

    def _disconnected(self) -> None:
        self._connection = self._messages = None
        self._reading.clear()

    async def _resume(self, messages: PipelineConnection) -> None:
        """Arm, examine and read all streams after a reconnect."""
        self._live.only_urgent = True
        self._live.connected()
        self._check_all.set()
        # Reading begins after this loop, so the loop may yield to other tasks.
        for part in self._parts():
            for stream in part:
                self._subscribe(messages, stream)
            self._live.all_unsettled(part)
            await asyncio.sleep(0)
        self._work.set()

    # ---- invalidations ----------------------------------------------------------------------

    def _on_push(self, push: list[object]) -> None:
        """Handle an invalidation, or an ephemeral event."""
        kind = push[0]
        if kind == b"invalidate":
            keys = push[1]
            if isinstance(keys, list):
                self._on_keys(keys)
            else:
                self._canary.touch()
                self._on_everything()
        elif kind in _MESSAGES and isinstance(push[1], bytes) and isinstance(push[2], bytes):
            self._on_message(push[1], push[2])
        elif kind == b"sunsubscribe" and isinstance(push[1], bytes):
            channel = self._keys.channel_of_ephemeral(push[1])
            if channel is not None and (stream := self._followed.get(channel)) is not None:
                # The slot has moved. Armed keys that do not exist cause no invalidation then.
                self._on_unsubscribed(stream)

    def _on_keys(self, keys: Iterable[bytes]) -> None:
        for key in keys:
            if (stream := self._by_key.get(key)) is not None:
                self._live.want_read(stream)
            elif (channel := self._keys.channel_of_rights(key)) is not None:
                if (stream := self._followed.get(channel)) is not None:
                    stream.on_rights_changed()
            elif key == self._keys.control:
                self._live.want_control()
            elif key == self._canary.key:
                self._canary.touch()
                continue
            self._work.set()

    def _on_everything(self) -> None:
        self._live.want_control()
        self._live.only_urgent = True
        self._all_changed = True
        self._check_all.set()
        self._work.set()

    def _on_message(self, name: bytes, payload: bytes) -> None:
        channel = self._keys.channel_of_ephemeral(name)
        stream = self._followed.get(channel) if channel else None
        if channel is None or stream is None:
            return
        event = self._decode_ephemeral(channel, payload)
        if event is not None:
            stream.on_ephemeral(event)
            self._on_turn()

    def on_new_entries(self, key: bytes) -> None:
        """Read the stream with this key, which may have new entries."""
        self._on_keys((key,))

    def followed(self) -> list[Followed]:
        """Return all streams that local clients follow."""
        return list(self._followed.values())

    def _parts(self) -> Iterator[list[Followed]]:
        """Yield all followed streams, a few hundred at a time."""
        streams = self.followed()
        for start in range(0, len(streams), _RESUME_BATCH):
            yield streams[start : start + _RESUME_BATCH]

    def polled(self, *, control: bool, rights: bool) -> None:
        """Record a reply of Redis to `poll`. Read the control stream or all rights if True."""
        self._canary.touch()
        if control:
            self._live.want_control()
        if rights:
            for stream in self._followed.values():
                stream.on_rights_changed()
        self._work.set()

    async def _find_unread(self, connection: PipelineConnection) -> None:
        """Find the streams to which entries were appended while the connection was lost.

        An examination costs several commands, and thousands of streams may wait for one. This check
        costs one command per stream, so that streams with new entries can be examined first. It
        also arms the invalidations, so that later entries are found at once.
        """
        while True:
            await self._check_all.wait()
            self._check_all.clear()
            self._live.only_urgent = True
            try:
                if self._all_changed:
                    self._all_changed = False
                    async for part in in_slices(self._parts()):
                        self._live.all_unsettled(part)
                streams = deque(self._followed.values())
                most = _UNREAD_BATCH[0]
                while streams:
                    batch = [streams.popleft() for _ in range(min(most, len(streams)))]
                    batch = [stream for stream in batch if stream.alive and not stream.settled]
                    commands = [stream_commands.has_unread_command(stream) for stream in batch]
                    received = 0
                    for stream, reply in zip(
                        batch, await connection.execute(commands), strict=True
                    ):
                        if reply and isinstance(reply, list):
                            received += stream_commands.size_of(reply)
                            if stream.alive:
                                self._live.want_read(stream)
                    # Check many streams at once, unless their new entries are large.
                    if received > self._settings.page_bytes:
                        most = max(_UNREAD_BATCH[0], most // 2)
                    else:
                        most = min(_UNREAD_BATCH[1], most * 2)
                    self._work.set()
            finally:
                self._live.only_urgent = False
                self._work.set()

    def _on_groups_restored(self) -> None:
        """Create missing groups and move the others, after Redis rejected transactions."""
        for stream in self._followed.values():
            if not stream.marked:
                stream.on_unsettled()
            elif stream.settled and stream.misaligned:
                self._live.want_read(stream)
        self._work.set()

    async def _retry(self, connection: PipelineConnection) -> None:
        """Periodically repeat reads that Redis rejected."""
        while True:
            await asyncio.sleep(_RETRY_S)
            if not self._live.retry_paused():
                await self._try_rejected(connection)
            probe = self._mode.choose_probe(self.followed())
            if probe is not None and probe.settled:
                self._live.want_read(probe)
            self._work.set()

    async def _try_rejected(self, connection: PipelineConnection) -> None:
        """Examine the stream whose read was rejected last, to detect that reads are accepted again.

        Its clients have left, and a worker that is not ready may get no new ones.
        """
        stream = self._mode.refused
        if stream is None:
            return
        request = ExamineRequest(users=("",), own=(ZERO_ID,), context=None)
        commands = stream_commands.examine_commands(
            self._keys, stream, self._group.decode(), request, self._primary, plain=True
        )
        replies = await connection.execute(commands)
        with contextlib.suppress(CommandRefused, stream_commands.StreamChanged):
            stream_commands.parse_examined(request, self._primary, replies, plain=True)
            self._mode.on_read(plain=True)

    async def _sweep(self) -> None:
        """Read each stream once per `sweep_s`, in small steps, in case an invalidation was lost."""
        steps = sweep_steps(self._settings.sweep_s)
        for step in itertools.cycle(range(steps)):
            await asyncio.sleep(self._settings.sweep_s / steps)
            for stream in swept_streams(self._followed.values(), step, steps):
                if stream.alive and stream.settled:
                    self._live.want_read(stream, swept=True)
            self._work.set()

    # ---- the two pipelines ------------------------------------------------------------------

    async def _serve(self, connection: PipelineConnection) -> None:
        while True:
            await self._work.wait()
            self._work.clear()
            commands = self._live.commands()
            if commands:
                self._reads.inc()
                self._live.on_replies(await connection.execute(commands))
                self._on_turn()
            if self._live.has_work:
                self._work.set()

    async def _serve_pages(self, connection: PipelineConnection) -> None:
        while True:
            await self._page_work.wait()
            self._page_work.clear()
            commands = self._pages.commands()
            if commands:
                self._page_reads.inc()
                self._pages.on_replies(await connection.execute(commands))
                self._on_turn()
                # Wait until the sockets have reported that they are full.
                await asyncio.sleep(0)
            if self._pages.has_work:
                self._page_work.set()
