"""Errors of single servers, so that a task over all servers continues with the others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from relay.core.errors import RedisUnavailable, RelayError

if TYPE_CHECKING:
    from relay.stream.shards.shard import Shard, ShardMap


class ServerErrors:
    """Collects the first error of each server.

    Use `collect` for each server, and `finish` or `lines` at the end.
    """

    def __init__(self) -> None:
        self._found: dict[str, RelayError] = {}

    def __bool__(self) -> bool:
        return bool(self._found)

    def __contains__(self, shard: Shard) -> bool:
        return shard.name in self._found

    def add(self, shard: Shard, error: RelayError) -> None:
        """Keep the error of this server, unless there is an earlier one."""
        self._found.setdefault(shard.name, error)

    def copy(self) -> ServerErrors:
        """Return a copy, to which errors of one of several tasks can be added."""
        copied = ServerErrors()
        copied._found = dict(self._found)
        return copied

    @contextmanager
    def collect(self, shard: Shard) -> Iterator[None]:
        """Keep a RelayError of this block instead of raising it."""
        try:
            yield
        except RelayError as exc:
            self.add(shard, exc)

    def lines(self) -> list[str]:
        """Return the errors. Each names its server."""
        return [
            str(exc) if name in str(exc) else f"{name}: {exc}" for name, exc in self._found.items()
        ]

    def raise_of_single(self, shards: ShardMap) -> None:
        """Raise the error as it is if there is only one server: nothing else can be shown.

        Raises:
            RelayError: The only server has failed.
        """
        if len(shards.shards) == 1:
            for error in self._found.values():
                raise error

    def finish(self) -> None:
        """Raise one error with all `lines`, if there are any.

        Raises:
            RedisUnavailable: None of the servers can be reached or serve now.
            RelayError: One of the servers has rejected a command.
        """
        if not self._found:
            return
        first = next(iter(self._found.values()))
        error = RelayError
        if all(type(each) is RedisUnavailable for each in self._found.values()):
            error = RedisUnavailable
        raise error("; ".join(self.lines())) from first
