"""`python -m basin.cli` is the `basin` command."""

from __future__ import annotations

from basin.cli.main import main

main(prog_name="basin")
