"""Protocol state machine of one administrator at v1's `/socket`. Performs no I/O.

Commands are those of the API, and `connect`, `ping` and `info`. Replies are always an array
(libcentrifugo/conns/adminconn of v1.8.0). Unlike v1, replies are sent to all administrators and not
only to those who have connected with `watch`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import orjson
from typing_extensions import override

from relay.core.errors import RelayError
from relay.core.model import Principal
from relay.core.reasons import Reason
from relay.hub.encoding import SharedEncoder
from relay.hub.session import Client, Outbox
from relay.protocols.centrifugo import codec, commands
from relay.protocols.centrifugo.api.replies import Reply, encode
from relay.protocols.centrifugo.clients.interfaces import FatalError
from relay.protocols.centrifugo.publisher import WATCH, WATCHERS
from relay.transports.socket.websocket import frame_text

if TYPE_CHECKING:
    from relay.core.model import Channel, Event
    from relay.hub.recovery import Notice
    from relay.hub.session import Session, Subscription
    from relay.protocols.centrifugo.api.executor import CommandExecutor
    from relay.protocols.centrifugo.commands import CentrifugoCommand
    from relay.protocols.centrifugo.server_state import ServerState
    from relay.protocols.centrifugo.settings import CentrifugoSettings

# Reading pauses while this many frames wait.
_WAITING = 16
_SECRETS = frozenset({"secret", "admin_password", "admin_secret"})
# v1 reports these in nanoseconds. Settings are in seconds.
_DURATIONS = ("_interval", "_delay", "_timeout")


class AdminTransport(Outbox, Protocol):
    """WebSocket of an administrator."""

    def close_with(self, code: int, reason: str = "") -> None:
        """Close with a code and a reason after all pending data has been sent."""

    def limit_messages(self, max_bytes: int) -> None:
        """Change the largest message that the administrator may send from now on."""

    def pause_reading(self) -> None:
        """Stop reading from the administrator."""

    def resume_reading(self) -> None:
        """Continue reading from the administrator."""


class WatchEncoder(SharedEncoder):
    """Encodes publications for administrators."""

    door = WATCHERS

    @override
    def event(self, event: Event) -> bytes:
        # Entries that other programs have appended to this channel are not sent.
        if event.door != WATCHERS:
            return b""
        return frame_text(b'{"method":"message","error":null,"body":' + event.data + b"}")

    @override
    def notice(self, channel: Channel, notice: Notice) -> bytes | None:
        # Administrators have no delivery guarantee.
        del channel, notice
        return b""


WATCH_ENCODER = WatchEncoder()


class AdminConnection(Client):
    """Executes an administrator's commands."""

    def __init__(
        self, server: ServerState, executor: CommandExecutor, is_valid: Callable[[str], bool]
    ) -> None:
        """`is_valid` returns True for a valid token of `/auth/`."""
        self._server = server
        self._executor = executor
        self._is_valid = is_valid
        self._socket: AdminTransport | None = None
        self._session: Session | None = None
        self._waiting: deque[bytes] = deque()
        self._busy = False
        self._authenticated = server.settings.insecure_admin

    def on_open(self, socket: AdminTransport) -> None:
        """Store the socket: the handshake is complete."""
        self._socket = socket

    def on_frame(self, frame: bytes) -> None:
        """Queue one frame."""
        self._waiting.append(frame)
        if self._socket is not None and len(self._waiting) >= _WAITING:
            self._socket.pause_reading()
        if not self._busy:
            self._busy = True
            _ = self._server.context.spawn(self._run(), name="centrifugo admin")

    async def _run(self) -> None:
        while self._waiting and self._socket is not None:
            try:
                await self._answer(self._waiting.popleft())
            except FatalError as fatal:
                self.close(fatal.reason)
            except commands.InvalidCommand:
                self.close(Reason.BAD_MESSAGE)
            except RelayError:
                self.close(Reason.UNAVAILABLE)
            if self._socket is not None and not self._socket.full:
                self._socket.resume_reading()
        self._busy = False

    async def _answer(self, frame: bytes) -> None:
        if frame[:1] not in (b"[", b"{"):
            raise commands.InvalidCommand("neither an object nor an array")
        parsed = commands.many(frame) if frame.startswith(b"[") else [commands.one(frame)]
        replies = [await self._reply(command) for command in parsed]
        if replies:
            self._send(frame_text(encode(replies)))

    async def _reply(self, command: CentrifugoCommand) -> Reply:
        method, _, uid = command
        if method == "connect":
            return self._connect(command)
        if not self._authenticated:
            raise FatalError(Reason.UNAUTHORIZED)
        if method == "ping":
            return Reply(method, uid, body=b'"pong"')
        if method == "info":
            return Reply(method, uid, body=_info(self._server.settings))
        if not self._executor.has(method):
            raise FatalError(Reason.UNKNOWN_COMMAND)
        (reply,) = await self._executor.execute([command])
        return reply

    def _connect(self, command: CentrifugoCommand) -> Reply:
        given = commands.fields(command.params, strings=("token",), bools=("watch",))
        if not self._server.settings.insecure_admin and not self._is_valid(given.get("token", "")):
            raise FatalError(Reason.UNAUTHORIZED)
        self._authenticated = True
        if self._socket is not None:
            self._socket.limit_messages(self._server.settings.api_max_bytes)
        if given.get("watch") and self._session is None and self._socket is not None:
            context = self._server.context
            principal = Principal(door=WATCHERS, unrestricted=True)
            self._session = context.hub.open(principal, WATCH_ENCODER, self)
            self._session.attach(self._socket)
            context.subscribe(self._session, WATCH, None)
        return Reply("connect", command.uid, body=b"true")

    def _send(self, data: bytes) -> None:
        if self._session is not None:
            self._session.reply(data)
        elif self._socket is not None:
            self._socket.write(data)

    # ---- from the socket ------------------------------------------------------------------------

    def on_full(self) -> None:
        """Pause pushes and reading: the send buffer is full."""
        if self._session is not None:
            self._session.pause()
        if self._socket is not None:
            self._socket.pause_reading()

    def on_drained(self) -> None:
        """Resume pushes and reading: the send buffer has room again."""
        if self._session is not None:
            self._session.resume()
        if self._socket is not None:
            self._socket.resume_reading()

    def on_closed(self) -> None:
        """Release the connection: the socket has closed."""
        self._socket = None
        self._waiting.clear()
        if self._session is not None:
            self._session.end()

    def expire(self) -> None:
        """Close the connection if it has not authenticated."""
        if not self._authenticated:
            self.close(Reason.UNAUTHORIZED)

    def close(self, reason: Reason) -> None:
        """Close with v1's text for the reason. Administrators may always reconnect."""
        socket = self._socket
        if socket is None:
            return
        if self._session is not None:
            self._session.write_out()
        self.on_closed()
        socket.close_with(codec.CLOSE_CODE, codec.close_reason(reason, reconnects=True))

    # ---- callbacks of the hub -------------------------------------------------------------------

    @override
    def subscribed(self, subscription: Subscription) -> None:
        # The reply to `connect` has already been sent.
        pass

    @override
    def refused(self, channel: Channel, error: RelayError) -> None:
        # The channel cannot be read. The page reconnects.
        del channel, error
        self.close(Reason.UNAVAILABLE)

    @override
    def dropped(self, channel: Channel, notice: Notice) -> None:
        del channel, notice
        self.close(Reason.UNAVAILABLE)

    @override
    def noticed(self, subscription: Subscription, notice: Notice) -> None:
        # The hub does not call this: `WatchEncoder.notice` never returns None.
        pass

    @override
    def expired(self) -> None:
        # The hub does not call this: the principal has no expiry time.
        pass

    @override
    def disconnect(self, reason: Reason) -> None:
        self.close(reason)


def _info(settings: CentrifugoSettings) -> bytes:
    """Return the settings without secrets. v1's reply contains one of the secrets."""
    config = settings.model_dump(mode="json", exclude=set(_SECRETS))
    for name, value in config.items():
        if name.endswith(_DURATIONS):
            config[name] = int(value * 1e9)
    body = {"data": {"version": codec.VERSION, "engine": "Redis", "config": config}}
    return orjson.dumps(body)
