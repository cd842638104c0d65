"""relay/protocols/pydio/accounts.py with Pydio's HTTP side."""

from __future__ import annotations

import asyncio
from typing import Any

import aiohttp
import pytest

from relay.protocols.pydio import accounts
from relay.protocols.pydio.accounts import Account, Accounts
from relay.protocols.pydio.credentials import Credentials
from relay.protocols.pydio.server import PydioServer
from relay.protocols.pydio.settings import PydioSettings
from tests.support.pydio import KEY, standing_in

ALICE = Credentials(cookies="AjaXplorer=alice")


class Browser:
    """A member that does nothing."""

    def rights_changed(self) -> None: ...

    def identity_changed(self, account: Account) -> None: ...

    def shut_out(self, reason: str) -> None: ...


async def test_an_account_is_kept_while_its_only_browser_reconnects(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(accounts, "_LOOK_S", 0.001)
    now = 0.0
    async with (
        standing_in() as pydio,
        aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar()) as http,
        asyncio.timeout(10),
        asyncio.TaskGroup() as tasks,
    ):
        pydio.login("alice", w_1="rw")
        settings = PydioSettings(auth_url=pydio.auth_url, key=KEY, recheck_s=60)

        def spawn(work: Any, *, name: str) -> None:
            tasks.create_task(work, name=name)

        site = Accounts(
            PydioServer(settings, http),
            settings,
            spawn=spawn,
            recheck=lambda _: None,
            clock=lambda: now,
        )
        running = tasks.create_task(site.run())
        async with site.entering(ALICE) as account:
            # The time for the next check comes before the browser is a member.
            now += 61
            while account.valid and account.due <= 60:
                await asyncio.sleep(0)
            assert account.valid
            browser = Browser()
            account.members.add(browser)
        # The check takes place a moment later.
        now += 1
        while account.checked_at < now:
            await asyncio.sleep(0)
        assert pydio.asked == ["alice", "alice"]
        # An account without browsers is removed when its time comes.
        site.leave(account, browser)
        now += 61
        while account.valid:
            await asyncio.sleep(0)
        running.cancel()
