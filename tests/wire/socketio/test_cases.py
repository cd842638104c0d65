"""Engine.IO 3 and 4 and Socket.IO: the cases that the reference servers pass too."""

from __future__ import annotations

import pytest

from tests.support.socketio_echo import echo_server
from tests.wire.socketio.cases import SUITES, run_all

# engine.io 3.6.2 passes 23 of 23, engine.io 6.6 24 of 24, socket.io 4.8.1 32 of 32.
TOTALS = {"engine.io 3": 23, "engine.io 4": 24, "socket.io": 32}
# On purpose: no protocol of relay uses binary arguments of clients, so they are discarded.
DIFFERENT = {
    "engine.io 3": [],
    "engine.io 4": [],
    "socket.io": ["bytes_come_back", "bytes_are_acknowledged"],
}


@pytest.mark.timeout(60)
async def test_every_case() -> None:
    assert {suite: len(cases) for suite, cases in SUITES.items()} == TOTALS
    async with echo_server() as port:
        failed = await run_all(f"http://127.0.0.1:{port}")
    assert {suite: list(each) for suite, each in failed.items()} == DIFFERENT, failed
