"""The native protocol with faults that a test can switch on, one at a time.

The test copies this file to `relay/protocols/broken/routes.py` of a temporary tree. `GET
/fault?name=N` switches to a fault.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any
from unittest.mock import patch

from aiohttp import web

from relay.core.model import Principal
from relay.doorkit.contract import DoorContext
from relay.doorkit.open_connections import OpenConnections
from relay.hub.session import Session
from relay.protocols.native import routes as native
from relay.protocols.native.encoders import WebSocketEncoder
from relay.protocols.native.settings import NativeSettings
from relay.protocols.native.ws_client import WsClient

_event, _notice = WebSocketEncoder.event, WebSocketEncoder.notice


def _without(kind: str) -> Callable[..., bytes]:
    def notice(self: WebSocketEncoder, channel: Any, notice: Any) -> bytes:
        return b"" if notice.kind == kind else _notice(self, channel, notice)

    return notice


def _do_nothing(*_args: object, **_more: object) -> None:
    pass


def _repeat(self: WebSocketEncoder, event: Any) -> bytes:
    return _event(self, event) * (2 if (event.id.seq + event.id.ms) % 3 == 0 else 1)


def _accept_anybody(*_args: object, **_more: object) -> Principal:
    return Principal(user="anybody", door="native", unrestricted=True)


# Each fault replaces one attribute: object, attribute name, broken version.
FAULTS: dict[str, tuple[Any, str, Any]] = {
    "delivers nothing": (WebSocketEncoder, "event", lambda _self, _event: b""),
    "accepts anybody": (native, "principal_of", _accept_anybody),
    "repeats events": (WebSocketEncoder, "event", _repeat),
    "conceals gaps": (WebSocketEncoder, "notice", _without("gap")),
    "conceals resets": (WebSocketEncoder, "notice", _without("reset")),
    "conceals revocations": (WebSocketEncoder, "notice", _without("revoked")),
    "ignores a full socket": (Session, "pause", _do_nothing),
    "leaks connections": (OpenConnections, "closed", _do_nothing),
    "leaks sessions": (Session, "end", _do_nothing),
    "ignores the shutdown": (WsClient, "disconnect", _do_nothing),
}


class BrokenDoor:
    def mount(self, context: DoorContext, settings: NativeSettings) -> native.MountedNative:
        forgets = False

        def subscribe(session: Session, channel: Any, position: Any) -> None:
            context.subscribe(session, channel, None if forgets else position)

        mounted = native.MountedNative(replace(context, subscribe=subscribe), settings)
        patches = ExitStack()

        async def switch(request: web.Request) -> web.Response:
            nonlocal forgets
            name = request.query["name"]
            patches.close()
            forgets = name == "forgets positions"
            if not forgets:
                patches.enter_context(patch.object(*FAULTS[name]))
            return web.Response()

        mounted.routes.append(web.get("/fault", switch))
        return mounted


DOOR = BrokenDoor()
