"""What a restore is asked for, how far it is, and what it did. Values only; `restore` shows them to others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import get_args

from basin.errors import InvalidArgument
from basin.layers.snapshots.documents import Problem
from basin.layers.snapshots.metadata import OwnersKept
from basin.layers.snapshots.placing import Overwrite


@dataclass(frozen=True)
class RestoreProgress:
    """How far a restore is: what was written, left, or kept. `size_expected` grows until the first rows are read."""

    files: int
    size: int
    files_expected: int
    size_expected: int
    seconds: float
    current: str


def _all(_path: bytes, _is_directory: bool, /) -> bool:  # noqa: FBT001  # as the caller's own predicate is called
    return True


@dataclass(frozen=True)
class RestoreOptions:
    """How to restore.

    `wanted` chooses: called with a path from what is restored on, and whether it is a directory. A directory that it
    leaves out is made all the same if something below is wanted.

    `overwrite`, of what is there: "differing" leaves files whose size and mtime agree, and links and devices that are
    the same, but for their metadata; replaces others; and refuses what stands where a directory belongs. "always"
    writes everything anew, and replaces that too. "never" leaves what is there as it is.

    `delete` removes what the snapshot has not, and `wanted` does not spare, from directories that it has.

    `owners`: "names" gives files to the users and groups of the same names, or else numbers; "numbers"; "none" leaves
    them to who restores.

    `verify` reads back and hashes what was written, and compares files that agree by their content too: what is read
    may come from the system's memory. `sparse` makes holes in files that had some, and of parts that are all zeros.
    `durable`: what was restored survives a power cut once the restore has ended; one sync of each file system.
    `dry_run` changes nothing, and counts what would be done.

    `progress` is called often, on the thread that restores. `threads` write at a time; None: two, from a bucket four.
    """

    wanted: Callable[[bytes, bool], bool] = _all
    overwrite: Overwrite = "differing"
    delete: bool = False
    owners: OwnersKept = "names"
    verify: bool = False
    sparse: bool = True
    durable: bool = True
    dry_run: bool = False
    progress: Callable[[RestoreProgress], None] | None = None
    threads: int | None = None

    def __post_init__(self) -> None:
        if self.overwrite not in get_args(Overwrite):
            raise InvalidArgument(f"overwrite is one of {', '.join(get_args(Overwrite))}, not {self.overwrite!r}")
        if self.owners not in get_args(OwnersKept):
            raise InvalidArgument(f"owners is one of {', '.join(get_args(OwnersKept))}, not {self.owners!r}")
        if self.threads is not None and self.threads < 1:
            raise InvalidArgument("at least one thread writes")


@dataclass(frozen=True)
class RestoreReport:
    """What a restore did, or in a dry run would do. Sizes in bytes.

    Of problems and warnings the first thousand are listed; of warnings only the first of each kind.
    """

    files: int
    """Written."""
    size: int
    """Of these."""
    unchanged: int
    """Files that agreed already."""
    kept: int
    """What was left because of `overwrite="never"`."""
    verified: int
    """Files that were read back, or compared."""
    directories: int
    """Made."""
    others: int
    """Links, devices, fifos and sockets that were made."""
    hard_links: int
    """Further links of files."""
    deleted: int
    """Removed: files and directories that the snapshot has not."""
    skipped: int
    """Rows below a directory that could not be made."""
    problem_count: int
    """What was not restored."""
    damage_count: int
    """Of these, what the basin does not hold any more, or not undamaged."""
    warning_count: int
    """What was restored, but for something that needs privilege, or that the target does not know."""
    seconds: float
    problems: Sequence[Problem]
    warnings: Sequence[Problem]
