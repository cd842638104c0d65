"""Publishers that never retry: their requests while relay stops, and their order across workers."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Sequence
from contextlib import suppress

import aiohttp
import pytest

from tests.support.clients import native, redis, stream_key, until
from tests.support.pydio import KEY, browse, publish, standing_in, tree
from tests.support.relay import RelayProcess
from tests.support.valkey import Server, free_port
from tests.support.workers import workers

# PHP starts slowly on a machine that runs other tests too.
pytestmark = [pytest.mark.redis, pytest.mark.timeout(120)]
ACCEPTED = "HTTP/1.1 101 Switching Protocols"
STOPPING = "this worker is stopping\n"


def contents(server: Server, channel: str) -> list[str]:
    return [
        dict(fields)[b"data"].decode()
        for _, fields in redis(server, "XRANGE", stream_key(channel), "-", "+")
    ]


def made(server: Server, *settings: str, flags: Sequence[str] = ()) -> RelayProcess:
    return RelayProcess(server, settings=[f"protocol:pydio.key={KEY}", *settings], flags=flags)


@pytest.mark.parametrize("path", ["/private", "/public"])
async def test_requests_one_after_the_other_keep_their_order_over_workers(
    valkey: Server, path: str
) -> None:
    name = f"order-{path[1:]}"
    relay = made(
        valkey,
        f"protocol:pydio.private_path={path}",
        flags=("--workers", "2"),
    )
    await asyncio.to_thread(relay.start)
    try:
        sent = [tree(f"{number}") for number in range(120)]
        requests = [[{"REPO_ID": name, "CONTENT": content}] for content in sent]
        assert await publish(relay.port, *requests, path=path) == [ACCEPTED] * len(sent)
        await until(lambda: redis(valkey, "XLEN", stream_key(f"pydio:{name}")) == len(sent))
        assert contents(valkey, f"pydio:{name}") == sent
        # The worker that has read all requests dies. Its successor must not reorder events.
        os.kill(workers(relay)[1], signal.SIGKILL)
        more = [tree(f"after {number}") for number in range(30)]
        requests = [[{"REPO_ID": f"{name}-2", "CONTENT": content}] for content in more]
        answers = await publish(relay.port, *requests, path=path)
        accepted = [
            content for content, answer in zip(more, answers, strict=True) if answer == ACCEPTED
        ]
        # Requests in the queue of the dying worker are lost with it.
        assert len(accepted) >= 25
        key = f"pydio:{name}-2"
        await until(lambda: redis(valkey, "XLEN", stream_key(key)) == len(accepted))
        assert contents(valkey, key) == accepted
    finally:
        await asyncio.to_thread(relay.kill)


async def _is_rejected(http: aiohttp.ClientSession, url: str) -> bool:
    try:
        async with http.get(url):
            return False
    except (aiohttp.ClientError, ConnectionError):
        return True


@pytest.mark.parametrize(("count", "own"), [(1, "own path"), (2, "shared"), (2, "own port")])
async def test_php_is_served_until_the_relay_has_ended(
    valkey: Server, count: int, own: str
) -> None:
    name = f"stop-{count}-{own.replace(' ', '-')}"
    async with standing_in() as pydio, aiohttp.ClientSession() as http:
        pydio.login("alice").acl = {name: "rw"}
        port = free_port()
        more = {
            "shared": ["protocol:pydio.private_path=/public"],
            "own path": [],
            "own port": [f"protocol:pydio.private_port={port}"],
        }[own]
        settings = [f"protocol:pydio.auth_url={pydio.auth_url}", "protocol:pydio.drain_s=5", *more]
        relay = made(valkey, *settings, flags=("--workers", str(count)))
        await asyncio.to_thread(relay.start)
        try:
            where = port if own == "own port" else relay.port
            path = "/public" if own == "shared" else "/private"
            page = await browse(http, relay, "alice")
            await page.register(name)
            # The stream is created when a worker follows it for the browser.
            await until(lambda: redis(valkey, "EXISTS", stream_key(f"pydio:{name}")))
            sent: list[str] = []

            async def keep_publishing() -> str:
                """Send one PHP request after the other until relay has ended."""
                while True:
                    # Each request starts a PHP.
                    await asyncio.sleep(0.1)
                    content = tree(f"{len(sent)}")
                    (answer,) = await publish(
                        where, [{"REPO_ID": name, "CONTENT": content}], path=path
                    )
                    if answer != ACCEPTED:
                        return answer
                    sent.append(content)

            seen = []
            async with asyncio.TaskGroup() as group:
                publishing = group.create_task(keep_publishing())
                await until(lambda: len(sent) > 2)
                relay.send(signal.SIGTERM)
                await until(lambda: any("stopping" in line for line in relay.log))
                # Then new clients get no response. They reconnect, as after a rejection.
                async with asyncio.timeout(30):
                    while not await _is_rejected(http, f"{relay.url}/sse?channel=x"):
                        await asyncio.sleep(0.05)
                with pytest.raises((aiohttp.ClientError, ConnectionError)):
                    await browse(http, relay, "alice")
                # On a busy machine, relay may have ended by now.
                with suppress(aiohttp.ClientConnectionError):
                    async with http.get(f"{relay.url}/readyz") as answer:
                        assert (answer.status, await answer.text()) == (503, STOPPING)
                with suppress(AssertionError):
                    while True:
                        seen.append(await page.next())
            assert "refused" in publishing.result()
            assert await asyncio.to_thread(relay.ended) == 0
        finally:
            await asyncio.to_thread(relay.kill)
    # Each accepted event is in the stream, and the page received all except the last ones.
    assert contents(valkey, f"pydio:{name}") == sent
    assert seen == sent[: len(seen)]
    assert len(seen) > len(sent) / 2
    log = "\n".join(relay.log)
    assert "Traceback" not in log


@pytest.mark.parametrize("count", [1, 2])
async def test_the_api_is_served_until_the_relay_has_ended(valkey: Server, count: int) -> None:
    relay = RelayProcess(
        valkey,
        settings=["protocol:centrifugo.secret=s", "protocol:centrifugo.insecure_api=true"],
        flags=("--workers", str(count)),
    )
    relay.settings.append("node.drain_s=2")
    await asyncio.to_thread(relay.start)
    sent: list[int] = []
    try:
        async with native(relay) as door, aiohttp.ClientSession() as http:
            streams = [await door.sse(f"api-stop-{count}") for _ in range(4)]
            relay.send(signal.SIGTERM)
            await until(lambda: any("stopping" in line for line in relay.log))

            async def keep_publishing() -> None:
                """Send one request after the other, each on its own connection."""
                headers = {"Content-Type": "application/json", "Connection": "close"}
                while True:
                    params = {"channel": f"api-stop-{count}", "data": len(sent)}
                    body = json.dumps({"method": "publish", "params": params})
                    async with http.post(f"{relay.url}/api/", data=body, headers=headers) as answer:
                        assert (await answer.json())[0]["error"] is None
                    sent.append(len(sent))

            with pytest.raises((aiohttp.ClientError, ConnectionError)):
                await keep_publishing()
            assert len(streams) == 4
        assert await asyncio.to_thread(relay.ended) == 0
    finally:
        await asyncio.to_thread(relay.kill)
    assert len(sent) > 3
    assert contents(valkey, f"api-stop-{count}") == [str(each) for each in sent]


async def test_a_request_that_never_ends_does_not_hold_up_the_stop(valkey: Server) -> None:
    relay = RelayProcess(valkey, settings=["protocol:centrifugo.secret=s"])
    await asyncio.to_thread(relay.start)
    head = b"POST /api/ HTTP/1.1\r\nHost: x\r\nX-API-Sign: x\r\nContent-Length: 1000\r\n\r\n{"
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", relay.port)
        writer.write(head)
        # The response shows that the bytes before it have been read.
        async with native(relay) as door:
            assert await door.status("/healthz") == 200
        relay.send(signal.SIGTERM)
        assert await asyncio.to_thread(relay.ended, 12) == 0
        writer.close()
    finally:
        await asyncio.to_thread(relay.kill)
