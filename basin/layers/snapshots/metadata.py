"""Giving what was restored its owner, mode, extended attributes and times; and the list of what went wrong.

Invariants:

- The owner is set before the mode, since a change of owner takes away setuid. Who has not got the owner that the
  snapshot says gets no setuid and setgid either: they would lend out the rights of somebody else.
- Attributes that anybody may set come before the mode, which may forbid it; ACLs come after, since a mode changes them.
- Times come last.
- What needs privilege and is refused is a warning. The first of each kind is listed, all are counted.

Imported by `writing` and `restore`.
"""

from __future__ import annotations

import errno
import grp
import os
import pwd
import stat as modes
import threading
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Final, Literal, Protocol

from basin.errors import BasinError, ContentNotFound, CorruptionError, ObjectMissing
from basin.format.tree import RowKind
from basin.layers.snapshots.attributes import Attributes
from basin.layers.snapshots.documents import PROBLEMS_MAX, Problem, text_of
from basin.layers.snapshots.target import At, Target

OwnersKept = Literal["names", "numbers", "none"]

_LINK: Final = int(RowKind.LINK)
_DIRECTORY: Final = int(RowKind.DIRECTORY)
_LENT_BITS: Final = modes.S_ISUID | modes.S_ISGID
_WITH_XATTRS: Final = (int(RowKind.FILE), _DIRECTORY)
_OWN: Final = b"user."
_DEFAULT_ACL: Final = b"system.posix_acl_default"
_MANAGED: Final = (_OWN, b"system.posix_acl_")
_NO_XATTRS: Final = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
_NOTHING: Final[Mapping[bytes, bytes]] = MappingProxyType({})


class NameTables(Protocol):
    """Names of users and groups by their decimal numbers, as the snapshot has them."""

    @property
    def owners(self) -> Mapping[str, str]:
        """Users."""
        ...

    @property
    def groups(self) -> Mapping[str, str]:
        """Groups."""
        ...


class Findings:
    """Problems and warnings, with paths from the target on. Safe for many threads."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []
        self.warnings: list[Problem] = []
        self.problem_count = 0
        self.damage_count = 0
        """Problems that are the basin's: contents that are damaged or gone."""
        self.warning_count = 0
        self._told: set[object] = set()
        self._lock = threading.Lock()

    def problem(self, path: bytes, error: Exception | str) -> None:
        """What was not restored, and why."""
        with self._lock:
            self.problem_count += 1
            self.damage_count += isinstance(error, (CorruptionError, ContentNotFound, ObjectMissing))
            if len(self.problems) < PROBLEMS_MAX:
                self.problems.append(Problem(text_of(path), _text(error)))

    def warn(self, path: bytes, text: str, *, kind: object) -> None:
        """What was restored, but for something; listed unless another of this kind was."""
        with self._lock:
            self.warning_count += 1
            if kind not in self._told and len(self.warnings) < PROBLEMS_MAX:
                self._told.add(kind)
                self.warnings.append(Problem(text_of(path), text))


def _text(error: Exception | str) -> str:
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return error.message if isinstance(error, BasinError) else str(error)


class Owners:
    """Who owns here what the snapshot says somebody owned: the user of the same name, or the same number."""

    def __init__(self, tables: NameTables | None) -> None:
        """Without tables, numbers count."""
        self._tables = tables
        self._known: dict[tuple[int, int], tuple[int, int]] = {}

    def of(self, uid: int, gid: int) -> tuple[int, int]:
        """Numbers of user and group here."""
        found = self._known.get((uid, gid))
        if found is None:
            found = self._known[uid, gid] = (self._user(uid), self._group(gid))
        return found

    def _user(self, number: int) -> int:
        try:
            return pwd.getpwnam(self._tables.owners[str(number)]).pw_uid if self._tables else number
        except (KeyError, ValueError):
            return number

    def _group(self, number: int) -> int:
        try:
            return grp.getgrnam(self._tables.groups[str(number)]).gr_gid if self._tables else number
        except (KeyError, ValueError):
            return number


class Metadata:
    """Sets and compares metadata. Safe for many threads."""

    def __init__(self, target: Target, owners: Owners | None, findings: Findings, now_ns: int) -> None:
        """`owners` is None if what is restored stays whose it is. `now_ns` is the time of access of what is new."""
        self._target = target
        self._owners = owners
        self._findings = findings
        self._now_ns = now_ns
        self._refused: set[tuple[int, int]] = set()
        """Owners that the system did not let us set."""

    def apply(
        self,
        at: At,
        attributes: Attributes,
        *,
        kind: int,
        path: bytes,
        found: os.stat_result | None = None,
        inherits: bool = True,
    ) -> None:
        """Set everything; of what was there before, as `found`, what differs. `path` is for warnings.

        `inherits` is False of a new file whose directory gives it no access control lists (`gives_acls`). Raises
        `OSError` for what everybody may do with his own, and failed.
        """
        is_owned = self._own(at, attributes, path, found)
        has_xattrs = kind in _WITH_XATTRS or bool(attributes.xattrs)
        present = self._present(at) if has_xattrs and (inherits or attributes.xattrs) else _NOTHING
        if present or attributes.xattrs:
            self._set_xattrs(at, _part(attributes.xattrs, own=True), _part(present, own=True), path)
        if kind != _LINK:
            mode = attributes.mode
            if mode & _LENT_BITS and kind != _DIRECTORY and not is_owned and not self._is_owner(at, attributes):
                mode &= ~_LENT_BITS
                self._findings.warn(path, "it gets no setuid and setgid, since it has another owner", kind=_LENT_BITS)
            self._target.chmod(at, mode)
        if present or attributes.xattrs:
            self._set_xattrs(at, _part(attributes.xattrs, own=False), _part(present, own=False), path)
        if attributes.mtime_ns or attributes.inode:  # Both are 0 of a directory that only led to what was saved.
            self._target.set_times(at, self._now_ns, attributes.mtime_ns)

    def gives_acls(self, folder: int) -> bool:
        """Whether what is made in a directory may get access control lists from it."""
        return _DEFAULT_ACL in self._present(folder)

    def differs(self, at: At, attributes: Attributes, *, kind: int, found: os.stat_result) -> bool:
        """Whether `apply` would change something that it can change, beside the time of access."""
        if kind != _LINK and modes.S_IMODE(found.st_mode) != attributes.mode:
            return True
        if found.st_mtime_ns != attributes.mtime_ns:
            return True
        if self._owners is not None:
            wanted = self._owners.of(attributes.uid, attributes.gid)
            if wanted != (found.st_uid, found.st_gid) and wanted not in self._refused:
                return True
        if kind not in _WITH_XATTRS and not attributes.xattrs:
            return False
        present = self._present(at)
        return _managed(present) != _managed(attributes.xattrs)

    def _own(self, at: At, attributes: Attributes, path: bytes, found: os.stat_result | None) -> bool:
        """Set the owner; whether it is the one that the snapshot says."""
        if self._owners is None:
            return False
        wanted = self._owners.of(attributes.uid, attributes.gid)
        if found is not None and wanted == (found.st_uid, found.st_gid):
            return True
        if wanted in self._refused:
            self._findings.warn(path, "", kind=wanted)
            return False
        try:
            self._target.chown(at, *wanted)
        except OSError as error:
            self._refused.add(wanted)
            text = f"it, and whatever else belongs to {wanted[0]}:{wanted[1]}, stays with you: {error.strerror}"
            self._findings.warn(path, text, kind=wanted)
            return False
        return True

    def _is_owner(self, at: At, attributes: Attributes) -> bool:
        """Whether it belongs to whom the snapshot says without our doing."""
        found = self._target.stat(at)
        wanted = (attributes.uid, attributes.gid) if self._owners is None else self._owners.of(*attributes[4:6])
        return wanted == (found.st_uid, found.st_gid)

    def _present(self, at: At) -> Mapping[bytes, bytes]:
        """The extended attributes that something has already: a new file may get ACLs from its directory."""
        try:
            return {name: self._target.xattr(at, name) for name in self._target.xattrs(at)}
        except OSError as error:
            if error.errno not in _NO_XATTRS:
                raise
            return _NOTHING

    def _set_xattrs(self, at: At, wanted: Mapping[bytes, bytes], present: Mapping[bytes, bytes], path: bytes) -> None:
        for name in present.keys() - wanted.keys():
            if name.startswith(_MANAGED):
                self._try(partial(self._target.remove_xattr, at, name), name, path)
        for name, value in wanted.items():
            if present.get(name) != value:
                self._try(partial(self._target.set_xattr, at, name, value), name, path)

    def _try(self, change: Callable[[], None], name: bytes, path: bytes) -> None:
        try:
            change()
        except OSError as error:
            text = f"its attribute {text_of(name)}: {error.strerror}"
            self._findings.warn(path, text, kind=(name, error.errno))


def _part(xattrs: Mapping[bytes, bytes], *, own: bool) -> Mapping[bytes, bytes]:
    """The attributes in the name space of users, or all others."""
    return {name: value for name, value in xattrs.items() if name.startswith(_OWN) == own}


def _managed(xattrs: Mapping[bytes, bytes]) -> Mapping[bytes, bytes]:
    """Those that are removed if the snapshot has them not. Others are the system's, such as labels."""
    return {name: value for name, value in xattrs.items() if name.startswith(_MANAGED)}
