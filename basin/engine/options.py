"""Options: those stored with a basin when it is created, and those of one handle.

Frozen; validated once, here. `basin.open` turns unknown names into `InvalidArgument`.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from typing import Any, Final, Literal

from basin.engine.cutting import CHUNKERS, FASTCDC, FIXED, cuts_by_content
from basin.engine.tiers import TIERS
from basin.errors import InvalidArgument
from basin.format.layout import MIB
from basin.storage.requests import RequestPolicy

_DAY_S: Final = 86_400.0


@dataclass(frozen=True, slots=True)
class Options:
    """Sizes are bytes, times are seconds. All but the first six may differ from handle to handle.

    Stored at creation:

    - `inline_max`: values up to this size live in the name's own entry; larger ones are content of their own, so equal
      ones are stored once. 512: below it, a second look-up costs more than the copy.
    - `part_max`: content up to this size is one grain, above it a list of parts. 4 MiB bounds what one read must hold.
    - `part_size`: size of the parts: in the mean, or of each but the last, as `chunker` says.
    - `chunker`: how larger contents are cut. "fastcdc": by what they say, so that a version of a file with some bytes
      more or less shares its parts with the other; parts have a quarter of `part_size` to four times it (at most
      `part_max`). "fixed": at every `part_size`. By default "fastcdc", where sizes allow that: `part_size` 320 bytes
      to 4 MiB, `part_max` twice that and 1 KiB at least.
    - `data_url`: where `data/`, the grains of contents, lies instead: another folder for a basin on a disk, another
      bucket or prefix for one in a bucket.
    - `data_storage_class`: S3's storage class of the objects below `data/`, such as "STANDARD_IA" or "DEEP_ARCHIVE";
      `basin.engine.tiers` lists them.

    Of this handle:

    - `sync`: when `commit()` returns: `"commit"` after the record is durable; `"interval"` at once, durable within
      `sync_interval_s`; `"never"` after the record is written: a power cut may lose recent commits, a kill does not.
    - `sync_interval_s`: within this time, changes outside batches are committed by a timer.
    - `refresh_interval_s`: reads see other writers' commits at most this much later. 0 looks before every read.
    - `compression_level`: zstd; 1 is the knee of the curve for mixed data.
    - `memtable_size`: names in memory before they are written as a sorted run.
    - `stratum_size`: a stratum ends here (or at 2^17 grains).
    - `history_s`, `history_size`: old versions and the log are kept this long, as long as the log is no larger.
    - `lock_timeout_s`: how long to wait for another writer's lock.
    - `cache_size`: what is kept of what was read: a quarter for pages of indexes, the rest for blocks of names and for
      grains as they are stored.
    - `open_files_max`: strata kept open for reading.
    - `reserve_size`: disk space held back, so that deletions can be recorded on a full disk.
    - `checkpoint_every`: records that an opener replays at most, about: names are flushed and the state is stored.
    - `grace_s`: how long what a prune condemned stays, so that a writer who needs it can take it back; in a bucket also
      what was merged away, for those who still read it.
    - `threads`: workers that compress and encrypt in `put_many`, `get_many` and large streams; 0: one a core.

    In a bucket these have other defaults, for every request costs time and money: `sync_interval_s` 5,
    `refresh_interval_s` a day (call `refresh`, or set it to poll), `checkpoint_every` 200, `grace_s` a
    day. And there are:

    - `job`: what this handle writes for, such as a nightly backup. A session of a job takes over at once from an
      earlier one of the same job that died (or was not told to end): what that had sent is kept, and it writes no more.
    - `session_timeout_s`: other sessions count as dead when they have logged nothing for so long.
    - `cache_folder`, `disk_cache_size`: where and how much metadata and indexes are cached on disk; size 0: nothing.
    - `spool_folder`: where strata grow until they are sent; by default the system's folder for temporary files.
    - `connect_timeout_s`, `read_timeout_s`: of one request.
    - `request_attempts`, `request_deadline_s`: how often and how long a request is repeated that failed in passing.
    - `request_count`: requests on their way at a time.
    - `upload_count`: strata that are sent at a time; each is in memory meanwhile.
    """

    inline_max: int = 512
    part_max: int = 4 * MIB
    part_size: int = MIB
    chunker: str = ""
    data_url: str = ""
    data_storage_class: str = ""
    sync: Literal["commit", "interval", "never"] = "commit"
    sync_interval_s: float = 0.1
    refresh_interval_s: float = 1.0
    compression_level: int = 1
    memtable_size: int = 16 * MIB
    stratum_size: int = 64 * MIB
    history_s: float = 3600.0
    history_size: int = 256 * MIB
    lock_timeout_s: float = 30.0
    cache_size: int = 64 * MIB
    open_files_max: int = 256
    reserve_size: int = 4 * MIB
    threads: int = 0
    checkpoint_every: int = 1000
    job: str = ""
    session_timeout_s: float = _DAY_S
    grace_s: float = 3600.0
    cache_folder: str = ""
    disk_cache_size: int = 1024 * MIB
    spool_folder: str = ""
    connect_timeout_s: float = 5.0
    read_timeout_s: float = 30.0
    request_attempts: int = 8
    request_deadline_s: float = 120.0
    request_count: int = 32
    upload_count: int = 2

    def __post_init__(self) -> None:
        """Raise `InvalidArgument` on a value of the wrong type or range."""
        for entry in dataclasses.fields(self):
            value = getattr(self, entry.name)
            if entry.name in _TEXTS:
                if type(value) is not str:
                    raise InvalidArgument(f"{entry.name} is a text, not {value!r}", option=entry.name)
                continue
            if entry.name == "sync":
                if value not in ("commit", "interval", "never"):
                    raise InvalidArgument(f"sync is 'commit', 'interval' or 'never', not {value!r}", option="sync")
                continue
            kinds = (int, float) if entry.name.endswith("_s") else (int,)
            lowest, highest = _RANGES[entry.name]
            if type(value) not in kinds or not lowest <= value <= highest:
                raise InvalidArgument(
                    f"{entry.name} is a number from {lowest} to {highest}, not {value!r}", option=entry.name
                )
        if self.data_storage_class and self.data_storage_class not in TIERS:
            raise InvalidArgument(
                f"data_storage_class is one of {', '.join(TIERS)}, not {self.data_storage_class!r}",
                option="data_storage_class",
            )
        if self.part_size > self.part_max:
            raise InvalidArgument("part_size is at most part_max", option="part_size")
        can_cut = cuts_by_content(self.part_size, self.part_max)
        if not self.chunker:
            object.__setattr__(self, "chunker", FASTCDC if can_cut else FIXED)
        if self.chunker not in CHUNKERS:
            raise InvalidArgument(f"chunker is one of {', '.join(CHUNKERS)}, not {self.chunker!r}", option="chunker")
        if self.chunker == FASTCDC and not can_cut:
            raise InvalidArgument(
                f"parts of {self.part_size} bytes, at most {self.part_max}, can only be cut with chunker='fixed'",
                option="chunker",
            )

    def stored(self) -> dict[str, Any]:
        """What goes into the options of `basin.json`: the numbers, and the texts that say something."""
        values = {name: getattr(self, name) for name in STORED if name != "chunker"}
        return {name: value for name, value in values.items() if value != "" or name not in _TEXTS}

    def request_policy(self) -> RequestPolicy:
        """How requests to a bucket are repeated."""
        return RequestPolicy(
            connect_timeout_s=self.connect_timeout_s,
            read_timeout_s=self.read_timeout_s,
            attempts=self.request_attempts,
            deadline_s=self.request_deadline_s,
            concurrency=self.request_count,
        )

    @property
    def worker_count(self) -> int:
        """Number of worker threads."""
        return self.threads or min(8, os.cpu_count() or 1)


STORED: Final = ("inline_max", "part_max", "part_size", "chunker", "data_url", "data_storage_class")
"""Fixed when a basin is created; `chunker` has a field of its own in `basin.json`."""
_TEXTS: Final = frozenset({"chunker", "job", "cache_folder", "spool_folder", "data_url", "data_storage_class"})
REMOTE_DEFAULTS: Final[dict[str, Any]] = {
    "sync_interval_s": 5.0,
    "refresh_interval_s": _DAY_S,
    "checkpoint_every": 200,
    "grace_s": _DAY_S,
    "reserve_size": 0,
}
"""What differs where files are objects: no timer may ask a bucket for nothing."""
_RANGES: Final[dict[str, tuple[float, float]]] = {
    "inline_max": (0, 65_536),
    "part_max": (64, 64 * MIB),
    "part_size": (64, 64 * MIB),
    "sync_interval_s": (0.001, 3600.0),
    "refresh_interval_s": (0.0, _DAY_S),
    "compression_level": (-7, 19),
    "memtable_size": (1024, 1 << 40),
    "stratum_size": (4096, 1 << 31),
    "history_s": (0.0, 36_500 * _DAY_S),
    "history_size": (0, 1 << 50),
    "lock_timeout_s": (0.0, _DAY_S),
    "cache_size": (1 << 16, 1 << 40),
    "open_files_max": (4, 1 << 20),
    "reserve_size": (0, 1 << 30),
    "threads": (0, 256),
    "checkpoint_every": (1, 1 << 30),
    "session_timeout_s": (1.0, 3650 * _DAY_S),
    "grace_s": (0.0, 3650 * _DAY_S),
    "disk_cache_size": (0, 1 << 50),
    "connect_timeout_s": (0.01, 3600.0),
    "read_timeout_s": (0.01, 3600.0),
    "request_attempts": (1, 1000),
    "request_deadline_s": (0.01, _DAY_S),
    "request_count": (1, 1024),
    "upload_count": (0, 64),
}


def make_options(given: dict[str, Any], stored: dict[str, Any] | None = None, *, remote: bool = False) -> Options:
    """Defaults (`remote`: those of a bucket), overlaid by what the basin stores, overlaid by what the caller gives.

    Raises `InvalidArgument` on an unknown option, and on a stored option that differs from the basin's.
    """
    known = {entry.name for entry in dataclasses.fields(Options)}
    unknown = sorted(set(given) - known)
    if unknown:
        raise InvalidArgument(f"unknown option {unknown[0]!r}; basin.Options lists all", option=unknown[0])
    if stored is not None:
        for name, value in {"data_url": "", "data_storage_class": "", **stored}.items():
            if name in given and given[name] != value:
                raise InvalidArgument(f"{name} was fixed at {value!r} when the basin was created", option=name)
    defaults = REMOTE_DEFAULTS if remote else {}
    return Options(**{**defaults, **{name: value for name, value in (stored or {}).items() if name in STORED}, **given})
