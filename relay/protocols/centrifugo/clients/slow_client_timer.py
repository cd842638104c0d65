"""Closes a client whose send buffer is full and which stops receiving."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from relay.core.reasons import Reason

if TYPE_CHECKING:
    import asyncio

    from relay.protocols.centrifugo.clients.interfaces import ClientTransport
    from relay.protocols.centrifugo.server_state import ServerState


class SlowClientTimer:
    """Watches one transport from its creation until `cancel`.

    If the client has received nothing within the time limit of the settings, it calls `close`.
    """

    __slots__ = ("_close", "_server", "_timer", "_transport", "_waiting_bytes")

    def __init__(
        self,
        server: ServerState,
        transport: ClientTransport,
        close: Callable[[Reason], None],
    ) -> None:
        self._server = server
        self._transport = transport
        self._close = close
        self._waiting_bytes = 0
        self._timer: asyncio.TimerHandle | None = None
        self._start()

    def cancel(self) -> None:
        """Stop watching: the buffer has drained or the connection has closed."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _start(self) -> None:
        self._waiting_bytes = self._transport.waiting_bytes()
        self._timer = self._server.call_later(self._limit_s(), self._check)

    def _limit_s(self) -> float:
        settings = self._server.settings
        return min(settings.client_message_write_timeout or float("inf"), settings.client_stalled_s)

    def _check(self) -> None:
        self._timer = None
        if self._transport.waiting_bytes() < self._waiting_bytes:
            self._start()
        elif self._limit_s() < self._server.settings.client_stalled_s:
            self._close(Reason.WRITE_TIMEOUT)
        else:
            self._close(Reason.SLOW)
