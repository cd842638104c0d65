"""Session owners: one lookup per session, shared refreshes, and takeover after a crash."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

import pytest

from relay.transports.socket import handshakes
from relay.transports.socket.handshakes import Handshakes
from relay.transports.sockjs import registry as module
from relay.transports.sockjs import sessions
from relay.transports.sockjs.registry import SessionRegistry
from tests.support.sockjs import MemoryStore
from tests.unit.transports.serving import HANDSHAKE, raw_client
from tests.unit.transports.sockjs.conftest import ADDRESSES, RunSite, Site


def registry(store: MemoryStore, instance: str) -> SessionRegistry:
    def spawn(coroutine: object, *, name: str) -> object:
        return asyncio.get_running_loop().create_task(coroutine, name=name)  # type: ignore[arg-type]

    return SessionRegistry(door="d", instance=instance, store=store, spawn=spawn)


async def test_the_first_worker_to_claim_a_session_owns_it_until_it_releases_it() -> None:
    store = MemoryStore()
    one, two = registry(store, "one"), registry(store, "two")
    assert await one.owner("s") is None
    assert await one.claim("s") == "one"
    assert await two.claim("s") == "one"
    asked = store.asked
    # This answer comes from the cache.
    assert await two.owner("s") == await two.claim("s") == "one"
    assert store.asked == asked
    one.release("s")
    while store.values:
        await asyncio.sleep(0)
    two.forget("s")
    assert await two.owner("s") is None
    assert await two.claim("s") == "two"
    two.release("s")


async def test_the_cache_of_owners_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_KNOWN", 2)
    store = MemoryStore()
    one, two = registry(store, "one"), registry(store, "two")
    for name in "abc":
        await one.claim(name)
        await two.owner(name)
    asked = store.asked
    assert [await two.owner(name) for name in "cb"] == ["one", "one"]
    assert store.asked == asked
    assert await two.owner("a") == "one"
    assert store.asked == asked + 1
    for name in "abc":
        one.release(name)


async def test_all_entries_are_refreshed_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_REFRESH_S", 0.01)
    store = MemoryStore()
    one = registry(store, "one")
    for number in range(50):
        await one.claim(str(number))
    kept = dict(store.values)
    store.values.clear()
    asked = store.asked
    while not store.values:
        await asyncio.sleep(0.001)
    assert store.values == kept
    assert store.asked == asked + 1
    for number in range(50):
        one.release(str(number))
    await asyncio.sleep(0)
    assert one._timer is None


async def test_the_session_id_is_not_stored_in_redis() -> None:
    store = MemoryStore()
    one = registry(store, "one")
    await one.claim("secret\udcff")
    (name,) = store.values
    assert name.startswith("d:sockjs:")
    assert "secret" not in name
    one.release("secret\udcff")


async def test_only_one_worker_takes_over_from_a_dead_one() -> None:
    store = MemoryStore()
    dead, one, two = (registry(store, name) for name in ("dead", "one", "two"))
    await dead.claim("s")
    assert await one.claim("s") == await two.claim("s") == "dead"
    async with asyncio.TaskGroup() as tasks:
        both = [tasks.create_task(each.take_over("s", "dead")) for each in (one, two)]
    assert both[0].result() == both[1].result() == await dead.claim("s")
    # The worker was only frozen. It does not delete the registration of its successor.
    dead.release("s")
    for _ in range(5):
        await asyncio.sleep(0)
    assert len(store.values) == 2
    one.release("s")


def test_only_the_first_request_of_a_session_asks_redis(on_site: RunSite) -> None:
    async def main(site: Site) -> None:
        session = site.session()
        assert await site.post(session + "/xhr") == b"o\n"
        await site.send(session, "x")
        asked = site.store.asked
        for _ in range(10):
            await site.send(session, "x")
        assert site.store.asked == asked == (1 if site.mode == "local" else 2)

    on_site(main)


def test_sessions_without_a_message_are_limited(
    on_site: RunSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "_MAX_SILENT", 3)

    async def main(site: Site) -> None:
        # Requests to the other worker are passed on, so only the first opens sessions.
        site.ports[1] = site.ports[0]
        first = site.session()
        assert await site.post(first + "/xhr") == b"o\n"
        await site.send(first, "x")
        for _ in range(3):
            assert await site.post(site.session() + "/xhr") == b"o\n"
        written = len(site.store.values)
        refused = await site.fetch("POST", site.session() + "/xhr", b"")
        assert refused == (503, b"Too many sessions are being opened\n")
        assert len(site.store.values) == written
        # A client that has sent a message is not affected.
        assert await site.post(first + "/xhr") == b'a["x"]\n'

    on_site(main)


def test_an_overloaded_worker_opens_no_session(
    on_site: RunSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main(site: Site) -> None:
        first = site.session()
        assert await site.post(first + "/xhr") == b"o\n"
        await site.send(first, "x")
        monkeypatch.setattr(Handshakes, "_check_memory", _memory_is_short)
        for _ in range(4):
            refused = await site.fetch("POST", site.session() + "/xhr", b"")
            assert refused == (503, b"relay is overloaded; try again later\n")
        # Open sessions are not affected, whichever worker receives the request.
        await site.send(first, "y")
        assert await site.post(first + "/xhr") == b'a["x","y"]\n'

    on_site(main)


def test_sessions_that_are_opened_during_an_overload_wait_like_other_clients(
    on_site: RunSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    # No handshake is handled, and five clients may wait.
    for name, value in {
        "_FEWEST": 0,
        "_MOST": 0,
        "_AVERAGE_S": 1e9,
        "LONGEST_WAIT_S": 0.0045,
    }.items():
        monkeypatch.setattr(handshakes, name, value)
    monkeypatch.setattr(Handshakes, "_check_memory", lambda _: None)

    async def main(site: Site) -> None:
        # Both workers would have a queue of their own.
        site.ports[1] = site.ports[0]
        async with AsyncExitStack() as stack, asyncio.TaskGroup() as group:
            head = HANDSHAKE.replace(b"Host: x", b"Host: x\r\nX-Forwarded-For: 10.0.0.1")
            answers = []
            for _ in range(6):
                reader, _ = await stack.enter_async_context(raw_client(site.ports[0], head))
                answers.append(group.create_task(reader.readline()))
            # One is rejected, and five wait.
            await asyncio.wait(answers, return_when=asyncio.FIRST_COMPLETED)
            waiting = {
                group.create_task(
                    site.fetch("POST", site.session() + "/xhr", b"", X_Forwarded_For="10.0.0.2")
                )
                for _ in range(20)
            }
            # Two of them replace two of the others, and wait.
            rejected: set[asyncio.Task[tuple[int, bytes]]] = set()
            while len(rejected) < 18:
                done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                rejected |= done
            overloaded = (503, b"relay is overloaded; try again later\n")
            assert [each.result() for each in rejected] == [overloaded] * 18
            for name in ("_FEWEST", "_MOST"):
                monkeypatch.setattr(handshakes, name, 10)
            await asyncio.wait(waiting)
            assert [each.result() for each in waiting] == [(200, b"o\n")] * 2

    on_site(main)


def _memory_is_short(waiting: Handshakes) -> None:
    waiting._memory_short = True


def test_a_client_of_a_dead_worker_gets_a_new_session(on_site: RunSite) -> None:
    async def main(site: Site) -> None:
        if site.mode == "local":
            return
        session = site.session()
        assert await site.post(session + "/xhr") == b"o\n"  # The first worker opens the session.
        await site.send(session, "x")  # The second worker passes the request on.
        site.cluster.bury(ADDRESSES[0])
        site.ports[0] = site.ports[1]
        # The messages of the old session are unknown, so the client is informed of a new session.
        assert (await site.fetch("POST", session + "/xhr_send", b'["x"]'))[0] == 404
        assert await site.post(session + "/xhr") == b"o\n"
        await site.send(session, "y")
        assert await site.post(session + "/xhr") == b'a["y"]\n'

    on_site(main)


@pytest.mark.parametrize("path", ["xhr", "xhr_send", "xhr_streaming"])
def test_without_redis_new_sessions_are_rejected_and_old_ones_continue(
    on_site: RunSite, path: str
) -> None:
    async def main(site: Site) -> None:
        session = site.session()
        for _ in range(2):
            await site.fetch("POST", session + "/xhr", b"")
            await site.send(session, "x")

        site.store.away = True
        status, text = await site.fetch("POST", site.session() + "/" + path, b'["x"]')
        assert (status, text) == (503, b"Service Unavailable\n")
        assert await site.post(session + "/xhr") == b'a["x"]\n'

    on_site(main)
