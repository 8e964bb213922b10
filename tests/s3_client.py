"""`S3Client`: signed requests to an S3 endpoint, for what the tests do around Basin.

- One call is one request on one new connection; nothing is repeated, cached or interpreted, and any status is returned.
- The signature is version 4 of Amazon's scheme, with the body's hash in it, by the standard library alone: a test that
  looks at a bucket around Basin must not do so through the client library that Basin uses.

Bodies as a whole only.
"""

from __future__ import annotations

import hashlib
import hmac
import http.client
import re
import time
import urllib.parse
from collections.abc import Mapping
from typing import NamedTuple


class Reply(NamedTuple):
    """What a server answered. Header names are in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes


class S3Client:
    """One endpoint and one pair of credentials. Safe for several threads."""

    def __init__(
        self, endpoint: str, *, key: str, secret: str, region: str = "us-east-1", timeout_s: float = 30
    ) -> None:
        where = urllib.parse.urlsplit(endpoint)
        self.host = where.netloc
        self._connection = http.client.HTTPSConnection if where.scheme == "https" else http.client.HTTPConnection
        self._key = key
        self._secret = secret
        self._region = region
        self._timeout_s = timeout_s

    def request(
        self,
        method: str,
        path: str,
        *,
        body: bytes = b"",
        query: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Reply:
        """Send one request for `/bucket/object`. Raises `OSError` or `http.client.HTTPException` if no reply comes."""
        quoted = urllib.parse.quote(path, safe="/-_.~")
        asked = "&".join(f"{_quote(name)}={_quote(value)}" for name, value in sorted((query or {}).items()))
        connection = self._connection(self.host, timeout=self._timeout_s)
        try:
            signed = self._signed(method, quoted, asked, body)
            connection.request(method, f"{quoted}?{asked}" if asked else quoted, body, {**(headers or {}), **signed})
            reply = connection.getresponse()
            read = reply.read()
        finally:
            connection.close()
        return Reply(reply.status, {name.lower(): value for name, value in reply.getheaders()}, read)

    def put(self, path: str, body: bytes, *, new: bool = False) -> int:
        """Status of a PUT, under the condition that the name is free if `new`."""
        return self.request("PUT", path, body=body, headers={"If-None-Match": "*"} if new else {}).status

    def get(self, path: str) -> bytes | None:
        """The body; `None` unless it was answered with 200."""
        reply = self.request("GET", path)
        return reply.body if reply.status == 200 else None

    def names(self, place: str) -> list[str]:
        """The first 1,000 names below a place (a bucket, or a bucket and a folder), in the server's order."""
        return self._keys(place, {"list-type": "2"})

    def uploads(self, place: str) -> list[str]:
        """The names below a place whose uploads in parts were begun and neither completed nor aborted."""
        return self._keys(place, {"uploads": ""})

    def _keys(self, place: str, query: dict[str, str]) -> list[str]:
        bucket, _, folder = place.partition("/")
        prefix = f"{folder}/" if folder else ""
        reply = self.request("GET", f"/{bucket}", query={**query, "prefix": prefix})
        if reply.status != 200:
            raise OSError(f"{reply.status} to a list of {place}: {reply.body.decode(errors='replace')}")
        return [name.removeprefix(prefix) for name in re.findall(r"<Key>([^<]*)</Key>", reply.body.decode())]

    def _signed(self, method: str, path: str, query: str, body: bytes) -> dict[str, str]:
        """The headers that a request needs to be believed."""
        now = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        digest = hashlib.sha256(body).hexdigest()
        fields = {"host": self.host, "x-amz-content-sha256": digest, "x-amz-date": now}
        names = ";".join(fields)
        lines = "".join(f"{name}:{value}\n" for name, value in fields.items())
        canonical = f"{method}\n{path}\n{query}\n{lines}\n{names}\n{digest}"
        scope = f"{now[:8]}/{self._region}/s3/aws4_request"
        wanted = f"AWS4-HMAC-SHA256\n{now}\n{scope}\n{hashlib.sha256(canonical.encode()).hexdigest()}"
        signing = b"AWS4" + self._secret.encode()
        for part in (*scope.split("/"), wanted):
            signing = hmac.digest(signing, part.encode(), "sha256")
        credential = f"Credential={self._key}/{scope}"
        proof = f"AWS4-HMAC-SHA256 {credential}, SignedHeaders={names}, Signature={signing.hex()}"
        return {**fields, "authorization": proof}


def _quote(text: str) -> str:
    return urllib.parse.quote(text, safe="-_.~")
