"""The policy of requests, and the waits between attempts."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from typing import Any

import pytest

from basin.errors import InvalidArgument
from basin.storage.requests import RequestPolicy, backoffs

SECONDS = ("connect_timeout_s", "read_timeout_s", "deadline_s", "backoff_first_s", "backoff_max_s")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *itertools.product(SECONDS, (0, -1, math.nan, math.inf, "5", None, True)),
        *itertools.product(("attempts", "concurrency"), (0, -1, 1.5, "5", None, True)),
        ("backoff_max_s", 0.04),
    ],
)
def test_a_policy_that_cannot_be_is_refused(field: str, value: Any) -> None:
    with pytest.raises(InvalidArgument) as caught:
        RequestPolicy(**{field: value})
    assert caught.value.argument == field


def test_the_smallest_policy_is_one() -> None:
    policy = RequestPolicy(1, 1, 1, 1, 1, 1, 1)
    assert list(backoffs(policy, random.random)) == []
    with pytest.raises(dataclasses.FrozenInstanceError):
        policy.attempts = 2  # type: ignore[misc]  # that is the point


def test_ceilings_double_up_to_their_maximum() -> None:
    policy = RequestPolicy(attempts=10, backoff_first_s=0.05, backoff_max_s=5.0)
    assert list(backoffs(policy, lambda: 1.0)) == pytest.approx([0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0])
    assert list(backoffs(policy, lambda: 0.0)) == [0.0] * 9


def test_the_jitter_is_full(rng: random.Random) -> None:
    policy = RequestPolicy(attempts=2, backoff_first_s=1.0)
    drawn = [next(backoffs(policy, rng.random)) for _ in range(1000)]
    assert min(drawn) < 0.1
    assert max(drawn) > 0.9
    assert 0.4 < sum(drawn) / 1000 < 0.6
