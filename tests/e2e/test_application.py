"""Read access granted by the application, and namespaces that need no permission."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from tests.support.clients import Native, Refused, native, redis
from tests.support.relay import RelayProcess
from tests.support.valkey import Server

pytestmark = pytest.mark.redis

# Long enough for the test's own server on a busy machine.
TIMEOUT_MS = 4000
CACHE_S = 1.5


@dataclass
class Application:
    """A real HTTP server on its own port. The test sets its responses."""

    readers: set[str] = field(default_factory=set)
    asked: list[dict[str, Any]] = field(default_factory=list)
    tokens: set[str | None] = field(default_factory=set)
    status: int = 200
    body: str | None = None
    delay_s: float = 0
    url: str = ""

    async def answer(self, request: web.Request) -> web.Response:
        """Handle the relay's POST request with {user, channel, groups}."""
        question = await request.json()
        self.asked.append(question)
        self.tokens.add(request.headers.get("Authorization"))
        await asyncio.sleep(self.delay_s)
        if self.body is not None:
            return web.Response(status=self.status, text=self.body)
        return web.json_response({"read": question["user"] in self.readers}, status=self.status)


@asynccontextmanager
async def _served(application: Application) -> AsyncIterator[None]:
    app = web.Application()
    app.router.add_post("/may-read", application.answer)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        application.url = f"http://127.0.0.1:{runner.addresses[0][1]}/may-read"
        yield
    finally:
        await runner.cleanup()


@dataclass
class Site:
    """The application, the relay and its clients."""

    application: Application
    relay: RelayProcess
    door: Native

    async def status(self, channel: str, user: str = "bob") -> int:
        """Try to subscribe, and return the HTTP status."""
        try:
            client = await self.door.sse(channel, token=self.relay.token(user, []))
        except Refused as exc:
            return exc.answer.status
        client.drop()
        return 200


@pytest.fixture
async def site(valkey: Server, tmp_path: Path) -> AsyncIterator[Site]:
    """Run a relay that uses the test's application as its rights source."""
    application = Application(readers={"bob"})
    async with _served(application):
        file = tmp_path / "relay.ini"
        file.write_text(
            f"[rights]\nhttp_url = {application.url}\nhttp_timeout_ms = {TIMEOUT_MS}\n"
            f"http_cache_s = {CACHE_S}\nhttp_token = app-secret\n"
            "[namespace:app]\nrights = http\n[namespace:mixed]\nrights = claims, hash, http\n"
            "[namespace:open]\nrights = anonymous\n"
        )
        relay = RelayProcess(valkey, flags=["-c", str(file)])
        await asyncio.to_thread(relay.start)
        try:
            async with native(relay) as door:
                yield Site(application, relay, door)
        finally:
            relay.kill()


async def test_the_application_grants_and_refuses_and_is_asked_once(site: Site) -> None:
    token = site.relay.token("bob", [], groups=["staff"])
    client = await site.door.sse("app:a", token=token)
    site.relay.xadd("app:a", data="1")
    assert (await client.next()).json() == 1
    assert await site.status("app:a", "eve") == 403
    many = await asyncio.gather(*(site.door.ws("app:b", token=token) for _ in range(10)))  # noqa: TID251
    for each in many:
        assert (await each.next())["reply"] == "subscribe"
    questions = [each for each in site.application.asked if each["channel"] == "app:b"]
    assert questions == [{"user": "bob", "channel": "app:b", "groups": ["staff"]}]
    assert site.application.tokens == {"Bearer app-secret"}


async def test_whatever_is_not_a_plain_yes_is_a_no(site: Site) -> None:
    for number, (status, body) in enumerate(
        [(500, None), (200, "no json"), (200, '{"read":1}'), (302, None), (403, '{"read":true}')]
    ):
        site.application.status, site.application.body = status, body
        assert await site.status(f"app:{number}") == 403, (status, body)
        assert site.application.asked[-1]["channel"] == f"app:{number}"


async def test_an_application_that_is_slow_or_gone_fails_closed_in_time(site: Site) -> None:
    # Longer than the test may take.
    site.application.delay_s = 300
    assert await site.status("app:slow") == 403
    # A user whose token grants the channel does not wait for the application.
    claimed = await site.door.sse("mixed:a")
    claimed.drop()
    assert [each["channel"] for each in site.application.asked] == ["app:slow"]


async def test_a_waiting_subscribe_does_not_hold_up_the_connection(site: Site) -> None:
    site.application.delay_s = 0.3
    client = await site.door.ws("app:a", token=site.relay.token("bob", []))
    assert (await client.ask(cmd="ping"))["reply"] == "ping"
    twice = await client.ask(cmd="subscribe", channel="app:a")
    assert twice["error"]["code"] == "bad_request"
    assert (await client.next())["reply"] == "subscribe"
    await client.send(cmd="subscribe", channel="app:b")
    await client.send(cmd="unsubscribe", channel="app:b")
    assert (await client.next())["reply"] == "unsubscribe"
    site.relay.xadd("app:b", data='"b"')
    site.relay.xadd("app:a", data='"a"')
    assert (await client.next())["data"] == "a"


async def test_an_answer_that_has_run_out_is_asked_again(site: Site) -> None:
    client = await site.door.sse("app:a", token=site.relay.token("bob", []))
    stays = await site.door.sse("mixed:a", token=site.relay.token("carol", ["mixed:*"]))
    site.application.readers.clear()
    (notice,) = await client.ended()
    assert (notice.event, notice.json()["reason"]) == ("relay:revoked", "rights_changed")
    assert len([each for each in site.application.asked if each["user"] == "bob"]) == 2
    site.relay.xadd("app:a", data='"secret"')
    site.relay.xadd("mixed:a", data="1")
    assert (await stays.next()).json() == 1


async def test_a_renewed_yes_interrupts_nothing(site: Site) -> None:
    client = await site.door.sse("app:a", token=site.relay.token("bob", []))
    async with asyncio.timeout(30):
        while len(site.application.asked) < 3:
            site.relay.xadd("app:a", data=str(len(site.application.asked)))
            assert (await client.next()).event is None


async def test_drop_rights_has_the_application_asked_at_once(site: Site, valkey: Server) -> None:
    client = await site.door.sse("app:a", token=site.relay.token("bob", []))
    site.application.readers.clear()
    words = ("command", "drop-rights", "channel", "app:a")
    redis(valkey, "XADD", "relay:control", "*", *words)
    (notice,) = await client.ended()
    assert notice.event == "relay:revoked"


async def test_a_refreshed_token_is_a_new_question(site: Site) -> None:
    client = await site.door.ws("app:a", token=site.relay.token("bob", [], groups=["staff"]))
    await client.next()
    site.application.readers.clear()
    await client.ask(cmd="refresh", token=site.relay.token("bob", [], groups=["guests"]))
    notice = await client.next()
    assert (notice["notice"], notice["reason"]) == ("revoked", "rights_changed")
    assert site.application.asked[-1]["groups"] == ["guests"]


async def test_revoke_wins_over_the_application(site: Site, valkey: Server) -> None:
    client = await site.door.sse("app:a", token=site.relay.token("bob", []))
    redis(valkey, "HSET", "relay:rights:{app:a}", "bob", "-")
    assert [block.event for block in await client.ended()] == ["relay:revoked"]
    assert await site.status("app:a") == 403


async def test_an_anonymous_namespace_is_open_to_all_and_no_other(site: Site) -> None:
    client = await site.door.sse("open:a", token="")
    socket = await site.door.ws("open:a", "app:a", token="")
    said = await socket.take(2)
    (refused,) = [each for each in said if "error" in each]
    assert (refused["error"]["code"], refused["channel"]) == ("forbidden", "app:a")
    site.relay.xadd("open:a", data="1")
    assert (await client.next()).json() == (await socket.next())["data"] == 1
