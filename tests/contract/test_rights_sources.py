"""The application as a rights source: a real server that grants, rejects, fails or is slow."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from pydantic import SecretStr, ValidationError

from relay.config.settings import RightsSettings
from relay.core.model import Channel, Principal
from relay.rights.http import CONCURRENT, HttpRights

ANN = Principal(user="ann", groups=frozenset({"staff", "admin"}))
NEWS = Channel("news")


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class Application:
    """A real HTTP server. `answer` is its response, and `asked` stores the requests."""

    def __init__(self) -> None:
        self.asked: list[tuple[dict[str, Any], str | None]] = []
        self.arrived = asyncio.Condition()
        self.answer: Callable[[], Awaitable[web.StreamResponse]] = self.yes
        self.under_way = 0
        self.most_under_way = 0
        self.url = ""

    async def handle(self, request: web.Request) -> web.StreamResponse:
        assert request.method == "POST"
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            body = await request.json()
            async with self.arrived:
                self.asked.append((body, request.headers.get("Authorization")))
                self.arrived.notify_all()
            return await self.answer()
        finally:
            self.under_way -= 1

    async def yes(self) -> web.StreamResponse:
        return web.json_response({"read": True})

    async def no(self) -> web.StreamResponse:
        return web.json_response({"read": False})

    async def was_asked(self, times: int) -> None:
        async with asyncio.timeout(30), self.arrived:
            await self.arrived.wait_for(lambda: len(self.asked) >= times)


@pytest.fixture
async def application() -> AsyncIterator[Application]:
    application = Application()
    app = web.Application()
    app.router.add_route("*", "/rights", application.handle)
    # If relay followed a redirect, this would count its request.
    app.router.add_route("*", "/elsewhere", application.handle)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    application.url = f"http://127.0.0.1:{runner.addresses[0][1]}/rights"
    yield application
    await runner.cleanup()


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar()) as session:
        yield session


@pytest.fixture
def clock() -> Clock:
    return Clock()


Make = Callable[..., HttpRights]


@pytest.fixture
def make(application: Application, session: aiohttp.ClientSession, clock: Clock) -> Make:
    def make(cached: int = 100, **rest: Any) -> HttpRights:
        settings = RightsSettings(
            http_url=rest.pop("http_url", application.url),
            http_token=SecretStr("app-token"),
            http_timeout_ms=rest.pop("http_timeout_ms", 5000),
            **rest,
        )
        return HttpRights(settings, session, clock=clock, cached=cached)

    return make


async def test_the_request_has_user_channel_groups_and_token(
    application: Application, make: Make
) -> None:
    assert await make().ask(ANN, NEWS) is True
    assert application.asked == [
        ({"user": "ann", "channel": "news", "groups": ["admin", "staff"]}, "Bearer app-token")
    ]


async def test_the_request_without_a_token(
    application: Application, session: aiohttp.ClientSession
) -> None:
    assert await HttpRights(RightsSettings(http_url=application.url), session).ask(ANN, NEWS)
    assert application.asked[0][1] is None


async def test_both_answers_are_cached(application: Application, make: Make, clock: Clock) -> None:
    rights = make(http_cache_s=30)
    bob = Principal(user="bob")
    assert await rights.ask(ANN, NEWS) is True
    application.answer = application.no
    assert await rights.ask(bob, NEWS) is False
    clock.now += 29
    assert await rights.ask(ANN, NEWS) is True
    assert rights.cached(ANN, NEWS) is True
    assert rights.cached(bob, NEWS) is False
    assert rights.expires_in(ANN, NEWS) == pytest.approx(1)
    assert len(application.asked) == 2
    clock.now += 1
    assert rights.cached(ANN, NEWS) is None
    assert await rights.ask(ANN, NEWS) is False
    assert len(application.asked) == 3


def test_requires_a_cache_time() -> None:
    """Relay reads rights from the cache, so without a cache time it would always deny access."""
    with pytest.raises(ValidationError, match="http_cache_s"):
        RightsSettings(http_cache_s=0)


async def test_the_cache_is_bounded(make: Make) -> None:
    rights = make(cached=2)
    for name in ("a", "b", "c"):
        await rights.ask(ANN, Channel(name))
    assert rights.cached(ANN, Channel("a")) is None
    assert rights.cached(ANN, Channel("c")) is True


async def test_a_drop_applies_at_once(application: Application, make: Make) -> None:
    rights = make()
    assert await rights.ask(ANN, NEWS) is True
    application.answer = application.no
    rights.drop(user="bob")
    assert await rights.ask(ANN, NEWS) is True
    rights.drop(NEWS, "ann")
    assert await rights.ask(ANN, NEWS) is False


async def test_a_request_that_began_before_a_drop_is_repeated(
    application: Application, make: Make
) -> None:
    rights = make()
    go = asyncio.Event()

    async def old_yes() -> web.StreamResponse:
        await go.wait()
        return web.json_response({"read": True})

    application.answer = old_yes
    async with asyncio.TaskGroup() as tasks:
        asking = [tasks.create_task(rights.ask(ANN, NEWS)) for _ in range(3)]
        await application.was_asked(1)
        application.answer = application.no
        rights.drop(channel=NEWS)
        go.set()
    assert [task.result() for task in asking] == [False] * 3
    assert len(application.asked) == 2


async def test_the_repetitions_after_drops_are_limited(
    application: Application, make: Make
) -> None:
    rights = make()

    async def drops() -> web.StreamResponse:
        rights.drop(channel=NEWS)
        return web.json_response({"read": True})

    application.answer = drops
    assert await rights.ask(ANN, NEWS) is False
    assert len(application.asked) == 10


async def test_concurrent_identical_requests_are_sent_once(
    application: Application, make: Make
) -> None:
    rights = make()
    go = asyncio.Event()

    async def later() -> web.StreamResponse:
        await go.wait()
        return web.json_response({"read": True})

    application.answer = later
    async with asyncio.TaskGroup() as tasks:
        asking = [tasks.create_task(rights.ask(ANN, NEWS)) for _ in range(50)]
        other = tasks.create_task(rights.ask(Principal(user="ann"), NEWS))
        await application.was_asked(2)
        go.set()
    assert all(task.result() for task in [*asking, other])
    assert len(application.asked) == 2


async def test_a_cancelled_caller_does_not_affect_the_others(
    application: Application, make: Make
) -> None:
    rights = make()
    go = asyncio.Event()

    async def later() -> web.StreamResponse:
        await go.wait()
        return web.json_response({"read": True})

    application.answer = later
    async with asyncio.TaskGroup() as tasks:
        first = tasks.create_task(rights.ask(ANN, NEWS))
        second = tasks.create_task(rights.ask(ANN, NEWS))
        third = tasks.create_task(rights.ask(ANN, NEWS))
        await application.was_asked(1)
        third.cancel()
        first.cancel()
        await application.was_asked(2)
        go.set()
    assert first.cancelled()
    assert third.cancelled()
    assert second.result() is True
    assert len(application.asked) == 2


async def test_the_number_of_concurrent_requests_is_limited(
    application: Application, make: Make
) -> None:
    rights = make()
    go = asyncio.Event()

    async def later() -> web.StreamResponse:
        await go.wait()
        return web.json_response({"read": True})

    application.answer = later
    async with asyncio.TaskGroup() as tasks:
        asking = [
            tasks.create_task(rights.ask(ANN, Channel(f"c{number}")))
            for number in range(CONCURRENT * 3)
        ]
        await application.was_asked(CONCURRENT)
        go.set()
    assert all(task.result() for task in asking)
    assert application.most_under_way == CONCURRENT


async def test_a_timeout_denies_access(application: Application, make: Make) -> None:
    async def never() -> web.StreamResponse:
        await asyncio.Event().wait()
        raise AssertionError

    application.answer = never
    assert await make(http_timeout_ms=50).ask(ANN, NEWS) is False


async def test_waiting_for_a_request_slot_has_a_timeout(
    application: Application, make: Make
) -> None:
    async def never() -> web.StreamResponse:
        await asyncio.Event().wait()
        raise AssertionError

    application.answer = never
    rights = make(http_timeout_ms=20)
    async with asyncio.timeout(30), asyncio.TaskGroup() as tasks:
        asking = [
            tasks.create_task(rights.ask(ANN, Channel(f"c{number}")))
            for number in range(CONCURRENT * 20)
        ]
    assert not any(task.result() for task in asking)


async def test_an_endless_body_denies_access(make: Make) -> None:
    app = web.Application()

    async def drip(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b'{"read": true')
        await asyncio.Event().wait()
        raise AssertionError

    app.router.add_post("/", drip)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}/"
    assert await make(http_url=url, http_timeout_ms=50).ask(ANN, NEWS) is False
    await runner.cleanup()


@pytest.mark.parametrize(
    "body",
    [
        b"", b"true", b"[]", b"{}", b'{"read": 1}', b'{"read": "true"}', b'{"read": null}',
        b'{"read": true', b"\xff", b"[" * 50_000, b'{"read": true}' + b" " * 70_000,
        b'{"Read": true}',
    ],
)  # fmt: skip
async def test_any_answer_but_true_denies_access(
    application: Application, make: Make, body: bytes
) -> None:
    async def odd() -> web.StreamResponse:
        return web.Response(body=body, content_type="application/json")

    application.answer = odd
    assert await make().ask(ANN, NEWS) is False


@pytest.mark.parametrize("status", [201, 204, 301, 302, 307, 308, 401, 403, 404, 500, 503])
async def test_any_status_but_200_denies_access_and_redirects_are_not_followed(
    application: Application, make: Make, status: int
) -> None:
    async def other() -> web.StreamResponse:
        return web.Response(
            status=status, text='{"read": true}', headers={"Location": "/elsewhere"}
        )

    application.answer = other
    assert await make().ask(ANN, NEWS) is False
    assert len(application.asked) == 1


async def test_a_lost_connection_denies_access(make: Make) -> None:
    async def hang_up(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    server = await asyncio.start_server(hang_up, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    rights = make(http_url=f"http://127.0.0.1:{port}/")
    assert await rights.ask(ANN, NEWS) is False
    server.close()
    await server.wait_closed()
    assert await rights.ask(ANN, Channel("other")) is False


async def test_a_failure_is_cached_for_one_second(
    application: Application, make: Make, clock: Clock
) -> None:
    async def broken() -> web.StreamResponse:
        return web.Response(status=500)

    rights = make()
    application.answer = broken
    assert await rights.ask(ANN, NEWS) is False
    application.answer = application.yes
    clock.now += 0.9
    assert await rights.ask(ANN, NEWS) is False
    assert len(application.asked) == 1
    clock.now += 0.1
    assert await rights.ask(ANN, NEWS) is True


async def test_the_log_has_one_line_per_failure_and_no_secret(
    application: Application, make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    async def broken() -> web.StreamResponse:
        return web.Response(status=500, text="secret-body")

    rights = make(http_url=application.url + "?key=secret-key")
    application.answer = broken
    with caplog.at_level(logging.INFO, logger="relay"):
        for name in ("a", "b", "c"):
            await rights.ask(ANN, Channel(name))
        application.answer = application.yes
        await rights.ask(ANN, NEWS)
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
    assert "500" in caplog.text
    assert "secret" not in caplog.text
    assert "app-token" not in caplog.text
