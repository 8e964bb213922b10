"""What every test may use: `rng` (seeded; the seed is printed), `effort` (how often to repeat), hypothesis settings.

Fixtures that only one area needs live in that area's own conftest.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import hypothesis
import pytest

from tests.s3 import ministack, rclone_serve, s3_proxy, s3_server, seaweedfs, swift

__all__ = ["ministack", "rclone_serve", "s3_proxy", "s3_server", "seaweedfs", "swift"]

Spawn: TypeAlias = Callable[..., "subprocess.Popen[Any]"]

# No deadline: the machines that run the tests are shared, and a slow example is no defect. No database: a failure is
# reproduced by its printed blob and then becomes a permanent case; nothing depends on what an earlier run left behind.
hypothesis.settings.register_profile("basin", deadline=None, database=None, print_blob=True)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--effort", type=int, default=1, help="multiply examples, kills and crash scripts by this")
    parser.addoption("--seed", type=int, default=None, help="seed of the `rng` fixture; a failed test prints its own")


def pytest_configure(config: pytest.Config) -> None:
    for name in [name for name in os.environ if name.startswith("BASIN_") and not name.startswith("BASIN_TEST_")]:
        del os.environ[name]  # what the user's own basin is called and locked with is no part of a test
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        # A shell that starts the tests in the background lets them ignore interrupts, and so every process they start.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT, signal.SIGTERM])
    hypothesis.settings.load_profile("basin")
    effort = config.getoption("--effort")
    if effort > 1:
        ordinary = hypothesis.settings.get_profile("basin")
        hypothesis.settings.register_profile("soak", ordinary, max_examples=effort * ordinary.max_examples)
        hypothesis.settings.load_profile("soak")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `root` are skipped, with a reason, for everybody else."""
    if os.geteuid() == 0:
        return
    for item in items:
        if item.get_closest_marker("root"):
            item.add_marker(pytest.mark.skip(reason="needs the superuser"))


@pytest.fixture
def effort(pytestconfig: pytest.Config) -> int:
    """1 in the ordinary session; more in `nox -s soak`."""
    value: int = pytestconfig.getoption("--effort")
    return value


@pytest.fixture
def rng(pytestconfig: pytest.Config) -> random.Random:
    """A generator of random numbers whose seed stands in the report of a failed test; `--seed N` repeats it."""
    given: int | None = pytestconfig.getoption("--seed")
    seed = int.from_bytes(os.urandom(4), "little") if given is None else given
    print(f"rng: repeat with --seed {seed}")
    return random.Random(seed)


@pytest.fixture
def spawn() -> Iterator[Spawn]:
    """`subprocess.Popen`; what still runs when the test ends is killed, so that no failure leaves a process behind."""
    started: list[subprocess.Popen[Any]] = []

    def start(*arguments: Any, **options: Any) -> subprocess.Popen[Any]:
        process = subprocess.Popen(*arguments, **options)
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
            process.communicate()
