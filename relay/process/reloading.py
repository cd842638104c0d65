"""Reload the configuration on SIGHUP, in a single process or in the supervisor.

A new configuration must pass the same checks as at a start before it takes effect.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from relay.config.loading import after_reload
from relay.core.errors import RelayError

if TYPE_CHECKING:
    from relay.config.loading import Config

_log = logging.getLogger(__name__)


class Reloads:
    """Runs one reload at a time. `run` must be running."""

    def __init__(
        self,
        load: Callable[[], Config],
        current: Callable[[], Config],
        apply: Callable[[Config], None],
    ) -> None:
        """`load` runs in a thread, because it reads files and builds all parts to check them."""
        self._load = load
        self._current = current
        self._apply = apply
        self._requested = asyncio.Event()

    def request(self) -> None:
        """Reload soon. Requests during a reload cause one further reload."""
        self._requested.set()

    async def run(self) -> None:
        """Reload when requested. Runs until cancelled."""
        while True:
            await self._requested.wait()
            self._requested.clear()
            try:
                loaded = await asyncio.to_thread(self._load)
            except RelayError as exc:
                _log.error(
                    "Configuration not reloaded: %s. Keeping the previous settings.", exc
                )  # no bug
                continue
            for note in loaded.notes:
                _log.warning("%s", note)
            config, later = after_reload(self._current(), loaded)
            self._apply(config)
            if later:
                _log.warning("Changed settings that take effect at a restart: %s", ", ".join(later))
