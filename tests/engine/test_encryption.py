"""What the files of an encrypted basin give away without its secret: sizes, counts and times, and nothing else (S1)."""

from __future__ import annotations

from pathlib import Path

import pytest
from blake3 import blake3

import basin
from basin.errors import BasinError, SecretRequired, WrongSecret
from basin.format.scan import GrainFound, scan_grains
from basin.format.slots import decode_descriptor, encode_descriptor

NAME = b"a-telling-name/of-a-patient"
INLINE = b"an inline value that nobody may read"
CONTENT = b"a confidential content, long enough for a grain of its own. " * 20
LARGE = bytes(range(256)) * 1000
KEYSPACE = "telling-keyspace"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A basin with everything: names, contents, parts, links, runs of names, checkpoints, two sessions."""
    path = tmp_path / "basin"
    secret = basin.Secret.generate()
    secret.to_file(tmp_path / "key")
    with basin.open(path, mode="x", secret=secret, part_max=65_536, part_size=16_384, memtable_size=65_536) as db:
        db[NAME] = INLINE
        db[NAME + b"/2"] = CONTENT
        linked = db.blobs.put(LARGE, links=[db.blobs.put(CONTENT)])
        db.keyspace(KEYSPACE)[NAME] = bytes(linked)
        db.put_many((NAME + b"/%d" % number, INLINE) for number in range(5000))
    with basin.open(path, mode="w", secret=secret) as db:
        db.secrets.rotate()
        db[NAME] = INLINE + b" again"
    return path


def stored_bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "telling",
    [NAME[:12], INLINE[:12], CONTENT[:12], LARGE[:12], KEYSPACE.encode()]
    + [digest[:8] for content in (INLINE, CONTENT, LARGE) for digest in [blake3(content).digest()]],
)
def test_nothing_that_was_stored_is_in_the_files(folder: Path, telling: bytes) -> None:
    for name, data in stored_bytes(folder).items():
        assert telling not in data, name
        assert telling.hex().encode() not in data, name
        assert telling.decode("latin-1") not in name


def test_an_open_basin_shows_what_the_test_looks_for(tmp_path: Path) -> None:
    """The search above would find it."""
    with basin.open(tmp_path / "basin", mode="x", profile="open", compression_level=1) as db:
        db[NAME] = INLINE
        db[NAME + b"/2"] = CONTENT
    everything = b"".join(stored_bytes(tmp_path / "basin").values())
    assert NAME[:12] in everything
    assert INLINE[:12] in everything
    assert blake3(CONTENT).digest()[:8] in everything


def test_without_its_secret_a_basin_does_not_open(folder: Path) -> None:
    with pytest.raises(SecretRequired):
        basin.open(folder, mode="r")
    for wrong in (basin.Secret.generate(), basin.Secret.from_passphrase("guessed")):
        with pytest.raises(WrongSecret):
            basin.open(folder, mode="r", secret=wrong)


def test_a_changed_descriptor_opens_nothing(folder: Path) -> None:
    """Even one whose own checksum is right: its hash enters every key."""
    path = folder / "basin.json"
    descriptor = decode_descriptor(path.read_bytes())
    object.__setattr__(descriptor, "created_ms", descriptor.created_ms + 1)
    path.chmod(0o600)
    path.write_bytes(encode_descriptor(descriptor))
    with pytest.raises(BasinError):
        basin.open(folder, mode="r", secret=basin.Secret.from_file(folder.parent / "key"))


def test_equal_contents_look_different_in_two_basins(tmp_path: Path) -> None:
    files = []
    for number in range(2):
        path = tmp_path / str(number)
        with basin.open(path, mode="x", secret=basin.Secret.generate()) as db:
            db.blobs.put(CONTENT)
        (data,) = [data for name, data in stored_bytes(path).items() if name.startswith("data/")]
        (grain,) = list(scan_grains(memoryview(data), 128, len(data) - 80))[:1]
        assert isinstance(grain, GrainFound)
        files.append(grain.header.key + data[grain.offset + 44 : grain.offset + grain.header.stored_size])
    windows = [{file[at : at + 4] for at in range(len(file) - 4)} for file in files]
    assert windows[0].isdisjoint(windows[1])
