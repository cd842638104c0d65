"""Channel names for single tests, as in tests/e2e."""

from __future__ import annotations

import re

import pytest


@pytest.fixture
def channel(request: pytest.FixtureRequest) -> str:
    """Return a channel name that no other test uses."""
    name: str = request.node.name
    return f"faults:{re.sub('[^a-z0-9_]+', '-', name.removeprefix('test_').lower())}"
