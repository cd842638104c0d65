"""Run the cases of the Autobahn test suite against relay's WebSockets. By hand:

    python -m tests.wire.autobahn [CASE...]

A case may be a pattern, such as "1.*". The default is groups 1 to 10, and takes about a minute.
Groups 12 and 13 test compression parameters that relay does not negotiate.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path

from aiohttp import web

from relay.transports.socket import websocket
from relay.transports.socket.reaper import Reaper
from relay.transports.socket.take_over import take_over
from tests.support.pypi import packages
from tests.support.sockjs import serving

# The test suite has no group 8.
_GROUPS = (1, 2, 3, 4, 5, 6, 7, 9, 10)
_LARGEST_BYTES = 64 << 20
_RUN = """
import json, asyncio, sys
from kosoku import FailureError, run_fuzzingclient
async def main():
    try:
        found = await run_fuzzingclient(sys.argv[1], cases=sys.argv[3:])
    except FailureError as exc:
        found = exc.results
    with open(sys.argv[2], "w") as out:
        json.dump([[each.case_id, each.behavior.value] for each in found], out)
asyncio.run(main())
"""


async def _echo(request: web.Request) -> web.StreamResponse:
    head = websocket.accept_headers(request)
    if isinstance(head, web.Response):
        return head
    socket = websocket.WebSocketConnection(
        buffer_bytes=_LARGEST_BYTES, max_frame_bytes=_LARGEST_BYTES, reaper=Reaper()
    )
    socket.on_text = lambda text: socket.write(websocket.frame_text(text))
    socket.on_binary = lambda data: socket.write(websocket.frame_binary(data))
    return take_over(request, head, socket)


async def run(cases: list[str]) -> list[tuple[str, str]]:
    """Return the behavior of each case."""
    folder = await asyncio.to_thread(packages, "kosoku-0.1.0")
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary) / "results.json"
        async with serving([web.get("/", _echo)]) as port:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-c", _RUN, f"ws://127.0.0.1:{port}/", str(out), *cases),
                env={**os.environ, "PYTHONPATH": str(folder)},
            )
            assert await process.wait() == 0
        return [(name, behavior) for name, behavior in json.loads(out.read_text())]


def main() -> None:
    """Print the totals, and each case that is not OK."""
    cases = sys.argv[1:] or [f"{group}.*" for group in _GROUPS]
    found = asyncio.run(run(cases))
    for name, behavior in found:
        if behavior != "OK":
            sys.stdout.write(f"{name}: {behavior}\n")
    totals = Counter(behavior for _, behavior in found)
    sys.stdout.write(f"{len(found)} cases: {dict(totals)}\n")


if __name__ == "__main__":
    main()
