"""Basin and its peers, measured in one run on one real disk: `python -m benchmarks --help`.

The map: `workload` makes the data, `sealing` is the work that Basin does and a plain store does not, `contestant`
is what a job asks of an engine, `peers/` and `subject` are the engines, `jobs` holds what is timed, `memory` what
is measured in processes of their own, `runner` the order of it all, `budgets` the promises, `report` and `chart`
the output.

Invariants: both sides of every ratio do the same work with the same durability; nothing but the job is inside the
clock; Basin is called by its public names with default options. Nothing in `basin` imports this package.
"""
