"""Who is connected, and what they may read now: asked again after a time, and on a change.

An account is one credential; all browsers that bring the same share it. Its rule is asked by the
hub at every check of rights, so a change here takes effect with the next check, which is begun
here as well.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import logging
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Protocol

from relay.core.errors import Unauthorized, Unavailable
from relay.core.model import Channel, Principal
from relay.protocols.pydio.private_messages import EVERYBODY, NAMESPACE, workspace

if TYPE_CHECKING:
    from relay.protocols.pydio.credentials import Credentials
    from relay.protocols.pydio.identity import Identity
    from relay.protocols.pydio.server import PydioServer
    from relay.protocols.pydio.settings import PydioSettings

_log = logging.getLogger(__name__)

_LOOK_S = 0.25
# While Pydio is away it is asked more often than usual, but not by everybody at once.
_RETRY_S = 5.0
_SPREAD_S = 5.0


class Member(Protocol):
    """A browser of an account, as the account sees it."""

    def rights_changed(self) -> None:
        """The site's rights may have changed; Pydio's answer is the same."""

    def identity_changed(self, account: Account) -> None:
        """Its user is the same; group, masks or workspaces may differ."""

    def shut_out(self, reason: str) -> None:
        """The credential is no longer good, or nobody knows whether it is."""


class Account:
    """A credential and what Pydio said about it last. Times are of the loop's clock."""

    __slots__ = (
        "checked_at",
        "credentials",
        "due",
        "entering",
        "identity",
        "members",
        "principal",
        "valid",
    )

    def __init__(self, credentials: Credentials, identity: Identity, now: float) -> None:
        self.credentials = credentials
        self.members: set[Member] = set()
        # Browsers that are connecting, see `Accounts.entering`.
        self.entering = 0
        self.valid = True
        # When it is asked about again.
        self.due = now
        self.update(identity, now)

    def update(self, identity: Identity, now: float) -> None:
        """A new answer."""
        self.identity = identity
        self.checked_at = now
        groups = frozenset({identity.group_path} if identity.group_path else ())
        self.principal = Principal(
            user=identity.user, groups=groups, door="pydio", grant=self.grants
        )

    def grants(self, channel: Channel) -> bool:
        """The door's rule (`Principal.grant`): the workspaces that may be read, and the one for
        everybody."""
        namespace, _, repository = channel.partition(":")
        return (
            self.valid
            and namespace == NAMESPACE
            and (channel == EVERYBODY or repository in self.identity.readable)
        )

    def may_read(self, repository: str) -> bool:
        """By what was said last."""
        return self.valid and repository in self.identity.readable


class Accounts:
    """All of this worker. `run` must be running."""

    def __init__(
        self,
        server: PydioServer,
        settings: PydioSettings,
        *,
        spawn: Callable[..., object],
        recheck: Callable[[Channel], None],
        clock: Callable[[], float],
    ) -> None:
        self._server = server
        self._settings = settings
        self._spawn = spawn
        self._recheck = recheck
        self._clock = clock
        self._known: dict[Credentials, Account] = {}
        self._due: list[tuple[float, int, Account]] = []
        self._numbers = itertools.count()

    def reload(self, settings: PydioSettings) -> None:
        """For questions from now on."""
        self._settings = settings
        self._server.reload(settings)

    @asynccontextmanager
    async def entering(self, credentials: Credentials) -> AsyncIterator[Account]:
        """Yield the account of a browser that connects, and keep the account meanwhile.

        The browser becomes a member of the account inside. Without this, an account whose only
        browser reconnects could be removed as unused between Pydio's answer and the new member.

        Raises:
            Unauthorized: Pydio does not know the credentials.
            Unavailable: Pydio gave no answer.
        """
        account = await self._enter(credentials)
        account.entering += 1
        try:
            yield account
        finally:
            account.entering -= 1

    async def _enter(self, credentials: Credentials) -> Account:
        account = self._known.get(credentials)
        if account is not None and self._is_fresh(account):
            return account
        try:
            identity = await self._server.authenticate(credentials)
        except Unauthorized:
            known = self._known.get(credentials)
            if known is not None:
                self._end(known, "Pydio knows nobody by this any more")
            raise
        known = self._known.get(credentials)
        if known is not None and known.identity.user == identity.user:
            self._accept(known, identity)
            return known
        if known is not None:
            self._end(known, "somebody else has logged in")
        account = self._known[credentials] = Account(credentials, identity, self._clock())
        self._plan(account, self._settings.recheck_s * random.uniform(0.8, 1.0))  # noqa: S311
        return account

    async def renew(self, account: Account) -> None:
        """Ask again now, unless that has just been done; never raises."""
        if account.valid and not self._is_fresh(account):
            await self._ask_again(account)

    def ask_soon(self, user: str | None) -> None:
        """Their rights may have changed; None: everybody's."""
        for account in list(self._known.values()):
            if user in (None, account.identity.user):
                for member in list(account.members):
                    member.rights_changed()
                # All of a site are not asked about in the same moment.
                self._plan(account, random.uniform(0.0, _SPREAD_S) if user is None else 0.0)  # noqa: S311

    def leave(self, account: Account, member: Member) -> None:
        """A browser has gone."""
        account.members.discard(member)

    async def run(self) -> None:
        """For ever: asks again about those whose time has come."""
        while True:
            await asyncio.sleep(_LOOK_S)
            now = self._clock()
            while self._due and self._due[0][0] <= now:
                due, _, account = heapq.heappop(self._due)
                if not account.valid or due != account.due:
                    continue
                if account.members:
                    self._spawn(self._on_time(account), name="pydio rights")
                elif account.entering:
                    self._plan(account, _LOOK_S)
                elif self._known.get(account.credentials) is account:
                    del self._known[account.credentials]
                    account.valid = False

    def _is_fresh(self, account: Account) -> bool:
        return account.valid and self._clock() - account.checked_at < self._settings.auth_cache_s

    def _plan(self, account: Account, in_s: float) -> None:
        # What was planned before is passed over when its time comes.
        account.due = self._clock() + in_s
        heapq.heappush(self._due, (account.due, next(self._numbers), account))

    async def _on_time(self, account: Account) -> None:
        settings = self._settings
        if await self._ask_again(account):
            # Not all of a restart in the same moment, and never later than promised.
            self._plan(account, settings.recheck_s * random.uniform(0.8, 1.0))  # noqa: S311
        elif account.valid:
            left = account.checked_at + settings.hold_s - self._clock()
            if left <= 0:
                self._end(account, "Pydio gives no answer")
            else:
                self._plan(account, min(left, _RETRY_S, settings.recheck_s))

    async def _ask_again(self, account: Account) -> bool:
        """Whether Pydio has answered and the account stands."""
        try:
            identity = await self._server.authenticate(account.credentials)
        except Unauthorized:
            self._end(account, "Pydio knows nobody by this any more")
            return False
        except Unavailable:
            return False
        if identity.user != account.identity.user:
            self._end(account, "somebody else has logged in")
            return False
        self._accept(account, identity)
        return True

    def _accept(self, account: Account, identity: Identity) -> None:
        before = account.identity
        account.update(identity, self._clock())
        if identity == before:
            return
        for repository in before.readable - identity.readable:
            self._recheck(workspace(repository))
        for member in list(account.members):
            member.identity_changed(account)

    def _end(self, account: Account, reason: str) -> None:
        account.valid = False
        if self._known.get(account.credentials) is account:
            del self._known[account.credentials]
        for member in list(account.members):
            member.shut_out(reason)
