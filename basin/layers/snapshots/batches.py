"""Files on their way to the threads that write them, and what has to wait until they are written.

Invariants:

- A step that was deferred runs after all files that were added before it, and in the order of steps; on the thread
  that calls, never on one that writes.
- So many batches are under way that no thread is idle, and no more: each holds its contents in memory.

Imported by `restore`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Final, TypeAlias

from basin.layers.snapshots.writing import SMALL_SIZE, Job, Written

_BATCH_SIZE: Final = 1 << 20
_BATCH_FILES: Final = 512
_STEPS_MAX: Final = 4096
"""So many steps may wait for a batch that is not full."""
_PATIENCE_S: Final = 0.2

Step: TypeAlias = Callable[[], None]


class Batches:
    """Files and steps in their order. Used by one thread, and closed by it."""

    def __init__(
        self,
        write: Callable[[Sequence[Job]], Written],
        threads: int,
        *,
        on_written: Callable[[Written], None],
        on_wait: Callable[[], None],
    ) -> None:
        """`write` runs on `threads` at once. `on_written` takes its results; `on_wait` is called every now and then."""
        self._write = write
        self._running_max = threads + 1
        self._on_written = on_written
        self._on_wait = on_wait
        self._pool = ThreadPoolExecutor(threads, "basin-restore")
        self._batch: list[Job] = []
        self._batch_size = 0
        self._behind_batch: list[Step] = []
        self._queue: deque[Future[Written] | Step] = deque()
        self._running = 0

    def add(self, job: Job) -> None:
        """Have a file written, soon. Raises what writing another one raised."""
        if job.entry.size > SMALL_SIZE:
            self._submit([job])
            return
        self._batch.append(job)
        self._batch_size += job.entry.size
        if self._batch_size >= _BATCH_SIZE or len(self._batch) >= _BATCH_FILES:
            self._flush()

    def defer(self, step: Step) -> None:
        """Run a step once all files that were added so far are written: at once, if they are."""
        if self._batch:
            self._behind_batch.append(step)
            if len(self._behind_batch) >= _STEPS_MAX:
                self._flush()
        elif self._queue:
            self._queue.append(step)
        else:
            step()

    def finish(self) -> None:
        """Wait until everything is done."""
        self._flush()
        self._drain(0)

    def close(self) -> None:
        """End the threads; what has not begun is not done. After an error, too."""
        self._pool.shutdown(cancel_futures=True)

    def _flush(self) -> None:
        batch, steps = self._batch, self._behind_batch
        self._batch, self._batch_size, self._behind_batch = [], 0, []
        if batch:
            self._submit(batch)
        self._queue.extend(steps)

    def _submit(self, jobs: Sequence[Job]) -> None:
        self._drain(self._running_max - 1)
        self._queue.append(self._pool.submit(self._write, jobs))
        self._running += 1

    def _drain(self, count: int) -> None:
        """Wait until at most `count` batches are under way, and run what waited for the others."""
        while self._queue and (self._running > count or not isinstance(self._queue[0], Future)):
            step = self._queue.popleft()
            if not isinstance(step, Future):
                step()
                continue
            while wait([step], _PATIENCE_S).not_done:
                self._on_wait()
            self._running -= 1
            self._on_written(step.result())
