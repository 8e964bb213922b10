"""`basin init` and `basin secret`: who may open what, and that no secret ever stands in argv."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import click
import pytest

from basin.cli.main import main
from tests.cli.conftest import Run

GOOD = {"BASIN_PASSPHRASE": "correct horse"}
WRONG = {"BASIN_PASSPHRASE": "battery staple"}


@pytest.fixture
def keyed(run: Run, tmp_path: Path) -> dict[str, str]:
    """A basin created with a key file; the variables that open it."""
    run("init", "--secret-file", str(tmp_path / "key"))
    return {"BASIN_SECRET_FILE": str(tmp_path / "key")}


def test_init_open_needs_no_secret_afterwards(run: Run) -> None:
    assert json.loads(run("init", "--open", "--json").stdout)["profile"] == "open"
    run("kv", "put", "name", "value")
    assert run("kv", "get", "name").stdout == "value"


def test_init_with_a_passphrase(run: Run) -> None:
    assert json.loads(run("init", "--json", **GOOD).stdout)["profile"] == "encrypted"
    run("kv", "put", "name", "value", **GOOD)
    assert run("kv", "get", "name", **GOOD).stdout == "value"
    assert "secret" in run("kv", "get", "name", code=1, **WRONG).stderr


def test_init_without_any_secret_or_terminal_says_what_to_do(run: Run, tmp_path: Path) -> None:
    assert "$BASIN_PASSPHRASE" in run("init", code=1).stderr
    assert not (tmp_path / "b").exists()


def test_init_creates_a_key_file_for_its_owner_alone(run: Run, keyed: dict[str, str], tmp_path: Path) -> None:
    assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o600
    run("kv", "put", "name", "value", **keyed)
    assert run("kv", "get", "name", **keyed).stdout == "value"


def test_init_uses_a_key_file_that_is_there(run: Run, keyed: dict[str, str], tmp_path: Path) -> None:
    before = (tmp_path / "key").read_bytes()
    run("-b", str(tmp_path / "other"), "init", "--secret-file", str(tmp_path / "key"))
    assert (tmp_path / "key").read_bytes() == before
    run("-b", str(tmp_path / "other"), "kv", "put", "name", "value", **keyed)


def test_init_twice_is_an_error_and_leaves_no_key_file(run: Run, tmp_path: Path) -> None:
    run("init", "--open")
    run("init", "--open", code=1)
    run("init", "--secret-file", str(tmp_path / "key"), code=1)
    assert not (tmp_path / "key").exists()
    run("kv", "scan")


def test_init_refuses_a_key_file_that_others_may_read(run: Run, tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(b"0" * 64)
    (tmp_path / "key").chmod(0o644)
    assert "chmod" in run("init", "--secret-file", str(tmp_path / "key"), code=2).stderr


def test_open_and_a_secret_exclude_each_other(run: Run, tmp_path: Path) -> None:
    run("init", "--open", "--secret-file", str(tmp_path / "key"), code=2)
    assert "$BASIN_PASSPHRASE" in run("init", "--open", code=2, **GOOD).stderr
    assert not (tmp_path / "b").exists()


def test_a_missing_secret_is_one_line(run: Run, keyed: dict[str, str]) -> None:
    result = run("kv", "scan", code=1)
    assert "$BASIN_SECRET_FILE" in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_secret_for_an_open_basin_is_an_error(run: Run) -> None:
    run("init", "--open")
    run("kv", "scan", code=2, **GOOD)


def test_list_shows_the_slots_and_no_secret(run: Run, keyed: dict[str, str]) -> None:
    (slot,) = map(json.loads, run("secret", "list", "--json", **keyed).stdout.splitlines())
    assert set(slot) == {"slot", "kind", "created", "generations", "valid", "current", "problem"}
    assert (slot["valid"], slot["current"], slot["problem"]) == (True, True, None)
    assert run("secret", "list", **keyed).stdout.split("\t")[0] == slot["slot"]


def test_add_lets_a_second_secret_in(run: Run, keyed: dict[str, str], tmp_path: Path) -> None:
    run("kv", "put", "name", "value", **keyed)
    second = {"BASIN_SECRET_FILE": str(tmp_path / "second")}
    added = json.loads(run("secret", "add", "--secret-file", str(tmp_path / "second"), "--json", **keyed).stdout)
    assert run("kv", "get", "name", **second).stdout == "value"
    slots = [json.loads(line)["slot"] for line in run("secret", "list", "--json", **second).stdout.splitlines()]
    assert len(slots) == 2
    assert added["slot"] in slots


def test_add_takes_a_passphrase_from_the_environment(run: Run, keyed: dict[str, str]) -> None:
    run("secret", "add", **keyed, BASIN_NEW_PASSPHRASE=GOOD["BASIN_PASSPHRASE"])
    run("kv", "scan", **GOOD)


def test_add_without_a_new_secret_or_terminal_says_what_to_do(run: Run, keyed: dict[str, str]) -> None:
    assert "$BASIN_NEW_PASSPHRASE" in run("secret", "add", code=1, **keyed).stderr


def test_remove_shuts_a_secret_out(run: Run, keyed: dict[str, str], tmp_path: Path) -> None:
    second = {"BASIN_SECRET_FILE": str(tmp_path / "second")}
    added = json.loads(run("secret", "add", "--secret-file", str(tmp_path / "second"), "--json", **keyed).stdout)
    run("secret", "remove", added["slot"], **keyed)
    run("kv", "scan", code=1, **second)
    run("kv", "scan", **keyed)


def test_the_last_slot_stays(run: Run, keyed: dict[str, str]) -> None:
    slot = json.loads(run("secret", "list", "--json", **keyed).stdout)["slot"]
    run("secret", "remove", slot, code=2, **keyed)
    run("kv", "scan", **keyed)


def test_remove_of_a_slot_that_is_not_there_is_one_line(run: Run, keyed: dict[str, str]) -> None:
    assert "0123" in run("secret", "remove", "0123", code=2, **keyed).stderr


def test_rotate_starts_a_generation_and_old_values_stay(run: Run, keyed: dict[str, str]) -> None:
    run("kv", "put", "old", "value", **keyed)
    first = json.loads(run("secret", "rotate", "--json", **keyed).stdout)["generation"]
    run("kv", "put", "new", "value", **keyed)
    second = json.loads(run("secret", "rotate", "--json", **keyed).stdout)["generation"]
    assert first < second
    assert run("kv", "scan", "--keys-only", **keyed).stdout == "new\nold\n"


def generations(run: Run, keyed: dict[str, str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run("secret", "list", "--generations", "--json", **keyed).stdout.splitlines()]


def test_list_shows_generations_and_what_needs_them(run: Run, keyed: dict[str, str]) -> None:
    run("blob", "put", "-", stdin=b"content " * 100, **keyed)
    assert generations(run, keyed) == [{"generation": 0, "current": True, "uses": []}]
    run("secret", "rotate", **keyed)
    old, new = generations(run, keyed)
    assert (new["generation"], new["current"]) == (1, True)
    assert {use["kind"] for use in old["uses"]} == {"strata", "records of history", "pieces of log"}
    assert all(use["count"] > 0 and use["advice"] for use in old["uses"])
    first, second = run("secret", "list", "--generations", **keyed).stdout.splitlines()
    assert first.startswith("0\tneeded by ")
    assert second == "1\tcurrent"


def test_a_generation_that_is_needed_is_not_dropped_and_one_line_says_what_to_do(
    run: Run, keyed: dict[str, str]
) -> None:
    run("blob", "put", "-", stdin=b"content " * 100, **keyed)
    run("secret", "drop-generation", "0", code=2, **keyed)
    run("secret", "rotate", **keyed)
    for arguments in ((), ("0",), ("0", "--forget-history")):
        refused = run("secret", "drop-generation", *arguments, code=2, **keyed).stderr
        assert "basin-compact" in refused
        assert refused.count("\n") == 1
    assert len(generations(run, keyed)) == 2


def test_drop_generation_ends_a_rotation(run: Run, keyed: dict[str, str], tmp_path: Path) -> None:
    run("kv", "put", "name", "value", **keyed)
    assert run("secret", "drop-generation", **keyed).stdout == "there is no older generation\n"
    run("secret", "rotate", **keyed)
    assert "--forget-history" in run("secret", "drop-generation", code=2, **keyed).stderr
    dropped = run("secret", "drop-generation", "--forget-history", "--json", **keyed)
    assert json.loads(dropped.stdout) == {"dropped": [0]}
    assert [found["generation"] for found in generations(run, keyed)] == [1]
    assert sorted(path.name for path in (tmp_path / "b" / "keys").glob("*/*")) == ["0000000001", "slot.json"]
    assert run("kv", "get", "name", **keyed).stdout == "value"
    assert run("secret", "drop-generation", "0", **keyed).stdout == "there is no such generation any more\n"
    run("check", **keyed)


def test_no_command_takes_a_secret_as_an_argument() -> None:
    def parameters(command: click.Command) -> set[str]:
        names = {parameter.name or "" for parameter in command.params}
        if isinstance(command, click.Group):
            names = names.union(*(parameters(child) for child in command.commands.values()))
        return names

    suspicious = {name for name in parameters(main) if "pass" in name or "secret" in name or "password" in name}
    assert suspicious == {"secret_file"}
