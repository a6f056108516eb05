import pytest

from mnist_jax import atomic_io
from mnist_jax.atomic_io import IntegrityError


def test_a_written_file_reads_back_and_leaves_no_temporaries(tmp_path):
    path = tmp_path / "file"
    atomic_io.write_verified(path, b"first")
    atomic_io.write_verified(path, b"second")
    assert atomic_io.read_verified(path) == b"second"
    assert {p.name for p in tmp_path.iterdir()} == {"file", "file.sha256"}


def test_the_digest_is_in_the_format_of_sha256sum(tmp_path):
    atomic_io.write_verified(tmp_path / "file", b"abc")
    line = (tmp_path / "file.sha256").read_text()
    assert line == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad  file\n"


@pytest.mark.parametrize("damage", [b"Hello", b"hell", b"hello!", b""])
def test_a_changed_file_is_detected(tmp_path, damage):
    path = tmp_path / "file"
    atomic_io.write_verified(path, b"hello")
    path.write_bytes(damage)
    with pytest.raises(IntegrityError, match="differs from its SHA-256"):
        atomic_io.read_verified(path)


def test_a_missing_digest_or_an_oversized_file_is_refused(tmp_path):
    path = tmp_path / "file"
    atomic_io.write_verified(path, b"hello")
    with pytest.raises(IntegrityError, match="at most 4 bytes"):
        atomic_io.read_bounded(path, max_bytes=4)
    atomic_io.digest_path(path).unlink()
    with pytest.raises(IntegrityError, match="no readable digest"):
        atomic_io.read_verified(path)


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    atomic_io.write_atomically(path, b"old")

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        atomic_io.write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
