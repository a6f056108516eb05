import pytest

from mnist_jax import atomic_io as storage


def test_written_files_read_back_and_leave_no_temporaries(tmp_path):
    path = tmp_path / "file"
    storage.write_verified(path, b"first")
    storage.write_verified(path, b"second")
    assert storage.read_verified(path, max_bytes=6) == b"second"
    assert {p.name for p in tmp_path.iterdir()} == {"file", "file.sha256"}


def test_the_digest_is_in_the_format_of_sha256sum(tmp_path):
    storage.write_verified(tmp_path / "file", b"abc")
    line = (tmp_path / "file.sha256").read_text()
    assert line == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad  file\n"


@pytest.mark.parametrize("damage", [b"Hello", b"hell", b"hello!", b""])
def test_a_changed_file_is_detected(tmp_path, damage):
    path = tmp_path / "file"
    storage.write_verified(path, b"hello")
    path.write_bytes(damage)
    with pytest.raises(storage.IntegrityError):
        storage.read_verified(path, max_bytes=100)


def test_a_missing_digest_or_an_oversized_file_is_refused(tmp_path):
    path = tmp_path / "file"
    storage.write_verified(path, b"hello")
    with pytest.raises(storage.IntegrityError, match="larger than 4"):
        storage.read_verified(path, max_bytes=4)
    storage.digest_path(path).unlink()
    with pytest.raises(storage.IntegrityError, match="no readable digest"):
        storage.read_verified(path, max_bytes=100)


def test_reading_takes_the_memory_of_what_is_there_not_of_what_may_be(tmp_path):
    (tmp_path / "file").write_bytes(b"hello")
    assert storage.read_bounded(tmp_path / "file", max_bytes=10**30) == b"hello"
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(10**12)
    with pytest.raises(storage.IntegrityError, match="larger than 100"):
        storage.read_bounded(tmp_path / "huge", max_bytes=100)


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    storage.write_atomically(path, b"old")

    def fail(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage.os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        storage.write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
