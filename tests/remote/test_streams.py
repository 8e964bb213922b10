"""Large blobs of a bucket: streamed with the next bytes on their way, read by ranges, sent in bounded memory."""

from __future__ import annotations

import io
import json
import random
import subprocess
import sys
import textwrap
import uuid
from pathlib import Path

import pytest

import basin
from basin.api import Database
from basin.format.layout import MIB
from tests.remote.conftest import S3Place

SIZE = 40 * MIB + 12_345
CONTENT = random.Random(7).randbytes(SIZE)


@pytest.fixture(params=["open", "encrypted"])
def stored(request: pytest.FixtureRequest) -> tuple[Database, basin.ContentKey]:
    """A handle that only reads, and the key of a large blob; nothing of it was read yet."""
    url = f"memory://{uuid.uuid4().hex}"
    secret = basin.Secret.generate() if request.param == "encrypted" else None
    profile = "open" if secret is None else None
    with basin.open(url, secret=secret, profile=profile) as db:  # type: ignore[arg-type]  # one of two words
        key = db.blobs.put(io.BytesIO(CONTENT))
    return basin.open(url, "r", secret=secret), key


def gets(db: Database) -> int:
    return int(db.stats()["requests"]["get"])


def test_a_blob_read_in_order_comes_whole_with_few_requests(stored: tuple[Database, basin.ContentKey]) -> None:
    db, key = stored
    before = gets(db)
    with db.blobs.open(key) as file:
        pieces = list(iter(lambda: file.read(300_000), b""))
    assert b"".join(pieces) == CONTENT
    assert gets(db) - before <= 2 + -(-SIZE // (8 * MIB)) + 2
    db.close()


def test_a_blob_is_read_whole_with_few_requests(stored: tuple[Database, basin.ContentKey]) -> None:
    db, key = stored
    before = gets(db)
    assert db.blobs[key] == CONTENT
    assert gets(db) - before <= 2 + -(-SIZE // (8 * MIB)) + 2
    db.close()


def test_seeking_and_ranges_read_what_they_need(stored: tuple[Database, basin.ContentKey], rng: random.Random) -> None:
    db, key = stored
    assert db.blobs.size(key) == SIZE
    received = db.stats()["requests"]["bytes_in"]
    assert db.blobs.read(key, 5 * MIB + 1, 5 * MIB + 100) == CONTENT[5 * MIB + 1 : 5 * MIB + 100]
    assert db.stats()["requests"]["bytes_in"] - received <= 2 * MIB
    assert db.blobs.read(key, SIZE - 10, SIZE + 10) == CONTENT[-10:]
    with db.blobs.open(key) as file:  # The last: bytes that were ordered ahead may still arrive when it is closed.
        for _ in range(20):
            start = rng.randrange(SIZE)
            size = rng.choice([1, 5000, MIB, 3 * MIB])
            file.seek(start)
            assert file.read(size) == CONTENT[start : start + size]
    db.close()


def test_a_stream_that_is_left_in_the_middle_holds_nothing_up(stored: tuple[Database, basin.ContentKey]) -> None:
    db, key = stored
    with db.blobs.open(key) as file:
        assert file.read(10 * MIB) == CONTENT[: 10 * MIB]
    db.close()


LOAD = """
    import json, os, sys
    import basin
    url, options, key_file, pieces = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    with basin.open(url, secret=basin.Secret.from_file(key_file), storage_options=options, disk_cache_size=0) as db:
        with db.batch() as batch:
            for number in range(pieces):
                batch.blobs.put(os.urandom(1 << 20))
    # Not `ru_maxrss`: that counts what the process was before it became this program, a copy of the tests.
    print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.slow
def test_sending_takes_memory_that_does_not_grow_with_what_is_sent(s3_place: S3Place, key_file: Path) -> None:
    """At most two strata of 64 MiB are in memory while they are sent, whatever there is to send."""
    peaks = []
    for pieces in (160, 800):
        url = f"{s3_place.url}/{pieces}"
        options = json.dumps(s3_place.storage_options())
        command = [sys.executable, "-c", textwrap.dedent(LOAD), url, options, str(key_file), str(pieces)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout) >> 10)
    print(f"peak of the writer: {peaks[0]} MiB with 160 MiB, {peaks[1]} MiB with 800 MiB")
    assert peaks[1] <= peaks[0] + 96
    assert peaks[1] <= 450
