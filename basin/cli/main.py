"""The `basin` command: global options, and the command groups put together.

Invariant: importing this module loads no engine (a test measures `basin --help`). Nothing in Basin imports it; the
entry point `basin` calls `main`.
"""

from __future__ import annotations

import click

from basin.cli.backup import backup
from basin.cli.blob import blob
from basin.cli.check import check, repair
from basin.cli.common import Group, Target
from basin.cli.compact import compact
from basin.cli.export import export, import_
from basin.cli.init import init
from basin.cli.kv import kv
from basin.cli.log import log
from basin.cli.mount import mount
from basin.cli.output import print_line
from basin.cli.restore import restore
from basin.cli.secret import secret
from basin.cli.snapshots import cat, diff, find, forget, ls, snapshots
from basin.cli.stats import stats
from basin.cli.thaw import thaw

_EPILOG = """
\b
Secrets: $BASIN_PASSPHRASE, else $BASIN_SECRET_FILE, else a prompt.
Exit codes: 0 done, 1 error, 2 usage, 3 damage found, 4 some sources
unreadable, 5 conflict, 130 interrupted.
"""


def _print_version(context: click.Context, _parameter: click.Parameter, value: bool) -> None:  # noqa: FBT001  (click)
    if not value:
        return
    from importlib import metadata

    try:
        print_line(f"basin {metadata.version('basin-store')}")
    except metadata.PackageNotFoundError:
        print_line("basin, run from its sources")
    context.exit()


@click.group(cls=Group, epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("-b", "--basin", "url", envvar="BASIN_URL", metavar="URL", help="A folder or URL. [$BASIN_URL]")
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_print_version, help="Show it.")
@click.pass_context
def main(context: click.Context, url: str | None) -> None:
    """Keep names, values and content in a basin: an encrypted, append-only store in a folder."""
    context.obj = Target(url)


for _command in (
    *(init, backup, snapshots, ls, find, cat, diff, restore, mount, forget),
    *(kv, blob, log, stats, check, repair, secret, compact, thaw, export, import_),
):
    main.add_command(_command)
