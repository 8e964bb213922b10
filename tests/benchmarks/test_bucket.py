"""The benchmark in a bucket: all sides store and read the same, what they send is counted, ratios lead to verdicts."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import machine
from benchmarks.bucket import __main__ as command
from benchmarks.bucket import budgets, report
from benchmarks.bucket.jobs import Data, Job, Watch, all_jobs, commit_title, require_equal
from benchmarks.bucket.place import Place
from benchmarks.bucket.proxy import CountingProxy, counting_proxy, kind_of
from benchmarks.bucket.results import BucketResults, TrafficSample, variant_of
from benchmarks.bucket.runner import count_traffic, prepare, time_jobs
from benchmarks.bucket.sides import LIBRARIES, available, open_blobs, open_names, open_streams
from benchmarks.bucket.workload import BLOB_SIZE, QUICK, batches_of, make_pairs, make_values
from benchmarks.entrant import SUBJECT
from benchmarks.jobs import WorkDiffers
from benchmarks.results import Sample
from tests.s3 import ministack  # noqa: F401  # a fixture
from tests.storage.s3_servers import S3Server

TINY = replace(
    QUICK,
    label="tiny",
    names=1_200,
    stored_names=10_000,
    commits={1: 4, 3: 6},
    races={3: 6},
    cold_reads=10,
    warm_reads=10,
    blobs=30,
    stream_size=3 << 20,
    rounds=1,
)
JOBS = all_jobs(Data(TINY, seed=7))
NAME_SIDES = [side for side in ("basin", "basin-s3fs", "basin-obstore", "slatedb") if side in available()]
OBJECT_SIDES = [side for side in available() if side != "slatedb"]


@pytest.fixture
def place(ministack: S3Server, tmp_path: Path) -> Place:  # noqa: F811  # the fixture
    return command.place_on(ministack, tmp_path)


@pytest.fixture
def proxy(place: Place) -> Iterator[CountingProxy]:
    with counting_proxy(place.endpoint) as counting:
        yield counting


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.title.replace(" ", "-"))
def test_every_side_of_a_job_runs_through_the_proxy_and_returns_what_it_stored(job: Job, place: Place) -> None:
    prepare([job], available(), place, lambda _: None)
    traffic = count_traffic([job], available(), place, lambda _: None)
    sides = [side for side in job.sides if side in available()]
    assert [sample.engine for sample in traffic] == sides
    for sample in traffic:
        if "warm" not in job.title:
            assert sum(sample.requests.values()) > 0, "a proxy that saw nothing counts nothing"
    samples = time_jobs([job], available(), place, rounds=1, seed=1, on_run=lambda _: None)
    assert sorted(sample.engine for sample in samples) == sorted(sides)
    assert all(sample.wall_s > 0 for sample in samples)


@pytest.mark.parametrize("side", NAME_SIDES)
def test_all_sides_hold_the_same_names_after_a_reopening(side: str, place: Place) -> None:
    pairs = make_pairs(1_100, seed=1)
    writer = open_names(side, place)
    writer.load(batches_of(pairs[:1_050]))
    writer.put_batch(pairs[1_050:1_080])
    writer.commit_each([pairs[1_080:1_090], pairs[1_090:]])
    writer.close()
    place.forget_cache()
    reader = open_names(side, place, reading=True)
    assert reader.get_each([name for name, _ in pairs]) == [value for _, value in pairs]
    assert reader.scan() == len(pairs)
    reader.close()


@pytest.mark.parametrize("method", ["put_batch", "load", "commit_each"])
@pytest.mark.parametrize("side", NAME_SIDES)
def test_what_a_side_calls_durable_is_in_the_bucket_when_the_call_returns(
    side: str, method: str, place: Place, proxy: CountingProxy
) -> None:
    pairs = make_pairs(3, seed=2)
    writer = open_names(side, place.through(proxy.endpoint))
    writer.put_batch([(b"first", b"")])
    watch = Watch(proxy.traffic)
    with watch.running():
        getattr(writer, method)(pairs if method == "put_batch" else [pairs])
    assert watch.traffic.requests["PUT"] >= (len(pairs) if method == "commit_each" else 1)
    reader = open_names(side, place, reading=True)
    assert reader.get_each([name for name, _ in pairs]) == [value for _, value in pairs]
    reader.close()
    writer.close()


@pytest.mark.parametrize("side", OBJECT_SIDES)
def test_all_sides_return_the_same_values_and_streams(side: str, place: Place, tmp_path: Path) -> None:
    values = make_values(40, BLOB_SIZE, seed=3)
    blobs = open_blobs(side, place.at("blobs"))
    addresses = blobs.put_values(values)
    assert list(blobs.get_values(addresses[::-1], BLOB_SIZE)) == values[::-1]
    blobs.close()
    body = make_values(1, 3 << 20, seed=4)[0]
    (tmp_path / "source").write_bytes(body)
    streams = open_streams(side, place.at("streams"))
    address = streams.put_file(tmp_path / "source")
    assert streams.get_whole(address, len(body)) == body
    streams.get_file(address, tmp_path / "target")
    assert (tmp_path / "target").read_bytes() == body
    streams.close()


def test_a_side_is_refused_in_a_contest_it_takes_no_part_in(place: Place) -> None:
    with pytest.raises(TypeError):
        open_names("s3fs", place)


def test_work_that_differs_ends_the_benchmark(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "benchmarks.bucket.sides.basin_side.BasinSide.get_each", lambda _self, names: [b""] * len(names)
    )
    with pytest.raises(WorkDiffers):
        JOBS[0].run(SUBJECT, place, Watch())


def test_the_proxy_counts_requests_by_kind_and_the_bytes_of_bodies(place: Place, proxy: CountingProxy) -> None:
    through = place.through(proxy.endpoint)
    side = open_blobs("s3fs", through)
    watch = Watch(proxy.traffic)
    with watch.running():
        addresses = side.put_values([bytes(1_000)] * 3)
    assert watch.traffic.requests == Counter(PUT=3)
    assert 3_000 <= watch.traffic.bytes_out < 3_600, "bodies may be framed, with a checksum behind"
    with watch.running():
        side.get_values(addresses, 1_000)
    assert watch.traffic.requests == Counter(GET=3)
    assert watch.traffic.bytes_in == 3_000
    side.close()


def test_a_commit_of_basin_is_one_put(place: Place, proxy: CountingProxy) -> None:
    side = open_names(SUBJECT, place.through(proxy.endpoint))
    side.put_batch([(b"first", b"")])
    watch = Watch(proxy.traffic)
    with watch.running():
        side.commit_each([make_pairs(5, seed=1)])
    assert watch.traffic.requests == Counter(PUT=5)
    side.close()


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        (b"GET /bucket/name HTTP/1.1", "GET"),
        (b"GET /bucket?list-type=2&prefix=x HTTP/1.1", "LIST"),
        (b"GET /bucket/?delimiter=%2F HTTP/1.1", "LIST"),
        (b"PUT /bucket/name?partNumber=1 HTTP/1.1", "PUT"),
        (b"POST /bucket?delete HTTP/1.1", "POST"),
    ],
)
def test_a_request_is_counted_as_its_method_and_a_list_apart(line: bytes, kind: str) -> None:
    assert kind_of(line) == kind


@pytest.mark.parametrize(
    ("head", "body"),
    [
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"5\r\nhello\r\n3;x=y\r\nyou\r\n0\r\nA: b\r\n\r\n"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\n", b"body"),
        (b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n", b"to the end"),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 204 No Content\r\n\r\n", b""),
    ],
    ids=["chunked", "length", "to-the-end", "no-body"],
)
def test_bodies_pass_the_proxy_unchanged(head: bytes, body: bytes) -> None:
    final = head.rpartition(b"HTTP/1.1 100 Continue\r\n\r\n")[2]

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(head + body)
        await writer.drain()
        writer.close()

    async def exchange() -> bytes:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        with counting_proxy(f"http://127.0.0.1:{port}") as counting:
            host, _, counted_port = counting.endpoint.removeprefix("http://").partition(":")
            reader, writer = await asyncio.open_connection(host, int(counted_port))
            writer.write(b"GET /x HTTP/1.1\r\nHost: y\r\n\r\n")
            passed = await reader.readexactly(len(final + body))
            writer.close()
            server.close()
            return passed

    assert asyncio.run(asyncio.wait_for(exchange(), 20)) == final + body


def make_results(samples: list[Sample], traffic: list[TrafficSample] | None = None) -> BucketResults:
    mount = machine.Mount("/dev/vda", "/", "ext4")
    place = machine.describe(mount), command.versions()
    return BucketResults("tiny", 7, 1, "2026-01-01 00:00 UTC", *place, samples, server="x", traffic=traffic or [])


def make_sample(job: str, engine: str, seconds: float) -> Sample:
    return Sample(job, engine, variant_of(engine), 0, operations=10, value_size=100, wall_s=seconds, cpu_s=seconds)


@pytest.mark.parametrize(("ours", "met"), [(1.0, "goal"), (1.05, "floor"), (1.2, "no")])
def test_a_stream_is_judged_against_the_better_of_the_plain_clients(ours: float, met: str) -> None:
    job = "put a stream of 3 MiB"
    peers = [make_sample(job, "s3fs", 1.0), make_sample(job, "obstore", 2.0)]
    verdicts = budgets.judge(make_results([make_sample(job, SUBJECT, ours), *peers]), TINY)
    assert [verdict.met for verdict in verdicts if verdict.text.startswith(job)] == [met]


@pytest.mark.parametrize(("puts", "met"), [(10, "goal"), (20, "floor"), (21, "no")])
def test_a_commit_is_judged_by_its_requests(puts: int, met: str) -> None:
    sent = TrafficSample(commit_title(1), SUBJECT, 10, {"PUT": puts, "GET": 3}, 0, 0)
    verdicts = budgets.judge(make_results([], [sent]), TINY)
    assert [verdict.met for verdict in verdicts if commit_title(1) in verdict.text] == [met]


def test_every_budget_names_a_job_that_exists() -> None:
    titles = {job.title for job in JOBS}
    texts = [verdict.text for verdict in budgets.judge(make_results([]), TINY)]
    assert texts
    assert all(any(title in text for title in titles) for text in texts)


def test_results_survive_json_and_make_tables() -> None:
    job = JOBS[0].title
    sent = TrafficSample(job, SUBJECT, 10, {"PUT": 5}, 2048, 3)
    results = make_results([make_sample(job, SUBJECT, 1.0), make_sample(job, "slatedb", 3.0)], [sent])
    assert BucketResults.from_json(json.loads(results.to_text())) == results
    generated = report.to_markdown(results, budgets.judge(results, TINY))
    assert f"| {job} | 3 |" in generated
    assert "| 5 PUT | 500 | 2.0 KiB | 3 B |" in generated


def test_a_ratio_needs_all_that_differs_to_be_noted() -> None:
    assert all(job.note for job in JOBS)
    assert {side for job in JOBS for side in job.sides} == set(LIBRARIES)
    with pytest.raises(WorkDiffers):
        require_equal([b"x"], [b"y"], "a job")
