"""The journals of all workers: what happened to clients."""

from __future__ import annotations

from typing import TYPE_CHECKING

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
