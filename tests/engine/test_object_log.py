"""The log in a bucket: appending, losing, following; what each costs in requests; stubs, holes and strange records."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable

import pytest

from basin.engine.log import START, Cursor, Entry
from basin.engine.object_log import Folded, ObjectLog, record_name, split_token, token_of
from basin.engine.state import EMPTY_HASH
from basin.errors import (
    AuthenticationFailed,
    BasinError,
    ChecksumMismatch,
    CommitUnknown,
    CorruptionError,
    InvalidArgument,
    ObjectMissing,
    ReadOnly,
    StorageError,
    StorageUnavailable,
    TruncatedStratum,
)
from basin.format.hint import Stub, decode_stub, encode_stub
from basin.format.layout import RECORD_MAGIC
from basin.format.record import FrameCipher, Record, chain_hash, encode_record
from basin.storage.memory_objects import MemoryObjects
from basin.storage.objects import ByteRange
from basin.storage.requests import RequestPolicy
from basin.testing.watched_objects import Unheard, WatchedObjects

BASIN_ID = bytes(range(16))
LOG_KEYS = {0: bytes(range(32)), 1: bytes(range(32, 64))}
CIPHER = FrameCipher(BASIN_ID, LOG_KEYS)
POLICY = RequestPolicy(attempts=3, backoff_first_s=0.001, backoff_max_s=0.002)
SILENCE = StorageUnavailable("no reply in time", reason="timeout")
LARGE = 20_000

_generator = random.Random(1)


class Writer:
    """Reads and appends records, as one process does."""

    def __init__(self, store: MemoryObjects, *, session: int = 1, cipher: FrameCipher = CIPHER) -> None:
        self.watched = WatchedObjects(store)
        self.probes = 0
        self.session = session
        self.cipher = cipher
        self.log = ObjectLog(self.watched, cipher, POLICY, self._probed)
        self.log.prepare(writable=True)
        self.cursor, self.hash = START, EMPTY_HASH

    def _probed(self) -> None:
        self.probes += 1

    def catch_up(self) -> list[Entry]:
        entries = list(self.log.follow(self.cursor))
        if entries:
            self.cursor, self.hash = entries[-1].end, entries[-1].hash
        return entries

    def frame(self, *, size: int = 0) -> bytes:
        """A record that could be the next one, with some random bytes of its own."""
        position = self.cursor.position + 1
        damaged = [_generator.randbytes(size)] if size else []
        payload = encode_record(Record(self.session, position, self.hash, 0, damaged=damaged))
        return self.cipher.seal(RECORD_MAGIC, position, payload, generation=0, randomness=_generator.randbytes(32))

    def append(self, *, size: int = 0) -> Cursor | None:
        """One record; None if somebody else was first."""
        frame = self.frame(size=size)
        with self.log.exclusive():
            end = self.log.append(self.cursor, frame, self.hash)
        if end is not None:
            self.cursor, self.hash = end, chain_hash(frame)
        return end

    def requests(self) -> list[tuple[str, str]]:
        """What was asked since the last time."""
        calls = [(str(call.kind), call.name) for call in self.watched.calls]
        self.watched.forget()
        return calls


@pytest.fixture
def store() -> MemoryObjects:
    return MemoryObjects()


@pytest.fixture
def writer(store: MemoryObjects) -> Writer:
    return Writer(store)


def written(store: MemoryObjects, count: int, *, size: int = 0) -> Writer:
    writer = Writer(store)
    for _ in range(count):
        assert writer.append(size=size) is not None
    writer.requests()
    return writer


def body(store: MemoryObjects, position: int) -> bytes:
    return store.get(ByteRange(record_name(position)))


def positions(entries: list[Entry]) -> list[int]:
    return [entry.position for entry in entries]


def read(store: MemoryObjects, **options: int) -> list[int]:
    """The positions that a new reader finds."""
    return positions(list(Writer(store).log.follow(START, **options)))


class TestAppending:
    def test_it_is_one_conditional_put_and_nothing_else(self, store: MemoryObjects, writer: Writer) -> None:
        for expected in range(1, 4):
            assert writer.append() == writer.cursor == Cursor(0, 0, expected)
            assert writer.requests() == [("put_new", record_name(expected))]
        writer.log.settle()
        writer.log.close()
        assert writer.requests() == []

    def test_names_sort_as_positions_do(self) -> None:
        assert record_name(7) == "log/00000000000000000007"
        assert record_name((1 << 64) - 1) == "log/18446744073709551615"

    def test_the_store_is_probed_before_anything_is_written(self, store: MemoryObjects, writer: Writer) -> None:
        def refuse() -> None:
            raise StorageError("this store does not keep its word", reason="unconditional")

        log = ObjectLog(writer.watched, CIPHER, POLICY, refuse)
        with pytest.raises(StorageError, match="its word"):
            log.append(START, writer.frame(), EMPTY_HASH)
        assert writer.requests() == []
        writer.catch_up()
        assert writer.probes == 0
        writer.append()
        assert writer.probes == 1

    def test_who_is_behind_appends_nothing_and_learns_what_came_first(self, store: MemoryObjects) -> None:
        one, other = Writer(store), Writer(store, session=2)
        one.append()
        assert other.append() is None
        assert set(other.requests()) == {("put_new", record_name(1)), ("get", record_name(1))}
        (entry,) = other.catch_up()
        assert (entry.position, entry.hash, entry.record.session) == (1, one.hash, 1)
        assert other.requests() == [("get", record_name(2))]  # What it lost to, it has already.
        assert other.append() == Cursor(0, 0, 2)
        assert read(store) == [1, 2]

    def test_what_it_lost_to_is_not_believed_later(self, store: MemoryObjects) -> None:
        one, other = Writer(store), Writer(store, session=2)
        for _ in range(3):
            one.append()
        assert other.append() is None
        assert positions(list(other.log.follow(Cursor(0, 0, 2)))) == [3]
        assert other.append() is None
        assert positions(list(other.log.follow(START))) == [1, 2, 3]
        store.put(record_name(1), b"rot")
        with pytest.raises(CorruptionError):
            list(other.log.follow(START))

    def test_who_loses_again_and_again_gets_through_at_last(self, store: MemoryObjects) -> None:
        one, other = Writer(store), Writer(store, session=2)
        for _ in range(4):
            one.append()
            assert other.append() is None
            assert len(other.catch_up()) == 1
        assert other.append() is not None
        assert read(store) == [1, 2, 3, 4, 5]

    def test_many_writers_lose_nothing(self, store: MemoryObjects) -> None:
        def work(writer: Writer) -> None:
            done = 0
            while done < 5:
                if writer.append() is None:
                    writer.catch_up()
                else:
                    done += 1

        writers = [Writer(store, session=number) for number in range(1, 5)]
        threads = [threading.Thread(target=work, args=(writer,)) for writer in writers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        entries = Writer(store).catch_up()
        assert positions(entries) == list(range(1, 21))
        sessions = [entry.record.session for entry in entries]
        assert sorted(sessions) == sorted([1, 2, 3, 4] * 5)
        assert [entry.record.previous for entry in entries] == [EMPTY_HASH, *[entry.hash for entry in entries[:-1]]]

    @pytest.mark.parametrize("error", [SILENCE, StorageUnavailable("409", reason="contended")])
    def test_a_lost_reply_is_found_out(self, store: MemoryObjects, writer: Writer, error: StorageUnavailable) -> None:
        writer.watched.script("put_new", Unheard(error))
        assert writer.append() is not None
        assert writer.requests() == [("put_new", record_name(1)), ("get", record_name(1))]
        writer.watched.script("put_new", error)
        assert writer.append() is not None
        assert read(store) == [1, 2]

    def test_a_refusal_says_that_nothing_was_stored(self, store: MemoryObjects, writer: Writer) -> None:
        writer.watched.script("put_new", ReadOnly("403 Access Denied", reason="AccessDenied"))
        with pytest.raises(ReadOnly):
            writer.append()
        assert read(store) == []


class TestAnUnknownOutcome:
    def test_it_has_a_token_and_deletes_nothing(self, store: MemoryObjects) -> None:
        writer = written(store, 2)
        frame = writer.frame()
        writer.watched.down = SILENCE
        with pytest.raises(CommitUnknown) as caught:
            writer.log.append(writer.cursor, frame, writer.hash)
        token = caught.value.fields["token"]
        assert token == token_of(3, chain_hash(frame))
        assert split_token(token) == (3, chain_hash(frame))
        assert caught.value.fields["position"] == 3
        assert isinstance(caught.value.__cause__, StorageUnavailable)
        assert {kind for kind, _ in writer.requests()} == {"put_new", "get"}

    @pytest.mark.parametrize("arrived", [True, False])
    def test_the_log_tells_later(self, store: MemoryObjects, arrived: bool) -> None:
        writer = written(store, 2)
        frame = writer.frame()
        writer.watched.script("put_new", *[Unheard(SILENCE) if arrived else SILENCE] * POLICY.attempts)
        writer.watched.script("get", *[SILENCE] * POLICY.attempts)
        with pytest.raises(CommitUnknown) as caught:
            writer.log.append(writer.cursor, frame, writer.hash)
        position, digest = split_token(caught.value.fields["token"])
        assert (writer.log.hash_at(position) == digest) is arrived

    @pytest.mark.parametrize("token", [b"", bytes(39), bytes(41), bytearray(40), "x" * 40, None])
    def test_what_is_no_token_is_refused(self, token: bytes) -> None:
        with pytest.raises(InvalidArgument):
            split_token(token)


class TestFollowing:
    def test_an_empty_log_has_no_records(self, writer: Writer) -> None:
        assert writer.catch_up() == []
        assert writer.requests() == [("get", record_name(1))]

    def test_records_come_in_order_with_their_hashes(self, store: MemoryObjects) -> None:
        writer, reader = Writer(store), Writer(store)
        for expected in range(1, 6):
            writer.append()
            (entry,) = reader.catch_up()
            assert (entry.position, entry.hash, entry.end) == (expected, writer.hash, writer.cursor)
            assert entry.record.sequence == expected
            assert entry.size == len(body(store, expected))
            assert reader.log.name_of(entry.end) == record_name(expected)
        assert reader.catch_up() == []

    @pytest.mark.parametrize("count", [0, 1, 5, 200])
    def test_nothing_new_is_one_get(self, store: MemoryObjects, count: int) -> None:
        writer = written(store, count)
        assert writer.catch_up() == []
        assert writer.requests() == [("get", record_name(count + 1))]

    @pytest.mark.parametrize("before", [0, 7])
    @pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 8, 15, 16, 63, 64, 65, 200])
    def test_new_records_cost_little_more_than_a_get_each(self, store: MemoryObjects, before: int, count: int) -> None:
        writer = written(store, before)
        reader = Writer(store)
        reader.catch_up()
        reader.requests()
        for _ in range(count):
            writer.append()
        assert positions(reader.catch_up()) == list(range(before + 1, before + count + 1))
        gets = reader.requests()
        assert {kind for kind, _ in gets} == {"get"}
        assert len(gets) <= count + 3
        assert len(set(gets)) == len(gets)

    def test_a_long_log_is_few_rounds(self, store: MemoryObjects) -> None:
        written(store, 300)
        reader = Writer(store)
        assert len(reader.catch_up()) == 300
        assert reader.watched.rounds <= 30

    def test_what_is_known_to_be_there_is_not_searched_for(self, store: MemoryObjects) -> None:
        written(store, 40)
        reader = Writer(store)
        assert positions(list(reader.log.follow(START, at_least=40))) == list(range(1, 41))
        assert len(reader.requests()) == 41

    def test_what_is_of_no_interest_is_not_read(self, store: MemoryObjects) -> None:
        written(store, 5)
        reader = Writer(store)
        assert positions(list(reader.log.follow(START, names_from=3))) == [4, 5]
        assert {name for _, name in reader.requests()}.isdisjoint(map(record_name, (1, 2, 3)))
        assert reader.log.cursor_before(3) == Cursor(0, 0, 3)
        assert reader.log.oldest() == (START, EMPTY_HASH)

    def test_a_bucket_that_does_not_answer_is_not_the_end_of_the_log(self, store: MemoryObjects) -> None:
        written(store, 5)
        for silent in range(6):
            reader = Writer(store)
            reader.watched.script("get", *[None] * silent, SILENCE)
            with pytest.raises(StorageUnavailable):
                reader.catch_up()
            assert positions(reader.catch_up()) == [1, 2, 3, 4, 5]

    def test_an_open_basin_has_a_log_as_well(self, store: MemoryObjects) -> None:
        cipher = FrameCipher(BASIN_ID, None)
        writer = Writer(store, cipher=cipher)
        for _ in range(3):
            writer.append()
        assert positions(Writer(store, cipher=cipher).catch_up()) == [1, 2, 3]


class TestDamage:
    @pytest.mark.parametrize("hole", [3, 5])
    def test_a_hole_that_the_search_steps_over_is_damage(self, store: MemoryObjects, hole: int) -> None:
        written(store, 7)
        store.delete([record_name(hole)])
        with pytest.raises(CorruptionError, match="missing") as caught:
            read(store)
        assert caught.value.fields["object"] == record_name(hole)
        assert isinstance(caught.value.__cause__, ObjectMissing)

    @pytest.mark.parametrize("hole", range(1, 6))
    def test_every_hole_before_what_is_known_is_damage(self, store: MemoryObjects, hole: int) -> None:
        written(store, 5)
        store.delete([record_name(hole)])
        with pytest.raises(CorruptionError, match="missing") as caught:
            read(store, at_least=5)
        assert caught.value.fields["object"] == record_name(hole)

    def test_records_that_were_swapped_are_damage(self, store: MemoryObjects) -> None:
        written(store, 3)
        second, third = body(store, 2), body(store, 3)
        store.put(record_name(2), third)
        store.put(record_name(3), second)
        with pytest.raises(CorruptionError, match="stands where 2 belongs") as caught:
            read(store)
        assert caught.value.fields["object"] == record_name(2)

    @pytest.mark.parametrize("source", [1, 2, 3])
    def test_a_record_under_another_name_is_damage(self, store: MemoryObjects, source: int) -> None:
        written(store, 3)
        store.put(record_name(4), body(store, source))
        with pytest.raises(CorruptionError, match="belongs"):
            read(store)

    def test_a_record_of_another_basin_is_damage(self, store: MemoryObjects) -> None:
        elsewhere = MemoryObjects()
        Writer(elsewhere, cipher=FrameCipher(bytes(16), LOG_KEYS)).append()
        store.put(record_name(1), body(elsewhere, 1))
        with pytest.raises(AuthenticationFailed) as caught:
            read(store)
        assert caught.value.fields["object"] == record_name(1)

    @pytest.mark.parametrize(
        ("damage", "kind"),
        [
            (lambda frame: frame[:-1] + bytes((frame[-1] ^ 1,)), ChecksumMismatch),
            (lambda frame: frame[:-1], TruncatedStratum),
            (lambda frame: frame + b"\0", TruncatedStratum),
            (lambda frame: b"", TruncatedStratum),
            (lambda frame: bytes(len(frame)), CorruptionError),
        ],
    )
    def test_a_damaged_record_is_named(
        self, store: MemoryObjects, damage: Callable[[bytes], bytes], kind: type[BasinError]
    ) -> None:
        written(store, 3)
        store.put(record_name(2), damage(body(store, 2)))
        reader = Writer(store)
        with pytest.raises(kind) as caught:
            reader.catch_up()
        assert type(caught.value) is kind
        assert caught.value.fields["object"] == record_name(2)
        assert record_name(2) in str(caught.value)

    def test_a_checkpoint_is_no_record(self, store: MemoryObjects) -> None:
        store.put(record_name(1), CIPHER.seal(b"BCKP", 1, b"\x80", generation=0, randomness=bytes(32)))
        with pytest.raises(CorruptionError):
            read(store)


class TestStubs:
    def folded(self, store: MemoryObjects) -> tuple[Writer, list[Entry]]:
        """Five large records, the first three of which a checkpoint at position 4 holds."""
        writer = written(store, 5, size=LARGE)
        entries = Writer(store).catch_up()
        assert writer.log.remove_through(3, writer.cursor, checkpoint=4, generation=1) == 3
        return writer, entries

    def test_a_large_record_is_replaced_by_its_hash(self, store: MemoryObjects) -> None:
        before = written(store, 5, size=LARGE)
        before.log.remove_through(3, before.cursor, checkpoint=4, generation=1)
        assert sorted(before.requests()) == sorted(
            (kind, record_name(at)) for at in (1, 2, 3) for kind in ("get", "put")
        )
        for at in (1, 2, 3):
            assert len(body(store, at)) < 200
            assert decode_stub(CIPHER, body(store, at), at).checkpoint == 4
        assert len(body(store, 4)) > LARGE

    def test_following_says_that_it_was_folded(self, store: MemoryObjects) -> None:
        _, entries = self.folded(store)
        reader = Writer(store)
        with pytest.raises(Folded) as caught:
            reader.catch_up()
        assert caught.value.hash == entries[0].hash
        assert caught.value.fields["object"] == record_name(1)
        for behind in (1, 2):
            with pytest.raises(Folded):
                list(reader.log.follow(Cursor(0, 0, behind)))
        assert positions(list(reader.log.follow(Cursor(0, 0, 3)))) == [4, 5]
        assert positions(list(reader.log.follow(START, names_from=3))) == [4, 5]

    def test_its_hash_can_still_be_asked_for(self, store: MemoryObjects) -> None:
        _, entries = self.folded(store)
        log = Writer(store).log
        assert [log.hash_at(at) for at in range(1, 6)] == [entry.hash for entry in entries]
        assert log.hash_at(6) is None

    def test_whether_a_checkpoint_must_be_read_is_one_get(self, store: MemoryObjects) -> None:
        writer, _ = self.folded(store)
        writer.requests()
        assert [writer.log.keeps(Cursor(0, 0, at)) for at in range(6)] == [False, False, False, True, True, True]
        assert writer.requests() == [("get", record_name(at + 1)) for at in range(6)]

    def test_only_large_records_are_replaced_and_none_behind_the_cursor(self, store: MemoryObjects) -> None:
        writer = Writer(store)
        for size in (0, LARGE, 100, LARGE, LARGE):
            writer.append(size=size)
        assert writer.log.remove_through(0, writer.cursor, checkpoint=9, generation=0) == 0
        assert writer.log.remove_through(5, Cursor(0, 0, 4), checkpoint=9, generation=0) == 2
        assert [writer.log.keeps(Cursor(0, 0, at)) for at in range(5)] == [True, False, True, False, True]
        writer.requests()
        assert writer.log.remove_through(4, writer.cursor, checkpoint=9, generation=0) == 0
        assert writer.requests() == []

    def test_who_has_only_read_large_records_may_replace_them(self, store: MemoryObjects) -> None:
        written(store, 2, size=LARGE)
        reader = Writer(store)
        reader.catch_up()
        assert reader.log.remove_through(2, reader.cursor, checkpoint=2, generation=0) == 2

    def test_two_that_fold_do_no_harm(self, store: MemoryObjects) -> None:
        _, entries = self.folded(store)
        other = Writer(store)
        other.log._sizes = {1: LARGE, 2: LARGE, 7: LARGE}
        assert other.log.remove_through(7, Cursor(0, 0, 7), checkpoint=5, generation=0) == 2
        assert [other.log.hash_at(at) for at in (1, 2)] == [entry.hash for entry in entries[:2]]
        assert other.log.hash_at(7) is None

    def test_a_stub_of_another_position_is_damage(self, store: MemoryObjects) -> None:
        writer, _ = self.folded(store)
        store.put(record_name(1), body(store, 2))
        with pytest.raises(CorruptionError):
            read(store)
        with pytest.raises(CorruptionError):
            writer.log.hash_at(1)

    def test_a_stub_that_names_an_older_checkpoint_is_damage(self, store: MemoryObjects) -> None:
        frame = encode_stub(CIPHER, 3, Stub(2, bytes(32)), generation=0, randomness=bytes(32))
        written(store, 2)
        store.put(record_name(3), frame)
        with pytest.raises(CorruptionError):
            read(store)

    def test_who_lost_to_a_record_that_is_a_stub_by_now_is_told(self, store: MemoryObjects) -> None:
        self.folded(store)
        late = Writer(store, session=2)
        assert late.append() is None
        with pytest.raises(Folded):
            late.catch_up()
