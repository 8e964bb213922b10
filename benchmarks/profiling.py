"""Where Basin's time goes in a job: one run under cProfile, which slows small functions most; read shares, not
seconds.
"""

from __future__ import annotations

import cProfile
import io
import pstats
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from benchmarks.entrant import BASIN
from benchmarks.jobs import Job

_ROWS: Final = 25


def profile_jobs(jobs: Sequence[Job], workspace: Path) -> None:
    """Print the costliest functions of each job. Threads that the engine starts are not seen by the profiler."""
    for job in jobs:
        job.prepare(BASIN, workspace)
        profiler = cProfile.Profile()
        profiler.enable()
        timing = job.run(BASIN, workspace)
        profiler.disable()
        text = io.StringIO()
        pstats.Stats(profiler, stream=text).sort_stats("tottime").print_stats(_ROWS)
        print(f"== {job.title}: {timing.wall_s / job.operations * 1e6:.2f} us an operation under the profiler")
        print(text.getvalue())
