"""`relay centrifugo` with the file and flags of a Centrifugo v1 site, and a real Redis."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import signal
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp

from tests.support.clients import within
from tests.support.forked import ForkedProcess
from tests.support.relay import ROOT
from tests.support.valkey import Server

SECRET = "very-long-secret-key"
START_S = 60.0


class Site:
    """One relay process and its working folder."""

    def __init__(
        self, folder: Path, arguments: Sequence[str], environ: Mapping[str, str] | None = None
    ) -> None:
        self.lines: list[str] = []
        self._more = threading.Condition()
        self._ended = False
        environment = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
        self.process = ForkedProcess(
            arguments, {**environment, "PYTHONPATH": str(ROOT), **(environ or {})}, folder
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        with self.process.stdout as lines:
            for line in lines:
                with self._more:
                    self.lines.append(line.rstrip())
                    self._more.notify_all()
        with self._more:
            self._ended = True
            self._more.notify_all()

    def said(self, text: str, *, times: int = 1) -> str:
        """Wait for `times` log lines with `text`, and return the last one."""
        deadline = time.monotonic() + START_S

        def found() -> list[str]:
            return [line for line in self.lines if text in line]

        with self._more:
            while len(found()) < times:
                left = deadline - time.monotonic()
                if left <= 0 or self._ended:
                    raise AssertionError(f"{text!r} not in {self.lines[-20:]}")
                self._more.wait(left)
            return found()[times - 1]

    @property
    def shared(self) -> str:
        """Return the URL of the listener of the other protocols."""
        return self.said("relay is ready on").rpartition(" ")[2]

    def send(self, number: signal.Signals) -> None:
        """Send a signal."""
        self.process.send_signal(number)

    def ended(self) -> int:
        """Wait until the process ends by itself, and return its exit code."""
        code = self.process.wait(START_S)
        self._reader.join(START_S)
        return code


@contextmanager
def site(
    folder: Path, *arguments: str, environ: Mapping[str, str] | None = None, ready: bool = True
) -> Iterator[Site]:
    """Run `relay ARGUMENTS` and stop it at the end. If `ready`, wait until it serves."""
    running = Site(folder, arguments, environ)
    try:
        if ready:
            # This line is the last one that relay prints at start.
            running.said("  watch")
        yield running
    finally:
        if running.process.poll() is None:
            running.send(signal.SIGTERM)
            try:
                running.process.wait(START_S)
            except subprocess.TimeoutExpired:
                running.process.kill()
        running.process.wait()


class V1:
    """A v1 client that sends and receives frames."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket

    async def ask(self, method: str, **params: object) -> dict[str, Any]:
        """Send one command and return its reply. Skip pushes before it."""
        await self._socket.send_json({"uid": "1", "method": method, "params": params})
        return await self.next(method)

    async def next(self, method: str) -> dict[str, Any]:
        """Return the next frame of this method."""
        while True:
            frame = await within(START_S, self._socket.receive_json())
            if frame["method"] == method:
                return dict(frame["body"])

    async def connect(self, user: str) -> None:
        """Connect with a token of the site."""
        info = user, "1500000000"
        token = hmac.new(SECRET.encode(), "".join(info).encode(), hashlib.sha256).hexdigest()
        body = await self.ask("connect", user=user, timestamp=info[1], token=token)
        assert body["client"]


def redis_flags(server: Server) -> list[str]:
    """Return flags for the redis engine on `server`, with the ACL user of docs/redis.md."""
    return ["--engine=redis", f"--redis_url={server.url('relay')}"]


def fetch(
    url: str, *, body: bytes | None = None, headers: Mapping[str, str] | None = None
) -> tuple[int, bytes, dict[str, str]]:
    """Return status, body and headers of any response. Redirects are not followed."""
    request = urllib.request.Request(url, data=body, headers=dict(headers or {}))  # noqa: S310
    opener = urllib.request.build_opener(_Stay)
    try:
        with opener.open(request, timeout=START_S) as answer:
            return answer.status, answer.read(), dict(answer.headers)
    except urllib.error.HTTPError as exc:
        with exc:
            return exc.code, exc.read(), dict(exc.headers)


class _Stay(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: object) -> None:
        return None


def publish(base: str, channel: str, data: object, *, secret: str = SECRET) -> tuple[int, bytes]:
    """Send a signed publish to /api/."""
    params = {"channel": channel, "data": data}
    body = json.dumps({"method": "publish", "params": params}).encode()
    sign = hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()
    headers = {"Content-Type": "application/json", "X-API-Sign": sign}
    status, text, _ = fetch(f"{base}/api/", body=body, headers=headers)
    return status, text


def eventually(is_so: Callable[[], bool]) -> None:
    """Wait until the condition is true."""
    deadline = time.monotonic() + START_S
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.05)
