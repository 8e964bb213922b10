"""What every command shares: which basin, which secret, how it is opened, and the `--json` that all of them take.

Invariants:
- No secret ever stands in argv. It comes from $BASIN_PASSPHRASE, else $BASIN_SECRET_FILE, else a hidden prompt.
- The engine is imported inside functions, so that `basin --help` stays fast.

Only `basin.cli` imports this module.
"""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import click

from basin.cli.failures import EXIT_USAGE, Failure, translated
from basin.cli.output import request_json
from basin.cli.process import settle
from basin.errors import SecretRequired

if TYPE_CHECKING:
    from basin import Secret
    from basin.api import Database

PASSPHRASE_VARIABLE: Final = "BASIN_PASSPHRASE"  # noqa: S105  (the name of a variable)
READ_ONCE_CACHE_SIZE: Final = 8 << 20
"""Of what is kept of the contents that a command reads, each of them once."""
_SIZE: Final = re.compile(r"([0-9]{1,12})([kKmMgGtT]?)")
SECRET_FILE_VARIABLE: Final = "BASIN_SECRET_FILE"  # noqa: S105  (as above)


def _json_option() -> click.Option:
    return click.Option(
        ["--json"], is_flag=True, expose_value=False, callback=request_json, help="Print JSON, one object a line."
    )


class Command(click.Command):
    """A command that takes `--json`."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.params.append(_json_option())


class Size(click.ParamType[int]):
    """A number of bytes: `4096`, `500k`, `10M`, `2G`, `1T`, each 1024 times the one before."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Click's contract."""
        found = _SIZE.fullmatch(str(value))
        if found is None:
            self.fail(f"{value!r} is not a number of bytes such as 4096, 500k, 10M or 2G", param, ctx)
        return int(found[1]) << (10 * " kmgt".index(found[2].lower() or " "))


class Group(click.Group):
    """A group of `Command`s; the outermost one also turns exceptions into one line and an exit code."""

    command_class = Command
    group_class = type

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.params.append(_json_option())

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command chosen (click's contract)."""
        if ctx.parent is not None:
            return super().invoke(ctx)
        with translated():
            return super().invoke(ctx)


@dataclass(frozen=True)
class Target:
    """The basin that the command line names."""

    given: str | None

    @property
    def url(self) -> str:
        """Its URL or path; without one the command ends as a usage error."""
        if not self.given:
            raise Failure("which basin? give -b URL before the command, or set $BASIN_URL", EXIT_USAGE)
        return self.given

    def open(self, mode: Literal["r", "w"], *, salvage: bool = False, **options: Any) -> Database:
        """Open it: mode "r" to read, "w" to write, both existing. Asks for a secret only if the basin needs one.

        `salvage`: also if its log is damaged. `options`: as of `basin.open`.
        """
        import basin

        settle()
        secret = secret_from_environment()
        try:
            return basin.open(self.url, mode=mode, secret=secret, salvage=salvage, **options)
        except SecretRequired:
            if secret is not None or not can_ask():
                raise
        secret = ask_secret(f"Passphrase of {self.url}", confirm=False)
        return basin.open(self.url, mode=mode, secret=secret, salvage=salvage, **options)


pass_target: Final = click.make_pass_decorator(Target)


def secret_from_environment() -> Secret | None:
    """The secret that $BASIN_PASSPHRASE or else $BASIN_SECRET_FILE gives; None if neither is set."""
    import basin

    if os.environ.get(PASSPHRASE_VARIABLE) or os.environ.get(SECRET_FILE_VARIABLE):
        return basin.Secret.from_env()
    return None


def can_ask() -> bool:
    """Whether there is a terminal to ask at."""
    return sys.stdin is not None and sys.stdin.isatty()


def ask_secret(prompt: str, *, confirm: bool) -> Secret:
    """Ask for a passphrase, hidden, on standard error; twice with `confirm`."""
    import basin

    text = click.prompt(prompt, hide_input=True, confirmation_prompt=confirm, err=True)
    return basin.Secret.from_passphrase(text)


def load_or_create_secret(path: str) -> tuple[Secret, bool]:
    """The secret in the file `path`, and whether the file was created (mode 0600) just now with a new one."""
    import basin

    if Path(path).exists():
        return basin.Secret.from_file(path), False
    secret = basin.Secret.generate()
    secret.to_file(path)
    return secret, True
