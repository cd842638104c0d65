"""Read rights of this worker's clients: check them, request answers, renew them before they expire.

The rights hash in Redis is read together with the stream (`relay.hub.feed`). Answers of the
application take longer: they are requested before a client joins a channel, and again before they
expire.
"""

from __future__ import annotations

import heapq
import itertools
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from typing_extensions import override

from relay.hub.feed import Rights

if TYPE_CHECKING:
    from relay.core.model import Channel, Position, Principal
    from relay.hub.hub import Hub
    from relay.hub.session import Session
    from relay.rights.policy import Policy


class ReadRights(Rights):
    """Decides from the policy and the application's cached answers; the hub's `Rights`."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        # Protocols that cache answers about rights register here. None means every channel or user.
        self.on_drop: list[Callable[[Channel | None, str | None], None]] = []
        # Answers of the application that local clients depend on, by expiry time (`monotonic`).
        self._due: list[tuple[float, int, Principal, Channel]] = []
        self._numbers = itertools.count()
        # Missing answers that are requested at the next renewal.
        self._missing: set[tuple[str, frozenset[str], Channel]] = set()

    @override
    def allowed(
        self, principal: Principal, channel: Channel, hash_value: bytes | None, *, admitted: bool
    ) -> bool:
        answer = None
        if self.policy.needs_http(principal, channel) and self.policy.http is not None:
            answer = self.policy.http.cached(principal, channel)
            if answer is None and admitted:
                # The answer was dropped, or a token refresh changed the user's groups. The client
                # keeps its right until the next renewal has the application's answer.
                self.renew_later(principal, channel)
                answer = True
        return self.policy.allowed(principal, channel, hash_value, answer, now=time.time())

    @override
    def asks_again(self, principal: Principal, channel: Channel) -> bool:
        http = self.policy.http
        if http is None or not self.policy.needs_http(principal, channel):
            return False
        if http.cached(principal, channel) is not None:
            return False
        question = principal.user, principal.groups, channel
        if question not in self._missing:
            self._missing.add(question)
            self.renew_later(principal, channel)
        return True

    def renew_later(self, principal: Principal, channel: Channel) -> None:
        """Request the application's answer again when the cached one expires."""
        if self.policy.http is not None:
            due = time.monotonic() + (self.policy.http.expires_in(principal, channel) or 0.0)
            heapq.heappush(self._due, (due, next(self._numbers), principal, channel))

    def pop_due(self, now: float) -> Iterator[tuple[Principal, Channel]]:
        """Yield the expired answers and remove them from the schedule."""
        while self._due and self._due[0][0] <= now:
            _, _, principal, channel = heapq.heappop(self._due)
            self._missing.discard((principal.user, principal.groups, channel))
            yield principal, channel

    def drop(self, channel: Channel | None, user: str | None) -> None:
        """Drop cached answers. None means every channel or user."""
        if self.policy.http is not None:
            self.policy.http.drop(channel, user)
        for on_drop in self.on_drop:
            on_drop(channel, user)


class Admission:
    """Lets clients join channels, and rechecks their rights while they are connected."""

    def __init__(self, *, rights: ReadRights, hub: Hub, spawn: Callable[..., object]) -> None:
        self._rights = rights
        self._hub = hub
        self._spawn = spawn

    def subscribe(self, session: Session, channel: Channel, start: Position | None) -> None:
        """Subscribe now, or once the application has answered."""
        policy = self._rights.policy
        if not policy.needs_http(session.principal, channel) or policy.http is None:
            self._hub.subscribe(session, channel, start)
        elif policy.http.cached(session.principal, channel) is None:
            self._hub.reserve(session, channel)
            self._spawn(self._ask_then_subscribe(session, channel, start), name=f"rights {channel}")
        else:
            self._rights.renew_later(session.principal, channel)
            self._hub.subscribe(session, channel, start)

    async def _ask_then_subscribe(
        self, session: Session, channel: Channel, start: Position | None
    ) -> None:
        http = self._rights.policy.http
        if http is not None:
            await http.ask(session.principal, channel)
            self._rights.renew_later(session.principal, channel)
        self._hub.subscribe_reserved(session, channel, start)

    def renew(self) -> None:
        """End clients whose credential has expired, and request expired answers again."""
        for session in self._hub.sessions_expiring(time.time()):
            self._hub.expire(session)
        for principal, channel in self._rights.pop_due(time.monotonic()):
            if _is_subscribed(self._hub, principal, channel):
                self._spawn(self._ask_again(principal, channel), name=f"rights {channel}")

    async def _ask_again(self, principal: Principal, channel: Channel) -> None:
        http = self._rights.policy.http
        if http is None:
            return
        allowed = await http.ask(principal, channel)
        self._rights.renew_later(principal, channel)
        if not allowed:
            self._hub.recheck(channel)
        elif (feed := self._hub.feed(channel)) is not None:
            feed.examine_waiting()


def _is_subscribed(hub: Hub, principal: Principal, channel: Channel) -> bool:
    feed = hub.feed(channel)
    if feed is None:
        return False
    # Compare the parameters of the request only: a refreshed token creates another principal.
    parameters = (principal.user, principal.groups)
    members = itertools.chain(feed.subscriptions(), feed.waiting())
    sessions = (subscription.session for subscription in members)
    return any((each.principal.user, each.principal.groups) == parameters for each in sessions)
