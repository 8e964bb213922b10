"""What the tests of object stores do with each of them: every call of the port, and every fault on its way.

And what they ask of the proxy in between.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from basin.storage.objects import PUT_SIZE_MAX, ByteRange, ObjectStore
from basin.storage.requests import RequestPolicy
from tests.s3_proxy import FaultProxy, Rule

POLICY = RequestPolicy(read_timeout_s=10)

Call = Callable[[ObjectStore], Any]

CALLS: dict[str, Call] = {
    "get": lambda store: store.get(ByteRange("a")),
    "get-range": lambda store: store.get(ByteRange("a", 1, 3)),
    "size": lambda store: store.size("a"),
    "put": lambda store: store.put("b", b"body"),
    "put_new": lambda store: store.put_new("b", b"body"),
    "put_file": lambda store: store.put_file("b", Path(__file__)),
    "delete": lambda store: store.delete(["b"]),
    "delete-many": lambda store: store.delete(["b", "c"]),
    "list": lambda store: store.list(""),
}

FAULTS = [
    (Rule("status", status=503, code="SlowDown"), "throttled"),
    (Rule("status", status=500, code="InternalError"), "server"),
    (Rule("status", status=409, code="ConditionalRequestConflict"), "contended"),
    (Rule("drop_before"), "connection"),
    (Rule("drop_after"), "connection"),
    (Rule("reset"), "connection"),
]
"""Each with the `reason` of the error that it leads to."""


def sent(proxy: FaultProxy) -> list[str]:
    return [exchange.method for exchange in proxy.exchanges]


def large_file(folder: Path, size: int = PUT_SIZE_MAX + 1) -> Path:
    path = folder / "large"
    with path.open("wb") as file:
        file.truncate(size)
    return path


def settle(proxy: FaultProxy) -> None:
    """Wait for what the proxy still passes on, though its client has gone: it must not be ended in the middle."""
    while any(exchange.status is None and exchange.action is None for exchange in proxy.exchanges):
        time.sleep(0.02)
