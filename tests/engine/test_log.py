"""The log on a local disk: appending, following, cutting; a torn tail is told apart from rot."""

from __future__ import annotations

import pytest

from basin.engine.file_log import LOCK_NAME, SEGMENT_SIZE, FileLog, segment_name
from basin.engine.log import START, Cursor, Entry
from basin.engine.state import EMPTY_HASH
from basin.errors import CorruptionError, ReadOnly, StorageUnavailable, TruncatedStratum
from basin.format.layout import FRAME_FLAG_UNSYNCED, RECORD_MAGIC, SEGMENT_HEADER_SIZE
from basin.format.record import FrameCipher, Record, chain_hash, encode_record
from basin.format.segment import decode_watermark, encode_watermark
from basin.testing.disk import SimulatedDisk
from basin.testing.simulated import SimulatedStorage

BASIN_ID = bytes(range(16))
CIPHER = FrameCipher(BASIN_ID, {0: bytes(range(32))})
FIRST = segment_name(1)


class Writer:
    """Appends records to the log of a disk, as one process does."""

    def __init__(self, disk: SimulatedDisk, *, timeout_s: float = 0.0) -> None:
        self.log = FileLog(SimulatedStorage(disk), CIPHER, BASIN_ID, timeout_s)
        self.cursor, self.hash = START, EMPTY_HASH
        self.catch_up()

    def catch_up(self) -> list[Entry]:
        entries = list(self.log.follow(self.cursor))
        if entries:
            self.cursor, self.hash = entries[-1].end, entries[-1].hash
        return entries

    def append(self, *, sync: bool = True, size: int = 0) -> Cursor | None:
        """One record; None if somebody else was first."""
        position = self.cursor.position + 1
        record = Record(1, position, self.hash, 0, damaged=[bytes(size)] if size else [])
        flags = 0 if sync else FRAME_FLAG_UNSYNCED
        payload = encode_record(record)
        frame = CIPHER.seal(
            RECORD_MAGIC, position, payload, generation=0, randomness=position.to_bytes(32, "big"), flags=flags
        )
        with self.log.exclusive():
            end = self.log.append(self.cursor, frame, self.hash, sync=sync)
        if end is not None:
            self.cursor, self.hash = end, chain_hash(frame)
        return end


def read(disk: SimulatedDisk) -> list[int]:
    """The positions that a new reader finds."""
    log = FileLog(SimulatedStorage(disk), CIPHER, BASIN_ID, 0.0)
    return [entry.position for entry in log.follow(START)]


def later_boot(disk: SimulatedDisk, name: str = FIRST, content: bytes | None = None) -> SimulatedDisk:
    """The disk after a restart of the machine, with other bytes in one file."""
    image = disk.kill_image()
    if content is not None:
        image = image.with_content(name, content)
    return SimulatedDisk.from_image(image, boot=disk.boot + 1)


def written(count: int) -> SimulatedDisk:
    disk = SimulatedDisk()
    writer = Writer(disk)
    for _ in range(count):
        writer.append()
    return disk


def content(disk: SimulatedDisk, name: str = FIRST) -> bytes:
    return disk.kill_image().contents()[name]


def test_an_empty_log_has_no_records() -> None:
    disk = SimulatedDisk()
    assert read(disk) == []
    assert disk.kill_image().contents() == {}


def test_records_are_read_in_order_with_their_hashes() -> None:
    disk = SimulatedDisk()
    writer, reader = Writer(disk), Writer(disk)
    for expected in range(1, 6):
        assert writer.append() == writer.cursor
        (entry,) = reader.catch_up()
        assert (entry.position, entry.hash, entry.end) == (expected, writer.hash, writer.cursor)
        assert entry.record.sequence == expected
    assert reader.catch_up() == []


def test_who_is_behind_appends_nothing_and_learns_it() -> None:
    disk = SimulatedDisk()
    one, other = Writer(disk), Writer(disk)
    one.append()
    assert other.append() is None
    assert len(content(disk)) == one.cursor.offset
    assert [entry.position for entry in other.catch_up()] == [1]
    assert other.append() is not None
    assert read(disk) == [1, 2]


def test_appending_needs_the_lock_and_waits_no_longer_than_asked() -> None:
    disk = SimulatedDisk()
    one, other = Writer(disk), Writer(disk)
    with pytest.raises(ReadOnly):
        one.log.append(START, b"", EMPTY_HASH)
    with one.log.exclusive(), one.log.exclusive(), pytest.raises(StorageUnavailable):
        other.append()
    assert other.append() is not None


def test_the_watermark_says_where_the_log_ends() -> None:
    disk = written(3)
    mark = decode_watermark(content(disk, LOCK_NAME))
    assert mark is not None
    assert (mark.segment, mark.offset, mark.position) == (1, len(content(disk)), 3)
    assert mark.boot_id == disk.boot_id
    assert not mark.unsynced


def killed_before_the_watermark(*, cut: bool) -> SimulatedDisk:
    """Two records, and the watermark behind them; a third was written, and not acknowledged."""
    disk = written(2)
    mark = decode_watermark(_mark_of(disk))
    assert mark is not None
    Writer(disk).append()
    image = disk.kill_image().with_content(LOCK_NAME, encode_watermark(mark._replace(cut=cut)))
    return SimulatedDisk.from_image(image, boot=disk.boot)


def test_a_whole_record_behind_the_watermark_counts_from_the_next_writer_on() -> None:
    disk = killed_before_the_watermark(cut=False)
    assert read(disk) == [1, 2]
    writer = Writer(disk)
    assert writer.append() is None
    assert [entry.position for entry in writer.catch_up()] == [3]
    assert writer.append() is not None
    assert read(disk) == [1, 2, 3, 4]


def test_what_follows_a_failed_write_is_cut_by_a_new_segment() -> None:
    stale = killed_before_the_watermark(cut=True)
    end = len(content(written(2)))
    assert read(stale) == [1, 2]
    writer = Writer(stale)
    assert writer.append() == Cursor(2, len(content(stale, segment_name(2))), 3)
    assert writer.log.header(2).previous_end == end
    assert writer.log.header(2).first_position == 3
    assert read(stale) == [1, 2, 3]
    assert read(later_boot(stale)) == [1, 2, 3]


def test_where_an_empty_segment_cut_the_log_nobody_appends_again() -> None:
    """Mounted again in the same boot, the disk lost what was not synced: what was cut, and the moved watermark."""
    disk = killed_before_the_watermark(cut=True)
    Writer(disk).append()
    second = content(disk, segment_name(2))[:SEGMENT_HEADER_SIZE]
    mark, first = _mark_of(written(2)), content(written(2))
    image = disk.kill_image().with_content(FIRST, first).with_content(segment_name(2), second)
    mounted = SimulatedDisk.from_image(image.with_content(LOCK_NAME, mark), boot=disk.boot)
    for position in (3, 4):
        assert Writer(mounted).append() == Cursor(2, len(content(mounted, segment_name(2))), position)
    assert read(mounted) == read(later_boot(mounted)) == [1, 2, 3, 4]


def _mark_of(disk: SimulatedDisk) -> bytes:
    return content(disk, LOCK_NAME)


def test_after_a_boot_a_new_segment_is_opened() -> None:
    disk = later_boot(written(2))
    writer = Writer(disk)
    assert writer.cursor == Cursor(1, len(content(disk)), 2)
    cursor = writer.append()
    assert cursor is not None
    assert cursor.segment == 2
    assert read(disk) == [1, 2, 3]


def test_a_segment_ends_when_it_is_full() -> None:
    disk = SimulatedDisk()
    writer = Writer(disk)
    for _ in range(3):
        writer.append(size=SEGMENT_SIZE // 2 + 1000)
    segments = writer.log.segments()
    assert segments == [1, 2] or writer.cursor.offset < SEGMENT_SIZE  # Compressed, they may all fit.
    assert read(disk) == [1, 2, 3]


@pytest.mark.parametrize("kept", ["nothing", "half", "all but one byte"])
def test_a_torn_tail_after_a_power_cut_is_no_damage(kept: str) -> None:
    """The last record was not acknowledged: the watermark of the older boot ends before it."""
    disk = written(2)
    mark, end = _mark_of(disk), len(content(disk))
    Writer(disk).append()
    whole = content(disk)
    size = {"nothing": end + 1, "half": (end + len(whole)) // 2, "all but one byte": len(whole) - 1}[kept]
    torn = later_boot(SimulatedDisk.from_image(disk.kill_image().with_content(LOCK_NAME, mark)), FIRST, whole[:size])
    assert read(torn) == [1, 2]
    zeros = later_boot(torn, FIRST, whole[:size] + bytes(len(whole) - size))
    assert read(zeros) == [1, 2]
    writer = Writer(zeros)
    writer.append()
    assert content(zeros) == whole[:size] + bytes(len(whole) - size)  # Nothing is truncated or overwritten.
    assert read(zeros) == [1, 2, 3]


def test_an_acknowledged_record_that_is_gone_is_damage() -> None:
    disk = written(3)
    whole = content(disk)
    for boot in (disk.boot, disk.boot + 1):
        for size in (SEGMENT_HEADER_SIZE - 1, SEGMENT_HEADER_SIZE, len(whole) // 2, len(whole) - 1):
            cut = SimulatedDisk.from_image(disk.kill_image().with_content(FIRST, whole[:size]), boot=boot)
            with pytest.raises(TruncatedStratum):
                read(cut)


def test_a_last_segment_that_is_gone_after_a_boot_is_damage() -> None:
    disk = later_boot(written(2))
    Writer(disk).append()
    with pytest.raises(TruncatedStratum):
        read(SimulatedDisk.from_image(disk.kill_image().with_content(segment_name(2), None), boot=disk.boot + 1))


@pytest.mark.parametrize("boots", [0, 1])
def test_a_bad_record_before_a_good_one_is_rot_and_named(boots: int) -> None:
    disk = written(3)
    whole = bytearray(content(disk))
    whole[SEGMENT_HEADER_SIZE + 70] ^= 1
    rotten = SimulatedDisk.from_image(disk.kill_image().with_content(FIRST, bytes(whole)), boot=disk.boot + boots)
    with pytest.raises(CorruptionError) as caught:
        read(rotten)
    assert caught.value.fields["object"] == FIRST
    assert caught.value.fields["offset"] == SEGMENT_HEADER_SIZE
    with pytest.raises(CorruptionError):
        Writer(rotten)


def test_rot_without_any_watermark_is_still_rot() -> None:
    disk = written(3)
    whole = bytearray(content(disk))
    whole[SEGMENT_HEADER_SIZE + 70] ^= 1
    image = disk.kill_image().with_content(FIRST, bytes(whole)).with_content(LOCK_NAME, None)
    with pytest.raises(CorruptionError):
        read(SimulatedDisk.from_image(image, boot=disk.boot + 1))


def test_an_unsynced_tail_may_be_lost_by_a_power_cut() -> None:
    disk = written(2)
    end = len(content(disk))
    writer = Writer(disk)
    writer.append(sync=False)
    mark = decode_watermark(_mark_of(disk))
    assert mark is not None
    assert mark.unsynced
    assert read(disk) == [1, 2, 3]
    assert read(later_boot(disk, FIRST, content(disk)[: end + 10])) == [1, 2]


def test_a_missing_segment_is_damage() -> None:
    disk = later_boot(written(2))
    Writer(disk).append()
    for boot in (disk.boot, disk.boot + 1):
        lost = SimulatedDisk.from_image(disk.kill_image().with_content(FIRST, None), boot=boot)
        with pytest.raises(CorruptionError):
            read(lost)
    last = disk.kill_image().with_content(segment_name(2), None)
    with pytest.raises(CorruptionError):
        read(SimulatedDisk.from_image(last, boot=disk.boot))


def test_a_segment_of_another_basin_or_number_is_damage() -> None:
    disk = written(2)
    elsewhere = SimulatedDisk.from_image(disk.kill_image().with_content(segment_name(2), content(disk)), boot=2)
    with pytest.raises(CorruptionError, match="belongs elsewhere"):
        read(elsewhere)
    log = FileLog(SimulatedStorage(disk), CIPHER, bytes(16), 0.0)
    with pytest.raises(CorruptionError, match="belongs elsewhere"):
        list(log.follow(START))


def test_following_may_skip_what_is_of_no_interest() -> None:
    disk = written(5)
    log = FileLog(SimulatedStorage(disk), CIPHER, BASIN_ID, 0.0)
    assert [entry.position for entry in log.follow(START, names_from=3)] == [4, 5]
    assert log.cursor_before(3) == Cursor(1, SEGMENT_HEADER_SIZE, 0)


def test_old_segments_are_removed_as_a_whole() -> None:
    disk = written(2)
    for _ in range(2):
        disk = later_boot(disk)
        Writer(disk).append()
    writer = Writer(disk)
    assert writer.log.segments() == [1, 2, 3]
    behind = Cursor(3, 0, 0)
    assert writer.log.remove_through(1, behind, checkpoint=9, generation=0) == 0
    assert writer.log.remove_through(2, behind, checkpoint=9, generation=0) == 1
    assert writer.log.segments() == [2, 3]
    assert writer.log.remove_through(4, behind, checkpoint=9, generation=0) == 1
    assert [entry.position for entry in writer.log.follow(writer.log.cursor_before(3))] == [4]
    with pytest.raises(CorruptionError):
        writer.log.cursor_before(1)
