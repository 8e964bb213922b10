"""What a user of s3fs says about a bucket, in the words of obstore.

Invariants:

- An option either means the same to both clients, or has no meaning to Basin's requests, or is `Untranslatable`:
  nothing is guessed, and no text holds the value of an option.
- What the options leave open (credentials, region, endpoint) comes from where s3fs has it: from botocore, which knows
  the environment, the profiles and the chain of credentials. Without botocore obstore itself looks at the environment.

Sends no request, but for credentials that botocore fetches. Beside `s3_archive` the one module that imports botocore,
and only when it is needed; neither obstore nor s3fs is imported. Imports `basin.errors` and its neighbours.
"""

from __future__ import annotations

import datetime as dt
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, TypeAlias
from urllib.parse import urlsplit

from basin.errors import BasinError, InvalidArgument, StorageError
from basin.storage.object_errors import object_error
from basin.storage.requests import RequestPolicy

_Options: TypeAlias = Mapping[str, Any]
Credentials: TypeAlias = dict[str, Any]
"""`access_key_id`, `secret_access_key`, `token` and `expires_at`, as obstore takes them."""

# Botocore renews credentials at least ten minutes before they end: what it gave may be kept for half of that.
_CREDENTIALS_KEPT: Final = dt.timedelta(minutes=5)

_WITHOUT_MEANING: Final = frozenset(
    {
        *("use_listings_cache", "skip_instance_cache", "listings_expiry_time", "max_paths", "version_aware"),
        *("default_block_size", "default_fill_cache", "default_cache_type", "asynchronous", "loop"),
        *("max_concurrency", "fixed_upload_size"),
    }
)
"""Options of s3fs for what Basin does not use, or decides itself."""

_CREDENTIAL_NAMES: Final = {
    "key": ("key", "username", "aws_access_key_id"),
    "secret": ("secret", "password", "aws_secret_access_key"),
    "token": ("token", "aws_session_token"),
}
_KNOWN: Final = frozenset(
    {
        *_WITHOUT_MEANING,
        *("key", "username", "secret", "password", "token", "anon", "profile", "endpoint_url", "use_ssl"),
        *("requester_pays", "client_kwargs", "config_kwargs"),
    }
)
_KNOWN_CLIENT: Final = frozenset(
    {
        *("aws_access_key_id", "aws_secret_access_key", "aws_session_token"),
        *("endpoint_url", "region_name", "use_ssl", "verify"),
    }
)
_KNOWN_CONFIG: Final = frozenset(
    {
        *("connect_timeout", "read_timeout", "max_pool_connections", "retries", "region_name", "s3"),
        # Obstore sends no checksum beside the signed one, and checks none.
        *("request_checksum_calculation", "response_checksum_validation"),
    }
)
_KNOWN_S3: Final = frozenset({"addressing_style", "payload_signing_enabled"})


class Untranslatable(Exception):
    """Obstore cannot do what is asked, and s3fs can. Never leaves the storage. The text is for people, and short."""


class Place(NamedTuple):
    """An address: the bucket, the prefix without slashes around it, and the whole for people."""

    bucket: str
    prefix: str
    url: str


@dataclass(frozen=True, slots=True)
class S3Settings:
    """What a client of obstore is made of. `credentials` None: obstore finds them itself."""

    endpoint: str | None
    region: str | None
    virtual_hosts: bool
    unsigned_payload: bool
    anonymous: bool
    requester_pays: bool
    trusts_all: bool
    connect_timeout_s: float
    read_timeout_s: float
    connections: int
    credentials: Callable[[], Credentials] | None


class _Surroundings(NamedTuple):
    """What botocore knows without being told. `is_known` False: there is no botocore."""

    is_known: bool = False
    credentials: Any = None
    region: str | None = None
    endpoint: str | None = None


def s3_place(url: str) -> Place:
    """The parts of `"s3://bucket/prefix"`. Raises `InvalidArgument`, and `Untranslatable` for an access point."""
    protocol, separator, rest = url.partition("://")
    if not separator or protocol not in ("s3", "s3a"):
        raise InvalidArgument("not the URL of a bucket: write s3://bucket/prefix", argument="url")
    parts = rest.partition("?")[0].rstrip("/").split("/")
    if "@" in parts[0]:
        raise InvalidArgument("credentials do not belong into the URL: give them as storage options", argument="url")
    shown = f"{protocol}://{'/'.join(parts)}"
    if any(part in ("", ".", "..") for part in parts):
        raise InvalidArgument(f"not the place of a bucket: {shown} (write s3://bucket/prefix)", argument="url")
    if ":" in parts[0]:
        raise Untranslatable("the name of the bucket is that of an access point")
    return Place(parts[0], "/".join(parts[1:]), shown)


def s3_settings(place: Place, options: _Options, policy: RequestPolicy) -> S3Settings:
    """The settings of a client for storage options of s3fs; they win over what `policy` says.

    Raises `InvalidArgument` for an endpoint that is none, `StorageError` where no credentials are found, and
    `Untranslatable`. May take 0.2 s and more where botocore is asked.
    """
    client, config = _group(options, "client_kwargs"), _group(options, "config_kwargs")
    s3 = _group(config, "s3")
    _require_known(options, client, config, s3)
    anonymous = bool(options.get("anon"))
    given = None if anonymous else _given_credentials(options, client)
    endpoint = _first(options.get("endpoint_url"), client.get("endpoint_url"))
    region = _first(client.get("region_name"), config.get("region_name"))
    found = _Surroundings()
    if not (endpoint and region and (given or anonymous)):
        found = _surroundings(options.get("profile"), place, is_complete=bool(given) or anonymous)
    _check_endpoint(endpoint)
    endpoint = endpoint or found.endpoint
    _check_ssl(options, client, endpoint)
    return S3Settings(
        endpoint=endpoint,
        region=region or found.region,
        virtual_hosts=s3.get("addressing_style") == "virtual",
        unsigned_payload=_is_unsigned(s3, endpoint, found),
        anonymous=anonymous,
        requester_pays=bool(options.get("requester_pays")),
        trusts_all=client.get("verify") is False,
        connect_timeout_s=_number(config, "connect_timeout", policy.connect_timeout_s),
        read_timeout_s=_number(config, "read_timeout", policy.read_timeout_s),
        connections=int(_number(config, "max_pool_connections", policy.concurrency)),
        credentials=_provider(given or found.credentials),
    )


def _group(options: _Options, name: str) -> dict[str, Any]:
    group = options.get(name) or {}
    if not isinstance(group, Mapping):
        raise InvalidArgument(f"the storage option {name!r} must be a dict", argument="storage_options")
    return dict(group)


def _number(group: _Options, name: str, otherwise: float) -> float:
    value = group.get(name)
    if value is None:
        return otherwise
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise InvalidArgument(f"the storage option {name!r} must be a number above 0", argument="storage_options")
    return value


def _require_known(options: _Options, client: _Options, config: _Options, s3: _Options) -> None:
    known = ((options, _KNOWN), (client, _KNOWN_CLIENT), (config, _KNOWN_CONFIG), (s3, _KNOWN_S3))
    for group, names in known:
        for name, value in group.items():
            if name not in names and value not in (None, {}):
                raise Untranslatable(f"the storage option {name!r} is not known to obstore")
    if s3.get("addressing_style", "path") not in ("path", "auto", "virtual"):
        raise InvalidArgument("the option 'addressing_style' is path, auto or virtual", argument="storage_options")
    if not isinstance(client.get("verify", True), bool):
        raise Untranslatable("the storage option 'verify' names a file of certificates")


def _first(*values: Any) -> str | None:
    return next((str(value) for value in values if value), None)


def _given_credentials(options: _Options, client: _Options) -> Credentials | None:
    """The credentials among the options, or None. A profile beside them has nothing to say about them."""
    both = {**client, **options}
    key, secret, token = (_first(*(both.get(name) for name in names)) for names in _CREDENTIAL_NAMES.values())
    if bool(key) != bool(secret) or (token and not key):
        raise Untranslatable("the credentials among the storage options are not complete")
    if not key:
        return None
    return {"access_key_id": key, "secret_access_key": secret, "token": token, "expires_at": None}


def _check_endpoint(endpoint: str | None) -> None:
    if endpoint is None:
        return
    try:
        parts = urlsplit(endpoint)
        is_one = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_one = False
    if not is_one:
        text = "the storage option 'endpoint_url' is no address: write https://host or http://host:port"
        raise InvalidArgument(text, argument="storage_options") from None


def _check_ssl(options: _Options, client: _Options, endpoint: str | None) -> None:
    """An address says itself whether it is encrypted; without one s3fs takes an unencrypted one of Amazon's."""
    wants_none = options.get("use_ssl") is False or client.get("use_ssl") is False
    if wants_none and endpoint is None:
        raise Untranslatable("the storage option 'use_ssl' without an 'endpoint_url'")


def _is_unsigned(s3: _Options, endpoint: str | None, found: _Surroundings) -> bool:
    """Whether bodies are sent without a signed hash of them: over TLS, which protects them, as s3fs does.

    Hashing costs more than everything else in a large PUT. Where obstore may find an endpoint in the environment that
    nobody told us of, bodies are signed: that is always right.
    """
    if "payload_signing_enabled" in s3:
        return not s3["payload_signing_enabled"]
    if endpoint is None:
        return found.is_known
    return endpoint.lower().startswith("https:")


def _provider(found: Any) -> Callable[[], Credentials] | None:
    """The function that obstore asks for credentials: `found` is a dict of them, botocore's object, or None."""
    if found is None:
        return None
    if isinstance(found, dict):
        return lambda: found

    def fetch() -> Credentials:
        expires_at = dt.datetime.now(dt.UTC) + _CREDENTIALS_KEPT
        frozen = found.get_frozen_credentials()
        return {
            "access_key_id": frozen.access_key,
            "secret_access_key": frozen.secret_key,
            "token": frozen.token,
            "expires_at": expires_at,
        }

    return fetch


def _surroundings(profile: str | None, place: Place, *, is_complete: bool) -> _Surroundings:
    """What botocore says about everything that no option says. `is_complete`: credentials are not needed."""
    try:
        from botocore.configprovider import ConfiguredEndpointProvider  # type: ignore[import-untyped]  # no markers
        from botocore.session import Session  # type: ignore[import-untyped]  # no markers
    except ImportError:
        if profile:
            raise Untranslatable("the storage option 'profile' needs botocore") from None
        return _Surroundings()
    credentials = region = endpoint = None
    refused: BasinError | None = None
    try:
        session = Session(profile=profile)
        if session.get_config_variable("ca_bundle"):
            raise Untranslatable("a bundle of certificates is configured")
        credentials = None if is_complete else session.get_credentials()
        scoped = session.get_scoped_config()
        endpoint = ConfiguredEndpointProvider(session.full_config, scoped, "s3").provide()
        region = session.get_config_variable("region")
    except Untranslatable:
        raise
    except Exception as error:  # noqa: BLE001  # whatever the library raises
        refused = object_error(error, "open", "", place.url)
    if refused is not None:
        raise refused  # Here, so that it keeps no hold on the library's error.
    if credentials is None and not is_complete:
        text = "no complete credentials were found: give storage options, or set up the profile or environment"
        raise StorageError(f"open {place.url}: {text}", object="", operation="open", reason="NoCredentialsError")
    return _Surroundings(is_known=True, credentials=credentials, region=region, endpoint=endpoint)
