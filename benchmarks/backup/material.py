"""What is backed up: a tree of real files, and one large file; how they change, and how they are put back.

Invariants:
- The same roots and numbers give the same tree, byte for byte: what is taken is decided by hashes of paths, never by
  the order of a listing or by chance. `Facts.digest` says whether two trees are the same.
- `undo` gives back what `change` changed, with contents and times of modification, so that all rounds begin alike.
- Nothing is read into memory whole, because the peak of this process is the floor of what it can measure of others.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import stat
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Protocol

MIB: Final = 1 << 20
ROOTS: Final = tuple(map(Path, ("/usr/share", "/usr/include", "/usr/lib/python3", "/usr/lib/x86_64-linux-gnu")))
"""Texts, pictures, sources, compiled modules and libraries, as a Linux machine has them: documentation is compressible,
pictures and catalogues are not, and most files are small."""
FILE_SIZE_MAX: Final = 24 * MIB
"""Larger files are left out of the tree: a few would be most of its bytes, and the large file stands for them."""
ONE_FILE_SIZE: Final = 100_000
"""About so large is the file of the tree that is restored alone."""
CHANGED_SHARE: Final = 100
"""One file in so many changes; of the large file, one byte in so many."""
INSERTED_SIZE: Final = 12_345
"""Bytes of an insertion into the large file; odd, so that everything behind it lies on other offsets."""
_WRITTEN_S: Final = 1_600_000_000
"""The time of the large file, so that its digest is the same in every run."""
_TURN: Final = 128
PHRASES: Final = random.Random("phrases").randbytes(64 * _TURN)
_TICK_S: Final = 0.005
_COPY_SIZE: Final = MIB
_DIFFERENCES_MAX: Final = 10


class SourceMissing(Exception):
    """No root has a file that could be taken."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What there is to back up. `digest` is over paths, kinds, modes, times, link targets and contents."""

    files: int
    links: int
    directories: int
    size: int
    digest: str

    def __str__(self) -> str:
        return (
            f"{self.files:,} files, {self.links:,} links, {self.directories:,} directories, {self.size:,} bytes, "
            f"digest {self.digest}"
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Material(Protocol):
    """Something to back up. `change` and `undo` take turns."""

    @property
    def title(self) -> str: ...
    @property
    def description(self) -> str: ...
    @property
    def source(self) -> Path:
        """The directory that is backed up."""

    @property
    def one_file(self) -> str | None:
        """The file that is restored alone, from `source` on; None where all is one file."""

    def change(self) -> None: ...
    def undo(self) -> None: ...


def ordered(paths: Iterable[str]) -> list[str]:
    """In the order of their hashes, which no listing, no clock and no neighbour decides."""
    return sorted(paths, key=lambda path: hashlib.blake2b(os.fsencode(path), digest_size=16).digest())


def copy_tree(roots: Sequence[Path], target: Path, *, files_max: int, size_max: int) -> None:
    """Copy whole directories of `roots` to `target`, as many as have room within both bounds.

    Directories come in the order of the hashes of their paths; one that would go beyond a bound is passed over.
    Regular files up to `FILE_SIZE_MAX` and symbolic links are taken, with mode and time of modification. Raises
    `SourceMissing` if that is nothing.
    """
    found = {path: names for root in roots for path, names in _directories(root)}
    count = size = 0
    for path in ordered(found):
        wanted = [(name, os.lstat(f"{path}/{name}")) for name in found[path]]
        wanted = [(name, info) for name, info in wanted if info.st_size <= FILE_SIZE_MAX]
        more = sum(info.st_size for _, info in wanted if stat.S_ISREG(info.st_mode))
        if not wanted or count + len(wanted) > files_max or size + more > size_max:
            continue
        folder = target / path.lstrip("/")
        folder.mkdir(parents=True, exist_ok=True)
        for name, _ in wanted:
            shutil.copy2(f"{path}/{name}", folder / name, follow_symlinks=False)
        count, size = count + len(wanted), size + more
    if not count:
        raise SourceMissing(f"nothing to back up below {', '.join(map(str, roots))}")


def _directories(root: Path) -> Iterator[tuple[str, list[str]]]:
    """Every directory below `root` with the names of the files and links that may be read."""
    for parent, directories, names in os.walk(root):
        linked = [name for name in directories if Path(parent, name).is_symlink()]
        yield parent, sorted(name for name in [*names, *linked] if _may_be_taken(f"{parent}/{name}"))


def _may_be_taken(path: str) -> bool:
    mode = os.lstat(path).st_mode
    return stat.S_ISLNK(mode) or (stat.S_ISREG(mode) and os.access(path, os.R_OK))


def facts_of(folder: Path) -> Facts:
    """Read everything below `folder`, which also brings it into the memory of the system."""
    counts = {stat.S_IFREG: 0, stat.S_IFLNK: 0, stat.S_IFDIR: 0}
    digest, size = hashlib.blake2b(digest_size=16), 0
    for path in walk(folder):
        info = path.lstat()
        kind = stat.S_IFMT(info.st_mode)
        counts[kind] += 1
        digest.update(b"%s\0%o\0" % (os.fsencode(path.relative_to(folder)), info.st_mode))
        if kind == stat.S_IFLNK:
            digest.update(os.fsencode(path.readlink()))
        elif kind == stat.S_IFREG:
            size += info.st_size
            digest.update(b"%d\0%d\0" % (info.st_size, info.st_mtime_ns))
            for piece in _pieces(path):
                digest.update(piece)
    return Facts(counts[stat.S_IFREG], counts[stat.S_IFLNK], counts[stat.S_IFDIR], size, digest.hexdigest())


def walk(folder: Path) -> Iterator[Path]:
    """Everything below `folder`, sorted within each directory; links are not followed."""
    for parent, directories, names in os.walk(folder):
        directories.sort()
        yield from (Path(parent, name) for name in sorted([*directories, *names]))


def _pieces(path: Path) -> Iterator[bytes]:
    with path.open("rb", buffering=0) as file:
        while piece := file.read(_COPY_SIZE):
            yield piece


def differences(source: Path, restored: Path) -> list[str]:
    """What of kind, mode, time, content or link target is not the same; the first few.

    `restored` is a directory if `source` is one, and else a file.
    """
    expected = [source, *walk(source)] if source.is_dir() else [source]
    found = []
    for path in expected:
        name = path.relative_to(source)
        reason = _difference(path, restored / name)
        if reason:
            found.append(f"{name}: {reason}")
    if source.is_dir() and restored.is_dir():
        names = {path.relative_to(source) for path in expected}
        found += [
            f"{one.relative_to(restored)}: not in the source"
            for one in walk(restored)
            if one.relative_to(restored) not in names
        ]
    return found[:_DIFFERENCES_MAX]


def _difference(path: Path, other: Path) -> str:
    here = path.lstat()
    try:
        there = other.lstat()
    except OSError:
        return "missing"
    if here.st_mode != there.st_mode:
        return f"mode {there.st_mode:o} instead of {here.st_mode:o}"
    if stat.S_ISLNK(here.st_mode):
        return "" if path.readlink() == other.readlink() else "another target"
    if here.st_mtime_ns != there.st_mtime_ns:
        return f"time {there.st_mtime_ns} instead of {here.st_mtime_ns}"
    if stat.S_ISREG(here.st_mode) and not _same_content(path, other):
        return "another content"
    return ""


def _same_content(path: Path, other: Path) -> bool:
    with path.open("rb", buffering=0) as one, other.open("rb", buffering=0) as two:
        while piece := one.read(_COPY_SIZE):
            if two.read(_COPY_SIZE) != piece:
                return False
        return not two.read(1)


def half_random(rng: random.Random, size: int) -> bytes:
    """Random bytes and known phrases in turns: every compressor that looks back halves them, whatever its level."""
    phrases = [PHRASES[at : at + _TURN] for at in range(0, len(PHRASES), _TURN)]
    turns = size // (2 * _TURN) + 1
    noise = rng.randbytes(turns * _TURN)
    chosen = rng.choices(phrases, k=turns)
    return b"".join(noise[at * _TURN : (at + 1) * _TURN] + chosen[at] for at in range(turns))[:size]


class TreeMaterial:
    """A tree of real files. Of its changed files a quarter each is overwritten in the middle, appended to, written
    anew, and deleted with a new file beside it.
    """

    def __init__(self, folder: Path, roots: Sequence[Path], *, files_max: int, size_max: int) -> None:
        """Copy the tree into the empty directory `folder`. Raises `SourceMissing`."""
        self._source = folder / "tree"
        self._kept = folder / "tree-kept"
        self._new: list[Path] = []
        self._changed: list[Path] = []
        copy_tree(roots, self._source, files_max=files_max, size_max=size_max)
        self.facts = facts_of(self._source)
        self._roots = roots
        regular = [path for path in walk(self._source) if path.is_file() and not path.is_symlink()]
        self._names = ordered(str(path.relative_to(self._source)) for path in regular)
        self._one_file = min(self._names, key=self._distance)

    @property
    def title(self) -> str:
        return "tree"

    @property
    def description(self) -> str:
        return f"directories of {', '.join(map(str, self._roots))}: {self.facts}"

    @property
    def source(self) -> Path:
        return self._source

    @property
    def one_file(self) -> str | None:
        return self._one_file

    def changing(self) -> list[Path]:
        """The files that `change` touches."""
        count = max(4, len(self._names) // CHANGED_SHARE)
        return [self._source / name for name in self._names[: count + 1] if name != self._one_file][:count]

    def _distance(self, name: str) -> int:
        """By how much the size of a file is another than that of the one restored alone should be."""
        return abs((self._source / name).stat().st_size - ONE_FILE_SIZE)

    def change(self) -> None:
        self._changed, self._new = self.changing(), []
        for number, path in enumerate(self._changed):
            self._keep(path)
            rng = random.Random(number)
            size = path.stat().st_size
            with path.open("r+b") as file:
                if number % 4 == 0:
                    file.seek(size // 2)
                    file.write(half_random(rng, 64))
                elif number % 4 == 1:
                    file.seek(size)
                    file.write(half_random(rng, 1_000))
                elif number % 4 == 2:
                    file.write(half_random(rng, size or 100))
                else:
                    self._new.append(path.with_name(f"{path.name}.new"))
                    self._new[-1].write_bytes(half_random(rng, size or 100))
                    path.unlink()

    def undo(self) -> None:
        for path in self._new:
            path.unlink()
        for path in self._changed:
            (self._kept / path.relative_to(self._source)).replace(path)
        self._changed, self._new = [], []

    def _keep(self, path: Path) -> None:
        copy = self._kept / path.relative_to(self._source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, copy)


class FileMaterial:
    """One large file that compresses by two. Changed, it has pieces of a MiB overwritten and some bytes inserted.

    Beside it lies a small one, which is always the younger: borg does not trust its memory of the youngest file that it
    saw, and would read the large one again although it is unchanged.
    """

    def __init__(self, folder: Path, *, size: int) -> None:
        """Write the file and its changed form into the empty directory `folder`. `size` is a multiple of a MiB."""
        self._source = folder / "file"
        self._source.mkdir(parents=True)
        self._path = self._source / "large"
        self._younger = self._source / "younger"
        self._other = folder / "large-changed"
        self._before = folder / "large-before"
        self._count = size // MIB
        with self._path.open("wb") as file:
            file.writelines(self._pieces())
        os.utime(self._path, (_WRITTEN_S, _WRITTEN_S))
        self._younger.write_bytes(b"small")
        with self._other.open("wb") as file:
            file.writelines(self._changed_pieces())
        self._be_younger()
        self.facts = facts_of(self._source)

    @property
    def title(self) -> str:
        return "large file"

    @property
    def description(self) -> str:
        return (
            f"half of it random, half of it repetition; when it changes, 1 MiB is replaced {len(self.overwritten())} "
            f"times, and {INSERTED_SIZE:,} bytes are inserted {len(self.inserted())} times: {self.facts}"
        )

    @property
    def source(self) -> Path:
        return self._source

    @property
    def path(self) -> Path:
        """The large file."""
        return self._path

    @property
    def one_file(self) -> str | None:
        return None

    def overwritten(self) -> set[int]:
        """The numbers of the pieces that others replace."""
        return _spread(max(1, self._count // CHANGED_SHARE), self._count)

    def inserted(self) -> set[int]:
        """The numbers of the pieces in front of which something is inserted."""
        return _spread(max(1, self._count // (3 * CHANGED_SHARE)), self._count - 1)

    def change(self) -> None:
        """As an editor saves: the changed file takes the place of the old one, and is younger."""
        self._path.rename(self._before)
        self._other.rename(self._path)
        os.utime(self._path)
        self._be_younger()

    def undo(self) -> None:
        self._path.rename(self._other)
        self._before.rename(self._path)
        self._be_younger()

    def _be_younger(self) -> None:
        """Give the small file the newest time of change of its inode, and always the same time of modification.

        Such times come from a clock that ticks every few milliseconds, so the first try may not be enough.
        """
        os.utime(self._younger, (_WRITTEN_S, _WRITTEN_S))
        while self._younger.stat().st_ctime_ns <= self._path.stat().st_ctime_ns:
            time.sleep(_TICK_S)
            os.utime(self._younger, (_WRITTEN_S, _WRITTEN_S))

    def _pieces(self) -> Iterator[bytes]:
        rng = random.Random("large file")
        return (half_random(rng, MIB) for _ in range(self._count))

    def _changed_pieces(self) -> Iterator[bytes]:
        rng = random.Random("changes")
        overwritten, inserted = self.overwritten(), self.inserted()
        for number, piece in enumerate(self._pieces()):
            if number in inserted:
                yield half_random(rng, INSERTED_SIZE)
            yield half_random(rng, MIB) if number in overwritten else piece


def _spread(count: int, among: int) -> set[int]:
    """`count` numbers below `among`, at equal distances, none of them at an end."""
    return {among * (2 * number + 1) // (2 * count) for number in range(count)}
