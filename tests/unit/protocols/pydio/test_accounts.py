"""Pydio is asked again about connected browsers, and after each change of rights."""

from __future__ import annotations

import asyncio
from typing import cast

import aiohttp
import pytest

from relay.core.reasons import Reason
from relay.protocols.pydio import accounts as accounts_module
from relay.protocols.pydio.accounts import Account, Accounts
from relay.protocols.pydio.credentials import Credentials
from relay.protocols.pydio.identity import Identity
from relay.protocols.pydio.server import PydioServer
from relay.protocols.pydio.settings import PydioSettings
from tests.support.pydio import KEY, standing_in

ANN = Credentials(cookies="AjaXplorer=ann")


class Pydio:
    """Answers requests with `readable` of the moment at which they arrive."""

    def __init__(self) -> None:
        self.readable = frozenset({"1", "2"})
        self.requests: asyncio.Queue[int] = asyncio.Queue()
        self.gate = asyncio.Event()
        self.gate.set()
        self._count = 0

    def reload(self, settings: PydioSettings) -> None:
        pass

    async def authenticate(self, credentials: Credentials) -> Identity:
        del credentials
        readable = self.readable
        self._count += 1
        self.requests.put_nowait(self._count)
        await self.gate.wait()
        return Identity(user="ann", readable=readable)


class Browser:
    """Notes the account's callbacks."""

    def __init__(self) -> None:
        self.changes: asyncio.Queue[frozenset[str]] = asyncio.Queue()

    def rights_changed(self) -> None:
        pass

    def identity_changed(self, account: Account) -> None:
        self.changes.put_nowait(account.identity.readable)

    def disconnect(self, reason: Reason) -> None:
        raise AssertionError(reason)


async def test_asks_again_if_rights_change_during_a_request() -> None:
    pydio, browser = Pydio(), Browser()
    async with asyncio.timeout(30), asyncio.TaskGroup() as tasks:
        accounts = Accounts(
            cast(PydioServer, pydio),
            PydioSettings(auth_cache_s=0),
            spawn=tasks.create_task,
            recheck=lambda channel: None,
            loop=asyncio.get_running_loop(),
        )
        async with accounts.connecting(ANN) as account:
            account.members.add(browser)
        assert await pydio.requests.get() == 1
        pydio.gate.clear()
        accounts.rights_changed("ann")
        assert await pydio.requests.get() == 2
        # The running request has the old rights.
        pydio.readable = frozenset({"1"})
        accounts.rights_changed("ann")
        pydio.gate.set()
        assert await pydio.requests.get() == 3
        assert await browser.changes.get() == {"1"}
        accounts.close()


async def test_an_account_is_kept_while_its_only_browser_reconnects(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(accounts_module, "_CONNECTING_S", 0.001)
    loop = asyncio.get_running_loop()
    async with (
        standing_in() as pydio,
        aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar()) as http,
        asyncio.timeout(30),
        asyncio.TaskGroup() as tasks,
    ):
        pydio.login("ann", w_1="rw")
        settings = PydioSettings(auth_url=pydio.auth_url, key=KEY)
        accounts = Accounts(
            PydioServer(settings, http),
            settings,
            spawn=tasks.create_task,
            recheck=lambda _: None,
            loop=loop,
        )
        async with accounts.connecting(ANN) as account:
            # The account is checked before the browser is a member.
            accounts.rights_changed("ann")
            due = account.timer
            while account.timer is due:
                await asyncio.sleep(0)
            assert account.valid
            assert pydio.asked == ["ann"]
            browser = Browser()
            account.members.add(browser)
        while len(pydio.asked) < 2:
            await asyncio.sleep(0)
        # An account without browsers is removed at its next check, without a request.
        accounts.remove_member(account, browser)
        accounts.rights_changed("ann")
        while account.valid:
            await asyncio.sleep(0)
        assert not account.may_read("1")
        assert pydio.asked == ["ann", "ann"]
        accounts.close()
