"""Apply commands from the control stream to this worker's clients, each at its position.

A command is in another stream than the events, and there is no order between streams. A producer
that has appended an event and then sent a command expects that the clients receive the event first.
So each subscription that a command concerns is held: it receives the entries up to the command's
position and no later ones. The streams are read once more, by a read that begins after the command
was read, and therefore finds everything that was appended before the command. When all held
subscriptions have received these entries, the command is applied.

The position in a channel's stream is the entry after which the command takes effect, if the command
contains it. Otherwise it is the last entry of the command's own millisecond.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Coroutine
from typing import TYPE_CHECKING, Any

from relay.core.errors import Unavailable
from relay.core.model import EntryID
from relay.core.reasons import Reason
from relay.core.slices import AT_ONCE, in_slices
from relay.inspect.questions import BadQuestion, Values
from relay.stream.write.control import (
    DisconnectUser,
    DoorCommand,
    DropRights,
    SentCommand,
    UnsubscribeUser,
)

if TYPE_CHECKING:
    from relay.doorkit.contract import CommandHandler
    from relay.hub.hub import Hub
    from relay.hub.session import Subscription
    from relay.process.admission import ReadRights

_log = logging.getLogger(__name__)

# A client that is behind, for example because it does not read, delays a command for so long.
_DELAY_S = 1.0
_MAX_SEQUENCE = 2**64 - 1
# Number of disconnect commands whose results are kept, for the operator who asks for them.
_REMEMBERED = 100


class _Pending:
    """A command that was read and not applied yet."""

    __slots__ = ("held", "sent", "waiting")

    def __init__(self, sent: SentCommand) -> None:
        self.sent = sent
        # The subscriptions that it holds, and those of them that have not reached its position.
        self.held: dict[Subscription, None] = {}
        self.waiting: set[Subscription] = set()

    def stop_in(self, subscription: Subscription) -> EntryID:
        """Return the last entry that the subscription receives before the command."""
        at = self.sent.at.get(subscription.feed.channel)
        return at or EntryID(self.sent.id.ms, _MAX_SEQUENCE)


class ControlCommands:
    """Applies each command to local sessions, rights or a protocol, in the order of the stream."""

    def __init__(
        self,
        *,
        hub: Hub,
        rights: ReadRights,
        spawn: Callable[[Coroutine[Any, Any, None]], object],
    ) -> None:
        self._hub = hub
        self._rights = rights
        self._spawn = spawn
        # By protocol: its handler for the commands that only it understands.
        self.on_command: dict[str, CommandHandler] = {}
        self._queue: deque[_Pending] = deque()
        # The queued commands that hold each subscription, in order.
        self._holders: dict[Subscription, deque[_Pending]] = {}
        self._reached = asyncio.Event()
        # The number of connections that each of the latest disconnect commands has closed.
        self._closed: OrderedDict[EntryID, int] = OrderedDict()
        self._closing = asyncio.Event()

    async def closed_by(self, command: EntryID) -> int:
        """Return how many connections of this worker a disconnect command has closed.

        Wait until it is applied. Unavailable if that takes too long.
        """
        try:
            async with asyncio.timeout(2 * _DELAY_S):
                while command not in self._closed:
                    self._closing.clear()
                    await self._closing.wait()
        except TimeoutError:
            raise Unavailable(f"command {command} has not been applied yet") from None
        return self._closed[command]

    async def answer(self, values: Values) -> dict[str, Any]:
        """Answer the question `closed-by`: the number of connections that a command has closed."""
        try:
            command = EntryID.parse(str(values.get("command")))
        except ValueError as exc:
            raise BadQuestion(str(exc)) from None
        return {"closed": await self.closed_by(command)}

    def apply(self, sent: SentCommand) -> None:
        """Apply a command now or, if events before it are still to be delivered, after them."""
        pending = _Pending(sent)
        concerned = self._concerned(sent)
        if not self._queue and not concerned and not isinstance(sent.command, DoorCommand):
            self._apply_now(sent)
            return
        if len(concerned) <= AT_ONCE:
            # At once, before the streams are read further.
            for subscription in concerned:
                self._hold(pending, subscription)
        self._queue.append(pending)
        if len(self._queue) == 1:
            self._spawn(self._work())

    def lost(self) -> None:
        """Recheck all clients: commands may have been missed."""
        self._rights.drop(None, None)
        self._hub.recheck(None)

    def _concerned(self, sent: SentCommand) -> Collection[Subscription]:
        """Return the subscriptions that end by the command, as far as it is known now."""
        match sent.command:
            case DisconnectUser(user=user, door=door):
                return self._hub.subscriptions_of(user, door)
            case UnsubscribeUser(user=user, door=door, channel=channel):
                return self._hub.subscriptions_of(user, door, channel)
            case DoorCommand(door=door, payload=payload) if door in self.on_command:
                return self.on_command[door].concerned(payload)
        return ()

    # ---- holds ------------------------------------------------------------------------------

    def _hold(self, pending: _Pending, subscription: Subscription) -> None:
        if subscription in pending.held or subscription.has_ended:
            return
        pending.held[subscription] = None
        pending.waiting.add(subscription)
        holders = self._holders.setdefault(subscription, deque())
        holders.append(pending)
        if len(holders) == 1:
            self._hold_for(pending, subscription)

    def _hold_for(self, pending: _Pending, subscription: Subscription) -> None:
        def reached() -> None:
            pending.waiting.discard(subscription)
            if not pending.waiting:
                self._reached.set()

        subscription.feed.hold(subscription, pending.stop_in(subscription), reached)

    def _release(self, pending: _Pending, subscription: Subscription) -> None:
        holders = self._holders[subscription]
        holders.remove(pending)
        if not holders:
            del self._holders[subscription]
            subscription.feed.release(subscription)
        elif subscription.has_ended:
            for other in holders:
                other.waiting.discard(subscription)
        else:
            self._hold_for(holders[0], subscription)

    # ---- the queue --------------------------------------------------------------------------

    async def _work(self) -> None:
        """Apply the queued commands in order, each when its subscriptions have reached it."""
        while self._queue:
            pending = self._queue[0]
            # The commands before may have changed which clients this one concerns.
            async for subscription in in_slices(self._concerned(pending.sent)):
                self._hold(pending, subscription)
            await self._wait(pending)
            await self._apply(pending.sent)
            async for subscription in in_slices(list(pending.held)):
                self._release(pending, subscription)
            self._queue.popleft()

    async def _wait(self, pending: _Pending) -> None:
        try:
            async with asyncio.timeout(_DELAY_S):
                while pending.waiting:
                    self._reached.clear()
                    await self._reached.wait()
        except TimeoutError:
            _log.info(
                "Command %s applied before %d subscriptions have received all events before it:"
                " their clients or Redis are too slow",
                pending.sent.id,
                len(pending.waiting),
            )

    async def _apply(self, sent: SentCommand) -> None:
        match sent.command:
            case DoorCommand(door=door, payload=payload):
                # A protocol that is disabled here has no clients to apply it to.
                if door in self.on_command:
                    await self.on_command[door].apply(payload)
            case _:
                self._apply_now(sent)

    def _apply_now(self, sent: SentCommand) -> None:
        command = sent.command
        match command:
            case DisconnectUser():
                closed = self._hub.disconnect_user(command.user, Reason.DISCONNECTED, command.door)
                self._closed[sent.id] = closed
                if len(self._closed) > _REMEMBERED:
                    self._closed.popitem(last=False)
                self._closing.set()
            case UnsubscribeUser():
                self._hub.drop_subscription(
                    command.channel, command.user, Reason.UNSUBSCRIBED, command.door
                )
            case DropRights():
                self._rights.drop(command.channel, command.user)
                self._hub.recheck(command.channel)
            case DoorCommand():
                raise AssertionError("a protocol's command is applied by `_apply`")
