"""A row's metadata: what a file system says of an entry beside its name, kind, size and content.

Layout: times and inode (`IDENTITY`: together with kind and size they say whether a file is unchanged), then mode,
owner, group and flags, then, only if there is any, a MessagePack map of what most entries lack:

    "c" 1, if the file changed while it was read          "t" the target of a link
    "h" [device, links] of what has several links         "x" extended attributes by name, ACLs among them
    "r" [major, minor] of a device

Invariants:

- Equal attributes have equal bytes: the keys of both maps ascend, and what is absent takes no room.
- What is decoded keeps its caps and types, or it is a `CorruptionError`. Unknown keys are those of later writers, and
  are passed over.
- Access times are not kept: reading a file would change its row.

Touches no file; imported by whatever makes or restores rows.
"""

from __future__ import annotations

import os
import stat as modes
import struct
from collections.abc import Mapping
from itertools import pairwise
from types import MappingProxyType
from typing import Any, Final, NamedTuple

import msgpack

from basin.errors import CorruptionError, InvalidArgument

IDENTITY: Final = struct.Struct("<qqQ")
"""mtime_ns, ctime_ns, inode."""
IDENTITY_SIZE: Final = IDENTITY.size
HAS_HOLES: Final = 1
"""The flag of a file that takes less room than its size."""
META_SIZE_MAX: Final = 4 << 20
"""Of a row. The extended attributes of an entry rarely exceed 100 bytes; Linux allows 64 KiB for each."""
XATTRS_SIZE_MAX: Final = META_SIZE_MAX - (1 << 20)
"""Names and values of an entry's extended attributes, with room for all else."""

_PLAIN: Final = struct.Struct("<qqQIIII")
PLAIN_SIZE: Final = _PLAIN.size
"""Of metadata without anything out of the ordinary."""
_TIME_MAX: Final = (1 << 63) - 1
_U32_LIMIT: Final = 1 << 32
_U64_LIMIT: Final = 1 << 64
_MODE_MASK: Final = 0o7777
_TARGET_MAX: Final = 65_535
_NAME_MAX: Final = 4096
_BLOCK_SIZE: Final = 512
"""The unit of `st_blocks`, whatever the file system's own."""
_SPARSE_MIN: Final = 4096
"""Smaller files may lie in the inode itself, and take no block."""
_NO_XATTRS: Final[Mapping[bytes, bytes]] = MappingProxyType({})


class Attributes(NamedTuple):
    """Metadata of a row. Times in nanoseconds since 1970; `mode` without the type.

    `device`: major and minor number of a device. `linked`: device number and link count of what has several links;
    rows with the same device number and inode are the same file. `changed`: the content may be of two moments.
    """

    mtime_ns: int
    ctime_ns: int
    inode: int
    mode: int
    uid: int
    gid: int
    flags: int = 0
    target: bytes | None = None
    xattrs: Mapping[bytes, bytes] = _NO_XATTRS
    device: tuple[int, int] | None = None
    linked: tuple[int, int] | None = None
    changed: bool = False


def encode_attributes(attributes: Attributes) -> bytes:
    """The bytes of a row's metadata. Raises `InvalidArgument` for what could not be read back."""
    one = attributes
    try:
        plain = _PLAIN.pack(one.mtime_ns, one.ctime_ns, one.inode, one.mode, one.uid, one.gid, one.flags)
    except struct.error as error:
        raise InvalidArgument(f"attributes out of range: {error}") from error
    extras: dict[str, Any] = {}
    if one.changed:
        extras["c"] = 1
    if one.linked is not None:
        extras["h"] = list(one.linked)
    if one.device is not None:
        extras["r"] = list(one.device)
    if one.target is not None:
        extras["t"] = one.target
    if one.xattrs:
        extras["x"] = dict(sorted(one.xattrs.items()))
    meta = plain + _pack(extras) if extras else plain
    try:
        decode_attributes(meta)
    except CorruptionError as error:
        raise InvalidArgument(f"not the attributes of a file: {error}") from error
    return meta


def _pack(extras: dict[str, Any]) -> bytes:
    """The keys of `extras` must ascend."""
    packed: bytes = msgpack.packb(extras, use_bin_type=True)
    return packed


def attributes_of(
    stat: os.stat_result,
    *,
    target: bytes | None = None,
    xattrs: Mapping[bytes, bytes] | None = None,
    changed: bool = False,
) -> bytes:
    """The same as `encode_attributes`, straight from what `os.stat` returned: under 2 us for a plain file.

    Times that 64 bits cannot hold (after the year 2262) become the last one that they can. The caller keeps
    `XATTRS_SIZE_MAX`.
    """
    mode = stat.st_mode
    flags = 0
    if modes.S_ISREG(mode) and stat.st_blocks * _BLOCK_SIZE < stat.st_size >= _SPARSE_MIN:
        flags = HAS_HOLES
    times = stat.st_mtime_ns, stat.st_ctime_ns
    numbers = stat.st_ino, mode & _MODE_MASK, stat.st_uid, stat.st_gid, flags
    try:
        plain = _PLAIN.pack(*times, *numbers)
    except struct.error:
        plain = _PLAIN.pack(*(max(-_TIME_MAX, min(time, _TIME_MAX)) for time in times), *numbers)
    if stat.st_nlink > 1 and not modes.S_ISDIR(mode):
        linked = [stat.st_dev, stat.st_nlink]
    elif xattrs or target is not None or changed or modes.S_ISCHR(mode) or modes.S_ISBLK(mode):
        linked = None
    else:
        return plain
    extras: dict[str, Any] = {}
    if changed:
        extras["c"] = 1
    if linked is not None:
        extras["h"] = linked
    if modes.S_ISCHR(mode) or modes.S_ISBLK(mode):
        extras["r"] = [os.major(stat.st_rdev), os.minor(stat.st_rdev)]
    if target is not None:
        extras["t"] = target
    if xattrs:
        extras["x"] = dict(sorted(xattrs.items()))
    return plain + _pack(extras)


def attributes_of_way(stat: os.stat_result) -> bytes:
    """What is kept of a directory that only leads to what is backed up: whose it is and who may enter it.

    Its times and inode are 0: other things in it change, and with its times two backups of the same would differ.
    """
    return _PLAIN.pack(0, 0, 0, stat.st_mode & _MODE_MASK, stat.st_uid, stat.st_gid, 0)


def identity_of(meta: bytes) -> bytes:
    """The part that an unchanged file keeps."""
    return meta[:IDENTITY_SIZE]


def decode_attributes(meta: bytes) -> Attributes:
    """Undo `encode_attributes`; raise `CorruptionError` for what it would not have written."""
    if not PLAIN_SIZE <= len(meta) <= META_SIZE_MAX:
        raise CorruptionError(f"metadata of a row cannot have {len(meta)} bytes")
    mtime_ns, ctime_ns, inode, mode, uid, gid, flags = _PLAIN.unpack_from(meta)
    if mode > _MODE_MASK:
        raise CorruptionError(f"metadata of a row holds the impossible mode {mode:o}")
    extras = _extras(meta) if len(meta) > PLAIN_SIZE else {}
    return Attributes(
        mtime_ns,
        ctime_ns,
        inode,
        mode,
        uid,
        gid,
        flags,
        target=_target(extras.get("t")),
        xattrs=_xattrs(extras.get("x")),
        device=_pair("r", extras.get("r"), _U32_LIMIT),
        linked=_pair("h", extras.get("h"), _U64_LIMIT),
        changed=_changed(extras.get("c")),
    )


def _extras(meta: bytes) -> dict[Any, Any]:
    try:
        extras = msgpack.unpackb(
            memoryview(meta)[PLAIN_SIZE:],
            raw=False,
            strict_map_key=False,
            object_pairs_hook=_ascending,
        )
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as error:
        raise CorruptionError("metadata of a row is no MessagePack") from error
    if not isinstance(extras, dict) or not extras or not all(isinstance(key, str) for key in extras):
        raise CorruptionError("metadata of a row is no map of extras")
    return extras


def _ascending(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    """A map whose keys ascend, so that none is there twice. Raises `ValueError`, or `TypeError` for mixed keys."""
    keys = [key for key, _ in pairs]
    if not all(before < key for before, key in pairwise(keys)):
        raise ValueError("keys do not ascend")
    return dict(pairs)


def _target(value: Any) -> bytes | None:
    if value is None:
        return None
    if not isinstance(value, bytes) or not 0 < len(value) <= _TARGET_MAX or b"\0" in value:
        raise CorruptionError("metadata of a row holds an impossible target of a link")
    return value


def _xattrs(value: Any) -> Mapping[bytes, bytes]:
    if value is None:
        return _NO_XATTRS
    if not isinstance(value, dict) or not value:
        raise CorruptionError("metadata of a row holds no map of extended attributes")
    for name, content in value.items():
        if not isinstance(name, bytes) or not 0 < len(name) <= _NAME_MAX or b"\0" in name:
            raise CorruptionError("metadata of a row holds an impossible name of an extended attribute")
        if not isinstance(content, bytes):
            raise CorruptionError("metadata of a row holds an extended attribute that is no bytes")
    return value


def _pair(key: str, value: Any, limit: int) -> tuple[int, int] | None:
    if value is None:
        return None
    if (
        not isinstance(value, list)
        or len(value) != 2
        or not all(type(one) is int and 0 <= one < limit for one in value)
    ):
        raise CorruptionError(f"metadata of a row holds an impossible {key!r}")
    return value[0], value[1]


def _changed(value: Any) -> bool:
    if value is None:
        return False
    if type(value) is not int or value != 1:
        raise CorruptionError("metadata of a row holds an impossible 'c'")
    return True
