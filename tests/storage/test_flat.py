"""One file as a storage: reads stay inside of each file, nothing is written, and a new one is whole or not there."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from blake3 import blake3

from basin.errors import (
    AlreadyExists,
    BasinClosed,
    BasinError,
    ChecksumMismatch,
    InvalidArgument,
    NotABasin,
    ObjectMissing,
    ReadOnly,
    StorageError,
    TruncatedStratum,
)
from basin.storage.flat import FlatStorage, Piece, open_local_file
from basin.storage.flat_remote import PIECE_SIZE, RemoteFile, find_flat_file, open_remote_file
from basin.storage.flat_target import FlatTarget, scratch_folder
from basin.storage.objects import ByteRange
from basin.storage.protocol import Storage
from basin.storage.requests import RequestPolicy
from tests.storage.flat_server import flat_server

POLICY = RequestPolicy(attempts=2, backoff_first_s=0.001, backoff_max_s=0.002)
BODIES = {"one": b"first", "data/two": b"", "data/three": os.urandom(1000), "keys/a/b": b"deep"}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file that holds `BODIES` behind 10 other bytes."""
    made = tmp_path / "some.basin"
    made.write_bytes(bytes(10) + b"".join(BODIES.values()) + b"the end")
    return made


def names_in(folder: Path) -> list[str]:
    return [entry.name for entry in folder.iterdir()]


def pieces() -> Iterator[Piece]:
    offset = 10
    for name, body in BODIES.items():
        yield Piece(name, offset, len(body), blake3(body).digest())
        offset += len(body)


@pytest.fixture
def storage(path: Path) -> Iterator[FlatStorage]:
    made = FlatStorage(open_local_file(path), pieces(), str(path))
    yield made
    made.close()


class TestReading:
    @pytest.mark.parametrize("name", BODIES)
    def test_each_file_is_its_own(self, storage: FlatStorage, name: str) -> None:
        file = storage.open(name)
        assert file.size() == len(BODIES[name])
        assert file.read(0, file.size()) == storage.read_file(name, 1 << 20) == BODIES[name]
        assert storage.exists(name)

    @pytest.mark.parametrize(("offset", "size"), [(0, 6), (5, 1), (6, 0), (1, 5), (-1, 1), (-1, 3), (0, 1 << 60)])
    def test_no_read_leaves_its_file(self, storage: FlatStorage, offset: int, size: int) -> None:
        with pytest.raises(TruncatedStratum) as caught:
            storage.open("one").read(offset, size)
        assert caught.value.object == "one"

    def test_a_range_within(self, storage: FlatStorage) -> None:
        assert storage.open("data/three").read(17, 100) == BODIES["data/three"][17:117]
        wanted = [ByteRange("one", 1, 3), ByteRange("keys/a/b", 2), ByteRange("none")]
        first, second, third = storage.read_ranges(wanted)
        assert (first, second) == (b"ir", b"ep")
        assert isinstance(third, ObjectMissing)

    def test_folders(self, storage: FlatStorage) -> None:
        assert storage.list("") == ["one"]
        assert storage.list_folders("") == ["data", "keys"]
        assert storage.list("data") == ["three", "two"]
        assert storage.list("keys") == storage.list("none") == storage.list_folders("none") == []
        assert storage.list_folders("keys") == ["a"]

    def test_a_missing_name(self, storage: FlatStorage) -> None:
        assert not storage.exists("dat")
        for read in (storage.open, lambda name: storage.read_file(name, 10)):
            with pytest.raises(ObjectMissing):
                read("data")

    def test_a_name_that_is_none(self, storage: FlatStorage) -> None:
        with pytest.raises(InvalidArgument):
            storage.open("../some.basin")

    def test_a_small_file_that_was_changed_is_found_when_it_is_read_whole(self, path: Path) -> None:
        path.write_bytes(path.read_bytes().replace(b"first", b"fIrst"))
        storage = FlatStorage(open_local_file(path), pieces(), str(path))
        with pytest.raises(ChecksumMismatch) as caught:
            storage.read_file("one", 5)
        assert caught.value.object == "one"
        assert storage.read_file("one", 4) == b"fIrs"  # What is not whole has no hash.
        storage.close()

    def test_after_close_nothing_is_read(self, storage: FlatStorage) -> None:
        file = storage.open("one")
        storage.close()
        storage.close()
        for use in (lambda: file.read(0, 1), lambda: storage.open("one"), lambda: storage.list("")):
            with pytest.raises(BasinClosed):
                use()

    def test_a_forked_child_has_let_go_of_it(self, storage: FlatStorage) -> None:
        file = storage.open("one")
        child = os.fork()
        if not child:
            try:
                for use in (lambda: file.read(0, 1), lambda: storage.open("one")):
                    with pytest.raises(BasinClosed):
                        use()
            except BaseException:  # noqa: BLE001  # the child says it by its exit code
                os._exit(1)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert file.read(0, 1) == b"f"

    @pytest.mark.parametrize("name", ["folder.basin", "none.basin", "fifo.basin"])
    def test_what_is_no_regular_file_is_not_opened(self, tmp_path: Path, name: str) -> None:
        (tmp_path / "folder.basin").mkdir()
        os.mkfifo(tmp_path / "fifo.basin")
        with pytest.raises(StorageError):
            open_local_file(tmp_path / name)
        assert find_flat_file(str(tmp_path / name), None, POLICY) is None


WRITES: dict[str, Callable[[Storage], object]] = {
    "create": lambda storage: storage.create("new"),
    "append_to": lambda storage: storage.append_to("one", 5),
    "put_if_absent": lambda storage: storage.put_if_absent("new", b""),
    "link": lambda storage: storage.link("one", "new"),
    "delete": lambda storage: storage.delete("one"),
    "delete_many": lambda storage: storage.delete_many(["one"]),
    "sync_folder": lambda storage: storage.sync_folder("data"),
    "reserve": lambda storage: storage.reserve("new", 1),
    "lock": lambda storage: storage.lock("log/lock"),
}


@pytest.mark.parametrize("operation", WRITES)
def test_nothing_is_written(storage: FlatStorage, path: Path, operation: str) -> None:
    before = path.read_bytes()
    with pytest.raises(ReadOnly):
        WRITES[operation](storage)
    assert path.read_bytes() == before
    assert not storage.writable()


class TestWriting:
    def test_files_lie_one_behind_the_other(self, tmp_path: Path) -> None:
        path = tmp_path / "new.basin"
        with FlatTarget(path) as target:
            target.append(b"head")
            for name, body in BODIES.items():
                file = target.create(name)
                for offset in range(0, len(body), 300):
                    file.append(body[offset : offset + 300])
                assert file.offset == len(body)
            written = target.pieces
            target.append(b"tail")
            assert not path.exists()
            target.finish()
        assert path.read_bytes() == b"head" + b"".join(BODIES.values()) + b"tail"
        assert written == [piece._replace(offset=piece.offset - 6) for piece in pieces()]
        assert names_in(tmp_path) == ["new.basin"]
        assert path.stat().st_mode & 0o777 == 0o600

    def test_what_is_not_finished_leaves_nothing(self, tmp_path: Path) -> None:
        with pytest.raises(ZeroDivisionError), FlatTarget(tmp_path / "new.basin") as target:
            target.create("one").append(b"data")
            assert len(names_in(tmp_path)) == 1
            raise ZeroDivisionError
        assert names_in(tmp_path) == []

    def test_a_file_that_is_there_stays(self, path: Path) -> None:
        before = path.read_bytes()
        with pytest.raises(AlreadyExists):
            FlatTarget(path)
        assert path.read_bytes() == before
        assert names_in(path.parent) == [path.name]

    def test_a_dangling_link_is_there_as_well(self, tmp_path: Path) -> None:
        (tmp_path / "new.basin").symlink_to(tmp_path / "none")
        with pytest.raises(AlreadyExists):
            FlatTarget(tmp_path / "new.basin")

    @pytest.mark.parametrize("has_links", [True, False])
    def test_who_comes_second_leaves_the_first(
        self, tmp_path: Path, has_links: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if not has_links:
            monkeypatch.setattr(os, "link", refuse_links)
        path = tmp_path / "new.basin"
        with FlatTarget(path) as target:
            target.append(b"second")
            path.write_bytes(b"first")
            with pytest.raises(AlreadyExists):
                target.finish()
        assert path.read_bytes() == b"first"
        assert names_in(tmp_path) == ["new.basin"]

    def test_a_file_system_without_hard_links_does_as_well(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(os, "link", refuse_links)
        with FlatTarget(tmp_path / "new.basin") as target:
            target.append(b"data")
            target.finish()
        assert (tmp_path / "new.basin").read_bytes() == b"data"
        assert names_in(tmp_path) == ["new.basin"]

    def test_a_file_that_was_ended_takes_no_more(self, tmp_path: Path) -> None:
        with FlatTarget(tmp_path / "new.basin") as target:
            first = target.create("one")
            target.create("two").append(b"data")
            with pytest.raises(InvalidArgument):
                first.append(b"late")
            with pytest.raises(AlreadyExists):
                target.create("one")

    def test_a_folder_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(ObjectMissing):
            FlatTarget(tmp_path / "none" / "new.basin")

    def test_a_scratch_folder_goes_with_what_is_in_it(self, tmp_path: Path) -> None:
        with pytest.raises(ZeroDivisionError), scratch_folder(tmp_path / "new.basin") as folder:
            assert folder.parent == tmp_path
            assert folder.stat().st_mode & 0o777 == 0o700
            (folder / "file").write_bytes(b"data")
            raise ZeroDivisionError
        assert names_in(tmp_path) == []


def refuse_links(*_: object, **__: object) -> None:
    raise OSError(errno.EPERM, "no hard links here")


class TestOverHttp:
    BODY = os.urandom(5 * PIECE_SIZE + 17)

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        (tmp_path / "FILE.basin").write_bytes(self.BODY)
        return tmp_path

    @pytest.mark.parametrize(
        ("offset", "size"),
        [(0, 1), (0, len(BODY)), (PIECE_SIZE - 1, 2), (len(BODY) - 1, 1), (100, 4 * PIECE_SIZE), (len(BODY), 0)],
    )
    def test_a_range(self, folder: Path, offset: int, size: int) -> None:
        with flat_server(folder) as server:
            file = open_remote_file(server.url("FILE.basin"), None, POLICY)
            assert file.size() == len(self.BODY)
            assert file.read(offset, size) == self.BODY[offset : offset + size]
            assert len(server.asked) == (1 if size else 0)
            file.close()

    def test_neighbours_come_along(self, folder: Path) -> None:
        with flat_server(folder) as server:
            file = open_remote_file(server.url("FILE.basin"), None, POLICY)
            for offset in range(0, 2 * PIECE_SIZE, 1000):
                assert file.read(offset, 10) == self.BODY[offset : offset + 10]
            assert server.sent == 2 * PIECE_SIZE
            assert file.requests()["get"] == len(server.asked) == 2
            file.close()

    def test_no_read_leaves_the_file(self, folder: Path) -> None:
        with flat_server(folder) as server:
            file = open_remote_file(server.url("FILE.basin"), None, POLICY)
            for offset, size in ((len(self.BODY), 1), (-1, 1), (0, 1 << 60)):
                with pytest.raises(TruncatedStratum):
                    file.read(offset, size)
            assert server.asked == []
            file.close()

    def test_another_reading_asks_the_server(self, folder: Path) -> None:
        with flat_server(folder) as server:
            file = open_remote_file(server.url("FILE.basin"), None, POLICY)
            before = file.read(0, 10)
            (folder / "FILE.basin").write_bytes(bytes(len(self.BODY)))
            assert file.read(0, 10) == before
            assert file.read_again(0, 10) == bytes(10) == file.read(0, 10)
            file.close()

    def test_a_query_and_capitals_belong_to_the_name(self, folder: Path) -> None:
        with flat_server(folder) as server:
            file = find_flat_file(server.url("FILE.basin?token=Some%20Thing"), None, POLICY)
            assert isinstance(file, RemoteFile)
            assert file.read(0, 5) == self.BODY[:5]
            file.close()

    def test_a_server_without_ranges_is_refused(self, folder: Path) -> None:
        with flat_server(folder, knows_ranges=False) as server:
            file = open_remote_file(server.url("FILE.basin"), None, POLICY)
            with pytest.raises(StorageError, match="range requests"):
                file.read(0, 10)
            file.close()

    def test_a_missing_file_is_no_basin(self, folder: Path) -> None:
        with flat_server(folder) as server, pytest.raises(NotABasin):
            find_flat_file(server.url("none.basin"), None, POLICY)

    @pytest.mark.parametrize("status", [401, 403, 418])
    def test_a_refusal_is_no_broken_connection(self, folder: Path, status: int) -> None:
        with flat_server(folder, status=status) as server:
            with pytest.raises(StorageError) as caught:
                find_flat_file(server.url("FILE.basin"), None, POLICY)
            assert "attempts" not in caught.value.fields

    def test_a_server_that_is_gone(self, folder: Path) -> None:
        with flat_server(folder) as server:
            url = server.url("FILE.basin")
        with pytest.raises(BasinError) as caught:
            find_flat_file(url, None, POLICY)
        assert isinstance(caught.value, StorageError)

    @pytest.mark.parametrize("url", ["memory://some.basin", "http://127.0.0.1:1/basin", "/folder/of.basin/file", "x"])
    def test_what_has_another_name_is_not_looked_at(self, url: str) -> None:
        assert find_flat_file(url, None, POLICY) is None
