"""Secrets: passphrases, secret files, the environment; and that none of them shows."""

from __future__ import annotations

import copy
import errno
import os
import pickle
import traceback
from pathlib import Path

import pytest

from basin.engine.secret import Secret
from basin.errors import AlreadyExists, InvalidArgument, OutOfSpace, SecretRequired, StorageError

PASSPHRASE = "correct horse battery staple"


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BASIN_PASSPHRASE", raising=False)
    monkeypatch.delenv("BASIN_SECRET_FILE", raising=False)


def secret_file(path: Path, data: bytes, mode: int = 0o600) -> Path:
    path.write_bytes(data)
    path.chmod(mode)
    return path


# --- passphrases ----------------------------------------------------------------------------------------------------


def test_a_passphrase_is_utf_8_in_composed_form() -> None:
    assert Secret.from_passphrase("é").material() == Secret.from_passphrase("e\u0301").material() == b"\xc3\xa9"
    assert Secret.from_passphrase(b"e\xcc\x81").material() == b"e\xcc\x81"


@pytest.mark.parametrize("passphrase", ["", b"", "\ud800secret", 5, None])
def test_what_is_no_passphrase_is_refused(passphrase: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        Secret.from_passphrase(passphrase)
    assert "secret" not in str(caught.value)
    assert caught.value.__context__ is None or caught.value.__suppress_context__


def test_generated_secrets_are_32_bytes_and_never_the_same() -> None:
    secrets = {Secret.generate().material() for _ in range(50)}
    assert len(secrets) == 50
    assert {len(secret) for secret in secrets} == {32}


# --- files ----------------------------------------------------------------------------------------------------------


def test_a_secret_comes_back_from_its_file(tmp_path: Path) -> None:
    secret = Secret.generate()
    path = tmp_path / "secret"
    assert secret.source == "memory"
    secret.to_file(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.read_bytes() == secret.material().hex().encode() + b"\n"
    read = Secret.from_file(path)
    assert read.material() == secret.material()
    assert read.kind == secret.kind == "key-file"
    assert read.source == secret.source == f"file:{path}"


def test_the_mask_of_the_process_cannot_widen_a_secret_file(tmp_path: Path) -> None:
    mask = os.umask(0)
    try:
        Secret.generate().to_file(tmp_path / "secret")
    finally:
        os.umask(mask)
    assert (tmp_path / "secret").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    "data", [bytes(range(32)), bytes(range(32)).hex().encode(), bytes(range(32)).hex().upper().encode() + b"\r\n"]
)
def test_a_secret_file_is_raw_or_hex(tmp_path: Path, data: bytes) -> None:
    assert Secret.from_file(secret_file(tmp_path / "secret", data)).material() == bytes(range(32))


@pytest.mark.parametrize(
    "data",
    [b"", bytes(31), bytes(33), b"0" * 63, b"0" * 65, b"0" * 64 + b"\n\n", b"0" * 64 + b" ", b"g" * 64, bytes(100_000)],
    ids=lambda data: f"{len(data)}-{data[-1:]!r}",
)
def test_any_other_file_is_no_secret_file(tmp_path: Path, data: bytes) -> None:
    path = secret_file(tmp_path / "secret", data)
    with pytest.raises(InvalidArgument) as caught:
        Secret.from_file(path)
    assert caught.value.path == str(path)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o601, 0o620])
def test_a_secret_file_that_others_can_reach_is_refused(tmp_path: Path, mode: int) -> None:
    path = secret_file(tmp_path / "secret", bytes(32), mode)
    with pytest.raises(InvalidArgument, match="chmod 600"):
        Secret.from_file(path)


def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe", 0o600)
    for name in ("pipe", "absent", "nul\0byte", "."):
        with pytest.raises(InvalidArgument):
            Secret.from_file(tmp_path / name)


def test_a_secret_file_is_never_replaced(tmp_path: Path) -> None:
    path = secret_file(tmp_path / "secret", b"precious")
    with pytest.raises(AlreadyExists) as caught:
        Secret.generate().to_file(path)
    assert caught.value.object == str(path)
    assert path.read_bytes() == b"precious"


def test_a_passphrase_is_not_written_to_a_file(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument):
        Secret.from_passphrase(PASSPHRASE).to_file(tmp_path / "secret")
    assert not list(tmp_path.iterdir())


def test_a_secret_file_that_cannot_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    secret = Secret.generate()
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutOfSpace):
        secret.to_file(tmp_path / "secret")
    assert not list(tmp_path.iterdir())
    assert secret.source == "memory"
    with pytest.raises(StorageError):
        secret.to_file(tmp_path / "no folder" / "secret")


def test_a_secret_file_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(descriptor: int, size: int) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    path = secret_file(tmp_path / "secret", bytes(32))
    monkeypatch.setattr(os, "read", broken)
    with pytest.raises(InvalidArgument, match="Input/output error") as caught:
        Secret.from_file(path)
    assert caught.value.path == str(path)


# --- the environment, and finding a secret again --------------------------------------------------------------------


def test_the_environment_gives_a_passphrase_before_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = secret_file(tmp_path / "secret", bytes(range(32)))
    with pytest.raises(SecretRequired, match="BASIN_PASSPHRASE"):
        Secret.from_env()
    monkeypatch.setenv("BASIN_PASSPHRASE", "")
    monkeypatch.setenv("BASIN_SECRET_FILE", "")
    with pytest.raises(SecretRequired):
        Secret.from_env()
    monkeypatch.setenv("BASIN_SECRET_FILE", str(path))
    assert Secret.from_env().material() == bytes(range(32))
    monkeypatch.setenv("BASIN_PASSPHRASE", PASSPHRASE)
    secret = Secret.from_env()
    assert (secret.kind, secret.material(), secret.source) == ("passphrase", PASSPHRASE.encode(), "environment")


def test_another_process_finds_a_secret_by_its_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = Secret.generate()
    with pytest.raises(InvalidArgument, match="one process only"):
        Secret.from_source(secret.source)
    monkeypatch.chdir(tmp_path)
    secret.to_file("secret")
    monkeypatch.chdir("/")
    assert Secret.from_source(secret.source).material() == secret.material()
    monkeypatch.setenv("BASIN_PASSPHRASE", PASSPHRASE)
    assert Secret.from_source(Secret.from_env().source).material() == PASSPHRASE.encode()


# --- nothing shows --------------------------------------------------------------------------------------------------


def test_a_secret_does_not_show(tmp_path: Path) -> None:
    passphrase, raw = Secret.from_passphrase(PASSPHRASE), Secret.generate()
    raw.to_file(tmp_path / "secret")
    shown = "".join((repr(passphrase), str(passphrase), f"{raw}", f"{raw!r}", repr([raw, passphrase])))
    assert PASSPHRASE not in shown
    assert raw.material().hex() not in shown
    assert repr(raw.material())[2:20] not in shown


@pytest.mark.parametrize("secret", [Secret.from_passphrase(PASSPHRASE), Secret.generate()], ids=["passphrase", "file"])
def test_a_secret_is_not_pickled_and_the_error_says_what_to_do(secret: Secret) -> None:
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        with pytest.raises(TypeError, match="ticket"):
            pickle.dumps(secret, protocol)
    with pytest.raises(TypeError):
        copy.copy(secret)


def test_errors_about_a_secret_file_do_not_show_what_it_holds(tmp_path: Path) -> None:
    path = secret_file(tmp_path / "secret", b"0123456789abcdef" * 4 + b"-almost")
    with pytest.raises(InvalidArgument) as caught:
        Secret.from_file(path)
    assert "0123456789" not in "".join(traceback.format_exception(caught.value))
