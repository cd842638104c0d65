"""Client commands on subscribed channels: publish, presence and history; and ping."""

from __future__ import annotations

from typing import TYPE_CHECKING

from relay.core import tracing
from relay.core.errors import LimitExceeded, RelayError
from relay.core.model import Channel
from relay.protocols.centrifugo import codec, encoders, history
from relay.protocols.centrifugo.channels import is_foreign

if TYPE_CHECKING:
    from relay.protocols.centrifugo.clients.interfaces import CommandContext
    from relay.protocols.centrifugo.clients.reply_queue import ReplySlot
    from relay.protocols.centrifugo.publisher import Appended
    from relay.protocols.centrifugo.server_state import ServerState
    from relay.protocols.centrifugo.settings import CentrifugoNamespace


def publish(server: ServerState, connection: CommandContext, slot: ReplySlot) -> bool:
    """Publish an event. The reply follows when the entry has its ID."""
    name, data = codec.publish(slot.command.params)
    error, advice = _publish_error(server, connection, name, data)
    appending = None
    if not error:
        info = connection.info(name)
        try:
            server.stats.count("client_num_msg_published")
            with tracing.caused_by(connection.transport_info):
                appending = server.publisher.publish(
                    Channel(name), data, client=connection.client, info=info
                )
        except LimitExceeded:
            error = codec.LIMIT_EXCEEDED
        except ValueError:
            error = codec.INVALID_MESSAGE
        except RelayError:
            error, advice = codec.INTERNAL_ERROR, codec.RETRY
    if appending is None:
        connection.reply(slot, codec.status_body(name, status=False), error, advice)
        return True
    connection.pending += 1

    def appended(append: Appended) -> None:
        failed = append.cancelled() or append.exception() is not None
        body = codec.status_body(name, status=not failed)
        if failed:
            connection.answer(slot, body, codec.INTERNAL_ERROR, codec.RETRY)
        else:
            connection.answer(slot, body)

    appending.add_done_callback(appended)
    return True


def _publish_error(
    server: ServerState, connection: CommandContext, name: str, data: bytes
) -> tuple[str, str]:
    if not name or not data:
        return codec.INVALID_MESSAGE, codec.FIX
    if not connection.is_subscribed(name):
        return codec.PERMISSION_DENIED, codec.FIX
    rules = server.names.rules(name)
    if rules is not None and (rules.publish or server.settings.insecure):
        return "", codec.FIX
    if rules is None and not is_foreign(name):
        # The namespace has been removed since the client subscribed.
        return codec.INTERNAL_ERROR, codec.RETRY
    # Insecure mode does not open the channels of other protocols.
    return codec.PERMISSION_DENIED, codec.FIX


def presence(server: ServerState, connection: CommandContext, slot: ReplySlot) -> bool:
    """Reply with the clients in a channel."""
    name = codec.channel_of(slot.command.params)
    error, advice, rules = codec.PERMISSION_DENIED, codec.FIX, None
    if connection.is_subscribed(name):
        error, advice = codec.NOT_AVAILABLE, codec.RETRY
        rules = server.names.rules(name)
    if rules is None or not rules.presence:
        connection.reply(slot, codec.data_body(name), error, advice)
    else:
        connection.run(_presence(server, connection, slot, Channel(name)))
    return True


async def _presence(
    server: ServerState, connection: CommandContext, slot: ReplySlot, channel: Channel
) -> None:
    try:
        clients = await server.presence.read(channel)
    except RelayError:
        connection.answer(slot, codec.data_body(channel), codec.INTERNAL_ERROR, codec.RETRY)
    else:
        connection.answer(slot, codec.data_body(channel, clients))


def get_history(server: ServerState, connection: CommandContext, slot: ReplySlot) -> bool:
    """Reply with the channel's history, newest first."""
    name = codec.channel_of(slot.command.params)
    error, advice, rules = codec.PERMISSION_DENIED, codec.FIX, None
    if connection.is_subscribed(name):
        error, advice = codec.NOT_AVAILABLE, codec.RETRY
        rules = server.names.rules(name)
    if rules is None or not rules.has_history:
        connection.reply(slot, codec.data_body(name), error, advice)
    else:
        connection.run(_history(server, connection, slot, Channel(name), rules))
    return True


async def _history(
    server: ServerState,
    connection: CommandContext,
    slot: ReplySlot,
    channel: Channel,
    rules: CentrifugoNamespace,
) -> None:
    session = connection.session
    try:
        snapshot = await server.context.history(channel, rules.history_size)
    except RelayError:
        connection.answer(slot, codec.data_body(channel), codec.INTERNAL_ERROR, codec.RETRY)
        return
    if session is not None:
        retained = history.retained(snapshot, rules, server.redis_time())
        await encoders.encode_messages(retained)
        messages = encoders.visible_messages(session, retained)
        connection.answer(slot, codec.list_body(channel, messages))


def ping(connection: CommandContext, slot: ReplySlot) -> bool:
    """Reply with the data that the client has sent."""
    connection.reply(slot, codec.ping_body(codec.ping(slot.command.params)))
    return True
