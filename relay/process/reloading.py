"""Reloading the configuration on SIGHUP, for a relay alone and for the supervisor of several.

A new configuration passes the same checks as at a start before any of it takes effect.
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
    """Reloads one after the other; `run` must be running."""

    def __init__(
        self,
        load: Callable[[], Config],
        current: Callable[[], Config],
        apply: Callable[[Config], None],
    ) -> None:
        """`load` runs in a thread: it reads files and builds every part once to check it."""
        self._load = load
        self._current = current
        self._apply = apply
        self._asked = asyncio.Event()

    def ask(self) -> None:
        """Reload soon; requests that come meanwhile are one further reload."""
        self._asked.set()

    async def run(self) -> None:
        """Reload whenever asked, until cancelled."""
        while True:
            await self._asked.wait()
            self._asked.clear()
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
                _log.warning("Changed, but not in force before a restart: %s", ", ".join(later))
