"""Reads of metadata: which requests they cost, and that what comes from a cache is what the bucket holds."""

from __future__ import annotations

import itertools
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from basin.errors import BasinError, ObjectMissing, StorageUnavailable
from basin.storage.disk_cache import DiskCache
from basin.storage.memory_objects import MemoryObjects
from basin.storage.pieces import PIECE_SIZE, WHOLE_SIZE_MAX, Pieces
from basin.storage.protocol import Extent
from basin.testing.watched_objects import WatchedObjects

KIB, MIB = 1 << 10, 1 << 20
PAGE_SIZE = 4 * KIB
SILENCE = StorageUnavailable("no reply in time", reason="timeout")


class Reader:
    """`Pieces` upon watched objects, and upon a cache on disk if there is a folder."""

    def __init__(self, store: MemoryObjects, folder: Path | None = None) -> None:
        self.objects = WatchedObjects(store)
        self.disk = None if folder is None else DiskCache(folder, 1 << 30)
        self.pieces = Pieces(self.objects, self.disk)

    @property
    def spans(self) -> list[tuple[int, int | None]]:
        """What was asked of the bucket so far."""
        return [(call.start, call.stop) for call in self.objects.calls]

    @property
    def fetched(self) -> int:
        return sum((stop or 0) - start for start, stop in self.spans)


@pytest.fixture
def store() -> MemoryObjects:
    return MemoryObjects()


def stored(store: MemoryObjects, size: int, name: str = "meta/a") -> bytes:
    data = random.Random(f"{name}/{size}").randbytes(size)
    store.put(name, data)
    return data


def large(store: MemoryObjects) -> tuple[bytes, Extent]:
    """An object of 30 MiB, the last 25 of which are an index, with a directory of 100 KiB."""
    return stored(store, 30 * MIB), Extent("meta/a", 30 * MIB, 25 * MIB, 100 * KIB)


@pytest.mark.parametrize("index_size", [1, 20 * KIB, 300 * KIB, WHOLE_SIZE_MAX - PIECE_SIZE])
def test_a_small_index_is_one_request(store: MemoryObjects, index_size: int) -> None:
    data = stored(store, size := index_size + 200 * KIB + 17)
    reader, extent = Reader(store), Extent("meta/a", size, index_size, min(index_size, 2 * KIB))
    begin = size - index_size
    for offset, count in ((size - 1, 1), (begin, 1), (begin, index_size), (size - index_size // 2, index_size // 2)):
        assert reader.pieces.read(extent, offset, count) == data[offset : offset + count]
    assert reader.spans == [(begin // PIECE_SIZE * PIECE_SIZE, size)]


def test_an_object_that_is_all_metadata_is_one_request(store: MemoryObjects) -> None:
    data = stored(store, 3 * MIB)
    reader, extent = Reader(store), Extent("meta/a", 3 * MIB, 3 * MIB)
    for offset in range(0, 3 * MIB, 10_000):
        assert reader.pieces.read(extent, offset, 10_000) == data[offset : offset + 10_000]
    assert reader.spans == [(0, 3 * MIB)]


def test_the_end_of_a_large_index_brings_its_directory_along(store: MemoryObjects) -> None:
    data, extent = large(store)
    reader = Reader(store)
    assert reader.pieces.read(extent, extent.size - 80, 80) == data[-80:]
    assert reader.pieces.read(extent, extent.size - 100 * KIB, 100 * KIB) == data[-100 * KIB :]
    assert reader.spans == [(29 * MIB + 896 * KIB, 30 * MIB)]


def test_the_whole_of_a_large_index_in_one_read(store: MemoryObjects) -> None:
    data, extent = large(store)
    reader = Reader(store)
    assert reader.pieces.read(extent, 5 * MIB, 25 * MIB) == data[5 * MIB :]
    assert reader.fetched == 25 * MIB


def test_single_pages_of_a_large_index_are_a_piece_each(store: MemoryObjects) -> None:
    data, extent = large(store)
    reader, generator = Reader(store), random.Random(1)
    starts = sorted(
        {generator.randrange(5 * MIB, 29 * MIB, PIECE_SIZE) for _ in range(50)}, key=lambda _: generator.random()
    )
    apart = [start for start in starts if start - PIECE_SIZE not in starts]
    for start in apart:
        assert reader.pieces.read(extent, start + 8 * KIB, PAGE_SIZE) == data[start + 8 * KIB : start + 12 * KIB]
    assert reader.spans == [(start, start + PIECE_SIZE) for start in apart]


def test_a_read_across_pieces_fetches_both(store: MemoryObjects) -> None:
    data, extent = large(store)
    reader = Reader(store)
    assert reader.pieces.read(extent, 6 * MIB - 10, 20) == data[6 * MIB - 10 : 6 * MIB + 10]
    assert reader.spans == [(6 * MIB - PIECE_SIZE, 6 * MIB + PIECE_SIZE)]


@pytest.mark.parametrize(("step", "twice"), [(PAGE_SIZE, 0), (16 * KIB, 0), (60_001, PIECE_SIZE)])
def test_who_reads_in_order_waits_rarely(store: MemoryObjects, step: int, twice: int) -> None:
    """Pieces ahead: 64 KiB, 128, 256 … up to 8 MiB, in requests of 2 MiB that run at once.

    Nothing comes twice, but for the piece in which a read begins whose end is not there yet.
    """
    data, extent = large(store)
    reader = Reader(store)
    begin, end = 5 * MIB, 25 * MIB
    for offset in range(begin, end, step):
        count = min(step, end - offset)
        assert reader.pieces.read(extent, offset, count) == data[offset : offset + count]
    spans = sorted(reader.spans)
    assert spans[0][0] == begin
    assert {(stop or 0) - start for (_, stop), (start, _) in itertools.pairwise(spans)} <= {0, twice}
    assert max((stop or 0) - start for start, stop in spans) <= 2 * MIB
    assert reader.fetched <= (end - begin) + 8 * MIB + twice * len(spans)
    assert reader.objects.rounds <= 10  # 0, 64, 128 … 8,192 KiB ahead make 16 MiB, then 8 MiB a round.


def test_the_first_pages_are_not_taken_for_a_scan(store: MemoryObjects) -> None:
    _, extent = large(store)
    reader = Reader(store)
    for offset in (9 * MIB, 7 * MIB, 13 * MIB, 6 * MIB):
        reader.pieces.read(extent, offset, PAGE_SIZE)
    assert reader.fetched == 4 * PIECE_SIZE


def test_what_is_in_hand_is_kept(store: MemoryObjects) -> None:
    data = stored(store, 1 * MIB + 5)
    reader, extent = Reader(store), Extent("meta/a", 1 * MIB + 5, 300 * KIB)
    start = reader.pieces.metadata_start(extent)
    assert start % PIECE_SIZE == 0
    assert extent.size - extent.index_size - PIECE_SIZE < start <= extent.size - extent.index_size
    reader.pieces.keep(extent, data[start:])
    assert reader.pieces.read(extent, extent.size - 300 * KIB, 300 * KIB) == data[-300 * KIB :]
    assert reader.spans == []


def test_an_object_that_ends_early_gives_fewer_bytes_and_is_not_kept(store: MemoryObjects) -> None:
    data = stored(store, 100 * KIB)
    reader, extent = Reader(store), Extent("meta/a", 200 * KIB, 200 * KIB)
    for _ in range(2):
        assert reader.pieces.read(extent, 90 * KIB, 20 * KIB) == data[90 * KIB :]
        assert reader.pieces.read(extent, 150 * KIB, 20 * KIB) == b""
    assert reader.pieces.read(extent, 0, 64 * KIB) == data[: 64 * KIB]
    whole = stored(store, 200 * KIB)
    assert reader.pieces.read(extent, 90 * KIB, 20 * KIB) == whole[90 * KIB : 110 * KIB]
    assert reader.pieces.read(extent, 150 * KIB, 20 * KIB) == whole[150 * KIB : 170 * KIB]


def test_a_read_beyond_the_end_is_short(store: MemoryObjects) -> None:
    data = stored(store, 100_000)
    reader, extent = Reader(store), Extent("meta/a", 100_000, 50_000)
    assert reader.pieces.read(extent, 99_990, 100) == data[-10:]


def test_errors_are_raised_and_not_remembered(store: MemoryObjects) -> None:
    data, extent = large(store)
    reader = Reader(store)
    with pytest.raises(ObjectMissing):
        reader.pieces.read(extent._replace(name="meta/absent"), 6 * MIB, 10)
    reader.objects.script("get", None, SILENCE)  # Of several requests that run at once, the second one.
    with pytest.raises(StorageUnavailable):
        reader.pieces.read(extent, 10 * MIB, 5 * MIB)
    assert reader.pieces.read(extent, 10 * MIB, 5 * MIB) == data[10 * MIB : 15 * MIB]


class TestPrefetch:
    def test_the_ends_of_many_objects_are_one_round(self, store: MemoryObjects) -> None:
        reader = Reader(store)
        extents = [Extent(f"meta/{number}", 200_000 + number, 90_000, 2_000) for number in range(60)]
        bodies = [stored(store, extent.size, extent.name) for extent in extents]
        reader.pieces.prefetch(extents)
        assert (reader.objects.rounds, len(reader.spans)) == (1, 60)
        for extent, data in zip(extents, bodies, strict=True):
            assert reader.pieces.read(extent, extent.size - 90_000, 90_000) == data[-90_000:]
        assert len(reader.spans) == 60
        reader.pieces.prefetch(extents)
        assert len(reader.spans) == 60

    def test_very_many_are_a_round_for_each_sixty_four(self, store: MemoryObjects) -> None:
        reader = Reader(store)
        extents = [Extent(f"meta/{number}", 1_000, 500, 200) for number in range(150)]
        for extent in extents:
            stored(store, extent.size, extent.name)
        reader.pieces.prefetch(extents)
        assert (reader.objects.rounds, len(reader.spans)) == (3, 150)

    def test_of_a_large_index_only_the_directory_comes(self, store: MemoryObjects) -> None:
        _, extent = large(store)
        reader = Reader(store)
        reader.pieces.prefetch([extent])
        assert reader.spans == [(29 * MIB + 896 * KIB, 30 * MIB)]

    def test_what_fails_is_met_again_by_who_reads(self, store: MemoryObjects) -> None:
        reader = Reader(store)
        extents = [Extent(name, 1_000, 500) for name in ("meta/a", "meta/absent", "meta/b")]
        bodies = {name: stored(store, 1_000, name) for name in ("meta/a", "meta/b")}
        reader.objects.script("get", SILENCE)
        reader.pieces.prefetch(extents)
        with pytest.raises(ObjectMissing):
            reader.pieces.read(extents[1], 600, 10)
        for extent in (extents[0], extents[2]):
            assert reader.pieces.read(extent, 600, 400) == bodies[extent.name][600:]

    def test_nothing_to_fetch_is_no_round(self, store: MemoryObjects) -> None:
        reader = Reader(store)
        reader.pieces.prefetch([])
        assert reader.objects.rounds == 0


class TestTheDisk:
    def test_a_second_reader_asks_nothing(self, store: MemoryObjects, tmp_path: Path) -> None:
        data, extent = large(store)
        small = stored(store, 300_000, "meta/b")
        cold = Reader(store, tmp_path)
        for offset in range(5 * MIB, 12 * MIB, 50_000):
            cold.pieces.read(extent, offset, 50_000)
        cold.pieces.read(extent, extent.size - 80, 80)
        cold.pieces.read(Extent("meta/b", 300_000, 100_000), 250_000, 10)
        warm = Reader(store, tmp_path)
        warm.objects.down = SILENCE
        for offset in range(5 * MIB, 12 * MIB, 50_000):
            assert warm.pieces.read(extent, offset, 50_000) == data[offset : offset + 50_000]
        assert warm.pieces.read(extent, extent.size - 100 * KIB, 100 * KIB) == data[-100 * KIB :]
        assert warm.pieces.read(Extent("meta/b", 300_000, 100_000), 200_000, 100_000) == small[200_000:]
        warm.pieces.prefetch([extent, Extent("meta/b", 300_000, 100_000)])
        assert warm.spans == []

    @pytest.mark.parametrize("at", [0, 10, 40, -1])
    def test_a_damaged_piece_is_fetched_again(self, store: MemoryObjects, tmp_path: Path, at: int) -> None:
        data, extent = large(store)
        Reader(store, tmp_path).pieces.read(extent, 6 * MIB, PAGE_SIZE)
        (piece,) = [path for path in tmp_path.glob("*/*") if path.is_file()]
        body = bytearray(piece.read_bytes())
        body[at] ^= 1
        piece.write_bytes(body)
        again = Reader(store, tmp_path)
        assert again.pieces.read(extent, 6 * MIB, PAGE_SIZE) == data[6 * MIB : 6 * MIB + PAGE_SIZE]
        assert again.spans == [(6 * MIB, 6 * MIB + PIECE_SIZE)]
        warm = Reader(store, tmp_path)
        assert warm.pieces.read(extent, 6 * MIB, PAGE_SIZE) == data[6 * MIB : 6 * MIB + PAGE_SIZE]
        assert warm.spans == []

    def test_a_torn_piece_is_fetched_again(self, store: MemoryObjects, tmp_path: Path) -> None:
        data = stored(store, 300_000)
        extent = Extent("meta/a", 300_000, 200_000)
        Reader(store, tmp_path).pieces.read(extent, 200_000, 10)
        for path in tmp_path.glob("*/*"):
            path.write_bytes(path.read_bytes()[:-100])
        again = Reader(store, tmp_path)
        assert again.pieces.read(extent, 100_000, 200_000) == data[100_000:]
        assert again.spans == [(PIECE_SIZE, 300_000)]

    def test_pieces_of_other_objects_are_not_taken(self, store: MemoryObjects, tmp_path: Path) -> None:
        stored(store, 100_000, "meta/a")
        other = stored(store, 100_000, "meta/b")
        Reader(store, tmp_path).pieces.read(Extent("meta/a", 100_000, 100_000), 0, 100_000)
        reader = Reader(store, tmp_path)
        assert reader.pieces.read(Extent("meta/b", 100_000, 100_000), 0, 100_000) == other


def test_memory_is_bounded(store: MemoryObjects) -> None:
    data, extent = large(store)
    reader = Reader(store)
    for offset in range(5 * MIB, 29 * MIB, MIB):
        assert reader.pieces.read(extent, offset, MIB) == data[offset : offset + MIB]
    held = sum(len(piece) for piece in reader.pieces._memory.values())
    assert held == reader.pieces._memory_size <= 16 * MIB
    asked = len(reader.spans)
    reader.pieces.read(extent, 28 * MIB, MIB)  # What came last is still there; what came first is not.
    assert len(reader.spans) == asked
    reader.pieces.read(extent, 5 * MIB, MIB)
    assert len(reader.spans) > asked


def test_threads_do_not_meet(store: MemoryObjects, tmp_path: Path) -> None:
    data, extent = large(store)
    reader = Reader(store, tmp_path)

    def read(number: int) -> bool:
        generator = random.Random(number)
        for _ in range(40):
            offset = generator.randrange(5 * MIB, 30 * MIB - 200_000)
            if reader.pieces.read(extent, offset, 200_000) != data[offset : offset + 200_000]:
                return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(8)))
    assert reader.pieces._memory_size == sum(len(piece) for piece in reader.pieces._memory.values())


def test_a_batch_of_which_one_fails_keeps_the_error(store: MemoryObjects) -> None:
    """The error of the store comes out as it is, with its fields."""
    _, extent = large(store)
    reader = Reader(store)
    reader.objects.script("get", StorageUnavailable("busy", reason="throttled"))
    with pytest.raises(BasinError) as caught:
        reader.pieces.read(extent, 10 * MIB, 5 * MIB)
    assert caught.value.fields == {"reason": "throttled"}
