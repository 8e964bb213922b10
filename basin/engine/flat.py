"""Flat files: how one is opened as a storage, and how one is begun and ended.

Invariants:

- Opening believes the end pointer and the table only after their checksums; errors name the file.
- A flat file is whole before it has its name (see `basin.storage.flat_target`).

What is in the files inside is the business of whoever reads or writes them.
"""

from __future__ import annotations

from blake3 import blake3

from basin.errors import CorruptionError, NotABasin
from basin.format.flat import (
    FLAT_END_SIZE,
    FLAT_HEADER_SIZE,
    FlatEnd,
    FlatFile,
    decode_flat_end,
    decode_flat_header,
    decode_flat_table,
    encode_flat_end,
    encode_flat_header,
    encode_flat_table,
)
from basin.storage.flat import FlatStorage, Piece
from basin.storage.flat_remote import RemoteFile
from basin.storage.flat_target import FlatTarget
from basin.storage.protocol import ReadFile


def open_flat(whole: ReadFile, url: str) -> FlatStorage:
    """The files inside of `whole`, which the storage owns from then on. Three small reads.

    Raises `NotABasin` for a file that was never a flat basin, the kinds of `CorruptionError`, `UnsupportedVersion` and
    `StorageError`.
    """
    try:
        files = _read_table(whole)
    except NotABasin as error:
        raise NotABasin(f"{url} is not a basin: {error.message}", url=url) from error
    except CorruptionError as error:
        offset = error.fields.get("offset", 0)
        raise type(error)(f"{url}: {error.message}", object=url, offset=offset) from error
    requests = whole.requests if isinstance(whole, RemoteFile) else None
    return FlatStorage(whole, [Piece(*file) for file in files], url, requests)


def _read_table(whole: ReadFile) -> list[FlatFile]:
    size = whole.size()
    decode_flat_header(whole.read(0, min(FLAT_HEADER_SIZE, size)))
    tail_size = min(FLAT_END_SIZE, size)
    end = decode_flat_end(whole.read(size - tail_size, tail_size), size)
    return decode_flat_table(whole.read(end.table_offset, end.table_size), end)


def begin_flat(target: FlatTarget) -> None:
    """Write what stands before the first file inside."""
    target.append(encode_flat_header())


def end_flat(target: FlatTarget) -> None:
    """Write the table and the end pointer, make all durable, and give it its name."""
    table = encode_flat_table([(piece.name, piece.size, piece.hash) for piece in target.pieces])
    end = FlatEnd(target.size, len(table), blake3(table).digest())
    target.append(table)
    target.append(encode_flat_end(end))
    target.finish()
