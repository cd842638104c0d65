"""`/events`: what Seafile's servers post becomes an entry of the library's stream.

200 says that the entry is there. Every answer comes within a second of the body, since the C server
gives up then, and Go's file server holds up the upload that it belongs to until it has its answer.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING

from aiohttp import web

from relay.core.errors import RelayError
from relay.core.reasons import Reason
from relay.protocols.seafile import answers, event_format
from relay.protocols.seafile.groups import GroupMembers, source_of
from relay.protocols.seafile.tokens import InvalidSeafileToken
from relay.transports.socket.bodies import BodyRejected, read_body

if TYPE_CHECKING:
    from relay.protocols.seafile.event_format import SeafEvent
    from relay.protocols.seafile.service import Service
    from relay.protocols.seafile.settings import SeafileSettings

_log = logging.getLogger(__name__)

_LIMIT_S = 0.9
# Go's http.StatusText.
_STATUS_TEXT = {
    400: "Bad Request",
    408: "Request Timeout",
    413: "Request Entity Too Large",
    415: "Unsupported Media Type",
    503: "Service Unavailable",
}


class EventsHandler:
    """Answers as measured on 11.0 and 13.0."""

    def __init__(self, service: Service, settings: SeafileSettings) -> None:
        self._service = service
        self.reload(settings)

    def reload(self, settings: SeafileSettings) -> None:
        """For requests from now on; what is known of groups is forgotten."""
        source = source_of(settings, self._service.context.members)
        self._groups = GroupMembers(source, settings.groups_cache_s)
        self._settings = settings

    async def answer(self, request: web.Request) -> web.Response:
        """The token first, then the body, as upstream."""
        sender = answers.sender(request)
        try:
            self._service.tokens.check_sender(
                request.headers.get("Seafile-Repo-Token"),
                request.headers.get("Authorization"),
                time.time(),
                clients=self._settings.client_tokens_post,
            )
        except InvalidSeafileToken as exc:
            _log.warning("event from %s is refused: %s", sender, exc)
            self._service.refused(Reason.UNAUTHORIZED)
            return answers.error(400, "Notification token not match")
        try:
            limit_bytes = self._settings.events_max_bytes
            body = await read_body(request, limit_bytes, "[protocol:seafile] events_max_bytes")
        except BodyRejected as exc:
            self._service.refused(
                Reason.LIMIT_EXCEEDED if exc.status == 413 else Reason.BAD_REQUEST
            )
            return answers.error(exc.status, _STATUS_TEXT[exc.status])
        try:
            event = event_format.read(body)
        except event_format.Invalid as exc:
            _log.warning("event from %s is refused: %s", sender, exc)
            self._service.refused(Reason.BAD_REQUEST)
            return answers.error(500, "")
        except event_format.Unaddressed as exc:
            # Upstream drops these in silence, and their senders do not look at the answer.
            _log.warning("event from %s concerns no library: %s", sender, exc)
            return answers.done()
        try:
            async with asyncio.timeout(_LIMIT_S):
                await self._append(event)
        except (RelayError, ValueError, TimeoutError) as exc:
            reason = str(exc) or f"Redis did not answer within {_LIMIT_S} s"
            _log.error("event %s of %s is lost: %s", event.type, event.channel, reason)  # no bug
            self._service.refused(Reason.UNAVAILABLE)
            return answers.error(503, "Service Unavailable")
        return answers.done()

    async def _append(self, event: SeafEvent) -> None:
        to = await self._recipients(event)
        commit = event.commit.encode()
        await self._service.context.publish(
            event.channel,
            event.content,
            type=event.type,
            to=to,
            extra={event_format.COMMIT: commit} if commit else None,
            unless_latest=event_format.COMMIT if commit else None,
        )

    async def _recipients(self, event: SeafEvent) -> list[str] | None:
        if event.user:
            return [f"user:{event.user}"]
        if event.group is None:
            return None
        members = await self._groups.members(event.group)
        if members is None:
            _log.warning(
                "Event %s on %s not delivered: the members of group %d are not known",
                event.type,
                event.channel,
                event.group,
            )
        # Whom the group has not, or nobody can say whom it has: a selector that no client has.
        return [f"user:{name}" for name in members or () if name] or [
            f"group:seafile:{event.group}"
        ]
