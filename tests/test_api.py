"""`basin.open` and the handle: modes, secrets, wrong calls, and faults that a user meets."""

from __future__ import annotations

import copy
import json
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import basin
from basin.api import open_storage
from basin.errors import (
    AlreadyExists,
    BasinClosed,
    BasinError,
    BasinPoisoned,
    ContentNotFound,
    InvalidArgument,
    NameNotFound,
    NotABasin,
    ReadOnly,
    RollbackDetected,
    SecretRequired,
    StorageError,
    UnsupportedVersion,
    WrongSecret,
)
from basin.storage.local import LocalStorage
from basin.testing.faults import Fault, FaultStorage
from tests.conftest import Spawn
from tests.source_tree import ROOT

SECRET = basin.Secret.generate()
OTHER = basin.Secret.generate()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "basin"


def make(folder: Path, **names: bytes) -> None:
    with basin.open(folder, "x", secret=SECRET) as db:
        db.update(names)


# --- opening ----------------------------------------------------------------------------------------------------------


def test_modes(folder: Path) -> None:
    for mode in ("r", "w"):
        with pytest.raises(NotABasin):
            basin.open(folder, mode, secret=SECRET)
        assert not folder.exists()
    with basin.open(folder, "c", secret=SECRET) as db:
        db["a"] = b"1"
    with pytest.raises(AlreadyExists):
        basin.open(folder, "x", secret=SECRET)
    with basin.open(folder, "c", secret=SECRET) as db:
        assert db["a"] == b"1"
        key = db.blobs.put(b"content")
        db.keyspace("space")["b"] = b"2"
    with basin.open(folder, "r", secret=SECRET) as db:
        with pytest.raises(ReadOnly):
            db["a"] = b"2"
        with pytest.raises(ReadOnly):
            db.batch()
        with pytest.raises(ReadOnly):
            db.commit()
        assert db["a"] == b"1"
    with basin.open(folder, "n", secret=SECRET) as db:
        assert dict(db) == {}
        assert db.keyspaces() == []
        assert list(db.blobs) == []
        assert db.blobs.get(key) == b"content"
        db["c"] = b"3"
    with basin.open(folder, "w", secret=SECRET) as db:
        assert dict(db) == {b"c": b"3"}


@pytest.mark.parametrize("mode", ["", "rw", "a", None, 1, "C"])
def test_wrong_modes(folder: Path, mode: Any) -> None:
    with pytest.raises(InvalidArgument):
        basin.open(folder, mode, secret=SECRET)
    assert not folder.exists()


@pytest.mark.parametrize(
    "options",
    [
        {"unknown": 1},
        {"memtable_size": "1"},
        {"memtable_size": 1.5},
        {"memtable_size": -1},
        {"inline_max": True},
        {"sync": "always"},
        {"part_max": 100, "part_size": 200},
        {"refresh_interval_s": float("nan")},
        {"storage_options": {"key": "value"}},
        {"profile": "closed"},
    ],
)
def test_wrong_options(folder: Path, options: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument):
        basin.open(folder, "c", secret=SECRET, **options)
    assert not (folder / "basin.json").exists()


def test_stored_options_cannot_be_changed_later(folder: Path) -> None:
    basin.open(folder, profile="open", inline_max=7).close()
    with basin.open(folder, "w", memtable_size=4096) as db:
        db["a"] = b"12345678"
        assert db.ref("a") is not None
    with pytest.raises(InvalidArgument) as caught:
        basin.open(folder, inline_max=8)
    assert caught.value.option == "inline_max"


@pytest.mark.parametrize("url", ["", b"folder", 1, None, "nosuch://bucket/x"])
def test_wrong_urls(url: Any) -> None:
    with pytest.raises((InvalidArgument, TypeError)):
        basin.open(url, profile="open")


def test_a_file_url_and_a_path_are_the_same(tmp_path: Path) -> None:
    folder = tmp_path / "a name with spaces and é"
    basin.open(folder.as_uri(), profile="open").close()
    with basin.open(str(folder), "r") as db:
        assert len(db) == 0


def test_creating_needs_a_secret_or_the_open_profile(folder: Path) -> None:
    for wrong in ({}, {"secret": SECRET, "profile": "open"}, {"profile": "encrypted"}):
        with pytest.raises(InvalidArgument):
            basin.open(folder, **wrong)
    assert not (folder / "basin.json").exists()


def test_secrets_that_do_not_fit(folder: Path, tmp_path: Path) -> None:
    make(folder, a=b"1")
    with pytest.raises(SecretRequired):
        basin.open(folder)
    with pytest.raises(WrongSecret):
        basin.open(folder, secret=OTHER)
    with pytest.raises(WrongSecret):
        basin.open(folder, secret="a passphrase that was never set")
    with pytest.raises(InvalidArgument):
        basin.open(folder, secret=SECRET, profile="open")
    basin.open(tmp_path / "plain", profile="open").close()
    with pytest.raises(BasinError):
        basin.open(tmp_path / "plain", secret=SECRET)
    with basin.open(folder, secret=SECRET) as db:
        assert db["a"] == b"1"


def test_a_str_is_a_passphrase(folder: Path) -> None:
    with basin.open(folder, secret="correct horse") as db:
        db["a"] = b"1"
    with basin.open(folder, "r", secret=basin.Secret.from_passphrase("correct horse")) as db:
        assert db["a"] == b"1"


def test_what_is_not_a_basin(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "something").write_text("x")
    for place in ("file", "full"):
        for mode in ("r", "w", "c"):
            with pytest.raises((NotABasin, StorageError)) as caught:
                basin.open(tmp_path / place, mode, profile="open")
            assert place in str(caught.value)
    assert sorted(path.name for path in (tmp_path / "full").iterdir()) == ["something"]


def test_a_newer_format_is_refused(folder: Path) -> None:
    make(folder)
    path = folder / "basin.json"
    fields = json.loads(path.read_text(encoding="utf-8"))
    number = next(name for name, value in fields.items() if name in ("format", "version"))
    path.write_text(json.dumps({**fields, number: 99}), encoding="utf-8")
    with pytest.raises(BasinError) as caught:
        basin.open(folder, secret=SECRET)
    assert isinstance(caught.value, UnsupportedVersion) or "basin.json" in str(caught.value)


def test_a_folder_that_cannot_be_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(folder, a=b"1")
    monkeypatch.setattr(LocalStorage, "writable", lambda _: False)
    for mode in ("w", "c", "n"):
        with pytest.raises(ReadOnly) as caught:
            basin.open(folder, mode, secret=SECRET)
        assert str(folder) in str(caught.value)
    with basin.open(folder, "r", secret=SECRET) as db:
        assert dict(db) == {b"a": b"1"}


NOBODY = """
import os, sys, basin
def read():
    with basin.open(sys.argv[1], "r") as db:
        return db["a"].decode(), len(db.blobs.get_many(list(db.blobs)))
read()  # Everything is imported now: the interpreter's own files may not be readable for nobody.
os.setuid(65534)
try:
    basin.open(sys.argv[1], "w")
except basin.errors.ReadOnly as error:
    print(sys.argv[1] in str(error), *read())
"""


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder that everybody may look into; those of pytest are its user's own."""
    with tempfile.TemporaryDirectory() as place:
        Path(place).chmod(0o755)
        yield Path(place)


@pytest.mark.root
def test_a_reader_needs_no_permission_to_write(public: Path) -> None:
    folder = public / "basin"
    with basin.open(folder, profile="open") as db:
        db["a"] = b"1"
        db.blobs.put(b"content" * 1000)
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    command = [sys.executable, "-c", NOBODY, str(folder)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.stdout == "True 1 1\n", done.stderr


HIDDEN = """
import os, sys, basin
with basin.open(sys.argv[1], "r"):
    os.setuid(65534)
for mode in "rwc":
    try:
        basin.open(sys.argv[1], mode, profile="open")
    except (basin.errors.StorageError, basin.errors.ReadOnly) as error:
        print(sys.argv[1] in str(error))
"""


@pytest.mark.root
def test_a_folder_that_cannot_be_looked_into(public: Path) -> None:
    (public / "hidden").mkdir(0o700)
    basin.open(public / "hidden" / "basin", profile="open").close()
    command = [sys.executable, "-c", HIDDEN, str(public / "hidden" / "basin")]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.stdout == "True\n" * 3, done.stderr


def test_a_rolled_back_basin_is_detected(folder: Path, tmp_path: Path) -> None:
    make(folder, a=b"1")
    subprocess.run(["cp", "-r", folder, tmp_path / "old"], check=True)
    with basin.open(folder, secret=SECRET) as db:
        first = db.head
        db["a"] = b"2"
    with basin.open(folder, "r", secret=SECRET, expect_head=first) as db:
        head = db.head
    with basin.open(folder, "r", secret=SECRET, expect_head=head) as db:
        assert db["a"] == b"2"
    with pytest.raises(RollbackDetected) as caught:
        basin.open(tmp_path / "old", "r", secret=SECRET, expect_head=head)
    assert caught.value.expected == head
    forked = basin.Head(first.position, bytes(32))
    with pytest.raises(RollbackDetected):
        basin.open(folder, "r", secret=SECRET, expect_head=forked)


# --- wrong calls ------------------------------------------------------------------------------------------------------


def test_names_and_values(folder: Path) -> None:
    with basin.open(folder, profile="open") as db:
        longest = b"n" * 65_535
        db[longest] = b"1"
        db[b""] = b"empty"
        db.put("é", bytearray(b"2"))  # type: ignore[arg-type]  # taken as well
        assert db["é".encode()] == db["é"] == b"2"
        assert db[memoryview(b"")] == b"empty"  # type: ignore[index]  # taken as well
        wrong: list[Any] = [b"n" * 65_536, "é" * 33_000, "\ud800", 1, None, ("a",), 1.5]
        for name in wrong:
            for call in (db.get, db.delete, db.ref, lambda name: db.put(name, b""), lambda name: name in db):
                with pytest.raises(InvalidArgument):
                    call(name)
            with pytest.raises(InvalidArgument):
                db.put_many([(b"good", b"1"), (name, b"1")])
        for value in (*wrong[3:], "text", [b"a"]):
            with pytest.raises(InvalidArgument):
                db["a"] = value
            with pytest.raises(InvalidArgument):
                db.put_many([(b"good", b"1"), (b"a", value)])
        with pytest.raises(ContentNotFound):
            db["a"] = basin.Ref(basin.ContentKey(bytes(32)))
        assert set(db) == {longest, b"", "é".encode()}
        with pytest.raises(NameNotFound) as caught:
            db["absent"]
        assert caught.value.name == "absent"
        assert isinstance(caught.value, KeyError)
        for limit in (-1, 1.5, True):
            with pytest.raises(InvalidArgument):
                db.scan(limit=limit)  # type: ignore[arg-type]  # wrong on purpose


def test_keyspaces_are_apart_and_keep_their_codecs(folder: Path) -> None:
    with basin.open(folder, profile="open") as db:
        numbers = db.keyspace("numbers", order="u64", values="json")
        numbers.update({3: {"a": [1, None]}, 2**64 - 1: "last", 0: 0.5})
        db["numbers"] = b"not in there"
        assert list(numbers) == [0, 3, 2**64 - 1]
        assert list(db) == [b"numbers"]
        for wrong in (-1, 2**64, "1", b"1", 1.0, True):
            with pytest.raises(InvalidArgument):
                numbers[wrong] = 1
        for value in (b"bytes", object(), float("nan"), {1, 2}):
            with pytest.raises(InvalidArgument):
                numbers[1] = value
        for name in ("", "basin.x", 1, None, "n" * 256):
            with pytest.raises(InvalidArgument):
                db.keyspace(name)  # type: ignore[arg-type]  # wrong on purpose
        for codecs in ({"order": "float"}, {"values": "pickle"}, {"order": "bytes"}):
            with pytest.raises(InvalidArgument):
                db.keyspace("numbers", **codecs)
        with pytest.raises(NameNotFound):
            db.drop_keyspace("absent")
        assert db.keyspaces() == ["numbers"]
    with basin.open(folder, "r") as db:
        assert dict(db.keyspace("numbers")) == {0: 0.5, 3: {"a": [1, None]}, 2**64 - 1: "last"}
        with pytest.raises(NameNotFound):
            db.keyspace("new")


def test_a_prefix_of_tuples_ends_with_an_element(folder: Path) -> None:
    with basin.open(folder, profile="open") as db:
        space = db.keyspace("space", order="tuple")
        names = [
            ("a",),
            ("a", None),
            ("a", "b", 1),
            ("a\0",),
            ("a\0b", 1),
            ("ab",),
            (b"a",),
            (b"a\0",),
            (1,),
            (1, 2),
            (256,),
        ]
        space.update(dict.fromkeys(names, b"v"))
        for prefix in [("a",), ("a", "b"), (b"a",), (1,), (), ("a\0",)]:
            wanted = {name for name in names if name[: len(prefix)] == prefix}
            assert set(space.scan(prefix=prefix, keys_only=True)) == wanted
            assert set(space.scan(prefix=prefix, keys_only=True, reverse=True)) == wanted


def test_a_dropped_keyspace_comes_back_empty(folder: Path) -> None:
    with basin.open(folder, profile="open") as db:
        db.keyspace("a")["name"] = b"1"
        db.drop_keyspace("a")
        assert dict(db.keyspace("a", order="u64")) == {}
        db.keyspace("a")[5] = b"2"
        assert db.keyspaces() == ["a"]
        assert dict(db.keyspace("a")) == {5: b"2"}


# --- the handle -------------------------------------------------------------------------------------------------------


def test_a_handle_is_neither_pickled_nor_copied(folder: Path) -> None:
    with basin.open(folder, profile="open") as db:
        for act in (pickle.dumps, copy.copy, copy.deepcopy):
            with pytest.raises(TypeError, match="ticket"):
                act(db)


def test_errors_and_keys_can_be_pickled() -> None:
    error = NameNotFound("no such name", name=b"a")
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), again.name) == (NameNotFound, "no such name", b"a")
    key = basin.ContentKey(bytes(32))
    assert pickle.loads(pickle.dumps(key)) == key


def test_a_closed_handle_says_so(folder: Path) -> None:
    db = basin.open(folder, profile="open")
    view = db.view()
    key = db.blobs.put(b"content")
    db.close()
    db.close()
    assert db.closed
    calls: list[Callable[[], Any]] = [
        lambda: db["a"],
        lambda: db.get("a"),
        lambda: db.put("a", b"1"),
        lambda: list(db),
        db.commit,
        db.refresh,
        lambda: db.head,
        db.view,
        db.batch,
        db.transaction,
        db.stats,
        lambda: view.get("a"),
        lambda: db.blobs.put(b"x"),
        lambda: db.blobs[key],
        lambda: list(db.check()),
    ]
    for number, call in enumerate(calls):
        with pytest.raises(BasinClosed):
            call()
            pytest.fail(f"call {number} went through")


def test_leaving_with_commits_also_after_an_exception(folder: Path) -> None:
    with pytest.raises(ZeroDivisionError), basin.open(folder, profile="open") as db:
        db["a"] = b"1"
        raise ZeroDivisionError
    with basin.open(folder, "r") as db:
        assert dict(db) == {b"a": b"1"}


def test_changes_become_durable_by_themselves(folder: Path) -> None:
    with basin.open(folder, profile="open", sync_interval_s=0.02) as db:
        db["a"] = b"1"
        with basin.open(folder, "r", refresh_interval_s=0.0) as reader:
            waited = threading.Event()
            for _ in range(500):
                if b"a" in reader:
                    break
                waited.wait(0.02)
            assert reader["a"] == b"1"


@pytest.mark.parametrize("sync", ["interval", "never"])
def test_the_weaker_kinds_of_sync(folder: Path, sync: Any) -> None:
    with basin.open(folder, profile="open", sync=sync, sync_interval_s=0.02) as db:
        for number in range(50):
            db[f"{number}"] = b"x" * 1000
            db.commit()
        with db.batch() as batch:
            batch["batch"] = b"1"
    with basin.open(folder, "r") as db:
        assert len(db) == 51


def test_stats_are_plain_data(folder: Path) -> None:
    with basin.open(folder, secret=SECRET) as db:
        db["a"] = b"1"
        db.blobs.put_many([b"x" * 1000, b"x" * 1000])
        db.commit()
        stats = db.stats()
        assert json.loads(json.dumps(stats)) == stats
        assert stats["position"] == db.head.position
        assert stats["profile"] == "encrypted"
        assert (stats["written"]["blobs_new"], stats["written"]["blobs_duplicate"]) == (1, 1)


def test_no_outcome_is_unknown_on_a_disk(folder: Path) -> None:
    with basin.open(folder, profile="open") as db, pytest.raises(InvalidArgument):
        db.resolve(b"token")


# --- faults -----------------------------------------------------------------------------------------------------------


def test_after_a_failed_sync_the_handle_is_read_only_until_reopened(folder: Path) -> None:
    failing = False

    def plan(_: int, operation: str, name: str) -> Fault | None:
        return Fault.SYNC_LOST if failing and operation == "sync" and name.startswith("log/") else None

    storage = FaultStorage(LocalStorage(folder, create=True), plan)
    options = {"sync_interval_s": 3600.0, "reserve_size": 0}
    db = open_storage(storage, str(folder), profile="open", options=options)
    db["a"] = b"1"
    db.commit()
    failing = True
    db["b"] = b"2"
    with pytest.raises(StorageError) as caught:
        db.commit()
    failing = False
    assert [name[4:] for name in caught.value.dropped] == [b"b"]
    for call in (db.commit, lambda: db.put("c", b"3"), db.batch, lambda: db.blobs.put(b"x")):
        with pytest.raises(BasinPoisoned):
            call()
    assert dict(db) == {b"a": b"1"}
    db.close()
    with basin.open(folder) as db:
        assert db["a"] == b"1"
        assert set(db) <= {b"a", b"b"}
        db["c"] = b"3"


TOO_MANY_FILES = """
import resource, sys, basin
folder = sys.argv[1]
with basin.open(folder, profile="open", stratum_size=4096) as db:
    for number in range(60):
        db.put(b"%d" % number, bytes([number]) * 5000)
    db.commit()
held = []
soft = int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, soft))
try:
    while True:
        held.append(open("/dev/null"))
except OSError:
    pass
for file in held[: int(sys.argv[3])]:
    file.close()
try:
    with basin.open(folder) as db:
        db["new"] = b"x" * 5000
        assert len(dict(db)) == 61
    print("done")
except basin.errors.StorageError as error:
    print(type(error).__name__, error.fields.get("errno"))
for file in held:
    file.close()
with basin.open(folder) as db:
    assert len(db) in (60, 61)
    assert all(len(value) == 5000 for value in db.values())
    assert not [finding for finding in db.check() if finding.severity == "damage"]
"""


@pytest.mark.parametrize("left", [0, 1, 2, 3, 5, 8, 40])
def test_too_many_open_files(folder: Path, left: int) -> None:
    command = [sys.executable, "-c", TOO_MANY_FILES, str(folder), "64", str(left)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] in ("done", "StorageError", "StorageUnavailable")
    assert (left < 40) or done.stdout == "done\n"


INTERRUPTED = """
import os, signal, sys, basin
with basin.open(sys.argv[1], profile="open", memtable_size=20000) as db:
    print("ready", flush=True)
    number = 0
    try:
        while True:
            with db.batch() as batch:
                batch[f"{number}/a"] = os.urandom(700)
                batch[f"{number}/b"] = b"x"
            print(number, flush=True)
            number += 1
    except KeyboardInterrupt:
        pass
"""


def test_an_interrupt_anywhere_leaves_a_basin_that_reopens(folder: Path, spawn: Spawn) -> None:
    acknowledged = -1
    for turn in range(3):
        command = [sys.executable, "-c", INTERRUPTED.replace("number = 0", f"number = {1000 * turn}"), str(folder)]
        process = spawn(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        for _ in range(5 + 20 * turn):
            acknowledged = int(process.stdout.readline())
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
        acknowledged = int(output.split()[-1]) if output.split() else acknowledged
        with basin.open(folder) as db:
            assert b"%d/a" % acknowledged in db
            names = {name.rpartition(b"/")[0] for name in db}
            assert len(db) == 2 * len(names)
            assert [finding for finding in db.check() if finding.severity == "damage"] == []
