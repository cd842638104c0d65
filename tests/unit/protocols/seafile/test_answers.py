"""The sender of an event, as the log names it."""

from __future__ import annotations

import asyncio

import pytest
from aiohttp import ClientSession, web

from relay.protocols.seafile import answers
from tests.unit.transports.serving import serving


@pytest.mark.parametrize(
    ("forwarded", "expected"),
    [
        ("192.0.2.1, 10.0.0.1", "192.0.2.1, 10.0.0.1"),
        ("9" * 8000, "9" * 100),
        ("", "127.0.0.1"),
    ],
)
async def test_the_sender_is_named_in_a_few_characters(forwarded: str, expected: str) -> None:
    async def handle(request: web.Request) -> web.StreamResponse:
        return web.Response(text=answers.sender(request))

    async with serving(handle) as (port, _), ClientSession() as http, asyncio.timeout(30):
        url, headers = f"http://127.0.0.1:{port}/", {"X-Forwarded-For": forwarded}
        async with http.get(url, headers=headers) as response:
            assert await response.text() == expected
