"""Commands that end connections and subscriptions of users."""

from __future__ import annotations

from typing import TYPE_CHECKING

from relay.console.channels import UserBody, user_of
from relay.console.services import channel_of
from relay.stream.write import control

if TYPE_CHECKING:
    from relay.console.services import ApiRequest


async def disconnect(request: ApiRequest) -> object:
    """Close all connections of a user."""
    body, services = request.body(UserBody), request.services
    command = control.DisconnectUser(user=user_of(body.user))
    entry_id = await control.publish(services.clients, services.keys, command)
    return {"user": body.user, "id": str(entry_id)}


async def unsubscribe(request: ApiRequest) -> object:
    """End the subscriptions of a user to a channel, or all."""
    body, services = request.body(UserBody), request.services
    channel = channel_of(body.channel) if body.channel else None
    command = control.UnsubscribeUser(user=user_of(body.user), channel=channel)
    entry_id = await control.publish(services.clients, services.keys, command)
    return {"user": body.user, "channel": channel, "id": str(entry_id)}
