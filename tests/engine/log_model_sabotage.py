"""Leaving a rule out of `apply`: the lines that hold it are replaced in a copy of their function."""

from __future__ import annotations

import inspect
from typing import Generic, NamedTuple, TypeVar

import pytest

from basin.engine import state as rules

Where = TypeVar("Where")


class Rule(NamedTuple, Generic[Where]):
    """A rule, the lines of a function of `state` that hold it, and the same lines without it."""

    name: str
    scenario: Where
    """Where the search notices that it is missing."""
    broken: set[str]
    function: str
    changes: dict[str, str]


def leave_out(rule: Rule[Where], patch: pytest.MonkeyPatch) -> None:
    """Put a copy of the rule's function, without the rule, in its place."""
    source = inspect.getsource(getattr(rules, rule.function))
    for lines, without in rule.changes.items():
        assert source.count(lines) == 1, lines
        source = source.replace(lines, without)
    copy: dict[str, object] = {}
    exec(compile("from __future__ import annotations\n" + source, rule.function, "exec"), rules.__dict__, copy)
    patch.setattr(rules, rule.function, copy[rule.function])
