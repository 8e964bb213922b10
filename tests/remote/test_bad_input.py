"""What a user gets wrong about a bucket: one clear typed error each, no credentials in it, nothing half created."""

from __future__ import annotations

import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest

import basin
from basin.errors import AlreadyExists, BasinError, InvalidArgument, NotABasin, ReadOnly, StorageError
from basin.errors import StorageUnavailable as Unavailable
from basin.testing.faults import Killed
from basin.testing.object_faults import FaultKind
from tests.remote.conftest import IMPATIENT, Bucket, S3Place
from tests.s3_proxy import FaultProxy, Rule
from tests.storage.s3_servers import KEY, SECRET, S3Server, free_ports

OBJECTS = "^[^?]*(\\?x-id=[A-Za-z]*)?$"
LISTS = "list-type"


def refused(method: str, match: str, code: str, status: int = 403) -> Rule:
    """A rule: the service answers so, always."""
    return Rule("status", method, match, count=None, status=status, code=code)


class Refusal(NamedTuple):
    """What the service says, what becomes of it, and what the line tells the user."""

    name: str
    rules: tuple[tuple[str, str, str, int], ...]
    kind: type[BasinError]
    says: str


EVERYTHING = [
    Refusal("wrong key", (("", "", "InvalidAccessKeyId", 403),), StorageError, "check the access key"),
    Refusal("wrong secret", (("", "", "SignatureDoesNotMatch", 403),), StorageError, "check the access key"),
    Refusal("clock", (("", "", "RequestTimeTooSkewed", 403),), StorageError, "this machine's clock is off: set it"),
    Refusal("expired", (("", "", "ExpiredToken", 400),), StorageError, "the credentials have expired: renew them"),
    Refusal("region", (("GET", "", "PermanentRedirect", 301),), StorageError, "check region_name and endpoint_url"),
    Refusal("closed", (("", "", "AllAccessDisabled", 403),), StorageError, "ask its operator"),
    Refusal("no read", (("GET", OBJECTS, "AccessDenied", 403),), StorageError, "no permission to read"),
]
"""Whatever is done, it ends with this."""
CREATING = [
    *EVERYTHING,
    Refusal("no list", (("GET", LISTS, "AccessDenied", 403),), StorageError, "no permission to list the bucket"),
    Refusal("no write", (("PUT", "", "AccessDenied", 403),), ReadOnly, "no permission to write to the bucket"),
    Refusal("no conditions", (("PUT", "", "NotImplemented", 501),), StorageError, "conditional writes"),
]


def show(refusal: Refusal) -> str:
    return refusal.name


def caught_from(work: Callable[[], Any], kind: type[BasinError], says: str) -> BasinError:
    """The error of `work`: exactly `kind`, one line that says what to do, and nothing that is secret."""
    with pytest.raises(BasinError) as caught:
        work()
    error = caught.value
    assert type(error) is kind, repr(error)
    text = str(error)
    assert says in text
    assert "\n" not in text
    assert len(text) < 400
    shown = "".join((text, repr(error), repr(error.fields), *traceback.format_exception(error)))
    for secret in (KEY, SECRET):
        assert secret not in shown
    return error


@pytest.mark.parametrize("refusal", CREATING, ids=show)
def test_a_creation_that_is_refused_leaves_nothing(s3_place: S3Place, s3_proxy: FaultProxy, refusal: Refusal) -> None:
    s3_proxy.add(*(refused(*rule) for rule in refusal.rules))
    error = caught_from(lambda: s3_place.open(endpoint=s3_proxy.endpoint), refusal.kind, refusal.says)
    assert error.reason == refusal.rules[0][2]
    assert s3_place.names() == []


@pytest.fixture(scope="module")
def made(s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Place]:
    """A basin that nobody changes."""
    key_file = tmp_path_factory.mktemp("made") / "key"
    secret = basin.Secret.generate()
    secret.to_file(key_file)
    place = S3Place(s3_server, s3_server.new_url(), secret, key_file)
    with place.open() as db:
        db[b"name"] = b"value"
    yield place
    place.close()


@pytest.mark.parametrize("mode", ["r", "w"])
@pytest.mark.parametrize("refusal", EVERYTHING, ids=show)
def test_opening_what_is_there_is_refused(made: S3Place, s3_proxy: FaultProxy, refusal: Refusal, mode: str) -> None:
    before = made.names()
    s3_proxy.add(*(refused(*rule) for rule in refusal.rules))
    caught_from(lambda: made.open(mode, endpoint=s3_proxy.endpoint), refusal.kind, refusal.says)
    assert made.names() == before


def test_who_may_not_list_can_open_read_and_write(s3_place: S3Place, s3_proxy: FaultProxy) -> None:
    s3_place.open().close()
    s3_proxy.add(refused("GET", LISTS, "AccessDenied"))
    with s3_place.open("w", endpoint=s3_proxy.endpoint) as db:
        db[b"name"] = b"value"
        key = db.blobs.put(b"content" * 1000)
    reader = s3_place.open("r", endpoint=s3_proxy.endpoint)
    assert reader[b"name"] == b"value"
    assert reader.blobs[key] == b"content" * 1000


def test_who_may_not_delete_can_write(s3_place: S3Place, s3_proxy: FaultProxy) -> None:
    s3_place.open().close()
    s3_proxy.add(refused("DELETE", "", "AccessDenied"), refused("POST", "delete", "AccessDenied"))
    with s3_place.open("w", endpoint=s3_proxy.endpoint, checkpoint_every=3) as db:
        for number in range(20):
            db[b"name"] = b"%d" % number
            db.commit()
    assert s3_place.open("r")[b"name"] == b"19"


def test_who_may_not_write_reads_and_is_told_at_the_first_write(made: S3Place, s3_proxy: FaultProxy) -> None:
    before = made.names()
    s3_proxy.add(refused("PUT", "", "AccessDenied"))
    reader = made.open("r", endpoint=s3_proxy.endpoint)
    assert reader[b"name"] == b"value"
    writer = made.open("w", endpoint=s3_proxy.endpoint)
    writer[b"name"] = b"other"
    caught_from(writer.commit, ReadOnly, "no permission to write to the bucket")
    assert writer[b"name"] == b"value"
    assert made.names() == before


def test_credentials_that_expire_at_any_write_of_a_creation_harm_nobody(
    s3_place: S3Place, s3_proxy: FaultProxy
) -> None:
    s3_place.open(endpoint=s3_proxy.endpoint).close()
    puts = [exchange for exchange in s3_proxy.exchanges if exchange.method == "PUT"]
    last = [number for number, exchange in enumerate(puts) if "/tmp/" not in exchange.target]
    assert len(last) >= 4
    for skipped in (last[0], last[3]):  # The first key file, and the record behind the descriptor.
        place = S3Place(s3_place.server, s3_place.server.new_url(), s3_place.secret, s3_place.key_file)
        s3_proxy.clear()
        s3_proxy.add(Rule("status", "PUT", count=None, skip=skipped, status=400, code="ExpiredToken"))
        caught_from(
            lambda place=place: place.open(endpoint=s3_proxy.endpoint),  # type: ignore[misc]  # a default
            StorageError,
            "renew them",
        )
        s3_proxy.clear()
        with place.open(endpoint=s3_proxy.endpoint) as db:
            db[b"name"] = b"value"
        assert place.open("r")[b"name"] == b"value"
        place.close()


def test_a_creation_that_is_killed_anywhere_is_finished_by_the_next_one(bucket: Bucket) -> None:
    bucket.open().close()
    requests = bucket.asked()
    steps = [number for number, one in enumerate(requests) if not one.name.startswith("tmp/")]
    assert len(steps) > 10
    for step in steps[:-1]:
        bucket.simulated.bodies.clear()
        bucket.asked()
        first = len(bucket.simulated.requests)
        bucket.plan({first + step + 1: FaultKind.KILLED})
        with pytest.raises(Killed):
            bucket.open(actor=f"killed at {step}").close()
        with bucket.open(actor=f"after {step}") as db:
            db[b"name"] = b"value"
        reader = bucket.open("r", actor="reader")
        assert reader[b"name"] == b"value"
        assert len(reader.core.state.slots) == 1
        reader.close()


# --- places ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["r", "w", "c", "x"])
def test_no_such_bucket(s3_place: S3Place, mode: str) -> None:
    s3_place.url = "s3://basin-that-nobody-made/place"
    error = caught_from(lambda: s3_place.open(mode), StorageError, "create it, or check the URL")
    assert "'basin-that-nobody-made'" in str(error)
    assert error.reason == "NoSuchBucket"


@pytest.mark.parametrize("mode", ["r", "c"])
def test_nobody_at_the_endpoint(s3_place: S3Place, mode: str) -> None:
    s3_place.endpoint = f"http://127.0.0.1:{free_ports(1)[0]}"
    error = caught_from(lambda: s3_place.open(mode, **IMPATIENT), Unavailable, "check the endpoint")
    assert error.reason == "connection"


def test_an_endpoint_that_is_no_url(s3_place: S3Place) -> None:
    s3_place.endpoint = "no endpoint"
    caught_from(s3_place.open, InvalidArgument, "write https://host")


@pytest.mark.parametrize("name", ["file", "folder/file", "data/0123", "log/00000000000000000001"])
def test_a_place_that_holds_something_else(s3_place: S3Place, name: str) -> None:
    s3_place.url += "/place"
    assert s3_place.server.client().put(f"/{s3_place.url.removeprefix('s3://')}/{name}", b"mine") == 200
    error = caught_from(lambda: s3_place.open("c"), NotABasin, "choose an empty place")
    assert error.url == s3_place.url
    caught_from(lambda: s3_place.open("r"), NotABasin, "is not a basin")
    assert s3_place.names() == [name]


def test_an_empty_place_is_no_basin_to_read(s3_place: S3Place) -> None:
    for mode in ("r", "w"):
        caught_from(lambda mode=mode: s3_place.open(mode), NotABasin, "is not a basin")  # type: ignore[misc]  # a default
    assert s3_place.names() == []


def test_what_is_there_must_not_be_there(s3_place: S3Place) -> None:
    s3_place.open("x").close()
    caught_from(lambda: s3_place.open("x"), AlreadyExists, "already")


@pytest.mark.parametrize("url", ["s3://", "s3:///place", "s3://key:secret@bucket/place", "s3://bucket/../place"])
def test_urls_that_are_none(s3_place: S3Place, url: str) -> None:
    s3_place.url = url
    with pytest.raises(InvalidArgument) as caught:
        s3_place.open()
    assert "secret" not in str(caught.value)


def left_behind(place: S3Place) -> list[str]:
    """What is stored, but for names of the probe: this server lets one that many wrote at once come back."""
    return [name for name in place.names() if not name.startswith("tmp/probe-")]


def test_a_store_that_ignores_conditions_is_refused(rclone_serve: S3Server, s3_place: S3Place) -> None:
    place = S3Place(rclone_serve, rclone_serve.new_url(), s3_place.secret, s3_place.key_file)
    error = caught_from(place.open, StorageError, "this store does not keep conditional writes")
    assert error.reason == "unconditional"
    assert not left_behind(place)


def test_a_basin_that_was_moved_to_a_store_that_ignores_conditions_is_read_and_not_written(bucket: Bucket) -> None:
    with bucket.open() as db:
        db[b"name"] = b"value"
    before = dict(bucket.simulated.bodies)
    bucket.plan(lambda request: FaultKind.CONDITION_IGNORED if request.kind == "put_new" else None)
    writer = bucket.open("w")
    assert writer[b"name"] == b"value"
    writer[b"name"] = b"other"
    caught_from(writer.commit, StorageError, "this store does not keep conditional writes")
    assert bucket.simulated.bodies == before


def test_a_server_that_does_not_know_the_options(s3_place: S3Place) -> None:
    with pytest.raises(InvalidArgument) as caught:
        basin.open(s3_place.url, storage_options={"sekret": "value of it"}, secret=s3_place.secret)
    assert "'sekret'" in str(caught.value)
    assert "value of it" not in str(caught.value)


# --- the command line -----------------------------------------------------------------------------------------------


def command(place: S3Place, *arguments: str, endpoint: str = "", code: int = 1) -> subprocess.CompletedProcess[str]:
    """`basin -b <place> …`; unless it ends well, it says one line."""
    found = subprocess.run(
        [sys.executable, "-m", "basin.cli", "-b", place.url, *arguments],
        env=place.environment(endpoint),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert found.returncode == code, found
    if code:
        assert found.stderr.startswith("basin: ")
        assert found.stderr.count("\n") == 1
        assert KEY not in found.stderr
        assert SECRET not in found.stderr
    return found


def test_the_command_line_works_on_a_bucket(s3_place: S3Place) -> None:
    command(s3_place, "init", "--secret-file", str(s3_place.key_file), code=0)
    command(s3_place, "kv", "put", "name", "value", code=0)
    assert command(s3_place, "kv", "get", "name", code=0).stdout == "value"
    assert s3_place.open("r")[b"name"] == b"value"


@pytest.mark.parametrize("refusal", [one for one in CREATING if one.name != "no list"], ids=show)
def test_a_command_that_is_refused_is_one_line(made: S3Place, s3_proxy: FaultProxy, refusal: Refusal) -> None:
    before = made.names()
    s3_proxy.add(*(refused(*rule) for rule in refusal.rules))
    assert refusal.says in command(made, "kv", "put", "name", "other", endpoint=s3_proxy.endpoint).stderr
    assert made.names() == before


def test_commands_on_wrong_places_are_one_line(s3_place: S3Place) -> None:
    assert "basin init" in command(s3_place, "kv", "get", "name").stderr
    assert s3_place.server.client().put(f"/{s3_place.url.removeprefix('s3://')}/file", b"mine") == 200
    assert "choose an empty place" in command(s3_place, "init", "--secret-file", str(s3_place.key_file)).stderr
    nowhere = f"http://127.0.0.1:{free_ports(1)[0]}"
    assert "check the endpoint" in command(s3_place, "kv", "get", "name", endpoint=nowhere).stderr
    s3_place.url = "s3://basin-that-nobody-made/place"
    assert "there is no bucket" in command(s3_place, "kv", "get", "name").stderr


def test_a_command_on_a_store_that_ignores_conditions_is_one_line(rclone_serve: S3Server, s3_place: S3Place) -> None:
    place = S3Place(rclone_serve, rclone_serve.new_url(), s3_place.secret, s3_place.key_file)
    assert "conditional writes" in command(place, "init", "--secret-file", str(place.key_file)).stderr
    assert not left_behind(place)
