"""The crash explorer over the engine: every state that a crash may leave is opened and compared with the model.

Each script visits at least `DISTINCT_FLOOR_EACH` different disks, so that all together visit `DISTINCT_FLOOR`; below
that the test fails. The counts are printed, and end up in the report of the session (`-rP` shows them).
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.engine.crash_scripts import DISTINCT_FLOOR, DISTINCT_FLOOR_EACH, SCRIPTS

SCRIPTS_MIN = 12
AIM = 1.1  # times the floor: what is drawn differs from run to run, because every run has fresh keys and names


def test_the_floors_of_all_scripts_make_up_the_floor_of_the_session() -> None:
    assert len(SCRIPTS) >= SCRIPTS_MIN
    assert DISTINCT_FLOOR_EACH >= 1_000
    assert DISTINCT_FLOOR_EACH * len(SCRIPTS) >= DISTINCT_FLOOR >= 100_000


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_every_state_that_a_crash_leaves_holds_what_was_acknowledged(
    name: str, effort: int, record_property: Callable[[str, object], None]
) -> None:
    report, story = SCRIPTS[name].explore(int(AIM * effort * DISTINCT_FLOOR_EACH), effort)
    print(f"{name}: {report}")
    record_property("crash states", report.distinct)
    report.require_good()
    assert report.acknowledged == story.acknowledged > 0
    assert report.recovered > 0
    assert report.distinct >= DISTINCT_FLOOR_EACH, f"too few states, make the script longer: {report}"
