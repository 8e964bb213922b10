"""`ObstoreObjects` on real servers: the requests that each call sends, large files, failures, forks and interrupts."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from basin.errors import (
    AlreadyExists,
    BasinClosed,
    GrainNotReady,
    ObjectMissing,
    StorageError,
    StorageUnavailable,
)
from basin.storage import obstore_objects
from basin.storage.objects import PUT_SIZE_MAX, ByteRange, Listing
from basin.storage.obstore_objects import ObstoreObjects, open_obstore
from basin.storage.requests import RequestPolicy
from basin.storage.s3_options import Untranslatable
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
def store(server: S3Server, proxy: FaultProxy, bucket: str) -> Iterator[ObstoreObjects]:
    """A store that reaches its server through the proxy, with `a` in it and a connection that was in use before."""
    made = open_obstore(f"s3://{bucket}/some/prefix", server.storage_options(proxy.endpoint), POLICY)
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
def test_one_call_is_one_request(store: ObstoreObjects, proxy: FaultProxy, call: str, requests: list[str]) -> None:
    CALLS[call](store)
    assert sent(proxy) == requests


def test_opening_and_closing_send_nothing(server: S3Server, proxy: FaultProxy, bucket: str) -> None:
    open_obstore(f"s3://{bucket}/x", server.storage_options(proxy.endpoint), POLICY).close()
    assert sent(proxy) == []


@on_both_servers
def test_an_empty_object_is_one_get(store: ObstoreObjects, proxy: FaultProxy) -> None:
    store.put("empty", b"")
    proxy.clear()
    assert store.get(ByteRange("empty")) == b""
    assert store.get(ByteRange("empty", 0, 100)) == b""
    assert sent(proxy) == ["GET", "GET"]


@on_both_servers
def test_only_put_new_has_a_condition(store: ObstoreObjects, proxy: FaultProxy) -> None:
    store.put_new("b", b"new")
    store.put("b", b"old")
    assert [exchange.headers.get("if-none-match") for exchange in proxy.exchanges] == ["*", None]


@on_both_servers
def test_a_list_takes_a_request_for_each_thousand(store: ObstoreObjects, proxy: FaultProxy) -> None:
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
        store = open_obstore(f"s3://{bucket}/p", options, RequestPolicy(concurrency=concurrency))
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
def test_names_lie_below_the_prefix(store: ObstoreObjects, server: S3Server, bucket: str) -> None:
    store.put("data/b", b"x")
    assert sorted(server.client().names(bucket)) == ["some/prefix/a", "some/prefix/data/b"]


def test_a_whole_bucket_may_be_the_place(server: S3Server, bucket: str) -> None:
    store = open_obstore(f"s3://{bucket}/", server.storage_options(), POLICY)
    store.put("data/a", b"xyz")
    assert server.client().names(bucket) == ["data/a"]
    assert store.get(ByteRange("data/a")) == b"xyz"
    assert store.list("") == Listing([], ["data"])
    store.delete(["data/a", "data/b"])
    assert store.list("") == Listing([], [])
    store.close()


def test_what_no_store_can_have_written_is_not_listed(store: ObstoreObjects, server: S3Server, bucket: str) -> None:
    for name in ("Upper", "a b", "folder/x", "Folder/x"):
        server.client().put(f"/{bucket}/some/prefix/{name}", b"x")
    listing = store.list("")
    assert [one.name for one in listing.objects] == ["a"]
    assert listing.folders == ["folder"]


# Large files


@on_both_servers
def test_a_file_of_the_limit_is_one_put(store: ObstoreObjects, proxy: FaultProxy, tmp_path: Path) -> None:
    store.put_file("b", large_file(tmp_path, PUT_SIZE_MAX))
    assert sent(proxy) == ["PUT"]


def test_at_most_four_parts_are_under_way(store: ObstoreObjects, proxy: FaultProxy, tmp_path: Path) -> None:
    proxy.add(Rule("delay", match="partNumber", delay_s=3, count=None))
    path = large_file(tmp_path, 90 << 20)
    thread = threading.Thread(target=store.put_file, args=("b", path))
    thread.start()
    deadline_s = time.monotonic() + 2.9
    while time.monotonic() < deadline_s and len(sent(proxy)) < 6:
        time.sleep(0.02)
    assert sent(proxy) == ["POST", *["PUT"] * 4]  # They came at once, and a fifth waits for one of them.
    thread.join()
    assert sent(proxy) == ["POST", *["PUT"] * 6, "POST"]
    assert store.size("b") == 90 << 20


@on_both_servers
@pytest.mark.parametrize("match", ["partNumber=3", "uploadId=[^&]*$"])
def test_an_upload_that_fails_is_aborted(
    store: ObstoreObjects, proxy: FaultProxy, server: S3Server, bucket: str, tmp_path: Path, match: str
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


def test_a_file_that_shrinks_is_noticed_and_its_upload_aborted(
    store: ObstoreObjects, proxy: FaultProxy, server: S3Server, bucket: str, tmp_path: Path
) -> None:
    path = large_file(tmp_path)
    proxy.add(Rule("delay", method="POST", delay_s=0.5))
    timer = threading.Timer(0.2, lambda: os.truncate(path, 1 << 20))
    timer.start()
    with pytest.raises(StorageError, match="shorter"):
        store.put_file("b", path)
    timer.join()
    settle(proxy)
    assert "DELETE" in sent(proxy)
    assert server.client().uploads(bucket) == []


def test_a_file_that_is_closed_is_read_no_more(tmp_path: Path) -> None:
    with large_file(tmp_path).open("rb") as file:
        parts = obstore_objects._Parts(file.fileno(), PUT_SIZE_MAX + 1)
        assert len(next(parts)) == parts.part_size
        parts.end()
        with pytest.raises(StorageError, match="interrupted"):
            next(parts)


def test_a_local_file_that_is_missing_is_named(store: ObstoreObjects, proxy: FaultProxy, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="nowhere"):
        store.put_file("b", tmp_path / "nowhere")
    assert sent(proxy) == []


# Failures


@pytest.mark.parametrize(("fault", "reason"), FAULTS, ids=lambda one: getattr(one, "code", one))
def test_one_attempt_is_one_attempt(store: ObstoreObjects, proxy: FaultProxy, fault: Rule, reason: str) -> None:
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
    store = open_obstore(f"s3://{bucket}/p", options, POLICY)
    proxy.add(Rule("status", count=None))
    with pytest.raises(StorageUnavailable):
        store.get(ByteRange("a"))
    assert sent(proxy) == ["GET"]
    store.close()


def test_a_body_that_is_cut_short_is_no_success(store: ObstoreObjects, proxy: FaultProxy) -> None:
    for wanted in (ByteRange("a"), ByteRange("a", 2, 8), ByteRange("a", 2)):
        proxy.clear()
        proxy.add(Rule("truncate", method="GET"))
        with pytest.raises(StorageUnavailable) as caught:
            store.get(wanted)
        assert caught.value.reason == "connection"
        assert sent(proxy) == ["GET"]


def test_a_body_that_is_changed_on_its_way_comes_as_it_came(store: ObstoreObjects, proxy: FaultProxy) -> None:
    proxy.add(Rule("corrupt", method="GET"))
    assert store.get(ByteRange("a")) == b"\xb0123456789"  # Whoever stored it has its checksum.


def test_a_list_that_is_cut_short_is_no_success(store: ObstoreObjects, proxy: FaultProxy) -> None:
    proxy.add(Rule("truncate", method="GET"))
    with pytest.raises(StorageUnavailable):
        store.list("")


@on_both_servers
def test_a_lost_reply_leaves_the_body_stored(store: ObstoreObjects, proxy: FaultProxy) -> None:
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
    store = open_obstore(f"s3://{bucket}/p", server.storage_options(proxy.endpoint), policy)
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


def test_an_error_in_a_reply_of_200_is_an_error(store: ObstoreObjects, proxy: FaultProxy, tmp_path: Path) -> None:
    proxy.add(Rule("status", match="uploadId=[^&]*$", method="POST", status=200, code="SlowDown"))
    with pytest.raises(StorageUnavailable) as caught:
        store.put_file("b", large_file(tmp_path))
    assert caught.value.reason == "throttled"


def test_a_service_without_batches_deletes_one_by_one(store: ObstoreObjects, proxy: FaultProxy) -> None:
    for name in ("b", "c", "d"):
        store.put(name, b"x")
    proxy.clear()
    proxy.add(Rule("status", method="POST", status=400, code="MissingContentMD5", count=None))
    store.delete(["b", "c"])
    store.delete(["d", "e"])
    assert sorted(sent(proxy)) == ["DELETE"] * 4 + ["POST"]
    assert [one.name for one in store.list("").objects] == ["a"]


@pytest.mark.parametrize(
    ("status", "code", "kind", "text"),
    [
        (403, "AccessDenied", StorageError, "no permission to read"),
        (403, "InvalidObjectState", GrainNotReady, "cold storage"),
        (400, "ExpiredToken", StorageError, "have expired"),
        (403, "RequestTimeTooSkewed", StorageError, "clock is off"),
        (400, "RequestTimeout", StorageUnavailable, "in time"),
        (429, "TooManyRequests", StorageUnavailable, "fewer requests"),
        (501, "NotImplemented", StorageError, "does not implement"),
        (418, "NeverHeardOf", StorageError, "refused it"),
    ],
)
def test_a_refusal_is_told(
    store: ObstoreObjects, proxy: FaultProxy, status: int, code: str, kind: Any, text: str
) -> None:
    proxy.add(Rule("status", status=status, code=code))
    with pytest.raises(kind, match=text) as caught:
        store.get(ByteRange("a"))
    assert type(caught.value) is kind
    assert caught.value.status == status
    assert caught.value.fields["object"] == "a"
    assert caught.value.fields["operation"] == "get"


def test_a_missing_bucket_is_named(ministack: S3Server) -> None:
    store = open_obstore("s3://no-such-bucket/p", ministack.storage_options(), POLICY)
    for call in ("get", "get-range", "put", "put_new", "put_file", "delete", "delete-many", "list"):
        with pytest.raises(StorageError, match="there is no bucket 'no-such-bucket'") as caught:
            CALLS[call](store)
        assert type(caught.value) is StorageError
        assert caught.value.reason == "NoSuchBucket"
    store.close()


def test_a_closed_port_is_told(ministack: S3Server) -> None:
    options = ministack.storage_options(f"http://127.0.0.1:{free_ports(1)[0]}")
    store = open_obstore("s3://bucket/p", options, POLICY)
    for call in CALLS.values():
        with pytest.raises(StorageUnavailable, match="check the endpoint") as caught:
            call(store)
        assert caught.value.reason == "connection"
    store.close()


@pytest.mark.parametrize("wrong", [{"key": "AKIDWRONG"}, {"secret": "wrong"}])
def test_bad_credentials_are_told(seaweedfs: S3Server, wrong: dict[str, str]) -> None:
    store = open_obstore(f"s3://{seaweedfs.new_bucket()}/p", {**seaweedfs.storage_options(), **wrong}, POLICY)
    for name, call in CALLS.items():
        if name != "size":  # A HEAD has no body that could say more than 403.
            with pytest.raises(StorageError, match="check the access key, the secret and the endpoint"):
                call(store)
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


def test_a_forked_child_must_not_use_the_store(store: ObstoreObjects, proxy: FaultProxy) -> None:
    def all_are_refused() -> bool:
        for call in CALLS.values():
            with pytest.raises(BasinClosed):
                call(store)
        return True

    assert exit_code_of_child(all_are_refused) == 0
    assert sent(proxy) == []
    assert store.get(ByteRange("a")) == b"0123456789"


def test_a_forked_child_is_told_that_it_cannot_open_one(store: ObstoreObjects, server: S3Server, bucket: str) -> None:
    def is_refused() -> bool:
        with pytest.raises(Untranslatable, match="forked"):
            open_obstore(f"s3://{bucket}/some/prefix", server.storage_options(), POLICY)
        return True

    assert exit_code_of_child(is_refused) == 0


def test_a_forked_child_ends_like_any_other(store: ObstoreObjects) -> None:
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(20)
        vars(obstore_objects).clear()  # What an interpreter does that ends.
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert store.get(ByteRange("a")) == b"0123456789"


def test_an_interrupt_cancels_the_request(store: ObstoreObjects, proxy: FaultProxy) -> None:
    proxy.add(Rule("delay", method="GET", delay_s=5))
    timer = threading.Timer(0.3, lambda: signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT))
    timer.start()
    started_s = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        store.get(ByteRange("a"))
    assert time.monotonic() - started_s < 2
    timer.join()
    assert store.get(ByteRange("a", 0, 1)) == b"0"
    loop = obstore_objects._runtime._loop
    assert loop is not None
    assert [task for task in asyncio.all_tasks(loop) if "_get" in repr(task.get_coro())] == []


def test_an_interrupted_upload_is_aborted(
    store: ObstoreObjects, proxy: FaultProxy, server: S3Server, bucket: str, tmp_path: Path
) -> None:
    proxy.add(Rule("delay", match="partNumber", delay_s=1, count=None))
    path = large_file(tmp_path, 160 << 20)
    timer = threading.Timer(0.5, lambda: signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT))
    timer.start()
    started_s = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        store.put_file("b", path)
    assert time.monotonic() - started_s < 1
    timer.join()
    deadline_s = time.monotonic() + 10
    while "DELETE" not in sent(proxy) and time.monotonic() < deadline_s:
        time.sleep(0.02)
    settle(proxy)
    assert server.client().uploads(bucket) == []
    with pytest.raises(ObjectMissing):
        store.size("b")
