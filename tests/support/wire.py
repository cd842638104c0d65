"""A plain connection to the server, for tests that decide when a reply is processed."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from typing import cast

import hiredis

from relay.stream.connection.pipeline_connection import RedisCommand

_MORE = object()
_pack = cast(Callable[[tuple[bytes | str | int, ...]], bytes], hiredis.pack_command)


class Wire:
    """A blocking RESP3 connection. Pushes are passed on when read, as in PipelineConnection."""

    def __init__(self, port: int, on_push: Callable[[list[object]], None] | None = None) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=30)
        self._reader = hiredis.Reader(notEnoughData=_MORE)
        self._on_push = on_push
        self.execute([("HELLO", 3, "AUTH", "admin", "any")])

    def execute(self, commands: Sequence[RedisCommand]) -> list[object]:
        """Send one pipeline. Error replies are in the list."""
        self._socket.sendall(b"".join([_pack(tuple(command)) for command in commands]))
        replies: list[object] = []
        while len(replies) < len(commands):
            reply = self._reader.gets()
            if reply is _MORE:
                data = self._socket.recv(65536)
                assert data, "the server closed the connection"
                self._reader.feed(data)
            elif isinstance(reply, hiredis.PushNotification):
                if self._on_push is not None:
                    self._on_push(reply)
            else:
                replies.append(reply)
        return replies

    def call(self, *command: bytes | str | int) -> object:
        (reply,) = self.execute([command])
        return reply

    def close(self) -> None:
        self._socket.close()
