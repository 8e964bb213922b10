"""The log in a bucket, checked exhaustively: every world of small universes, and every rule left out once.

`log_model` has the model and its invariants. A rule that can be left out of `apply`, or a step out of the protocol of
writers, collectors and readers, without the search noticing, would mean that the universe is too small.

Refusals that are not in the list, because nobody in these universes can break them: a session begins with sequence 1
(whoever begins one writes nothing else); what is revived exists (whoever revives a stratum relies on it in the same
record, which is refused); an active stratum does not shrink; a kill lists something (killing nothing harms nobody).
"""

from __future__ import annotations

import time
from collections import Counter

import pytest

from tests.engine.log_model import ACKNOWLEDGED, DELETED, LOST, READER, REFUSED, REPEATED, explore
from tests.engine.log_model_history import DIFFERENT, STUCK, UNREAD, Violation
from tests.engine.log_model_sabotage import Rule, leave_out
from tests.engine.log_model_scenario import CHILD, PARENT, Scenario

WORLDS_MIN = 100_000
PUT = ("put", PARENT)
NAMED = ((b"old", PARENT),)

DUPLICATES = Scenario(
    "two writers put the same while it is collected",
    ((PUT,), (PUT,)),
    depth=5,
    lossy=(0, 1, 2),
    reader=True,
)
DROPPED = Scenario(
    "a name is dropped, and its content put again",
    ((("drop", b"old"), PUT), (PUT,)),
    depth=7,
    names=NAMED,
    lossy=(0, 1),
    reader=True,
)
OWN_AGAIN = Scenario(
    "a writer puts, drops and puts again",
    ((PUT, ("drop", b"commit 0.0"), PUT),),
    depth=7,
    strata=(),
    lossy=(0, 1),
    reader=True,
)
COLLECTORS = Scenario("two collectors", ((PUT,),), depth=6, collectors=2, lossy=(0, 1, 2))
LINKS = Scenario(
    "a parent whose stratum is collected with that of its child",
    ((PUT,), (("rewrite", 1),)),
    depth=6,
    strata=(PARENT, CHILD),
    links=True,
    lossy=(0, 1, 2),
)
LATE_CHILD = Scenario(
    "a child that becomes garbage after its parent",
    ((("drop", b"child"),), (PUT,)),
    depth=7,
    strata=(PARENT, CHILD),
    names=((b"child", CHILD),),
    collectors=2,
    links=True,
    lossy=(1,),
)
STUBS = Scenario("slots are folded before they are read", ((PUT, PUT), (PUT,)), depth=5, stubs=True, lossy=(0, 1))
VERBATIM = Scenario(
    "a record is stored twice as it is",
    ((("claim",),), (("claim",),)),
    depth=5,
    collectors=0,
    verbatim=(1,),
    lossy=(0, 1),
)
RECHAINED = Scenario(
    "a record is stored twice, behind the last", ((PUT,), (PUT,)), depth=5, rechained=(1,), lossy=(0, 1)
)
SWEPT = Scenario(
    "a writer is revoked and its uploads are swept",
    ((PUT,), (("sweep", 0),)),
    depth=6,
    strata=(),
    spare=(0,),
    lossy=(0, 1, 2),
    reader=True,
)
ADOPTED = Scenario(
    "a writer is revoked twice, swept and adopted",
    ((PUT, ("drop", b"commit 0.0")), (("sweep", 0),), (("adopt", 0, PARENT),)),
    depth=6,
    strata=(),
    lossy=(0, 2),
)
CARELESS = ADOPTED.without("adopt only what was never logged")
"""The rule holds what the adopter does not take care of."""
ACTIVE = Scenario(
    "a stratum grows while it is collected",
    ((("open", PARENT), ("drop", b"commit 0.0"), ("finish", 0, PARENT)),),
    depth=6,
    strata=(),
    lossy=(0, 1),
    reader=True,
)
SCENARIOS = [
    DUPLICATES,
    DROPPED,
    OWN_AGAIN,
    COLLECTORS,
    LINKS,
    LATE_CHILD,
    STUBS,
    VERBATIM,
    RECHAINED,
    SWEPT,
    ADOPTED,
    ACTIVE,
]
EVENTS = {
    "left a stratum that is gone",
    "found itself",
    "found its record in the slot",
    "killed",
    "late request arrived",
    "occupied the slot",
    "reader reloaded",
    "resolved: absent",
    "resolved: committed",
    "revived",
    "revoked",
    "rule 1 refused a adopt",
    "rule 4 refused a condemn",
    "rule 4 refused a kill",
    "rule 4 refused a rewrite",
    "rule 6 refused a put",
    "stored carelessly",
    "upload",
}
"""What has to happen somewhere, or else the universes are too small to say anything."""


@pytest.mark.slow
def test_in_no_world_is_an_invariant_broken() -> None:
    worlds, voids, events = 0, 0, Counter[str]()
    for scenario in SCENARIOS:
        begun = time.perf_counter()
        report = explore(scenario)
        counts = f"{report.worlds:9,} worlds {report.transitions:9,} steps {report.logs:6,} logs {report.voids:4} voids"
        print(f"{counts} {report.cut:6,} cut {time.perf_counter() - begun:5.1f} s  {scenario.name}")
        assert not report.cut or scenario.verbatim or scenario.rechained  # Who is careless is so without end.
        worlds += report.worlds
        voids += report.voids
        events += report.events
    print(f"{worlds:9,} worlds in all; {dict(sorted(events.items()))}")
    assert worlds >= WORLDS_MIN
    assert voids
    assert events.keys() >= EVENTS


def test_a_careless_adopter_is_held_by_the_rule() -> None:
    assert explore(CARELESS).worlds > 1000


RULES = [
    Rule(
        "1: a record follows the hash of the one before",
        VERBATIM,
        {UNREAD},
        "apply",
        {"if record.previous != state.hash:": "if False:"},
    ),
    Rule(
        "1: its session is live",
        SWEPT,
        {DELETED},
        "_apply_session",
        {"sessions.get(record.session)": "sessions.get(record.session, record.sequence - 1)"},
    ),
    Rule(
        "1: its session counts on",
        RECHAINED,
        {REPEATED},
        "_apply_session",
        {"if record.sequence != last + 1:": "if False:"},
    ),
    Rule(
        "1: the state keeps the last sequence number",
        STUBS,
        {REPEATED},
        "_apply_session",
        {"sessions[record.session] = record.sequence": "pass"},
    ),
    Rule(
        "1: a session ends once",
        ADOPTED,
        {DELETED},
        "_apply_session",
        {"if sessions.pop(ended, None) is None:": "if sessions.pop(ended, 1) is None:"},
    ),
    Rule(
        "1: a stratum belongs to its session",
        SWEPT,
        {DELETED},
        "_add_stratum",
        {"if added.session not in owners:": "if False:"},
    ),
    Rule(
        "1: a finished stratum is not added again",
        ADOPTED,
        {LOST},
        "_add_stratum",
        {"if known is not None:": "if False:"},
    ),
    Rule(
        "1: a stratum that was removed is not added again",
        CARELESS,
        {DELETED},
        "_add_stratum",
        {"if added.id in gone:": "if False:"},
    ),
    Rule("2: a void record is skipped", VERBATIM, {STUCK}, "fold", {"except Conflict:": "except ZeroDivisionError:"}),
    Rule("2: a void record has its position", VERBATIM, {DIFFERENT}, "fold", {"position=position, ": ""}),
    Rule(
        "4: what was relied on after the mark is not condemned",
        DUPLICATES,
        {LOST},
        "_apply_strata",
        {" or known.relied > mark": ""},
    ),
    Rule(
        "4: relying leaves its position",
        DUPLICATES,
        {LOST},
        "_apply_strata",
        {"strata[relied] = known._replace(relied=position)": "pass"},
    ),
    Rule(
        "4: an active stratum is not condemned",
        ACTIVE,
        {LOST},
        "_apply_strata",
        {" or known.added.status == ACTIVE": ""},
    ),
    Rule(
        "4: what is condemned is not condemned again",
        COLLECTORS,
        {LOST, STUCK},
        "_apply_strata",
        {"or known.condemned or known.relied": "or known.relied"},
    ),
    Rule(
        "4: what is gone is not condemned",
        COLLECTORS,
        {STUCK},
        "_apply_strata",
        {
            "if known is None or known.condemned or known.relied > mark": "if known is None:\n"
            "                continue\n"
            "            if known.condemned or known.relied > mark"
        },
    ),
    Rule(
        "4: a kill completes a condemn that stands",
        DUPLICATES,
        {LOST},
        "_apply_strata",
        {
            "if sorted(condemns.get(condemn, ())) != sorted(listed) or not listed:": "if False:",
            "del condemns[condemn]": "condemns.pop(condemn, None)",
        },
    ),
    Rule(
        "4: a rewrite removes no stratum that is gone",
        LINKS,
        {LOST},
        "_apply_strata",
        {
            "strata.pop(removed, None)\n        if known is None or known.condemned:": "strata.pop(removed, None)\n"
            "        if known is not None and known.condemned:"
        },
    ),
    Rule(
        "4: a rewrite removes no stratum that is condemned",
        LINKS,
        {STUCK},
        "_apply_strata",
        {
            "strata.pop(removed, None)\n        if known is None or known.condemned:": "strata.pop(removed, None)\n"
            "        if known is None:"
        },
    ),
    Rule(
        "5: reviving revives the whole condemn",
        LINKS,
        {LOST},
        "_revive",
        {
            "for identity in condemns.pop(known.condemned, ()):": "listed = condemns.get(known.condemned, [])\n"
            "    for identity in [one for one in listed if one == revived]:\n"
            "        condemns[known.condemned] = [one for one in listed if one != revived]"
        },
    ),
    Rule(
        "6: nobody relies on what is gone",
        DUPLICATES,
        {LOST},
        "_apply_strata",
        {
            "strata.get(relied)\n        if known is None or known.condemned:": "strata.get(relied)\n"
            "        if known is None:\n"
            "            continue\n"
            "        if known.condemned:"
        },
    ),
    Rule(
        "6: nobody relies on what is condemned without reviving it",
        DUPLICATES,
        {LOST},
        "_apply_strata",
        {
            "strata.get(relied)\n        if known is None or known.condemned:": "strata.get(relied)\n"
            "        if known is None:"
        },
    ),
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_without_a_rule_of_apply_an_invariant_breaks(rule: Rule[Scenario], monkeypatch: pytest.MonkeyPatch) -> None:
    leave_out(rule, monkeypatch)
    with pytest.raises(Violation) as caught:
        explore(rule.scenario)
    assert caught.value.invariant in rule.broken


PROTOCOL = [
    ("look-up before repeating", DUPLICATES, {REFUSED, REPEATED}),
    ("occupy the slot", DUPLICATES, {REFUSED}),
    ("keep uploads of unknown commits", DUPLICATES, {DELETED}),
    ("condition of the put", DUPLICATES, {ACKNOWLEDGED}),
    ("kill before deleting", DUPLICATES, {DELETED}),
    ("settle before deleting", DUPLICATES, {DELETED}),
    ("condemn parents with children", LINKS, {LOST}),
    ("condemned parents stay", LATE_CHILD, {LOST}),
    ("revoke before sweeping", SWEPT, {DELETED}),
    ("rely on own strata", OWN_AGAIN, {LOST}),
    ("reload", DROPPED, {READER}),
]


@pytest.mark.parametrize(("step", "scenario", "broken"), PROTOCOL, ids=[step for step, _, _ in PROTOCOL])
def test_without_a_step_of_the_protocol_an_invariant_breaks(step: str, scenario: Scenario, broken: set[str]) -> None:
    with pytest.raises(Violation) as caught:
        explore(scenario.without(step))
    assert caught.value.invariant in broken
