"""Which passwords the console accepts at the addresses that other protocols request."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from pydantic import SecretStr

from relay.config.settings import ConsoleSettings
from relay.console.routes import Console

SERVICES = cast("Any", SimpleNamespace(store=None, attempts=None, examine=None))


@pytest.mark.parametrize(
    ("port", "password", "admin_password", "status"),
    [
        (0, "of operators", "", 200),
        (0, "", "of administrators", 200),
        # The console has a listener of its own, so its password is not for this one.
        (8443, "of operators", "", 404),
        (8443, "of operators", "of administrators", 200),
    ],
)
async def test_addresses_of_another_protocol(
    port: int, password: str, admin_password: str, status: int
) -> None:
    console = Console(SERVICES, ConsoleSettings(port=port, password=SecretStr(password)))
    app = web.Application()
    app.add_routes(console.at("/admin", lambda: SecretStr(admin_password)))
    async with TestClient(TestServer(app)) as client:
        assert (await client.get("/admin/console/")).status == status
    own = web.Application()
    own.add_routes(console.routes)
    async with TestClient(TestServer(own)) as client:
        assert (await client.get("/console/")).status == (200 if password else 404)
