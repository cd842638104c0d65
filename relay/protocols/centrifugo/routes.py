"""The Centrifugo door's paths: its clients', and `/api/` and whatever lies below it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING
from urllib.parse import parse_qs

from aiohttp import web

from producers.commands import Invalid
from relay.protocols.centrifugo import api, codec
from relay.protocols.centrifugo.foreign import CentrifugoForeign
from relay.protocols.centrifugo.settings import CentrifugoSettings
from relay.protocols.centrifugo.sockets import Sockets

if TYPE_CHECKING:
    from relay.frontdoor import DoorContext, Listener

_log = logging.getLogger(__name__)


class MountedCentrifugo:
    """The door at work."""

    listeners: Sequence[Listener] = ()
    drain_s: float | None = None

    def __init__(self, context: DoorContext, settings: CentrifugoSettings) -> None:
        self._context = context
        prefix = settings.http_prefix.rstrip("/")
        self._sockets = Sockets(context, settings, prefix)
        self.routes: Sequence[web.AbstractRouteDef] = [
            *self._sockets.routes,
            web.route("*", f"{prefix}/api", _moved),
            web.route("*", f"{prefix}/api/{{rest:.*}}", self._api),
        ]
        self.reload(settings)

    def reload(self, settings: CentrifugoSettings) -> None:
        """See `relay.frontdoor.Mounted`. An empty secret refuses all from now on."""
        self._secret = settings.secret.get_secret_value().encode()
        self._max_bytes = settings.api_max_bytes
        self._sockets.reload(settings)

    async def closed(self) -> None:
        """See `relay.frontdoor.Mounted`."""
        await self._sockets.closed()

    async def _api(self, request: web.Request) -> web.Response:
        try:
            body, sign = await self._commands(request)
        except ValueError:
            return _plain(400, "Bad Request")
        except _TooLarge:
            return _plain(413, "Request Entity Too Large")
        if not sign or not body or not self._secret:
            return self._refused(400, "Bad Request")
        if not api.signed(self._secret, body, sign):
            return self._refused(401, "Unauthorized")
        try:
            replies = await api.answer(body, self._context.publish, ids=_wants_ids(request))
        except Invalid:
            return _plain(400, "Bad Request")
        return web.Response(body=codec.encode(replies), content_type="application/json")

    async def _commands(self, request: web.Request) -> tuple[bytes, str]:
        """The commands' text and its signature, in whichever form they were sent."""
        kind = request.headers.get("Content-Type", "").lower()
        if kind.startswith("application/json"):
            return await self._body(request), request.headers.get("X-API-Sign", "")
        # cent 1.x and phpcent 1.x send a form; Go's FormValue takes the body before the query.
        fields = {name: value.encode() for name, value in reversed(list(request.query.items()))}
        if kind.startswith("multipart/form-data"):
            posted = await request.post()
            fields |= {
                name: value.encode() for name, value in posted.items() if isinstance(value, str)
            }
        elif kind.startswith("application/x-www-form-urlencoded"):
            text = (await self._body(request)).decode()
            # As Latin-1 every byte is kept, whatever the text's encoding.
            form = parse_qs(text, encoding="latin-1", max_num_fields=100)
            fields |= {name: values[0].encode("latin-1") for name, values in form.items()}
        return fields.get("data", b""), fields.get("sign", b"").decode("latin-1")

    async def _body(self, request: web.Request) -> bytes:
        if (request.content_length or 0) > self._max_bytes:
            raise _TooLarge
        parts: list[bytes] = []
        size = 0
        while part := await request.content.readany():
            parts.append(part)
            size += len(part)
            if size > self._max_bytes:
                raise _TooLarge
        return b"".join(parts)

    def _refused(self, status: int, text: str) -> web.Response:
        self._context.metrics.refused.labels(text.lower().replace(" ", "_")).inc()
        return _plain(status, text)


class CentrifugoDoor:
    """See `relay.frontdoor.FrontDoor`."""

    name = "centrifugo"
    settings = CentrifugoSettings
    foreign = CentrifugoForeign()

    def mount(self, context: DoorContext, settings: CentrifugoSettings) -> MountedCentrifugo | None:
        """None without a secret: an HMAC with an empty key can be forged."""
        if settings.enabled and not settings.is_open:
            _log.info("[protocol:centrifugo] secret is empty: there is no /api/")
        return MountedCentrifugo(context, settings) if settings.is_open else None


class _TooLarge(Exception):
    pass


def _wants_ids(request: web.Request) -> bool:
    """Whether replies may say more than v1's, in the words of RFC 7240."""
    preferred = request.headers.get("Prefer", "").lower()
    return "return=representation" in preferred.replace(" ", "").split(",")


async def _moved(request: web.Request) -> web.Response:
    query = f"?{request.query_string}" if request.query_string else ""
    return web.Response(status=301, headers={"Location": f"{request.path}/{query}"})


def _plain(status: int, text: str) -> web.Response:
    # Go's http.Error.
    return web.Response(
        status=status,
        text=f"{text}\n",
        content_type="text/plain",
        charset="utf-8",
        headers={"X-Content-Type-Options": "nosniff"},
    )


DOOR = CentrifugoDoor()
