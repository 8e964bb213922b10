"""`FsspecObjects` on real servers: the requests that each call sends, large files, failures, forks and interrupts."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import pytest

from basin.errors import (
    AlreadyExists,
    BasinClosed,
    MissingDependency,
    ObjectMissing,
    ReadOnly,
    StorageError,
    StorageUnavailable,
)
from basin.storage.fsspec_clients import S3Client, read_exactly
from basin.storage.fsspec_objects import FsspecObjects, open_fsspec
from basin.storage.objects import PUT_SIZE_MAX, ByteRange, Listing
from basin.storage.requests import RequestPolicy
from tests.s3_proxy import FaultProxy, Rule, fault_proxy
from tests.storage.object_calls import CALLS, FAULTS, POLICY, large_file, sent, settle
from tests.storage.s3_servers import S3Server, free_ports


@pytest.fixture
def server(request: pytest.FixtureRequest) -> S3Server:
    found: S3Server = request.getfixturevalue(getattr(request, "param", "ministack"))
    return found


on_both_servers = pytest.mark.parametrize("server", ["ministack", "seaweedfs"], indirect=True)


@pytest.fixture
def proxy(server: S3Server) -> Iterator[FaultProxy]:
    with fault_proxy(server.endpoint) as between:
        yield between


@pytest.fixture
def bucket(server: S3Server) -> str:
    return server.new_bucket()


@pytest.fixture
def store(server: S3Server, proxy: FaultProxy, bucket: str) -> Iterator[FsspecObjects]:
    """A store that reaches its server through the proxy, with `a` in it and a connection that was in use before."""
    made = open_fsspec(f"s3://{bucket}/some/prefix", server.storage_options(proxy.endpoint), POLICY)
    made.put("a", b"0123456789")
    proxy.clear()
    yield made
    made.close()


# The requests of each call


@on_both_servers
@pytest.mark.parametrize(
    ("call", "requests"),
    [
        ("get", ["GET"]),
        ("get-range", ["GET"]),
        ("size", ["HEAD"]),
        ("put", ["PUT"]),
        ("put_new", ["PUT"]),
        ("put_file", ["PUT"]),
        ("delete", ["DELETE"]),
        ("delete-many", ["POST"]),
        ("list", ["GET"]),
    ],
)
def test_one_call_is_one_request(store: FsspecObjects, proxy: FaultProxy, call: str, requests: list[str]) -> None:
    CALLS[call](store)
    assert sent(proxy) == requests


def test_opening_and_closing_send_nothing(server: S3Server, proxy: FaultProxy, bucket: str) -> None:
    open_fsspec(f"s3://{bucket}/x", server.storage_options(proxy.endpoint), POLICY).close()
    assert sent(proxy) == []


@on_both_servers
def test_an_empty_object_is_one_get(store: FsspecObjects, proxy: FaultProxy) -> None:
    store.put("empty", b"")
    proxy.clear()
    assert store.get(ByteRange("empty")) == b""
    assert store.get(ByteRange("empty", 0, 100)) == b""
    assert sent(proxy) == ["GET", "GET"]


@on_both_servers
def test_only_put_new_has_a_condition(store: FsspecObjects, proxy: FaultProxy) -> None:
    store.put_new("b", b"new")
    store.put("b", b"old")
    assert [exchange.headers.get("if-none-match") for exchange in proxy.exchanges] == ["*", None]


@on_both_servers
def test_a_list_takes_a_request_for_each_thousand(store: FsspecObjects, proxy: FaultProxy) -> None:
    names = [f"many/{number:04}" for number in range(1_002)]
    with_threads(store.put, [(name, b"x") for name in names])
    proxy.clear()
    assert [f"many/{one.name}" for one in store.list("many").objects] == names
    assert sent(proxy) == ["GET", "GET"]
    proxy.clear()
    store.delete(names)
    assert sent(proxy) == ["POST", "POST"]
    assert store.list("many") == Listing([], [])


def with_threads(call: Callable[..., Any], arguments: list[tuple[Any, ...]]) -> None:
    def work(offset: int) -> None:
        for some in arguments[offset::16]:
            call(*some)

    threads = [threading.Thread(target=work, args=(offset,)) for offset in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_get_many_is_concurrent_up_to_the_policy(server: S3Server, proxy: FaultProxy, bucket: str) -> None:
    took_s = {}
    for concurrency in (2, 8):
        # Not the pool of connections is to be the limit.
        options = {**server.storage_options(proxy.endpoint), "config_kwargs": {"max_pool_connections": 50}}
        store = open_fsspec(f"s3://{bucket}/p", options, RequestPolicy(concurrency=concurrency))
        store.put("a", b"0123456789")
        proxy.add(Rule("delay", method="GET", count=8, delay_s=0.4))
        started_s = time.monotonic()
        assert store.get_many([ByteRange("a", number, number + 1) for number in range(8)]) == [
            b"%d" % number for number in range(8)
        ]
        took_s[concurrency] = time.monotonic() - started_s
        store.close()
    assert took_s[2] >= 1.6  # four rounds of two
    assert took_s[8] < 1.2


@on_both_servers
def test_names_lie_below_the_prefix(store: FsspecObjects, server: S3Server, bucket: str) -> None:
    store.put("data/b", b"x")
    assert sorted(server.client().names(bucket)) == ["some/prefix/a", "some/prefix/data/b"]


def test_a_whole_bucket_may_be_the_place(server: S3Server, bucket: str) -> None:
    store = open_fsspec(f"s3://{bucket}/", server.storage_options(), POLICY)
    store.put("data/a", b"xyz")
    assert server.client().names(bucket) == ["data/a"]
    assert store.get(ByteRange("data/a")) == b"xyz"
    assert store.list("") == Listing([], ["data"])
    store.delete(["data/a", "data/b"])
    assert store.list("") == Listing([], [])
    store.close()


def test_what_no_store_can_have_written_is_not_listed(store: FsspecObjects, server: S3Server, bucket: str) -> None:
    for name in ("Upper", "a b", "folder/x", "Folder/x"):
        server.client().put(f"/{bucket}/some/prefix/{name}", b"x")
    listing = store.list("")
    assert [one.name for one in listing.objects] == ["a"]
    assert listing.folders == ["folder"]


@pytest.mark.parametrize(
    ("content_range", "body", "expected"),
    [(None, b"0123456789", b"345"), ("bytes 3-5/10", b"345", b"345"), ("bytes 3-9/10", b"3456789", b"345")],
)
def test_a_server_may_send_more_than_the_range(content_range: str | None, body: bytes, expected: bytes) -> None:
    store = answering(body, content_range)
    assert store.get(ByteRange("a", 3, 6)) == expected


def test_a_server_that_sends_another_range_is_an_error() -> None:
    store = answering(b"012", "bytes 0-2/10")
    with pytest.raises(StorageError, match="another range"):
        store.get(ByteRange("a", 3, 6))


def answering(body: bytes, content_range: str | None) -> FsspecObjects:
    """A store whose service has one answer for every GET."""

    class Body:
        async def __aenter__(self) -> Self:
            return self

        async def __aexit__(self, *raised: object) -> None:
            return None

        async def read(self) -> bytes:
            return body

    class Service:
        def split_path(self, path: str) -> tuple[str, str, None]:
            return "bucket", path.partition("/")[2], None

        async def _call_s3(self, method: str, **arguments: Any) -> Any:
            return {"Body": Body(), "ContentRange": content_range}

    return FsspecObjects(S3Client(Service(), "bucket/p", POLICY), "bucket/p", "s3://bucket/p")


def test_a_library_that_would_drop_the_condition_is_refused(
    store: FsspecObjects, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store._client._filesystem, "_filter_kwargs", lambda method, arguments: {})  # type: ignore[attr-defined]  # the S3 client's
    with pytest.raises(MissingDependency):
        store.put_new("b", b"x")
    assert sent(proxy) == []


# Large files


@on_both_servers
def test_a_file_of_the_limit_is_one_put(store: FsspecObjects, proxy: FaultProxy, tmp_path: Path) -> None:
    store.put_file("b", large_file(tmp_path, PUT_SIZE_MAX))
    assert sent(proxy) == ["PUT"]


def test_at_most_four_parts_are_under_way(store: FsspecObjects, proxy: FaultProxy, tmp_path: Path) -> None:
    proxy.add(Rule("delay", match="partNumber", delay_s=1.5, count=None))
    path = large_file(tmp_path, 90 << 20)
    thread = threading.Thread(target=store.put_file, args=("b", path))
    thread.start()
    deadline_s = time.monotonic() + 1.4
    while time.monotonic() < deadline_s and len(sent(proxy)) < 5:
        time.sleep(0.02)
    assert sent(proxy) == ["POST", *["PUT"] * 4]  # They came at once, and a fifth waits for one of them.
    thread.join()
    assert sent(proxy) == ["POST", *["PUT"] * 6, "POST"]
    assert store.size("b") == 90 << 20


@on_both_servers
@pytest.mark.parametrize("match", ["partNumber=3", "uploadId=[^&]*$"])
def test_an_upload_that_fails_is_aborted(
    store: FsspecObjects, proxy: FaultProxy, server: S3Server, bucket: str, tmp_path: Path, match: str
) -> None:
    proxy.add(Rule("status", match=match, status=500, code="InternalError"))
    with pytest.raises(StorageUnavailable) as caught:
        store.put_file("b", large_file(tmp_path))
    assert caught.value.reason == "server"
    settle(proxy)  # Parts that were under way may come after the end of the upload.
    assert "DELETE" in sent(proxy)
    assert server.client().uploads(bucket) == []
    with pytest.raises(ObjectMissing):
        store.size("b")


def test_a_file_that_shrinks_is_noticed(tmp_path: Path) -> None:
    path = large_file(tmp_path, 100)
    with path.open("rb") as file:
        assert read_exactly(file.fileno(), 90, 10) == bytes(10)
        with pytest.raises(StorageError, match="shorter"):
            read_exactly(file.fileno(), 90, 11)


def test_a_local_file_that_is_missing_is_named(store: FsspecObjects, proxy: FaultProxy, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="nowhere"):
        store.put_file("b", tmp_path / "nowhere")
    assert sent(proxy) == []


# Failures


@pytest.mark.parametrize(("fault", "reason"), FAULTS, ids=lambda one: getattr(one, "code", one))
def test_one_attempt_is_one_attempt(store: FsspecObjects, proxy: FaultProxy, fault: Rule, reason: str) -> None:
    for name, call in CALLS.items():
        if name == "size" and fault.action == "status":
            continue  # The proxy's refusal has a body, which an answer to HEAD must not have.
        proxy.add(Rule(fault.action, status=fault.status, code=fault.code, count=None))
        with pytest.raises(StorageUnavailable) as caught:
            call(store)
        assert caught.value.reason == reason
        assert len(sent(proxy)) == 1
        proxy.clear()
        assert store.get(ByteRange("a")) == b"0123456789"  # The store is of further use, and has a used connection.
        proxy.clear()


def test_the_user_cannot_switch_repeating_on(server: S3Server, proxy: FaultProxy, bucket: str) -> None:
    options = server.storage_options(proxy.endpoint)
    options["config_kwargs"] = {"retries": {"max_attempts": 5, "mode": "standard"}}
    store = open_fsspec(f"s3://{bucket}/p", options, POLICY)
    proxy.add(Rule("status", count=None))
    with pytest.raises(StorageUnavailable):
        store.get(ByteRange("a"))
    assert sent(proxy) == ["GET"]
    store.close()


@pytest.mark.parametrize("action", ["truncate", "corrupt"])
def test_a_whole_body_that_is_damaged_on_its_way_is_an_error(
    store: FsspecObjects, proxy: FaultProxy, action: Any
) -> None:
    proxy.add(Rule(action, method="GET"))
    with pytest.raises(StorageUnavailable) as caught:
        store.get(ByteRange("a"))
    assert caught.value.reason == "connection"
    assert sent(proxy) == ["GET"]
    proxy.add(Rule("truncate", method="GET"))
    with pytest.raises(StorageUnavailable):
        store.get(ByteRange("a", 2, 8))


@on_both_servers
def test_a_lost_reply_leaves_the_body_stored(store: FsspecObjects, proxy: FaultProxy) -> None:
    proxy.add(Rule("drop_after", method="PUT"))
    with pytest.raises(StorageUnavailable) as caught:
        store.put_new("slot", b"mine")
    assert caught.value.reason == "connection"
    assert store.get(ByteRange("slot")) == b"mine"
    with pytest.raises(AlreadyExists):
        store.put_new("slot", b"again")


@pytest.mark.parametrize(
    "policy", [RequestPolicy(read_timeout_s=0.3), RequestPolicy(deadline_s=0.3)], ids=["read", "deadline"]
)
def test_silence_ends(server: S3Server, proxy: FaultProxy, bucket: str, policy: RequestPolicy) -> None:
    store = open_fsspec(f"s3://{bucket}/p", server.storage_options(proxy.endpoint), policy)
    store.put_new("a", b"")
    proxy.clear()
    proxy.add(Rule("delay_reply", delay_s=5, count=None))
    for call in ("size", "put_new"):
        started_s = time.monotonic()
        with pytest.raises(StorageUnavailable) as caught:
            CALLS[call](store)
        assert caught.value.reason == "timeout"
        assert time.monotonic() - started_s < 2
    assert len(sent(proxy)) == 2
    store.close()


def test_an_error_in_a_reply_of_200_is_an_error(store: FsspecObjects, proxy: FaultProxy, tmp_path: Path) -> None:
    proxy.add(Rule("status", match="uploadId=[^&]*$", method="POST", status=200, code="SlowDown"))
    with pytest.raises(StorageUnavailable) as caught:
        store.put_file("b", large_file(tmp_path))
    assert caught.value.reason == "throttled"


def test_a_service_without_batches_deletes_one_by_one(store: FsspecObjects, proxy: FaultProxy) -> None:
    for name in ("b", "c", "d"):
        store.put(name, b"x")
    proxy.clear()
    proxy.add(Rule("status", method="POST", status=400, code="MissingContentMD5", count=None))
    store.delete(["b", "c"])
    store.delete(["d", "e"])
    assert sorted(sent(proxy)) == ["DELETE"] * 4 + ["POST"]
    assert [one.name for one in store.list("").objects] == ["a"]


def test_a_deletion_that_is_refused_inside_a_batch_is_an_error() -> None:
    class OneIsDenied:
        def split_path(self, path: str) -> tuple[str, str, None]:
            return "bucket", path.partition("/")[2], None

        async def _call_s3(self, method: str, **arguments: Any) -> Any:
            missing, denied = arguments["Delete"]["Objects"]
            return {"Errors": [{"Code": "NoSuchKey", **missing}, {"Code": "AccessDenied", **denied}]}

    client = S3Client(OneIsDenied(), "bucket/p", POLICY)
    store = FsspecObjects(client, "bucket/p", "s3://bucket/p")
    with pytest.raises(ReadOnly) as caught:
        store.delete(["a", "b"])
    assert caught.value.fields["object"] == "b"
    assert caught.value.reason == "AccessDenied"


def test_a_missing_bucket_is_named(ministack: S3Server) -> None:
    store = open_fsspec("s3://no-such-bucket/p", ministack.storage_options(), POLICY)
    for call in ("get", "get-range", "put", "put_new", "put_file", "delete", "delete-many", "list"):
        with pytest.raises(StorageError, match="there is no bucket 'no-such-bucket'") as caught:
            CALLS[call](store)
        assert type(caught.value) is StorageError
        assert caught.value.reason == "NoSuchBucket"
    store.close()


def test_a_closed_port_is_told(ministack: S3Server) -> None:
    options = ministack.storage_options(f"http://127.0.0.1:{free_ports(1)[0]}")
    store = open_fsspec("s3://bucket/p", options, POLICY)
    for call in CALLS.values():
        with pytest.raises(StorageUnavailable, match="check the endpoint") as caught:
            call(store)
        assert caught.value.reason == "connection"
    store.close()


@pytest.mark.parametrize("wrong", [{"key": "AKIDWRONG"}, {"secret": "wrong"}])
def test_bad_credentials_are_told(seaweedfs: S3Server, wrong: dict[str, str]) -> None:
    store = open_fsspec(f"s3://{seaweedfs.new_bucket()}/p", {**seaweedfs.storage_options(), **wrong}, POLICY)
    for name, call in CALLS.items():
        if name != "size":  # A HEAD has no body that could say more than 403.
            with pytest.raises(StorageError, match="check the access key, the secret and the endpoint"):
                call(store)
    store.close()


def test_missing_credentials_are_told(ministack: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    options = ministack.storage_options()
    del options["key"], options["secret"]
    store = open_fsspec("s3://bucket/p", options, POLICY)
    with pytest.raises(StorageError, match="no complete credentials were found"):
        store.get(ByteRange("a"))
    store.close()


# Life


def exit_code_of_child(work: Callable[[], bool]) -> int:
    """Do `work` in a forked child; 0 if it returned True. A child that waits for a thread that it lacks is killed."""
    child = os.fork()
    if child == 0:
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(20)
            os._exit(0 if work() else 1)
        finally:
            os._exit(2)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_forked_child_must_not_use_the_store(store: FsspecObjects, proxy: FaultProxy) -> None:
    def all_are_refused() -> bool:
        for call in CALLS.values():
            with pytest.raises(BasinClosed):
                call(store)
        return True

    assert exit_code_of_child(all_are_refused) == 0
    assert sent(proxy) == []
    assert store.get(ByteRange("a")) == b"0123456789"


def test_a_forked_child_may_open_its_own(store: FsspecObjects, server: S3Server, bucket: str) -> None:
    def copy_in_child() -> bool:
        own = open_fsspec(f"s3://{bucket}/some/prefix", server.storage_options(), POLICY)
        own.put("child", own.get(ByteRange("a")))
        return True

    assert exit_code_of_child(copy_in_child) == 0
    assert store.get(ByteRange("child")) == b"0123456789"


def test_an_interrupt_cancels_the_request(store: FsspecObjects, proxy: FaultProxy) -> None:
    proxy.add(Rule("delay", method="GET", delay_s=5))
    timer = threading.Timer(0.3, lambda: signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT))
    timer.start()
    started_s = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        store.get(ByteRange("a"))
    assert time.monotonic() - started_s < 2
    timer.join()
    assert store.get(ByteRange("a", 0, 1)) == b"0"
    running = asyncio.all_tasks(store._loop)
    assert [task for task in running if "_get" in repr(task.get_coro())] == []
