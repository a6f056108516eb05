import errno
import os
import stat
from unittest import mock

import pytest

from mnist_jax import atomic_io


def test_a_written_file_has_a_digest_in_the_format_of_sha256sum_and_no_temporaries(tmp_path):
    path = tmp_path / "file"
    for data in (b"first", b"abc"):
        atomic_io.write_verified(path, data)
        assert atomic_io.read_verified(path) == data
    line = (tmp_path / "file.sha256").read_text()
    assert line == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad  file\n"
    assert {p.name for p in tmp_path.iterdir()} == {"file", "file.sha256"}


def test_a_file_has_the_mode_of_any_new_file(tmp_path):
    before = os.umask(0o077)
    try:
        atomic_io.write_atomically(tmp_path / "file", b"abc")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o600


def test_a_device_is_not_replaced_by_a_file(tmp_path):
    os.mkfifo(path := tmp_path / "device")
    with pytest.raises(OSError, match="no regular file"):
        atomic_io.write_atomically(path, b"abc")
    assert path.is_fifo()


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    atomic_io.write_atomically(path, b"old")
    monkeypatch.setattr("os.fsync", mock.Mock(side_effect=OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        atomic_io.write_atomically(path, b"new")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("file", b"old")]


def test_a_file_system_may_lack_the_sync_of_folders(tmp_path, monkeypatch):
    def sync(number):
        if stat.S_ISDIR(os.fstat(number).st_mode):
            raise OSError(errno.ENOTSUP, "not supported")

    monkeypatch.setattr("os.fsync", sync)
    atomic_io.write_verified(tmp_path / "file", b"abc")
