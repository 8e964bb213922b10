"""Restoring: the rows of a tree, in their order, become files and directories below a target folder.

Rows of a directory come together, before those of its sub-directories. So a directory is made when its row comes; its
files are gathered into batches, which threads fetch and write (`writing`); links, devices and the like are made at
once (`placing`). What must wait for files that are still to be written is deferred (`batches`): further hard links, the
removal of what the snapshot has not, and the metadata of a directory, after all that is in it.

Invariants:

- Nothing is done outside of the target: every step is taken from an open directory in it (`target`), and a row whose
  name is no single component is refused.
- What fails concerns its own row, and those below it; it is noted, and the rest goes on. A full target, or storage that
  cannot be reached, ends the restore.
- Nothing is removed unless the caller asked for it, and all rows of the directory have come.
- Memory: some batches of contents, the names of one directory, the sub-directories of those above it.

Imported by `snapshot`, when something is restored.
"""

from __future__ import annotations

import os
import stat as modes
import time
import unicodedata
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Final

from basin.errors import InvalidArgument
from basin.format.tree import Entry, RowKind, is_name, order_of
from basin.layers.snapshots.attributes import Attributes, decode_attributes
from basin.layers.snapshots.batches import Batches, Step
from basin.layers.snapshots.documents import text_of
from basin.layers.snapshots.metadata import Findings, Metadata, NameTables, Owners
from basin.layers.snapshots.placing import Counts, Placer
from basin.layers.snapshots.restoring import RestoreOptions, RestoreProgress, RestoreReport
from basin.layers.snapshots.target import Folders, Target, require_room
from basin.layers.snapshots.writing import UNREADABLE, Contents, FileWriter, FirstLink, Job, Written

__all__ = ["RestoreOptions", "RestoreProgress", "RestoreReport", "restore"]

_TELL_ROWS: Final = 512
"""Between two calls of `progress`, where nothing has to be written."""
_THREADS: Final = 2
"""On two cores 42,672 files took 4.4 s, with one thread 5.0 and with four 5.3: they wait for each other there."""
_THREADS_REMOTE: Final = 4
_DIRECTORY: Final = int(RowKind.DIRECTORY)
_FILE: Final = int(RowKind.FILE)
_KINDS: Final = frozenset(map(int, RowKind))


def restore(
    entries: Iterable[Entry],
    contents: Contents,
    path: bytes,
    options: RestoreOptions | None = None,
    tables: NameTables | None = None,
    *,
    target: Target | None = None,
) -> RestoreReport:
    """Write rows, which come in tree order and with metadata, into the directory `path`, which is made if need be.

    `tables` are the snapshot's names of users and groups. `target` stands in for the file system's own effects.

    Raises `InvalidArgument` if `path` is no directory or rows are out of order, `OutOfSpace`, `StorageError`, `OSError`
    if the target cannot be opened or synced, and what reading the rows raises. Whatever was not restored is in the
    report. After an error the restore may be repeated: what is whole is not written again.
    """
    job = _Restore(contents, path, options or RestoreOptions(), tables, target or Target())
    return job.run(entries)


class _Directory:
    """A directory on the way of the walk, or yet to be entered.

    `is_there` is None until it is needed, and False if it is refused. `names`: its rows so far, by what they look like
    to who ignores case; `more`: further names that look like one of them.
    """

    __slots__ = (
        "children",
        "ignores_case",
        "is_new",
        "is_there",
        "is_wanted",
        "more",
        "names",
        "parent",
        "path",
        "row",
    )

    def __init__(self, parent: _Directory | None, path: bytes, row: Entry | None, *, is_wanted: bool) -> None:
        self.parent = parent
        self.path = path
        self.row = row
        self.is_wanted = is_wanted
        self.is_there: bool | None = None
        self.is_new = False
        self.names: dict[bytes, bytes] = {}
        self.more: set[bytes] = set()
        self.children: dict[bytes, _Directory] = {}
        self.ignores_case: bool | None = None

    def child(self, name: bytes, row: Entry | None, *, is_wanted: bool) -> _Directory:
        """A directory in it that is yet to be entered."""
        path = self.path + b"/" + name if self.path else name
        found = self.children[name] = _Directory(self, path, row, is_wanted=is_wanted)
        return found

    def leads_to(self, path: bytes) -> bool:
        """Whether a directory is this one, or lies below it."""
        return not self.path or path == self.path or path.startswith(self.path + b"/")


class _Restore:
    """One restore."""

    def __init__(
        self, contents: Contents, path: bytes, options: RestoreOptions, tables: NameTables | None, target: Target
    ) -> None:
        self._options = options
        self._target = target
        self._path = path
        self._contents = contents
        self._begun = time.monotonic()
        self._counts = Counts()
        self._findings = Findings()
        owners = None if options.owners == "none" else Owners(tables if options.owners == "names" else None)
        self._metadata = Metadata(target, owners, self._findings, time.time_ns())
        self._root = self._here = _Directory(None, b"", None, is_wanted=True)
        self._links: dict[tuple[int, int], FirstLink] = {}
        threads = options.threads or (_THREADS_REMOTE if contents.are_remote else _THREADS)
        self._batches = Batches(self._write, threads, on_written=self._merge, on_wait=self._tell)
        self._passed_size = 0
        """Bytes of files that were not written."""
        self._files_expected = 0
        self._size_expected = 0
        self._rows = 0
        self._current = b""
        self._folders: Folders
        self._placer: Placer
        self._writer: FileWriter

    def run(self, entries: Iterable[Entry]) -> RestoreReport:
        """Restore everything."""
        if self._open_root():
            self._run(entries)
        else:
            self._walk(entries)  # A dry run into what is not there.
        return self._report()

    def _open_root(self) -> bool:
        """Open the target, and make it if it is not there; False if it stays so."""
        root = self._root
        root.is_there = True
        try:
            if not os.path.lexists(self._path):
                root.is_new = True
                if self._options.dry_run:
                    return False
                self._target.make_root(self._path)
            self._folders = Folders(self._target, self._path)
        except (NotADirectoryError, FileExistsError) as error:
            raise InvalidArgument(f"{text_of(self._path)} is no directory") from error
        return True

    def _run(self, entries: Iterable[Entry]) -> None:
        options = self._options
        self._placer = Placer(
            self._target,
            self._folders,
            self._metadata,
            self._findings,
            self._counts,
            options.wanted,
            overwrite=options.overwrite,
            delete=options.delete,
            dry_run=options.dry_run,
        )
        self._writer = FileWriter(
            self._contents,
            self._target,
            self._folders,
            self._metadata,
            self._findings,
            verify=options.verify,
            sparse=options.sparse,
            durable=options.durable and not self._target.syncs_at_once,
        )
        try:
            self._walk(entries)
            self._batches.finish()
            self._tell()
            if options.durable and not options.dry_run:
                self._folders.sync()
        finally:
            self._batches.close()
            self._folders.close()

    def _report(self) -> RestoreReport:
        found = self._findings
        return RestoreReport(
            **vars(self._counts),
            problem_count=found.problem_count,
            damage_count=found.damage_count,
            warning_count=found.warning_count,
            seconds=time.monotonic() - self._begun,
            problems=found.problems,
            warnings=found.warnings,
        )

    # --- the walk ---------------------------------------------------------------------------------------------------

    def _walk(self, entries: Iterable[Entry]) -> None:
        for entry in entries:
            if entry.parent != self._here.path:
                self._go(entry.parent)
            self._rows += 1
            if self._rows % _TELL_ROWS == 0:
                self._current = entry.path
                self._tell()
            self._take(self._here, entry)
        self._end_rows(self._here)
        while True:
            self._leave(self._here)
            if self._here.parent is None:
                return
            self._here = self._here.parent

    def _go(self, path: bytes) -> None:
        """From the directory whose rows have ended to that whose rows come now."""
        if order_of(path) < order_of(self._here.path):  # What ended would be taken for incomplete, and removed from.
            raise InvalidArgument(f"the rows of {text_of(path)} come too late: they are not in tree order")
        if self._rows:
            self._end_rows(self._here)
        while not self._here.leads_to(path):
            self._leave(self._here)
            self._here = self._here.parent or self._root
        here = self._here
        names = [] if here.path == path else path[len(here.path) + bool(here.path) :].split(b"/")
        for name in names:
            here = here.children.pop(name) if name in here.children else self._without_row(here, name)
        here.path = path
        self._here = here

    def _without_row(self, directory: _Directory, name: bytes) -> _Directory:
        """A directory whose row did not come: made if something in it is wanted."""
        below = directory.child(name, None, is_wanted=False)
        del directory.children[name]
        if directory.is_there is False:
            below.is_there = False
        elif not is_name(name):
            below.is_there = False
            self._findings.problem(below.path, _not_a_name(name))
        return below

    def _end_rows(self, directory: _Directory) -> None:
        """All rows of a directory have come: remove what is in it besides."""
        if self._options.delete and directory.is_there and not directory.is_new:
            step = partial(self._purge, directory.path, directory.names, directory.more)
            self._batches.defer(partial(self._guarded, directory.path, step))
        directory.names, directory.more = {}, set()

    def _leave(self, directory: _Directory) -> None:
        """All rows below a directory have come."""
        for child in directory.children.values():  # Nothing is in them, or they would have been entered.
            if child.is_wanted:
                self._end_rows(child)
            self._finish(child)
        self._finish(directory)

    def _finish(self, directory: _Directory) -> None:
        """Set the metadata of a directory, once all that is in it has been written."""
        if directory.row is None or not directory.row.meta or not directory.is_there or self._options.dry_run:
            return
        if directory.is_new or (directory.is_wanted and self._options.overwrite != "never"):
            step = partial(self._set_metadata, directory.path, directory.row)
            self._batches.defer(partial(self._guarded, directory.path, step))

    def _set_metadata(self, path: bytes, row: Entry) -> None:
        attributes = decode_attributes(row.meta)
        with self._folders.using(path) as folder:
            found = self._target.stat(folder.descriptor)
            self._metadata.apply(folder.descriptor, attributes, kind=_DIRECTORY, path=path, found=found)
            if self._options.durable and not self._target.syncs_at_once:
                self._target.sync(folder.descriptor)

    def _purge(self, path: bytes, names: dict[bytes, bytes], more: set[bytes]) -> None:
        """Remove what a directory has besides these names, as `_Directory` has them."""
        ignores_case: bool | None = None
        with self._folders.using(path) as folder:
            for name in self._target.names(folder.descriptor):
                other = names.get(_without_case(name))
                if other == name or name in more:
                    continue
                if other is not None and ignores_case is None and not self._options.dry_run:
                    ignores_case = self._target.ignores_case(folder.descriptor)
                if other is None or not ignores_case:
                    self._placer.remove(path + b"/" + name if path else name)

    # --- rows -------------------------------------------------------------------------------------------------------

    def _take(self, directory: _Directory, entry: Entry) -> None:
        if not entry.parent:
            self._files_expected += entry.files if entry.kind == _DIRECTORY else entry.kind == _FILE
            self._size_expected += entry.size
        if directory.is_there is False:
            self._counts.skipped += 1
            if entry.kind == _DIRECTORY:
                directory.child(entry.name, None, is_wanted=False).is_there = False
            return
        self._guarded(entry.path, partial(self._restore, directory, entry))

    def _guarded(self, path: bytes, step: Step) -> None:
        """Do something that concerns one path; note what goes wrong."""
        try:
            step()
        except OSError as error:
            require_room(error)
            self._findings.problem(path, error)
        except (InvalidArgument, *UNREADABLE) as error:
            self._findings.problem(path, error)

    def _restore(self, directory: _Directory, entry: Entry) -> None:
        is_directory = entry.kind == _DIRECTORY
        below = directory.child(entry.name, entry, is_wanted=True) if is_directory else None
        try:
            if not is_name(entry.name) or entry.kind not in _KINDS:
                raise _not_a_name(entry.name)
            is_wanted = self._options.wanted(entry.path, is_directory)
            self._note_name(directory, entry.name, matters=is_wanted or is_directory)
            if not is_wanted:
                if below is not None:
                    below.is_wanted = False
                return
            attributes = decode_attributes(entry.meta) if entry.meta else None
            if below is not None:
                self._need(below)
            elif not self._need(directory):
                self._counts.skipped += 1
            elif entry.kind == _FILE:
                self._file(directory, entry, attributes)
            else:
                self._other(directory, entry, attributes)
        except BaseException:
            if below is not None:
                below.is_there = False
            raise

    def _note_name(self, directory: _Directory, name: bytes, *, matters: bool) -> None:
        """Refuse a name that a directory cannot have beside another one."""
        look = _without_case(name)
        other = directory.names.setdefault(look, name)
        if other is name:
            return
        if other == name or name in directory.more:
            raise InvalidArgument("the snapshot has this name twice")
        directory.more.add(name)
        if matters and self._ignores_case(directory):
            raise InvalidArgument(f"the target does not tell it from {text_of(other)}, which differs in case only")

    def _ignores_case(self, directory: _Directory) -> bool:
        if directory.ignores_case is None:
            directory.ignores_case = False
            if not self._options.dry_run and self._need(directory):
                with self._folders.using(directory.path) as folder:
                    directory.ignores_case = self._target.ignores_case(folder.descriptor)
        return directory.ignores_case

    def _need(self, directory: _Directory) -> bool:
        """Make a directory, and those above it, if they are not there; False if that was refused."""
        way = []
        here: _Directory | None = directory
        while here is not None and here.is_there is None:
            way.append(here)
            here = here.parent
        while way:
            here = way.pop()
            here.is_there = False
            if here.parent is not None and here.parent.is_there:
                self._guarded(here.path, partial(self._make, here, here.parent))
        return directory.is_there is True

    def _make(self, directory: _Directory, parent: _Directory) -> None:
        """Make a directory. Raises `OSError`, `InvalidArgument`."""
        if self._options.dry_run and parent.is_new:
            directory.is_new = True
            self._counts.directories += 1
        else:
            has_metadata = directory.row is not None and bool(directory.row.meta)
            with self._folders.using(parent.path) as folder:
                directory.is_new = self._placer.make_directory(
                    folder.descriptor, directory.path, is_new=parent.is_new, has_metadata=has_metadata
                )
        directory.is_there = True

    def _file(self, directory: _Directory, entry: Entry, attributes: Attributes | None) -> None:
        first, is_later = self._first_link(directory, entry, attributes)
        if is_later:
            return
        job = Job(entry, attributes, directory.is_new, first=first)
        if not directory.is_new:
            with self._folders.using(directory.path) as folder:
                agrees = self._look(folder.descriptor, job)
            if agrees is None:
                self._passed_size += entry.size
                return
            job = job._replace(agrees=agrees)
        if self._options.dry_run:
            self._counts.files += 1
            self._counts.size += entry.size
            self._passed_size += entry.size
            return
        self._batches.add(job)

    def _look(self, folder: int, job: Job) -> bool | None:
        """None if what is there stays; else whether it agrees, so that only its content is to be compared."""
        entry, attributes, options = job.entry, job.attributes, self._options
        found = self._target.look(folder, entry.name)
        if found is None:
            return False
        if options.overwrite == "never":
            self._counts.kept += 1
            return None
        if modes.S_ISDIR(found.st_mode):
            self._placer.clear(folder, entry)
            return False
        agrees = (
            options.overwrite == "differing"
            and attributes is not None
            and modes.S_ISREG(found.st_mode)
            and (found.st_size, found.st_mtime_ns) == (entry.size, attributes.mtime_ns)
        )
        if not agrees or (options.verify and not options.dry_run):
            return agrees
        if options.dry_run or self._writer.settle(folder, job):
            self._counts.unchanged += 1
            return None
        return False

    def _other(self, directory: _Directory, entry: Entry, attributes: Attributes | None) -> None:
        first, is_later = self._first_link(directory, entry, attributes)
        if is_later:
            return
        self._put(directory.path, entry, attributes, is_new=directory.is_new, first=first)

    def _put(
        self, path: bytes, entry: Entry, attributes: Attributes | None, *, is_new: bool, first: FirstLink | None
    ) -> None:
        if is_new and self._options.dry_run:
            self._counts.others += 1
            return
        with self._folders.using(path) as folder:
            self._placer.put(folder.descriptor, entry, attributes, is_new=is_new, first=first)

    # --- hard links -------------------------------------------------------------------------------------------------

    def _first_link(
        self, directory: _Directory, entry: Entry, attributes: Attributes | None
    ) -> tuple[FirstLink | None, bool]:
        """The first link of a row that has several, and whether this is a later one: then it is seen to."""
        if attributes is None or attributes.linked is None:
            return None, False
        device, count = attributes.linked
        key = (device, attributes.inode)
        first = self._links.get(key)
        if first is None:
            first = FirstLink(entry.parent, entry.name, count - 1)
            if first.left > 0:
                self._links[key] = first
            return first, False
        first.left -= 1
        if first.left <= 0:
            del self._links[key]
        if self._options.dry_run:
            self._would_link(directory, Job(entry, attributes))
        else:
            step = partial(self._link, directory.path, entry, attributes, first, is_new=directory.is_new)
            self._batches.defer(partial(self._guarded, entry.path, step))
        return first, True

    def _would_link(self, directory: _Directory, job: Job) -> None:
        agrees: bool | None = False
        if not directory.is_new:
            with self._folders.using(directory.path) as folder:
                agrees = self._look(folder.descriptor, job)
        self._counts.hard_links += agrees is not None

    def _link(self, path: bytes, entry: Entry, attributes: Attributes, first: FirstLink, *, is_new: bool) -> None:
        """Make a row a link of the first one, or, where that is not there, the first one itself."""
        if first.identity is not None:
            with self._folders.using(path) as folder, self._folders.using(first.parent) as first_folder:
                is_linked = self._placer.link(
                    folder.descriptor, entry, is_new=is_new, first=first, first_folder=first_folder.descriptor
                )
            if is_linked:
                self._passed_size += entry.size
                return
        first.parent, first.name, first.identity = entry.parent, entry.name, None
        if entry.kind != _FILE:
            self._put(path, entry, attributes, is_new=is_new, first=first)
            return
        job = Job(entry, attributes, is_new, first=first)
        with self._folders.using(path) as folder:
            agrees = False if is_new else self._look(folder.descriptor, job)
        if agrees is None:
            self._passed_size += entry.size
        else:
            self._merge(self._writer.write([job._replace(agrees=agrees)]))

    # --- what was done ----------------------------------------------------------------------------------------------

    def _write(self, jobs: Sequence[Job]) -> Written:
        """On a thread of the batches."""
        self._current = jobs[0].entry.path
        return self._writer.write(jobs)

    def _merge(self, written: Written) -> None:
        self._counts.files += written.files
        self._counts.size += written.size
        self._counts.unchanged += written.unchanged
        self._counts.verified += written.verified
        self._tell()

    def _tell(self) -> None:
        if self._options.progress is None:
            return
        counts = self._counts
        size = self._passed_size + (self._writer.done_size if self._root_is_open() else 0)
        self._options.progress(
            RestoreProgress(
                counts.files + counts.unchanged + counts.kept + counts.hard_links,
                size,
                self._files_expected,
                self._size_expected,
                time.monotonic() - self._begun,
                text_of(self._current),
            )
        )

    def _root_is_open(self) -> bool:
        return not (self._options.dry_run and self._root.is_new)


def _without_case(name: bytes) -> bytes:
    """What names have in common that some file systems take for the same."""
    if name.isascii():
        return name.lower()
    text = unicodedata.normalize("NFC", name.decode("utf-8", "surrogateescape")).casefold()
    return unicodedata.normalize("NFC", text).encode("utf-8", "surrogateescape")


def _not_a_name(name: bytes) -> InvalidArgument:
    return InvalidArgument(f"{text_of(name[:80])!r} leads elsewhere, or is no name: not restored")
