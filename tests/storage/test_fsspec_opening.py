"""Opening a store: which URLs and options are accepted, and that nothing of what is secret in them is ever shown."""

from __future__ import annotations

import copy
import pickle
import sys
import traceback
from typing import Any

import fsspec
import pytest

from basin.errors import BasinError, InvalidArgument, MissingDependency, ObjectMissing, StorageError
from basin.storage.fsspec_objects import open_fsspec
from basin.storage.objects import ByteRange
from basin.storage.requests import RequestPolicy
from tests.s3_proxy import Rule, fault_proxy
from tests.storage.object_calls import CALLS, FAULTS, POLICY
from tests.storage.s3_servers import S3Server

FAKE_SECRET = "rW7tZq0nEvErShOwThIs"
FAKE_KEY = "AKIDNEVERSHOWTHIS"


def every_text(error: BasinError) -> str:
    """All that a program or a person may see of an error: also what lies behind it in a traceback."""
    # Whoever pickles errors with all that they hold, as clusters do, would send the request and its headers along.
    assert (error.__cause__, error.__context__) == (None, None)
    seen = [str(error), repr(error), repr(error.fields), repr(pickle.dumps(error))]
    return "\n".join([*seen, *traceback.format_exception(error)])


@pytest.mark.parametrize("fault", [None, *(fault for fault, _ in FAULTS), Rule("truncate"), Rule("status", status=403)])
def test_no_error_shows_credentials(seaweedfs: S3Server, fault: Rule | None) -> None:
    with fault_proxy(seaweedfs.endpoint) as proxy:
        options = {**seaweedfs.storage_options(proxy.endpoint), "key": FAKE_KEY, "secret": FAKE_SECRET}
        options["token"] = f"{FAKE_SECRET}-token"
        store = open_fsspec(f"s3://{seaweedfs.new_bucket()}/p", options, POLICY)
        if fault is not None:
            proxy.add(Rule(fault.action, status=fault.status, code=fault.code, count=None))
        for call in CALLS.values():
            with pytest.raises(BasinError) as caught:
                call(store)
            text = every_text(caught.value)
            assert FAKE_SECRET not in text
            assert FAKE_KEY not in text
            assert "Signature=" not in text
        assert FAKE_SECRET not in repr(store) + store.url
        store.close()


@pytest.mark.parametrize(
    "options",
    [
        {"secret": FAKE_SECRET, "no_such_option": FAKE_SECRET},
        {"key": FAKE_KEY, "secret": FAKE_SECRET, "endpoint_url": f"{FAKE_SECRET}:9000"},
        {"secret": FAKE_SECRET, "config_kwargs": {"no_such_option": FAKE_SECRET}},
        {"secret": FAKE_SECRET, "client_kwargs": {"no_such_option": FAKE_SECRET}},
        {"key": FAKE_KEY, "username": FAKE_SECRET},
    ],
)
def test_options_that_cannot_be_are_told_without_their_values(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument) as caught:
        open_fsspec("s3://bucket/p", options, POLICY)
    shown = every_text(caught.value)
    assert FAKE_SECRET not in shown
    assert FAKE_KEY not in shown
    if "no_such_option" in repr(options):
        assert "'no_such_option'" in shown


def test_an_unknown_profile_is_told() -> None:
    with pytest.raises(StorageError, match="no complete credentials were found") as caught:
        open_fsspec("s3://bucket/p", {"profile": "no-such-profile"}, POLICY)
    assert caught.value.reason == "ProfileNotFound"


def test_a_url_shows_no_password() -> None:
    with pytest.raises(InvalidArgument) as caught:
        open_fsspec(f"s3://{FAKE_KEY}:{FAKE_SECRET}@bucket/p", None, POLICY)
    assert FAKE_SECRET not in every_text(caught.value)
    store = open_fsspec(f"memory://user:{FAKE_SECRET}@place/p?token={FAKE_SECRET}", None, POLICY)
    assert FAKE_SECRET not in store.url
    with pytest.raises(ObjectMissing) as missing:
        store.get(ByteRange("a"))
    assert FAKE_SECRET not in str(missing.value) + repr(missing.value.fields)


@pytest.mark.parametrize("url", ["bucket/p", "://bucket", "s3://", "s3:///p", "s3://bucket//p", "s3://bucket/../p", ""])
def test_a_url_that_cannot_be_is_refused(url: str) -> None:
    with pytest.raises(InvalidArgument):
        open_fsspec(url, None, POLICY)


def test_an_unknown_protocol_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="no-such-protocol"):
        open_fsspec("no-such-protocol://bucket/p", None, POLICY)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    with pytest.raises(MissingDependency, match=r"basin-store\[s3\]") as caught:
        open_fsspec("s3://bucket/p", None, POLICY)
    assert caught.value.package == "s3fs"


def opened_options(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], policy: RequestPolicy) -> dict[str, Any]:
    """The options that arrive at the file system."""
    seen: dict[str, Any] = {}
    kind = fsspec.get_filesystem_class("s3")

    def make(**given: Any) -> Any:
        seen.update(copy.deepcopy(given))  # The library adds to what it is given.
        return kind(**given)

    make._strip_protocol = kind._strip_protocol  # type: ignore[attr-defined]  # stands for the class
    monkeypatch.setattr(fsspec, "get_filesystem_class", lambda protocol: make)
    open_fsspec("s3://bucket/p", options, policy).close()
    return seen


def test_options_of_the_user_win_over_the_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {
        "key": "k",
        "secret": "s",
        "use_listings_cache": True,
        "asynchronous": True,
        "client_kwargs": {"region_name": "eu-north-1"},
        "config_kwargs": {"read_timeout": 77, "retries": {"mode": "adaptive"}, "s3": {"addressing_style": "path"}},
    }
    policy = RequestPolicy(connect_timeout_s=3, read_timeout_s=9, concurrency=40)
    seen = opened_options(monkeypatch, options, policy)
    assert seen["config_kwargs"] == {
        "connect_timeout": 3,
        "read_timeout": 77,
        "max_pool_connections": 40,
        "s3": {"addressing_style": "path"},
        "retries": {"total_max_attempts": 1},
    }
    assert seen["client_kwargs"] == {"region_name": "eu-north-1"}
    assert seen["use_listings_cache"] is False
    assert "asynchronous" not in seen
    assert options["use_listings_cache"] is True  # What the caller holds is not changed.
