"""How long to wait for a bucket, how often to ask it again, and how many requests may be under way at once.

Invariants:

- A policy is valid from its construction on, and never changes.
- `backoffs` is pure: it sleeps nowhere and reads no clock; the source of random numbers is the caller's.

Imports `basin.errors` only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from basin.errors import InvalidArgument


@dataclass(frozen=True, slots=True)
class RequestPolicy:
    """Limits of the requests to one bucket. Raises `InvalidArgument` for a value that cannot be meant.

    - `connect_timeout_s`: for a connection to come about, DNS and TLS included.
    - `read_timeout_s`: for the next bytes of an answer; not for a whole body.
    - `attempts`: how often one operation is tried in all; 1 is never again.
    - `deadline_s`: for one operation with all its attempts. It also ends a single attempt whose bytes trickle.
    - `backoff_first_s`, `backoff_max_s`: the longest wait before the second attempt, and before any attempt.
    - `concurrency`: requests under way at once for one call of many names.
    """

    connect_timeout_s: float = 5.0
    read_timeout_s: float = 30.0
    attempts: int = 8
    deadline_s: float = 120.0
    backoff_first_s: float = 0.05
    backoff_max_s: float = 5.0
    concurrency: int = 32

    def __post_init__(self) -> None:
        for field in ("connect_timeout_s", "read_timeout_s", "deadline_s", "backoff_first_s", "backoff_max_s"):
            _require_seconds(field, getattr(self, field))
        for field in ("attempts", "concurrency"):
            _require_count(field, getattr(self, field))
        if self.backoff_max_s < self.backoff_first_s:
            raise InvalidArgument(
                f"backoff_max_s ({self.backoff_max_s}) is below backoff_first_s ({self.backoff_first_s})",
                argument="backoff_max_s",
            )


def _require_seconds(field: str, value: object) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not (0 < value < math.inf):  # type: ignore[operator]  # a number: the line above says so
        raise InvalidArgument(f"{field} must be a number of seconds above 0, not {value!r}", argument=field)


def _require_count(field: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InvalidArgument(f"{field} must be a whole number of at least 1, not {value!r}", argument=field)


def backoffs(policy: RequestPolicy, random: Callable[[], float]) -> Iterator[float]:
    """The waits in seconds between the attempts of one operation: `policy.attempts - 1` of them.

    `random` gives numbers from 0 up to 1, as `random.random` does.

    Full jitter: each is drawn evenly from 0 to a ceiling that doubles up to `backoff_max_s`, so that many clients that
    a busy service turned away at once do not come back at once.
    """
    ceiling = policy.backoff_first_s
    for _ in range(policy.attempts - 1):
        yield ceiling * random()
        ceiling = min(2 * ceiling, policy.backoff_max_s)
