"""Deletion, checked exhaustively: every world of small universes, and every rule and every step left out once.

`log_model_collector` has the model and its invariants. What can be left out without the search noticing is no rule:
one step of the protocol is such, and a test of its own says so.
"""

from __future__ import annotations

import time
from collections import Counter

import pytest

from tests.engine.log_model_collector import DELETED, LEAKED, LOST, READER, REPEATED
from tests.engine.log_model_ledger import STUCK, Broken
from tests.engine.log_model_sabotage import Rule, leave_out
from tests.engine.log_model_search import search
from tests.engine.log_model_world import Universe

WORLDS_MIN = 100_000
PARENT, OTHER, CHILD, GRANDPARENT, REST = 1, 2, 4, 8, 16
LINKS = ((PARENT, CHILD),)
CHAIN = ((GRANDPARENT, PARENT), (PARENT, CHILD))
META = PARENT | OTHER
NAMED = ((b"old", OTHER),)

EVERYBODY = Universe(
    "two writers, two collectors, a reader",
    (PARENT | OTHER, CHILD),
    ((("put", PARENT), ("drop", b"0.0")), (("put", CHILD), ("put", PARENT))),
    names=NAMED,
    links=LINKS,
    meta=META,
    collectors=2,
    reader=True,
)
WRITERS = Universe(
    "two writers, a collector, a reader",
    EVERYBODY.strata,
    EVERYBODY.writers,
    names=NAMED,
    links=LINKS,
    meta=META,
    reader=True,
)
ONE = Universe(
    "a writer and a collector",
    (PARENT | OTHER, CHILD),
    ((("put", PARENT), ("drop", b"0.0")),),
    names=NAMED,
    links=LINKS,
    meta=META,
    lossy=(0,),
)
ROLLED_BACK = Universe(
    "a batch is rolled back, and what it wrote is logged",
    (OTHER, CHILD),
    ((("abandon", PARENT), ("drop", b"old")), (("put", PARENT),)),
    names=NAMED,
    links=LINKS,
    meta=META,
)
TAKEN_FOR_DEAD = Universe(
    "a writer is taken for dead, and what it had finished adopted",
    ROLLED_BACK.strata,
    ROLLED_BACK.writers,
    names=NAMED,
    links=LINKS,
    meta=META,
    heirs=(0,),
)
OPEN_FOR_LONG = Universe(
    "a batch is open while its writer commits others",
    (PARENT | OTHER, CHILD),
    ((("look", PARENT), ("drop", b"old"), ("name", PARENT)),),
    names=NAMED,
    links=LINKS,
    meta=META,
)
MERGED = Universe(
    "parents are merged meanwhile",
    (PARENT, OTHER, CHILD),
    ((("put", PARENT),), (("put", CHILD),)),
    names=NAMED,
    links=LINKS,
    meta=META,
    merges=1,
)
REWRITTEN_OR_MERGED = Universe(
    "what is rewritten is merged, too",
    (PARENT | OTHER, CHILD),
    ((("put", PARENT), ("drop", b"old")), (("put", CHILD),)),
    names=NAMED,
    links=LINKS,
    meta=META,
    merges=1,
)
COPIES = Universe(
    "a content lies in two strata",
    (CHILD | OTHER, CHILD | OTHER),
    ((("drop", b"old"), ("put", CHILD)),),
    names=((b"old", CHILD),),
    collectors=2,
)
HELD_TWICE = Universe(
    "a child of a dead parent lies in two strata",
    (PARENT, CHILD, CHILD | OTHER),
    ((("put", PARENT),),),
    names=NAMED,
    links=LINKS,
    meta=PARENT,
    collectors=2,
)
DYING_CHILD = Universe(
    "a child becomes garbage after its parent",
    (PARENT | OTHER, CHILD),
    ((("drop", b"child"), ("put", PARENT)),),
    names=(*NAMED, (b"child", CHILD)),
    links=LINKS,
    meta=META,
    collectors=2,
)
GRANDPARENTS = Universe(
    "a dead grandparent holds what its child links to",
    (GRANDPARENT, PARENT | REST, CHILD | OTHER),
    ((("put", GRANDPARENT),),),
    links=CHAIN,
    meta=GRANDPARENT | PARENT | REST,
)
TWINS = Universe(
    "two grains of one key link to different contents",
    (PARENT, OTHER, CHILD),
    ((("put", PARENT), ("drop", b"old")),),
    names=NAMED,
    links=LINKS,
    meta=META,
    twins=PARENT | OTHER,
)
UNIVERSES = [
    EVERYBODY,
    WRITERS,
    ONE,
    ROLLED_BACK,
    TAKEN_FOR_DEAD,
    OPEN_FOR_LONG,
    MERGED,
    REWRITTEN_OR_MERGED,
    COPIES,
    HELD_TWICE,
    DYING_CHILD,
    GRANDPARENTS,
    TWINS,
]
EVENTS = {
    "adopted",
    "condemned",
    "condemned with copies",
    "did not log a parent without child",
    "found a parent behind its mark",
    "found itself",
    "killed",
    "merged",
    "reader looked again",
    "refused",
    "relied on kept copies",
    "relied on one found again",
    "revived",
    "revoked",
    "rule 4 refused a condemn",
    "rule 4 refused a kill",
    "rule 4 refused a merge",
    "rule 6 refused a condemn",
}
"""What has to happen somewhere, or else the universes are too small to say anything."""


@pytest.mark.slow
def test_in_no_world_is_an_invariant_broken() -> None:
    worlds, events = Counter[str](), Counter[str]()
    for universe in UNIVERSES:
        begun = time.perf_counter()
        report = search(universe)
        counts = f"{report.worlds:9,} worlds {report.steps:9,} steps {report.nodes:6,} states of the log"
        print(f"{counts} {time.perf_counter() - begun:5.1f} s  {universe.name}")
        worlds[universe.name] = report.worlds
        events += report.events
    print(f"{worlds.total():9,} worlds in all; {dict(sorted(events.items()))}")
    assert worlds[EVERYBODY.name] >= WORLDS_MIN
    assert events.keys() >= EVENTS


RULES = [
    Rule(
        "1: a session that was revoked has ended",
        TAKEN_FOR_DEAD,
        {LOST, DELETED, STUCK},
        "_apply_session",
        {"sessions.get(record.session)": "sessions.get(record.session, record.sequence - 1)"},
    ),
    Rule(
        "4: what was relied on after the mark is not condemned",
        ONE,
        {LOST},
        "_apply_strata",
        {" or known.relied > mark": ""},
    ),
    Rule(
        "4: relying leaves its position",
        ONE,
        {LOST},
        "_apply_strata",
        {"strata[relied] = known._replace(relied=position)": "pass"},
    ),
    Rule(
        "4: what is condemned is not condemned again",
        HELD_TWICE,
        {LOST, STUCK},
        "_apply_strata",
        {"or known.condemned or known.relied": "or known.relied"},
    ),
    Rule(
        "4: what is gone is not condemned",
        HELD_TWICE,
        {LOST, STUCK},
        "_apply_strata",
        {
            "if known is None or known.condemned or known.relied > mark": "if known is None:\n"
            "                continue\n"
            "            if known.condemned or known.relied > mark"
        },
    ),
    Rule(
        "4: a kill completes a condemn that stands",
        ONE,
        {LOST},
        "_apply_strata",
        {
            "if sorted(condemns.get(condemn, ())) != sorted(listed) or not listed:": "if False:",
            "del strata[identity]": "strata.pop(identity, None)",
            "del condemns[condemn]": "condemns.pop(condemn, None)",
        },
    ),
    Rule(
        "4: a merge removes no stratum that is gone",
        REWRITTEN_OR_MERGED,
        {LOST, STUCK},
        "_apply_strata",
        {
            "strata.pop(removed, None)\n        if known is None or known.condemned:": "strata.pop(removed, None)\n"
            "        if known is not None and known.condemned:"
        },
    ),
    Rule(
        "4: a merge removes no stratum that is condemned",
        REWRITTEN_OR_MERGED,
        {LOST, STUCK},
        "_apply_strata",
        {
            "strata.pop(removed, None)\n        if known is None or known.condemned:": "strata.pop(removed, None)\n"
            "        if known is None:"
        },
    ),
    Rule(
        "5: reviving revives the whole condemn",
        ONE,
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
        COPIES,
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
        COPIES,
        {LOST},
        "_apply_strata",
        {
            "strata.get(relied)\n        if known is None or known.condemned:": "strata.get(relied)\n"
            "        if known is None:"
        },
    ),
    Rule(
        "files: a kill lists its strata as retired",
        ONE,
        {LEAKED},
        "_apply_retired",
        {"for condemn, killed in record.killed if record.files_kept else ():": "for condemn, killed in ():"},
    ),
    Rule(
        "files: a merge lists its strata as retired",
        MERGED,
        {LEAKED},
        "_apply_retired",
        {"for removed in record.strata_removed if record.files_kept else ():": "for removed in ():"},
    ),
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_without_a_rule_of_apply_an_invariant_breaks(rule: Rule[Universe], monkeypatch: pytest.MonkeyPatch) -> None:
    leave_out(rule, monkeypatch)
    with pytest.raises(Broken) as caught:
        search(rule.scenario)
    assert caught.value.invariant in rule.broken


PROTOCOL = [
    ("condemn as of the mark", ONE, LOST),
    ("dead parents hold", ONE, LOST),
    ("condemned parents stay", DYING_CHILD, LOST),
    ("what is held holds", GRANDPARENTS, LOST),
    ("copies and condemn in one record", ONE, LOST),
    ("finish copies before the record", ONE, DELETED),
    ("rely on kept copies", COPIES, LOST),
    ("kill before deleting", ONE, DELETED),
    ("list killed strata", ONE, LEAKED),
    ("delete before saying so", ONE, LEAKED),
    ("merge all grains", MERGED, LOST),
    ("rely on what was found", ONE, LOST),
    ("rely on own strata", OPEN_FOR_LONG, LOST),
    ("rely on what grains link to", ROLLED_BACK, LOST),
    ("adopt with reliance", TAKEN_FOR_DEAD, LOST),
    ("revive", ONE, STUCK),
    ("look again for what is gone", ONE, LOST),
    ("find again what links to the same", TWINS, LOST),
    ("look-up before repeating", ONE, REPEATED),
    ("follow the log at a missing file", WRITERS, READER),
]


@pytest.mark.parametrize(("step", "universe", "broken"), PROTOCOL, ids=[step for step, _, _ in PROTOCOL])
def test_without_a_step_of_the_protocol_an_invariant_breaks(step: str, universe: Universe, broken: str) -> None:
    with pytest.raises(Broken) as caught:
        search(universe.without(step))
    assert caught.value.invariant == broken


def test_looking_behind_the_mark_is_no_rule_where_grains_rely_on_what_they_link_to() -> None:
    """It spares a writer the revival; but a parent may also be logged behind the condemn, or behind the kill."""
    for universe in (ROLLED_BACK, TAKEN_FOR_DEAD, MERGED):
        search(universe.without("look at what came after the mark"))
