"""The rows of earlier backups, which tell what need not be read again.

Invariants:

- Rows are asked for in tree order, and read once.
- A row is not believed unchanged if the file may have been written after it was read in the same tick of the clock.

Imported by `create`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from basin.format.tree import Entry, RowKind, order_of
from basin.layers.snapshots.attributes import PLAIN_SIZE, decode_attributes, identity_of
from basin.layers.snapshots.journal import Beginning
from basin.layers.snapshots.scan import Found
from basin.terms import ContentKey

_TICK_NS: Final = 20_000_000
"""File systems keep times by the ticks of the kernel, up to 10 ms apart."""
_FILE: Final = int(RowKind.FILE)


@dataclass(frozen=True)
class Known:
    """Rows of an earlier backup in tree order, and when it began: what was written since is not believed.

    `beginning`: of the file at which it was interrupted.
    """

    rows: Iterator[Entry]
    start_ns: int
    beginning: Beginning | None = None


class Earlier:
    """The rows of one earlier backup, to be asked for in tree order."""

    def __init__(self, known: Known) -> None:
        self._rows = known.rows
        self._trusted_ns = known.start_ns - _TICK_NS
        self._beginning = known.beginning
        self._row = next(self._rows, None)

    def find(self, order: bytes, name: bytes) -> Entry | None:
        """The row of a path. Never again one before it."""
        row = self._row
        while row is not None:
            here = order_of(row.parent)
            if (here, row.name) >= (order, name):
                break
            row = self._row = next(self._rows, None)
        if row is None or row.name != name or order_of(row.parent) != order:
            return None
        return row

    def beginning_of(self, found: Found) -> list[tuple[ContentKey, int]]:
        """The parts that a file begins with that has not changed since; none if nothing is known of it."""
        one = self._beginning
        if (
            one is None
            or found.path != one.path
            or found.stat.st_size != one.size
            or identity_of(found.meta) != one.identity
            or found.stat.st_ctime_ns >= self._trusted_ns
        ):
            return []
        return one.parts

    def row_of(self, found: Found, order: bytes) -> Entry | None:
        """The row of a file that has not changed since."""
        row = self.find(order, found.name)
        stat = found.stat
        if (
            row is None
            or row.kind != _FILE
            or row.key is None
            or row.size != stat.st_size
            or stat.st_ctime_ns >= self._trusted_ns
        ):
            return None
        if row.meta == found.meta:
            return row
        if identity_of(row.meta) != identity_of(found.meta) or (
            len(row.meta) > PLAIN_SIZE and decode_attributes(row.meta).changed
        ):
            return None
        return row._replace(meta=found.meta)
