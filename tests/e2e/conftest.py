"""Fixtures for the end-to-end tests: new clients and a new channel name for each test."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator

import pytest

from tests.support.clients import Native, native
from tests.support.relay import RelayProcess


@pytest.fixture
async def door(relay: RelayProcess) -> AsyncIterator[Native]:
    """Return clients whose token grants access to every channel."""
    async with native(relay) as clients:
        yield clients


@pytest.fixture
def channel(request: pytest.FixtureRequest) -> str:
    """Return a channel name that no other test uses."""
    name: str = request.node.name
    return f"e2e:{re.sub('[^a-z0-9_]+', '-', name.removeprefix('test_').lower())}"
