"""What a client may ask about a channel that it is subscribed to: publish, presence, history."""

from __future__ import annotations

from typing import TYPE_CHECKING

from relay.core.errors import LimitExceeded, RelayError
from relay.core.model import Channel
from relay.protocols.centrifugo import codec, encoders
from relay.protocols.centrifugo import history as histories
from relay.protocols.centrifugo.channels import is_foreign
from relay.protocols.centrifugo.clients.subscriptions import visible

if TYPE_CHECKING:
    from relay.protocols.centrifugo.clients.connection import CentrifugoConnection
    from relay.protocols.centrifugo.clients.reply_queue import ReplySlot
    from relay.protocols.centrifugo.publisher import Appended
    from relay.protocols.centrifugo.settings import CentrifugoNamespace


def publish(connection: CentrifugoConnection, slot: ReplySlot) -> bool:
    """Answered once the event has its ID."""
    name, data = codec.publish(slot.command.params)
    error, advice = _unpublishable(connection, name, data)
    appending = None
    if not error:
        info = connection.info(name)
        try:
            connection.door.stats.count("client_num_msg_published")
            appending = connection.door.publisher.publish(
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


def _unpublishable(connection: CentrifugoConnection, name: str, data: bytes) -> tuple[str, str]:
    if not name or not data:
        return codec.INVALID_MESSAGE, codec.FIX
    if name not in connection.subscriptions:
        return codec.PERMISSION_DENIED, codec.FIX
    rules = connection.door.names.rules(name)
    if rules is not None and (rules.publish or connection.door.settings.insecure):
        return "", codec.FIX
    if rules is None and not is_foreign(name):
        # The namespace was removed meanwhile.
        return codec.INTERNAL_ERROR, codec.RETRY
    # Another door's channel is not opened by insecure mode either.
    return codec.PERMISSION_DENIED, codec.FIX


def presence(connection: CentrifugoConnection, slot: ReplySlot) -> bool:
    """Who is there, by client."""
    name = codec.channel_of(slot.command.params)
    error, advice, rules = codec.PERMISSION_DENIED, codec.FIX, None
    if name in connection.subscriptions:
        error, advice = codec.NOT_AVAILABLE, codec.RETRY
        rules = connection.door.names.rules(name)
    if rules is None or not rules.presence:
        connection.reply(slot, codec.data_body(name), error, advice)
    else:
        connection.later(_presence(connection, slot, Channel(name)))
    return True


async def _presence(connection: CentrifugoConnection, slot: ReplySlot, channel: Channel) -> None:
    try:
        found = await connection.door.presence.read(channel)
    except RelayError:
        connection.answer(slot, codec.data_body(channel), codec.INTERNAL_ERROR, codec.RETRY)
    else:
        connection.answer(slot, codec.data_body(channel, found))


def history(connection: CentrifugoConnection, slot: ReplySlot) -> bool:
    """The newest first."""
    name = codec.channel_of(slot.command.params)
    error, advice, rules = codec.PERMISSION_DENIED, codec.FIX, None
    if name in connection.subscriptions:
        error, advice = codec.NOT_AVAILABLE, codec.RETRY
        rules = connection.door.names.rules(name)
    if rules is None or not rules.has_history:
        connection.reply(slot, codec.data_body(name), error, advice)
    else:
        connection.later(_history(connection, slot, Channel(name), rules))
    return True


async def _history(
    connection: CentrifugoConnection, slot: ReplySlot, channel: Channel, rules: CentrifugoNamespace
) -> None:
    door, session = connection.door, connection.session
    try:
        snapshot = await door.context.history(channel, rules.history_size)
    except RelayError:
        connection.answer(slot, codec.data_body(channel), codec.INTERNAL_ERROR, codec.RETRY)
        return
    if session is not None:
        kept = histories.kept(snapshot, rules, door.clock())
        await encoders.encode_messages(kept)
        found = visible(session, kept)
        connection.answer(slot, codec.data_body(channel, b"[" + b",".join(found) + b"]"))


def ping(connection: CentrifugoConnection, slot: ReplySlot) -> bool:
    """What was sent comes back."""
    connection.reply(slot, codec.ping_body(codec.ping(slot.command.params)))
    return True
