"""Basin in a bucket beside its peers, measured in one run on one S3 server: `python -m benchmarks.bucket --help`.

The map: `workload` makes the data, `place` says where a contestant stores and as whom, `contestant` is what a job asks,
`sides` are the contestants (Basin, SlateDB, s3fs, obstore), `jobs` holds what is timed, `proxy` counts requests and
bytes, `runner` the order of it all, `results`, `budgets` and `report` what becomes of it.

Invariants: all sides of a job store and read the same bytes with the same durability; where one does more (Basin
hashes, encrypts and verifies, its peers do not) the job's note says so. Every side sends bodies unsigned, to the same
server, with as many requests at once. Times are taken without the proxy, counts through it. Nothing in `basin` imports
this package; servers come from the tests.
"""
