"""Bytes from one worker of the site to another, whichever host it is on.

Each worker listens to one pub/sub channel of its own. What is sent arrives at most once, in order
between two workers; the sender learns whether anybody was there.

    PUBLISH <p>bus:<address> <topic> NUL <sender's address> NUL <payload>

The address is the random part of the worker's name. Clients see it in session IDs, so it must not
contain the host or port.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, cast

from relay.core.errors import Unavailable

if TYPE_CHECKING:
    from relay.config.settings import RedisSettings
    from relay.stream.format.keys import Keys

from relay.stream.connection.reconnecting import ReconnectingConnection

_log = logging.getLogger(__name__)


class ClusterBus:
    """See `relay.doorkit.contract.Bus`; `link` also serves small commands of others."""

    def __init__(self, *, redis: RedisSettings, keys: Keys, instance: str) -> None:
        self.instance = instance
        self.address = instance.rpartition(":")[2]
        self._keys = keys
        self._listeners: dict[str, Callable[[str, bytes], None]] = {}
        self.link = ReconnectingConnection(
            redis, subscribe_to=[keys.bus(self.address)], on_message=self._on_message
        )

    def listen(self, topic: str, on_payload: Callable[[str, bytes], None]) -> None:
        """See `relay.doorkit.contract.Bus`."""
        self._listeners[topic] = on_payload

    def send(self, address: str, topic: str, payload: bytes) -> asyncio.Future[bool]:
        """See `relay.doorkit.contract.Bus`."""
        told: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        if address == self.address:
            self._deliver(topic, address, payload)
            told.set_result(True)
            return told
        message = b"\0".join((topic.encode(), self.address.encode(), payload))
        sent = cast(
            "asyncio.Future[list[object]]",
            self.link.execute([("PUBLISH", self._keys.bus(address), message)]),
        )

        def done(finished: asyncio.Future[list[object]]) -> None:
            if finished.cancelled():
                told.cancel()
                return
            exc = finished.exception()
            if told.done():
                return
            if exc is not None:
                told.set_exception(Unavailable(str(exc)))
                # Whoever only tells, and does not ask, need not look.
                told.exception()
            else:
                told.set_result(finished.result()[0] == 1)

        sent.add_done_callback(done)
        return told

    def _on_message(self, _name: bytes, message: bytes) -> None:
        topic, found, rest = message.partition(b"\0")
        sender, also, payload = rest.partition(b"\0")
        if found and also:
            self._deliver(topic.decode(errors="replace"), sender.decode(errors="replace"), payload)

    def _deliver(self, topic: str, sender: str, payload: bytes) -> None:
        listener = self._listeners.get(topic)
        if listener is None:
            # A newer relay on the same Redis may say more than this one knows.
            _log.debug("nobody listens to %r", topic[:50])
            return
        try:
            listener(sender, payload)
        except Exception:  # noqa: BLE001  # one message must not end the link of all others
            _log.exception("a message of %s for %r failed", sender, topic[:50])
