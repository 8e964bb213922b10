"""The contestants as command lines: Basin, restic and borg, each with a repository and a home of its own.

Invariants:
- Secrets and caches lie in the home that is given, never in the user's.
- A side is what its users get: default options, but for the compression, which is zstd's first level or what is
  nearest to it, and for output, which is turned off.

To take part, a program must be installed; what is absent is reported by `find_sides`, not guessed.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import basin

SUBJECT: Final = "basin"
PASSPHRASE: Final = "a passphrase of the benchmark"
_PROJECT: Final = Path(basin.__file__).resolve().parents[1]
_PROBE_TIMEOUT_S: Final = 60


@dataclass(frozen=True, slots=True)
class Place:
    """Where a side keeps what it stores, and everything else that it keeps."""

    repository: Path
    home: Path


class Side(ABC):
    """One program in one version. Its methods are command lines, run in `working_folder`; they hold no state.

    `number` counts the backups in a repository, from 1; the newest one is restored.
    """

    label: str
    """What its column is called."""
    note: str
    """What the reader must know about it."""

    @abstractmethod
    def environment(self, place: Place) -> dict[str, str]: ...
    @abstractmethod
    def init(self, place: Place) -> list[str]: ...
    @abstractmethod
    def backup(self, place: Place, source: Path, number: int) -> list[str]: ...
    @abstractmethod
    def restore(self, place: Place, source: Path, target: Path, number: int) -> list[str]:
        """Leaves to the system when what it wrote is on the disk."""

    def restore_synced(self, place: Place, source: Path, target: Path, number: int) -> list[str]:
        """The same, and what was restored survives a power cut once the command has ended."""
        return synced(self.restore(place, source, target, number), target)

    @abstractmethod
    def restore_file(self, place: Place, path: Path, target: Path, number: int) -> list[str]: ...
    @abstractmethod
    def list_snapshots(self, place: Place) -> list[str]: ...

    def restored(self, source: Path, target: Path) -> Path:
        """Where below `target` a restored `source` stands: under its whole path."""
        return target / str(source).lstrip("/")

    def restored_file(self, path: Path, target: Path) -> Path:
        """The same after `restore_file`."""
        return self.restored(path, target)


class BasinSide(Side):
    label = SUBJECT
    note = (
        "`python -m basin.cli`, default options: zstd 1; contents hashed with BLAKE3 and sealed with AES-256-GCM; "
        "opened by a key file, from which no key has to be derived slowly; no cache outside of the repository. Syncs "
        "when it commits. A restore syncs the file system that it wrote to, unless `--no-sync` is given, as it is here."
    )

    def environment(self, place: Place) -> dict[str, str]:
        return {**_environment(place), "PYTHONPATH": str(_PROJECT), "BASIN_SECRET_FILE": self._secret(place)}

    def init(self, place: Place) -> list[str]:
        return self._command(place, "init", "--secret-file", self._secret(place))

    def backup(self, place: Place, source: Path, number: int) -> list[str]:
        return self._command(place, "backup", "--quiet", str(source))

    def restore(self, place: Place, source: Path, target: Path, number: int) -> list[str]:
        return self._command(place, "restore", "--quiet", "--no-sync", "latest", str(target))

    def restore_synced(self, place: Place, source: Path, target: Path, number: int) -> list[str]:
        return self._command(place, "restore", "--quiet", "latest", str(target))

    def restore_file(self, place: Place, path: Path, target: Path, number: int) -> list[str]:
        return self._command(place, "restore", "--quiet", "--no-sync", f"latest:{path}", str(target))

    def list_snapshots(self, place: Place) -> list[str]:
        return self._command(place, "snapshots", "--json")

    def restored_file(self, path: Path, target: Path) -> Path:
        """A file that is asked for is written into the target itself."""
        return target / path.name

    @staticmethod
    def _command(place: Place, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "basin.cli", "-b", str(place.repository), *arguments]

    @staticmethod
    def _secret(place: Place) -> str:
        return str(place.home / "secret")


class ResticSide(Side):
    def __init__(self, program: str, version: str, *, compression: str) -> None:
        self.label = f"restic {version}"
        level = "zstd's fastest, about its level 1" if compression == "fastest" else "its lowest level, about zstd 3"
        self.note = (
            f"`--compression {compression}` ({level}); contents hashed with SHA-256 and sealed with AES-256-CTR and "
            "Poly1305; opened by a passphrase (scrypt, with every command); its cache of metadata is kept, and is "
            "warm. Syncs each pack that it stores, and no file that it restores."
        )
        self._program = program
        self._compression = compression

    def environment(self, place: Place) -> dict[str, str]:
        return {
            **_environment(place),
            "RESTIC_PASSWORD": PASSPHRASE,
            "RESTIC_CACHE_DIR": str(place.home / "cache"),
        }

    def init(self, place: Place) -> list[str]:
        return self._command(place, "init")

    def backup(self, place: Place, source: Path, number: int) -> list[str]:
        return self._command(place, "backup", "--compression", self._compression, str(source))

    def restore(self, place: Place, source: Path, target: Path, number: int) -> list[str]:
        return self._command(place, "restore", "latest", "--target", str(target))

    def restore_file(self, place: Place, path: Path, target: Path, number: int) -> list[str]:
        literal = re.sub(r"([\\*?\[])", r"\\\1", str(path))
        return [*self.restore(place, path, target, number), "--include", literal]

    def list_snapshots(self, place: Place) -> list[str]:
        return self._command(place, "snapshots", "--json")

    def _command(self, place: Place, *arguments: str) -> list[str]:
        return [self._program, "--quiet", "--repo", str(place.repository), *arguments]


class BorgSide(Side):
    def __init__(self, program: str, version: str, *, encryption: str) -> None:
        self.label = f"borg {version}"
        mac = "HMAC-SHA-256" if encryption == "repokey" else "BLAKE2b"
        self.note = (
            f"`--compression zstd,1`, `--encryption {encryption}`: contents hashed with {mac} and sealed with "
            f"AES-256-CTR and {mac}; one thread; opened by a passphrase (PBKDF2, with every command); its cache of "
            "files and of what is stored is kept, and is warm. Syncs each segment that it stores, and no file that it "
            "restores."
        )
        self._program = program
        self._encryption = encryption

    def environment(self, place: Place) -> dict[str, str]:
        return {**_environment(place), "BORG_PASSPHRASE": PASSPHRASE, "BORG_BASE_DIR": str(place.home)}

    def init(self, place: Place) -> list[str]:
        return [self._program, "init", "--encryption", self._encryption, str(place.repository)]

    def backup(self, place: Place, source: Path, number: int) -> list[str]:
        return [self._program, "create", "--compression", "zstd,1", self._archive(place, number), str(source)]

    def restore(self, place: Place, source: Path, target: Path, number: int) -> list[str]:
        return self._extract(place, target, number)

    def restore_file(self, place: Place, path: Path, target: Path, number: int) -> list[str]:
        return [*self._extract(place, target, number), str(path).lstrip("/")]

    def list_snapshots(self, place: Place) -> list[str]:
        return [self._program, "list", "--json", str(place.repository)]

    def _extract(self, place: Place, target: Path, number: int) -> list[str]:
        """It writes into the folder that it runs in."""
        enter = 'cd "$1" && shift && exec "$@"'
        return ["sh", "-c", enter, "sh", str(target), self._program, "extract", self._archive(place, number)]

    @staticmethod
    def _archive(place: Place, number: int) -> str:
        return f"{place.repository}::backup-{number}"


def synced(command: list[str], target: Path) -> list[str]:
    """The same, and then a sync of the file system that `target` lies on."""
    return ["sh", "-c", 'target=$1 && shift && "$@" && sync -f "$target"', "sh", str(target), *command]


def find_sides(wanted: Sequence[str], *, restic: Sequence[str], borg: Sequence[str]) -> tuple[list[Side], list[str]]:
    """The sides of the kinds `wanted` ("basin", "restic", "borg") that can run, Basin first; and why others cannot.

    `restic` and `borg` are programs, by name or path; several versions of one are several sides.
    """
    sides: list[Side] = []
    absent: list[str] = []
    if "basin" in wanted:
        sides.append(BasinSide())
    for kind, programs in (("restic", restic), ("borg", borg)):
        for program in programs if kind in wanted else ():
            found = _peer(kind, program)
            if found is None:
                absent.append(f"{kind}: no program `{program}` that runs here, so it has no column")
            else:
                sides.append(found)
    return sides, absent


def _peer(kind: str, program: str) -> Side | None:
    path = shutil.which(program)
    answer = _output(path, "version" if kind == "restic" else "--version") if path else ""
    version = re.match(rf"{kind} (\S+)", answer)
    if path is None or version is None:
        return None
    if kind == "borg":
        return BorgSide(path, version[1], encryption="repokey" if _hashes_in_hardware() else "repokey-blake2")
    choices = re.search(r"--compression mode[^\n]*", _output(path, "help", "backup"))
    fastest = choices is not None and "fastest" in choices[0]
    return ResticSide(path, version[1], compression="fastest" if fastest else "auto")


def _output(program: str, *arguments: str) -> str:
    """What a program prints, or nothing if it fails."""
    try:
        done = subprocess.run(
            [program, *arguments], capture_output=True, text=True, check=True, timeout=_PROBE_TIMEOUT_S
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout


def _hashes_in_hardware() -> bool:
    """Whether the processor has instructions for SHA-256: borg's manual then prefers it to BLAKE2."""
    information = Path("/proc/cpuinfo")
    return information.exists() and re.search(r"\b(sha_ni|sha2)\b", information.read_text()) is not None


def _environment(place: Place) -> dict[str, str]:
    """Nothing of the user's but the search path."""
    return {"PATH": os.environ.get("PATH", os.defpath), "HOME": str(place.home), "LANG": "C.UTF-8"}
