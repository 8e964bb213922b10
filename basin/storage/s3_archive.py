"""`S3Archive`: asks whether bodies of S3 can be read, and that they be restored: what obstore cannot ask.

Invariants:

- The options mean the same as to obstore and to s3fs: those that `s3_options` accepted.
- One call is one attempt; an error leaves only through `basin.storage.object_errors`.
- The client is made with the first request, for it takes a third of a second.

Beside `s3_options` the one module that imports botocore, and only when it is needed. Safe for several threads.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from basin.errors import MissingDependency
from basin.storage.archive import ALREADY_RESTORING, readiness_of, restore_request
from basin.storage.object_errors import answered_code, object_error
from basin.storage.objects import Readiness
from basin.storage.requests import RequestPolicy
from basin.storage.s3_options import Place

_Result = TypeVar("_Result")


class S3Archive:
    """The bodies of one place. `options` are the storage options."""

    def __init__(self, place: Place, options: Mapping[str, Any], policy: RequestPolicy) -> None:
        self._place = place
        self._options = dict(options)
        self._policy = policy
        self._made: Any = None
        self._lock = threading.Lock()

    def readiness(self, name: str) -> Readiness:
        """One HEAD. Raises `ObjectMissing`."""
        answer = self._guarded("size", name, lambda client, key: client.head_object(Bucket=self._place.bucket, Key=key))
        return readiness_of(answer)

    def restore(self, name: str, *, days: int, tier: str) -> None:
        """One request; none is needed if somebody has asked already, and the service says so."""

        def ask(client: Any, key: str) -> None:
            try:
                client.restore_object(Bucket=self._place.bucket, Key=key, RestoreRequest=restore_request(days, tier))
            except Exception as error:
                if answered_code(error) != ALREADY_RESTORING:
                    raise

        self._guarded("restore", name, ask)

    def close(self) -> None:
        """Release the connections."""
        with self._lock:
            client, self._made = self._made, None
        if client is not None:
            client.close()

    def _guarded(self, operation: str, name: str, act: Callable[[Any, str], _Result]) -> _Result:
        try:
            return act(self._client(), f"{self._place.prefix}/{name}" if self._place.prefix else name)
        except MissingDependency:
            raise
        except Exception as error:  # noqa: BLE001  # whatever the library raises
            typed = object_error(error, operation, name, self._place.url)
        raise typed  # Here, so that it keeps no hold on the library's error, which quotes the request.

    def _client(self) -> Any:
        with self._lock:
            if self._made is None:
                self._made = self._new_client()
            return self._made

    def _new_client(self) -> Any:
        try:
            from botocore import UNSIGNED  # type: ignore[import-untyped]  # no markers
            from botocore.config import Config  # type: ignore[import-untyped]  # no markers
            from botocore.session import Session  # type: ignore[import-untyped]  # no markers
        except ImportError as error:
            text = "asking for archived objects needs another package: pip install 'basin-store[s3]'"
            raise MissingDependency(text, package="botocore") from error
        options = self._options
        client: dict[str, Any] = dict(options.get("client_kwargs") or {})
        config: dict[str, Any] = {
            "connect_timeout": self._policy.connect_timeout_s,
            "read_timeout": self._policy.read_timeout_s,
            "max_pool_connections": self._policy.concurrency,
            **(options.get("config_kwargs") or {}),
        }
        config["retries"] = {"total_max_attempts": 1}
        if options.get("anon"):
            config["signature_version"] = UNSIGNED
        for name, spellings in (
            ("aws_access_key_id", ("key", "username")),
            ("aws_secret_access_key", ("secret", "password")),
            ("aws_session_token", ("token",)),
            ("endpoint_url", ("endpoint_url",)),
            ("use_ssl", ("use_ssl",)),
        ):
            for spelling in spellings:
                if options.get(spelling) is not None:
                    client[name] = options[spelling]
        session = Session(profile=options.get("profile"))
        return session.create_client("s3", config=Config(**config), **client)
