"""A stand-in for Pydio's HTTP server, its PHP publisher, and a browser without a page.

The XML has the format of class.AJXP_XMLWriter.php of 6.4.2. No real Pydio runs here.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from xml.sax.saxutils import escape, quoteattr

import aiohttp
from aiohttp import web

from tests.support.clients import LIMIT_S
from tests.support.programs import program
from tests.support.relay import ROOT, RelayProcess

KEY = "adminsecretkey"
EXAMPLE = ROOT / "docs" / "pydio-npm.html"
_PAGE = Path(__file__).with_name("pydio_page.html")
_PUBLISHER = Path(__file__).with_name("pydio_publisher.php")


@dataclass(slots=True)
class User:
    """A user of Pydio. `acl` and `masked` are by workspace."""

    name: str
    group: str = "/"
    acl: dict[str, str] = field(default_factory=dict)
    masked: set[str] = field(default_factory=set)
    slow_s: float = 0.0


class Pydio:
    """Users by session cookie. All attributes may be changed while it runs."""

    def __init__(self, port: int = 0) -> None:
        self.sessions: dict[str, User] = {}
        self.tokens: dict[tuple[str, str], User] = {}
        self.asked: list[str] = []
        self.cookies: list[str] = []
        self.broken = ""
        self.port = port
        # The folder with socket.io.js.
        self.scripts: Path | None = None
        self._runner: web.AppRunner | None = None

    @property
    def auth_url(self) -> str:
        """Return the setting `auth_url`."""
        return f"http://127.0.0.1:{self.port}/pydio/?get_action=ws_authenticate"

    @property
    def origin(self) -> str:
        """Return the origin of its pages."""
        return f"http://127.0.0.1:{self.port}"

    def login(self, name: str, group: str = "/", **acl: str) -> User:
        """Add a user whose session cookie is the name. The argument for workspace `1` is `w_1`."""
        rights = {key.removeprefix("w_"): value for key, value in acl.items()}
        user = self.sessions[name] = User(name, group, rights)
        return user

    async def start(self) -> None:
        """Listen. After a stop, the port is the same."""
        app = web.Application()
        app.router.add_get("/pydio/", self._action)
        app.router.add_get("/pydio/api/pydio/ws_authenticate/", self._action)
        app.router.add_get("/page", self._page)
        app.router.add_get("/workspaces", self._workspaces)
        app.router.add_get("/example", self._example)
        app.router.add_get("/socket.io.js", self._script)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        """Stop listening."""
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def _example(self, request: web.Request) -> web.Response:
        page = web.Response(text=EXAMPLE.read_text(), content_type="text/html")
        page.set_cookie("AjaXplorer", request.query["user"], httponly=True)
        return page

    async def _script(self, _request: web.Request) -> web.FileResponse:
        assert self.scripts is not None
        return web.FileResponse(self.scripts / "socket.io.js")

    async def _page(self, request: web.Request) -> web.Response:
        page = web.Response(text=_PAGE.read_text(), content_type="text/html")
        page.set_cookie("AjaXplorer", request.query["user"], httponly=True)
        return page

    async def _workspaces(self, request: web.Request) -> web.Response:
        user = self.sessions[request.cookies["AjaXplorer"]]
        return web.json_response(list(user.acl))

    async def _action(self, request: web.Request) -> web.Response:
        self.cookies.append(request.headers.get("Cookie", ""))
        user = self.sessions.get(request.cookies.get("AjaXplorer", ""))
        token = request.query.get("auth_token", "")
        if token:
            user = self.tokens.get((token, request.query.get("auth_hash", "")))
        self.asked.append(user.name if user else "")
        if user is not None and user.slow_s:
            await asyncio.sleep(user.slow_s)
        if self.broken:
            return web.Response(text=self.broken)
        if request.query.get("key") != KEY:
            return _xml('<tree><message type="ERROR">Cannot authentify admin key</message></tree>')
        if user is None:
            return _xml('<tree><message type="ERROR">You must be logged in</message></tree>')
        return _xml(_user_xml(user))


def _xml(tree: str) -> web.Response:
    text = '<?xml version="1.0" encoding="UTF-8"?>' + tree
    return web.Response(text=text, content_type="text/xml", charset="UTF-8")


def _user_xml(user: User) -> str:
    group = f"groupPath={quoteattr(user.group)} " if user.group else ""
    repositories = "".join(
        f'<repo access_type="fs" id={quoteattr(key)} repository_type="workspace"'
        f' repositorySlug={quoteattr(key)} acl="{acl}"'
        + (' hasMask="true"' if key in user.masked else "")
        + f"><label>{escape(key)}</label></repo>"
        for key, acl in user.acl.items()
    )
    return (
        f"<tree ><user {group}id={quoteattr(user.name)}>"
        f'<active_repo id="1" write="1" read="1"/><repositories>{repositories}</repositories>'
        '<preferences></preferences><special_rights is_admin="0" /></user></tree>'
    )


async def publish(
    port: int,
    *requests: Sequence[Mapping[str, object]],
    key: str = KEY,
    path: str = "/private",
    form: str = "serialize",
    host: str = "127.0.0.1",
) -> list[str]:
    """Run PHP requests, each with its messages. Return the status lines of the handshakes."""
    command = [program("php", "php-cli"), str(_PUBLISHER), f"ws://{host}:{port}{path}", key]
    process = await asyncio.create_subprocess_exec(
        *command,
        *([] if form == "serialize" else [form]),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env={"PATH": os.environ["PATH"]},
    )
    lines = "".join(json.dumps(messages) + "\n" for messages in requests)
    out, _ = await process.communicate(lines.encode())
    assert process.returncode == 0
    return out.decode().splitlines()


def tree(text: str) -> str:
    """Return the XML content of a message with this text."""
    return f"<tree><note>{text}</note></tree>"


class Browser:
    """A page's websocket."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.socket = socket
        # Cancelling receive() would close aiohttp's client, so keep the task and await it again.
        self._receiving: asyncio.Task[aiohttp.WSMessage] | None = None

    async def register(self, repository: str) -> None:
        """Register for a workspace."""
        await self.socket.send_str(f"register:{repository}")

    async def next(self, limit_s: float = LIMIT_S) -> str:
        """Return the next frame."""
        message = await self._receive(limit_s)
        assert message.type == aiohttp.WSMsgType.TEXT, (message, self.socket.close_code)
        text: str = message.data
        return text

    async def closed(self, limit_s: float = LIMIT_S) -> int:
        """Return the close code. Skip frames before it."""
        while (await self._receive(limit_s)).type == aiohttp.WSMsgType.TEXT:
            pass
        return self.socket.close_code or 0

    async def _receive(self, limit_s: float) -> aiohttp.WSMessage:
        if self._receiving is None:
            self._receiving = asyncio.get_running_loop().create_task(self.socket.receive())
        async with asyncio.timeout(limit_s):
            message = await asyncio.shield(self._receiving)
        self._receiving = None
        return message


class Refused(Exception):
    """The handshake was rejected with this status."""


async def browse(
    session: aiohttp.ClientSession,
    relay: RelayProcess,
    cookie: str = "",
    *,
    origin: str | None = None,
    path: str = "/public",
    headers: Mapping[str, str] | None = None,
    base: str = "",
) -> Browser:
    """Connect as a page does, to the relay or to `base`. Raises Refused with the status."""
    base = base or relay.url
    own = {"Origin": base if origin is None else origin}
    if cookie:
        own["Cookie"] = f"other=1; AjaXplorer={cookie}; AjaXplorerX"
    try:
        socket = await session.ws_connect(
            f"{base}{path}", headers=own | dict(headers or {}), max_msg_size=0
        )
    except aiohttp.WSServerHandshakeError as exc:
        raise Refused(exc.status) from None
    return Browser(socket)


async def seen_by(browser: Browser, relay: RelayProcess, repository: str) -> None:
    """Register, and wait until a message arrives: the protocol has no confirmation."""
    await browser.register(repository)
    for number in range(100):
        content = tree(f"probe {number}")
        await publish(relay.port, [{"REPO_ID": repository, "CONTENT": content}])
        try:
            while await browser.next(0.3) != content:
                pass
        except TimeoutError:
            continue
        return
    raise AssertionError("not registered")


@asynccontextmanager
async def standing_in(port: int = 0) -> AsyncIterator[Pydio]:
    """Run a Pydio without users, on a free port unless one is given."""
    pydio = Pydio(port)
    await pydio.start()
    try:
        yield pydio
    finally:
        await pydio.stop()
