"""Directories of runs of names: look-ups stay inside the columns."""

from __future__ import annotations

from collections.abc import Iterator

from basin.format.names import build_filter, decode_directory, encode_directory


def one_input(data: bytes) -> None:
    directory = decode_directory(data)
    for name in (b"", b"\0\0\0\0a", b"\xff" * 9, *directory.firsts[:3]):
        directory.may_contain(name)
        if not -1 <= directory.block_for(name) < len(directory.offsets):
            raise AssertionError("a name leads to a block that is not there")


def seeds() -> Iterator[bytes]:
    names = [b"\0\0\0\0a", b"\0\0\0\0b"]
    for filter_bytes in (b"", build_filter(names)):
        yield encode_directory(
            entries=2,
            firsts=names,
            last=names[1],
            offsets=[128, 300],
            lengths=[172, 50],
            ranges=[(b"\0\0\0\0c", b"\0\0\0\0d", 65536)],
            filter_bytes=filter_bytes,
        )
