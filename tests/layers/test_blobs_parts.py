"""Large blobs: cut by content and shared, sparse files, lists of lists, and the pipeline that stores them."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3

import basin
from basin.api import Database
from basin.engine import streaming
from basin.engine.contents import Contents
from basin.errors import ContentNotFound, CorruptionError, GrainNotReady, InvalidArgument, UnsupportedVersion
from basin.format.clast import Clast
from basin.format.document import decode_document, encode_document
from basin.layers.blobs import FileSource
from basin.terms import PartAddress
from tests.engine.cold_bucket import ColdBucket, bucket
from tests.source_tree import ROOT

__all__ = ["bucket"]

KIB = 1 << 10
MIB = 1 << 20
SECRET = basin.Secret.generate()
SMALL: dict[str, Any] = {"part_max": 4 * KIB, "part_size": KIB}
HOLES: dict[str, Any] = {"part_max": 256 * KIB, "part_size": 64 * KIB}
PROFILES: dict[str, dict[str, Any]] = {"open": {"profile": "open"}, "encrypted": {"secret": SECRET}}


def made(path: Path, profile: str = "encrypted", **options: Any) -> Database:
    return basin.open(path / "basin", "x", **PROFILES[profile], **options)


def opened(path: Path, mode: Any = "r", profile: str = "encrypted", **options: Any) -> Database:
    return basin.open(path / "basin", mode, secret=PROFILES[profile].get("secret"), **options)


@pytest.fixture(params=PROFILES)
def profile(request: pytest.FixtureRequest) -> str:
    kind: str = request.param
    return kind


@pytest.fixture
def db(profile: str, tmp_path: Path) -> Iterator[Database]:
    with made(tmp_path, profile, **SMALL, history_s=0.0, history_size=0) as database:
        yield database


def stored(db: Database) -> int:
    """Bytes of contents on the disk."""
    db.commit()
    return sum(path.stat().st_size for folder in ("data", "meta") for path in Path(db.url, folder).glob("*"))


def part_lengths(db: Database, key: basin.ContentKey) -> list[int]:
    return [length for _, length in db.blobs.parts(key)]


def bytes_of(seed: int, size: int) -> bytes:
    return random.Random(seed).randbytes(size)


def damage(db: Database) -> list[basin.Finding]:
    return [finding for finding in db.check() if finding.severity != "info"]


class TestChunker:
    def test_contents_are_cut_by_content_unless_it_is_said(self, tmp_path: Path, profile: str) -> None:
        content = bytes_of(1, 100 * KIB)
        shared: dict[str, int] = {}
        for chunker in ("", "fastcdc", "fixed"):
            folder = tmp_path / f"chunker {chunker}"
            options = {"chunker": chunker} if chunker else {}
            with made(folder, profile, **SMALL, **options) as db:
                before = db.blobs.put(content)
                after = db.blobs.put(b"some more" + content)
                shared[chunker] = len({*db.blobs.parts(before)} & {*db.blobs.parts(after)})
                assert db.core.options.chunker == (chunker or "fastcdc")
                assert db.blobs.get_many([before, after]) == [content, b"some more" + content]
            with opened(folder, "w", profile) as db:
                assert db.core.options.chunker == (chunker or "fastcdc")
                distinct = len(set(part_lengths(db, db.blobs.put(b"." + content))))
                assert (distinct == 2) == (chunker == "fixed")
        assert shared["fixed"] == 0
        assert min(shared[""], shared["fastcdc"]) > 80

    def test_small_parts_are_cut_at_fixed_sizes(self, tmp_path: Path) -> None:
        with made(tmp_path, part_size=100, part_max=1000) as db:
            assert db.core.options.chunker == "fixed"
            assert part_lengths(db, db.blobs.put(bytes_of(1, 1050))) == [100] * 10 + [50]

    def test_another_chunker_than_the_basins_is_refused(self, tmp_path: Path) -> None:
        made(tmp_path, **SMALL).close()
        opened(tmp_path, "w", chunker="fastcdc").close()
        with pytest.raises(InvalidArgument) as caught:
            opened(tmp_path, "w", chunker="fixed")
        assert caught.value.option == "chunker"

    @pytest.mark.parametrize(
        "wrong", [{"chunker": "rabin"}, {"chunker": 1}, {"chunker": "fastcdc", "part_size": 100}, {"chunker": "FIXED"}]
    )
    def test_what_cannot_be_is_refused(self, tmp_path: Path, wrong: dict[str, Any]) -> None:
        with pytest.raises(InvalidArgument) as caught:
            made(tmp_path, **wrong)
        assert caught.value.option == "chunker"

    def test_a_chunker_of_the_future_needs_a_newer_basin(self, tmp_path: Path) -> None:
        made(tmp_path, "open", **SMALL).close()
        path = tmp_path / "basin" / "basin.json"
        fields = decode_document("basin", path.read_bytes(), name="basin.json")
        path.write_bytes(encode_document("basin", {**fields, "chunker": "rabin"}))
        with pytest.raises(UnsupportedVersion) as caught:
            opened(tmp_path, profile="open")
        assert caught.value.version == "rabin"

    def test_cut_points_differ_from_basin_to_basin(self, tmp_path: Path, profile: str) -> None:
        content = bytes_of(2, 50 * KIB)
        cut = []
        for name in ("one", "two"):
            with made(tmp_path / name, profile, **SMALL) as db:
                cut.append(part_lengths(db, db.blobs.put(content)))
        assert cut[0] != cut[1]

    def test_cut_points_outlive_a_rotation_of_keys(self, tmp_path: Path) -> None:
        content = bytes_of(3, 50 * KIB)
        with made(tmp_path, **SMALL) as db:
            before = db.blobs.parts(db.blobs.put(content))
            db.secrets.rotate()
        with opened(tmp_path, "w") as db:
            after = db.blobs.parts(db.blobs.put(b"!" + content))
        assert len({*before} & {*after}) > len(before) - 5

    def test_however_it_is_delivered_the_parts_are_the_same(self, db: Database, tmp_path: Path) -> None:
        content = bytes_of(4, MIB + 5)
        (tmp_path / "file").write_bytes(content)
        pieces = [content[at : at + 777] for at in range(0, len(content), 777)]
        key = db.blobs.put(content)
        wanted = db.blobs.parts(key)
        sources: list[Any] = [tmp_path / "file", iter(pieces), memoryview(content)]
        for source in sources:
            db.blobs.delete(key)
            db.commit()
            for _ in range(2):
                db.compact(grace_s=0)
            assert key not in db.blobs
            assert db.blobs.put(source) == key
            assert db.blobs.parts(key) == wanted
        before = stored(db)
        prefixed = db.blobs.put(iter([b"0", *pieces]))
        assert stored(db) - before < 100 * KIB  # Its list of 1,000 parts, and a few of them.
        assert db.blobs[prefixed] == b"0" + content


def sparse_file(path: Path, size: int, data: dict[int, bytes]) -> Path:
    with path.open("wb") as file:
        for offset, content in data.items():
            file.seek(offset)
            file.write(content)
        file.truncate(size)
    return path


@pytest.fixture(scope="module")
def _knows_holes(tmp_path_factory: pytest.TempPathFactory) -> None:
    path = sparse_file(tmp_path_factory.mktemp("sparse") / "file", 8 * MIB, {})
    assert path.stat().st_blocks == 0, "these tests need a file system that knows holes"


@pytest.mark.usefixtures("_knows_holes")
class TestHoles:
    @pytest.mark.parametrize("chunker", ["fixed", "fastcdc"])
    @pytest.mark.parametrize(
        ("size", "data"),
        [
            (10 * MIB, {}),
            (10 * MIB + 3, {0: b"x" * 1000}),
            (10 * MIB, {10 * MIB - 1: b"x"}),
            (10 * MIB, {4 * MIB + 5: b"x" * 100_000, 7 * MIB: b"y" * 300_000}),
            (3 * MIB, {MIB: bytes(MIB)}),
            (MIB // 5, {}),
            (MIB, {number * 8192: b"z" * 4096 for number in range(100)}),
        ],
        ids=["all", "begin", "end", "middle", "written zeros", "small", "many small"],
    )
    def test_a_file_with_holes_is_what_reading_it_gives(
        self, tmp_path: Path, size: int, data: dict[int, bytes], chunker: str
    ) -> None:
        path = sparse_file(tmp_path / "file", size, data)
        content = path.read_bytes()
        with made(tmp_path, **HOLES, chunker=chunker) as db:
            key = db.blobs.put(path)
            assert key == basin.ContentKey(blake3(content).digest())
            assert db.blobs[key] == content
            parts = db.blobs.parts(key)
            db.blobs.delete(key)
        with opened(tmp_path) as db:
            assert b"".join(db.blobs.get_many([part for part, _ in parts])) == content
        with opened(tmp_path, "w", history_s=0.0, history_size=0) as db:
            for _ in range(2):
                db.compact(grace_s=0)
            assert key not in db.blobs
            assert db.blobs.put(content) == key
            assert db.blobs.parts(key) == parts  # A stream of zeros is cut as a hole is.

    def test_holes_are_one_part_that_is_hashed_and_stored_once(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        packed: list[int] = []
        real = Contents._pack_part

        def pack_part(self: Contents, part: bytes, *, hot: bool) -> streaming.Packed:
            packed.append(len(part))
            return real(self, part, hot=hot)

        monkeypatch.setattr(Contents, "_pack_part", pack_part)
        path = sparse_file(tmp_path / "file", 64 * MIB, {20 * MIB: bytes_of(1, 100_000)})
        with made(tmp_path, **HOLES) as db:
            key = db.blobs.put(path)
            parts = [part for part, _ in db.blobs.parts(key)]
            assert len(set(parts)) <= len(packed) < 12
            assert len(parts) > 200
            zeros = basin.ContentKey(blake3(bytes(256 * KIB)).digest())
            assert parts.count(zeros) >= len(parts) - 8
            assert stored(db) < 300_000

    def test_zeros_in_a_stream_are_stored_once_too(self, tmp_path: Path) -> None:
        with made(tmp_path, **HOLES) as db:
            key = db.blobs.put(iter([bytes(MIB)] * 20))
            assert len({part for part, _ in db.blobs.parts(key)}) == 1
            assert stored(db) < 20_000
            assert db.blobs[key] == bytes(20 * MIB)

    def test_holes_are_not_read(self, tmp_path: Path) -> None:
        path = sparse_file(tmp_path / "file", 1 << 40, {1 << 39: b"x" * 5000, (1 << 40) - 10: b"y" * 10})
        sizes: list[int] = []
        holes: list[int] = []
        with path.open("rb", buffering=0) as file:
            source = FileSource(file)
            assert source.is_sparse
            while True:
                hole = source.skip_hole()
                if hole:
                    holes.append(hole)
                piece = source.read(MIB)
                sizes.append(len(piece))
                if not piece:
                    break
        assert sum(sizes) <= 64 * KIB
        assert sum(sizes) + sum(holes) == 1 << 40
        assert len(holes) == 2

    def test_a_file_that_is_cut_short_meanwhile(self, tmp_path: Path) -> None:
        path = sparse_file(tmp_path / "file", 64 * MIB, {0: b"x" * 5000, 40 * MIB: b"y" * 5000})
        with path.open("rb", buffering=0) as file:
            source = FileSource(file)
            os.truncate(path, 6000)
            while source.skip_hole() or source.read(MIB):
                pass

    def test_a_file_is_read_from_where_it_stands(self, tmp_path: Path) -> None:
        path = sparse_file(tmp_path / "file", 9 * MIB, {8 * MIB: b"end"})
        with path.open("rb", buffering=0) as file, made(tmp_path, **HOLES) as db:
            file.seek(3 * MIB + 1)
            assert db.blobs[db.blobs.put(FileSource(file))] == path.read_bytes()[3 * MIB + 1 :]

    def test_a_pipe_has_no_holes(self, tmp_path: Path) -> None:
        receiving, sending = os.pipe()
        with os.fdopen(sending, "wb") as file:
            file.write(b"x" * 1000)
        with os.fdopen(receiving, "rb", buffering=0) as file, made(tmp_path, **SMALL) as db:
            assert db.blobs[db.blobs.put(FileSource(file))] == b"x" * 1000


@pytest.fixture
def _short_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("basin.engine.clasts.PARTS_LISTED_MAX", 7)


@pytest.mark.usefixtures("_short_lists")
class TestLists:
    """With lists of seven parts each."""

    CONTENT = bytes_of(11, 60 * KIB)

    @pytest.mark.parametrize("count", [7, 8, 14, 15])
    def test_above_as_many_parts_as_a_list_has_there_are_lists(self, tmp_path: Path, count: int) -> None:
        content = bytes_of(count, count * KIB)
        with made(tmp_path, **SMALL, chunker="fixed") as db:
            key = db.blobs.put(content)
            raw = db.core.contents._grain(bytes(key))[1]
            assert len(raw.links) == (7 if count == 7 else -(-count // 7))
            assert len(db.blobs.parts(key)) == count
            assert db.blobs[key] == content

    def test_all_that_is_asked_of_a_content_is_answered(self, db: Database, tmp_path: Path, profile: str) -> None:
        child = db.blobs.put(b"child")
        key = db.blobs.put(self.CONTENT, links=[child, child])
        assert db.blobs.put(self.CONTENT, links=[child, child]) == key
        before = stored(db)
        assert db.blobs.put(iter([self.CONTENT]), links=[child, child]) == key
        assert stored(db) == before
        with opened(tmp_path, profile=profile) as reader:
            blobs = reader.blobs
            parts = blobs.parts(key)
            assert len(parts) > 40
            assert b"".join(blobs.get_many([part for part, _ in parts])) == self.CONTENT == blobs[key]
            assert blobs.get_many([key, child, key]) == [self.CONTENT, b"child", self.CONTENT]
            assert blobs.size(key) == len(self.CONTENT)
            assert blobs.links(key) == list(dict.fromkeys([child, *(part for part, _ in parts)]))
            assert blobs.get_linked(key) == (self.CONTENT, [child, child])
            at = 0
            for number, (part, length) in enumerate(parts):
                assert blobs[f"{key}-{number}"] == blobs[part] == self.CONTENT[at : at + length]
                assert blobs[PartAddress(key, number)] == blobs[part]
                at += length
            with pytest.raises(ContentNotFound):
                blobs[f"{key}-{len(parts)}"]
            rng = random.Random(5)
            for _ in range(200):
                start = rng.randrange(len(self.CONTENT) + 10)
                stop = start + rng.choice([0, 1, 100, 5000])
                assert blobs.read(key, start, stop) == self.CONTENT[start:stop]
            with blobs.open(key) as file:
                file.seek(30_000)
                assert file.read(20_000) == self.CONTENT[30_000:50_000]
                file.seek(0)
                assert file.read() == self.CONTENT

    def test_a_ranged_read_reads_the_lists_it_needs(self, db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
        key = db.blobs.put(self.CONTENT)
        db.commit()
        lists: list[bytes] = []
        real = Contents._read_list

        def read_list(self: Contents, one: bytes) -> Clast:
            lists.append(one)
            return real(self, one)

        monkeypatch.setattr(Contents, "_read_list", read_list)
        assert db.blobs.size(key) == len(self.CONTENT)
        assert lists == []
        assert db.blobs.read(key, 30_000, 30_010) == self.CONTENT[30_000:30_010]
        assert len(lists) == 1
        db.blobs.get(f"{key}-20")
        assert len(lists) == 2
        monkeypatch.setattr("basin.layers.blobs._LOCAL_AHEAD_SIZE", 4 * KIB)
        with db.blobs.open(key) as file:
            lists.clear()
            assert file.read() == self.CONTENT
        assert len(lists) == len(set(lists)) == len(db.core.contents._grain(bytes(key))[1].links)

    def test_marking_follows_lists(self, tmp_path: Path, profile: str) -> None:
        with made(tmp_path, profile, **SMALL, stratum_size=32 * KIB, history_s=0.0, history_size=0) as db:
            key = db.blobs.put(self.CONTENT)
            gone = db.blobs.put(bytes_of(12, 60 * KIB))
            parts = [part for part, _ in db.blobs.parts(gone)]
            db.commit()
            db.blobs.delete(gone)
            db.commit()
            for _ in range(2):
                assert db.compact(grace_s=0).problems == []
            assert db.blobs[key] == self.CONTENT
            assert sum(part in db.blobs for part in parts) < 5
            assert damage(db) == []
            db.blobs.delete(key)
            db.commit()
            for _ in range(2):
                db.compact(grace_s=0)
            assert key not in db.blobs

    def test_a_copy_has_lists_of_its_own(self, db: Database, tmp_path: Path) -> None:
        child = db.blobs.put(b"child" * 100)
        key = db.blobs.put(self.CONTENT, links=[child], root=False)
        db[b"large"] = basin.Ref(key)
        db.export(tmp_path / "part.basin", prefix=b"l", profile="open")
        with basin.open(tmp_path / "part.basin", "r") as flat:
            assert flat.blobs.get_linked(key) == (self.CONTENT, [child])
            assert damage(flat) == []

    def test_check_names_a_part_that_is_gone(self, db: Database) -> None:
        key = db.blobs.put(self.CONTENT)
        db.commit()
        core = db.core
        part = db.blobs.parts(key)[30][0]
        real = core.locator.find
        grain_key = core.keyring.grain_keys.grain_key(bytes(part))
        core.locator.find = lambda key: None if key == grain_key else real(key)  # type: ignore[method-assign]  # of this one
        found = [finding for finding in db.check() if finding.kind == "missing"]
        assert [finding.content_keys for finding in found] == [(str(part),)]

    def test_a_list_without_its_links_is_no_list(self, db: Database) -> None:
        key = db.blobs.put(self.CONTENT)
        lists = db.core.contents._grain(bytes(key))[1].links
        content, links = db.blobs.get_linked(basin.ContentKey(lists[0]))
        with made(Path(db.url).parent / "other", "open", **SMALL) as other:
            other.blobs.put(content)
            with pytest.raises(CorruptionError):
                other.core.contents._read_list(lists[0])
            for link in links:
                other.blobs.put(db.blobs[link])
            other.blobs.put(content, links=links)
            assert other.core.contents._read_list(lists[0]).parts == [bytes(link) for link in links]

    def test_all_parts_are_thawed(self, bucket: ColdBucket) -> None:
        with bucket.create(**SMALL, stratum_size=16 * KIB) as database:
            key = database.blobs.put(self.CONTENT)
        database = bucket.open("r")
        assert database.blobs.size(key) == len(self.CONTENT)
        assert len(database.blobs.parts(key)) > 40
        assert bucket.touched() == []
        with pytest.raises(GrainNotReady):
            database.blobs[key]
        report = database.thaw([key])
        assert report.strata == len(bucket.names("data")) > 2
        assert database.blobs[key] == self.CONTENT
        database.thaw([f"{key}-30"])


class TestPipeline:
    @pytest.mark.parametrize("threads", [1, 2, 4])
    def test_parts_lie_in_their_order(self, tmp_path: Path, threads: int) -> None:
        content = bytes_of(7, MIB)
        with made(tmp_path, **SMALL, threads=threads) as db:
            key = db.blobs.put(content)
            find = db.core.locator.find
            places = [find(db.core.keyring.grain_keys.grain_key(bytes(part))) for part, _ in db.blobs.parts(key)]
            offsets = [place.offset for place in places if place is not None]
            assert offsets == sorted(offsets)
            assert len(offsets) > 900
            assert db.blobs[key] == content

    @pytest.mark.parametrize("threads", [1, 2])
    def test_the_source_is_read_by_who_puts(self, tmp_path: Path, threads: int) -> None:
        readers = set()

        def pieces() -> Iterator[bytes]:
            for number in range(100):
                readers.add(threading.get_ident())
                yield bytes_of(number, 10_000)

        with made(tmp_path, **SMALL, threads=threads) as db:
            db.blobs.put(pieces())
        assert readers == {threading.get_ident()}

    @pytest.mark.parametrize("threads", [1, 2])
    @pytest.mark.parametrize("where", ["source", "pack", "append"])
    def test_whatever_fails_nothing_runs_on(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int, where: str
    ) -> None:
        calls = iter(range(1000))

        def fail_late(real: Any) -> Any:
            def call(*arguments: Any, **named: Any) -> Any:
                if next(calls) == 150:
                    raise ZeroDivisionError
                return real(*arguments, **named)

            return call

        def pieces() -> Iterator[bytes]:
            for number in range(1000):
                if where == "source" and number == 150:
                    raise ZeroDivisionError
                yield bytes_of(number, 4000)

        with made(tmp_path, **SMALL, threads=threads) as db:
            with monkeypatch.context() as patched:
                if where != "source":
                    name = {"pack": "_pack_part", "append": "_put_packed"}[where]
                    patched.setattr(Contents, name, fail_late(getattr(Contents, name)))
                with pytest.raises(ZeroDivisionError):
                    db.blobs.put(pieces())
                assert not [one for one in threading.enumerate() if one.name.startswith(streaming.APPEND_NAME)]
            content = bytes_of(5, 100_000)
            assert db.blobs[db.blobs.put(content)] == content
            db.commit()
            assert damage(db) == []

    def test_streams_of_several_threads_at_once(self, tmp_path: Path) -> None:
        contents = [bytes_of(number % 3, 300_000) for number in range(6)]
        keys: dict[int, basin.ContentKey] = {}
        with made(tmp_path, **SMALL, threads=2) as db:

            def put(number: int) -> None:
                keys[number] = db.blobs.put(iter([contents[number]]))

            threads = [threading.Thread(target=put, args=(number,)) for number in range(6)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert [db.blobs[keys[number]] for number in range(6)] == contents
            assert damage(db) == []

    def test_bytes_on_their_way_are_bounded(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(streaming, "_FLYING_SIZE_MIN", 20_000)
        monkeypatch.setattr("basin.engine.sources._WINDOW_MIN", 0)
        most = given = 0
        stuck = threading.Event()
        real = Contents._put_packed

        def late(self: Contents, *arguments: Any, **named: Any) -> None:
            stuck.wait(0.002)
            real(self, *arguments, **named)

        def pieces() -> Iterator[bytes]:
            nonlocal given, most
            for number in range(150):
                most = max(most, given - database.core.contents.new_size)
                given += 4000
                yield bytes_of(number, 4000)

        monkeypatch.setattr(Contents, "_put_packed", late)
        database = made(tmp_path, **SMALL, threads=2)
        database.blobs.put(pieces())
        database.close()
        assert most < 2 * 20_000 + 2 * 4 * KIB + 20_000  # On their way, the window, and what comes in between.


SPARSE = """
import sys, time, basin
from pathlib import Path
def peak():
    return int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
with basin.open(sys.argv[1], secret=basin.Secret.generate(), threads=2) as db:
    db.blobs.put(b"x" * (5 << 20))
    before = peak()
    key = db.blobs.put(Path(sys.argv[2]))
    db.commit()
    wrote = peak()
    with db.blobs.open(key) as file:
        file.seek(-5, 2)
        last = file.read()
        file.seek(1 << 30)
        some = file.read(10)
    are_zeros = last == bytes(5) and some == bytes(10)
    print(db.blobs.size(key), wrote - before, peak() - before, len(set(db.blobs.parts(key))), are_zeros)
"""


@pytest.mark.usefixtures("_knows_holes")
def test_a_sparse_file_larger_than_memory_takes_little_of_it(tmp_path: Path) -> None:
    path = sparse_file(tmp_path / "file", 4 << 30, {3 << 30: bytes_of(1, 10 * MIB)})
    command = [sys.executable, "-c", SPARSE, str(tmp_path / "basin"), str(path)]
    output = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120, check=True).stdout
    size, writing_kib, all_kib, parts, are_zeros = output.split()
    assert (int(size), are_zeros) == (4 << 30, "True")
    assert int(writing_kib) < 60 * 1024
    assert int(all_kib) < 80 * 1024
    assert int(parts) < 20
    assert sum(one.stat().st_size for one in (tmp_path / "basin" / "data").iterdir()) < 12 * MIB
