"""The single entry to every job of the project: `nox -s NAME`, `nox -l` for the names.

Each session makes its own environment under `.nox/`, so that nothing but nox needs to be installed before. The session
`tests` is what decides whether a change is good: style, types, one minute of fuzzing, then every test.
"""

from __future__ import annotations

import logging
import sys

import nox

nox.needs_version = ">=2024.10"
nox.options.sessions = ["tests"]
nox.options.default_venv_backend = "virtualenv"  # the same everywhere, whether or not uv is installed
nox.options.reuse_existing_virtualenvs = True
nox.options.error_on_external_run = True

PROJECT = nox.project.load_toml("pyproject.toml")
PYTHON_FOLDERS = ("basin", "tests", "fuzz", "benchmarks", "noxfile.py")
FUZZ_SECONDS_IN_TESTS = 60
FUZZ_SECONDS_ALONE = 600
SOAK_EFFORT = 20  # times the examples, kills and crash scripts of the ordinary test session
CORES = 2  # the tests are laid out for a small machine; more workers gain little, because a few tests are long
SPREAD = ("-n", str(CORES), "--maxschedchunk", "4")
"""Small portions: a worker that gets a few long tests must not hold many short ones back."""


def install(session: nox.Session, *groups: str) -> None:
    """Install Basin in place, and the dependency groups named."""
    session.install("--quiet", "-e", ".", *nox.project.dependency_groups(PROJECT, *groups))


def check_style(session: nox.Session) -> None:
    session.run("ruff", "check", *PYTHON_FOLDERS)
    session.run("ruff", "format", "--check", *PYTHON_FOLDERS)


def check_types(session: nox.Session) -> None:
    session.run("mypy")


def run_fuzzers(session: nox.Session, seconds: int) -> None:
    """Share `seconds` among the targets `fuzz/fuzz_*.py`, each starting from its corpus `fuzz/corpus/<name>/`."""
    if sys.platform != "linux":
        session.log("atheris has wheels for Linux only: the tests replay the corpus, nothing is fuzzed")
        return
    session.run("python", "-m", "fuzz", "--seconds", str(seconds), "--workers", str(CORES))


def end_with_last_line_of_pytest(session: nox.Session) -> None:
    """Keep nox from adding its own success line: whoever reads the output finds the count of tests in its last line."""
    ending = f"Session {session.name} was successful"
    logging.getLogger("nox").addFilter(lambda record: not record.getMessage().startswith(ending))


@nox.session
def tests(session: nox.Session) -> None:
    """Style, types, one minute of fuzzing, every test. Arguments after `--` go to pytest."""
    install(session, "test", "lint", "fuzz")
    check_style(session)
    check_types(session)
    run_fuzzers(session, FUZZ_SECONDS_IN_TESTS)
    session.run("pytest", *SPREAD, *session.posargs)
    end_with_last_line_of_pytest(session)


@nox.session
def demo(session: nox.Session) -> None:
    """Back up the standard library, change it, kill a backup and resume, restore and compare; print what happened."""
    install(session)
    session.run("python", "-m", "benchmarks.demo", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Style alone."""
    install(session, "lint")
    check_style(session)


@nox.session
def types(session: nox.Session) -> None:
    """Types alone."""
    install(session, "lint", "test")
    check_types(session)


@nox.session
def fuzz(session: nox.Session) -> None:
    """Every fuzz target for a share of ten minutes, or of the seconds given after `--`."""
    install(session, "fuzz")
    run_fuzzers(session, int(session.posargs[0]) if session.posargs else FUZZ_SECONDS_ALONE)


@nox.session
def bench(session: nox.Session) -> None:
    """This engine and its peers in one run; writes the tables and charts of docs/benchmarks.md."""
    install(session, "bench")
    session.run("python", "-m", "benchmarks", *session.posargs)


@nox.session(name="bench-bucket")
def bench_bucket(session: nox.Session) -> None:
    """A basin in a bucket and its peers, on one server in one run. `-- --docs` writes docs/benchmarks-bucket.md."""
    install(session, "bench")
    session.run("python", "-m", "benchmarks.bucket", *session.posargs)


@nox.session(name="bench-compaction")
def bench_compaction(session: nox.Session) -> None:
    """What a compaction costs and leaves behind, beside RocksDB's. `-- --docs` writes docs/benchmarks-compaction.md."""
    install(session, "bench")
    session.run("python", "-m", "benchmarks.compaction", *session.posargs)


@nox.session(name="bench-backup")
def bench_backup(session: nox.Session) -> None:
    """Backups by this, restic and borg, whichever are installed. `-- --docs` writes docs/benchmarks-backup.md."""
    install(session, "bench")
    session.run("python", "-m", "benchmarks.backup", *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """Links, code blocks, commands and byte tables of the documentation."""
    install(session, "test")
    session.run("pytest", "tests/test_docs.py", *session.posargs)


@nox.session
def soak(session: nox.Session) -> None:
    """The randomised tests with many times the examples, kills and crash scripts: hours, not minutes."""
    install(session, "test")
    effort = ("--timeout=0", f"--effort={SOAK_EFFORT}")
    session.run("pytest", *SPREAD, *effort, *(session.posargs or ["tests/engine"]))


@nox.session(name="s3-reference")
def s3_reference(session: nox.Session) -> None:
    """The tests of buckets against a Ceph gateway made of Debian packages. Needs root; not part of `tests`."""
    install(session, "test")
    session.run("python", "-m", "tests.ceph", *session.posargs)


@nox.session
def powercut(session: nox.Session) -> None:
    """Real power cuts on ext4 and XFS loop mounts under a multi-process workload. Needs root."""
    install(session)
    session.run("python", "-m", "tests.powercut", *session.posargs)
