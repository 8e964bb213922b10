"""Rows of a table that is too large for memory, in temporary files on this machine's disk.

Invariant: the files are gone when the spool is closed, and nothing but what was added is read.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt


class RowSpool:
    """Rows of one type by part number: appended in any order, read back part by part, from one file for each part."""

    def __init__(self, dtype: npt.DTypeLike, folder: str) -> None:
        """`folder`: where temporary files go; empty: the system's."""
        self._dtype = np.dtype(dtype)
        self._folder = tempfile.TemporaryDirectory(prefix="basin-", dir=folder or None)
        self._sizes: dict[int, int] = {}

    def add(self, parts: npt.NDArray[Any], rows: npt.NDArray[Any]) -> None:
        """Append each row to its part; rows of one part keep their order."""
        order = np.argsort(parts, kind="stable")
        parts, rows = parts[order], rows[order]
        numbers, starts = np.unique(parts, return_index=True)
        stops = [*starts.tolist()[1:], len(rows)]
        for number, start, stop in zip(numbers.tolist(), starts.tolist(), stops, strict=True):
            with self._path(number).open("ab") as file:
                file.write(rows[start:stop].tobytes())
            self._sizes[number] = self._sizes.get(number, 0) + stop - start

    def _path(self, number: int) -> Path:
        return Path(self._folder.name) / str(number)

    def parts(self) -> list[int]:
        """The parts that have rows."""
        return sorted(self._sizes)

    def read(self, number: int) -> npt.NDArray[Any]:
        """All rows of one part."""
        if number not in self._sizes:
            return np.zeros(0, dtype=self._dtype)
        return np.fromfile(self._path(number), dtype=self._dtype)

    def close(self) -> None:
        """Delete the files."""
        self._folder.cleanup()
