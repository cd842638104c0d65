"""Wait until the hub has decided about a new session's first subscriptions.

If the server of some of the channels cannot be read, the client is connected without waiting for
them. These subscriptions are *deferred*: the hub accepts them as soon as their server can be read.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from relay.core.errors import Unavailable
from relay.core.model import EntryID

if TYPE_CHECKING:
    from relay.core.clock import RedisClock
    from relay.core.model import Channel
    from relay.hub.session import Session

_log = logging.getLogger(__name__)

_DECISION_S = 10.0
# Interval between log lines about the same problem, and the maximum number of problems that are
# counted separately.
_LOG_S = 60.0
_PROBLEMS = 100
# Interval between checks whether a server has become unreachable.
_LOOK_S = 0.25
# The clocks of the servers may differ by this much.
_CLOCKS_MS = 1000
NOT_READING = "streams cannot be read now"

NotReading = Callable[[Sequence["Channel"]], str]


class FirstSubscriptions:
    """The channels that a new session subscribes to, until the hub has decided about all."""

    __slots__ = ("_clock", "_decided", "_expected", "_not_reading", "_undecided", "away")

    def __init__(self, not_reading: NotReading, clock: RedisClock) -> None:
        """`not_reading`: see `DoorContext`."""
        self._not_reading = not_reading
        self._clock = clock
        self._expected = 0
        self._undecided: set[Channel] = set()
        self._decided: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        # Channels of deferred subscriptions, and why they cannot be read.
        self.away: dict[Channel, str] = {}

    def expect(self, channels: Iterable[Channel]) -> None:
        """Wait for decisions about these channels. Call this before subscribing."""
        self._undecided.update(channels)
        self._expected = len(self._undecided)

    @property
    def is_waiting(self) -> bool:
        """True until all decisions are there, or `fail` was called."""
        return not self._decided.done()

    def decide(self, channel: Channel) -> None:
        """Note that the hub has decided about this subscription."""
        self._undecided.discard(channel)
        if not self._undecided and not self._decided.done():
            self._decided.set_result(None)

    def fail(self, error: Exception) -> None:
        """Let `wait` raise this error. Do nothing if it is over."""
        if not self._decided.done():
            self._decided.set_exception(error)
            # Mark the error as retrieved, because `wait` may not be called any more.
            self._decided.exception()

    async def wait(self, session: Session, *, needs_one: bool = True) -> None:
        """Wait for the decisions, and defer the subscriptions whose server cannot be read.

        Raises:
            Unavailable: There is no decision after 10 s, or no server can be read. If `needs_one`
                is True: none of the channels can be read.
            Exception: The error of `fail`.
        """
        until = asyncio.get_running_loop().time() + _DECISION_S
        while not self._decided.done():
            self._defer(session, needs_one=needs_one)
            if asyncio.get_running_loop().time() >= until:
                raise Unavailable(self._not_reading(list(self._undecided)) or NOT_READING)
            await asyncio.wait([self._decided], timeout=_LOOK_S)
        self._decided.result()

    def _defer(self, session: Session, *, needs_one: bool) -> None:
        away = problems(self._not_reading, self._undecided)
        has_none = len(self.away) + len(away) == self._expected
        if away and has_none and (needs_one or self._not_reading([])):
            raise Unavailable(next(iter(away.values())))
        for channel, problem in away.items():
            # Without a subscription, the client waits for an answer about its rights.
            if (subscription := session.subscriptions.get(channel)) is not None:
                subscription.defer(_now(self._clock))
                self.away[channel] = problem
                self.decide(channel)


class DeferredLog:
    """Logs that clients were connected without some of their channels.

    For protocols that have no message for it. All clients of a worker share one object.
    """

    def __init__(self, clients: str) -> None:
        """`clients` names the protocol's clients."""
        self._clients = clients
        # By problem: the time of the last line, and the channels that were deferred since then.
        self._reported: dict[str, tuple[float, int]] = {}

    def report(self, away: Mapping[Channel, str]) -> None:
        """Log each problem at most once a minute, with the number of channels."""
        now = time.monotonic()
        for channel, problem in away.items():
            at, count = self._reported.get(problem, (None, 0))
            count += 1
            if at is not None and now < at + _LOG_S:
                self._reported[problem] = at, count
                continue
            if len(self._reported) >= _PROBLEMS:
                self._reported.clear()
            self._reported[problem] = now, 0
            _log.warning(
                "Connected %s clients without %d of their channels, the last one is %s (%s); their"
                " events follow when the server is read again",
                self._clients,
                count,
                channel,
                problem,
            )


def problems(not_reading: NotReading, channels: Iterable[Channel]) -> dict[Channel, str]:
    """Return the channels that cannot be read now, and why. `not_reading`: see `DoorContext`."""
    channels = list(channels)
    if not not_reading(channels):
        return {}
    return {each: problem for each in channels if (problem := not_reading([each]))}


def defer_if_away(
    not_reading: NotReading, clock: RedisClock, session: Session, channel: Channel
) -> None:
    """Defer a subscription that is not confirmed to the client, if its server cannot be read."""
    if not_reading([channel]):
        session.defer(channel, _now(clock))


def _now(clock: RedisClock) -> EntryID:
    # In whole seconds, because each position of a client is looked up in the stream.
    return EntryID(max(0, int(clock.now()) * 1000 - _CLOCKS_MS), 0)
