"""`swift`: OpenStack Swift with its S3 face, on one machine without a superuser; see `s3_servers`.

It obeys the condition that a name is free, but looks and stores in two steps: of several writers at once, several are
told that they won. That is the store which only a probe with concurrent writes unmasks.

Four processes (accounts, containers, objects, and the proxy that speaks S3), one copy of everything, no cache.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from tests.storage.s3_servers import HOST, Commands, S3Server, free_ports, program, running

KEY: Final = "test:tester"
SECRET: Final = "testing"
_STORES: Final = ("account", "container", "object")
_FILTERS: Final = (
    *("catch_errors", "listing_formats", "s3api", "tempauth"),
    *("copy", "slo", "symlink", "versioned_writes"),
)
_RINGS: Final = """
import sys
from swift.common.ring import RingBuilder
folder, host, *placed = sys.argv[1:]
for name, port in zip(placed[::2], placed[1::2]):
    ring = RingBuilder(4, 1, 1)
    ring.add_dev({"region": 1, "zone": 1, "ip": host, "port": int(port), "device": "disk", "weight": 1})
    ring.rebalance()
    ring.get_ring().save(f"{folder}/{name}.ring.gz")
"""


@contextlib.contextmanager
def swift(folder: Path) -> Iterator[S3Server]:
    """Swift, its data below `folder`, which must be on a file system with extended attributes."""

    def commands(port: int) -> Commands:
        home = folder / f"swift-{port}"
        (home / "data/disk").mkdir(parents=True)
        ports = dict(zip(_STORES, free_ports(len(_STORES)), strict=True))
        (home / "swift.conf").write_text("[swift-hash]\nswift_hash_path_suffix = tests\n")
        for store, its_port in ports.items():
            text = _settings(home, its_port) + f"[pipeline:main]\npipeline = {store}-server\n"
            (home / f"{store}.conf").write_text(f"{text}[app:{store}-server]\nuse = egg:swift#{store}\n")
        (home / "proxy.conf").write_text(_settings(home, port) + _proxy())
        placed = [word for store, its_port in ports.items() for word in (store, str(its_port))]
        subprocess.run([sys.executable, "-c", _RINGS, str(home), HOST, *placed], check=True)
        return [([program(f"swift-{kind}-server"), str(home / f"{kind}.conf")], {}) for kind in (*_STORES, "proxy")]

    with running("swift", folder, commands, key=KEY, secret=SECRET) as server:
        yield server


def _settings(home: Path, port: int) -> str:
    """What all four have in common: one process each, as the user who runs the tests."""
    settings = {
        "bind_ip": HOST,
        "bind_port": port,
        "workers": 0,
        "user": pwd.getpwuid(os.geteuid()).pw_name,
        "swift_dir": home,
        "devices": home / "data",
        "mount_check": "false",
        "fallocate_reserve": 0,
        "disable_fallocate": "true",
        "log_level": "ERROR",
    }
    return "[DEFAULT]\n" + "".join(f"{name} = {value}\n" for name, value in settings.items())


def _proxy() -> str:
    lines = ["[pipeline:main]", f"pipeline = {' '.join(_FILTERS)} proxy-server"]
    lines += ["[app:proxy-server]", "use = egg:swift#proxy", "account_autocreate = true"]
    for name in _FILTERS:
        lines += [f"[filter:{name}]", f"use = egg:swift#{name}"]
        lines += [f"user_{KEY.replace(':', '_')} = {SECRET} .admin"] if name == "tempauth" else []
    return "\n".join(lines) + "\n"
