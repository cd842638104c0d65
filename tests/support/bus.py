"""A bus between the workers of one process, with the failures of a real one."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable

Listener = Callable[[str, bytes], None]


class Wire:
    """Delivers messages of `WireBus` objects in order, in a later turn of the event loop."""

    def __init__(self) -> None:
        self.listeners: dict[str, dict[str, Listener]] = defaultdict(dict)
        self.dead: set[str] = set()
        # Returns True to lose a message; the arguments are sender, receiver and payload.
        self.lose: Callable[[str, str, bytes], bool] = lambda sender, receiver, payload: False
        self.sent = 0

    def bus(self, instance: str) -> WireBus:
        return WireBus(self, instance)


class WireBus:
    """The bus of one worker (`relay.doorkit.contract.Bus`)."""

    def __init__(self, wire: Wire, instance: str) -> None:
        self._wire = wire
        self.instance = self.address = instance

    def send(self, instance: str, topic: str, payload: bytes) -> asyncio.Future[bool]:
        loop = asyncio.get_running_loop()
        done: asyncio.Future[bool] = loop.create_future()
        wire = self._wire
        wire.sent += 1
        lost = wire.lose(self.instance, instance, payload)

        def deliver() -> None:
            if self.instance in wire.dead:
                done.cancel()
                return
            listener = wire.listeners[instance].get(topic)
            there = listener is not None and instance not in wire.dead
            done.set_result(there)
            if listener is not None and there and not lost:
                listener(self.instance, payload)

        loop.call_soon(deliver)
        return done

    def listen(self, topic: str, on_payload: Listener) -> None:
        self._wire.listeners[self.instance][topic] = on_payload
