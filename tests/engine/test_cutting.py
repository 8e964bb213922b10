"""Cutting: where parts end depends on the content and the basin alone; zeros are parts of the largest size."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from basin.engine.cutting import (
    FASTCDC,
    FIXED,
    ContentCutter,
    Cutter,
    FixedCutter,
    cuts_by_content,
    make_cutter,
    seeds_of,
)
from basin.engine.keyring import Keyring
from basin.engine.sources import BytesSource, IterableSource, Reading, Zeros
from basin.errors import InvalidArgument, UnsupportedVersion
from basin.format.crypto import GrainKeyMap
from basin.format.layout import MIB

SIZE = 1024
CUT_LENGTHS = [921, 987, 371, 1417, 1087, 661, 1317, 1145, 937, 1378, 881, 939]
CUT_DIGEST = "93f1acc368597c07"
CUTTERS: dict[str, Callable[[], Cutter]] = {
    "fixed": lambda: FixedCutter(SIZE),
    "fastcdc": lambda: ContentCutter(SIZE, 4 * SIZE, iter([12345])),
    "fastcdc, narrow": lambda: ContentCutter(SIZE, 2 * SIZE, iter([54321])),
}


@pytest.fixture(scope="module", autouse=True)
def _small_windows() -> Iterator[None]:
    """Windows of two of the largest parts: so contents of some KiB are many of them."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("basin.engine.sources._WINDOW_MIN", 0)
        yield


@pytest.fixture(params=CUTTERS)
def cutter(request: pytest.FixtureRequest) -> Cutter:
    return CUTTERS[request.param]()


def keyring_of(id_key: bytes | None, basin_id: bytes = bytes(16)) -> Keyring:
    keyring = Keyring.open_profile(basin_id=basin_id, descriptor_hash=bytes(32))
    keyring.grain_keys = GrainKeyMap(id_key)
    return keyring


def all_at_once(content: bytes, cutter: Cutter) -> list[bytes]:
    """The parts, where the whole content is one window."""
    parts, at = [], 0
    for length in cutter.cut(memoryview(content), is_last=True):
        parts.append(content[at : at + length])
        at += length
    assert at == len(content)
    return parts


def read_parts(source: Any, cutter: Cutter, head_size: int = 0) -> list[bytes]:
    reading = Reading(source, head_size)
    assert reading.whole() is None
    return [bytes(part.size) if isinstance(part, Zeros) else part for part in reading.parts(cutter)]


class SparseSource:
    """Stretches of bytes, and numbers: holes of so many bytes. Gives at most `most` bytes at a time."""

    def __init__(self, stretches: list[bytes | int], most: int = MIB) -> None:
        self.stretches: list[bytes | int] = list(stretches)
        self.most = most
        self.read_sizes: list[int] = []

    def skip_hole(self) -> int:
        while self.stretches and self.stretches[0] == b"":
            self.stretches.pop(0)
        if self.stretches and isinstance(self.stretches[0], int):
            size = self.stretches.pop(0)
            assert isinstance(size, int)
            return size
        return 0

    def read(self, size: int, /) -> bytes:
        if not self.stretches or isinstance(self.stretches[0], int):
            return b""
        first = self.stretches[0]
        piece = first[: min(size, self.most)]
        self.stretches[0] = first[len(piece) :]
        self.read_sizes.append(len(piece))
        return piece


def lengths(cutter: Cutter, content: bytes) -> list[int]:
    return [len(part) for part in all_at_once(content, cutter)]


class TestCutters:
    def test_parts_are_as_large_as_was_asked_for(self) -> None:
        content = random.Random(1).randbytes(8 * MIB)
        cut = lengths(ContentCutter(8192, MIB, iter([7])), content)
        assert 0.8 < sum(cut) / len(cut) / 8192 < 1.2
        assert min(cut[:-1]) >= 2048
        assert max(cut) <= 32768
        assert lengths(ContentCutter(8192, 10_000, iter([7])), content) != cut
        assert max(lengths(ContentCutter(8192, 10_000, iter([7])), content)) <= 10_000

    def test_cut_points_stay_where_they_were(self) -> None:
        """Else a new version of the library would share nothing with what is stored."""
        content = blake3(b"cut points").digest(60_000)
        assert lengths(CUTTERS["fastcdc"](), content)[:12] == CUT_LENGTHS
        assert blake3(repr(lengths(CUTTERS["fastcdc"](), content)).encode()).hexdigest()[:16] == CUT_DIGEST

    @pytest.mark.parametrize("size", [0, 1, SIZE - 1, SIZE, SIZE + 1, 10 * SIZE])
    def test_fixed_parts(self, size: int) -> None:
        assert lengths(FixedCutter(SIZE), bytes(size)) == [SIZE] * (size // SIZE) + [size % SIZE] * (size % SIZE > 0)

    def test_zeros_are_parts_of_the_largest_size(self, cutter: Cutter) -> None:
        cut = lengths(cutter, bytes(20 * SIZE + 3))
        assert set(cut[:-1]) == {cutter.size_max}

    def test_a_seed_that_cuts_zeros_is_passed_over(self) -> None:
        unlucky = next(seed for seed in range(1, 1 << 20) if _cuts_zeros(seed))
        assert lengths(_tiny(iter([unlucky, 7])), bytes(5000)) == lengths(_tiny(iter([7])), bytes(5000))
        with pytest.raises(InvalidArgument):
            _tiny(iter([unlucky]))

    @given(st.integers(0, 1 << 32), st.integers(0, 30_000), st.integers(1, 5000))
    def test_what_is_certain_is_cut_and_no_more(self, seed: int, size: int, begin: int) -> None:
        content = random.Random(seed).randbytes(size)
        for make in CUTTERS.values():
            cutter = make()
            whole = lengths(cutter, content)
            certain = list(cutter.cut(memoryview(content), is_last=False))
            assert certain == whole[: len(certain)]
            assert size - sum(certain) < cutter.size_max


def _tiny(seeds: Iterator[int]) -> ContentCutter:
    return ContentCutter(320, 1024, seeds)


def _cuts_zeros(seed: int) -> bool:
    try:
        _tiny(iter([seed]))
    except InvalidArgument:
        return True
    return False


class TestReading:
    @given(st.integers(0, 1 << 32), st.lists(st.integers(0, 4000), max_size=20), st.integers(0, 2000))
    def test_any_delivery_gives_the_same_parts(self, seed: int, sizes: list[int], head_size: int) -> None:
        rng = random.Random(seed)
        pieces = [rng.choice([rng.randbytes(size), bytes(size), bytes([seed % 256]) * size]) for size in sizes]
        content = b"".join(pieces) + rng.randbytes(2001)
        pieces.append(content[-2001:])
        for make in CUTTERS.values():
            cutter = make()
            wanted = all_at_once(content, cutter)
            assert read_parts(BytesSource(content), cutter, head_size) == wanted
            assert read_parts(IterableSource(pieces), cutter, head_size) == wanted

    @given(st.integers(0, 1 << 32), st.integers(1, 4000))
    def test_many_windows_give_the_same_parts(self, seed: int, step: int) -> None:
        content = random.Random(seed).randbytes(step * 7) * 12 + b"end"
        for make in CUTTERS.values():
            cutter = make()
            stretches: list[bytes | int] = [content[at : at + step] for at in range(0, len(content), step)]
            assert read_parts(SparseSource(stretches), cutter) == all_at_once(content, cutter)

    def test_a_content_larger_than_the_window(self, cutter: Cutter) -> None:
        content = random.Random(3).randbytes(5 * MIB + 77)
        assert read_parts(SparseSource([content], most=100_000), cutter) == all_at_once(content, cutter)

    @given(
        st.integers(0, 1 << 32),
        st.lists(
            st.one_of(st.integers(1, 30_000), st.integers(-3000, -1), st.sampled_from([SIZE, 2 * SIZE, 4 * SIZE])),
            min_size=1,
            max_size=12,
        ),
    )
    def test_holes_are_zeros(self, seed: int, sizes: list[int]) -> None:
        """Positive: a hole of so many bytes; negative: bytes."""
        rng = random.Random(seed)
        stretches: list[bytes | int] = [size if size > 0 else rng.randbytes(-size) for size in sizes]
        content = b"".join(bytes(one) if isinstance(one, int) else one for one in stretches)
        for make in CUTTERS.values():
            cutter = make()
            assert read_parts(SparseSource(stretches), cutter) == all_at_once(content, cutter)

    def test_a_hole_is_neither_read_nor_filled(self, cutter: Cutter) -> None:
        reading = Reading(SparseSource([b"x" * 100, 1 << 40, b"y" * 100]), 10)
        assert reading.whole() is None
        parts = reading.parts(cutter)
        first = next(parts)
        assert isinstance(first, bytes)
        assert first.startswith(b"x" * 100)
        assert all(next(parts) == Zeros(cutter.size_max) for _ in range(1000))

    @pytest.mark.parametrize("size", [0, 1, 99, 100])
    def test_a_small_source_is_given_whole(self, size: int) -> None:
        content = random.Random(size).randbytes(size)
        for source in (BytesSource(content), IterableSource([content[:7], b"", content[7:]])):
            assert Reading(source, 100).whole() == content
        half: list[bytes | int] = [content[: size // 2], size - size // 2] if size else [b""]
        assert Reading(SparseSource(half), 100).whole() == content[: size // 2] + bytes(size - size // 2)

    def test_one_byte_more_is_too_much(self, cutter: Cutter) -> None:
        cases: list[list[bytes | int]] = [[bytes(101)], [101], [50, b"y" * 51], [b"y" * 50, 51]]
        for stretches in cases:
            reading = Reading(SparseSource(stretches), 100)
            assert reading.whole() is None
            whole = b"".join(bytes(one) if isinstance(one, int) else one for one in stretches)
            assert b"".join(bytes(p.size) if isinstance(p, Zeros) else p for p in reading.parts(cutter)) == whole

    def test_a_source_that_does_not_wait_is_refused(self, cutter: Cutter) -> None:
        class Impatient:
            given = False

            def read(self, size: int) -> Any:
                self.given, before = True, self.given
                return None if before else b"x" * 10

        with pytest.raises(InvalidArgument, match="wait"):
            Reading(Impatient(), 100).whole()
        reading = Reading(Impatient(), 9)
        assert reading.whole() is None
        with pytest.raises(InvalidArgument, match="wait"):
            list(reading.parts(cutter))


class TestSharing:
    def test_bytes_inserted_near_the_front_leave_most_parts_shared(self) -> None:
        cutter = CUTTERS["fastcdc"]()
        content = random.Random(5).randbytes(400 * SIZE)
        before = set(all_at_once(content, cutter))
        after = all_at_once(content[:100] + b"some bytes more" + content[100:], cutter)
        assert sum(part in before for part in after) >= len(after) - 6
        fixed = FixedCutter(SIZE)
        assert not set(all_at_once(content[:100] + b"!" + content[100:], fixed)) & set(all_at_once(content, fixed))

    @given(st.integers(0, 1 << 32), st.integers(0, 200 * SIZE), st.integers(0, 5000), st.integers(0, 5000))
    def test_a_change_anywhere_is_a_few_parts(self, seed: int, at: int, removed: int, inserted: int) -> None:
        cutter = CUTTERS["fastcdc"]()
        rng = random.Random(seed)
        content = rng.randbytes(200 * SIZE)
        changed = content[:at] + rng.randbytes(inserted) + content[at + removed :]
        before = set(all_at_once(content, cutter))
        new = sum(len(part) for part in all_at_once(changed, cutter) if part not in before)
        assert new <= inserted + 40 * SIZE


class TestSeeds:
    def test_the_seed_is_of_the_id_key_and_the_basin(self) -> None:
        first = next(seeds_of(keyring_of(b"k" * 32)))
        assert next(seeds_of(keyring_of(b"k" * 32))) == first
        others = [
            next(seeds_of(keyring_of(b"l" * 32))),
            next(seeds_of(keyring_of(b"k" * 32, b"i" * 16))),
            next(seeds_of(keyring_of(None))),
            next(seeds_of(keyring_of(None, b"i" * 16))),
        ]
        assert len({first, *others}) == 5

    def test_seeds_fit_what_takes_them(self) -> None:
        seeds = list(seeds_of(keyring_of(None)))
        assert len(set(seeds)) == 64
        assert all(0 < seed < 1 << 63 for seed in seeds)
        assert max(seeds) > 1 << 61

    def test_another_seed_cuts_elsewhere(self) -> None:
        content = random.Random(9).randbytes(100 * SIZE)
        cutters = [make_cutter(FASTCDC, SIZE, 4 * SIZE, keyring_of(key)) for key in (None, b"k" * 32)]
        assert lengths(cutters[0], content) != lengths(cutters[1], content)


class TestMaking:
    def test_each_by_its_name(self) -> None:
        assert isinstance(make_cutter(FIXED, 100, 1000, keyring_of(None)), FixedCutter)
        assert isinstance(make_cutter(FASTCDC, MIB, 4 * MIB, keyring_of(None)), ContentCutter)
        with pytest.raises(UnsupportedVersion) as caught:
            make_cutter("rabin", MIB, 4 * MIB, keyring_of(None))
        assert caught.value.version == "rabin"

    @pytest.mark.parametrize(
        ("part_size", "part_max"), [(320, 1024), (MIB, 2 * MIB), (4 * MIB, 8 * MIB), (4 * MIB, 64 * MIB)]
    )
    def test_sizes_that_can_be_cut_by_content(self, part_size: int, part_max: int) -> None:
        assert cuts_by_content(part_size, part_max)
        assert make_cutter(FASTCDC, part_size, part_max, keyring_of(None)).size_max == min(4 * part_size, part_max)

    @pytest.mark.parametrize(
        ("part_size", "part_max"), [(319, 4096), (4 * MIB + 1, 64 * MIB), (MIB, 2 * MIB - 1), (400, 1023)]
    )
    def test_sizes_that_cannot(self, part_size: int, part_max: int) -> None:
        assert not cuts_by_content(part_size, part_max)
