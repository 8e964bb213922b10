"""Damage of every kind to a small basin is reported as what it is, or harmless; it is never a wrong answer.

Single bits: all of the small basin, some of the rich one (all of them with `--effort`). The share of harmless cases is
printed: bytes of checkpoints and watermarks, of merged indexes, of log that a checkpoint has folded.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import xxhash

from basin.api import open_storage
from basin.errors import (
    BasinError,
    CorruptionError,
    NotABasin,
    ObjectMissing,
    UnsupportedVersion,
    WrongSecret,
)
from basin.format.layout import STRATUM_HEADER_SIZE, Kind
from basin.testing.disk import DiskImage, SimulatedDisk
from basin.testing.simulated import SimulatedStorage
from tests.engine.small_basin import (
    FLUSH,
    LATER_BOOT,
    OPTIONS,
    PROFILES,
    SAME_BOOT,
    SmallBasin,
    answers,
    open_disk,
    rich,
    secret_of,
    small,
)

SLICES = 6
EXTENSIONS = (b"\0", b"\xff", b"\0" * 7, b"\x89BSN-STR", b"BREC")
CHANGED = (CorruptionError, UnsupportedVersion)
GONE = (*CHANGED, ObjectMissing, NotABasin, WrongSecret)


class Verdicts(Counter[str]):
    """Counts of how cases of damage were answered. A wrong answer, or the wrong kind of error, fails the test."""

    def judge(
        self,
        case: str,
        whole: SmallBasin,
        damaged: DiskImage,
        allowed: tuple[type[BasinError], ...],
        boot: int = SAME_BOOT,
    ) -> dict[str, Any]:
        told = answers(damaged, whole.profile, whole.questions, boot=boot)
        refusals = 0
        for question, answer in told.items():
            if isinstance(answer, BasinError):
                refusals += 1
                assert isinstance(answer, allowed), f"{case}: {question!r} raised {answer!r}"
            else:
                assert answer == whole.answers[question], f"{case}: {question!r} is {answer!r}"
        self["harmless" if not refusals else "refused" if refusals == len(told) else "partly readable"] += 1
        return told

    def report(self, title: str) -> None:
        share = self["harmless"] / max(1, self.total())
        print(f"{title}: {self.total()} cases, {share:.1%} harmless, {dict(self)}")


def stored(whole: SmallBasin) -> Iterator[tuple[str, bytes]]:
    yield from whole.image.contents().items()


def flipped(content: bytes, bit: int) -> bytes:
    changed = bytearray(content)
    changed[bit >> 3] ^= 1 << (bit & 7)
    return bytes(changed)


@pytest.mark.parametrize("part", range(SLICES))
@pytest.mark.parametrize("profile", PROFILES)
def test_every_flipped_bit(profile: str, part: int) -> None:
    verdicts, whole = Verdicts(), small(profile)
    for name, content in stored(whole):
        for bit in range(part, 8 * len(content), SLICES):
            damaged = whole.image.with_content(name, flipped(content, bit))
            verdicts.judge(f"bit {bit & 7} of byte {bit >> 3} of {name}", whole, damaged, CHANGED)
    verdicts.report(f"{profile}, small, single bits")
    assert verdicts["harmless"] < verdicts.total() / 2


@pytest.mark.parametrize("profile", PROFILES)
def test_flipped_bits_of_a_rich_basin(profile: str, effort: int) -> None:
    verdicts, whole = Verdicts(), rich(profile)
    for name, content in stored(whole):
        for bit in range(0, 8 * len(content), 47 if effort == 1 else 1):
            damaged = whole.image.with_content(name, flipped(content, bit))
            verdicts.judge(f"bit {bit & 7} of byte {bit >> 3} of {name}", whole, damaged, CHANGED)
    verdicts.report(f"{profile}, rich, single bits")


@pytest.mark.parametrize("profile", PROFILES)
def test_every_truncation(profile: str) -> None:
    verdicts, whole = Verdicts(), small(profile)
    for name, content in stored(whole):
        for size in range(len(content)):
            damaged = whole.image.with_content(name, content[:size])
            verdicts.judge(f"{name} cut to {size} of {len(content)} bytes", whole, damaged, GONE)
    verdicts.report(f"{profile}, truncations")


@pytest.mark.parametrize("profile", PROFILES)
def test_every_extension(profile: str) -> None:
    verdicts = Verdicts()
    for whole in (small(profile), rich(profile)):
        for (name, content), more in itertools.product(stored(whole), (*EXTENSIONS, None)):
            damaged = whole.image.with_content(name, content + (content if more is None else more))
            verdicts.judge(f"{name} followed by {more!r}", whole, damaged, CHANGED)
    verdicts.report(f"{profile}, extensions")


@pytest.mark.parametrize("profile", PROFILES)
def test_every_swap_of_two_files(profile: str) -> None:
    verdicts = Verdicts()
    for whole in (small(profile), rich(profile)):
        for (one, content), (other, content_of_other) in itertools.combinations(stored(whole), 2):
            damaged = whole.image.with_content(one, content_of_other).with_content(other, content)
            verdicts.judge(f"{one} swapped with {other}", whole, damaged, GONE)
    verdicts.report(f"{profile}, swaps")


@pytest.mark.parametrize("boot", [SAME_BOOT, LATER_BOOT])
@pytest.mark.parametrize("profile", PROFILES)
def test_every_deleted_file(profile: str, boot: int) -> None:
    verdicts = Verdicts()
    for whole in (small(profile), rich(profile)):
        for name, _ in stored(whole):
            verdicts.judge(f"{name} deleted", whole, whole.image.with_content(name, None), GONE, boot)
    verdicts.report(f"{profile}, deletions")


@pytest.mark.parametrize("profile", PROFILES)
def test_damage_to_the_log_after_a_restart_of_the_machine(profile: str) -> None:
    """The watermark is of an older boot, so that the end is found by scanning: rot is still no torn tail."""
    verdicts, whole = Verdicts(), small(profile)
    for name, content in stored(whole):
        if name.startswith("log/"):
            for at in range(len(content)):
                damaged = whole.image.with_content(name, flipped(content, 8 * at + at % 8))
                verdicts.judge(f"byte {at} of {name}, after a boot", whole, damaged, CHANGED, LATER_BOOT)
                cut = whole.image.with_content(name, content[:at])
                verdicts.judge(f"{name} cut to {at} bytes, after a boot", whole, cut, CHANGED, LATER_BOOT)
    verdicts.report(f"{profile}, log after a boot")


@pytest.mark.parametrize("profile", PROFILES)
def test_swapped_strata_are_corruption(profile: str) -> None:
    whole = rich(profile)
    one, other = [name for name, _ in stored(whole) if name.startswith("data/")][:2]
    contents = whole.image.contents()
    damaged = whole.image.with_content(one, contents[other]).with_content(other, contents[one])
    told = answers(damaged, profile, whole.questions)
    assert isinstance(told["content first"], CorruptionError)
    assert isinstance(told["content second"], CorruptionError)
    assert told["names"] == whole.answers["names"] or isinstance(told["names"], CorruptionError)


@pytest.mark.parametrize("kind", ["flipped", "cut", "deleted"])
@pytest.mark.parametrize("profile", PROFILES)
def test_nothing_outside_of_a_damaged_stratum_becomes_unreadable(profile: str, kind: str) -> None:
    """The log is intact: contents of other strata, and names that do not refer to the damaged one, are still read."""
    whole = rich(profile)
    contents = whole.image.contents()
    for name in contents:
        if not name.startswith(("data/", "meta/")):
            continue
        for at in range(3, len(contents[name]), 197):
            damaged = {
                "flipped": flipped(contents[name], 8 * at + 1),
                "cut": contents[name][:at],
                "deleted": None,
            }[kind]
            told = answers(whole.image.with_content(name, damaged), profile, whole.questions)
            failed = {question for question, answer in told.items() if isinstance(answer, BasinError)}
            assert "head" not in failed
            assert failed - {"absent content"} <= _may_fail(whole, name), f"{name}, {kind} at {at}: {failed}"


def _may_fail(whole: SmallBasin, name: str) -> set[str]:
    """The questions whose answers lie in the stratum `name`. Links are a union over all strata that hold a content."""
    links = {question for question in whole.answers if question.startswith("links")}
    data = [one for one in whole.image.contents() if one.startswith("data/")]
    if name == data[0]:
        return links | {"names", "content first", "content parts"}
    if name == data[1]:
        return links | {"keyspaces", "content second"}
    if whole.image.contents()[name][STRATUM_HEADER_SIZE + 8] in (Kind.NAMES_BLOCK, Kind.NAMES_DIRECTORY):
        return {"names", "backwards", "one name", "absent name", "keyspaces", "roots"}
    return links | {"content linked", "content parts"}


@pytest.mark.parametrize("profile", PROFILES)
def test_a_block_of_names_does_not_stand_in_for_another(profile: str) -> None:
    disk = SimulatedDisk(boot=SAME_BOOT)
    names = {b"name %04d" % number: b"value %04d" % number * 10 for number in range(1000)}
    with open_disk(disk, profile, "x", FLUSH) as db:
        db.put_many(names.items())
    with open_disk(disk, profile) as db:
        (run,) = db._core.current.tables.runs
        assert len(run.directory.offsets) > 2
        for column in (run.directory.offsets, run.directory.lengths):
            column[0], column[1] = column[1], column[0]
        told = []
        for name, value in names.items():
            try:
                assert db.get(name) == value
                told.append(name)
            except CorruptionError as error:
                assert error.fields["object"].startswith("meta/")  # noqa: PT017  # half of the names are told
        assert 0 < len(told) < len(names)
        with pytest.raises(CorruptionError):
            list(db.scan())


@pytest.mark.parametrize("profile", PROFILES)
def test_a_stratum_of_a_newer_version_is_unsupported(profile: str) -> None:
    whole = rich(profile)
    name = next(name for name, _ in stored(whole) if name.startswith("data/"))
    content = bytearray(whole.image.contents()[name])
    content[8] = 2
    told = answers(whole.image.with_content(name, with_header_checksum(bytes(content))), profile, whole.questions)
    assert isinstance(told["content first"], UnsupportedVersion)
    assert told["content second"] == whole.answers["content second"]


def with_header_checksum(content: bytes) -> bytes:
    covered = content[: STRATUM_HEADER_SIZE - 4]
    return covered + xxhash.xxh32_intdigest(covered).to_bytes(4, "little") + content[STRATUM_HEADER_SIZE:]


@pytest.mark.parametrize("profile", PROFILES)
def test_a_lost_descriptor_is_not_replaced_by_a_new_basin(profile: str) -> None:
    whole = small(profile)
    disk = SimulatedDisk.from_image(whole.image.with_content("basin.json", None))
    with pytest.raises(NotABasin):
        open_disk(disk, profile, "c")
    assert disk.kill_image().contents() == whole.image.with_content("basin.json", None).contents()


@pytest.mark.parametrize("profile", PROFILES)
def test_a_writer_refuses_a_log_that_rots(profile: str) -> None:
    whole = small(profile)
    name = "log/00000000000000000001.log"
    content = whole.image.contents()[name]
    for boot in (SAME_BOOT, LATER_BOOT):
        disk = SimulatedDisk.from_image(
            whole.image.with_content(name, flipped(content, 8 * len(content) - 9)), boot=boot
        )
        with pytest.raises(CorruptionError):
            open_storage(
                SimulatedStorage(disk), "simulated:", mode="w", secret=secret_of(profile), options=dict(OPTIONS)
            ).put(b"name", b"value")
        assert disk.kill_image().contents()[name] == flipped(content, 8 * len(content) - 9)


def test_an_error_names_the_file_and_what_to_do() -> None:
    whole = small("encrypted")
    name = next(name for name, _ in stored(whole) if name.startswith("data/"))
    content = whole.image.contents()[name]
    told = answers(whole.image.with_content(name, content[:150]), "encrypted", whole.questions)
    error = told["content plain"]
    assert isinstance(error, CorruptionError)
    assert error.fields["object"] == name
    assert "basin check" in str(error)


@pytest.mark.parametrize("profile", PROFILES)
def test_check_names_the_file_that_was_damaged(profile: str, effort: int) -> None:
    """Also where no answer changes: a checkpoint, log that is folded, an index that the strata make up for."""
    whole, verdicts = rich(profile), Verdicts()
    for name, content in stored(whole):
        if name == "log/lock":
            continue  # A watermark that is not right is none: the log's end is found by scanning.
        for bit in range(3, 8 * len(content), 401 if effort == 1 else 31):
            disk = SimulatedDisk.from_image(whole.image.with_content(name, flipped(content, bit)), boot=SAME_BOOT)
            try:
                db = open_disk(disk, profile)
            except CHANGED:
                verdicts["not opened"] += 1
                continue
            with db:
                found = [finding for finding in db.check() if finding.severity != "info"]
            assert name in {finding.object for finding in found}, f"bit {bit & 7} of byte {bit >> 3} of {name}: {found}"
            verdicts["found"] += 1
    verdicts.report(f"{profile}, check")
    assert verdicts["found"] > verdicts["not opened"]


@pytest.mark.parametrize("profile", PROFILES)
def test_check_finds_nothing_in_whole_basins(profile: str) -> None:
    for whole in (small(profile), rich(profile)):
        with open_disk(SimulatedDisk.from_image(whole.image, boot=SAME_BOOT), profile) as db:
            assert [finding for finding in db.check() if finding.severity != "info"] == []
