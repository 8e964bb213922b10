"""Text that has no UTF-8 is refused as an argument, wherever text may stand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from basin.api import Database
from basin.errors import InvalidArgument
from basin.testing.disk import SimulatedDisk
from tests.engine.small_basin import open_disk

HALF = "\ud800"


@pytest.mark.parametrize(
    "use",
    [
        lambda db: db.put(HALF, b"value"),
        lambda db: db.get(HALF),
        lambda db: list(db.scan(prefix=HALF)),
        lambda db: db.keyspace(HALF),
        lambda db: db.keyspace("tuples", order="tuple").put((HALF,), b"value"),
    ],
    ids=["put", "get", "scan", "keyspace", "tuple"],
)
def test_half_a_surrogate_pair_is_refused(use: Callable[[Database], Any]) -> None:
    with open_disk(SimulatedDisk(), "open", "x") as db, pytest.raises(InvalidArgument, match="UTF-8"):
        use(db)
