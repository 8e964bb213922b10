"""Blobs: deduplication, roots, links, parts, streams in bounded memory, seekable reads."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3

import basin
from basin.api import Database
from basin.errors import ContentNotFound, InvalidArgument, ReadOnly
from basin.terms import PartAddress
from tests.source_tree import ROOT

MIB = 1 << 20
SECRET = basin.Secret.generate()
OPTIONS: dict[str, Any] = {"part_max": 4096, "part_size": 1024, "chunker": "fixed", "inline_max": 64}


def numbered(size: int) -> bytes:
    """Bytes in which every part differs."""
    return b"".join(number.to_bytes(4, "big") for number in range(size // 4 + 1))[:size]


@pytest.fixture(params=["open", "encrypted"])
def db(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    secret = SECRET if request.param == "encrypted" else None
    with basin.open(tmp_path / "basin", "x", secret=secret, profile=request.param, **OPTIONS) as database:
        yield database


def reopen(db: Database) -> Database:
    """A reader of what the basin holds now."""
    db.commit()
    secret = SECRET if db.core.keyring.profile == "encrypted" else None
    return basin.open(db.url, "r", secret=secret)


def stored(db: Database) -> int:
    """Bytes of contents on the disk."""
    db.commit()
    return sum(path.stat().st_size for folder in ("data", "meta") for path in Path(db.url, folder).glob("*"))


def test_a_content_is_named_by_its_hash(db: Database) -> None:
    key = db.blobs.put(b"content")
    assert bytes(key) == blake3(b"content").digest()
    assert str(key) == blake3(b"content").hexdigest()
    assert db.blobs[key] == db.blobs[str(key)] == db.blobs[str(key).upper()] == b"content"
    assert db.blobs.get(key) == b"content"
    assert db.blobs.size(key) == 7
    assert list(db.blobs) == [key]


def test_what_was_read_is_read_from_memory_again(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    contents = [numbered(size) for size in (10, 500, 4000)]
    keys = db.blobs.put_many(contents)
    with reopen(db) as reader:
        assert [reader.blobs[key] for key in keys] == contents
        with monkeypatch.context() as patch:
            patch.setattr("basin.engine.contents.Contents._fetch_many", None)
            patch.setattr("basin.engine.contents.Contents._read_plain", None)
            assert [reader.blobs[key] for key in keys] == contents
            assert reader.blobs.get_many(keys[::-1]) == contents[::-1]
        another = db.blobs.put(b"another")
        db.commit()
        reader.refresh()
        assert reader.blobs.get_many([keys[2], another, keys[0]]) == [contents[2], b"another", contents[0]]


@pytest.mark.parametrize("size", [10, 500])
def test_what_was_changed_in_memory_is_read_again(db: Database, size: int) -> None:
    key = db.blobs.put(numbered(size))
    with reopen(db) as reader:
        reads: list[Callable[[], bytes]] = [lambda: reader.blobs[key], lambda: reader.blobs.get_many([key])[0]]
        for read in reads:
            assert read() == numbered(size)
            sealed = reader.core.readers.grains[bytes(key)]
            for at in range(len(sealed.data)):
                changed = bytearray(sealed.data)
                changed[at] ^= 1
                reader.core.readers.grains[bytes(key)] = sealed._replace(data=bytes(changed))
                assert read() == numbered(size)


@pytest.mark.parametrize("size", [0, 1, 127, 128, 4095, 4096, 4097, 5120, 5121, 100_000])
def test_every_size_comes_back(db: Database, size: int) -> None:
    data = numbered(size)
    key = db.blobs.put(data)
    for database in (db, db):
        assert database.blobs[key] == data
        database.commit()
    with reopen(db) as reader:
        assert reader.blobs[key] == data
        assert reader.blobs.size(key) == size
        lengths = [length for _, length in reader.blobs.parts(key)]
        assert lengths == ([size] if size <= 4096 else [1024] * (size // 1024) + [size % 1024] * (size % 1024 > 0))


def test_equal_contents_are_stored_once(db: Database) -> None:
    data, large = os.urandom(2000), os.urandom(50_000)
    keys = [db.blobs.put(data), db.blobs.put(large)]
    before = stored(db)
    assert [db.blobs.put(data), db.blobs.put(io.BytesIO(large))] == keys
    assert db.blobs.put_many([data, large, data]) == [keys[0], keys[1], keys[0]]
    db[b"name"] = data
    assert db.ref(b"name") == keys[0]
    assert stored(db) == before
    with reopen(db) as reader:
        assert reader.blobs.get_many([*keys, *keys]) == [data, large] * 2


def test_parts_that_two_contents_share_are_stored_once(db: Database) -> None:
    data = os.urandom(100 * 1024)
    db.blobs.put(data)
    before = stored(db)
    key = db.blobs.put(data[:-1] + b"!")
    assert stored(db) - before < 10_000
    assert db.blobs[key] == data[:-1] + b"!"


def test_a_root_is_written_by_put_and_removed_by_delete(db: Database) -> None:
    first, second = db.blobs.put(b"first"), db.blobs.put(b"second", root=False)
    assert list(db.blobs) == [first]
    db.blobs.put(b"second")  # A duplicate, and yet a root now.
    assert list(db.blobs) == sorted([first, second])
    db.blobs.delete(first)
    db.blobs.delete(first)
    db.blobs.delete("0" * 64)
    assert list(db.blobs) == [second]
    assert first in db.blobs
    assert db.blobs[first] == b"first"
    assert list(db) == []
    with reopen(db) as reader:
        assert list(reader.blobs) == list(db.blobs)
        with pytest.raises(ReadOnly):
            reader.blobs.put(b"x")
        with pytest.raises(ReadOnly):
            reader.blobs.delete(second)


def test_a_duplicate_must_have_the_same_links(db: Database) -> None:
    a, b = db.blobs.put(b"a"), db.blobs.put(b"b")
    key = db.blobs.put(b"parent" * 20, links=[a])
    before = stored(db)
    assert db.blobs.put(b"parent" * 20, links=[a]) == key
    assert db.blobs.put(b"parent" * 20) == key  # Without links any grain will do.
    assert stored(db) == before
    assert db.blobs.put(b"parent" * 20, links=[b]) == key
    before, more = stored(db), before
    assert before > more
    assert db.blobs.put(b"parent" * 20, links=[a]) == key  # The older of the two has these links.
    assert stored(db) == before
    assert set(db.blobs.links(key)) == {a, b}
    assert db.blobs[key] == b"parent" * 20
    large = db.blobs.put(numbered(9000), links=[str(a), b])
    with reopen(db) as reader:
        assert set(reader.blobs.links(key)) == {a, b}
        assert reader.blobs.links(large)[:2] == [a, b]
        assert set(reader.blobs.links(large)[2:]) == {part for part, _ in reader.blobs.parts(large)}
        assert reader.blobs[large] == numbered(9000)
        assert reader.blobs.read(large, 8000, 9500) == numbered(9000)[8000:]


def test_links_lead_to_contents_that_are_there(db: Database) -> None:
    with pytest.raises(ContentNotFound) as caught:
        db.blobs.put(b"parent", links=["0" * 64])
    assert str(caught.value.content_key) == "0" * 64
    assert basin.ContentKey(blake3(b"parent").digest()) not in db.blobs


def test_part_addresses(db: Database) -> None:
    data = numbered(10_000)
    key = db.blobs.put(data)
    for number in range(10):
        piece = data[number * 1024 : (number + 1) * 1024]
        assert db.blobs[f"{key}-{number}"] == piece
        assert db.blobs[PartAddress(key, number)] == piece
        assert db.blobs.parts(key)[number] == (basin.ContentKey(blake3(piece).digest()), len(piece))
    small = db.blobs.put(b"small")
    assert db.blobs[f"{small}-0"] == b"small"
    for absent in (f"{key}-10", f"{small}-1", "0" * 64 + "-0"):
        assert absent not in db.blobs
        assert db.blobs.get(absent, b"default") == b"default"
        with pytest.raises(ContentNotFound):
            db.blobs[absent]
    for wrong in (f"{key}-00", f"{key}-01", f"{key}--1", f"{key}-", f"{key}-a", "short", "", "g" * 64):
        with pytest.raises(InvalidArgument):
            db.blobs[wrong]


@pytest.mark.parametrize("wrong", [1, None, b"bytes", bytes(32)])
def test_a_content_key_is_no_bytes(db: Database, wrong: Any) -> None:
    with pytest.raises(InvalidArgument):
        db.blobs[wrong]
    with pytest.raises(InvalidArgument):
        db.blobs.get(wrong)


@pytest.mark.parametrize("wrong", ["text", 1, None, ["list"], {"a": 1}])
def test_a_blob_is_bytes_a_file_or_a_path(db: Database, wrong: Any) -> None:
    with pytest.raises(TypeError):
        db.blobs.put(wrong)
    with pytest.raises(TypeError):
        db.blobs.put_many([b"a", wrong])
    assert list(db.blobs) == []


def test_bytes_come_from_wherever_they_are(db: Database, tmp_path: Path) -> None:
    data = numbered(20_000)
    path = tmp_path / "file"
    path.write_bytes(data)
    with path.open("rb") as file:
        file.seek(4)
        tail = db.blobs.put(file)
    assert db.blobs[tail] == data[4:]
    sources: list[Any] = [
        data,
        bytearray(data),
        memoryview(data),
        path,
        io.BytesIO(data),
        iter([b"", data[:7], data[7:]]),
    ]
    keys = {db.blobs.put(source) for source in sources}
    assert keys == {basin.ContentKey(blake3(data).digest())}
    assert db.blobs[keys.pop()] == data


def test_a_pipe_gives_less_than_it_is_asked_for(db: Database) -> None:
    data = numbered(300_000)
    receiving, sending = os.pipe()

    def send() -> None:
        with os.fdopen(sending, "wb", buffering=0) as file:
            file.writelines(data[start : start + 777] for start in range(0, len(data), 777))

    sender = threading.Thread(target=send, daemon=True)
    sender.start()
    with os.fdopen(receiving, "rb", buffering=0) as file:
        key = db.blobs.put(file)
    sender.join()
    assert db.blobs[key] == data


def test_a_source_that_fails_leaves_nothing(db: Database) -> None:
    def pieces() -> Iterator[bytes]:
        yield numbered(9000)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        db.blobs.put(pieces())
    with pytest.raises(FileNotFoundError):
        db.blobs.put(Path("/nowhere/at all"))
    assert list(db.blobs) == []
    assert db.blobs[db.blobs.put(b"next")] == b"next"


@pytest.mark.parametrize("size", [3000, 30_000])
def test_a_file_that_seeks(db: Database, size: int) -> None:
    data = numbered(size)
    key = db.blobs.put(data)
    with db.blobs.open(key) as file:
        assert file.seekable()
        assert file.read(10) == data[:10]
        assert file.seek(-5, io.SEEK_END) == size - 5
        assert file.read() == data[-5:]
        assert file.read() == b""
        assert file.seek(1000) == 1000
        assert file.seek(500, io.SEEK_CUR) == 1500
        assert file.read(2000) == data[1500:3500]
        assert file.tell() == min(3500, size)
        file.seek(size + 100)
        assert file.read(1) == b""
        with pytest.raises((InvalidArgument, ValueError)):
            file.seek(-1)
    for start, stop in ((0, 0), (0, size), (1023, 1025), (size - 1, size + 9), (size, size + 1), (5 * size, 6 * size)):
        assert db.blobs.read(key, start, stop) == data[start:stop]
    for start, stop in ((-1, 5), (5, 4)):
        with pytest.raises(InvalidArgument):
            db.blobs.read(key, start, stop)


def test_many_at_once_keep_their_order(db: Database) -> None:
    small = [b"content %d" % number for number in range(5000)]
    mixed: list[Any] = [*small, numbered(9000), io.BytesIO(b"from a file"), *[os.urandom(2000) for _ in range(500)]]
    keys = db.blobs.put_many(iter(mixed))
    wanted = [item.getvalue() if isinstance(item, io.BytesIO) else item for item in mixed]
    assert [bytes(key) for key in keys] == [blake3(item).digest() for item in wanted]
    assert db.blobs.get_many(iter(keys)) == wanted
    assert db.blobs.get_many(reversed([str(key) for key in keys])) == wanted[::-1]
    assert db.blobs.put_many([]) == []
    assert db.blobs.get_many([]) == []
    with pytest.raises(ContentNotFound):
        db.blobs.get_many([*keys, "0" * 64])
    with reopen(db) as reader:
        assert reader.blobs.get_many(keys) == wanted


def test_blobs_of_a_batch_come_and_go_with_it(db: Database) -> None:
    with db.batch() as batch:
        key = batch.blobs.put(b"content")
        assert list(batch.blobs) == [key]
        assert list(db.blobs) == []
    assert list(db.blobs) == [key]
    with pytest.raises(ZeroDivisionError), db.transaction() as tx:
        tx.blobs.delete(key)
        tx.blobs.put(b"another")
        assert len(list(tx.blobs)) == 1
        raise ZeroDivisionError
    with db.view() as view:
        db.blobs.delete(key)
        assert list(view.blobs) == [key]
        with pytest.raises(ReadOnly):
            view.blobs.put(b"x")
    assert list(db.blobs) == []


STREAM = """
import resource, sys, basin
def peak():
    return int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
class Source:
    left = 300 << 20
    def read(self, size):
        size = min(size, self.left, 65536)
        self.left -= size
        return (b"%016d" % self.left * 4096)[:size]
with basin.open(sys.argv[1], secret=basin.Secret.generate(), threads=2) as db:
    before = peak()
    key = db.blobs.put(Source())
    db.commit()
    wrote = peak()
    total = 0
    with db.blobs.open(key) as file:
        while piece := file.read(1 << 20):
            total += len(piece)
    print(total, wrote - before, peak() - before)
"""


def test_a_stream_larger_than_memory_takes_little_of_it(tmp_path: Path) -> None:
    command = [sys.executable, "-c", STREAM, str(tmp_path / "basin")]
    output = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120, check=True).stdout
    total, writing_kib, all_kib = map(int, output.split())
    assert total == 300 * MIB
    assert writing_kib < 80 * 1024
    assert all_kib < 90 * 1024
