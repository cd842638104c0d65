"""The version of the data in Redis, and which versions may share one Redis.

`docs/workers.md`, "Two versions on one Redis", has the rule of what needs a new number.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

# The schema of this version.
SCHEMA = 1
# The oldest schema whose workers may run beside this version. 0: versions without a number.
COMPATIBLE_SINCE = 0


class Schemas(Protocol):
    """The schema of a worker, as its heartbeat says."""

    @property
    def instance(self) -> str:
        """Name of the worker."""

    @property
    def version(self) -> str:
        """Version of its relay."""

    @property
    def schema(self) -> int:
        """Schema of its version."""

    @property
    def compatible_since(self) -> int | None:
        """Oldest schema that may run beside it. None: only its own."""


def conflict(others: Iterable[Schemas]) -> str:
    """Return why this version must not run beside these workers, or ''."""
    for other in others:
        since = other.schema if other.compatible_since is None else other.compatible_since
        which = f"worker {other.instance} (relay {other.version})"
        if since > SCHEMA:
            return (
                f"{which} shares this Redis and writes schema {other.schema}, which versions with"
                f" schema {SCHEMA} such as this one cannot read: install the same version here"
            )
        if other.schema < COMPATIBLE_SINCE:
            return (
                f"{which} shares this Redis and cannot read schema {SCHEMA} of this version: stop"
                f" all workers with a schema below {COMPATIBLE_SINCE} first. A worker that was"
                " killed counts for 15 s."
            )
    return ""
