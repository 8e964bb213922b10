"""Every engine that was broken on purpose is caught by the crash explorer."""

from __future__ import annotations

import pytest

from basin.errors import BasinError
from tests.engine.crash_scripts import SCRIPTS
from tests.engine.sabotage import SABOTAGES

SABOTAGES_MIN = 10
AIM = 4_000


def test_there_are_enough_broken_engines() -> None:
    assert len(SABOTAGES) >= SABOTAGES_MIN


@pytest.mark.parametrize("name", SABOTAGES)
def test_the_explorer_notices_that(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sabotage = SABOTAGES[name]
    with monkeypatch.context() as patch:
        sabotage.apply(patch)
        try:
            report, _ = SCRIPTS[sabotage.script].explore(AIM)
        except (AssertionError, BasinError) as noticed:  # by the script itself, before any crash
            print(f"{name}: {noticed}")
            return
    print(f"{name}: {len(report.bad)} bad of {report.checked:,} states\n{report.bad and report.bad[0].error}")
    assert report.bad, f"nobody noticed that {name.replace('_', ' ')}"
