"""Clients: search, one client, and commands that end connections and subscriptions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from relay.console.channels import UserBody, user_of
from relay.console.services import JsonBody, channel_of
from relay.core.errors import BadRequest
from relay.inspect.connections import MOST, ConnectionFilter, find_connections
from relay.inspect.disconnects import close_connection, closed_by
from relay.stream.write import control

if TYPE_CHECKING:
    from relay.console.services import ApiRequest
    from relay.inspect.connections import ConnectionPage

_PAGE = 50


async def connections(request: ApiRequest) -> object:
    """Return a page of the connections that match the filters."""
    wanted = ConnectionFilter(
        user=request.http.query.get("user"),
        channel=request.text("channel", ""),
        protocol=request.text("protocol", ""),
        address=request.text("address", ""),
        after=request.text("after", ""),
        limit=request.count("count", _PAGE, MOST),
    )
    page = await find_connections(request.services.questions, wanted)
    return {
        "connections": page.connections,
        "total": page.total,
        "after": page.after,
        "missing": _missing(page),
    }


async def connection(request: ApiRequest) -> object:
    """Return one connection with all its subscriptions."""
    wanted = ConnectionFilter(id=request.text("id"))
    page = await find_connections(request.services.questions, wanted)
    if not page.connections:
        raise BadRequest("this connection is no longer open")
    return page.connections[0]


def _missing(page: ConnectionPage) -> dict[str, str]:
    """Return the workers whose connections are missing, with the reason."""
    return {**dict.fromkeys(page.silent, "did not answer"), **page.failed}


async def disconnect(request: ApiRequest) -> object:
    """Close all connections of a user."""
    body, services = request.body(UserBody), request.services
    command = control.DisconnectUser(user=user_of(body.user))
    entry_id = await control.publish(services.clients, services.keys, command)
    closed, problems = await closed_by(services.questions, str(entry_id))
    done: dict[str, Any] = {"id": str(entry_id), "user": body.user, "closed": closed}
    return {**done, "unknown": problems} if problems else done


class ConnectionBody(JsonBody):
    """Body of `close`."""

    connection: str


async def close(request: ApiRequest) -> object:
    """Close one connection, which may be anonymous."""
    body = request.body(ConnectionBody)
    closed, missing = await close_connection(request.services.questions, body.connection)
    if not closed:
        raise BadRequest(
            f"the connection was not found; {', '.join(missing)} did not answer"
            if missing
            else "this connection is no longer open"
        )
    return {"connection": body.connection, "closed": closed}


async def unsubscribe(request: ApiRequest) -> object:
    """End the subscriptions of a user to a channel, or all."""
    body, services = request.body(UserBody), request.services
    channel = channel_of(body.channel) if body.channel else None
    command = control.UnsubscribeUser(user=user_of(body.user), channel=channel)
    entry_id = await control.publish(services.clients, services.keys, command)
    return {"user": body.user, "channel": channel, "id": str(entry_id)}
