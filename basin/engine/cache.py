"""`Cache`: one budget of memory for everything that a handle keeps of what it read.

Blocks of names, pages of grain indexes and grains stand in dicts of those who read them, so that a hit is one dict
look-up without a lock. The cache only knows what came when and how large it is, and drops the oldest: what is read
again comes back as new. An order by last use would cost every hit 50 ns, a twentieth of a small read.

Invariants: what is counted is at least what is held; nothing is dropped but by `keep` of something else.
"""

from __future__ import annotations

import threading
from collections import deque
from typing import Any, TypeVar

K = TypeVar("K")
V = TypeVar("V")


class Cache:
    """At most `size_max` bytes over all dicts. Safe for threads."""

    def __init__(self, size_max: int) -> None:
        self._order: deque[tuple[dict[Any, Any], Any, object, int]] = deque()
        self._size = 0
        self._size_max = size_max
        self._mutex = threading.Lock()

    def keep(self, entries: dict[K, V], key: K, value: V, size: int) -> None:
        """Put `value` into `entries`, unless the key is there or it is larger than an eighth of the budget.

        `size` is what it holds in memory, in bytes. `entries` may be cleared at any time.
        """
        if size > self._size_max >> 3:
            return
        with self._mutex:
            if key in entries:
                return
            entries[key] = value
            self._order.append((entries, key, value, size))
            self._size += size
            while self._size > self._size_max:
                old_entries, old_key, old_value, old_size = self._order.popleft()
                self._size -= old_size
                if old_entries.get(old_key) is old_value:  # Not if that was cleared, and has been read again since.
                    del old_entries[old_key]

    def clear(self) -> None:
        """Drop everything."""
        with self._mutex:
            for entries, key, _, _ in self._order:
                entries.pop(key, None)
            self._order.clear()
            self._size = 0
