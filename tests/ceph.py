"""A Ceph object gateway on loopback, made of Debian's packages, and the tests against it: `nox -s s3-reference`.

Ceph's gateway is the reference for the semantics of S3 among the stores that can be run here. It is no part of the
ordinary tests: it takes half a gigabyte of packages, and the superuser, who makes a root for it with `mmdebstrap`.

`python -m tests.ceph [FOLDER] [-- PYTEST'S ARGUMENTS]`: the root is made in FOLDER unless it is there; monitor, object
daemon (in memory) and gateway are started, the tests of buckets run against them, and all three are killed by pid.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from tests.storage.s3_servers import free_ports

RELEASE: Final = "forky"  # the first with the 20th release of Ceph, whose conditional writes are all right
PACKAGES: Final = "radosgw,ceph-mon,ceph-osd,ceph-common"
KEY: Final = "basinkey"
SECRET: Final = "basinsecret123"
START_S: Final = 60
TESTS: Final = ("tests/storage/test_fsspec_conformance.py", "tests/storage/test_obstore_conformance.py", "tests/remote")

# The second protocol of the messenger needs authentication; without a cluster address the object daemon would listen
# everywhere.
CONFIGURATION: Final = """\
[global]
fsid = {fsid}
mon host = v1:127.0.0.1:{monitor}/0
ms bind msgr2 = false
auth cluster required = none
auth service required = none
auth client required = none
public network = 127.0.0.0/8
cluster network = 127.0.0.0/8
public addr = 127.0.0.1
cluster addr = 127.0.0.1
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 4
osd pool default pg autoscale mode = off
mon allow pool size one = true
osd crush chooseleaf type = 0
osd objectstore = memstore
memstore device bytes = 4294967296
log file = {home}/$name.log
admin socket = {home}/$name.asok
run dir = {home}
pid file = {home}/$name.pid
keyring = {home}/keyring
mon data = {home}/mon
osd data = {home}/osd
rgw frontends = beast endpoint=127.0.0.1:{gateway}
"""

START: Final = """\
set -e
export CEPH_CONF={home}/ceph.conf
ceph-authtool -C {home}/keyring --gen-key -n mon. --cap mon 'allow *'
ceph-authtool {home}/keyring --gen-key -n client.admin --cap mon 'allow *' --cap osd 'allow *'
monmaptool --create --fsid {fsid} --addv a '[v1:127.0.0.1:{monitor}/0]' {home}/monmap
ceph-mon --mkfs -i a --monmap {home}/monmap --keyring {home}/keyring
ceph-mon -i a --public-addr 127.0.0.1
timeout 30 ceph osd new {daemon}
ceph-osd -i 0 --mkfs --osd-uuid {daemon}
ceph-osd -i 0
timeout 60 radosgw-admin user create --uid=basin --display-name=basin --access-key={key} --secret-key={secret}
radosgw -n client.admin
"""


def make_root(folder: Path) -> None:
    """Install Ceph into `folder`, unless it is there. Needs the superuser; a minute or two."""
    if (folder / "usr/bin/radosgw").exists():
        return
    options = ["--variant=minbase", f"--include={PACKAGES}", "--dpkgopt=path-exclude=/usr/share/doc/*"]
    options += ['--aptopt=Apt::Install-Recommends "0"', '--aptopt=Acquire::Check-Valid-Until "false"']
    subprocess.run(["mmdebstrap", *options, RELEASE, str(folder)], check=True)


@contextlib.contextmanager
def mounted(root: Path) -> Iterator[None]:
    """`/proc` and `/dev` inside of the root."""
    places = [(root / "proc", ["-t", "proc", "proc"]), (root / "dev", ["--bind", "/dev"])]
    with contextlib.ExitStack() as undo:
        for place, what in places:
            if not place.is_mount():
                subprocess.run(["mount", *what, str(place)], check=True)
                undo.callback(subprocess.run, ["umount", "--lazy", str(place)], check=True)
        yield


@contextlib.contextmanager
def gateway(root: Path) -> Iterator[str]:
    """The endpoint of a running gateway."""
    monitor, port = free_ports(2)
    home = f"/srv/{uuid.uuid4().hex}"
    inside = root / home.lstrip("/")
    for folder in ("mon", "osd"):
        (inside / folder).mkdir(parents=True)
    names = {"home": home, "fsid": uuid.uuid4(), "daemon": uuid.uuid4(), "monitor": monitor, "gateway": port}
    (inside / "ceph.conf").write_text(CONFIGURATION.format(**names), encoding="utf-8")
    (inside / "start").write_text(START.format(**names, key=KEY, secret=SECRET), encoding="utf-8")
    endpoint = f"http://127.0.0.1:{port}"
    try:
        subprocess.run(["chroot", str(root), "bash", f"{home}/start"], check=True, stdout=subprocess.DEVNULL)
        wait_for(endpoint)
        yield endpoint
    finally:
        for file in inside.glob("*.pid"):  # A polite signal takes the object daemon more than 20 s.
            with contextlib.suppress(ProcessLookupError, ValueError):
                os.kill(int(file.read_text(encoding="ascii")), signal.SIGKILL)


def wait_for(endpoint: str) -> None:
    """Until the gateway answers anything at all."""
    for _ in range(START_S * 10):
        with contextlib.suppress(urllib.error.URLError, ConnectionError):
            urllib.request.urlopen(endpoint, timeout=5).close()
            return
        time.sleep(0.1)
    raise SystemExit(f"the gateway did not answer in {START_S} s")


def main(arguments: list[str]) -> int:
    split = arguments.index("--") if "--" in arguments else len(arguments)
    folder = Path(arguments[0]) if split else Path(tempfile.gettempdir()) / "basin-ceph"
    make_root(folder)
    with mounted(folder), gateway(folder) as endpoint:
        given = {"URL": "s3://reference/tests", "ENDPOINT": endpoint, "KEY": KEY, "SECRET": SECRET}
        environment = os.environ | {f"BASIN_TEST_S3_{name}": value for name, value in given.items()}
        from tests.s3_client import S3Client

        if S3Client(endpoint, key=KEY, secret=SECRET, region="us-east-1").put("/reference", b"") != 200:
            raise SystemExit("the gateway made no bucket")
        command = [sys.executable, "-m", "pytest", *(arguments[split + 1 :] or TESTS)]
        return subprocess.run(command, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
