"""How a command ends: exit codes, and one line on standard error in place of a traceback.

Invariants:
- Every exception that leaves a command becomes one line `basin: …` and one exit code; none shows a traceback.
- The line holds no control characters, whatever names or file contents the message quotes.

Only `basin.cli` imports this module. It prints errors alone; results are `output.py`'s.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import click

from basin.cli.output import flush, printable
from basin.errors import (
    BasinError,
    BasinPoisoned,
    CommitUnknown,
    Conflict,
    CorruptionError,
    InvalidArgument,
    NotABasin,
    OutOfSpace,
    PositionGone,
    SecretRequired,
    StorageUnavailable,
    UnsupportedVersion,
    WrongSecret,
)

EXIT_ERROR: Final = 1
EXIT_USAGE: Final = 2
EXIT_DAMAGE: Final = 3
EXIT_UNREADABLE: Final = 4
EXIT_CONFLICT: Final = 5
# What a shell reports for a program that the signal ended; scripts test for these two.
EXIT_INTERRUPTED: Final = 128 + signal.SIGINT
EXIT_PIPE_CLOSED: Final = 128 + signal.SIGPIPE

# First match wins, so a kind stands before its base.
_EXIT_CODES: Final = (
    (CorruptionError, EXIT_DAMAGE),
    (InvalidArgument, EXIT_USAGE),
    (Conflict, EXIT_CONFLICT),
)
_ADVICE: Final = (
    (WrongSecret, "give another one in $BASIN_PASSPHRASE or $BASIN_SECRET_FILE"),
    (SecretRequired, "set $BASIN_PASSPHRASE or $BASIN_SECRET_FILE, or run in a terminal to be asked"),
    (NotABasin, "`basin init` creates one"),
    (UnsupportedVersion, "upgrade basin-store"),
    (CorruptionError, "`basin check` lists all damage"),
    (PositionGone, "`basin log` lists the positions that are left"),
    (CommitUnknown, "look at `basin log` before you try again"),
    (StorageUnavailable, "try again later"),
    (OutOfSpace, "free some space, then try again"),
    (BasinPoisoned, "see to the cause, then run the command again"),
)


class Failure(Exception):
    """Ends the command with one line on standard error and `exit_code`."""

    def __init__(self, message: str, exit_code: int = EXIT_ERROR) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def warn(message: str) -> None:
    """Print one line on standard error; the command goes on."""
    _flush_or_drop()
    click.echo(f"basin: {printable(' '.join(message.split()))}", err=True)


def describe(error: BasinError) -> str:
    """The error's text and, where the command line knows more than the engine, what to do."""
    advice = next((text for kind, text in _ADVICE if isinstance(error, kind)), None)
    return f"{error}; {advice}" if advice and "`basin " not in str(error) else str(error)


def reason(error: OSError) -> str:
    """What the system says about a failed call, without its number."""
    return error.strerror or str(error) or type(error).__name__


@contextmanager
def translated() -> Iterator[None]:
    """Print the line for any exception of the body, and end with its exit code; click's own errors pass unchanged."""
    try:
        yield
        flush()
    except (click.ClickException, click.exceptions.Exit):
        _flush_or_drop()
        raise
    except (KeyboardInterrupt, Exception) as error:
        if _is_mistake(error) and os.environ.get("BASIN_DEBUG"):
            raise
        message, code = _explain(error)
        if message:
            warn(message)
        _flush_or_drop()
        raise click.exceptions.Exit(code) from error


def _is_mistake(error: BaseException) -> bool:
    """Whether an exception is none of those that commands end with on purpose."""
    return not isinstance(error, Failure | BasinError | OSError | KeyboardInterrupt | click.Abort)


def _explain(error: BaseException) -> tuple[str, int]:
    """The line (empty: say nothing) and the exit code for an exception."""
    match error:
        case Failure():
            return str(error), error.exit_code
        case KeyboardInterrupt() | click.Abort():
            return "interrupted; what was acknowledged is kept", EXIT_INTERRUPTED
        case BasinError():
            return describe(error), next((code for kind, code in _EXIT_CODES if isinstance(error, kind)), EXIT_ERROR)
        case BrokenPipeError():
            return "", EXIT_PIPE_CLOSED
        case OSError():
            where = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes) else ""
            return f"{where}{reason(error)}", EXIT_ERROR
    text = f"internal error: {type(error).__name__}: {error}; $BASIN_DEBUG=1 shows where, please report it"
    return text, EXIT_ERROR


def _flush_or_drop() -> None:
    """Print what is pending before the command's own error, if it can be; that this fails too is not the news."""
    try:
        flush()
    except OSError:
        _drop_output()


def _drop_output() -> None:
    """Point standard output nowhere, so that the interpreter's last flush does not fail as well."""
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
    except (OSError, ValueError, AttributeError):
        return  # standard output is no file of the system (captured, or closed already): nothing will be flushed
