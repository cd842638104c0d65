"""The journal, and the explanation why a user did not receive an event."""

from __future__ import annotations

from typing import TYPE_CHECKING

from relay.console.channels import user_of
from relay.core.errors import BadRequest
from relay.inspect.explain import Explainer
from relay.inspect.journal_reader import EventFilter, JournalReader

if TYPE_CHECKING:
    from relay.console.services import ApiRequest

_EVENTS, _MOST = 50, 500


async def events(request: ApiRequest) -> object:
    """Return the newest events that match the filters, the oldest first."""
    wanted = EventFilter(
        user=request.http.query.get("user"),
        connection=request.text("connection", ""),
        channel=request.text("channel", ""),
        protocol=request.text("protocol", ""),
        event=request.text("event", ""),
    )
    reader = JournalReader(request.services.client, request.services.keys)
    return {"events": await reader.newest(wanted, request.count("count", _EVENTS, _MOST))}


async def explain(request: ApiRequest) -> object:
    """Explain whether a user's clients received an event, and if not, why."""
    services, channel, user = request.services, request.channel(), user_of(request.text("user"))
    event_id = request.entry_id("id")
    if event_id is None:
        raise BadRequest("id is missing")
    explainer = Explainer(
        clients=services.clients,
        keys=services.keys,
        questions=services.questions,
        max_entry_bytes=services.config().stream.max_entry_bytes,
    )
    return (await explainer.explain(user, channel, event_id)).values()
