"""`basin init`: create a basin. Uses the public names of `basin` only."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from basin.cli.common import (
    PASSPHRASE_VARIABLE,
    SECRET_FILE_VARIABLE,
    Command,
    Target,
    ask_secret,
    can_ask,
    load_or_create_secret,
    pass_target,
    secret_from_environment,
)
from basin.cli.failures import EXIT_USAGE, Failure
from basin.cli.output import print_json, print_line, printable, wants_json
from basin.errors import AlreadyExists, SecretRequired

if TYPE_CHECKING:
    from basin import Secret


@click.command(cls=Command)
@click.option("--open", "is_open", is_flag=True, help="Do not encrypt. Anybody who can read the files reads the data.")
@click.option(
    "--secret-file", metavar="PATH", type=click.Path(dir_okay=False), help="Key file; created (mode 0600) if absent."
)
@click.option("--data-url", metavar="URL", help="Keep contents (data/) in another folder or bucket.")
@click.option(
    "--data-storage-class", metavar="CLASS", help="S3's storage class of contents: STANDARD_IA, GLACIER, DEEP_ARCHIVE …"
)
@pass_target
def init(
    target: Target, *, is_open: bool, secret_file: str | None, data_url: str | None, data_storage_class: str | None
) -> None:
    """Create a basin; it must not exist yet.

    Encrypted under a passphrase ($BASIN_PASSPHRASE, or asked for twice) or a key file. Whoever loses the last secret
    loses the data.
    """
    given = {"data_url": data_url, "data_storage_class": data_storage_class}
    options: dict[str, Any] = {name: value for name, value in given.items() if value}
    if is_open:
        _refuse_secrets(secret_file)
    _create(target, options, secret_file=None if is_open else secret_file, is_open=is_open)
    if wants_json():
        print_json({"basin": target.url, "profile": "open" if is_open else "encrypted"})
    else:
        print_line(f"created {'open' if is_open else 'encrypted'} basin {printable(target.url)}")


def _refuse_secrets(secret_file: str | None) -> None:
    """An open basin with a secret is a mistake: the user believes that something is encrypted."""
    if secret_file:
        raise click.UsageError("--open and --secret-file exclude each other")
    for variable in (PASSPHRASE_VARIABLE, SECRET_FILE_VARIABLE):
        if os.environ.get(variable):
            raise Failure(f"--open creates a basin without encryption, but ${variable} is set; unset it", EXIT_USAGE)


def _create(target: Target, options: dict[str, Any], *, secret_file: str | None, is_open: bool) -> None:
    import basin

    url = target.url
    if is_open:
        basin.open(url, mode="x", profile="open", **options).close()
        return
    if secret_file is None:
        basin.open(url, mode="x", secret=secret_from_environment() or _ask(), **options).close()
        return
    secret, is_new = load_or_create_secret(secret_file)
    try:
        basin.open(url, mode="x", secret=secret, **options).close()
    except AlreadyExists:
        if is_new:
            Path(secret_file).unlink()  # it opens nothing, and would be taken for the key of the basin that was there
        raise


def _ask() -> Secret:
    if not can_ask():
        raise SecretRequired("a new basin needs a secret, or --open for none")
    return ask_secret("New passphrase", confirm=True)
