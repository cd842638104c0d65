"""Server commands of v1 other than publish and broadcast.

Handlers return a reply, or raise InvalidCommand to reject the whole request. Unlike the errors of a
publish, their errors have no advice (libcentrifugo/api/v1/api.go of v1.8.0).
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from relay.core.errors import RelayError
from relay.core.go_json import text
from relay.core.model import Channel, parse_channel
from relay.protocols.centrifugo import codec, commands, encoders, history
from relay.protocols.centrifugo.api.replies import Reply
from relay.protocols.centrifugo.publisher import WATCH

if TYPE_CHECKING:
    from relay.protocols.centrifugo.administrators.node import NodeReport
    from relay.protocols.centrifugo.commands import CentrifugoCommand
    from relay.protocols.centrifugo.server_state import ServerState

_log = logging.getLogger(__name__)

Handler = Callable[["CentrifugoCommand"], Awaitable[Reply]]


class ServerCommands:
    """Handlers by method name."""

    def __init__(self, server: ServerState, node: NodeReport) -> None:
        self._server = server
        self._node = node
        self._handlers: dict[str, Handler] = {
            "unsubscribe": self._unsubscribe,
            "disconnect": self._disconnect,
            "presence": self._presence,
            "history": self._history,
            "channels": self._channels,
            "stats": self._stats,
            "node": self._own_node,
        }

    def has(self, method: str) -> bool:
        """Return True if the command exists."""
        return method in self._handlers

    def find(self, method: str) -> Handler:
        """Return the command's handler. Raise InvalidCommand if there is none."""
        handler = self._handlers.get(method)
        if handler is None:
            raise commands.InvalidCommand("unknown method")
        return handler

    async def _unsubscribe(self, command: CentrifugoCommand) -> Reply:
        given = commands.fields(command.params, strings=("channel", "user"))
        user, name = given.get("user", ""), given.get("channel", "")
        if not user:
            return _error_reply(command, codec.INVALID_MESSAGE)
        if name and self._server.names.rules(name) is None:
            return _error_reply(command, codec.NAMESPACE_NOT_FOUND)
        try:
            channel = parse_channel(name) if name else None
        except ValueError:
            return _error_reply(command, codec.INVALID_MESSAGE)
        self._server.stats.count("node_num_control_msg_published")
        pending = self._server.context.unsubscribe(user, channel=channel, door=encoders.DOOR)
        return await _reply_when_done(command, pending)

    async def _disconnect(self, command: CentrifugoCommand) -> Reply:
        user = commands.fields(command.params, strings=("user",)).get("user", "")
        if not user:
            return _error_reply(command, codec.INVALID_MESSAGE)
        self._server.stats.count("node_num_control_msg_published")
        return await _reply_when_done(
            command, self._server.context.disconnect(user, door=encoders.DOOR)
        )

    async def _presence(self, command: CentrifugoCommand) -> Reply:
        name = codec.channel_of(command.params)
        rules = self._server.names.rules(name)
        error = _name_error(name)
        if not error and rules is not None and not rules.presence:
            error = codec.NOT_AVAILABLE
        if error or rules is None:
            return _error_reply(command, error or codec.NAMESPACE_NOT_FOUND, codec.data_body(name))
        try:
            found = await self._server.presence.read(Channel(name))
        except RelayError as exc:
            return _unavailable(command, exc, codec.data_body(name))
        return Reply(command.method, command.uid, body=codec.data_body(name, found))

    async def _history(self, command: CentrifugoCommand) -> Reply:
        name = codec.channel_of(command.params)
        rules = self._server.names.rules(name)
        error = _name_error(name)
        if not error and rules is not None and not rules.has_history:
            error = codec.NOT_AVAILABLE
        if error or rules is None:
            return _error_reply(command, error or codec.NAMESPACE_NOT_FOUND, codec.data_body(name))
        self._server.stats.count("node_num_history")
        try:
            snapshot = await self._server.context.history(Channel(name), rules.history_size)
        except RelayError as exc:
            return _unavailable(command, exc, codec.data_body(name))
        retained = history.retained(snapshot, rules, self._server.redis_time())
        await encoders.encode_messages(retained)
        found = codec.list_body(name, map(encoders.message, retained))
        return Reply(command.method, command.uid, body=found)

    async def _channels(self, command: CentrifugoCommand) -> Reply:
        try:
            found = await self._server.context.active.channels()
        except RelayError as exc:
            return _unavailable(command, exc, b'{"data":null}')
        own = [
            text(channel)
            for channel in found
            if channel != WATCH and self._server.names.rules(channel) is not None
        ]
        return Reply(command.method, command.uid, body=b'{"data":[' + b",".join(own) + b"]}")

    async def _stats(self, command: CentrifugoCommand) -> Reply:
        try:
            found = await self._node.stats()
        except RelayError as exc:
            return _unavailable(command, exc, b'{"data":null}')
        return Reply(command.method, command.uid, body=found)

    async def _own_node(self, command: CentrifugoCommand) -> Reply:
        return Reply(command.method, command.uid, body=self._node.own_report())


def _name_error(name: str) -> str:
    try:
        parse_channel(name)
    except ValueError:
        return codec.INVALID_MESSAGE
    return ""


async def _reply_when_done(command: CentrifugoCommand, pending: Awaitable[None]) -> Reply:
    try:
        await pending
    except RelayError as exc:
        return _unavailable(command, exc)
    return Reply(command.method, command.uid)


def _error_reply(command: CentrifugoCommand, error: str, body: bytes = b"null") -> Reply:
    return Reply(command.method, command.uid, error, body=body)


def _unavailable(command: CentrifugoCommand, exc: RelayError, body: bytes = b"null") -> Reply:
    _log.warning("API command %s failed: %s", command.method, exc)
    return _error_reply(command, codec.INTERNAL_ERROR, body)
