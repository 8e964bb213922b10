"""The history checker: good histories are accepted, and handmade bad ones refused by the name of what is wrong."""

from __future__ import annotations

from typing import Any

import pytest

from basin.errors import CommitUnknown, Conflict, StorageUnavailable
from basin.testing.history import History, HistoryError, LoggedCommit, check_history, check_sum


def committed(history: History, actor: str, label: str, changes: dict[str, Any], position: int | None = None) -> None:
    history.commit(actor, label, changes, lambda: position)


def read(
    history: History, actor: str, values: dict[str, Any], *, fresh: bool = False, position: int | None = None
) -> None:
    history.read(actor, lambda: (position, values), fresh=fresh)


def unknown(history: History, actor: str, label: str, changes: dict[str, Any]) -> None:
    def fails() -> None:
        raise CommitUnknown("?", token=b"")

    with pytest.raises(CommitUnknown):
        history.commit(actor, label, changes, fails)


def failed(history: History, actor: str, label: str, changes: dict[str, Any]) -> None:
    def conflicts() -> None:
        raise Conflict("no")

    with pytest.raises(Conflict):
        history.commit(actor, label, changes, conflicts)


FIRST, SECOND, THIRD = (
    LoggedCommit(2, "first", {"x": 1, "y": 1}),
    LoggedCommit(5, "second", {"x": 2}),
    LoggedCommit(6, "third", {"x": 3, "y": None}),
)


def good_history() -> History:
    history = History()
    read(history, "reader", {"x": None, "y": None})
    committed(history, "a", "first", {"x": 1, "y": 1}, 2)
    unknown(history, "b", "second", {"x": 2})
    failed(history, "b", "never", {"x": 9})
    read(history, "a", {"x": 1, "y": 1}, position=4)
    committed(history, "a", "third", {"x": 3, "y": None}, 6)
    read(history, "reader", {"x": 2, "y": 1})
    read(history, "reader", {"x": 3, "y": None}, fresh=True)
    return history


class TestTheChecker:
    def test_a_good_history_is_accepted(self) -> None:
        check_history(good_history(), [FIRST, SECOND, THIRD])

    def test_an_unknown_commit_may_be_absent(self) -> None:
        history = History()
        committed(history, "a", "first", {"x": 1, "y": 1})
        unknown(history, "b", "second", {"x": 2})
        check_history(history, [FIRST])
        check_history(history, [FIRST, SECOND])

    @pytest.mark.parametrize(
        ("log", "words"),
        [
            ([FIRST, SECOND], "lost: commit third"),
            ([FIRST, SECOND, THIRD, THIRD._replace(position=9)], "duplicate: commit third"),
            ([THIRD._replace(position=1), FIRST, SECOND], "reordered: commit first of a"),
            ([FIRST, SECOND, THIRD, LoggedCommit(7, "never", {"x": 9})], "revived: commit never"),
            ([FIRST, SECOND, THIRD, LoggedCommit(7, "nobody", {})], "phantom: nobody committed nobody"),
            ([FIRST, SECOND._replace(changes={"x": 7}), THIRD], "changed: commit second"),
            ([FIRST, SECOND, THIRD._replace(position=8)], "misplaced: commit third"),
            ([SECOND, FIRST, THIRD], "positions do not ascend"),
        ],
    )
    def test_a_log_that_does_not_fit_is_refused(self, log: list[LoggedCommit], words: str) -> None:
        with pytest.raises(HistoryError, match=words):
            check_history(good_history(), log)

    def test_concurrent_commits_may_stand_in_either_order(self) -> None:
        history = History()

        def outer() -> None:
            committed(history, "b", "second", {"x": 2})

        history.commit("a", "first", {"x": 1, "y": 1}, outer)
        check_history(history, [FIRST, SECOND])
        check_history(history, [SECOND._replace(position=1), FIRST])

    @pytest.mark.parametrize(
        ("actor", "values", "fresh", "position", "words"),
        [
            ("r", {"x": 1, "y": None}, False, None, "torn"),
            ("r", {"x": 2, "y": 2}, False, None, "torn"),
            ("r", {"x": 2, "y": 1}, True, None, "stale"),
            ("a", {"x": 2, "y": 1}, False, None, "stale"),
            ("r", {"x": 2, "y": 1}, False, 4, "misplaced"),
            ("a", {"x": 2, "y": 1}, False, 5, "stale"),
        ],
    )
    def test_a_read_that_does_not_fit_is_refused(
        self, actor: str, values: dict[str, Any], fresh: bool, position: int | None, words: str
    ) -> None:
        history = good_history()
        read(history, actor, values, fresh=fresh, position=position)
        with pytest.raises(HistoryError, match=f"{words}: read of {actor}"):
            check_history(history, [FIRST, SECOND, THIRD])

    def test_an_actor_does_not_go_back_behind_what_it_saw(self) -> None:
        history = good_history()
        read(history, "r", {"x": 2, "y": 1})
        read(history, "r", {"x": 1, "y": 1})
        with pytest.raises(HistoryError, match="stale: read of r"):
            check_history(history, [FIRST, SECOND, THIRD])

    def test_a_read_from_the_future_is_refused(self) -> None:
        history = History()
        read(history, "r", {"x": 1})
        committed(history, "a", "first", {"x": 1, "y": 1})
        with pytest.raises(HistoryError, match="future: read of r"):
            check_history(history, [FIRST])

    def test_a_value_that_comes_back_is_not_stale(self) -> None:
        log = [LoggedCommit(number, str(number), {"x": number % 2}) for number in range(1, 5)]
        history = History()
        for commit in log:
            committed(history, "a", commit.label, dict(commit.changes))
            read(history, "a", dict(commit.changes))
        check_history(history, log)

    def test_a_commit_that_was_settled_later_counts(self) -> None:
        history = History()
        unknown(history, "b", "second", {"x": 2})
        history.resolve("second", committed=True)
        with pytest.raises(HistoryError, match="lost"):
            check_history(history, [])
        history.resolve("second", committed=False)
        with pytest.raises(HistoryError, match="revived"):
            check_history(history, [SECOND])

    def test_a_read_that_failed_proves_nothing(self) -> None:
        history = good_history()

        def fails() -> tuple[None, dict[str, Any]]:
            raise StorageUnavailable("no")

        with pytest.raises(StorageUnavailable):
            history.read("r", fails)
        check_history(history, [FIRST, SECOND, THIRD])

    def test_the_sum_is_checked_at_every_position_and_in_every_read(self) -> None:
        opening = LoggedCommit(1, "opening", {"a": b"60", "b": b"40"})
        moved = LoggedCommit(2, "moved", {"a": b"50", "b": b"50"})
        half = LoggedCommit(3, "half", {"a": b"45"})
        history = History()
        read(history, "r", {"a": None, "b": None})
        read(history, "r", {"a": b"60", "b": b"40"})
        read(history, "r", {"a": b"1"})
        check_sum(history, [LoggedCommit(0, "other", {"z": b"?"}), opening, moved], ["a", "b"], 100)
        with pytest.raises(HistoryError, match="95 after half at position 3"):
            check_sum(history, [opening, moved, half], ["a", "b"], 100)
        read(history, "r", {"a": b"60", "b": b"50"})
        with pytest.raises(HistoryError, match="sums to 110"):
            check_sum(history, [opening, moved], ["a", "b"], 100)


def test_moments_are_all_different() -> None:
    history = good_history()
    moments = [moment for commit in history.commits for moment in (commit.invoked, commit.returned)]
    moments += [moment for one in history.reads for moment in (one.invoked, one.returned)]
    assert len(set(moments)) == len(moments)
