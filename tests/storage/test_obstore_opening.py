"""Opening a store over obstore: what becomes of the options, which client is taken, and that no secret is shown."""

from __future__ import annotations

import pickle
import sys
import traceback
from pathlib import Path
from typing import Any

import pytest

from basin.errors import BasinError, InvalidArgument, MissingDependency, StorageError, StorageUnavailable
from basin.storage import obstore_objects, s3_choice
from basin.storage.fsspec_objects import FsspecObjects
from basin.storage.objects import ByteRange
from basin.storage.obstore_objects import ObstoreObjects, is_available, open_obstore
from basin.storage.requests import RequestPolicy
from basin.storage.s3_choice import open_s3
from basin.storage.s3_options import Place, S3Settings, Untranslatable, s3_place, s3_settings
from tests.s3_proxy import Rule, fault_proxy
from tests.storage.object_calls import CALLS, FAULTS, POLICY
from tests.storage.s3_servers import S3Server

FAKE_SECRET = "rW7tZq0nEvErShOwThIs"
FAKE_KEY = "AKIDNEVERSHOWTHIS"
PLACE = Place("bucket", "p", "s3://bucket/p")
GIVEN = {"key": "k", "secret": "s"}


@pytest.fixture(autouse=True)
def nothing_around(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No variables and no files of the user's say anything; the files that would are in the folder returned."""
    for name in (
        *("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE", "AWS_DEFAULT_PROFILE"),
        *("AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_CA_BUNDLE"),
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    return tmp_path


def every_text(error: BaseException) -> str:
    """All that a program or a person may see of an error: also what lies behind it in a traceback."""
    # Whoever pickles errors with all that they hold, as clusters do, would send the request and its headers along.
    assert (error.__cause__, error.__context__) == (None, None)
    seen = [str(error), repr(error), repr(getattr(error, "fields", "")), repr(pickle.dumps(error))]
    return "\n".join([*seen, *traceback.format_exception(error)])


def settings(options: dict[str, Any], policy: RequestPolicy = POLICY) -> S3Settings:
    return s3_settings(PLACE, options, policy)


def credentials(options: dict[str, Any]) -> tuple[str, str, str | None]:
    provider = settings(options).credentials
    assert provider is not None
    found = provider()
    return found["access_key_id"], found["secret_access_key"], found["token"]


# Secrets


@pytest.mark.parametrize("fault", [None, *(fault for fault, _ in FAULTS), Rule("truncate"), Rule("status", status=403)])
def test_no_error_shows_credentials(seaweedfs: S3Server, fault: Rule | None) -> None:
    with fault_proxy(seaweedfs.endpoint) as proxy:
        options = {**seaweedfs.storage_options(proxy.endpoint), "key": FAKE_KEY, "secret": FAKE_SECRET}
        options["token"] = f"{FAKE_SECRET}-token"
        store = open_obstore(f"s3://{seaweedfs.new_bucket()}/p", options, POLICY)
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


def test_an_answer_that_quotes_the_request_is_not_shown(ministack: S3Server) -> None:
    with fault_proxy(ministack.endpoint) as proxy:
        store = open_obstore("s3://bucket/p", ministack.storage_options(proxy.endpoint), POLICY)
        for call in CALLS.values():
            proxy.add(Rule("status", status=403, code=f"InvalidAccessKeyId</Code><Key>{FAKE_KEY}</Key><Code>"))
            with pytest.raises(BasinError) as caught:
                call(store)
            assert FAKE_KEY not in every_text(caught.value)
            proxy.clear()
        store.close()


@pytest.mark.parametrize(
    "options",
    [
        {"key": FAKE_KEY, "secret": FAKE_SECRET, "endpoint_url": f"{FAKE_SECRET}:9000"},
        {"key": FAKE_KEY, "secret": FAKE_SECRET, "endpoint_url": f"http://host:{FAKE_SECRET}"},
        {"key": FAKE_KEY, "secret": FAKE_SECRET, "client_kwargs": FAKE_SECRET},
        {**GIVEN, "config_kwargs": {"s3": {"addressing_style": FAKE_SECRET}}},
        {**GIVEN, "config_kwargs": {"read_timeout": FAKE_SECRET}},
    ],
)
def test_options_that_cannot_be_are_told_without_their_values(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument) as caught:
        open_obstore("s3://bucket/p", options, POLICY)
    shown = every_text(caught.value)
    assert FAKE_SECRET not in shown
    assert FAKE_KEY not in shown


@pytest.mark.parametrize(
    "options",
    [
        {**GIVEN, "no_such_option": FAKE_SECRET},
        {**GIVEN, "client_kwargs": {"no_such_option": FAKE_SECRET}},
        {**GIVEN, "config_kwargs": {"no_such_option": FAKE_SECRET}},
        {**GIVEN, "config_kwargs": {"s3": {"no_such_option": FAKE_SECRET}}},
    ],
)
def test_an_option_that_only_another_client_may_know_is_named(options: dict[str, Any]) -> None:
    with pytest.raises(Untranslatable, match="'no_such_option'") as caught:
        open_obstore("s3://bucket/p", options, POLICY)
    assert FAKE_SECRET not in every_text(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        {"key": "k"},
        {"secret": "s"},
        {"token": "t"},
        {**GIVEN, "use_ssl": False},
        {**GIVEN, "client_kwargs": {"verify": "/some/file"}},
        {**GIVEN, "cache_regions": True},
        {**GIVEN, "s3_additional_kwargs": {"StorageClass": "STANDARD_IA"}},
    ],
)
def test_what_means_something_else_to_obstore_is_left_to_the_other(options: dict[str, Any]) -> None:
    with pytest.raises(Untranslatable):
        settings(options)


def test_a_url_shows_no_password() -> None:
    with pytest.raises(InvalidArgument) as caught:
        open_obstore(f"s3://{FAKE_KEY}:{FAKE_SECRET}@bucket/p", None, POLICY)
    assert FAKE_SECRET not in every_text(caught.value)


@pytest.mark.parametrize(
    "url", ["bucket/p", "://bucket", "s3://", "s3:///p", "s3://bucket//p", "s3://bucket/../p", "", "gs://bucket/p"]
)
def test_a_url_that_cannot_be_is_refused(url: str) -> None:
    with pytest.raises(InvalidArgument):
        open_obstore(url, GIVEN, POLICY)


def test_the_parts_of_a_url() -> None:
    assert s3_place("s3a://bucket/some/prefix/") == Place("bucket", "some/prefix", "s3a://bucket/some/prefix")
    assert s3_place("s3://bucket") == Place("bucket", "", "s3://bucket")


# Options


def test_options_of_the_user_win_over_the_policy() -> None:
    options = {
        **GIVEN,
        "use_listings_cache": True,
        "asynchronous": True,
        "requester_pays": True,
        "endpoint_url": "https://host:9000",
        "client_kwargs": {"region_name": "eu-north-1", "verify": False},
        "config_kwargs": {"read_timeout": 77, "retries": {"mode": "adaptive"}, "s3": {"addressing_style": "virtual"}},
    }
    found = settings(options, RequestPolicy(connect_timeout_s=3, read_timeout_s=9, concurrency=40))
    assert (found.endpoint, found.region) == ("https://host:9000", "eu-north-1")
    assert (found.connect_timeout_s, found.read_timeout_s, found.connections) == (3, 77, 40)
    assert found.virtual_hosts
    assert found.requester_pays
    assert found.trusts_all
    assert options["use_listings_cache"] is True  # What the caller holds is not changed.


@pytest.mark.parametrize(
    ("endpoint", "signing", "unsigned"),
    [
        ("http://host", None, False),
        ("http://host", False, True),
        ("https://host", None, True),
        ("https://host", True, False),
        (None, None, True),
    ],
)
def test_a_body_is_signed_where_nothing_else_protects_it(
    endpoint: str | None, signing: bool | None, unsigned: bool
) -> None:
    s3 = {} if signing is None else {"payload_signing_enabled": signing}
    found = settings({**GIVEN, "endpoint_url": endpoint, "config_kwargs": {"s3": s3}})
    assert found.unsigned_payload is unsigned


@pytest.mark.parametrize("unsigned", [False, True])
def test_the_hash_of_a_body_is_sent_or_not(ministack: S3Server, unsigned: bool) -> None:
    with fault_proxy(ministack.endpoint) as proxy:
        options = ministack.storage_options(proxy.endpoint)
        if unsigned:
            options["config_kwargs"] = {"s3": {"payload_signing_enabled": False}}
        store = open_obstore(f"s3://{ministack.new_bucket()}/p", options, POLICY)
        store.put("a", b"x")
        assert (proxy.exchanges[0].headers["x-amz-content-sha256"] == "UNSIGNED-PAYLOAD") is unsigned
        store.close()


def test_a_bucket_may_be_part_of_the_hosts_name(ministack: S3Server) -> None:
    options = {
        **ministack.storage_options("http://localhost:9"),
        "config_kwargs": {"s3": {"addressing_style": "virtual"}},
    }
    store = open_obstore("s3://bucket/p", options, POLICY)
    assert store._clients.get().config["endpoint"] == "http://bucket.localhost:9"
    store.close()


def test_nobody_signs_for_a_public_bucket(ministack: S3Server) -> None:
    with fault_proxy(ministack.endpoint) as proxy:
        options = {"anon": True, "client_kwargs": {"endpoint_url": proxy.endpoint}}
        store = open_obstore(f"s3://{ministack.new_bucket()}/p", options, POLICY)
        store.list("")
        assert "authorization" not in proxy.exchanges[0].headers
        store.close()


# What the options leave open


def test_credentials_region_and_endpoint_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "env-key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "env-secret")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "env-token")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-west-3")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://env-host:1")
    assert credentials({}) == ("env-key", "env-secret", "env-token")
    found = settings({})
    assert (found.region, found.endpoint, found.unsigned_payload) == ("eu-west-3", "http://env-host:1", False)
    mine = settings({"client_kwargs": {"endpoint_url": "https://mine", "region_name": "eu-west-1"}})
    assert (mine.region, mine.endpoint, mine.unsigned_payload) == ("eu-west-1", "https://mine", True)


def test_the_environment_adds_nothing_to_options(monkeypatch: pytest.MonkeyPatch, ministack: S3Server) -> None:
    for name in ("AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3", "AWS_CONDITIONAL_PUT", "AWS_UNSIGNED_PAYLOAD"):
        monkeypatch.setenv(
            name, {"AWS_ENDPOINT_URL_S3": "http://127.0.0.1:9", "AWS_CONDITIONAL_PUT": "disabled"}.get(name, "true")
        )
    with fault_proxy(ministack.endpoint) as proxy:
        store = open_obstore(f"s3://{ministack.new_bucket()}/p", ministack.storage_options(proxy.endpoint), POLICY)
        store.put_new("a", b"x")
        headers = proxy.exchanges[0].headers
        assert headers["if-none-match"] == "*"
        assert "x-amz-security-token" not in headers
        assert headers["x-amz-content-sha256"] != "UNSIGNED-PAYLOAD"
        store.close()


def test_a_region_of_the_environment_is_obstores_own_matter(
    monkeypatch: pytest.MonkeyPatch, ministack: S3Server
) -> None:
    monkeypatch.setenv("AWS_REGION", "eu-central-2")
    with fault_proxy(ministack.endpoint) as proxy:
        store = open_obstore(f"s3://{ministack.new_bucket()}/p", {**GIVEN, "endpoint_url": proxy.endpoint}, POLICY)
        proxy.add(Rule("status"))
        with pytest.raises(StorageUnavailable):
            store.list("")
        assert "/eu-central-2/s3/" in proxy.exchanges[0].headers["authorization"]
        store.close()


def test_profiles_are_known(nothing_around: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (nothing_around / "credentials").write_text(
        "[default]\naws_access_key_id = file-key\naws_secret_access_key = file-secret\n"
        "[other]\naws_access_key_id = other-key\naws_secret_access_key = other-secret\n"
    )
    (nothing_around / "config").write_text("[profile other]\nregion = ap-south-2\nendpoint_url = https://other-host\n")
    assert credentials({}) == ("file-key", "file-secret", None)
    assert credentials({"profile": "other"}) == ("other-key", "other-secret", None)
    assert settings({"profile": "other"}).region == "ap-south-2"
    assert settings({"profile": "other"}).endpoint == "https://other-host"
    monkeypatch.setenv("AWS_PROFILE", "other")
    assert credentials({}) == ("other-key", "other-secret", None)
    assert credentials(GIVEN) == ("k", "s", None)


def test_an_unknown_profile_is_told() -> None:
    with pytest.raises(StorageError, match="no complete credentials were found") as caught:
        open_obstore("s3://bucket/p", {"profile": "no-such-profile"}, POLICY)
    assert caught.value.reason == "ProfileNotFound"


def test_missing_credentials_are_told() -> None:
    with pytest.raises(StorageError, match="no complete credentials were found") as caught:
        open_obstore("s3://bucket/p", None, POLICY)
    assert caught.value.reason == "NoCredentialsError"


def test_a_bundle_of_certificates_is_left_to_the_other_client(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_CA_BUNDLE", "/some/file")
    with pytest.raises(Untranslatable):
        settings(GIVEN)


@pytest.fixture
def without_botocore(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("botocore.session", "botocore.configprovider"):
        monkeypatch.setitem(sys.modules, name, None)


@pytest.mark.usefixtures("without_botocore")
def test_without_botocore_obstore_looks_at_the_environment(
    monkeypatch: pytest.MonkeyPatch, ministack: S3Server
) -> None:
    bucket = ministack.new_bucket()
    with fault_proxy(ministack.endpoint) as proxy:
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "env-key")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "env-secret")
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        store = open_obstore(f"s3://{bucket}/p", None, POLICY)
        store.put("a", b"x")
        headers = proxy.exchanges[0].headers
        assert "Credential=env-key/" in headers["authorization"]
        assert headers["x-amz-content-sha256"] != "UNSIGNED-PAYLOAD"
        store.close()


@pytest.mark.usefixtures("without_botocore")
def test_without_botocore_there_are_no_profiles() -> None:
    with pytest.raises(Untranslatable, match="profile"):
        settings({"profile": "other"})


@pytest.mark.usefixtures("without_botocore")
def test_credentials_that_nobody_has_are_told_without_botocore(monkeypatch: pytest.MonkeyPatch) -> None:
    with fault_proxy("http://127.0.0.1:9") as metadata:
        metadata.add(Rule("status", status=403, code="Forbidden", count=None))
        monkeypatch.setenv("AWS_METADATA_ENDPOINT", metadata.endpoint)
        store = open_obstore("s3://bucket/p", {"endpoint_url": "http://127.0.0.1:9"}, POLICY)
        with pytest.raises(StorageError, match="no complete credentials were found") as caught:
            store.get(ByteRange("a"))
        assert caught.value.reason == "NoCredentialsError"
        store.close()


# The choice


def test_obstore_is_taken_where_it_can_be(ministack: S3Server) -> None:
    for options in (ministack.storage_options(), {**ministack.storage_options(), "client": "obstore"}):
        store = open_s3(f"s3://{ministack.new_bucket()}/p", options, POLICY)
        assert type(store) is ObstoreObjects
        store.put("a", b"x")
        assert store.get(ByteRange("a")) == b"x"
        store.close()


@pytest.mark.parametrize("more", [{"client": "s3fs"}, {"s3_additional_kwargs": {"StorageClass": "STANDARD"}}])
def test_s3fs_is_taken_otherwise(ministack: S3Server, more: dict[str, Any]) -> None:
    store = open_s3(f"s3://{ministack.new_bucket()}/p", {**ministack.storage_options(), **more}, POLICY)
    assert type(store) is FsspecObjects
    store.put("a", b"x")
    store.close()


def test_s3fs_is_taken_without_obstore(ministack: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    assert not is_available()
    store = open_s3("s3://bucket/p", ministack.storage_options(), POLICY)
    assert type(store) is FsspecObjects
    store.close()


def test_s3fs_is_taken_where_obstore_cannot_run_any_more(ministack: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(obstore_objects._runtime, "_inherited", True)
    store = open_s3("s3://bucket/p", ministack.storage_options(), POLICY)
    assert type(store) is FsspecObjects
    store.close()
    with pytest.raises(InvalidArgument, match="forked"):
        open_s3("s3://bucket/p", {**ministack.storage_options(), "client": "obstore"}, POLICY)


def test_other_protocols_are_fsspecs() -> None:
    store = open_s3("memory://somewhere", None, POLICY)
    assert type(store) is FsspecObjects
    store.close()


def test_an_unknown_client_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="'client'"):
        open_s3("s3://bucket/p", {**GIVEN, "client": "curl"}, POLICY)


def test_a_forced_client_does_not_give_way(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidArgument, match="'no_such_option'"):
        open_s3("s3://bucket/p", {**GIVEN, "client": "obstore", "no_such_option": 1}, POLICY)
    monkeypatch.setitem(sys.modules, "obstore", None)
    monkeypatch.setitem(sys.modules, "obstore.store", None)
    with pytest.raises(MissingDependency, match=r"basin-store\[s3\]") as caught:
        open_s3("s3://bucket/p", {**GIVEN, "client": "obstore"}, POLICY)
    assert caught.value.package == "obstore"


def test_a_missing_package_is_named_with_what_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def open_nothing(*arguments: Any) -> Any:
        raise MissingDependency("not installed", package="s3fs")

    monkeypatch.setattr(s3_choice, "_open_fsspec", open_nothing)
    with pytest.raises(MissingDependency, match=r"'no_such_option'.*pip install s3fs") as caught:
        open_s3("s3://bucket/p", {**GIVEN, "no_such_option": 1}, POLICY)
    assert caught.value.package == "s3fs"
