"""Strata as files: what a writer appends, a reader returns, and the locator finds; nothing else is returned."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import zstandard
from blake3 import blake3

from basin.engine.index import GrainLocator
from basin.engine.keyring import Keyring
from basin.engine.reader import StratumReader, StratumReaders, open_again
from basin.engine.state import ACTIVE, CUT, FINISHED, State, Stratum
from basin.engine.writer import StratumWriter, stratum_name
from basin.errors import (
    AuthenticationFailed,
    ChecksumMismatch,
    CorruptionError,
    ObjectMissing,
    OutOfSpace,
    StorageError,
    TruncatedStratum,
)
from basin.format.layout import (
    CODEC_STORED,
    CODEC_ZSTD,
    FLAG_LINKS,
    GRAIN_HEADER_SIZE,
    STRATUM_FOOTER_SIZE,
    STRATUM_HEADER_SIZE,
    Kind,
    StratumKind,
)
from basin.format.payload import Payload, join_links
from basin.format.stratum import decode_footer
from basin.storage.protocol import Storage
from basin.terms import Location, StratumId
from basin.testing.disk import SimulatedDisk
from basin.testing.faults import Fault, FaultStorage, nth_call
from basin.testing.simulated import SimulatedStorage
from tests.engine.small_basin import PROFILES, open_disk

LINK = bytes(range(32))
CONTENTS = [b"content %d" % number * 20 for number in range(300)]


class Bench:
    """A disk with the keys of a basin, to write and read strata on."""

    def __init__(self, profile: str) -> None:
        self.disk = SimulatedDisk()
        db = open_disk(self.disk, profile, "x")
        self.keyring: Keyring = db._core.keyring
        db.close()
        self.storage: Storage = SimulatedStorage(self.disk)
        self.count = 0

    def writer(self, kind: StratumKind = StratumKind.DATA) -> StratumWriter:
        self.count += 1
        identity = StratumId(self.count.to_bytes(16, "big"))
        material = bytes((self.count,)) * 32
        return StratumWriter(self.storage, self.keyring, kind, session=1, identity=identity, key_material=material)

    def reader(self, writer: StratumWriter) -> StratumReader:
        return StratumReader(self.storage, self.keyring, writer.kind, writer.id)

    def key(self, content: bytes) -> bytes:
        return self.keyring.grain_keys.grain_key(blake3(content).digest())

    def put(self, writer: StratumWriter, content: bytes, kind: Kind = Kind.BLOB) -> Location:
        return writer.append(kind, self.key(content), CODEC_STORED, 0, content)

    def content(self, writer: StratumWriter) -> bytes:
        return self.disk.kill_image().contents()[writer.name]

    def change(self, writer: StratumWriter, content: bytes | None) -> None:
        """Other bytes in the writer's file, as a new process finds them."""
        image = self.disk.kill_image().with_content(writer.name, content)
        self.disk = SimulatedDisk.from_image(image, boot=self.disk.boot)
        self.storage = SimulatedStorage(self.disk)

    def locator(self, *strata: tuple[StratumWriter, int]) -> GrainLocator:
        """A locator told of these strata and their status."""
        state = State(
            strata={writer.id: Stratum(writer.describe(status), 0, 0) for writer, status in strata}, position=1
        )
        locator = GrainLocator(StratumReaders(self.storage, self.keyring, 10, 1 << 20))
        locator.update(state, set())
        return locator


@pytest.fixture(params=PROFILES)
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    made = Bench(request.param)
    yield made
    made.storage.close()


def finished(bench: Bench, contents: list[bytes] | None = None) -> tuple[StratumWriter, list[Location]]:
    writer = bench.writer()
    places = [bench.put(writer, content) for content in (CONTENTS[:20] if contents is None else contents)]
    writer.finish()
    return writer, places


# --- writing and reading ----------------------------------------------------------------------------------------------


def test_grains_come_back_from_where_they_were_put(bench: Bench) -> None:
    writer, places = finished(bench)
    reader = bench.reader(writer)
    for content, place in zip(CONTENTS, places, strict=False):
        assert reader.read_grain(place.offset, place.length, bench.key(content)) == (Kind.BLOB, Payload([], content))
        opened = reader.read_content(place.offset, place.length, bench.key(content))
        assert opened is not None
        assert opened.content == open_again(opened.sealed) == content


def test_both_ways_of_appending_write_the_same_bytes(bench: Bench) -> None:
    """The flat path for many small blobs, and the plain one."""
    one, other = bench.writer(), bench.writer()
    other.id, other._keys, other._aead = one.id, one._keys, one._aead
    for content in CONTENTS:
        bench.put(one, content)
    other.append_blobs([bench.key(content) for content in CONTENTS], [CODEC_STORED] * len(CONTENTS), CONTENTS)
    one.flush()
    other.flush()
    assert bench.content(one)[STRATUM_HEADER_SIZE:] == bench.content(other)[STRATUM_HEADER_SIZE:]
    assert one.locations == other.locations
    assert one.grain_count == other.grain_count == len(CONTENTS)


def test_links_kinds_and_compression_come_back(bench: Bench) -> None:
    writer = bench.writer(StratumKind.META)
    plain = b"again and " * 50
    packed = zstandard.compress(join_links([LINK], plain))
    place = writer.append(Kind.CLAST, bench.key(plain), CODEC_ZSTD, FLAG_LINKS, packed)
    writer.finish()
    reader = bench.reader(writer)
    assert reader.read_grain(place.offset, place.length, bench.key(plain)) == (Kind.CLAST, Payload([LINK], plain))
    assert reader.read_content(place.offset, place.length, bench.key(plain)) is None
    (entry,) = [row for index in [bench.locator((writer, FINISHED)).indexes[0]] for row in index.rows(0)]
    assert (entry.kind, entry.flags, entry.offset, entry.length) == (Kind.CLAST, FLAG_LINKS, place.offset, place.length)


def test_a_buffered_grain_is_read_back_and_a_flushed_one_from_the_file(bench: Bench) -> None:
    writer = bench.writer()
    place = bench.put(writer, CONTENTS[0])
    buffered = writer.read_back(place.offset, place.length)
    assert buffered is not None
    assert writer.flushed_offset == 0
    writer.flush()
    assert writer.read_back(place.offset, place.length) is None
    assert bench.content(writer)[place.offset : place.offset + place.length] == buffered


def test_a_finished_stratum_is_described_as_it_lies_on_the_disk(bench: Bench) -> None:
    writer, _ = finished(bench)
    stored = bench.content(writer)
    added = writer.describe(FINISHED)
    footer = decode_footer(stored[-STRATUM_FOOTER_SIZE:], len(stored))
    assert (added.length, added.grain_count, added.hash) == (len(stored), 20, blake3(stored).digest())
    assert footer.grain_count == 20
    assert footer.hash == blake3(stored[:-STRATUM_FOOTER_SIZE]).digest()
    assert bench.disk.kill_image().contents() == _durable(bench.disk)


def _durable(disk: SimulatedDisk) -> dict[str, bytes]:
    """The files as they are if nothing that is pending survives."""
    assert not [name for name in disk.pending_entries if name.startswith("data/")]
    assert not [name for name, inode in disk.names.items() if inode.dirty and name.startswith("data/")]
    return disk.kill_image().contents()


def test_an_empty_stratum_can_be_finished(bench: Bench) -> None:
    writer, _ = finished(bench, [])
    directory = bench.reader(writer).directory()
    assert (directory.count, directory.page_count) == (0, 0)
    assert bench.locator((writer, FINISHED)).find(LINK) is None


def test_after_a_failed_write_a_stratum_takes_nothing_more(bench: Bench) -> None:
    faulty = FaultStorage(bench.storage)
    bench.storage = faulty
    writer = bench.writer()
    bench.put(writer, CONTENTS[0])
    faulty.plan = nth_call(Fault.ENOSPC, faulty.calls + 1)
    with pytest.raises(OutOfSpace):
        writer.flush()
    assert writer.failed
    with pytest.raises(StorageError):
        writer.flush()
    assert faulty.fired == 1
    writer.abandon()


# --- what a reader refuses --------------------------------------------------------------------------------------------


def test_a_stratum_opens_in_its_place_only(bench: Bench) -> None:
    one, _ = finished(bench)
    other, _ = finished(bench)
    stored = bench.content(other)
    with pytest.raises(ObjectMissing):
        StratumReader(bench.storage, bench.keyring, StratumKind.META, one.id)
    bench.change(one, stored)
    with pytest.raises(CorruptionError, match="another stratum"):
        bench.reader(one)
    bench.change(one, stored[: STRATUM_HEADER_SIZE - 1])
    with pytest.raises(TruncatedStratum) as caught:
        bench.reader(one)
    assert caught.value.fields["object"] == one.name


def test_a_stratum_written_under_another_key_is_told_from_damage() -> None:
    one, other = Bench("encrypted"), Bench("encrypted")
    writer, _ = finished(one)
    stored = bytearray(one.content(writer))
    other.keyring.basin_id, kept = one.keyring.basin_id, other.keyring.basin_id
    stranger = SimulatedStorage(
        SimulatedDisk.from_image(one.disk.kill_image().with_content(writer.name, bytes(stored)))
    )
    with pytest.raises(AuthenticationFailed, match="not written under this basin's key"):
        StratumReader(stranger, other.keyring, writer.kind, writer.id)
    other.keyring.basin_id = kept


def test_a_changed_grain_is_refused_with_file_and_offset(bench: Bench) -> None:
    writer, places = finished(bench)
    stored, place = bench.content(writer), places[3]
    for at in range(place.offset, place.offset + place.length, 5):
        changed = bytearray(stored)
        changed[at] ^= 2
        bench.change(writer, bytes(changed))
        reader = bench.reader(writer)
        quick = reader.read_content(place.offset, place.length, bench.key(CONTENTS[3]))
        # In an open basin the caller compares the content key; in both, bytes that mean nothing may differ.
        assert quick is None or quick.content == CONTENTS[3] or bench.keyring.profile == "open"
        with pytest.raises(CorruptionError) as caught:
            reader.read_grain(place.offset, place.length, bench.key(CONTENTS[3]))
        assert (caught.value.fields["object"], caught.value.fields["offset"]) == (writer.name, place.offset)
        assert "basin check" in str(caught.value)
        for other, content in zip(places[4:], CONTENTS[4:20], strict=True):
            opened = reader.read_content(other.offset, other.length, bench.key(content))
            assert opened is not None
            assert opened.content == content


def test_another_grain_than_was_asked_for_is_refused(bench: Bench) -> None:
    writer, places = finished(bench)
    reader = bench.reader(writer)
    place = places[0]
    with pytest.raises(CorruptionError, match="another grain"):
        reader.read_grain(place.offset, place.length, bench.key(CONTENTS[1]))
    assert reader.read_content(place.offset, place.length, bench.key(CONTENTS[1])) is None
    with pytest.raises(TruncatedStratum):
        reader.read_grain(place.offset, place.length - 1, bench.key(CONTENTS[0]))


def test_a_grain_that_was_moved_does_not_authenticate() -> None:
    bench = Bench("encrypted")
    writer, places = finished(bench, [b"one " * 20, b"two " * 20])
    stored = bytearray(bench.content(writer))
    one, two = places
    moved = bytes(stored[one.offset : one.offset + one.length])
    stored[one.offset : one.offset + one.length] = stored[two.offset : two.offset + two.length]
    stored[two.offset : two.offset + two.length] = moved
    bench.change(writer, bytes(stored))
    with pytest.raises(AuthenticationFailed):
        bench.reader(writer).read_grain(two.offset, two.length, bench.key(b"one " * 20))


@pytest.mark.parametrize(("offset", "size"), [(0, 1 << 40), (1 << 63, 10), (1 << 70, 1), (-1, 10), (0, -1)])
def test_reads_outside_of_the_file_are_refused_before_they_are_tried(bench: Bench, offset: int, size: int) -> None:
    writer, _ = finished(bench)
    with pytest.raises(TruncatedStratum):
        bench.reader(writer).read_raw(offset, size)


@pytest.mark.parametrize("size", [0, STRATUM_HEADER_SIZE + STRATUM_FOOTER_SIZE - 1])
def test_a_file_without_room_for_a_footer_is_truncated(bench: Bench, size: int) -> None:
    writer, _ = finished(bench)
    reader = bench.reader(writer)
    bench.change(writer, bench.content(writer)[:size].ljust(STRATUM_HEADER_SIZE, b"\0")[: max(size, 0)])
    if size < STRATUM_HEADER_SIZE:
        with pytest.raises(TruncatedStratum):
            bench.reader(writer)
        return
    with pytest.raises(TruncatedStratum):
        bench.reader(writer).footer()
    reader.close()


def test_a_footer_that_points_to_another_grain_is_refused(bench: Bench) -> None:
    writer, places = finished(bench)
    with pytest.raises(ChecksumMismatch):
        bench.reader(writer).directory_at(places[0].offset, places[0].length)


# --- looking up -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [ACTIVE, CUT, FINISHED])
def test_every_grain_is_found_and_no_other(bench: Bench, status: int) -> None:
    """Through the index of a finished stratum, and by scanning one that has none."""
    writer = bench.writer()
    places = {bench.key(content): bench.put(writer, content) for content in CONTENTS}
    if status == FINISHED:
        writer.finish()
    else:
        writer.sync()
    locator = bench.locator((writer, status))
    assert not locator.broken
    keys = list(places)
    assert [locator.find(key) for key in keys] == list(places.values())
    assert locator.find_many([*keys, LINK]) == [*places.values(), None]
    assert [list(locator.find_all(key)) for key in keys[:5]] == [[places[key]] for key in keys[:5]]
    assert locator.find(LINK) is None


def test_keys_looked_for_together_are_found_where_each_of_them_is(bench: Bench) -> None:
    """Keys that share their first bytes, over several pages or within one; keys twice; absent ones all over."""
    digests = [blake3(b"%d" % number).digest() for number in range(1500)]
    same_page = [digest[:8] + blake3(digest).digest()[8:] for digest in digests[:200]]
    many_pages = [b"\x70\x00\x00\x07" + digest[4:] for digest in digests[:400]]
    there = [*digests, *same_page[:100], *many_pages[::2]]
    writer = bench.writer()
    for key in [*there, *digests[:40], *many_pages[:40:2]]:
        writer.append(Kind.BLOB, key, CODEC_STORED, 0, b"content")
    writer.finish()
    (index,) = bench.locator((writer, FINISHED)).indexes
    absent = [*same_page[100:], *many_pages[1::2], bytes(32), b"\xff" * 32]
    wanted = [*there, *absent]
    found = index.first_of_many(wanted[::3] + wanted[1::3] + wanted[2::3])
    assert found == [index.first(key) for key in wanted[::3] + wanted[1::3] + wanted[2::3]]
    assert None not in index.first_of_many(there)
    assert set(index.first_of_many(absent)) == {None}


def test_what_the_log_does_not_vouch_for_is_not_found(bench: Bench) -> None:
    """An active stratum counts up to the length that a record states."""
    writer = bench.writer()
    first = bench.put(writer, CONTENTS[0])
    writer.sync()
    described = writer.describe(ACTIVE)
    bench.put(writer, CONTENTS[1])
    writer.sync()
    locator = GrainLocator(StratumReaders(bench.storage, bench.keyring, 10, 1 << 20))
    locator.update(State(strata={writer.id: Stratum(described, 0, 0)}, position=1), set())
    assert locator.find(bench.key(CONTENTS[0])) == first
    assert locator.find(bench.key(CONTENTS[1])) is None
    locator.update(State(strata={writer.id: Stratum(writer.describe(ACTIVE), 0, 0)}, position=2), set())
    assert locator.find(bench.key(CONTENTS[1])) is not None


def test_a_removed_stratum_is_not_found_any_more(bench: Bench) -> None:
    writer, _ = finished(bench)
    locator = bench.locator((writer, FINISHED))
    assert locator.find(bench.key(CONTENTS[0])) is not None
    locator.update(State(position=2), set())
    assert locator.find(bench.key(CONTENTS[0])) is None


def test_a_damaged_index_falls_back_to_the_grains(bench: Bench) -> None:
    writer, places = finished(bench)
    stored = bytearray(bench.content(writer))
    stored[-STRATUM_FOOTER_SIZE - 1] ^= 1  # the last byte of the directory
    bench.change(writer, bytes(stored))
    locator = bench.locator((writer, FINISHED))
    assert [locator.find(bench.key(content)) for content in CONTENTS[:20]] == places


def test_a_stratum_that_is_gone_is_broken_and_the_others_are_not(bench: Bench) -> None:
    one, _ = finished(bench, CONTENTS[:20])
    other, places = finished(bench, CONTENTS[20:40])
    bench.change(one, None)
    locator = bench.locator((one, FINISHED), (other, FINISHED))
    assert set(locator.broken) == {one.id}
    assert [locator.find(bench.key(content)) for content in CONTENTS[20:40]] == places


def test_an_index_that_rests_finds_every_grain_and_no_other(bench: Bench) -> None:
    one, places = finished(bench)
    other, later = finished(bench, CONTENTS[20:40])
    locator = bench.locator((one, FINISHED))
    locator.rest()
    state = State(strata={writer.id: Stratum(writer.describe(FINISHED), 0, 0) for writer in (one, other)}, position=2)
    locator.update(state, set())
    assert all(index.directory._words is None for index in locator.indexes)
    keys = [bench.key(content) for content in CONTENTS[:60]]
    assert locator.find_many(keys) == [*places, *later, *[None] * 20]
    locator.rest()
    assert [locator.find(key) for key in keys] == [*places, *later, *[None] * 20]


def test_an_index_that_was_damaged_while_it_rested_is_refused_not_called_empty(bench: Bench) -> None:
    writer, _ = finished(bench)
    locator = bench.locator((writer, FINISHED))
    locator.rest()
    (index,) = locator.indexes
    stored = bytearray(bench.content(writer))
    stored[-STRATUM_FOOTER_SIZE - 1] ^= 1  # the last byte of the directory
    bench.change(writer, bytes(stored))
    index._reader = bench.reader(writer)
    index.rest()
    with pytest.raises(CorruptionError):
        locator.find(bench.key(CONTENTS[0]))


def test_a_damaged_page_is_refused_not_called_empty(bench: Bench) -> None:
    writer, places = finished(bench)
    stored = bytearray(bench.content(writer))
    page_at = places[-1].offset + places[-1].length + GRAIN_HEADER_SIZE
    stored[page_at + 40] ^= 1
    bench.change(writer, bytes(stored))
    locator = bench.locator((writer, FINISHED))
    for content in CONTENTS[:20]:
        with pytest.raises(AuthenticationFailed) as caught:
            locator.find(bench.key(content))
        assert caught.value.fields["object"] == stratum_name(writer.kind, writer.id)


def test_grains_of_a_stratum_that_is_gone_are_not_kept(bench: Bench) -> None:
    writer, places = finished(bench)
    readers = StratumReaders(bench.storage, bench.keyring, 10, 1 << 20)
    opened = readers.get(writer.kind, writer.id).read_content(
        places[0].offset, places[0].length, bench.key(CONTENTS[0])
    )
    assert opened is not None
    readers.keep_grain(b"content key", opened.sealed, writer.id)
    assert list(readers.grains) == [b"content key"]
    readers.forget(writer.id)
    assert not readers.grains
    readers.keep_grain(b"content key", opened.sealed, writer.id)  # By somebody who was reading meanwhile.
    assert not readers.grains
