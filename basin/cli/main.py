"""The `basin` command: global options, and the command groups put together.

Invariant: importing this module loads no engine (a test measures `basin --help`). Nothing in Basin imports it; the
entry point `basin` calls `main`.
"""

from __future__ import annotations

import click

from basin.cli.blob import blob
from basin.cli.check import check, repair
from basin.cli.common import Group, Target
from basin.cli.init import init
from basin.cli.kv import kv
from basin.cli.log import log
from basin.cli.secret import secret
from basin.cli.stats import stats

_EPILOG = """
\b
Secrets: $BASIN_PASSPHRASE, else $BASIN_SECRET_FILE, else a prompt.
Exit codes: 0 done, 1 error, 2 usage, 3 damage found, 4 some sources
unreadable, 5 conflict, 130 interrupted.
"""


@click.group(cls=Group, epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("-b", "--basin", "url", envvar="BASIN_URL", metavar="URL", help="The basin: a folder or a URL. [$BASIN_URL]")
@click.version_option(package_name="basin-store", message="basin %(version)s")
@click.pass_context
def main(context: click.Context, url: str | None) -> None:
    """Keep names, values and content in a basin: an encrypted, append-only store in a folder."""
    context.obj = Target(url)


for _command in (init, kv, blob, log, stats, check, repair, secret):
    main.add_command(_command)
