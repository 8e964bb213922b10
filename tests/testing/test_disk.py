"""The simulated disk and the crash explorer, tried on a toy protocol whose sabotaged variants must all be caught."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest

from basin.errors import AlreadyExists, ObjectMissing, OutOfSpace
from basin.testing.crash import Bounds, CrashStates, crash_states, file_variants
from basin.testing.disk import DiskImage, FileImage, Inode, SimulatedDisk
from basin.testing.explore import explore
from basin.testing.simulated import SimulatedStorage

PAYLOAD = bytes(range(1, 251)) * 6  # three sectors, none of zeros


def mounted() -> tuple[SimulatedDisk, SimulatedStorage]:
    disk = SimulatedDisk()
    return disk, SimulatedStorage(disk)


def contents_after_power_cut(disk: SimulatedDisk) -> list[dict[str, bytes]]:
    return [image.contents() for image in crash_states(disk)]


class TestWhatAPowerCutLeaves:
    def test_nothing_is_uncertain_after_both_syncs(self) -> None:
        disk, storage = mounted()
        file = storage.create("data/a")
        file.append(PAYLOAD)
        file.sync()
        storage.sync_folder("data")
        assert contents_after_power_cut(disk) == [{"data/a": PAYLOAD}]

    def test_a_synced_file_vanishes_without_its_folder(self) -> None:
        disk, storage = mounted()
        file = storage.create("data/a")
        file.append(b"x")
        file.sync()
        images = list(crash_states(disk))
        assert [image.contents() for image in images] == [{"data/a": b"x"}, {}, {}]
        assert [sorted(image.folders) for image in images] == [["data"], ["data"], []]

    def test_each_directory_entry_is_lost_by_itself(self) -> None:
        disk, storage = mounted()
        for name in "abc":
            storage.create(name)
        found = {tuple(contents) for contents in contents_after_power_cut(disk)}
        assert found == {subset for count in range(4) for subset in itertools.combinations("abc", count)}

    def test_a_link_survives_without_the_first_name_and_the_other_way_round(self) -> None:
        disk, storage = mounted()
        file = storage.create("a")
        file.append(b"x")
        file.sync()
        storage.sync_folder("")
        storage.link("a", "b")
        storage.delete("a")
        assert sorted(map(sorted, contents_after_power_cut(disk))) == [[], ["a"], ["a", "b"], ["b"]]

    def test_a_deleted_file_may_come_back(self) -> None:
        disk, storage = mounted()
        storage.create("a")
        storage.sync_folder("")
        storage.delete("a")
        assert sorted(map(sorted, contents_after_power_cut(disk))) == [[], ["a"]]

    def test_every_subset_of_appended_sectors_and_every_length(self) -> None:
        disk, storage = mounted()
        file = storage.create("a")
        storage.sync_folder("")
        file.append(PAYLOAD[:100])
        file.sync()
        file.append(PAYLOAD[100:1100])
        found = {contents["a"] for contents in contents_after_power_cut(disk)}
        sectors = [PAYLOAD[100:512], PAYLOAD[512:1024], PAYLOAD[1024:1100]]
        expected = {
            (
                PAYLOAD[:100]
                + b"".join(piece if kept else bytes(len(piece)) for piece, kept in zip(sectors, mask, strict=True))
            )[:length]
            for mask in itertools.product((True, False), repeat=3)
            for length in (100, 512, 1024, 1100)
        }
        assert found == expected
        assert len(found) == 1 + 2 + 4 + 8

    def test_a_sector_written_twice_may_hold_the_version_between(self) -> None:
        disk, storage = mounted()
        lock = storage.lock("lock")
        storage.sync_folder("")
        for text in (b"one", b"two", b"six"):
            lock.write(text)
        assert {contents["lock"] for contents in contents_after_power_cut(disk)} == {
            b"", b"one", b"two", b"six", b"\0\0\0",
        }  # fmt: skip

    def test_files_are_cut_independently(self) -> None:
        disk, storage = mounted()
        for name in "ab":
            storage.create(name)
        storage.sync_folder("")
        for name in "ab":
            storage.append_to(name, 0).append(b"x")
        found = [tuple(contents.values()) for contents in contents_after_power_cut(disk)]
        assert sorted(found) == sorted(itertools.product((b"", b"\0", b"x"), repeat=2))

    def test_a_failed_sync_leaves_sectors_that_no_later_sync_writes(self) -> None:
        disk, storage = mounted()
        file = storage.create("a")
        storage.sync_folder("")
        file.append(b"x")
        file.lose_unsynced()  # type: ignore[attr-defined]  # only the simulated file has it
        file.sync()
        assert {contents["a"] for contents in contents_after_power_cut(disk)} == {b"", b"\0", b"x"}

    def test_a_long_run_of_sectors_is_bounded(self) -> None:
        inode = Inode(0, "a", FileImage.of(b""))
        inode.write(0, PAYLOAD * 20)
        variants = file_variants(inode, Bounds(positions=8))
        found = {variant.content for variant in variants}
        assert variants[0].content == PAYLOAD * 20
        assert variants[1].content == b""
        assert bytes(30000) in found
        assert any(content[:512] == bytes(512) and content[512:] == (PAYLOAD * 20)[512:] for content in found)
        assert len(found) == len(variants) < 400

    def test_what_the_bound_leaves_out_is_counted(self) -> None:
        disk, storage = mounted()
        for name in "abcdef":
            storage.create(name).append(PAYLOAD)
        moment = CrashStates(disk, Bounds(states=500))
        assert moment.omitted == moment.total - 500
        assert len(list(moment.states())) == 500

    def test_digests_agree_with_bytes(self) -> None:
        disk, storage = mounted()
        storage.create("data/a").append(PAYLOAD)
        storage.link("data/a", "data/b")
        storage.lock("lock").write(b"abc")
        images = list(crash_states(disk))
        assert len({image.digest for image in images}) == len(images) > 100
        seen = {(tuple(image.contents().items()), image.folders) for image in images}
        assert len(seen) == len(images)
        for image in images:
            assert image.digest == SimulatedDisk.from_image(image).kill_image().digest
            built = {name: FileImage.of(content) for name, content in image.contents().items()}
            assert image.digest == DiskImage(built, image.folders).digest

    def test_two_names_of_one_file_stay_one_file(self) -> None:
        disk, storage = mounted()
        storage.create("a").sync()
        storage.link("a", "b")
        again = SimulatedStorage(SimulatedDisk.from_image(disk.kill_image()))
        again.append_to("a", 0).append(b"x")
        assert again.read_file("b", 10) == b"x"

    def test_the_boot_id_changes_with_a_power_cut_only(self) -> None:
        disk, _ = mounted()
        assert SimulatedDisk.from_image(disk.kill_image()).boot_id != disk.boot_id
        assert SimulatedDisk.from_image(disk.kill_image(), boot=disk.boot).boot_id == disk.boot_id

    def test_a_full_disk(self) -> None:
        storage = SimulatedStorage(SimulatedDisk(capacity=1000))
        storage.reserve("reserve", 900)
        file = storage.create("a")
        with pytest.raises(OutOfSpace):
            file.append(bytes(101))
        storage.delete("reserve")
        file.append(bytes(101))


def toy_writer(sabotage: str = "") -> Callable[[SimulatedStorage, Callable[[], None]], None]:
    """Store numbered payloads: a file first, then a manifest that names it; acknowledge each."""

    def write(storage: SimulatedStorage, acknowledge: Callable[[], None]) -> None:
        for number in range(4):
            data = bytes([number + 1]) * 1200
            if sabotage == "manifest first":
                storage.put_if_absent(f"log/{number}", data[:8])
            file = storage.create(f"data/{number}")
            file.append(data)
            if sabotage != "no file sync":
                file.sync()
            file.close()
            if sabotage != "no folder sync":
                storage.sync_folder("data")
            if sabotage == "early acknowledgement":
                acknowledge()
            if sabotage == "manifest not synced":
                manifest = storage.create(f"log/{number}")
                manifest.append(data[:8])
                storage.sync_folder("log")
            elif sabotage == "log folder not synced":
                manifest = storage.create(f"log/{number}")
                manifest.append(data[:8])
                manifest.sync()
            elif sabotage != "manifest first":
                storage.put_if_absent(f"log/{number}", data[:8])
            if sabotage != "early acknowledgement":
                acknowledge()

    return write


def toy_check(storage: SimulatedStorage, acknowledged: int) -> None:
    count = 0
    while storage.exists(f"log/{count}"):
        data = bytes([count + 1]) * 1200
        assert storage.read_file(f"log/{count}", 100) == data[:8], "torn manifest"
        assert storage.read_file(f"data/{count}", 2000) == data, "torn file"
        count += 1
    assert count >= acknowledged, "an acknowledged one is lost"
    assert len(storage.list("log")) == count, "a hole"


class TestExplorer:
    def test_the_toy_protocol_survives_every_crash(self) -> None:
        report = explore(toy_writer(), toy_check)
        report.require_good()
        assert report.acknowledged == 4
        assert report.distinct >= 300
        assert report.killed >= 30
        assert report.checked >= report.distinct
        assert "0 bad" in str(report)

    @pytest.mark.parametrize(
        "sabotage",
        [
            "manifest first",
            "no file sync",
            "no folder sync",
            "early acknowledgement",
            "manifest not synced",
            "log folder not synced",
        ],
    )
    @pytest.mark.parametrize("each_effect", [True, False])
    def test_a_sabotaged_protocol_is_caught(self, sabotage: str, each_effect: bool) -> None:
        report = explore(toy_writer(sabotage), toy_check, each_effect=each_effect)
        assert report.bad
        with pytest.raises(AssertionError, match="bad states"):
            report.require_good()

    def test_a_bad_state_can_be_looked_at_again(self) -> None:
        bad = explore(toy_writer("no file sync"), toy_check, kills=False).bad[0]
        with pytest.raises((AssertionError, ObjectMissing)):
            toy_check(bad.mount(), bad.acknowledged)

    def test_the_same_seed_visits_the_same_states(self) -> None:
        def script(storage: SimulatedStorage, acknowledge: Callable[[], None]) -> None:
            for name in "abcdefgh":
                storage.create(name).append(PAYLOAD)

        def visit(seed: int) -> list[int]:
            visited: list[int] = []
            explore(
                script,
                lambda storage, _: visited.append(storage.disk.kill_image().digest),
                bounds=Bounds(states=50),
                seed=seed,
            )
            return visited

        assert visit(1) == visit(1) != visit(2)

    def test_a_crash_during_recovery_is_explored(self) -> None:
        """The recovery moves a file in two steps; it is wrong only if it is itself cut in between."""

        def script(storage: SimulatedStorage, acknowledge: Callable[[], None]) -> None:
            storage.put_if_absent("old", PAYLOAD)
            acknowledge()

        def recover(storage: SimulatedStorage, acknowledged: int) -> None:
            if acknowledged and storage.exists("old"):
                storage.link("old", "new")
                storage.delete("old")

        def check(storage: SimulatedStorage, acknowledged: int) -> None:
            assert not acknowledged or storage.exists("old") or storage.exists("new")

        assert not explore(script, check).bad
        report = explore(script, check, recover=recover, recoveries=50)
        assert {bad.level for bad in report.bad} == {2}
        assert report.recoveries > 0

    def test_two_writers_on_one_disk_exclude_each_other(self) -> None:
        def script(storage: SimulatedStorage, acknowledge: Callable[[], None]) -> None:
            other = SimulatedStorage(storage.disk)
            for number, writer in enumerate((storage, other, storage)):
                with pytest.raises(AlreadyExists):
                    while True:
                        writer.put_if_absent(f"log/{number}", b"x")
                        acknowledge()

        def check(storage: SimulatedStorage, acknowledged: int) -> None:
            assert len(storage.list("log")) >= acknowledged

        report = explore(script, check)
        report.require_good()
        assert report.acknowledged == 3
