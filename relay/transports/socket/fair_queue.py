"""A queue in which groups, such as the addresses of clients, take turns.

An item belongs to a group and its subgroups. The groups of each level take turns, so that a group
with many items does not delay the others. If the queue is full, the newest item of the longest
group makes room for an item of a shorter one.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Generic, TypeVar

T = TypeVar("T")


class FairQueue(Generic[T]):
    """The items of one group. The length of a path is the number of levels below it.

    All operations take constant time, except the search for a path with several levels.
    """

    __slots__ = ("_groups", "_items", "_longest", "_names", "_size")

    def __init__(self) -> None:
        self._groups: OrderedDict[str, FairQueue[T]] = OrderedDict()
        self._items: OrderedDict[T, None] = OrderedDict()
        self._size = 0
        # The names of the groups by size, and the largest size.
        self._names: dict[int, dict[str, None]] = {}
        self._longest = 0

    def __len__(self) -> int:
        return self._size

    @property
    def groups(self) -> int:
        """The number of groups that have items."""
        return len(self._groups)

    def add(self, path: Sequence[str], item: T) -> None:
        """Add an item at the end of its group."""
        self._size += 1
        if not path:
            self._items[item] = None
            return
        name = path[0]
        group = self._groups.get(name)
        if group is None:
            group = self._groups[name] = FairQueue()
        group.add(path[1:], item)
        self._resized(name, len(group) - 1)

    def remove(self, path: Sequence[str], item: T) -> None:
        """Remove an item that is in the queue."""
        self._size -= 1
        if not path:
            del self._items[item]
            return
        self._groups[path[0]].remove(path[1:], item)
        self._resized(path[0], len(self._groups[path[0]]) + 1)

    def pop(self) -> T:
        """Remove and return the next item."""
        self._size -= 1
        if not self._groups:
            return self._items.popitem(last=False)[0]
        name, group = next(iter(self._groups.items()))
        self._groups.move_to_end(name)
        item = group.pop()
        self._resized(name, len(group) + 1)
        return item

    def displaced_by(self, path: Sequence[str]) -> T | None:
        """Return the item that should make room for a new one, or None if the new one should not
        be accepted.

        It is the newest of the longest group, if that has at least two items more than the group of
        the new one.
        """
        if not path:
            return None
        own = self._groups.get(path[0])
        if self._longest > (len(own) if own else 0) + 1:
            return self._newest()
        return own.displaced_by(path[1:]) if own else None

    def _newest(self) -> T:
        if not self._groups:
            return next(reversed(self._items))
        return self._groups[next(iter(self._names[self._longest]))]._newest()

    def _resized(self, name: str, before: int) -> None:
        """Store the size of a group, which has changed by one."""
        size = len(self._groups[name])
        if before:
            same = self._names[before]
            del same[name]
            if not same:
                del self._names[before]
        if size:
            self._names.setdefault(size, {})[name] = None
        else:
            del self._groups[name]
        if size > self._longest or self._longest not in self._names:
            self._longest = size
