"""Backups by Basin beside restic and borg, measured in one run on one disk: `python -m benchmarks.backup --help`.

The map: `material` is what is backed up (a tree and a large file) and how it changes, `usage` runs one command and says
what it took, `sides` are the contestants as command lines, `runner` the order of it all, `results` and `report` what
becomes of it.

Invariants:
- Every side is a command of its own, from its start to its end: nobody keeps a process, a connection or a key.
- All sides save the same bytes, encrypted and compressed, and what they restore is compared with the source; a
  difference ends the run.
- Within a round all sides run the same step one directly after the other, in an order drawn anew for each step.

Nothing in `basin` imports this package, and it does not import Basin's engine: it would be a part of what is measured.
"""
