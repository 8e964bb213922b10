"""The local storage keeps the port's promises, and those that only a real file system can ask for."""

from __future__ import annotations

import errno
import fcntl
import gc
import os
import resource
import stat
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from basin.errors import (
    AlreadyExists,
    BasinClosed,
    BasinError,
    ObjectMissing,
    OutOfSpace,
    ReadOnly,
    StorageError,
    StorageUnavailable,
)
from basin.storage import local, local_files
from basin.storage.local import LocalStorage
from basin.storage.protocol import Storage
from basin.storage.translation import translated
from basin.testing.conformance import DiskConformance


class TestLocalStorage(DiskConformance):
    def make_storage(self, place: Path) -> Storage:
        return LocalStorage(place, create=True)

    def stored(self, place: Path, name: str) -> bytes | None:
        path = place / name
        return path.read_bytes() if path.exists() else None


@pytest.fixture
def storage(tmp_path: Path) -> Iterator[LocalStorage]:
    made = LocalStorage(tmp_path / "basin", create=True)
    yield made
    made.close()


@pytest.fixture
def umask() -> Iterator[Callable[[int], int]]:
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


def open_descriptors() -> int:
    gc.collect()
    return len(list(Path("/proc/self/fd").iterdir()))


class TestTheFolder:
    def test_a_missing_folder_is_not_made_unasked(self, tmp_path: Path) -> None:
        with pytest.raises(ObjectMissing):
            LocalStorage(tmp_path / "none")
        assert not (tmp_path / "none").exists()

    @pytest.mark.parametrize("create", [True, False])
    def test_a_file_is_no_folder(self, tmp_path: Path, create: bool) -> None:
        (tmp_path / "file").write_bytes(b"")
        with pytest.raises(ObjectMissing, match="not a folder"):
            LocalStorage(tmp_path / "file", create=create)

    def test_another_working_folder_changes_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        storage = LocalStorage("basin", create=True)
        monkeypatch.chdir("/")
        storage.create("a").close()
        assert (tmp_path / "basin" / "a").exists()
        assert storage.url == (tmp_path / "basin").as_uri()

    @pytest.mark.parametrize("mask", [0, 0o022, 0o077, 0o777])
    def test_modes_do_not_depend_on_the_umask(self, tmp_path: Path, umask: Callable[[int], int], mask: int) -> None:
        storage = LocalStorage(tmp_path / "basin", create=True)
        umask(mask)
        storage.create("data/a").close()
        storage.reserve("data/b", 1)
        storage.put_if_absent("keys/1/c", b"x")
        umask(0o022)
        found = {path: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "basin").rglob("*")}
        assert found
        assert {oct(mode) for path, mode in found.items() if path.is_dir()} == {oct(0o700)}
        assert {oct(mode) for path, mode in found.items() if path.is_file()} == {oct(0o600)}

    def test_what_somebody_else_put_there_is_not_listed(self, tmp_path: Path, storage: LocalStorage) -> None:
        root = tmp_path / "basin"
        (root / ".DS_Store").write_bytes(b"")
        (root / "Upper").mkdir()
        (root / "link").symlink_to("/etc/passwd")
        os.mkfifo(root / "pipe")
        assert storage.list("") == storage.list_folders("") == []

    def test_a_symlink_is_not_followed(self, tmp_path: Path, storage: LocalStorage) -> None:
        target = tmp_path / "target"
        target.write_bytes(b"secret")
        (tmp_path / "basin" / "a").symlink_to(target)
        for attempt in (
            lambda: storage.open("a"),
            lambda: storage.append_to("a", 6),
            lambda: storage.lock("a"),
        ):
            with pytest.raises(StorageError, match="symbolic link"):
                attempt()
        with pytest.raises(AlreadyExists):
            storage.create("a")

    def test_a_pipe_does_not_hang_a_reader(self, tmp_path: Path, storage: LocalStorage) -> None:
        os.mkfifo(tmp_path / "basin" / "a")
        with pytest.raises(StorageError):
            storage.open("a").read(0, 1)

    def test_a_folder_and_those_above_it_are_synced_once(
        self, tmp_path: Path, storage: LocalStorage, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        synced: list[str] = []
        monkeypatch.setattr(local, "_sync_path", synced.append)
        storage.create("keys/1/slot.json").close()
        root = str(tmp_path / "basin")
        storage.sync_folder("keys/1")
        assert synced == [f"{root}/keys/1", f"{root}/keys", root, str(tmp_path)]
        synced.clear()
        storage.sync_folder("keys/1")
        storage.sync_folder("")
        assert synced == [f"{root}/keys/1", root]

    def test_boot_id_is_the_kernels(self, storage: LocalStorage) -> None:
        text = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        assert storage.boot_id() == uuid.UUID(text).bytes


class TestErrors:
    @pytest.mark.parametrize(
        ("number", "kind"),
        [
            (errno.ENOENT, ObjectMissing),
            (errno.EEXIST, AlreadyExists),
            (errno.ENOSPC, OutOfSpace),
            (errno.EDQUOT, OutOfSpace),
            (errno.EROFS, ReadOnly),
            (errno.EACCES, ReadOnly),
            (errno.EPERM, ReadOnly),
            (errno.ETIMEDOUT, StorageUnavailable),
            (errno.EAGAIN, StorageUnavailable),
            (errno.EMFILE, StorageError),
            (errno.ENFILE, StorageError),
            (errno.EIO, StorageError),
            (errno.EFBIG, StorageError),
        ],
    )
    def test_the_table(self, number: int, kind: type[BasinError]) -> None:
        error = translated(OSError(number, os.strerror(number)), "append", "data/a", "/x/data/a")
        assert type(error) is kind
        assert error.fields == {"object": "data/a", "operation": "append", "errno": number}
        assert str(error).startswith("append '/x/data/a': ")

    def test_a_file_that_may_not_be_read_is_no_read_only_folder(self) -> None:
        assert type(translated(PermissionError(errno.EACCES, ""), "open", "a")) is StorageError

    def test_a_file_system_without_hard_links_is_named(self) -> None:
        error = translated(PermissionError(errno.EPERM, ""), "link", "a")
        assert type(error) is StorageError
        assert "hard links" in str(error)

    def test_too_many_open_files(self, storage: LocalStorage) -> None:
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)
        lowest_free = os.dup(0)
        os.close(lowest_free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, limit[1]))
        try:
            with pytest.raises(StorageError, match="ulimit -n") as caught:
                storage.create("a")
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limit)
        assert caught.value.fields["errno"] == errno.EMFILE
        assert isinstance(caught.value.__cause__, OSError)

    def test_a_file_too_large(self, storage: LocalStorage) -> None:
        """A real short write: the kernel takes the bytes up to the limit, and none of the second attempt."""
        script = (
            "import resource, signal, sys\n"
            "from basin.errors import StorageError\n"
            "from basin.storage.local import LocalStorage\n"
            "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
            "file = LocalStorage(sys.argv[1]).create('a')\n"
            "for _ in range(2):\n"
            "    try:\n"
            "        file.append(bytes(1500))\n"
            "    except StorageError as error:\n"
            "        print(file.offset, error.operation, error.errno, 'earlier' in str(error))\n"
        )
        assert _python(script, _root(storage)).splitlines() == [
            f"1000 append {errno.EFBIG} False",
            f"1000 append {errno.EFBIG} True",
        ]

    def test_after_a_failed_sync_the_file_is_of_no_use(
        self, storage: LocalStorage, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        file = storage.create("a")
        file.append(b"x")

        def fail(_: int) -> None:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        with monkeypatch.context() as patch:
            patch.setattr(local_files, "sync_data", fail)
            with pytest.raises(StorageError, match="input/output error"):
                file.sync()
        for attempt in (file.sync, lambda: file.append(b"y")):
            with pytest.raises(StorageError, match="earlier write or sync") as caught:
                attempt()
            assert caught.value.fields["errno"] == errno.EIO

    def test_writing_begins_before_the_sync(self, storage: LocalStorage, monkeypatch: pytest.MonkeyPatch) -> None:
        """A hint for every 4 MiB and what is more of them; one that cannot be taken changes nothing."""
        hints: list[tuple[int, int]] = []
        begin = local_files.begin_writing

        def note(descriptor: int, offset: int, size: int) -> None:
            hints.append((offset, size))
            begin(descriptor, offset, size)
            begin(local_files.NO_DESCRIPTOR, offset, size)

        monkeypatch.setattr(local_files, "begin_writing", note)
        mib = 1 << 20
        file = storage.create("a")
        for size in (3 * mib, 3 * mib, mib, 9 * mib, mib):
            file.append(bytes(size))
        assert hints == [(0, 6 * mib), (6 * mib, 10 * mib)]
        file.sync()
        assert storage.open("a").size() == 17 * mib

    def test_short_writes_and_reads_go_on(self, storage: LocalStorage, monkeypatch: pytest.MonkeyPatch) -> None:
        data = bytes(range(200))
        write, pwrite, pread = os.write, os.pwrite, os.pread
        monkeypatch.setattr(os, "write", lambda descriptor, part: write(descriptor, part[:7]))
        monkeypatch.setattr(os, "pwrite", lambda descriptor, part, offset: pwrite(descriptor, part[:7], offset))
        monkeypatch.setattr(os, "pread", lambda descriptor, size, offset: pread(descriptor, min(size, 7), offset))
        file = storage.create("a")
        for given in (data, bytearray(data), memoryview(data)):
            file.append(given)
        assert file.offset == 600
        assert storage.open("a").read(0, 600) == data * 3
        lock = storage.lock("lock")
        lock.acquire(0)
        lock.write(data)
        monkeypatch.undo()
        assert lock.read() == data

    def test_a_stale_handle_does_not_overwrite(self, storage: LocalStorage) -> None:
        stale, other = storage.create("a"), storage.append_to("a", 0)
        other.append(b"one")
        stale.append(b"two")
        assert storage.read_file("a", 10) == b"onetwo"

    def test_a_failed_reserve_leaves_nothing(self, storage: LocalStorage, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(local, "allocate", fail)
        with pytest.raises(OutOfSpace):
            storage.reserve("reserve", 100)
        assert not storage.exists("reserve")

    def test_a_link_from_nothing_makes_no_folder(self, tmp_path: Path, storage: LocalStorage) -> None:
        with pytest.raises(ObjectMissing):
            storage.link("tmp/a", "keys/1/slot.json")
        assert list((tmp_path / "basin").iterdir()) == []

    def test_a_reserve_takes_space(self, tmp_path: Path, storage: LocalStorage) -> None:
        storage.reserve("reserve", 1 << 20)
        assert (tmp_path / "basin" / "reserve").stat().st_blocks * 512 >= 1 << 20


class TestHandles:
    def test_closing_and_forgetting_give_descriptors_back(self, storage: LocalStorage) -> None:
        before = open_descriptors()
        storage.create("a").append(b"x")
        files = [storage.open("a") for _ in range(5)]
        files[0].close()
        assert open_descriptors() == before + 4
        del files
        assert open_descriptors() == before
        kept = [storage.open("a"), storage.lock("lock"), storage.append_to("a", 1)]
        storage.close()
        assert open_descriptors() == before
        assert kept

    def test_closing_does_not_take_the_descriptor_from_a_reader_inside(
        self, storage: LocalStorage, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A thread in `pread` while another closes the file, and a third opens one that would get the same number."""
        storage.create("a").append(b"right")
        storage.create("b").append(b"wrong")
        reader = storage.open("a")
        inside, proceed = threading.Event(), threading.Event()
        pread = os.pread

        def slow(descriptor: int, size: int, offset: int) -> bytes:
            inside.set()
            proceed.wait(10)
            return pread(descriptor, size, offset)

        monkeypatch.setattr(os, "pread", slow)
        found: list[bytes] = []
        thread = threading.Thread(target=lambda: found.append(reader.read(0, 5)), daemon=True)
        thread.start()
        inside.wait(10)
        reader.close()
        other = storage.open("b")
        proceed.set()
        thread.join(10)
        assert found == [b"right"]
        other.close()

    def test_descriptors_are_not_inherited_by_programs(self, storage: LocalStorage) -> None:
        handles = [storage.create("a"), storage.open("a"), storage.lock("lock")]
        for handle in handles:
            descriptor = _descriptor(handle)
            assert fcntl.fcntl(descriptor, fcntl.F_GETFD) & fcntl.FD_CLOEXEC

    def test_a_lock_file_in_a_folder_without_write_permission_can_be_read(
        self, storage: LocalStorage, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        lock = storage.lock("lock")
        lock.acquire(0)
        lock.write(b"mark")
        lock.close()
        real = os.open

        def refuse_writing(path: str, flags: int, mode: int = 0o777) -> int:
            if flags & (os.O_RDWR | os.O_WRONLY):
                raise OSError(errno.EROFS, os.strerror(errno.EROFS))
            return real(path, flags, mode)

        monkeypatch.setattr(os, "open", refuse_writing)
        reader = storage.lock("lock")
        assert reader.read() == b"mark"
        with pytest.raises(ReadOnly):
            reader.write(b"x")
        with pytest.raises(ReadOnly):
            storage.create("a")


class TestProcesses:
    def test_a_lock_excludes_processes(self, storage: LocalStorage) -> None:
        """Four processes count in the lock file; without exclusion increments get lost."""
        script = (
            "import sys\n"
            "from basin.storage.local import LocalStorage\n"
            "lock = LocalStorage(sys.argv[1]).lock('log/lock')\n"
            "for _ in range(200):\n"
            "    lock.acquire(30)\n"
            "    number = int(lock.read() or b'0')\n"
            "    lock.write(b'%08d' % (number + 1))\n"
            "    lock.release()\n"
        )
        processes = [_start(script, _root(storage)) for _ in range(4)]
        assert [process.communicate(timeout=60)[0] for process in processes] == [""] * 4
        assert storage.lock("log/lock").read() == b"00000800"

    def test_a_killed_process_frees_its_lock(self, storage: LocalStorage) -> None:
        script = (
            "import sys, time\n"
            "from basin.storage.local import LocalStorage\n"
            "lock = LocalStorage(sys.argv[1]).lock('lock')\n"
            "lock.acquire(0)\n"
            "print('held', flush=True)\n"
            "time.sleep(600)\n"
        )
        process = _start(script, _root(storage))
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        lock = storage.lock("lock")
        with pytest.raises(StorageUnavailable):
            lock.acquire(0)
        process.kill()
        process.wait(10)
        process.stdout.close()
        lock.acquire(5)

    def test_put_if_absent_has_one_winner_among_processes(self, storage: LocalStorage) -> None:
        script = (
            "import sys\n"
            "from basin.errors import AlreadyExists\n"
            "from basin.storage.local import LocalStorage\n"
            "storage, won = LocalStorage(sys.argv[1]), 0\n"
            "for number in range(50):\n"
            "    try:\n"
            "        storage.put_if_absent(f'log/{number}', b'x' * 100)\n"
            "        won += 1\n"
            "    except AlreadyExists:\n"
            "        pass\n"
            "print(won)\n"
        )
        processes = [_start(script, _root(storage)) for _ in range(3)]
        won = [int(process.communicate(timeout=60)[0]) for process in processes]
        assert sum(won) == 50 == len(storage.list("log"))


class TestFork:
    def test_a_child_cannot_use_what_it_inherited(self, storage: LocalStorage) -> None:
        writer = storage.create("a")
        writer.append(b"x")
        reader, lock = storage.open("a"), storage.lock("lock")
        lock.acquire(0)
        numbers = [_descriptor(file) for file in (writer, reader, lock)]

        def in_child() -> None:
            for attempt in (
                lambda: writer.append(b"y"),
                writer.sync,
                lambda: reader.read(0, 1),
                reader.size,
                lambda: lock.acquire(0),
                lock.read,
                lambda: lock.write(b"x"),
                lambda: storage.open("a"),
                lambda: storage.create("b"),
            ):
                with pytest.raises(BasinClosed):
                    attempt()
            lock.release()
            lock.close()
            storage.close()
            for number in numbers:
                with pytest.raises(OSError, match="Bad file descriptor"):
                    os.fstat(number)

        assert _forked(in_child) == 0
        writer.append(b"z")
        assert reader.read(0, 2) == b"xz"

    def test_the_parent_keeps_its_lock(self, storage: LocalStorage) -> None:
        lock = storage.lock("lock")
        lock.acquire(0)
        root = _root(storage)

        def in_child() -> None:
            lock.close()
            with pytest.raises(StorageUnavailable):
                LocalStorage(root).lock("lock").acquire(0)

        assert _forked(in_child) == 0
        with pytest.raises(StorageUnavailable):
            LocalStorage(root).lock("lock").acquire(0)

    def test_a_lock_given_back_is_free_although_a_child_lives_on(self, storage: LocalStorage) -> None:
        """Closing the file would not do: a child that was forked by C code still holds it open."""
        lock = storage.lock("lock")
        lock.acquire(0)
        descriptor = os.dup(_descriptor(lock))  # stands for the child's copy
        lock.close()
        storage.lock("lock").acquire(0)
        os.close(descriptor)

    def test_a_child_may_open_its_own(self, storage: LocalStorage) -> None:
        storage.create("a").append(b"x")
        root = _root(storage)

        def in_child() -> None:
            own = LocalStorage(root)
            assert own.read_file("a", 1) == b"x"
            own.lock("lock").acquire(0)

        assert _forked(in_child) == 0


def test_waiting_for_a_lock_costs_little_time(storage: LocalStorage) -> None:
    held, waiting = storage.lock("lock"), storage.lock("lock")
    held.acquire(0)
    begin = time.process_time()
    with pytest.raises(StorageUnavailable):
        waiting.acquire(0.3)
    assert time.process_time() - begin < 0.15


def _root(storage: LocalStorage) -> str:
    return storage._root


def _descriptor(handle: object) -> int:
    """What an open file keeps to itself, looked at from inside."""
    return int(vars(handle)["_descriptor"])


def _start(script: str, root: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", script, root], stdout=subprocess.PIPE, text=True)


def _python(script: str, root: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", script, root], check=True, capture_output=True, text=True, timeout=60
    ).stdout


def _forked(action: Callable[[], None]) -> int:
    """Run `action` in a forked child; return its exit status."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            action()
            status = 0
        except BaseException as error:  # noqa: BLE001 (the child has nobody to raise to)
            os.write(2, repr(error).encode() + b"\n")
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
