"""Every log that can come about in a model, as a tree, and what its names and commits are.

What it takes from the product, and does not imitate: `Record` and its bytes, `apply` and `fold`, `state_to_map` and
`state_from_map`. Imported by `log_model`, which has the actors.
"""

from __future__ import annotations

from collections import Counter
from typing import Final

import msgpack

from basin.engine import state as rules
from basin.engine.state import State, state_from_map, state_to_map
from basin.format.record import Record, decode_record, encode_record
from basin.terms import StratumId

UNREAD: Final = "a transaction counts on what it did not read"
DIFFERENT: Final = "the log is judged differently"
STUCK: Final = "somebody is stuck"

CLAIM: Final = b"claim"
"""A name that a transaction gives only if it is absent."""


class Violation(Exception):
    """An invariant does not hold. `invariant` is its name; the notes are the steps that lead there."""

    def __init__(self, invariant: str, detail: str = "") -> None:
        super().__init__(f"{invariant}: {detail}")
        self.invariant = invariant


def stratum(number: int) -> StratumId:
    return StratumId(number.to_bytes(16, "big"))


def number_of(identity: bytes) -> int:
    return int.from_bytes(identity, "big")


class History:
    """Every log that can come about, as a tree: a node is one log, and stands for the state that it folds to.

    Node 0 is the empty log. Records are numbered by their bytes; the hash of a stored one is its position and number.
    """

    def __init__(self) -> None:
        self.states = [State()]
        self.paths: list[tuple[int, ...]] = [()]
        self.parents = [0]
        self.counts = [True]
        self.names: list[dict[bytes, int]] = [{}]
        self.commits: list[Counter[bytes]] = [Counter()]
        self.logged: list[frozenset[bytes]] = [frozenset()]
        """Every stratum that the records of a log ever added."""
        self.flaws = [""]
        self.records: list[bytes] = []
        self.voids = 0
        self._numbers: dict[bytes, int] = {}
        self._children: dict[tuple[int, int], int] = {}
        self._judged: set[tuple[int, int]] = set()

    def number(self, record: Record) -> int:
        """The number of a record's bytes."""
        payload = encode_record(record)
        if payload not in self._numbers:
            self._numbers[payload] = len(self.records)
            self.records.append(payload)
        return self._numbers[payload]

    def judge(self, node: int, record: Record) -> int:
        """The record's number, if `apply` accepts it behind this log, else its `Conflict`."""
        number = self.number(record)
        try:
            rules.apply(self.states[node], record, self._hash(node, number))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise Violation(STUCK, f"a record raises {error!r}") from error
        self._judged.add((node, number))
        return number

    def _hash(self, node: int, number: int) -> bytes:
        return (self.states[node].position + 1 << 32 | number).to_bytes(32, "big")

    def extend(self, node: int, number: int) -> int:
        """The log with one more stored record, folded as everybody folds it."""
        known = self._children.get((node, number))
        if known is None:
            known = self._children[node, number] = self._grow(node, number)
        return known

    def _grow(self, node: int, number: int) -> int:
        before, record = self.states[node], decode_record(self.records[number])
        try:
            state, counts = rules.fold(before, record, self._hash(node, number))
            copied = state_from_map(msgpack.unpackb(msgpack.packb(state_to_map(before)), strict_map_key=False))
            again = rules.fold(copied, record, self._hash(node, number))
        except Exception as error:  # whatever it is, everybody who follows the log raises it
            raise Violation(STUCK, f"a stored record raises {error!r}") from error
        flaw = ""
        if again != (state, counts) or state.position != before.position + 1:
            flaw = DIFFERENT
        if not counts and (node, number) in self._judged:
            flaw = DIFFERENT
        names, commits = dict(self.names[node]), self.commits[node]
        if counts:
            commits = commits.copy()
            flaw = flaw or change_names(record, names, commits)
        self.states.append(state)
        self.paths.append((*self.paths[node], number))
        self.parents.append(node)
        self.counts.append(counts)
        self.names.append(names)
        self.commits.append(commits)
        added = [one.id for one in record.strata_added] if counts else []
        self.logged.append(self.logged[node].union(added))
        self.flaws.append(flaw)
        self.voids += not counts
        return len(self.states) - 1

    def is_ours(self, node: int, slot: int, number: int) -> bool:
        """Whether this record stands in a slot and counts there."""
        if self.paths[node][slot - 1] != number:
            return False
        while len(self.paths[node]) > slot:
            node = self.parents[node]
        return self.counts[node]


def change_names(record: Record, names: dict[bytes, int], commits: Counter[bytes]) -> str:
    """Fold the batches of a record that counts. Returns the invariant that it breaks, or nothing."""
    flaw = ""
    for batch in record.batches:
        for name in batch.names:
            if name == CLAIM and name in names:
                flaw = UNREAD
            names[name] = 0
        for name, content in zip(batch.reference_names, batch.reference_keys, strict=True):
            names[name] = number_of(content)
        for name in batch.deletes:
            names.pop(name, None)
        commits.update(name for name in (*batch.names, *batch.reference_names) if name.startswith(b"commit"))
    return flaw
