"""`basin export` and `basin import`: one flat file of a basin, and back. Uses the public names of `basin` only.

Invariant: a whole basin keeps its secrets; a selection gets one of its own, from the environment, a key file or a
prompt, never from argv.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import click

from basin.cli.common import (
    Command,
    Target,
    ask_secret,
    can_ask,
    load_or_create_secret,
    pass_target,
    secret_from_environment,
)
from basin.cli.output import print_json, print_line, printable, wants_json
from basin.cli.progress import Progress
from basin.cli.secret import NEW_PASSPHRASE_VARIABLE
from basin.cli.spelling import names_of
from basin.errors import SecretRequired, WrongSecret

if TYPE_CHECKING:
    from basin import ExportReport, Secret
    from basin.api import Database


@click.command("export", cls=Command)
@click.argument("file", type=click.Path(dir_okay=False), metavar="FILE.basin")
@click.option("--prefix", metavar="P", help="Only names that start with P, and the contents that they reach.")
@click.option("--keyspace", metavar="K", help="Names of this keyspace, in place of the basin's own.")
@click.option("--snapshot", metavar="SNAP", help="Only this snapshot, as `basin snapshots` lists it.")
@click.option("--hex", "is_hex", is_flag=True, help="P is given as hex digits.")
@click.option("--open", "is_open", is_flag=True, help="Do not encrypt the selection.")
@click.option(
    "--secret-file",
    metavar="PATH",
    type=click.Path(dir_okay=False),
    help="Key file of the selection; created (mode 0600) if absent.",
)
@pass_target
def export(
    target: Target,
    *,
    file: str,
    prefix: str | None,
    keyspace: str | None,
    snapshot: str | None,
    is_hex: bool,
    is_open: bool,
    secret_file: str | None,
) -> None:
    """Write the basin into a new file, which is read in place.

    All of it, opened by the same secrets; or with --prefix, --keyspace or --snapshot a new basin of those names, or of
    that snapshot, under a key file, $BASIN_NEW_PASSPHRASE, or a passphrase asked for twice.
    """
    is_selection = prefix is not None or keyspace is not None or snapshot is not None
    if not is_selection and (is_open or secret_file):
        raise click.UsageError(
            "the whole basin keeps its secrets; --open and --secret-file need --prefix, --keyspace or --snapshot"
        )
    if is_open and secret_file:
        raise click.UsageError("--open and --secret-file exclude each other")
    with target.open("r") as db, Progress("exporting") as progress:
        if not is_selection:
            report = db.export(file, progress=progress.show)
        else:
            selection: dict[str, Any] = {"snapshot": snapshot, "keyspace": keyspace}
            if prefix is not None:
                selection["prefix"] = names_of(db, keyspace, is_hex=is_hex)[1].parse_name(prefix)
            with progress.hidden():
                secret = None if is_open else _new_secret(secret_file)
            profile = "open" if is_open else None
            report = db.export(file, **selection, secret=secret, profile=profile, progress=progress.show)  # type: ignore[arg-type]  # "open" or None
    _print_report(report)


def _new_secret(secret_file: str | None) -> Secret:
    import basin

    if secret_file is not None:
        return load_or_create_secret(secret_file)[0]
    passphrase = os.environ.get(NEW_PASSPHRASE_VARIABLE)
    if passphrase:
        return basin.Secret.from_passphrase(passphrase)
    if not can_ask():
        raise SecretRequired(
            f"a selection is a new basin: give --secret-file or --open, set ${NEW_PASSPHRASE_VARIABLE}, or use a "
            "terminal"
        )
    return ask_secret("New passphrase", confirm=True)


def _print_report(report: ExportReport) -> None:
    if wants_json():
        print_json({"file": report.path, "bytes": report.size} | _counted(report) | {"position": report.position})
        return
    counted = "".join(f", {count} {label}" for label, count in _counted(report).items())
    print_line(f"exported {printable(report.path)}: {report.size} bytes{counted}")


def _counted(report: ExportReport) -> dict[str, int]:
    """What a selection counted."""
    counts = {"names": report.names, "contents": report.contents}
    return {label: count for label, count in counts.items() if count is not None}


@click.command("import", cls=Command)
@click.argument("source", metavar="FILE.basin")
@click.option("--secret-file", metavar="PATH", type=click.Path(dir_okay=False), help="Key file that opens FILE.basin.")
@pass_target
def import_(target: Target, *, source: str, secret_file: str | None) -> None:
    """Copy all names of FILE.basin, or of the basin at a URL, and all contents that they reach, into the basin.

    Of equal names the imported value counts; what is there already is not copied again. Without --secret-file,
    FILE.basin is opened by the secret of the basin, or by a passphrase that is asked for.
    """
    with target.open("w") as db, _open_source(source, secret_file) as other, Progress("importing") as progress:
        report = db.import_from(other, progress=progress.show)
    if wants_json():
        print_json(
            {
                "names": report.names,
                "names_same": report.names_same,
                "contents": report.contents,
                "contents_same": report.contents_same,
                "bytes": report.size,
            }
        )
        return
    print_line(
        f"imported {report.names} names and {report.contents} contents ({report.size} bytes); "
        f"there already: {report.names_same} names and {report.contents_same} contents"
    )


def _open_source(source: str, secret_file: str | None) -> Database:
    import basin

    if secret_file is not None:
        return basin.open(source, mode="r", secret=basin.Secret.from_file(secret_file))
    try:
        return basin.open(source, mode="r")
    except SecretRequired:
        secret = secret_from_environment()
        if secret is None and not can_ask():
            raise
    if secret is not None:
        try:
            return basin.open(source, mode="r", secret=secret)
        except WrongSecret:
            if not can_ask():
                raise
    return basin.open(source, mode="r", secret=ask_secret(f"Passphrase of {source}", confirm=False))
