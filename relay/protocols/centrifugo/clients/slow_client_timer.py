"""A client that takes nothing: how long that is borne, and what it is told at its end."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import asyncio

    from relay.protocols.centrifugo.server_state import ClientTransport, ServerState


class SlowClientTimer:
    """Watches one full socket until `end`; `close` is called with v1's reason and whether to come
    again, once nothing was taken for the time that the settings give."""

    __slots__ = ("_close", "_door", "_socket", "_timer", "_waiting")

    def __init__(
        self, door: ServerState, socket: ClientTransport, close: Callable[[str, bool], None]
    ) -> None:
        self._door = door
        self._socket = socket
        self._close = close
        self._waiting = 0
        self._timer: asyncio.TimerHandle | None = None
        self._watch()

    def end(self) -> None:
        """It has drained, or is gone."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _watch(self) -> None:
        self._waiting = self._socket.waiting_bytes()
        self._timer = self._door.call_later(self._limit_s(), self._look)

    def _limit_s(self) -> float:
        settings = self._door.settings
        return min(settings.client_message_write_timeout or float("inf"), settings.client_stalled_s)

    def _look(self) -> None:
        self._timer = None
        if self._socket.waiting_bytes() < self._waiting:
            self._watch()
        elif self._limit_s() < self._door.settings.client_stalled_s:
            self._close("error sending message", True)
        else:
            self._close("slow", False)
