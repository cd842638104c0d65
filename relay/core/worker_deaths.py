"""News of the death of other workers.

The supervisor reports the death of a worker of this host at once. The death of a worker of another
host is reported when its heartbeat has been missing for some time.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from relay.core.worker_memory import WorkerMemory

# Instances that are remembered. All data of a dead worker in Redis has expired or been removed
# before so many others have died.
_REMEMBERED = 1000

_log = logging.getLogger(__name__)


class WorkerDeaths:
    """Informs every part of this worker that keeps something for another worker."""

    def __init__(self, siblings: WorkerMemory | None = None) -> None:
        """`siblings` is the memory that the workers of this host share."""
        # Called once for each death, with the instance.
        self.on_death: list[Callable[[str], None]] = []
        self._siblings = siblings
        self._dead: dict[str, None] = {}

    def is_dead(self, instance: str) -> bool:
        """Return True if the worker is known to have died."""
        return instance in self._dead or self.is_certain(instance)

    def is_certain(self, instance: str) -> bool:
        """Return True if the supervisor has seen the death of the process."""
        # It writes to the memory before it sends its report.
        return self._siblings is not None and self._siblings.is_dead(instance)

    def withdraw(self, instance: str) -> None:
        """Withdraw a report: the worker was frozen or cut off, and has a heartbeat again."""
        if self._dead.pop(instance, self) is None:
            _log.warning("Worker %s is alive again", instance)

    def report(self, instance: str) -> None:
        """Report a death. Repeated reports are ignored."""
        if instance in self._dead:
            return
        self._dead[instance] = None
        if len(self._dead) > _REMEMBERED:
            del self._dead[next(iter(self._dead))]
        _log.info("Worker %s has died", instance)
        for notify in self.on_death:
            notify(instance)
