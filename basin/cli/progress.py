"""A progress bar on standard error, for a job that turns out to be long.

Invariants: nothing is shown unless standard error is a terminal and the job has run for a second; the bar disappears
at the end, so results stay clean; a command works the same without it. Only `basin.cli` imports this module.
"""

from __future__ import annotations

import dataclasses
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any, Final, Protocol, Self, cast

from basin.cli.output import flush, print_json, printable, wants_json

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

DELAY_S: Final = 1.0


class Progress:
    """Counts the bytes of a job with `advance`; the bar comes up by itself. Use as a context manager."""

    def __init__(self, label: str, total: int | None = None) -> None:
        """`total`: bytes to come; None shows a moving bar without an end."""
        self._label = label
        self._total = total
        self._done = 0
        self._bar: RichProgress | None = None
        self._lock = threading.Lock()
        self._ended = False
        self._timer: threading.Timer | None = None

    def advance(self, size: int) -> None:
        """Say that `size` more bytes are done."""
        self.show(self._done + size, self._total)

    def show(self, done: int, total: int | None) -> None:
        """Say how many bytes are done, of how many."""
        self._done, self._total = done, total
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done, total=total)

    def describe(self, label: str) -> None:
        """Say what is being done now."""
        self._label = label
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], description=label)

    @contextmanager
    def hidden(self) -> Iterator[None]:
        """Take the bar off the terminal while results are printed there."""
        with self._lock:
            if self._bar is not None:
                self._bar.stop()
            try:
                yield
                flush()
            finally:
                if self._bar is not None:
                    self._bar.start()

    def __enter__(self) -> Self:
        if sys.stderr is not None and sys.stderr.isatty():
            self._timer = threading.Timer(DELAY_S, self._show)
            self._timer.daemon = True
            self._timer.start()
        return self

    def __exit__(self, *_error: object) -> None:
        with self._lock:
            self._ended = True
        if self._timer is not None:
            self._timer.cancel()
        if self._bar is not None:
            self._bar.stop()

    def _show(self) -> None:
        """Runs on the timer's thread, once."""
        with self._lock:
            if not self._ended:
                self._bar = self._start()

    def _start(self) -> RichProgress:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )
        from rich.progress import Progress as RichProgress

        bar = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            TimeElapsedColumn(),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=Console(file=sys.stderr),
            transient=True,
            redirect_stdout=False,
        )
        bar.add_task(self._label, total=self._total, completed=self._done)
        bar.start()
        return bar


class Told(Protocol):
    """How far a job is; a dataclass. Sizes in bytes; `size_expected` is 0 where nothing is known of it."""

    @property
    def files(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def size_expected(self) -> int: ...
    @property
    def seconds(self) -> float: ...
    @property
    def current(self) -> str: ...


class Teller:
    """Tells how far a long job is: a bar on a terminal, or JSON lines, a second apart. Use as a context manager."""

    def __init__(self, label: str, *, quiet: bool) -> None:
        self._json = wants_json() and not quiet
        self._bar = None if quiet or self._json else Progress(label)
        self._every_s = DELAY_S if self._json else DELAY_S / 10
        self._told = time.monotonic()

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.__exit__(*error)

    def tell(self, done: Told) -> None:
        """Called often."""
        now = time.monotonic()
        if now - self._told < self._every_s:
            return
        self._told = now
        if self._json:
            fields = dataclasses.asdict(cast(Any, done))
            print_json({"type": "progress", **fields, "seconds_left": _seconds_left(done)})
        elif self._bar is not None:
            self._bar.describe(f"{done.files:,} files, {printable(done.current)[-40:]}")
            self._bar.show(done.size, done.size_expected or None)


def _seconds_left(done: Told) -> float | None:
    """By the bytes that are expected; None if nothing is known of them."""
    if not done.size or done.size >= done.size_expected:
        return None
    return round(done.seconds * (done.size_expected - done.size) / done.size, 1)


class CountingReader:
    """A binary file whose reads advance a progress bar. Owns nothing: the caller closes the file."""

    def __init__(self, file: IO[bytes], progress: Progress) -> None:
        self._file = file
        self._progress = progress
        self.size = 0

    def read(self, size: int = -1) -> bytes:
        """As the file's own `read`."""
        data = self._file.read(size)
        self.size += len(data)
        self._progress.advance(len(data))
        return data
