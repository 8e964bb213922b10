"""Handles that are open while others rotate and drop keys: they go on, switch, or learn that they cannot."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import basin
from basin.engine.state import ACTIVE, FINISHED
from basin.errors import (
    BasinPoisoned,
    Conflict,
    InvalidArgument,
)
from tests.engine.generation_basin import (
    CONTENT,
    OPTIONS,
    SECRET,
    Open,
    contents,
    expected,
    fill,
    handles,
    kinds,
    place,
    require_sound,
    sealed_under,
    write_anew,
)


@pytest.fixture(params=["disk", "bucket"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return place(request.param, tmp_path)


@pytest.fixture
def opened(url: str) -> Iterator[Open]:
    yield from handles(url)


def test_a_second_handle_goes_on_reading_and_writing(opened: Open) -> None:
    with opened("x") as database:
        fill(database)
    other, reader = opened(), opened("r")
    other["theirs"] = CONTENT
    other.commit()
    view = reader.view()
    with opened() as database:
        database.secrets.rotate()
        for number in range(2):  # The first commit learns of it, the next one finishes what was active.
            other["learned"] = b"%d" % number
            other.commit()
        write_anew(database)
        assert database.secrets.drop(forget_history=True) == [0]
        assert sealed_under(database, 0) == []
    more = {"theirs": CONTENT, "learned": b"1", "again": CONTENT * 2}
    other["again"] = CONTENT * 2
    other.commit()
    assert contents(other) == expected(**more)
    reader.refresh()
    assert contents(reader) == expected(**more)
    view.close()
    other.close()
    with opened("r") as database:
        assert contents(database) == expected(**more)
        require_sound(database)


def test_a_handle_that_missed_everything_starts_over(opened: Open) -> None:
    with opened("x") as database:
        fill(database)
    sleeper = opened("r")
    sleeping_writer = opened()
    for _ in range(2):
        with opened() as database:
            database.secrets.rotate()
            write_anew(database)
            database.secrets.drop(forget_history=True)
    sleeper.refresh()
    assert contents(sleeper) == expected()
    sleeping_writer["late"] = CONTENT * 3
    sleeping_writer.commit()
    sleeping_writer.close()
    with opened("r") as database:
        assert contents(database) == expected(late=CONTENT * 3)
        assert sealed_under(database, 0) == sealed_under(database, 1) == []


def test_a_handle_that_learns_of_a_rotation_finishes_its_stratum_and_begins_another(tmp_path: Path) -> None:
    with (
        basin.open(tmp_path / "basin", "x", secret=SECRET, **OPTIONS) as one,
        basin.open(tmp_path / "basin", "w", secret=SECRET, **OPTIONS) as other,
    ):
        other["first"] = CONTENT
        other.commit()
        (known,) = other.core.state.strata.values()
        assert (known.added.status, known.added.generation) == (ACTIVE, 0)
        one.secrets.rotate()
        assert kinds(one)["active strata"] == 1
        with pytest.raises(InvalidArgument, match="commit again"):
            one.secrets.drop(forget_history=True)
        other["inline"] = b"no content"
        other.commit()
        assert other.core.state.strata[known.added.id].added.status == ACTIVE
        other["second"] = CONTENT * 2
        other.commit()
        strata = sorted(known.added.generation for known in other.core.state.strata.values())
        assert strata == [0, 1]
        assert other.core.state.strata[known.added.id].added.status == FINISHED
        assert other["first"] == CONTENT


def test_what_was_written_under_keys_that_are_dropped_is_refused_and_the_handle_ends(opened: Open) -> None:
    with opened("x") as database:
        fill(database)
    slow = opened()
    slow["mine"] = b"begins the session"
    slow.commit()
    with opened() as database, pytest.raises(Conflict, match=r"generation 0 .* dropped"), slow.batch() as batch:
        batch["slow"] = CONTENT * 3
        database.secrets.rotate()
        write_anew(database)
        database.secrets.drop(forget_history=True)
    with pytest.raises(BasinPoisoned, match="reopen"):
        slow["again"] = b"value"
    assert contents(slow) == expected(mine=b"begins the session")
    slow.close()
    with opened() as database:
        database["slow"] = CONTENT * 3
    with opened("r") as database:
        assert contents(database) == expected(mine=b"begins the session", slow=CONTENT * 3)
        require_sound(database)
        assert {known.added.generation for known in database.core.state.strata.values()} == {1}


@pytest.mark.parametrize("holds_the_keys", [False, True], ids=["without the old keys", "with the old keys"])
def test_a_dead_session_under_dropped_keys_is_revoked_and_leaves_nothing(
    tmp_path: Path, holds_the_keys: bool
) -> None:  # a parameter of pytest's
    """It had finished a stratum that no record names."""
    path = tmp_path / "basin"
    with basin.open(path, "x", secret=SECRET, **OPTIONS) as database:
        fill(database)
    dead = basin.open(path, "w", secret=SECRET, **OPTIONS)
    dead.core.ensure_session()
    dead.blobs.put(CONTENT * 5)
    dead.core.own_strata.finish_all()
    survivor = basin.open(path, "w", secret=SECRET, **OPTIONS) if holds_the_keys else None
    with basin.open(path, "w", secret=SECRET, **OPTIONS) as database:
        database.secrets.rotate()
        write_anew(database)
        database.secrets.drop(forget_history=True)
        session = dead.core.session
        dead.core.release("killed")
        assert len(sealed_under(database, 0)) == 1
    with survivor or basin.open(path, "w", secret=SECRET, **OPTIONS) as database:
        assert (0 in database.core.keyring.generations()) == holds_the_keys
        database["next"] = b"session"
        database.commit()
        assert session not in database.core.state.sessions
        assert sealed_under(database, 0) == []
        require_sound(database)
