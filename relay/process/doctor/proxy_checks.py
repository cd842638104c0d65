"""Check the proxies in front of relay: connect to its public URL as clients do.

Every check connects like a real client and names the setting of the proxy that breaks it. The
examples are for nginx. All of them run at the same time and take a heartbeat interval, because an
idle timeout shows only while nothing is sent.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Coroutine, Mapping
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import aiohttp

from relay.config.lists import split
from relay.core.errors import RelayError
from relay.process.doctor.finding import Finding, error, note
from relay.rights.token import TokenReader

if TYPE_CHECKING:
    from relay.config.loading import Config

# A channel to which no program publishes.
_CHANNEL = "relay.doctor"
_TOKEN_S = 300.0
# relay answers within milliseconds.
_ANSWER_S = 5.0
# Beyond a heartbeat interval.
_LATE_S = 5.0
_NEARLY = 0.9
_COOKIE = "relay_token"
_UPGRADE = (
    "nginx: proxy_http_version 1.1; proxy_set_header Upgrade $http_upgrade;"
    ' proxy_set_header Connection "upgrade";'
)
_BUFFERING = "nginx: proxy_buffering off; and no proxy_ignore_headers X-Accel-Buffering"
_HOST = "nginx: proxy_set_header Host $http_host;"
_TIMEOUT = "nginx: proxy_read_timeout 120s; proxy_send_timeout 120s;"


class _Unreachable(Exception):
    pass


async def check(config: Config, url: str) -> list[Finding]:
    """Return what is wrong with the proxies between this host and relay at `url`."""
    base = url.rstrip("/")
    parts = urlsplit(base)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        return [
            error(
                "proxy.url",
                f"--url {url} is not a URL",
                "The proxies could not be checked.",
                "Use the URL that browsers use, for example --url https://events.example.org/",
            )
        ]
    timeout = aiohttp.ClientTimeout(total=None, connect=_ANSWER_S)
    jar = aiohttp.DummyCookieJar()
    async with aiohttp.ClientSession(timeout=timeout, cookie_jar=jar) as http:
        probe = _Probe(config, base, f"{parts.scheme}://{parts.netloc}", http)
        try:
            await probe.reach()
        except _Unreachable as exc:
            return [
                error(
                    "proxy.unreachable",
                    f"{url} cannot be used: {exc}",
                    "No client can connect by this URL.",
                    "Check the name, the certificate and the proxy; relay itself listens on"
                    f" {config.server.host} port {config.server.port}",
                )
            ]
        found: list[Finding] = []

        async def run(looking: Coroutine[Any, Any, list[Finding]]) -> None:
            found.extend(await looking)

        async with asyncio.TaskGroup() as group:
            for looking in probe.checks():
                group.create_task(run(looking), name="doctor")
    return found


class _Probe:
    """One public URL. `origin` is that of pages at this URL."""

    def __init__(self, config: Config, base: str, origin: str, http: aiohttp.ClientSession) -> None:
        self._config = config
        self._base = base
        self._origin = origin
        self._http = http

    async def reach(self) -> None:
        """Raise _Unreachable if no HTTP server answers."""
        try:
            async with asyncio.timeout(_ANSWER_S), self._http.get(f"{self._base}/") as response:
                status = response.status
        except TimeoutError:
            raise _Unreachable(f"no answer within {_ANSWER_S:g} s") from None
        except (aiohttp.ClientError, OSError) as exc:
            raise _Unreachable(str(exc) or type(exc).__name__) from exc
        if status in (502, 503, 504):
            raise _Unreachable(f"the proxy answers with status {status}: it does not reach relay")

    def checks(self) -> list[Coroutine[Any, Any, list[Finding]]]:
        """Return the checks of the protocols that are served."""
        doors: Mapping[str, Any] = self._config.doors
        found: list[Coroutine[Any, Any, list[Finding]]] = []
        native = doors["protocol:native"]
        if native.is_open and not native.port:
            token = self._token()
            found += [
                self._sse(token, native.heartbeat_s),
                self._idle_websocket(token, native.heartbeat_s),
            ]
            if token:
                cookie = {"Cookie": f"{_COOKIE}={token}"}
                found.append(self._origin_and_host("/ws", cookie, "native"))
        centrifugo = doors["protocol:centrifugo"]
        if centrifugo.is_open and not centrifugo.port:
            prefix = centrifugo.http_prefix
            found += [
                self._handshake(f"{prefix}/connection/websocket", "Centrifugo"),
                self._path(f"{prefix}/connection/info", '"websocket"', "Centrifugo (SockJS)"),
            ]
        seafile = doors["protocol:seafile"]
        if seafile.is_open and not seafile.port:
            found += [
                self._handshake("/notification", "Seafile"),
                self._path("/notification/ping", "pong", "Seafile"),
            ]
        pydio = doors["protocol:pydio"]
        if pydio.is_open and not pydio.port:
            name = next(iter(split(pydio.cookies)), "AjaXplorer")
            found += [
                self._handshake(pydio.public_path, "Pydio"),
                self._origin_and_host(pydio.public_path, {"Cookie": f"{name}=doctor"}, "pydio"),
            ]
        socketio = doors["protocol:socketio"]
        if socketio.is_open and not socketio.port:
            path = f"{split(socketio.paths)[0].rstrip('/')}/"
            found += [
                self._handshake(f"{path}?EIO=4&transport=websocket", "Socket.IO"),
                self._polling(path, socketio.ping_interval_s),
            ]
        return found

    def _token(self) -> str:
        """Return a token for the doctor's channel, '' if relay cannot sign one."""
        try:
            reader = TokenReader(self._config.jwt)
            return reader.sign("relay.doctor", [_CHANNEL], [], _TOKEN_S)
        except RelayError:
            return ""

    # ---- WebSocket --------------------------------------------------------------------------

    @asynccontextmanager
    async def _websocket(
        self, path: str, headers: Mapping[str, str] | None = None
    ) -> AsyncIterator[aiohttp.ClientWebSocketResponse | int]:
        """Yield the connection, or the status of the response if it was not accepted."""
        try:
            async with asyncio.timeout(_ANSWER_S):
                socket = await self._http.ws_connect(f"{self._base}{path}", headers=headers)
        except aiohttp.WSServerHandshakeError as exc:
            yield exc.status
        except (TimeoutError, aiohttp.ClientError, OSError):
            yield 0
        else:
            try:
                yield socket
            finally:
                await socket.close()

    async def _handshake(self, path: str, protocol: str) -> list[Finding]:
        async with self._websocket(path) as socket:
            # 401: relay asks for a credential, so the handshake has reached it.
            if not isinstance(socket, int) or socket == 401:
                return []
            return [_no_websocket(f"{self._base}{path}", socket, protocol)]

    async def _idle_websocket(self, token: str, heartbeat_s: float) -> list[Finding]:
        """Keep a WebSocket open until a heartbeat has come."""
        path, began = "/ws", asyncio.get_running_loop().time()
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        async with self._websocket(path, headers) as socket:
            if isinstance(socket, int):
                return [_no_websocket(f"{self._base}{path}", socket, "WebSocket")]
            if not token:
                # relay closes it because of the missing token.
                return []
            try:
                async with asyncio.timeout(heartbeat_s + _LATE_S):
                    while not socket.closed:
                        message = await socket.receive()
                        if message.type is not aiohttp.WSMsgType.TEXT:
                            break
            except TimeoutError:
                return []
        return [self._closed_early(path, began, heartbeat_s)]

    def _closed_early(self, path: str, began: float, heartbeat_s: float) -> Finding:
        lasted_s = asyncio.get_running_loop().time() - began
        return error(
            "proxy.idle_timeout",
            f"{self._base}{path} was closed after {lasted_s:.0f} s without data",
            f"relay sends a heartbeat every {heartbeat_s:g} s. A proxy that closes connections"
            " earlier makes all idle clients reconnect again and again.",
            f"{_TIMEOUT} or [protocol:native]\nheartbeat_s = {max(int(lasted_s / 2), 1)}",
        )

    async def _origin_and_host(
        self, path: str, headers: Mapping[str, str], door: str
    ) -> list[Finding]:
        """Connect as a page of the public URL that authenticates with its cookie."""
        async with self._websocket(path, {**headers, "Origin": self._origin}) as socket:
            if socket != 403:
                return []
        return [
            error(
                "proxy.host",
                f"{self._base}{path} rejects pages of {self._origin} (status 403)",
                "relay compares Origin with Host, and the proxy has changed one of them, so that"
                " relay rejects pages of its own origin.",
                f"{_HOST} or [protocol:{door}]\nallowed_origins = {self._origin}",
            )
        ]

    # ---- server-sent events -----------------------------------------------------------------

    async def _sse(self, token: str, heartbeat_s: float) -> list[Finding]:
        if not token:
            return [
                note(
                    "proxy.token",
                    "Server-sent events and idle timeouts were not checked",
                    "relay cannot sign a token: [jwt] key is not set, or is a public key.",
                    "For this check, set [jwt] key to a secret",
                )
            ]
        path, began = f"/sse?channel={_CHANNEL}", asyncio.get_running_loop().time()
        headers = {"Authorization": f"Bearer {token}"}
        try:
            async with asyncio.timeout(_ANSWER_S) as limit:
                async with self._http.get(f"{self._base}{path}", headers=headers) as response:
                    if response.status != 200:
                        return [self._no_path(path, response.status, "SSE")]
                    if not await response.content.readany():
                        return [self._closed_early("/sse", began, heartbeat_s)]
                    limit.reschedule(asyncio.get_running_loop().time() + heartbeat_s + _LATE_S)
                    if not await response.content.readany():
                        return [self._closed_early("/sse", began, heartbeat_s)]
        except TimeoutError:
            return [
                error(
                    "proxy.sse_buffering",
                    f"{self._base}/sse sends nothing for"
                    f" {asyncio.get_running_loop().time() - began:.0f} s, although relay does",
                    "The proxy collects events until its buffer is full, so browsers receive them"
                    " late or never.",
                    _BUFFERING,
                )
            ]
        except (aiohttp.ClientError, OSError):
            return [self._closed_early("/sse", began, heartbeat_s)]
        return []

    # ---- long polling and paths -------------------------------------------------------------

    async def _path(self, path: str, text: str, protocol: str) -> list[Finding]:
        """Request a path whose answer contains `text`."""
        status, body = await self._get(path)
        if status == 200 and text in body:
            return []
        return [self._no_path(path, status, protocol)]

    async def _polling(self, path: str, interval_s: float) -> list[Finding]:
        """Open two Engine.IO sessions, and let a poll of one of them wait for its ping."""
        query = f"{path}?EIO=4&transport=polling"
        sessions = []
        for number in range(2):
            status, body = await self._get(f"{query}&t=doctor{number}")
            if status != 200 or not body.startswith("0{"):
                return [self._no_path(query, status, "Socket.IO (long polling)")]
            sessions.append(str(json.loads(body[1:])["sid"]))
        if sessions[0] == sessions[1]:
            return [
                error(
                    "proxy.polling",
                    f"{self._base}{query} gives two clients the same session",
                    "The proxy caches the answers of long polling, so clients receive those of"
                    " others.",
                    "nginx: proxy_cache off;",
                )
            ]
        loop = asyncio.get_running_loop()
        status, began = 200, loop.time()
        # The first poll may be answered early, if the ping of its session is due.
        while status == 200 and loop.time() - began < interval_s * _NEARLY:
            status, _ = await self._get(f"{query}&sid={sessions[1]}", interval_s + _LATE_S)
        if status == 200:
            return []
        return [
            error(
                "proxy.polling",
                f"A poll of {self._base}{path} ended with status {status or 'none'}",
                f"relay answers a poll after {interval_s:g} s at the latest. The proxy has a"
                " shorter timeout, so long-polling clients lose their sessions.",
                f"{_TIMEOUT} or [protocol:socketio]\nping_interval_s = 5",
            )
        ]

    async def _get(self, path: str, timeout_s: float = _ANSWER_S) -> tuple[int, str]:
        """Return status and body; status 0 if there was no answer."""
        try:
            async with (
                asyncio.timeout(timeout_s),
                self._http.get(f"{self._base}{path}") as response,
            ):
                return response.status, await response.text(errors="replace")
        except (TimeoutError, aiohttp.ClientError, OSError):
            return 0, ""

    def _no_path(self, path: str, status: int, protocol: str) -> Finding:
        return error(
            "proxy.path",
            f"{self._base}{path} does not lead to relay (status {status or 'none'})",
            f"Clients of {protocol} cannot connect by this URL.",
            "nginx: add a location for this path that passes to relay"
            f" (http://{self._config.server.host}:{self._config.server.port}) without changing"
            " the path",
        )


def _no_websocket(url: str, status: int, protocol: str) -> Finding:
    if status in (404, 502, 503, 504):
        return error(
            "proxy.path",
            f"{url} does not lead to relay (status {status})",
            f"Clients of {protocol} cannot connect by this URL.",
            "nginx: add a location for this path that passes to relay without changing the path",
        )
    return error(
        "proxy.websocket",
        f"{url} accepts no WebSocket (status {status or 'none'})",
        f"Clients of {protocol} cannot connect, or fall back to slower transports. Most proxies"
        " remove the headers Upgrade and Connection unless told otherwise.",
        _UPGRADE,
    )
