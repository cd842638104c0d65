"""Centrifugo's API, administrators and clients without sockets."""

from __future__ import annotations

import asyncio

from relay.core.model import Channel
from relay.core.reasons import Reason
from relay.protocols.centrifugo.administrators.connection import AdminConnection
from relay.protocols.centrifugo.administrators.node import NodeReport
from relay.protocols.centrifugo.api import replies
from relay.protocols.centrifugo.api.executor import CommandExecutor
from relay.protocols.centrifugo.api.server_commands import ServerCommands
from relay.protocols.centrifugo.commands import InvalidCommand
from relay.protocols.centrifugo.settings import CentrifugoSettings
from tests.support.centrifugo import Bench, Clock, Context, Socket, Transcript

API, ADMINS = "P", "MN"
TOKEN = "good"


class _Bus:
    instance = "bench:1"


class _Active:
    def __init__(self, context: Context) -> None:
        self._context = context

    async def channels(self) -> list[Channel]:
        await asyncio.sleep(0)
        return list(self._context.streams.followed)

    async def is_followed(self, channel: Channel) -> bool:
        return channel in await self.channels()

    async def workers(self) -> list[str]:
        return [_Bus.instance]


class ServerContext(Context):
    """The part of `DoorContext` that API and administrators use."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(clock)
        self.bus = _Bus()
        self.active = _Active(self)

    async def unsubscribe(
        self, user: str, *, channel: Channel | None = None, door: str | None = None
    ) -> None:
        self.hub.drop_subscription(channel, user, Reason.UNSUBSCRIBED, door)

    async def disconnect(
        self, user: str, *, channel: Channel | None = None, door: str | None = None
    ) -> None:
        del channel
        self.hub.disconnect_user(user, Reason.DISCONNECTED, door)


class _AdminSocket(Socket):
    def write(self, data: bytes) -> None:
        while data:
            size, head = data[1], 2
            if size == 126:
                size, head = int.from_bytes(data[2:4], "big"), 4
            self.lines.append(f"< {data[head : head + size].decode()}")
            data = data[head + size :]

    def limit_messages(self, max_bytes: int) -> None:
        pass

    def pause_reading(self) -> None:
        self.lines.append("paused")

    def resume_reading(self) -> None:
        pass


class ServerBench(Bench):
    """Adds the API as `P`, without a check of signatures, and administrators as `M` and `N`."""

    def __init__(self, settings: CentrifugoSettings) -> None:
        super().__init__(settings, ServerContext)
        self._api = CommandExecutor(
            self.server, ServerCommands(self.server, NodeReport(self.server))
        )
        self.sockets[API] = Socket()
        self._admins: dict[str, AdminConnection] = {}

    def send(self, name: str, text: str) -> None:
        if name == API:
            _ = self.context.spawn(self._request(text), name="request")
        elif name in ADMINS:
            if name not in self._admins:
                self._admins[name] = AdminConnection(self.server, self._api, TOKEN.__eq__)
                self.sockets[name] = socket = _AdminSocket()
                self._admins[name].on_open(socket)
            self._admins[name].on_frame(text.encode())
        else:
            super().send(name, text)

    async def _request(self, text: str) -> None:
        try:
            answer = replies.encode(await self._api.execute_request(text.encode()))
        except InvalidCommand:
            self.sockets[API].lines.append("x 400")
        else:
            self.sockets[API].lines.append(f"< {answer.decode()}")


class ServerTranscript(Transcript):
    """Adds steps: `P>` is an API request, `P<` and `Px` its response, `M` an administrator."""

    bench = ServerBench
