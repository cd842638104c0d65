"""`/events`: append the events that Seafile's servers post to the streams of their libraries.

The response is 200 when the event has been appended. It is sent within a second after the body: the
C server's timeout is one second, and Go's file server delays an upload until it has the response.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING

from aiohttp import web

from relay.core.errors import NotDurable, RelayError
from relay.core.reasons import Reason
from relay.doorkit.http_status import GO_STATUS_TEXT, go_error
from relay.protocols.seafile import answers, event_format
from relay.protocols.seafile.groups import GroupMembers, source_of
from relay.protocols.seafile.tokens import InvalidSeafileToken
from relay.transports.socket.bodies import BodyRejected, read_body

if TYPE_CHECKING:
    from relay.protocols.seafile.event_format import SeafEvent
    from relay.protocols.seafile.service import SeafileService
    from relay.protocols.seafile.settings import SeafileSettings

_log = logging.getLogger(__name__)

_LIMIT_S = 0.9


class EventsHandler:
    """Handles requests to `/events`. Responses are those measured on Seafile 11.0 and 13.0."""

    def __init__(self, service: SeafileService, settings: SeafileSettings) -> None:
        self._service = service
        self.reload(settings)

    def reload(self, settings: SeafileSettings) -> None:
        """Use new settings for new requests, and clear the cache of group members."""
        source = source_of(settings, self._service.context.members)
        self._groups = GroupMembers(source, settings.groups_cache_s)
        self._settings = settings

    async def answer(self, request: web.Request) -> web.Response:
        """Handle one request. The token is checked before the body, as in Seafile's server."""
        sender = answers.sender(request)
        try:
            self._service.tokens.check_sender(
                request.headers.get("Seafile-Repo-Token"),
                request.headers.get("Authorization"),
                time.time(),
                clients=self._settings.client_tokens_post,
            )
        except InvalidSeafileToken as exc:
            _log.warning("Rejected a Seafile event from %s: %s", sender, exc)
            self._service.count_rejection(Reason.UNAUTHORIZED)
            return go_error(400, "Notification token not match")
        try:
            limit_bytes = self._settings.events_max_bytes
            body = await read_body(request, limit_bytes, "[protocol:seafile] events_max_bytes")
        except BodyRejected as exc:
            self._service.count_rejection(
                Reason.LIMIT_EXCEEDED if exc.status == 413 else Reason.BAD_REQUEST
            )
            return go_error(exc.status, GO_STATUS_TEXT[exc.status])
        try:
            event = event_format.read(body)
        except event_format.Invalid as exc:
            _log.warning("Rejected a Seafile event from %s: %s", sender, exc)
            self._service.count_rejection(Reason.BAD_REQUEST)
            return go_error(500, "")
        except event_format.Unaddressed as exc:
            # Seafile's server ignores such events, and their senders ignore the response.
            _log.warning("Ignored a Seafile event from %s without a library: %s", sender, exc)
            return answers.done()
        try:
            async with asyncio.timeout(_LIMIT_S):
                await self._append(event)
        except (RelayError, ValueError, TimeoutError) as exc:
            # Not logged as an exception, because this is not a bug.
            _log.error("Event %s on %s was %s", event.type, event.channel, _outcome(exc))
            self._service.count_rejection(Reason.UNAVAILABLE)
            return go_error(503, "Service Unavailable")
        return answers.done()

    async def _append(self, event: SeafEvent) -> None:
        to = await self._recipients(event)
        commit = event.commit.encode()
        # Seafile does not send the event again, so append it even if the response is late.
        await asyncio.shield(
            self._service.context.publish(
                event.channel,
                event.content,
                type=event.type,
                to=to,
                extra={event_format.COMMIT: commit} if commit else None,
                unless_latest=event_format.COMMIT if commit else None,
            )
        )

    async def _recipients(self, event: SeafEvent) -> list[str] | None:
        if event.user:
            return [f"user:{event.user}"]
        if event.group is None:
            return None
        members = await self._groups.members(event.group)
        if members is None:
            _log.warning(
                "Event %s on %s not delivered: the members of group %d are unavailable",
                event.type,
                event.channel,
                event.group,
            )
        # For an empty or unavailable group, use a selector that no client has.
        return [f"user:{name}" for name in members or () if name] or [
            f"group:seafile:{event.group}"
        ]


def _outcome(exc: Exception) -> str:
    """Return what has become of an event that was not appended as wanted."""
    if isinstance(exc, NotDurable):
        return str(exc)
    if isinstance(exc, TimeoutError):
        return f"not confirmed by Redis within {_LIMIT_S} s"
    return f"not appended: {exc}"
