"""`relay publish` and `relay tail`: publish an event, follow a channel."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import select
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace

from relay.cli.operator_context import OperatorContext, channel_of
from relay.cli.output import emit, safe, say
from relay.core.durability import Durability
from relay.core.errors import RedisUnavailable, RelayError
from relay.core.model import (
    ZERO_ID,
    Channel,
    EntryID,
    Event,
    Grant,
    Position,
    Record,
    Revocation,
)
from relay.hub.recovery import judge, untrimmed
from relay.stream.format import entry
from relay.stream.read.view import PAGE, View, read_view, wait_for_entry
from relay.stream.shards.clients import Connections
from relay.stream.upkeep import reports
from relay.stream.write.append import UID_BYTES, AppendCommands, send_one

_AGAIN_S = 0.5


async def publish(site: OperatorContext, options: argparse.Namespace) -> int:
    """Append an event and print its ID."""
    channel = channel_of(options.channel)
    try:
        data = sys.stdin.buffer.read() if options.data == "-" else os.fsencode(options.data)
        if options.uid is not None and not 0 < len(options.uid.encode()) <= UID_BYTES:
            raise ValueError(f"uid must have 1 to {UID_BYTES} bytes")  # noqa: TRY301  # see below
        to = options.to and set().union(*(entry.recipients(names) for names in options.to))
        fields = entry.encode(
            data, type=options.type, uid=options.uid, to=to, client=options.client
        )
        durability = Durability.parse(options.durability) if options.durability else None
    except ValueError as exc:
        raise RelayError(f"not published: {exc}") from exc
    limit = site.config.stream.max_entry_bytes
    if entry.size(fields) > limit:
        raise RelayError(f"not published: {entry.size(fields)} bytes, at most {limit} are allowed")
    # The setting `unique_uids` applies to the HTTP API and the queue only.
    namespace = site.config.namespace(channel).model_copy(update={"unique_uids": True})
    append = AppendCommands(
        site.keys, lambda _: namespace, uid_window_s=site.config.publish.uid_window_s
    ).build(channel, fields, options.uid, durability=durability)
    async with Connections(site.clients) as connections:
        done = await send_one(await connections.to(site.keys.stream(channel)), append)
    if options.json:
        reached = {"durability": str(append.durability)} if append.durability.waits else {}
        emit({"channel": channel, "id": str(done.id), "appended": done.is_new, **reached})
    else:
        print(done.id)
    return 0


async def tail(site: OperatorContext, options: argparse.Namespace) -> int:
    """Follow a channel until SIGINT, or until standard output is closed."""
    follower = _Tail(site, channel_of(options.channel), as_json=options.json)
    with contextlib.suppress(BrokenPipeError):
        with _interrupting(follower), contextlib.suppress(asyncio.CancelledError):
            await follower.run(options.after)
        sys.stdout.flush()
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


@contextlib.contextmanager
def _interrupting(follower: _Tail) -> Iterator[None]:
    """Cancel the current task on SIGINT."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()

    def stop() -> None:
        # Set the flag too, because a library may convert the cancellation to another error.
        follower.stopped = True
        if task is not None:
            task.cancel()

    # Signal handlers work in the main thread only.
    with contextlib.suppress(ValueError, RuntimeError):
        loop.add_signal_handler(signal.SIGINT, stop)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError, RuntimeError):
            loop.remove_signal_handler(signal.SIGINT)


class _Tail:
    """Follows one channel. Each read checks the position, and missing events are reported."""

    def __init__(self, site: OperatorContext, channel: Channel, *, as_json: bool) -> None:
        self._site = site
        self._channel = channel
        self._json = as_json
        self.stopped = False
        self._position = Position(ZERO_ID)
        self._output_closed = select.poll()
        self._output_closed.register(sys.stdout.fileno(), select.POLLERR)

    async def run(self, after: EntryID | None) -> None:
        """Raise if the first read fails. Retry later reads until interrupted."""
        self._begin(await self._read(after or ZERO_ID, PAGE if after else 1), after)
        away = False
        while not (self.stopped or self._output_closed.poll(0)):
            try:
                view = await self._read(self._position.id)
                if away:
                    say("reconnected to Redis")
                    away = False
                if self._check(view):
                    self._show(view)
                    if not view.more:
                        await self._wait()
            except RedisUnavailable as exc:
                if not away:
                    say(f"{exc}; retrying")
                    away = True
                await asyncio.sleep(_AGAIN_S)

    async def _read(self, after: EntryID, count: int = PAGE) -> View:
        site = self._site
        limit = site.config.stream.max_entry_bytes
        return await read_view(site.clients, site.keys, self._channel, after, limit, count)

    async def _wait(self) -> None:
        site = self._site
        limit_s = site.config.redis.command_timeout_s
        client = site.clients.for_key(site.keys.stream(self._channel))
        await wait_for_entry(client, site.keys, self._channel, self._position.id, limit_s)

    def _begin(self, view: View, after: EntryID | None) -> None:
        state = view.state
        if not state.exists:
            say(f"{self._channel} has no stream yet; waiting for its first event")
        elif after is None:
            self._position = self._at_the_end(view)
        elif after > state.last:
            say(f"{after} is later than the last entry, {state.last}; continuing after that one")
            self._position = self._at_the_end(view)
        else:
            # The ID may be made of a time, so its entry need not exist.
            self._position = Position(after, None, state.incarnation, None)
            whole = state.added == state.length or untrimmed(Position(after), state)
            if state.max_deleted > after or not whole:
                oldest = f"the oldest is {state.first}" if state.first else "the stream is empty"
                say(f"entries after {after} were removed; {oldest}")
            self._show(view)

    def _check(self, view: View) -> bool:
        """Report missing events. Return False if the position has changed."""
        state, position = view.state, self._position
        if position.id == ZERO_ID and position.added is None:
            return True
        if not state.exists and position.id == ZERO_ID:
            return True
        digest = view.own.digest if view.own else None
        if state.marker is None:
            # No worker has followed the stream yet, so its history is unknown. Only the entry at
            # the position can be checked.
            state = replace(state, failover=None)
        verdict = judge(position, state, digest)
        if verdict.notice is None:
            return True
        say(f"entries after {position.id} may be missing: {verdict.notice.reason}")
        if verdict.resume == position.id:
            return True
        self._position = Position(verdict.resume)
        return False

    def _show(self, view: View) -> None:
        for record in view.records:
            if self._json:
                emit(reports.record(record))
            else:
                sys.stdout.write(_line(record) + "\n")
        if view.records:
            sys.stdout.flush()
        if not view.more:
            self._position = self._at_the_end(view)
        else:
            last = view.records[-1]
            self._position = Position(last.id, None, view.state.incarnation, last.digest)

    def _at_the_end(self, view: View) -> Position:
        state = view.state
        newest = view.records[-1] if view.records else view.own
        digest = newest.digest if newest and newest.id == state.last else None
        if digest is None and state.last == self._position.id:
            digest = self._position.digest
        # An empty stream cannot lose entries in a new incarnation.
        incarnation = None if state.last == ZERO_ID else state.incarnation
        return Position(state.last, state.added, incarnation, digest)


def _line(record: Record) -> str:
    """Return ID, type, client and data, `-` for missing ones, with control characters escaped."""
    body = record.body
    if isinstance(body, Event):
        parts = [body.type or "-", body.client or "-", body.data.decode()]
    elif isinstance(body, Revocation):
        parts = ["relay:revoke", "-", body.user]
    elif isinstance(body, Grant):
        parts = ["relay:grant", "-", body.user]
    else:
        parts = ["relay:broken", "-", body.reason]
    return "  ".join([str(record.id), *map(safe, parts)])
