"""What a repair consists of: tasks, each with the action that a dry run shows.

Invariants: planning writes nothing; a task that cannot be carried out says what is lost; carrying one out a second time
does nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final, NamedTuple

NAMES_LISTED_MAX: Final = 100


@dataclass(frozen=True, slots=True)
class RepairAction:
    """One thing that `repair` would do, or did (`done`). `object` is the file that it mends.

    What is lost for good is not `possible` to mend. `names` and `content_keys` are what is lost by it, at most 100 of
    each: names that can no longer be read as they were, and contents that nothing holds any more.
    """

    kind: str
    object: str
    detail: str
    done: bool = False
    possible: bool = True
    names: tuple[bytes, ...] = ()
    content_keys: tuple[str, ...] = ()


class Task(NamedTuple):
    """An action, and what carries it out and returns whether it did; None where nothing can."""

    action: RepairAction
    run: Callable[[], bool] | None


def impossible(
    kind: str, name: str, detail: str, *, names: Iterable[bytes] = (), content_keys: Iterable[str] = ()
) -> Task:
    """What cannot be mended, and what is lost."""
    listed = tuple(names)[:NAMES_LISTED_MAX]
    keys = tuple(content_keys)[:NAMES_LISTED_MAX]
    return Task(RepairAction(kind, name, detail, possible=False, names=listed, content_keys=keys), None)


def counted(number: int, noun: str, plural: str = "") -> str:
    """`1 grain`, `2 grains`; `plural` where an `s` does not make it."""
    return f"{number} {noun if number == 1 else plural or noun + 's'}"
