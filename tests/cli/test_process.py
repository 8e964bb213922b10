"""The real entry point: exit codes, pipes, signals, terminals; one line in place of a traceback, whatever happens."""

from __future__ import annotations

import ctypes
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from basin import errors
from basin.cli import failures
from tests.cli.conftest import Run, Shell, environment
from tests.conftest import Spawn

COMMAND = [sys.executable, "-m", "basin.cli"]
HEAVY = {"basin.engine", "basin.format", "basin.api", "blake3", "cryptography", "fsspec", "msgpack", "numpy", "rich"}
NOT_FOR_READING = {
    *("basin.engine.compaction", "basin.engine.repair", "basin.engine.repair_log", "basin.engine.export"),
    *("basin.engine.ingest", "basin.engine.rounds", "asyncio", "fsspec", "importlib.metadata", "obstore", "pathspec"),
    *("numpy.typing", "rich", "ssl"),
}
GROUPS = ["init", "kv", "blob", "log", "stats", "check", "repair", "secret"]


def test_help_names_every_command(shell: Shell) -> None:
    text = shell("--help").stdout
    assert all(f"  {name} " in text for name in GROUPS)


@pytest.mark.parametrize("group", GROUPS)
def test_every_command_has_help_and_takes_json(run: Run, group: str) -> None:
    assert "--json" in run(group, "--help").stdout


def test_help_loads_neither_engine_nor_tables() -> None:
    code = "import sys; import basin.cli.main; print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert HEAVY.isdisjoint(found.stdout.split())


def test_a_command_that_reads_loads_nothing_but_what_reading_takes(shell: Shell, tmp_path: Path) -> None:
    """Each of these costs every command 5 to 30 ms."""
    key = {"BASIN_SECRET_FILE": str(tmp_path / "key")}
    shell("init", "--secret-file", str(tmp_path / "key"))
    code = "import sys; from basin.cli.main import main; main(['snapshots', '--json'], standalone_mode=False)"
    code += "; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment(tmp_path) | key
    ).stdout.split()
    assert "basin.engine.names" in loaded
    assert NOT_FOR_READING.isdisjoint(loaded)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_info"), reason="only glibc has a heap for each thread")
def test_all_threads_of_a_command_take_memory_from_one_heap() -> None:
    code = """
import ctypes, threading
from basin.cli.process import settle

settle()
all_at_once = threading.Barrier(4)
held = []

def work():
    held.append([bytes(50_000) for _ in range(50)])
    all_at_once.wait(30)

threads = [threading.Thread(target=work) for _ in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
libc = ctypes.CDLL(None)
libc.malloc_info(0, ctypes.c_void_p.in_dll(libc, "stdout"))
libc.fflush(None)
"""
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert told.count("<heap nr=") == 1


def test_version(shell: Shell) -> None:
    assert shell("--version").stdout.startswith("basin")


@pytest.mark.parametrize(
    "arguments", [("nonsense",), ("kv",), ("kv", "get"), ("kv", "scan", "--limit", "x"), ("--nope",)]
)
def test_wrong_usage_ends_with_2(run: Run, arguments: tuple[str, ...]) -> None:
    run(*arguments, code=2)


def test_no_basin_named_ends_with_2_and_says_how(run: Run) -> None:
    assert "$BASIN_URL" in run("kv", "scan", code=2, BASIN_URL="").stderr


def test_the_whole_way_as_processes(shell: Shell, tmp_path: Path) -> None:
    key = {"BASIN_SECRET_FILE": str(tmp_path / "key")}
    shell("init", "--secret-file", str(tmp_path / "key"))
    shell("kv", "put", "name", "-", stdin="value", **key)
    assert shell("kv", "get", "name", **key).stdout == "value"
    shell("kv", "put", "name", "other", "--if-absent", code=5, **key)
    assert shell("blob", "put", "/no/such", "-", code=4, stdin="x", **key).stderr.count("\n") == 2
    shell("check", **key)


def test_not_a_basin_is_one_line(shell: Shell) -> None:
    result = shell("kv", "scan", code=1)
    assert result.stderr.startswith("basin: ")
    assert "basin init" in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_wrong_passphrase_is_one_line_without_the_passphrase(shell: Shell) -> None:
    shell("init", BASIN_PASSPHRASE="good")
    result = shell("kv", "scan", code=1, BASIN_PASSPHRASE="wrong-passphrase")
    assert result.stderr.startswith("basin: ")
    assert result.stderr.count("\n") == 1
    assert "wrong-passphrase" not in result.stderr


def test_a_secret_file_that_is_not_there_is_one_line(shell: Shell) -> None:
    shell("init", "--open")
    result = shell("kv", "scan", code=2, BASIN_SECRET_FILE="/no/such/key")
    assert "/no/such/key" in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_damaged_log_ends_with_3_and_names_the_file(shell: Shell, tmp_path: Path) -> None:
    shell("init", "--open")
    shell("kv", "put", "name", "value")
    (segment,) = (tmp_path / "b" / "log").glob("*.log")
    data = bytearray(segment.read_bytes())
    data[len(data) // 2] ^= 1
    segment.write_bytes(data)
    result = shell("kv", "scan", code=3)
    assert segment.name in result.stderr
    assert result.stderr.count("\n") == 1


# The superuser writes to read-only folders, unless the two capabilities for that (1: override permissions, 2: read and
# search) are dropped from what the next program may inherit (prctl 24: PR_CAPBSET_DROP).
AS_ANYBODY = """
import ctypes, os, sys
for capability in (1, 2) if os.geteuid() == 0 else ():
    assert ctypes.CDLL(None).prctl(24, capability, 0, 0, 0) == 0
os.execv(sys.argv[1], sys.argv[1:])
"""


def test_a_read_only_folder_can_be_read_and_not_written(shell: Shell, tmp_path: Path) -> None:
    def as_anybody(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", AS_ANYBODY, *COMMAND, *arguments]
        return subprocess.run(
            command, env=environment(tmp_path), capture_output=True, text=True, timeout=60, check=False
        )

    shell("init", "--open")
    shell("kv", "put", "name", "value")
    folders = [tmp_path / "b", *(path for path in (tmp_path / "b").rglob("*") if path.is_dir())]
    for folder in folders:
        folder.chmod(0o555)
    try:
        assert as_anybody("kv", "get", "name").stdout == "value"
        refused = as_anybody("kv", "put", "name", "other")
    finally:
        for folder in folders:
            folder.chmod(0o755)
    assert refused.returncode == 1
    assert refused.stderr.startswith("basin: ")
    assert refused.stderr.count("\n") == 1


def test_a_closed_pipe_is_no_news(shell: Shell, tmp_path: Path, spawn: Spawn) -> None:
    shell("init", "--open")
    for number in range(3):
        shell("kv", "put", str(number), "-", stdin="x" * 200_000)
    process = spawn([*COMMAND, "kv", "scan"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(tmp_path))
    assert process.stdout is not None
    assert process.stderr is not None
    with process.stdout, process.stderr:
        process.stdout.read(10)
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.wait(60) == failures.EXIT_PIPE_CLOSED


def test_a_full_device_is_one_line(shell: Shell, tmp_path: Path) -> None:
    shell("init", "--open")
    shell("kv", "put", "name", "value")
    with Path("/dev/full").open("wb") as full:
        result = subprocess.run(
            [*COMMAND, "kv", "get", "name"],
            stdout=full,
            stderr=subprocess.PIPE,
            env=environment(tmp_path),
            text=True,
            timeout=60,
            check=False,
        )
    assert (result.returncode, result.stderr) == (1, "basin: No space left on device\n")


def test_an_interrupt_is_one_line_and_130(shell: Shell, tmp_path: Path, spawn: Spawn) -> None:
    shell("init", "--open")
    process = spawn(
        [*COMMAND, "blob", "put", "-"], stdin=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(tmp_path)
    )
    assert process.stdin is not None
    assert process.stderr is not None
    with process.stdin, process.stderr:
        process.stdin.write(b"x" * 100_000)  # more than a pipe holds: returns when the command has begun to read
        process.stdin.flush()
        time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == failures.EXIT_INTERRUPTED
        assert process.stderr.read() == b"basin: interrupted; what was acknowledged is kept\n"
    assert shell("blob", "ls").stdout == ""


def test_a_terminal_is_asked_for_the_passphrase_and_shows_none(shell: Shell, tmp_path: Path, spawn: Spawn) -> None:
    answers = ["horse", "horse"]
    assert "created encrypted basin" in at_terminal(spawn, tmp_path, answers, "init")
    shell("kv", "put", "name", "value", BASIN_PASSPHRASE="horse")
    shown = at_terminal(spawn, tmp_path, ["horse"], "kv", "get", "name")
    assert shown.splitlines()[-1] == "value"
    assert "horse" not in shown
    assert "basin: " in at_terminal(spawn, tmp_path, ["donkey"], "kv", "get", "name")


def at_terminal(spawn: Spawn, folder: Path, answers: list[str], *arguments: str) -> str:
    """Run a command at a terminal of its own, answering each prompt; return all that the terminal showed."""
    # A process of its own, because `pty.spawn` forks; the answer waits for the prompt, because asking drops what was
    # typed before.
    wrapper = [sys.executable, "-c", f"import pty; pty.spawn({[*COMMAND, *arguments]!r})"]
    process = spawn(wrapper, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment(folder))
    assert process.stdin is not None
    assert process.stdout is not None
    with process.stdin, process.stdout:
        shown = b""
        for answer in answers:
            while not shown.endswith(b": "):
                shown += process.stdout.read(1) or pytest.fail(f"no prompt after {shown!r}")
            process.stdin.write(answer.encode() + b"\n")
            process.stdin.flush()
            shown += b"\n"
        shown += process.stdout.read()
    process.wait(60)
    return str(shown, "utf-8")


def test_every_error_of_the_engine_has_an_exit_code(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.BasinError)]
    codes = {}
    for kind in kinds:

        def refuse(*_arguments: object, kind: type[errors.BasinError] = kind) -> None:
            raise kind("a\nproblem \x1b[31m")

        monkeypatch.setattr("basin.cli.common.Target.open", refuse)
        special = {errors.InvalidArgument: 2, errors.Conflict: 5}
        code = 3 if issubclass(kind, errors.CorruptionError) else special.get(kind, 1)
        result = run("stats", code=code)
        assert result.stderr.startswith("basin: a problem \\x1b[31m")
        assert result.stderr.count("\n") == 1
        codes[kind] = code
    assert len(codes) > 20


def test_a_mistake_of_the_program_is_one_line_too(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_arguments: object) -> None:
        raise ZeroDivisionError("oh")

    monkeypatch.setattr("basin.cli.common.Target.open", fail)
    result = run("stats", code=1)
    assert result.stderr.startswith("basin: internal error: ZeroDivisionError: oh; ")
