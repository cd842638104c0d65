"""Head and connection of an event stream."""

from __future__ import annotations

import asyncio

import pytest
from aiohttp import web

from relay.transports.socket import sse
from relay.transports.socket.reaper import Reaper
from relay.transports.socket.take_over import take_over
from tests.unit.transports.serving import GET, Run, head_of, raw_client, serving


def test_a_header_with_a_line_break_is_rejected() -> None:
    with pytest.raises(ValueError, match="header"):
        sse.head({"X-A": "b\r\nX-C: d"})


def test_a_client_that_keeps_sending_is_disconnected(run: Run, reaper: Reaper) -> None:
    async def main() -> None:
        closed = asyncio.Event()

        async def handler(request: web.Request) -> web.StreamResponse:
            client = sse.SseConnection(buffer_bytes=65536, reaper=reaper)
            client.on_closed = closed.set
            return take_over(request, sse.head(), client)

        async with (
            serving(handler) as (port, _),
            raw_client(port, GET) as (reader, writer),
        ):
            await head_of(reader)
            writer.write(b"x" * 60_000)
            for _ in range(10):
                await asyncio.sleep(0)
            assert not closed.is_set()
            writer.write(b"x" * 10_000)
            await closed.wait()

    run(main())
