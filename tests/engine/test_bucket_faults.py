"""The engine on a simulated bucket: every fault at every request, pairs, seeded schedules; and engines that are broken.

Seeds and counts are printed. A failure names its seed and faults; `life(seed, faults, Life(…))` repeats it.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, cast

import pytest

from basin.api import Database, open_storage
from basin.engine import merging, object_log, rewrite, state
from basin.engine.core import Core
from basin.engine.log import Cursor, Entry
from basin.engine.object_log import ObjectLog
from basin.engine.options import make_options
from basin.engine.secret import Secret
from basin.engine.strata import OwnStrata
from basin.engine.writer import StratumWriter
from basin.errors import AlreadyExists, BasinError, Conflict, StorageError, StorageUnavailable
from basin.format.layout import StratumKind
from basin.format.record import Record
from basin.storage import remote
from basin.storage.claims import Claim, Outcome, claim
from basin.storage.objects import ByteRange, ObjectStore
from basin.storage.remote import RemoteStorage
from basin.storage.requests import RequestPolicy
from basin.terms import StratumId
from basin.testing.bucket import BucketClient, Run, SimulatedBucket, run
from basin.testing.history import HistoryError
from basin.testing.object_faults import (
    Fault,
    FaultKind,
    ObjectFault,
    ObjectRequest,
    Plan,
    sampled_pairs,
    single_faults,
)
from tests.engine.bucket_life import (
    ABSENCE,
    COMMITS,
    OPTIONS,
    SCRIPTS,
    UPKEEP,
    URL,
    Life,
    LifeError,
    QuietStorage,
    Script,
    founded,
    judge,
    life,
    live,
)

DAMAGE: Final = (FaultKind.SHORT_BODY, FaultKind.WRONG_BODY)
KINDS: Final = tuple(kind for kind in FaultKind if kind not in (*DAMAGE, FaultKind.CONDITION_IGNORED))
"""What may befall an engine any number of times: it never damages what it reads, and stores keep their word."""
TWINS: Final = (
    (
        FaultKind.SERVER_ERROR,
        FaultKind.SLOW_DOWN,
        FaultKind.RESET,
        FaultKind.ERROR_INSIDE,
        FaultKind.CONTENDED,
    ),
    (FaultKind.SERVER_ERROR_AFTER, FaultKind.RESET_AFTER),
)
"""What is one to an engine that never asks for the reason: the same error, at once, for the same effect."""
SEED: Final = 1
PARTS: Final = 5
SHARES: Final = (0.01, 0.03, 0.1, 0.25)
DAY_S: Final = 86_400.0
LOOKING: Final = UPKEEP._replace(first=("contents", "transfer", "transfer"), rounds=4)
"""A reader opens while there are commits that no checkpoint holds."""
VIEWING: Final = UPKEEP._replace(view_s=60.0)
"""A view is read when history has passed it."""


@dataclass
class Tally:
    """What a test tried; `failures` are the faults with what went wrong, of which the first are shown."""

    runs: int = 0
    fired: int = 0
    commits: Counter[str] = field(default_factory=Counter)
    reads: int = 0
    killed: int = 0
    seen: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    def live(self, seed: int, faults: Plan, plan: Life) -> Run[None] | None:
        """One life; None if something was wrong with it."""
        self.runs += 1
        try:
            ran, lived = life(seed, faults, plan)
        except (AssertionError, BasinError) as error:
            where = faults if isinstance(faults, dict) else "at random"
            self.failures.append(f"seed {seed}, {where}, {plan.script}: {type(error).__name__}: {str(error)[:500]}")
            return None
        self.fired += len(ran.bucket.fired)
        self.killed += len(ran.bucket.killed)
        self.commits.update(commit.outcome for commit in lived.history.commits)
        self.reads += sum(read.values is not None for read in lived.history.reads)
        self.seen += lived.seen
        return ran

    def report(self, what: str) -> None:
        """Print the counts, and fail if anything failed."""
        print(
            f"{what}: {self.runs} runs, {self.fired} faults, {self.killed} killed, {self.reads} reads, "
            f"commits {dict(self.commits)}, {dict(self.seen)}"
        )
        shown = "\n".join(self.failures[:10])
        assert not self.failures, f"{len(self.failures)} of {self.runs} lives failed:\n{shown}"


def singles(script: Script, kinds: Sequence[FaultKind], *, twins: bool = True) -> list[dict[int, Fault]]:
    """Each of `kinds` at each request of a life without faults; without `twins`, one of those at each, in turn."""
    requests = life(SEED, None, Life(script, impatient=True))[0].bucket.requests
    plans = list(single_faults(requests, kinds))
    if twins:
        return plans
    kept = []
    for plan in plans:
        [(number, kind)] = plan.items()
        for alike in TWINS:
            if kind in alike:
                able = [one for one in alike if one.applies_to(requests[number - 1].kind)]
                if able[number % len(able)] is not kind:
                    break
        else:
            kept.append(plan)
    return kept


def at_random(seed: int, kinds: Sequence[FaultKind], share: float) -> Callable[[ObjectRequest], Fault | None]:
    """About `share` of all requests meet one of `kinds`."""
    generator = random.Random(f"{seed}/faults")
    return lambda _: generator.choice(kinds) if generator.random() < share else None


def varied(seed: int) -> tuple[Plan, Life]:
    """Faults and a life that differ from seed to seed in whatever may make a difference."""
    scripts = (*SCRIPTS.values(), COMMITS, ABSENCE)
    number, share = divmod(seed, len(SHARES))
    number, script = divmod(number, len(scripts))
    plan = Life(scripts[script], impatient=number % 2 == 0, grace_s=DAY_S if number // 2 % 2 else 0.0)
    return at_random(seed, KINDS, SHARES[share]), plan


class TestFaults:
    def test_a_view_that_history_has_passed_is_read_while_its_files_are_kept(self) -> None:
        tally = Tally()
        for seed in range(10):
            tally.live(seed, {}, Life(VIEWING, grace_s=DAY_S))
        tally.report("old views")
        assert tally.reads == 20

    @pytest.mark.parametrize("name", SCRIPTS)
    def test_a_life_without_faults(self, name: str) -> None:
        tally = Tally()
        for seed in range(10):
            tally.live(seed, {}, Life(SCRIPTS[name]))
        tally.report(name)
        assert tally.commits["done"] >= 40
        assert not tally.commits["unknown"]

    @pytest.mark.slow
    @pytest.mark.parametrize("name", SCRIPTS)
    @pytest.mark.parametrize("part", range(PARTS))
    def test_every_single_fault_at_every_request(self, name: str, part: int, effort: int) -> None:
        tally = Tally()
        plans = singles(SCRIPTS[name], KINDS, twins=effort > 1)
        random.Random(SEED).shuffle(plans)
        plans = plans[part::PARTS]
        for plan in plans:
            tally.live(SEED, plan, Life(SCRIPTS[name], impatient=True))
        tally.report(f"single faults in {name}, part {part}")
        assert tally.runs == tally.fired == len(plans) >= 125
        assert tally.seen["unknown"] == tally.seen["resolved"]

    def test_a_commit_of_unknown_outcome_is_resolved(self) -> None:
        alone = COMMITS._replace(first=())  # Nobody else takes the name meanwhile, which would settle it.
        tally = Tally()
        requests = life(SEED, None, Life(alone, impatient=True))[0].bucket.requests
        records = [one for one in requests if one.kind == "put_new" and one.actor == alone.impatient]
        for plan in single_faults(records, (FaultKind.TIMEOUT, FaultKind.LATE, FaultKind.SERVER_ERROR)):
            tally.live(SEED, plan, Life(alone, impatient=True))
        tally.report("records of unknown outcome")
        assert tally.seen["unknown"] == tally.seen["resolved"] >= 9

    @pytest.mark.slow
    @pytest.mark.parametrize("name", SCRIPTS)
    def test_a_single_bad_body_surfaces_nowhere(self, name: str) -> None:
        tally = Tally()
        plans = singles(SCRIPTS[name], DAMAGE)
        for plan in plans:
            tally.live(SEED, plan, Life(SCRIPTS[name]))
        tally.report(f"bad bodies in {name}")
        assert tally.runs == tally.fired == len(plans) >= 100

    def test_a_single_bad_body_surfaces_nowhere_in_an_encrypted_basin(self) -> None:
        secret = Secret.generate()

        def opened(client: BucketClient, mode: Any) -> Database:
            policy = make_options(OPTIONS, remote=True).request_policy()
            storage = QuietStorage(client, policy, uploads=0)
            return open_storage(storage, URL, mode=mode, secret=secret, options=OPTIONS)

        def begin(client: BucketClient) -> None:
            with opened(client, "x") as database, database.batch() as batch:
                batch["name"] = str(batch.blobs.put(b"content" * 100)).encode()

        def use(client: BucketClient) -> None:
            with opened(client, "w") as database:
                assert database.blobs[database["name"].decode()] == b"content" * 100
                with database.batch() as batch:
                    batch["other"] = str(batch.blobs.put(b"another" * 100)).encode()

        start = run(SEED, {"founder": begin}).bucket.bodies
        plans = list(single_faults(run(SEED, {"user": use}, start=start).bucket.requests, DAMAGE))
        for plan in plans:
            run(SEED, {"user": use}, plan, start=start).require_no_errors()
        print(f"{len(plans)} bad bodies in an encrypted basin")
        assert len(plans) >= 10

    @pytest.mark.slow
    @pytest.mark.parametrize("name", SCRIPTS)
    @pytest.mark.parametrize("part", range(2))
    def test_a_thousand_pairs_of_faults(self, name: str, part: int, effort: int) -> None:
        tally = Tally()
        requests = life(SEED, None, Life(SCRIPTS[name]))[0].bucket.requests
        for plan in sampled_pairs(requests, 250 * effort, seed=part, kinds=KINDS):
            tally.live(SEED, plan, Life(SCRIPTS[name], impatient=tally.runs % 2 == 0))
        tally.report(f"pairs of faults in {name}, part {part}")
        assert tally.runs == 250 * effort
        assert tally.fired >= 425 * effort

    @pytest.mark.slow
    @pytest.mark.parametrize("part", range(PARTS))
    def test_a_thousand_seeded_schedules(self, part: int, effort: int) -> None:
        tally = Tally()
        for seed in range(part, 1000 * effort, PARTS):
            tally.live(seed, *varied(seed))
        tally.report(f"seeded schedules, part {part}")
        assert tally.runs == 200 * effort
        assert tally.fired >= 700 * effort
        assert tally.killed >= 60 * effort
        assert tally.commits["done"] >= 800 * effort
        assert tally.reads >= 250 * effort
        assert tally.seen["unknown"] >= 1

    def test_the_same_seed_gives_the_same_log_byte_for_byte(self) -> None:
        logs = set()
        for seed in range(0, 160, 9):
            first, second = (life(seed, *varied(seed))[0].log for _ in range(2))
            assert first == second
            logs.add(first)
        assert len(logs) == 18

    def test_a_writer_that_was_taken_for_dead_is_told_and_begins_anew(self) -> None:
        tally = Tally()
        for seed in range(40):
            tally.live(seed, long_absence(seed), Life(ABSENCE))
        tally.report("long absences")
        assert tally.seen["poisoned"] >= 5
        assert not tally.commits["unknown"]


def long_absence(seed: int) -> Plan:
    """The first writer is held up for ten hours, before one of the records that it wants to store."""
    number = random.Random(f"{seed}/absence").randrange(1, 4)
    held: list[int] = []

    def plan(request: ObjectRequest) -> Fault | None:
        if request.actor != "writer-1" or request.kind != "put_new" or not request.name.startswith("log/"):
            return None
        held.append(request.number)
        return ObjectFault(FaultKind.PAUSED, 36_000_000) if len(held) == number else None

    return plan


def probed(client: BucketClient, mode: Any) -> Database:
    """A handle that puts the bucket to the test."""
    policy = make_options(OPTIONS, remote=True).request_policy()
    return open_storage(RemoteStorage(client, policy, uploads=0), URL, mode=mode, profile="open", options=OPTIONS)


class TestTheProbe:
    def test_a_store_that_ignores_conditions_is_refused_at_the_first_write(self) -> None:
        bucket = SimulatedBucket(start=founded(is_due=False), faults=lambda _: FaultKind.CONDITION_IGNORED)
        before = dict(bucket.bodies)
        database = probed(bucket.client("writer"), "w")
        assert database["account/a"] == b"100"
        with pytest.raises(StorageError) as caught, database.batch() as batch:
            batch["account/a"] = b"0"
        assert caught.value.reason == "unconditional"
        database.close()
        assert bucket.bodies == before

    def test_no_basin_is_created_where_conditions_are_ignored(self) -> None:
        bucket = SimulatedBucket(faults=lambda _: FaultKind.CONDITION_IGNORED)
        with pytest.raises(StorageError) as caught:
            probed(bucket.client("founder"), "x")
        assert caught.value.reason == "unconditional"
        assert bucket.bodies == {}

    def test_a_good_store_is_not_refused_for_a_fault_on_the_way(self) -> None:
        def write(client: BucketClient) -> None:
            with probed(client, "w") as database:
                database["account/a"] = b"99"

        start = founded(is_due=False)
        requests = run(SEED, {"writer": write}, start=start).bucket.requests
        kinds = [kind for kind in KINDS if kind not in (FaultKind.KILLED, FaultKind.KILLED_AFTER)]
        plans = list(single_faults([one for one in requests if one.name.startswith("tmp/")][:22], kinds))
        for plan in plans:
            run(SEED, {"writer": write}, plan, start=start).require_no_errors()
        print(f"{len(plans)} single faults while probing")
        assert len(plans) >= 200


# --- engines that are broken ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sabotage:
    """How the engine is broken; the lives in which that must show, and the words by which it does."""

    apply: Callable[[pytest.MonkeyPatch], None]
    faults: Callable[[int], Plan]
    plan: Callable[[], Life]
    words: str


def taken_is_believed_to_be_somebody_else(patch: pytest.MonkeyPatch) -> None:
    def claim_once(objects: ObjectStore, name: str, data: bytes, policy: RequestPolicy) -> Claim:
        try:
            objects.put_new(name, data)
            return Claim(Outcome.CREATED)
        except AlreadyExists:
            return Claim(Outcome.TAKEN, objects.get(ByteRange(name)))
        except StorageUnavailable:
            return claim(objects, name, data, policy)

    patch.setattr(object_log, "claim", claim_once)


def no_reply_is_believed_to_be_success(patch: pytest.MonkeyPatch) -> None:
    def claim_hoping(objects: ObjectStore, name: str, data: bytes, policy: RequestPolicy) -> Claim:
        try:
            objects.put_new(name, data)
        except StorageUnavailable:
            return Claim(Outcome.CREATED)
        except AlreadyExists:
            return claim(objects, name, data, policy)
        return Claim(Outcome.CREATED)

    patch.setattr(object_log, "claim", claim_hoping)


def the_winner_is_not_looked_at(patch: pytest.MonkeyPatch) -> None:
    def pass_by(self: Core) -> None:
        now, tables = self.current
        for entry in self.log.follow(self.cursor):
            now, self.cursor = now._replace(position=entry.position, hash=entry.hash), entry.end
        self._publish(now, tables)

    patch.setattr(Core, "_follow_winner", pass_by)


def strata_are_sent_after_the_record(patch: pytest.MonkeyPatch) -> None:
    late: list[StratumWriter] = []
    sync, settle, finish = StratumWriter.sync, OwnStrata.settle, remote._GrowingFile.finish

    def sync_later(self: StratumWriter) -> None:
        self.flush()
        self.synced_offset, self.synced_count = self.offset, self.grain_count
        late.append(self)

    def settle_now(self: OwnStrata, added: Any, logged: Any) -> None:
        for writer in [one for one in late if one._storage is self._storage]:
            late.remove(writer)
            writer.synced_offset = 0
            finish(cast(Any, writer._file))
            sync(writer)
        settle(self, added, logged)

    patch.setattr(StratumWriter, "sync", sync_later)
    patch.setattr(StratumWriter, "close", lambda _: None)
    patch.setattr(remote._GrowingFile, "finish", lambda _: None)
    patch.setattr(OwnStrata, "settle", settle_now)


def kept_files_are_deleted_at_once(patch: pytest.MonkeyPatch) -> None:
    def remove(core: Core, kind: StratumKind, strata: Iterable[StratumId]) -> None:
        for identity in strata:
            core.own_strata.delete(kind, identity)

    for module in (merging, rewrite):
        patch.setattr(module, "remove_files", remove)


def the_hint_is_believed_without_the_log(patch: pytest.MonkeyPatch) -> None:
    follow = ObjectLog.follow

    def follow_to_the_hint(
        self: ObjectLog, cursor: Cursor, *, names_from: int = 0, at_least: int = 0
    ) -> Iterator[Entry]:
        for entry in follow(self, cursor, names_from=names_from, at_least=at_least):
            if at_least and entry.position > at_least:
                return
            yield entry

    patch.setattr(ObjectLog, "follow", follow_to_the_hint)


def a_revocation_is_not_looked_at(patch: pytest.MonkeyPatch) -> None:
    apply_session, append_record = state._apply_session, Core._append_record

    def lenient(before: state.State, record: Record, position: int) -> dict[int, int]:
        try:
            return apply_session(before, record, position)
        except Conflict:
            if record.session_begun or record.sessions_ended or record.sessions_revoked:
                raise
            return dict(before.sessions)

    def append_all_the_same(self: Core, record: Record, *, sync: bool = True) -> bool:
        now, tables = self.current
        if self.session and self.session not in now.sessions:
            self._publish(now._replace(sessions={**now.sessions, self.session: 1}), tables)
        return append_record(self, record, sync=sync)

    patch.setattr(state, "_apply_session", lenient)
    patch.setattr(Core, "_append_record", append_all_the_same)


def faults_of(*kinds: FaultKind, share: float = 0.1) -> Callable[[int], Plan]:
    return lambda seed: at_random(seed, kinds, share)


SABOTAGES: Final = (
    Sabotage(
        taken_is_believed_to_be_somebody_else, faults_of(FaultKind.RESENT, share=0.5), lambda: Life(COMMITS), "revived:"
    ),
    Sabotage(no_reply_is_believed_to_be_success, faults_of(FaultKind.TIMEOUT), lambda: Life(COMMITS), "lost:|missing"),
    Sabotage(the_winner_is_not_looked_at, lambda _: {}, lambda: Life(COMMITS), "lost:|the sum is"),
    Sabotage(
        strata_are_sent_after_the_record, faults_of(FaultKind.KILLED_AFTER), lambda: Life(COMMITS), "ObjectMissing"
    ),
    Sabotage(
        kept_files_are_deleted_at_once, lambda _: {}, lambda: Life(VIEWING, grace_s=DAY_S), "PositionGone|ObjectMissing"
    ),
    Sabotage(the_hint_is_believed_without_the_log, lambda _: {}, lambda: Life(LOOKING), "stale:"),
    Sabotage(a_revocation_is_not_looked_at, long_absence, lambda: Life(ABSENCE), "lost:"),
)
SEEDS_MAX: Final = 60


@pytest.mark.parametrize("sabotage", SABOTAGES, ids=lambda sabotage: sabotage.apply.__name__)
def test_a_broken_engine_is_caught(sabotage: Sabotage, monkeypatch: pytest.MonkeyPatch) -> None:
    said = []
    for seed in range(SEEDS_MAX):
        plan = sabotage.plan()
        founded(is_due=plan.script.is_due)  # By an engine that is whole; and so is the one that judges.
        with monkeypatch.context() as patch:
            sabotage.apply(patch)
            ran = live(seed, sabotage.faults(seed), plan)
        try:
            judge(ran, plan)
        except (LifeError, HistoryError) as error:
            said.append(str(error))
            if re.search(sabotage.words, said[-1]):
                print(f"{sabotage.apply.__name__}: caught by seed {seed}: {said[-1]}")
                return
    pytest.fail(f"no one of {SEEDS_MAX} seeds says {sabotage.words!r}, but {said[:5]}")
