"""One administrator at v1's `/socket`: commands in, replies out. No I/O of its own.

Commands are those of the API besides `connect`, `ping` and `info`; replies are always an array
(libcentrifugo/conns/adminconn of v1.8.0). v1 sends them to those alone who connected with `watch`;
here all get theirs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import orjson

from relay.core.errors import RelayError
from relay.core.model import Principal
from relay.hub.encoding import SharedEncoder
from relay.protocols.centrifugo import codec, commands
from relay.protocols.centrifugo.api.replies import Reply, encode
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

CLOSE_CODE = 3000
# Frames that wait for their turn before no more is read.
_WAITING = 16
_SECRETS = frozenset({"secret", "admin_password", "admin_secret"})
# v1 tells these in nanoseconds; in settings they are seconds.
_DURATIONS = ("_interval", "_delay", "_timeout")


class AdminTransport(Protocol):
    """The administrator's socket."""

    full: bool

    def write(self, data: bytes) -> None:
        """Framed bytes."""

    def close(self, last: bytes = b"") -> None:
        """After everything is out."""

    def close_with(self, code: int, reason: str = "") -> None:
        """Close with a code and a reason."""

    def pause_reading(self) -> None:
        """Nothing more for now."""

    def resume_reading(self) -> None:
        """Go on."""


class WatchEncoder(SharedEncoder):
    """The encoder of what administrators watch (`relay.hub.encoding.Encoder`)."""

    door = WATCHERS

    def event(self, event: Event) -> bytes:
        """A push; nothing for what others may write to this channel."""
        if event.door != WATCHERS:
            return b""
        return frame_text(b'{"method":"message","error":null,"body":' + event.data + b"}")

    def notice(self, channel: Channel, notice: Notice) -> bytes | None:
        """Nothing is promised here that could be missing."""
        del channel, notice
        return b""


WATCH_ENCODER = WatchEncoder()


class AdminConnection:
    """The table, and the hub's view of who watches (`relay.hub.session.Client`)."""

    def __init__(
        self, door: ServerState, api: CommandExecutor, is_valid: Callable[[str], bool]
    ) -> None:
        """`is_valid`: whether a token of `/auth/` still holds."""
        self._door = door
        self._api = api
        self._is_valid = is_valid
        self._socket: AdminTransport | None = None
        self._session: Session | None = None
        self._waiting: deque[bytes] = deque()
        self._busy = False
        self._known = door.settings.insecure_admin

    def attached(self, socket: AdminTransport) -> None:
        """The handshake is done."""
        self._socket = socket

    def on_frame(self, frame: bytes) -> None:
        """One frame; it is dealt with once those before it have been."""
        self._waiting.append(frame)
        if self._socket is not None and len(self._waiting) >= _WAITING:
            self._socket.pause_reading()
        if not self._busy:
            self._busy = True
            # It ends with the frames that wait.
            _ = self._door.context.spawn(self._carry_out(), name="centrifugo admin")

    async def _carry_out(self) -> None:
        while self._waiting and self._socket is not None:
            try:
                await self._answer(self._waiting.popleft())
            except commands.InvalidCommand as exc:
                known = str(exc) in (codec.UNAUTHORIZED, codec.METHOD_NOT_FOUND)
                self.close(str(exc) if known else codec.INVALID_MESSAGE)
            except RelayError:
                self.close(codec.INTERNAL_ERROR)
            if self._socket is not None and not self._socket.full:
                self._socket.resume_reading()
        self._busy = False

    async def _answer(self, frame: bytes) -> None:
        if frame[:1] not in (b"[", b"{"):
            raise commands.InvalidCommand("neither an object nor an array")
        asked = commands.many(frame) if frame.startswith(b"[") else [commands.one(frame)]
        replies = [await self._reply(command) for command in asked]
        if replies:
            self._say(frame_text(encode(replies)))

    async def _reply(self, command: CentrifugoCommand) -> Reply:
        method, params, uid = command
        if method == "connect":
            return self._connect(command)
        if not self._known:
            raise commands.InvalidCommand(codec.UNAUTHORIZED)
        if method == "ping":
            return Reply(method, uid, body=b'"pong"')
        if method == "info":
            return Reply(method, uid, body=_info(self._door.settings))
        if not self._api.knows(method):
            raise commands.InvalidCommand(codec.METHOD_NOT_FOUND)
        del params
        (reply,) = await self._api.run([command])
        return reply

    def _connect(self, command: CentrifugoCommand) -> Reply:
        given = commands.fields(command.params, strings=("token",), bools=("watch",))
        if not self._door.settings.insecure_admin and not self._is_valid(given.get("token", "")):
            raise commands.InvalidCommand(codec.UNAUTHORIZED)
        self._known = True
        if given.get("watch") and self._session is None and self._socket is not None:
            context = self._door.context
            principal = Principal(door=WATCHERS, unrestricted=True)
            self._session = context.hub.open(principal, WATCH_ENCODER, self)
            self._session.attach(self._socket)
            context.subscribe(self._session, WATCH, None)
        return Reply("connect", command.uid, body=b"true")

    def _say(self, data: bytes) -> None:
        if self._session is not None:
            self._session.reply(data)
        elif self._socket is not None:
            self._socket.write(data)

    # ---- from the socket ------------------------------------------------------------------------

    def filled(self) -> None:
        """Who does not read is shown nothing and asked nothing meanwhile."""
        if self._session is not None:
            self._session.pause()
        if self._socket is not None:
            self._socket.pause_reading()

    def drained(self) -> None:
        """There is room again."""
        if self._session is not None:
            self._session.resume()
        if self._socket is not None:
            self._socket.resume_reading()

    def gone(self) -> None:
        """The socket is closed."""
        self._socket = None
        self._waiting.clear()
        if self._session is not None:
            self._session.end()

    def expire(self) -> None:
        """Close the connection if it has not authenticated."""
        if not self._known:
            self.close(codec.UNAUTHORIZED)

    def close(self, reason: str) -> None:
        """Say why; administrators may always come back."""
        socket = self._socket
        if socket is None:
            return
        if self._session is not None:
            self._session.write_out()
        self.gone()
        socket.close_with(CLOSE_CODE, codec.close_reason(reason, reconnect=True))

    # ---- from the hub (relay.hub.session.Client) ------------------------------------------------

    def subscribed(self, subscription: Subscription) -> None:
        """See `relay.hub.session.Client`."""

    def refused(self, channel: Channel, error: RelayError) -> None:
        """Streams cannot be read now: the page connects again."""
        del channel, error
        self.close(codec.INTERNAL_ERROR)

    def dropped(self, channel: Channel, notice: Notice) -> None:
        """See `relay.hub.session.Client`."""
        del channel, notice
        self.close(codec.INTERNAL_ERROR)

    def noticed(self, subscription: Subscription, notice: Notice) -> None:
        """Never called: `Pushes.notice` always has an answer."""

    def expired(self) -> None:
        """Never called: there is no end to this principal."""

    def disconnect(self, reason: str) -> None:
        """See `relay.hub.session.Client`."""
        self.close("shutting down" if reason == "stopping" else reason)


def _info(settings: CentrifugoSettings) -> bytes:
    """Options without secrets, of which v1's answer has one."""
    config = settings.model_dump(mode="json", exclude=set(_SECRETS))
    for name, value in config.items():
        if name.endswith(_DURATIONS):
            config[name] = int(value * 1e9)
    body = {"data": {"version": codec.VERSION, "engine": "Redis", "config": config}}
    return orjson.dumps(body)
