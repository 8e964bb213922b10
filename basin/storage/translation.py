"""The one table by which an `OSError` becomes a typed error of Basin.

The text says what to do; the fields `object`, `operation` and `errno` say what happened, for programs. Imports
`basin.errors` only; used by the local storage, and by `basin.testing` so that simulated faults are like real ones.
"""

from __future__ import annotations

import errno
from typing import Final

from basin.errors import (
    AlreadyExists,
    BasinError,
    ObjectMissing,
    OutOfSpace,
    ReadOnly,
    StorageError,
    StorageUnavailable,
)

_READING: Final = frozenset({"open", "read", "size", "list", "list_folders", "exists", "boot_id"})

_ERRORS: Final[dict[int, tuple[type[BasinError], str]]] = {
    errno.ENOENT: (ObjectMissing, "there is no such file"),
    errno.ENOTDIR: (ObjectMissing, "a part of the path is not a folder"),
    errno.EEXIST: (AlreadyExists, "the file exists already"),
    errno.ENOSPC: (OutOfSpace, "the disk is full: free some space, then reopen the basin"),
    errno.EDQUOT: (OutOfSpace, "the quota is used up: free some space, then reopen the basin"),
    errno.EROFS: (ReadOnly, "the file system is mounted read-only"),
    errno.EACCES: (ReadOnly, "permission denied: check the owner and mode of the folder"),
    errno.EPERM: (ReadOnly, "operation not permitted: check the owner and flags of the folder"),
    errno.ETIMEDOUT: (StorageUnavailable, "the storage did not answer in time: try again later"),
    errno.EAGAIN: (StorageUnavailable, "the storage is busy: try again later"),
    errno.EMFILE: (StorageError, "too many open files in this process: raise the limit (ulimit -n)"),
    errno.ENFILE: (StorageError, "too many open files in the whole system: raise its limit (fs.file-max)"),
    errno.ELOOP: (StorageError, "a symbolic link stands where a file should be"),
    errno.ENOLCK: (StorageError, "this file system cannot lock files"),
    errno.EIO: (StorageError, "input/output error: check the disk, then reopen the basin"),
}


def translated(error: OSError, operation: str, name: str, path: str = "") -> BasinError:
    """The typed error for `error`, to be raised `from` it.

    `operation` is the port's word for what was done (`"append"`), `name` the object it was done to, `path` where it is.
    """
    number = error.errno or 0
    kind, text = _ERRORS.get(number, (StorageError, error.strerror or str(error)))
    if kind is ReadOnly and operation in _READING:
        kind, text = StorageError, "permission denied: this user may not read it"
    if number in (errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK) and operation == "link":
        kind, text = StorageError, "this file system cannot give a file a second name (no hard links)"
    return kind(f"{operation} {path or name!r}: {text}", object=name, operation=operation, errno=number)
