"""Accounts of connected browsers: which workspaces they may read, and when Pydio is asked again.

An account is one set of credentials. All browsers that send the same credentials share it. The hub
calls `Account.grants` at every check of rights, so a change takes effect at the next check, which
`Accounts` also starts.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Protocol

from relay.core.errors import Unauthorized, Unavailable
from relay.core.model import Channel, Principal
from relay.core.reasons import Reason
from relay.protocols.pydio.private_messages import BROADCAST, NAMESPACE, workspace

if TYPE_CHECKING:
    import asyncio

    from relay.protocols.pydio.credentials import Credentials
    from relay.protocols.pydio.identity import Identity
    from relay.protocols.pydio.server import PydioServer
    from relay.protocols.pydio.settings import PydioSettings

# While Pydio is unavailable, each account is retried after this time.
_RETRY_S = 5.0
# An account that only has connecting browsers is checked again after this time.
_CONNECTING_S = 0.25
# If the rights of all users may have changed, spread the requests over this time.
_SPREAD_S = 5.0


class AccountMember(Protocol):
    """A browser that uses an account."""

    __slots__ = ()

    def rights_changed(self) -> None:
        """Rights that are stored in relay may have changed. Pydio's answer is the same."""

    def identity_changed(self, account: Account) -> None:
        """The user's group, masks or workspaces may have changed."""

    def disconnect(self, reason: Reason) -> None:
        """Close the connection: the credentials are invalid, or could not be validated in time."""


class Account:
    """A set of credentials and Pydio's last answer about it. Times are of the loop's clock."""

    __slots__ = (
        "checked_at",
        "connecting",
        "credentials",
        "identity",
        "members",
        "principal",
        "timer",
        "valid",
    )

    def __init__(self, credentials: Credentials, identity: Identity, now: float) -> None:
        self.credentials = credentials
        self.members: set[AccountMember] = set()
        # Number of connecting browsers, see `Accounts.connecting`.
        self.connecting = 0
        self.valid = True
        # Asks Pydio again.
        self.timer: asyncio.TimerHandle | None = None
        self.update(identity, now)

    def update(self, identity: Identity, now: float) -> None:
        """Store a new answer of Pydio."""
        self.identity = identity
        self.checked_at = now
        groups = frozenset({identity.group_path} if identity.group_path else ())
        self.principal = Principal(
            user=identity.user, groups=groups, door="pydio", grant=self.grants
        )

    def grants(self, channel: Channel) -> bool:
        """Return True for the broadcast channel and for workspaces that the user may read.

        This is the protocol's rule in `Principal.grant`.
        """
        namespace, _, repository = channel.partition(":")
        return (
            self.valid
            and namespace == NAMESPACE
            and (channel == BROADCAST or repository in self.identity.readable)
        )

    def may_read(self, repository: str) -> bool:
        """Return True if Pydio's last answer lets the user read this workspace."""
        return self.valid and repository in self.identity.readable

    def stop_timer(self) -> None:
        """Do not ask Pydio again."""
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None


class Accounts:
    """All accounts of this worker."""

    def __init__(
        self,
        server: PydioServer,
        settings: PydioSettings,
        *,
        spawn: Callable[..., object],
        recheck: Callable[[Channel], None],
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self._server = server
        self._settings = settings
        self._spawn = spawn
        self._recheck = recheck
        self._loop = loop
        self._known: dict[Credentials, Account] = {}
        server.user_of = self._user_of

    def _user_of(self, credentials: Credentials) -> str:
        known = self._known.get(credentials)
        return known.identity.user if known is not None else ""

    def reload(self, settings: PydioSettings) -> None:
        """Use new settings for new requests."""
        self._settings = settings
        self._server.reload(settings)

    @asynccontextmanager
    async def connecting(self, credentials: Credentials) -> AsyncIterator[Account]:
        """Yield the account of a browser that connects, and keep the account meanwhile.

        The browser becomes a member of the account inside. Without this, an account whose only
        browser reconnects could be removed as unused between Pydio's answer and the new member.

        Raises:
            Unauthorized: Pydio does not accept the credentials.
            Unavailable: Pydio did not give a valid answer in time.
        """
        account = await self._authenticate(credentials)
        account.connecting += 1
        try:
            yield account
        finally:
            account.connecting -= 1

    async def _authenticate(self, credentials: Credentials) -> Account:
        account = self._known.get(credentials)
        if account is not None and self._is_fresh(account):
            return account
        try:
            identity = await self._server.authenticate(credentials)
        except Unauthorized:
            known = self._known.get(credentials)
            if known is not None:
                self._end(known, Reason.EXPIRED)
            raise
        known = self._known.get(credentials)
        if known is not None and known.identity.user == identity.user:
            self._accept(known, identity)
            return known
        if known is not None:
            self._end(known, Reason.OTHER_USER)
        account = self._known[credentials] = Account(credentials, identity, self._loop.time())
        self._schedule(account, self._recheck_s())
        return account

    async def renew(self, account: Account) -> None:
        """Ask Pydio again, unless its last answer is recent. Errors are handled."""
        if account.valid and not self._is_fresh(account):
            await self._ask_again(account)

    def rights_changed(self, user: str | None) -> None:
        """Ask Pydio again soon about this user, or about all users if it is None."""
        for account in list(self._known.values()):
            if user in (None, account.identity.user):
                for member in list(account.members):
                    member.rights_changed()
                self._schedule(account, random.uniform(0.0, _SPREAD_S) if user is None else 0.0)  # noqa: S311

    def remove_member(self, account: Account, member: AccountMember) -> None:
        """Remove a browser whose connection is closed."""
        account.members.discard(member)

    def close(self) -> None:
        """Stop asking Pydio."""
        for account in self._known.values():
            account.stop_timer()

    def _is_fresh(self, account: Account) -> bool:
        age_s = self._loop.time() - account.checked_at
        return account.valid and age_s < self._settings.auth_cache_s

    def _recheck_s(self) -> float:
        # Earlier than the setting by a random time, so that the accounts of browsers that connected
        # together, for example after a restart, are not checked together.
        return self._settings.recheck_s * random.uniform(0.8, 1.0)  # noqa: S311

    def _schedule(self, account: Account, in_s: float) -> None:
        account.stop_timer()
        account.timer = self._loop.call_later(in_s, self._on_timer, account)

    def _on_timer(self, account: Account) -> None:
        account.timer = None
        if not account.valid:
            return
        if account.members:
            self._spawn(self._revalidate(account), name="pydio rights")
        elif account.connecting:
            self._schedule(account, _CONNECTING_S)
        else:
            self._remove(account)

    async def _revalidate(self, account: Account) -> None:
        answered = await self._ask_again(account)
        if account.timer is not None:
            # `rights_changed` was called meanwhile, and this answer may be older.
            return
        if answered:
            self._schedule(account, self._recheck_s())
        elif account.valid:
            left_s = account.checked_at + self._settings.hold_s - self._loop.time()
            if left_s <= 0:
                self._end(account, Reason.UNAVAILABLE)
            else:
                self._schedule(account, min(left_s, _RETRY_S, self._settings.recheck_s))

    async def _ask_again(self, account: Account) -> bool:
        """Return True if Pydio has answered and the account is still valid."""
        try:
            identity = await self._server.authenticate(account.credentials)
        except Unauthorized:
            self._end(account, Reason.EXPIRED)
            return False
        except Unavailable:
            return False
        if identity.user != account.identity.user:
            self._end(account, Reason.OTHER_USER)
            return False
        self._accept(account, identity)
        return True

    def _accept(self, account: Account, identity: Identity) -> None:
        before = account.identity
        account.update(identity, self._loop.time())
        if identity == before:
            return
        for repository in before.readable - identity.readable:
            self._recheck(workspace(repository))
        for member in list(account.members):
            member.identity_changed(account)

    def _end(self, account: Account, reason: Reason) -> None:
        self._remove(account)
        for member in list(account.members):
            member.disconnect(reason)

    def _remove(self, account: Account) -> None:
        account.valid = False
        account.stop_timer()
        if self._known.get(account.credentials) is account:
            del self._known[account.credentials]
