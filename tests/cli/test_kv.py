"""`basin kv`: values come back as they went in, names sort as bytes, and every failure is one line."""

from __future__ import annotations

import base64
import json
import os
import time
from pathlib import Path
from typing import Any

import click.testing

import basin
from tests.cli.conftest import Run


def lines(result: click.testing.Result) -> list[Any]:
    """The JSON objects a command printed."""
    return [json.loads(line) for line in result.stdout.splitlines()]


def fill(run: Run, **values: str) -> None:
    for name, value in values.items():
        run("kv", "put", name, value)


def test_get_prints_the_value_and_not_a_byte_more(opened: Run) -> None:
    opened("kv", "put", "name", "value")
    assert opened("kv", "get", "name").stdout_bytes == b"value"


def test_put_reads_standard_input_byte_by_byte(opened: Run) -> None:
    data = bytes(range(256)) * 20
    opened("kv", "put", "name", "-", stdin=data)
    assert opened("kv", "get", "name").stdout_bytes == data


def test_put_reads_a_file(opened: Run, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"\x00\xff\n")
    opened("kv", "put", "name", f"@{source}")
    assert opened("kv", "get", "name").stdout_bytes == b"\x00\xff\n"


def test_put_names_the_file_that_it_cannot_read(opened: Run) -> None:
    result = opened("kv", "put", "name", "@/no/such/file", code=1)
    assert result.stderr == "basin: cannot read /no/such/file: No such file or directory\n"


def test_an_empty_value_is_a_value(opened: Run) -> None:
    opened("kv", "put", "name", "")
    assert opened("kv", "get", "name").stdout_bytes == b""
    assert opened("kv", "scan").stdout == "name\t\n"


def test_get_of_a_missing_name_is_one_line_and_exit_1(opened: Run) -> None:
    assert opened("kv", "get", "nobody", code=1).stderr == "basin: no such name: nobody\n"


def test_get_in_json(opened: Run) -> None:
    opened("kv", "put", "name", "-", stdin=b"\xff")
    assert lines(opened("kv", "get", "name", "--json")) == [{"name": "name", "value_base64": "/w=="}]


def test_json_is_taken_before_and_after_the_command(opened: Run) -> None:
    opened("kv", "put", "name", "value")
    expected = [{"name": "name", "value": "value"}]
    assert lines(opened("--json", "kv", "get", "name")) == expected
    assert lines(opened("kv", "--json", "get", "name")) == expected
    assert lines(opened("kv", "get", "--json", "name")) == expected


def test_put_in_json_tells_the_position(opened: Run) -> None:
    (first,) = lines(opened("kv", "put", "a", "12345", "--json"))
    (second,) = lines(opened("kv", "put", "b", "", "--json"))
    assert (first["name"], second["name"]) == ("a", "b")
    assert first["position"] < second["position"]


def test_get_at_a_position_shows_the_past(opened: Run) -> None:
    (first,) = lines(opened("kv", "put", "name", "old", "--json"))
    opened("kv", "put", "name", "new")
    assert opened("kv", "get", "name", "--at", str(first["position"])).stdout == "old"
    assert opened("kv", "get", "name").stdout == "new"


def test_put_if_absent_of_a_present_name_is_a_conflict(opened: Run) -> None:
    opened("kv", "put", "name", "first", "--if-absent")
    assert "name" in opened("kv", "put", "name", "second", "--if-absent", code=5).stderr
    assert opened("kv", "get", "name").stdout == "first"


def test_a_name_with_a_ttl_expires(opened: Run) -> None:
    opened("kv", "put", "short", "value", "--ttl", "0.05")
    opened("kv", "put", "long", "value", "--ttl", "3600")
    time.sleep(0.1)
    opened("kv", "get", "short", code=1)
    assert opened("kv", "get", "long").stdout == "value"


def test_a_ttl_of_nothing_is_a_usage_error(opened: Run) -> None:
    opened("kv", "put", "name", "value", "--ttl", "0", code=2)


def test_del_takes_names_and_a_prefix_and_no_offence(opened: Run) -> None:
    fill(opened, a="1", aa="2", b="3", c="4")
    opened("kv", "del", "c", "nobody", "--prefix", "a")
    assert opened("kv", "scan", "--keys-only").stdout == "b\n"


def test_del_of_a_prefix_of_high_bytes_reaches_the_end(opened: Run) -> None:
    for name in ("fe", "ff", "ffff", "ffff00"):
        opened("kv", "put", "--hex", name, "")
    opened("kv", "del", "--hex", "--prefix", "ffff")
    assert opened("kv", "scan", "--hex", "--keys-only").stdout == "fe\nff\n"
    opened("kv", "del", "--hex", "--prefix", "fe")
    assert opened("kv", "scan", "--hex", "--keys-only").stdout == "ff\n"


def test_del_of_a_prefix_takes_all_that_start_with_it_and_nothing_else(opened: Run) -> None:
    for name in ("60ff", "61", "61ff", "61ffff00", "62"):
        opened("kv", "put", "--hex", name, "")
    opened("kv", "del", "--prefix", "a")
    assert opened("kv", "scan", "--hex", "--keys-only").stdout == "60ff\n62\n"


def test_del_without_names_is_a_usage_error(opened: Run) -> None:
    opened("kv", "del", code=2)


def test_del_in_json(opened: Run) -> None:
    (result,) = lines(opened("kv", "del", "a", "b", "--prefix", "c", "--json"))
    assert (result["deleted"], result["prefix"]) == (["a", "b"], "c")


def test_scan_bounds_order_and_limit(opened: Run) -> None:
    fill(opened, a1="1", a2="2", a3="3", b="4")
    assert opened("kv", "scan", "--prefix", "a").stdout == "a1\t1\na2\t2\na3\t3\n"
    assert opened("kv", "scan", "--start", "a2", "--stop", "b", "--keys-only").stdout == "a2\na3\n"
    assert opened("kv", "scan", "--reverse", "--limit", "2", "--keys-only").stdout == "b\na3\n"
    assert opened("kv", "scan", "--limit", "0").stdout == ""


def test_scan_in_json_is_one_object_a_line(opened: Run) -> None:
    fill(opened, a="1", b="2")
    assert lines(opened("kv", "scan", "--json")) == [{"name": "a", "value": "1"}, {"name": "b", "value": "2"}]
    assert lines(opened("kv", "scan", "--json", "--keys-only")) == [{"name": "a"}, {"name": "b"}]


def test_scan_shows_bytes_that_do_not_print_on_one_line(opened: Run) -> None:
    opened("kv", "put", os.fsdecode(b"tab\there"), "-", stdin=b"line\nback\\slash\x00\xfe\xe2\x82\xac")
    assert opened("kv", "scan").stdout == "tab\\there\tline\\nback\\\\slash\\x00\\xfe\u20ac\n"


def test_names_of_any_bytes_pass_through_the_command_line(opened: Run) -> None:
    opened("kv", "put", os.fsdecode(b"\xff\x01"), "value")
    (found,) = lines(opened("kv", "scan", "--json"))
    assert base64.b64decode(found["name_base64"]) == b"\xff\x01"
    assert opened("kv", "get", os.fsdecode(b"\xff\x01")).stdout == "value"
    assert opened("kv", "get", "--hex", "ff01").stdout == "value"
    assert lines(opened("kv", "scan", "--hex", "--json")) == [{"name": "ff01", "value": "value"}]


def test_hex_that_is_none_is_a_usage_error(opened: Run) -> None:
    assert opened("kv", "get", "--hex", "xyz", code=2).stderr == "basin: not hex digits: 'xyz'\n"


def test_keyspaces_hold_separate_names(opened: Run) -> None:
    opened("kv", "put", "name", "own")
    opened("kv", "put", "name", "other", "--keyspace", "logs")
    assert opened("kv", "get", "name").stdout == "own"
    assert opened("kv", "get", "name", "--keyspace", "logs").stdout == "other"
    assert opened("kv", "scan", "--keyspace", "logs").stdout == "name\tother\n"
    opened("kv", "del", "name", "--keyspace", "logs")
    assert opened("kv", "scan", "--keyspace", "logs").stdout == ""
    assert opened("kv", "get", "name").stdout == "own"


def test_a_name_that_is_too_long_is_one_line(opened: Run) -> None:
    result = opened("kv", "put", "n" * 65_536, "value", code=2)
    assert result.stderr.startswith("basin: ")
    assert result.stderr.count("\n") == 1


def test_a_value_larger_than_a_grain_comes_back(opened: Run) -> None:
    data = os.urandom(5 << 20)
    opened("kv", "put", "large", "-", stdin=data)
    assert opened("kv", "get", "large").stdout_bytes == data


def test_a_keyspace_of_numbers_and_json_is_written_as_json(opened: Run, tmp_path: Path) -> None:
    with basin.open(tmp_path / "b") as db:
        db.keyspace("days", order="u64", values="json")
    for day in (20, 3):
        opened("kv", "put", str(day), json.dumps({"day": day}), "--keyspace", "days")
    assert opened("kv", "get", "3", "--keyspace", "days").stdout == '{"day":3}'
    assert opened("kv", "scan", "--keyspace", "days").stdout == '3\t{"day":3}\n20\t{"day":20}\n'
    assert lines(opened("kv", "scan", "--keyspace", "days", "--start", "4", "--json")) == [
        {"name": 20, "value": {"day": 20}}
    ]
    opened("kv", "del", "3", "--keyspace", "days")
    assert opened("kv", "scan", "--keyspace", "days", "--keys-only").stdout == "20\n"


def test_a_keyspace_of_tuples_is_written_as_json(opened: Run, tmp_path: Path) -> None:
    with basin.open(tmp_path / "b") as db:
        db.keyspace("events", order="tuple")
    opened("kv", "put", '["x", [1, null]]', "text", "--keyspace", "events")
    assert opened("kv", "get", '["x",[1,null]]', "--keyspace", "events").stdout == "text"
    assert opened("kv", "scan", "--keyspace", "events").stdout == '["x",[1,null]]\ttext\n'


def test_what_a_keyspace_cannot_hold_is_a_usage_error(opened: Run, tmp_path: Path) -> None:
    with basin.open(tmp_path / "b") as db:
        db.keyspace("days", order="u64", values="json")
    opened("kv", "put", "monday", "1", "--keyspace", "days", code=2)
    opened("kv", "put", "-1", "1", "--keyspace", "days", code=2)
    opened("kv", "put", "1", "{", "--keyspace", "days", code=2)
    opened("kv", "get", "01", "--hex", "--keyspace", "days", code=2)
    opened("kv", "del", "--prefix", "1", "--keyspace", "days", code=2)


def test_a_keyspace_that_is_not_there_is_one_line(opened: Run) -> None:
    assert "absent" in opened("kv", "scan", "--keyspace", "absent", code=1).stderr
    opened("kv", "scan", "--keyspace", "basin.own", code=2)
