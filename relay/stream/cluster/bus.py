"""Message bus between workers on all hosts.

For small notifications whose loss costs little. Each worker subscribes to one pub/sub channel of
its own. A message arrives at most once, and messages from one worker to another keep their order.
The number of receivers that PUBLISH returns is not used: operators and proxies subscribe too.

    (S)PUBLISH <p>bus:<address> <topic> NUL <sender's address> NUL <payload>

The address is the random part of the worker's name.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from relay.config.settings import RedisSettings
    from relay.stream.format.keys import Keys
    from relay.stream.shards.shard import ShardMap

from relay.stream.shards.links import ShardLinks

_log = logging.getLogger(__name__)


class ClusterBus:
    """Implements `relay.doorkit.contract.Bus`. Other services use `links` for commands too."""

    def __init__(
        self, *, shards: ShardMap, redis: RedisSettings, keys: Keys, instance: str
    ) -> None:
        self.instance = instance
        self.address = instance.rpartition(":")[2]
        self._keys = keys
        self._listeners: dict[str, Callable[[str, bytes], None]] = {}
        self.links = ShardLinks(
            shards,
            redis,
            subscribe_to=keys.bus(self.address),
            on_message=self._on_message,
            is_checked=True,
        )

    def listen(self, topic: str, on_payload: Callable[[str, bytes], None]) -> None:
        """Pass messages on this topic to `on_payload`, with the address of the sender."""
        self._listeners[topic] = on_payload

    def send(self, address: str, topic: str, payload: bytes) -> None:
        """Send a message to one worker. It is lost if that worker or Redis is unreachable."""
        if address == self.address:
            self._deliver(topic, address, payload)
            return
        message = b"\0".join((topic.encode(), self.address.encode(), payload))
        self.links.publish(self._keys.bus(address), message)

    def _on_message(self, _name: bytes, message: bytes) -> None:
        topic, found, rest = message.partition(b"\0")
        sender, also, payload = rest.partition(b"\0")
        if found and also:
            self._deliver(topic.decode(errors="replace"), sender.decode(errors="replace"), payload)

    def _deliver(self, topic: str, sender: str, payload: bytes) -> None:
        listener = self._listeners.get(topic)
        if listener is None:
            # A newer relay on the same Redis may send topics that this version does not have.
            _log.debug("Ignored a message on unknown topic %r", topic[:50])
            return
        try:
            listener(sender, payload)
        except Exception:  # noqa: BLE001  # one message must not end the connection of all others
            _log.exception("Could not handle a message from %s on topic %r", sender, topic[:50])
