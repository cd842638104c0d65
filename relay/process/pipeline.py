"""One entry's way, on one page: decode, set aside what cannot be read, check rights, to the hub.

And one subscription's way: ask the sources of rights that take time, then join the stream, where
the rights hash is read together with the stream itself.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import logging
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from relay.core.errors import RelayError
from relay.core.model import Broken, Channel, EntryID, Event, Record
from relay.stream.format import ephemeral
from relay.stream.format.entry import decode
from relay.stream.write import dead_letters
from relay.stream.write.control import (
    ControlCommand,
    DisconnectUser,
    DoorCommand,
    DropRights,
    UnsubscribeUser,
)

if TYPE_CHECKING:
    from redis.asyncio import Redis

    from relay.core.metrics import Metrics
    from relay.core.model import Position, Principal
    from relay.core.stream_interface import Followed
    from relay.hub.hub import Hub
    from relay.hub.session import Session
    from relay.rights.policy import Policy
    from relay.stream.format.keys import Keys

_log = logging.getLogger(__name__)

DEAD_LETTERS_WAITING = 1000
# Half of the second within which an expiry takes effect.
_LOOK_S = 0.5


class Incoming:
    """From Redis to the hub."""

    def __init__(self, *, metrics: Metrics, max_entry_bytes: int) -> None:
        self._metrics = metrics
        self._max_entry_bytes = max_entry_bytes
        self.dead_letters: asyncio.Queue[tuple[Channel, Broken]] = asyncio.Queue(
            DEAD_LETTERS_WAITING
        )

    def decode(self, channel: Channel, entry_id: EntryID, fields: Sequence[bytes]) -> Record:
        """What an entry means; never raises."""
        return decode(channel, entry_id, fields, self._max_entry_bytes)

    def decode_ephemeral(self, channel: Channel, payload: bytes) -> Event | None:
        """An event of the ephemeral kind, None if it cannot be read."""
        event = ephemeral.decode(channel, payload, self._max_entry_bytes)
        if isinstance(event, str):
            _log.warning("ephemeral event on %s is dropped: %s", channel, event)
            return None
        return event

    def deliver(self, stream: Followed, records: list[Record]) -> None:
        """Live entries, in order, directly after the stream's position."""
        self._metrics.events.inc(len(records))
        for record in records:
            if isinstance(record.body, Broken):
                self._set_aside(stream.channel, record.body)
        stream.on_records(records)
        self._metrics.delayed(max(0.0, time.time() - records[-1].id.ms / 1000))

    async def write_dead_letters(self, client: Redis, keys: Keys, node: str) -> None:
        """For ever: what was set aside, as soon as Redis takes it."""
        while True:
            channel, broken = await self.dead_letters.get()
            try:
                await dead_letters.write(client, keys, channel, broken, node=node)
            except RelayError as exc:
                _log.warning("dead letter %s of %s is not written: %s", broken.id, channel, exc)

    def _set_aside(self, channel: Channel, broken: Broken) -> None:
        self._metrics.dead_letters.inc()
        try:
            self.dead_letters.put_nowait((channel, broken))
        except asyncio.QueueFull:
            # The entry itself stays in its stream; only the note about it is lost.
            _log.warning("entry %s of %s cannot be read: %s", broken.id, channel, broken.reason)


class Admission:
    """Who may read what; the hub's `Rights`."""

    def __init__(self, policy: Policy, spawn: Callable[..., object]) -> None:
        self.policy = policy
        self.hub: Hub | None = None
        # By door: what it does with the commands that only it understands.
        self.on_command: dict[str, Callable[[str], None]] = {}
        # Doors that keep answers about rights; None stands for every channel, or every user.
        self.on_drop: list[Callable[[Channel | None, str | None], None]] = []
        self._spawn = spawn
        # Answers of the application that clients here rest on, by the time they run out.
        self._due: list[tuple[float, int, Principal, Channel]] = []
        self._numbers = itertools.count()

    def allowed(
        self, principal: Principal, channel: Channel, hash_value: bytes | None, *, admitted: bool
    ) -> bool:
        """See `relay.hub.hub.Rights`."""
        answer = None
        if self.policy.needs_http(principal, channel) and self.policy.http is not None:
            answer = self.policy.http.cached(principal, channel)
            if answer is None and admitted:
                # Dropped, or about another user's groups since a refresh: it is asked again by
                # the next `renew`, and that decides.
                self._renew_later(principal, channel)
                answer = True
        return self.policy.allowed(principal, channel, hash_value, answer, now=time.time())

    def subscribe(self, session: Session, channel: Channel, asked: Position | None) -> None:
        """Join now, or after the application has answered."""
        hub = self._hub()
        if self._must_ask(session, channel):
            hub.reserve(session, channel)
            self._spawn(self._ask_then_join(session, channel, asked), name=f"rights {channel}")
        else:
            if self.policy.needs_http(session.principal, channel):
                self._renew_later(session.principal, channel)
            hub.subscribe(session, channel, asked)

    async def _ask_then_join(
        self, session: Session, channel: Channel, asked: Position | None
    ) -> None:
        http = self.policy.http
        if http is not None:
            await http.ask(session.principal, channel)
            self._renew_later(session.principal, channel)
        hub = self._hub()
        if hub.unreserve(session, channel):
            hub.subscribe(session, channel, asked)

    def _must_ask(self, session: Session, channel: Channel) -> bool:
        http = self.policy.http
        return (
            http is not None
            and self.policy.needs_http(session.principal, channel)
            and http.cached(session.principal, channel) is None
        )

    async def renew(self) -> None:
        """For ever: a token whose time is over ends its client; answers of the application that
        have run out are asked for again, and who lost the right is dropped."""
        while True:
            await asyncio.sleep(_LOOK_S)
            hub, now = self._hub(), time.time()
            for session in hub.sessions_expiring(now):
                hub.expire(session)
            while self._due and self._due[0][0] <= now:
                _, _, principal, channel = heapq.heappop(self._due)
                if _is_there(hub, principal, channel):
                    self._spawn(self._ask_again(principal, channel), name=f"rights {channel}")

    async def _ask_again(self, principal: Principal, channel: Channel) -> None:
        http = self.policy.http
        if http is None:
            return
        allowed = await http.ask(principal, channel)
        self._renew_later(principal, channel)
        if not allowed:
            self._hub().recheck(channel)

    def _renew_later(self, principal: Principal, channel: Channel) -> None:
        http = self.policy.http
        if http is not None:
            due = time.time() + (http.expires_in(principal, channel) or 0.0)
            heapq.heappush(self._due, (due, next(self._numbers), principal, channel))

    def obey(self, command: ControlCommand) -> None:
        """A command from the control stream."""
        hub = self._hub()
        match command:
            case DisconnectUser():
                hub.disconnect_user(command.user, "disconnected", command.door)
            case UnsubscribeUser():
                hub.drop_subscription(command.channel, command.user, "unsubscribed", command.door)
            case DoorCommand():
                # A door that is shut here has nobody whom it could concern.
                if command.door in self.on_command:
                    self.on_command[command.door](command.payload)
            case DropRights():
                self._drop(command.channel, command.user)
                hub.recheck(command.channel)

    def control_lost(self) -> None:
        """Commands may have been missed: everybody is checked."""
        self._drop(None, None)
        self._hub().recheck(None)

    def _drop(self, channel: Channel | None, user: str | None) -> None:
        if self.policy.http is not None:
            self.policy.http.drop(channel, user)
        for told in self.on_drop:
            told(channel, user)

    def _hub(self) -> Hub:
        if self.hub is None:
            raise RuntimeError("used before the composition was complete")
        return self.hub


def _is_there(hub: Hub, principal: Principal, channel: Channel) -> bool:
    feed = hub.feed(channel)
    if feed is None:
        return False
    # Not the whole principal: a refreshed token differs, and is the same question.
    asked = (principal.user, principal.groups)
    sessions = (subscription.session for subscription in feed.subscriptions())
    return any((each.principal.user, each.principal.groups) == asked for each in sessions)
