"""The cache on the disk: it returns the right bytes or none, never fails its caller, and keeps its bound.

Longer than most: the damage, the planted files, the refused calls and the races are one list of what a folder that
everybody may touch can meet, and share their helpers.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import stat
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from basin.errors import InvalidArgument
from basin.storage import disk_cache
from basin.storage.disk_cache import BLOCK_SIZE, DiskCache, decode_piece, encode_piece
from tests.source_tree import ROOT

Spawn: TypeAlias = Callable[..., "subprocess.Popen[Any]"]

KEY = "basin-1/index/0199"
DATA = bytes(range(100))
PLENTY = 1 << 30


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def cache(folder: Path) -> DiskCache:
    return DiskCache(folder, PLENTY)


@pytest.fixture
def quick_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_cache, "_PAUSE_S", 0.05)


def pieces(folder: Path) -> list[Path]:
    """Every file but the tally."""
    return sorted(path for path in folder.rglob("*") if path.parent != folder and not path.is_dir())


def the_piece(folder: Path) -> Path:
    (only,) = pieces(folder)
    return only


def disk_use(folder: Path, pattern: str = "*") -> int:
    sizes = [path.lstat().st_size for path in pieces(folder) if path.match(pattern)]
    return sum(-(-size // BLOCK_SIZE) * BLOCK_SIZE for size in sizes)


def lay_aside(path: Path, seconds: float) -> None:
    """As if its last use were so long ago."""
    then = time.time() - seconds
    os.utime(path, (then, then), follow_symlinks=False)


def age(path: Path) -> float:
    return time.time() - path.stat().st_mtime


def put_aged(cache: DiskCache, folder: Path, key: str, seconds: float) -> None:
    before = set(pieces(folder))
    cache.put(key, 0, DATA)
    (new,) = set(pieces(folder)) - before
    lay_aside(new, seconds)


def held(cache: DiskCache, keys: list[str]) -> list[str]:
    return [key for key in keys if cache.get(key, 0, len(DATA)) is not None]


class TestPieces:
    def test_what_was_put_is_got(self, cache: DiskCache) -> None:
        assert cache.get(KEY, 0, 100) is None
        cache.put(KEY, 0, DATA)
        assert cache.get(KEY, 0, 100) == DATA
        assert (cache.hits, cache.misses) == (1, 1)

    @pytest.mark.parametrize("stop", [4096, 4097, 4195, 4196])
    def test_a_shorter_range_with_the_same_start_is_a_hit(self, cache: DiskCache, stop: int) -> None:
        cache.put(KEY, 4096, DATA)
        assert cache.get(KEY, 4096, stop) == DATA[: stop - 4096]

    def test_a_longer_range_is_a_miss_and_harms_nothing(self, cache: DiskCache) -> None:
        cache.put(KEY, 0, DATA)
        assert cache.get(KEY, 0, 101) is None
        assert cache.get(KEY, 0, 100) == DATA

    def test_another_start_or_key_is_a_miss(self, cache: DiskCache) -> None:
        cache.put(KEY, 0, DATA)
        assert cache.get(KEY, 1, 2) is None
        assert cache.get(KEY + "0", 0, 1) is None
        assert cache.misses == 2

    def test_a_longer_piece_replaces_a_shorter_one_and_never_the_other_way(
        self, cache: DiskCache, folder: Path
    ) -> None:
        cache.put(KEY, 0, DATA[:50])
        cache.put(KEY, 0, DATA)
        cache.put(KEY, 0, DATA[:50])
        assert cache.get(KEY, 0, 100) == DATA
        assert len(pieces(folder)) == 1

    @pytest.mark.parametrize(
        "spoilt", [encode_piece(KEY.encode(), 0, DATA[::-1]), bytes(200)], ids=["sound", "damaged"]
    )
    def test_other_bytes_replace_those_of_a_piece_that_is_there(
        self, cache: DiskCache, folder: Path, spoilt: bytes
    ) -> None:
        cache.put(KEY, 0, DATA)
        the_piece(folder).write_bytes(spoilt)
        cache.put(KEY, 0, DATA)
        assert cache.get(KEY, 0, 100) == DATA

    def test_the_same_bytes_are_not_written_again(
        self, cache: DiskCache, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        cache.put(KEY, 0, DATA)
        monkeypatch.setattr(os, "write", lambda *_: pytest.fail("it was written"))
        cache.put(KEY, 0, DATA)
        cache.put(KEY, 0, DATA[:50])
        assert cache.size == BLOCK_SIZE

    @pytest.mark.parametrize("key", ["", "../../etc/passwd", "/etc/passwd", "a\0b", "\udc80", "é" * 30_000])
    def test_no_key_reaches_a_path(self, cache: DiskCache, folder: Path, key: str) -> None:
        cache.put(key, 0, DATA)
        assert cache.get(key, 0, 100) == DATA
        assert set(str(the_piece(folder).relative_to(folder))) <= set("0123456789abcdef/")

    @pytest.mark.parametrize(
        ("key", "start", "stop"), [("k" * 65536, 0, 1), (KEY, -1, 1), (KEY, 2, 1), (KEY, 0, 2**63)]
    )
    def test_what_is_no_piece_is_refused(self, cache: DiskCache, key: str, start: int, stop: int) -> None:
        with pytest.raises(InvalidArgument):
            cache.get(key, start, stop)

    def test_an_empty_piece_is_a_piece(self, cache: DiskCache) -> None:
        cache.put(KEY, 7, b"")
        assert cache.get(KEY, 7, 7) == b""

    def test_what_cannot_fit_is_dropped(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        small = DiskCache(folder, 2 * BLOCK_SIZE)
        small.put(KEY, 0, bytes(2 * BLOCK_SIZE))
        small.put(KEY, 1, bytes(BLOCK_SIZE))
        assert [small.get(KEY, 0, 1), small.get(KEY, 1, 2)] == [None, b"\0"]
        monkeypatch.setattr(disk_cache, "PIECE_SIZE_MAX", 99)
        small.put(KEY, 2, DATA)
        assert small.get(KEY, 2, 3) is None

    def test_after_close_nothing_is_served_or_kept(self, cache: DiskCache, folder: Path) -> None:
        cache.put(KEY, 0, DATA)
        cache.close()
        cache.put(KEY, 1, DATA)
        assert cache.get(KEY, 0, 100) is None
        assert len(pieces(folder)) == 1

    @pytest.mark.parametrize("mask", [0, 0o022, 0o777])
    def test_only_the_owner_may_read_whatever_the_umask(self, cache: DiskCache, folder: Path, mask: int) -> None:
        before = os.umask(mask)
        try:
            cache.put(KEY, 0, DATA)
        finally:
            os.umask(before)
        modes = {path: stat.S_IMODE(path.stat().st_mode) for path in (folder, *folder.rglob("*"))}
        assert {oct(mode) for path, mode in modes.items() if path.is_dir()} == {oct(0o700)}
        assert {oct(mode & 0o077) for mode in modes.values()} == {oct(0)}
        assert modes[the_piece(folder)] == 0o600

    def test_an_encoded_piece_has_the_documented_layout(self) -> None:
        piece = encode_piece(b"key", 4096, b"data")
        assert piece[:31].hex() == "42736e5001000300001000000000000004000000000000006b657964617461"
        assert len(piece) == 31 + 16

    def test_handles_leave_no_descriptor_open(self, cache: DiskCache, folder: Path) -> None:
        def descriptors() -> int:
            return len(list(Path("/dev/fd").iterdir()))

        before = descriptors()
        for start in range(10):
            cache.put(KEY, start, DATA)
            assert cache.get(KEY, start, start + 1)
        the_first = pieces(folder)[0]
        the_first.write_bytes(b"damaged")
        assert [cache.get(KEY, start, start + 1) for start in range(10)].count(None) == 1
        assert descriptors() == before


class TestDamage:
    def spoil(self, cache: DiskCache, folder: Path, spoilt: bytes) -> None:
        """Put `spoilt` where the piece of `KEY` lies: it must be a miss, and gone."""
        path = the_piece(folder)
        path.write_bytes(spoilt)
        assert cache.get(KEY, 0, 1) is None
        assert not path.exists()
        cache.put(KEY, 0, DATA)
        assert cache.get(KEY, 0, 100) == DATA

    def test_a_flip_in_any_byte_is_a_miss(self, cache: DiskCache, folder: Path) -> None:
        cache.put(KEY, 0, DATA)
        good = the_piece(folder).read_bytes()
        for offset in range(len(good)):
            for flip in (1 << offset % 8, 0xFF):
                self.spoil(cache, folder, good[:offset] + bytes([good[offset] ^ flip]) + good[offset + 1 :])
        print(f"{2 * len(good)} flips were misses")
        assert cache.misses == 2 * len(good)

    def test_a_cut_at_any_length_is_a_miss(self, cache: DiskCache, folder: Path) -> None:
        cache.put(KEY, 0, DATA)
        good = the_piece(folder).read_bytes()
        for length in range(len(good)):
            self.spoil(cache, folder, good[:length])
        self.spoil(cache, folder, good + b"\0")
        self.spoil(cache, folder, bytes(len(good)))  # what a power cut may leave of a file that was not synced

    @pytest.mark.parametrize(
        "foreign",
        [
            encode_piece(b"another key here..", 0, DATA),
            encode_piece(KEY.encode(), 1, DATA),
            encode_piece(KEY.encode()[:-1], 0, DATA),
            encode_piece(KEY.encode() + DATA[:1], 0, DATA[1:]),
        ],
        ids=["key", "start", "shorter key", "longer key"],
    )
    def test_a_sound_piece_of_something_else_is_a_miss(self, cache: DiskCache, folder: Path, foreign: bytes) -> None:
        cache.put(KEY, 0, DATA)
        self.spoil(cache, folder, foreign)

    def test_two_swapped_pieces_are_two_misses(self, cache: DiskCache, folder: Path) -> None:
        cache.put("a", 0, DATA)
        cache.put("b", 0, DATA[::-1])
        one, other = pieces(folder)
        aside = folder / "aside"
        one.rename(aside)
        other.rename(one)
        aside.rename(other)
        assert held(cache, ["a", "b"]) == []
        assert pieces(folder) == []

    def test_a_huge_file_is_not_read(self, cache: DiskCache, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        cache.put(KEY, 0, DATA)
        os.truncate(the_piece(folder), 1 << 40)
        monkeypatch.setattr(os, "read", lambda *_: pytest.fail("it was read"))
        assert cache.get(KEY, 0, 100) is None
        assert pieces(folder) == []

    def test_decoding_takes_only_what_encoding_made(self, rng: random.Random) -> None:
        key, data = rng.randbytes(20), rng.randbytes(200)
        piece = encode_piece(key, 5, data)
        assert bytes(decode_piece(piece, key, 5) or b"") == data
        assert decode_piece(piece, key, 6) is None
        assert decode_piece(piece, key[:-1], 5) is None
        assert decode_piece(rng.randbytes(len(piece)), key, 5) is None


class TestWhatOthersDoToTheFolder:
    def test_a_removed_folder_is_made_again(self, cache: DiskCache, folder: Path) -> None:
        cache.put(KEY, 0, DATA)
        shutil.rmtree(folder)
        assert cache.get(KEY, 0, 100) is None
        assert cache.size == 0
        cache.put(KEY, 0, DATA)
        assert cache.get(KEY, 0, 100) == DATA

    def test_folders_above_are_made(self, tmp_path: Path) -> None:
        deep = DiskCache(tmp_path / "a" / "b" / "c", PLENTY)
        deep.put(KEY, 0, DATA)
        assert deep.get(KEY, 0, 100) == DATA

    @pytest.mark.parametrize("what", ["shard", "piece", "tally"])
    def test_a_removed_part_is_made_again(self, cache: DiskCache, folder: Path, what: str) -> None:
        cache.put(KEY, 0, DATA)
        path = the_piece(folder)
        if what == "shard":
            shutil.rmtree(path.parent)
        else:
            (path if what == "piece" else folder / "tally").unlink()
        cache.put(KEY, 0, DATA)
        cache.put(KEY, 1, DATA)
        assert [cache.get(KEY, start, start + 1) for start in (0, 1)] == [DATA[:1]] * 2
        assert disk_use(folder) == 2 * BLOCK_SIZE <= cache.size

    def test_a_file_instead_of_a_shard_is_replaced(self, cache: DiskCache, folder: Path) -> None:
        cache.put(KEY, 0, DATA)
        shard = the_piece(folder).parent
        shutil.rmtree(shard)
        shard.write_bytes(b"no folder")
        assert cache.get(KEY, 0, 100) is None
        cache.put(KEY, 0, DATA)
        assert cache.get(KEY, 0, 100) == DATA

    def test_an_empty_folder_instead_of_a_piece_is_replaced(self, cache: DiskCache, folder: Path) -> None:
        cache.put(KEY, 0, DATA)
        path = the_piece(folder)
        path.unlink()
        path.mkdir()
        assert cache.get(KEY, 0, 100) is None
        cache.put(KEY, 0, DATA)
        assert cache.get(KEY, 0, 100) == DATA

    def test_a_full_folder_instead_of_a_piece_costs_that_piece_only(self, cache: DiskCache, folder: Path) -> None:
        cache.put(KEY, 0, DATA)
        path = the_piece(folder)
        path.unlink()
        path.mkdir()
        (path / "precious").write_bytes(b"kept")
        assert cache.get(KEY, 0, 100) is None
        cache.put(KEY, 0, DATA)
        assert cache.get(KEY, 0, 100) is None
        assert [entry.name for entry in path.iterdir()] == ["precious"]
        assert not list(folder.rglob("*.tmp"))
        cache.put(KEY, 1, DATA)
        assert cache.get(KEY, 1, 101) == DATA

    @pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, Path.touch], ids=["folder", "pipe", "empty"])
    def test_something_else_instead_of_the_tally_fails_nobody(
        self, folder: Path, make: Callable[[Path], None], quick_pause: None
    ) -> None:
        folder.mkdir()
        make(folder / "tally")
        cache = DiskCache(folder, PLENTY)
        cache.put(KEY, 0, DATA)
        assert cache.get(KEY, 0, 100) in (DATA, None)
        (folder / "tally").rmdir() if (folder / "tally").is_dir() else (folder / "tally").unlink()
        time.sleep(0.06)
        cache.put(KEY, 0, DATA)
        assert cache.get(KEY, 0, 100) == DATA

    def test_a_file_instead_of_the_whole_folder_is_left_alone(self, cache: DiskCache, folder: Path) -> None:
        folder.write_bytes(b"precious")
        cache.put(KEY, 0, DATA)
        assert cache.get(KEY, 0, 100) is None
        assert cache.size == 0
        assert folder.read_bytes() == b"precious"

    def test_a_planted_link_to_a_sound_piece_is_not_followed(
        self, cache: DiskCache, folder: Path, tmp_path: Path
    ) -> None:
        cache.put(KEY, 0, DATA)
        path = the_piece(folder)
        outside = tmp_path / "outside"
        path.rename(outside)
        path.symlink_to(outside)
        assert cache.get(KEY, 0, 100) is None
        cache.put(KEY, 0, b"new")
        assert not path.is_symlink()
        assert cache.get(KEY, 0, 3) == b"new"
        assert outside.read_bytes() == encode_piece(KEY.encode(), 0, DATA)

    def test_a_planted_link_instead_of_a_shard_is_not_followed(
        self, cache: DiskCache, folder: Path, tmp_path: Path
    ) -> None:
        cache.put(KEY, 0, DATA)
        shard = the_piece(folder).parent
        outside = tmp_path / "outside"
        shard.rename(outside)
        shard.symlink_to(outside, target_is_directory=True)
        before = sorted(outside.iterdir())
        assert cache.get(KEY, 0, 100) is None
        tiny = DiskCache(folder, BLOCK_SIZE)
        for start in range(3):
            tiny.put("other", start, DATA)  # each evicts what it finds
            assert tiny.get("other", start, start + 1) == DATA[:1]
        cache.put(KEY, 0, DATA)
        assert cache.get(KEY, 0, 100) == DATA
        assert sorted(outside.iterdir()) == before

    def test_a_planted_link_instead_of_the_tally_is_not_followed(
        self, cache: DiskCache, folder: Path, tmp_path: Path
    ) -> None:
        outside = tmp_path / "outside"
        outside.write_bytes(b"precious")
        folder.mkdir()
        (folder / "tally").symlink_to(outside)
        cache.put(KEY, 0, DATA)
        assert cache.get(KEY, 0, 100) == DATA
        assert outside.read_bytes() == b"precious"

    def test_a_pipe_instead_of_a_piece_does_not_hang(self, cache: DiskCache, folder: Path) -> None:
        cache.put(KEY, 0, DATA)
        path = the_piece(folder)
        path.unlink()
        os.mkfifo(path)
        assert cache.get(KEY, 0, 100) is None
        assert not path.exists()

    def test_files_of_others_are_never_evicted(self, folder: Path) -> None:
        tiny = DiskCache(folder, BLOCK_SIZE)
        tiny.put(KEY, 0, DATA)
        shard = the_piece(folder).parent
        strangers = [folder / "notes.txt", shard / "notes.txt", shard / ("0" * 31), folder / "0f-not" / ("0" * 30)]
        strangers.append(shard / ("0" * 30) / "a folder named like a piece")
        for stranger in strangers:
            stranger.parent.mkdir(exist_ok=True)
            stranger.write_bytes(b"precious")
            lay_aside(stranger, 10_000)
        lay_aside(strangers[-1].parent, 10_000)
        for start in range(5):
            tiny.put(KEY, start, DATA)
        assert tiny.evictions >= 4
        assert all(stranger.exists() for stranger in strangers)

    def test_deletion_under_load_is_never_noticed_by_callers(self, folder: Path) -> None:
        """Two threads use a cache that a third deletes all the time."""
        cache = DiskCache(folder, 40 * BLOCK_SIZE)
        failures: list[object] = []
        stop = threading.Event()

        def use(number: int) -> None:
            try:
                for start in range(1500):
                    cache.put(f"k{number}", start % 60, bytes([start % 60]) * 50)
                    found = cache.get(f"k{number}", start % 60, start % 60 + 50)
                    if found not in (None, bytes([start % 60]) * 50):
                        failures.append(found)
            except BaseException as error:  # noqa: BLE001 (whatever reaches a caller is the failure)
                failures.append(error)

        def delete() -> None:
            while not stop.is_set():
                shutil.rmtree(folder, ignore_errors=True)
                time.sleep(0.002)

        users = [threading.Thread(target=use, args=(number,)) for number in range(2)]
        deleter = threading.Thread(target=delete)
        for thread in (deleter, *users):
            thread.start()
        for thread in users:
            thread.join()
        stop.set()
        deleter.join()
        assert failures == []
        assert cache._paused_until == 0.0  # deletion is no failure of the disk
        cache.put("last", 0, DATA)
        assert cache.get("last", 0, 100) == DATA


class TestEviction:
    KEYS: tuple[str, ...] = tuple("abcdefghij")

    def filled(self, folder: Path) -> DiskCache:
        """A cache of ten blocks, full: `a` was not used for longest."""
        cache = DiskCache(folder, 10 * BLOCK_SIZE)
        for number, key in enumerate(self.KEYS):
            put_aged(cache, folder, key, 10_000 - 100 * number)
        assert (cache.size, cache.evictions) == (10 * BLOCK_SIZE, 0)
        return cache

    def test_what_was_not_used_for_longest_goes_first_down_to_nine_tenths(self, folder: Path) -> None:
        cache = self.filled(folder)
        cache.put("new", 0, DATA)
        assert held(cache, [*self.KEYS, "new"]) == [*"cdefghij", "new"]
        assert cache.evictions == 2
        assert cache.size == disk_use(folder) == 9 * BLOCK_SIZE

    def test_a_hit_is_a_use(self, folder: Path) -> None:
        cache = self.filled(folder)
        assert held(cache, ["a", "c"]) == ["a", "c"]
        cache.put("new", 0, DATA)
        assert held(cache, [*self.KEYS, "new"]) == [*"acefghij", "new"]

    def test_the_order_is_shared_with_other_handles(self, folder: Path) -> None:
        cache = self.filled(folder)
        assert held(DiskCache(folder, PLENTY), ["a"]) == ["a"]
        cache.put("new", 0, DATA)
        assert held(cache, ["a", "b", "c", "d"]) == ["a", "d"]

    @pytest.mark.parametrize(("unused_s", "touched"), [(50, False), (70, True), (-70, True)])
    def test_a_use_is_marked_once_a_minute(self, cache: DiskCache, folder: Path, unused_s: int, touched: bool) -> None:
        put_aged(cache, folder, KEY, unused_s)
        assert cache.get(KEY, 0, 100) == DATA
        assert (abs(age(the_piece(folder))) < 10) == touched

    def test_a_piece_of_a_clock_that_was_ahead_does_not_stay_for_ever(self, folder: Path) -> None:
        cache = self.filled(folder)
        lay_aside(max(pieces(folder), key=lambda path: path.stat().st_mtime), -1_000_000)
        cache.put("new", 0, DATA)
        assert held(cache, [*self.KEYS, "new"]) == [*"bcdefghi", "new"]

    def test_many_small_evictions_keep_the_bound_and_the_tally(self, folder: Path, rng: random.Random) -> None:
        cache = DiskCache(folder, 50 * BLOCK_SIZE)
        for number in range(400):
            cache.put(f"k{rng.randrange(200)}", 0, bytes(rng.randrange(4 * BLOCK_SIZE)))
            if number % 10 == 0:
                assert disk_use(folder) <= cache.size <= 50 * BLOCK_SIZE
        assert disk_use(folder) > 25 * BLOCK_SIZE
        assert cache.evictions > 100

    def test_the_folder_is_not_counted_at_each_put(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        cache = DiskCache(folder, 200 * BLOCK_SIZE)
        counts = 0
        survey = DiskCache._survey

        def counted(self: DiskCache) -> Any:
            nonlocal counts
            counts += 1
            return survey(self)

        monkeypatch.setattr(DiskCache, "_survey", counted)
        for start in range(1000):
            cache.put(KEY, start, DATA)
        print(f"{counts} counts for 1000 puts into a cache of 200")
        assert 2 <= counts <= 1 + -(-800 // 20) + 1

    def test_a_new_process_does_not_count_a_folder_that_is_counted(
        self, cache: DiskCache, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        cache.put("a", 0, DATA)
        monkeypatch.setattr(DiskCache, "_survey", lambda _: pytest.fail("it was counted"))
        other = DiskCache(folder, PLENTY)
        other.put("b", 0, DATA)
        assert other.size == 2 * BLOCK_SIZE

    @pytest.mark.parametrize("wrong", [0, 1, 1 << 40])
    def test_a_wrong_tally_is_set_right_in_time(self, folder: Path, wrong: int) -> None:
        cache = self.filled(folder)
        os.truncate(folder / "tally", wrong)
        for start in range(20):
            cache.put("new", start, DATA)
        assert disk_use(folder) == cache.size <= 10 * BLOCK_SIZE

    def test_without_a_tally_the_size_is_counted(self, folder: Path) -> None:
        cache = self.filled(folder)
        os.truncate(folder / "tally", 0)
        assert cache.size == 10 * BLOCK_SIZE
        (folder / "tally").unlink()
        pieces(folder)[0].unlink()
        assert cache.size == 9 * BLOCK_SIZE

    def test_a_smaller_bound_shrinks_what_is_there(self, folder: Path) -> None:
        self.filled(folder)
        DiskCache(folder, 4 * BLOCK_SIZE).put("new", 0, DATA)
        assert disk_use(folder) == 3 * BLOCK_SIZE

    def test_files_of_dead_writers_are_swept_and_young_ones_left(self, folder: Path) -> None:
        cache = self.filled(folder)
        shard = pieces(folder)[0].parent
        dead, live = shard / ("0" * 16 + ".tmp"), shard / ("1" * 16 + ".tmp")
        dead.write_bytes(bytes(100))
        live.write_bytes(bytes(100))
        lay_aside(dead, 400)
        lay_aside(live, 200)
        cache.put("new", 0, DATA)
        assert not dead.exists()
        assert live.exists()
        assert disk_use(folder) <= 10 * BLOCK_SIZE

    def test_nothing_is_added_where_others_are_writing_all_that_fits(self, folder: Path) -> None:
        cache = DiskCache(folder, 3 * BLOCK_SIZE)
        cache.put("a", 0, DATA)
        shard = the_piece(folder).parent
        for digit in "012":
            (shard / (digit * 16 + ".tmp")).write_bytes(bytes(100))
        (folder / "tally").unlink()
        cache.put("b", 0, DATA)
        assert held(cache, ["a", "b"]) == []
        assert disk_use(folder) == 3 * BLOCK_SIZE

    def test_a_piece_that_another_process_evicts_first_is_no_failure(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        place_of, chosen = disk_cache._place_of, disk_cache._chosen

        def overtaken(*arguments: Any) -> Any:
            victims, freed = chosen(*arguments)
            (folder / victims[0].shard / victims[0].file).unlink()
            return victims, freed

        monkeypatch.setattr(disk_cache, "_place_of", lambda *piece: place_of(*piece)._replace(shard="00"))
        cache = self.filled(folder)
        monkeypatch.setattr(disk_cache, "_chosen", overtaken)
        cache.put("new", 0, DATA)
        assert cache.evictions == 1
        assert held(cache, [*self.KEYS, "new"]) == [*"cdefghij", "new"]


class Failing:
    """Lets a function of `os` fail for as long as `number` is set, when `applies` says so of its arguments."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        function: str,
        number: int,
        applies: Callable[..., bool] = lambda *_, **__: True,
    ) -> None:
        self.number = number
        self.failures = 0
        original = getattr(os, function)

        def failing(*arguments: Any, **options: Any) -> Any:
            if self.number and applies(*arguments, **options):
                self.failures += 1
                raise OSError(self.number, os.strerror(self.number))
            return original(*arguments, **options)

        monkeypatch.setattr(os, function, failing)


def creates(_: object, flags: int, *__: object, **___: object) -> bool:
    return bool(flags & os.O_CREAT)


def is_piece(_: object, data: bytes) -> bool:
    return data[:4] == b"BsnP"


class TestFailures:
    @pytest.mark.parametrize("function", ["write", "open", "mkdir", "rename", "ftruncate", "fchmod", "scandir"])
    @pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EIO, errno.EDQUOT, errno.EMFILE])
    def test_any_failing_call_fails_no_caller_and_pauses_writing(
        self,
        cache: DiskCache,
        folder: Path,
        monkeypatch: pytest.MonkeyPatch,
        quick_pause: None,
        function: str,
        number: int,
    ) -> None:
        failing = Failing(monkeypatch, function, number)
        cache.put(KEY, 0, DATA)
        assert failing.failures >= 1
        failures = failing.failures
        cache.put(KEY, 1, DATA)
        assert failing.failures == failures  # It pauses: nothing was tried.
        assert [cache.get(KEY, start, 100) for start in (0, 1)] == [None, None]
        failing.number = 0
        time.sleep(0.06)
        cache.put(KEY, 0, DATA)
        assert cache.get(KEY, 0, 100) == DATA
        assert len(pieces(folder)) == 1  # no temporary file is left

    def test_a_full_disk_leaves_no_half_written_file(
        self, cache: DiskCache, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        cache.put("a", 0, DATA)
        write = os.write
        Failing(monkeypatch, "write", errno.ENOSPC, lambda _, data: len(data) == 10)
        cut = os.write
        monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:-10]) if len(data) > 20 else cut(fd, data))
        cache.put("b", 0, DATA)
        assert held(cache, ["a", "b"]) == ["a"]
        assert len(pieces(folder)) == 1

    def test_short_writes_are_gone_on_with(self, cache: DiskCache, monkeypatch: pytest.MonkeyPatch) -> None:
        write = os.write
        monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:7]))
        cache.put(KEY, 0, DATA)
        assert cache.get(KEY, 0, 100) == DATA

    def test_what_is_there_is_served_while_writing_pauses(
        self, cache: DiskCache, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        cache.put("a", 0, DATA)
        Failing(monkeypatch, "open", errno.EACCES, creates)
        cache.put("b", 0, DATA)
        assert held(cache, ["a", "b"]) == ["a"]
        assert 50 < cache._paused_until - time.monotonic() <= 60

    def test_a_read_only_folder_serves_old_pieces_and_keeps_damaged_ones_out(
        self, cache: DiskCache, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        put_aged(cache, folder, "a", 1000)
        put_aged(cache, folder, "b", 1000)
        damaged = pieces(folder)[0]
        damaged.write_bytes(b"damaged")
        for function in ("utime", "unlink", "rmdir", "write"):
            Failing(monkeypatch, function, errno.EROFS)
        assert len(held(cache, ["a", "b"])) == 1
        assert damaged.exists()

    @pytest.mark.parametrize("function", ["fstat", "read", "open"])
    def test_a_failing_read_is_a_miss(self, cache: DiskCache, monkeypatch: pytest.MonkeyPatch, function: str) -> None:
        cache.put(KEY, 0, DATA)
        failing = Failing(monkeypatch, function, errno.EIO)
        assert cache.get(KEY, 0, 100) is None
        failing.number = 0
        assert cache.get(KEY, 0, 100) == DATA  # It was not removed: nobody saw that it is damaged.

    def test_an_eviction_that_is_refused_adds_nothing(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        cache = DiskCache(folder, 2 * BLOCK_SIZE)
        cache.put("a", 0, DATA)
        cache.put("b", 0, DATA)
        failing = Failing(monkeypatch, "unlink", errno.EACCES, lambda path, **_: not str(path).endswith(".tmp"))
        cache.put("c", 0, DATA)
        assert failing.failures >= 1
        assert held(cache, ["a", "b", "c"]) == ["a", "b"]
        assert disk_use(folder) == 2 * BLOCK_SIZE

    def test_an_interrupt_passes_and_leaves_no_file(
        self, cache: DiskCache, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def interrupted(*_: object, **__: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(os, "rename", interrupted)
            with pytest.raises(KeyboardInterrupt):
                cache.put(KEY, 0, DATA)
        assert pieces(folder) == []
        cache.put(KEY, 0, DATA)
        assert cache.get(KEY, 0, 100) == DATA


WRITER = """
import random, sys
from pathlib import Path
from basin.storage.disk_cache import DiskCache

cache = DiskCache(Path(sys.argv[1]), int(sys.argv[2]))
number = int(sys.argv[3])
choose = random.Random(number)
print("ready", flush=True)
sys.stdin.readline()
for count in range(700):
    key = choose.randrange(400)
    data = key.to_bytes(2, "little") * (500 + key * 10)
    found = cache.get(f"k{key}", key, key + len(data))
    if found is None:
        cache.put(f"k{key}", key, data)
    elif found != data:
        sys.exit(f"wrong bytes for {key}")
if cache._paused_until:
    sys.exit("writing was paused")
print(cache.hits, cache.misses, cache.evictions)
"""


class TestSharing:
    def test_four_processes_at_once_keep_the_bound_and_read_right_bytes(self, folder: Path, spawn: Spawn) -> None:
        size_max, piece_size_max = 100 * BLOCK_SIZE, 3 * BLOCK_SIZE
        arguments = [sys.executable, "-c", WRITER, str(folder), str(size_max)]
        pipe = subprocess.PIPE
        writers = [
            spawn([*arguments, str(number)], cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
            for number in range(4)
        ]
        assert [line_of(writer) for writer in writers] == ["ready\n"] * 4
        for writer in writers:
            begin(writer)
        most = most_unfinished = samples = 0
        while all(writer.poll() is None for writer in writers):
            for writer in writers:
                stop(writer)  # so that the folder holds still while it is counted
            unfinished = disk_use(folder, "*.tmp")
            most = max(most, disk_use(folder) - unfinished)
            most_unfinished = max(most_unfinished, unfinished)
            samples += 1
            for writer in writers:
                os.kill(writer.pid, signal.SIGCONT)
            time.sleep(0.05)
        outcomes = [writer.communicate() for writer in writers]
        print(f"most {most} of {size_max}, and {most_unfinished} unfinished, in {samples} samples; {outcomes}")
        assert [writer.returncode for writer in writers] == [0] * 4, outcomes
        assert all(int(figure) > 0 for output, _ in outcomes for figure in output.split())
        assert samples > 3
        assert size_max // 2 < most <= size_max
        assert most_unfinished <= 4 * (piece_size_max + BLOCK_SIZE)  # a piece and a tally each
        assert not list(folder.rglob("*.tmp"))

    def test_one_process_reads_what_another_put(self, cache: DiskCache, folder: Path, spawn: Spawn) -> None:
        script = (
            "import sys; from pathlib import Path; from basin.storage.disk_cache import DiskCache\n"
            "cache = DiskCache(Path(sys.argv[1]), 1 << 20)\n"
            "print(cache.get('mine', 0, 4)); cache.put('theirs', 0, b'data')"
        )
        cache.put("mine", 0, b"piece")
        reader = spawn([sys.executable, "-c", script, str(folder)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert reader.communicate()[0] == "b'piec'\n"
        assert cache.get("theirs", 0, 4) == b"data"
        assert cache.size == 2 * BLOCK_SIZE

    @pytest.mark.parametrize("meanwhile", [1, 4, 5, 6, 60])
    def test_a_count_that_others_overtake_undoes_nothing_they_added(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, meanwhile: int
    ) -> None:
        cache, other = DiskCache(folder, 40 * BLOCK_SIZE), DiskCache(folder, 40 * BLOCK_SIZE)
        for start in range(40):
            cache.put(KEY, start, DATA)
        survey = DiskCache._survey

        def overtaken(self: DiskCache) -> Any:
            monkeypatch.setattr(DiskCache, "_survey", survey)
            found = list(survey(self))
            for start in range(meanwhile):
                other.put("other", start, DATA)
            return found

        monkeypatch.setattr(DiskCache, "_survey", overtaken)
        cache.put(KEY, 40, DATA)
        assert disk_use(folder) <= cache.size
        for start in range(41, 60):
            cache.put(KEY, start, DATA)
            assert disk_use(folder) <= 40 * BLOCK_SIZE

    def test_what_becomes_a_piece_during_a_count_is_counted(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        cache = DiskCache(folder, PLENTY)
        cache.put(KEY, 0, DATA)
        piece = the_piece(folder)
        unfinished = piece.with_name("0" * 16 + ".tmp")
        unfinished.write_bytes(piece.read_bytes())
        piece.unlink()
        (folder / "tally").unlink()
        pattern = disk_cache._OWN_FILE_NAME

        class FinishedMeanwhile:
            """Between the listing of a shard and the look at its files."""

            @staticmethod
            def fullmatch(name: str) -> object:
                if unfinished.exists():
                    unfinished.rename(piece)
                return pattern.fullmatch(name)

        monkeypatch.setattr(disk_cache, "_OWN_FILE_NAME", FinishedMeanwhile)
        assert cache.size == BLOCK_SIZE
        assert piece.exists()

    def test_what_is_added_just_before_a_tally_is_replaced_counts(
        self, cache: DiskCache, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        rename = os.rename

        def overtaken(source: str, target: str, **options: Any) -> None:
            if target.endswith("tally"):
                with (folder / "tally").open("ab") as tally:
                    tally.write(bytes(3))
            rename(source, target, **options)

        monkeypatch.setattr(os, "rename", overtaken)
        cache.put(KEY, 0, DATA)
        assert cache.size == 4 * BLOCK_SIZE

    def test_what_is_added_to_a_tally_just_after_it_is_replaced_counts(
        self, cache: DiskCache, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write, tally = os.write, folder / "tally"

        def overtaken(descriptor: int, data: bytes) -> int:
            if data == b"\0" and tally.exists():
                monkeypatch.setattr(os, "write", write)
                tally.unlink()
                tally.write_bytes(b"\0")  # by somebody who counted before the second piece was there
            return write(descriptor, data)

        cache.put(KEY, 0, DATA)
        monkeypatch.setattr(os, "write", overtaken)
        cache.put(KEY, 1, DATA)
        assert os.write is write
        assert cache.size == disk_use(folder) == 2 * BLOCK_SIZE

    def test_what_was_added_to_a_tally_that_is_replaced_before_the_piece_is_there_counts(
        self, cache: DiskCache, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        rename, tally = os.rename, folder / "tally"

        def overtaken(source: str, target: str, **options: Any) -> None:
            monkeypatch.setattr(os, "rename", rename)
            tally.unlink()
            tally.write_bytes(b"\0")  # by somebody who counted before the second piece was there
            rename(source, target, **options)

        cache.put(KEY, 0, DATA)
        monkeypatch.setattr(os, "rename", overtaken)
        cache.put(KEY, 1, DATA)
        assert os.rename is rename
        assert cache.size == disk_use(folder) == 2 * BLOCK_SIZE

    def test_two_never_replace_the_tally_at_once(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Others fill the cache in the moment in which one who has counted replaces the tally."""
        cache, other = DiskCache(folder, 40 * BLOCK_SIZE), DiskCache(folder, 40 * BLOCK_SIZE)
        for start in range(40):
            cache.put(KEY, start, DATA)
        rename = os.rename

        def overtaken(source: str, target: str, **options: Any) -> None:
            if target.endswith("tally"):
                monkeypatch.setattr(os, "rename", rename)
                for start in range(20):
                    other.put("other", start, DATA)
            rename(source, target, **options)

        monkeypatch.setattr(os, "rename", overtaken)
        cache.put(KEY, 40, DATA)
        assert os.rename is rename
        assert disk_use(folder) <= cache.size
        for start in range(41, 60):
            cache.put(KEY, start, DATA)
            assert disk_use(folder) <= 40 * BLOCK_SIZE

    def test_one_who_dies_while_replacing_the_tally_costs_time_only(self, folder: Path) -> None:
        cache = DiskCache(folder, 10 * BLOCK_SIZE)
        cache.put(KEY, 0, DATA)
        left = folder / "00" / f"{(folder / 'tally').stat().st_ino:016x}.tmp"
        left.touch()
        for start in range(1, 20):
            cache.put(KEY, start, DATA)
            assert cache.get(KEY, start, start + 1) == DATA[:1]
            assert disk_use(folder) <= 10 * BLOCK_SIZE
        assert cache.size > 10 * BLOCK_SIZE
        lay_aside(left, 400)
        cache.put(KEY, 20, DATA)
        assert not left.exists()
        assert disk_use(folder) <= cache.size <= 10 * BLOCK_SIZE

    def test_a_tally_that_vanishes_all_the_time_holds_nobody_up(
        self, cache: DiskCache, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write = os.write

        def vanishing(descriptor: int, data: bytes) -> int:
            (folder / "tally").unlink(missing_ok=True)
            return write(descriptor, data)

        with monkeypatch.context() as patch:
            patch.setattr(os, "write", vanishing)
            cache.put(KEY, 0, DATA)
        assert pieces(folder) == []
        cache.put(KEY, 0, DATA)
        assert cache.get(KEY, 0, 100) == DATA

    def test_a_child_forked_during_an_eviction_uses_the_cache(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        cache = DiskCache(folder, 2 * BLOCK_SIZE)
        survey = DiskCache._survey
        statuses: list[int] = []

        def forking(self: DiskCache) -> Any:
            monkeypatch.setattr(DiskCache, "_survey", survey)
            statuses.append(forked(lambda: put_and_get(cache, "child")))
            return survey(self)

        for key in ("a", "b"):
            cache.put(key, 0, DATA)
        monkeypatch.setattr(DiskCache, "_survey", forking)
        put_and_get(cache, "parent")
        assert statuses == [0]
        assert held(DiskCache(folder, PLENTY), ["parent"]) == ["parent"]

    def test_threads_drop_their_pieces_while_one_makes_room(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        cache = DiskCache(folder, 2 * BLOCK_SIZE)
        survey = DiskCache._survey
        counts: list[int] = []

        def meanwhile(self: DiskCache) -> Any:
            counts.append(len(counts))
            other = threading.Thread(target=cache.put, args=("meanwhile", 0, DATA))
            other.start()
            other.join()
            return survey(self)

        monkeypatch.setattr(DiskCache, "_survey", meanwhile)
        put_and_get(cache, "a")
        assert counts == [0]
        assert held(cache, ["meanwhile"]) == []
        put_and_get(cache, "b")


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def stop(process: subprocess.Popen[str]) -> None:
    """Return when it stands still, or has ended."""
    os.kill(process.pid, signal.SIGSTOP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)


def begin(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def put_and_get(cache: DiskCache, key: str) -> None:
    cache.put(key, 0, DATA)
    assert cache.get(key, 0, len(DATA)) == DATA


def forked(action: Callable[[], None]) -> int:
    """Run `action` in a forked child; return its exit status."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            action()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_hit_of_a_page_is_quick(cache: DiskCache, rng: random.Random) -> None:
    page = rng.randbytes(4096)
    for number in range(200):
        cache.put(f"index/{number}", 4096, page)
    durations = []
    for number in [rng.randrange(200) for _ in range(2000)]:
        begun = time.perf_counter()
        found = cache.get(f"index/{number}", 4096, 8192)
        durations.append(time.perf_counter() - begun)
        assert found == page
    median = statistics.median(durations)
    print(f"a hit of 4 KiB: {median * 1e6:.1f} microseconds in the median (wanted: below 100)")
    assert median < 0.002
