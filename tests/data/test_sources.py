"""Original files: known to the byte, read within bounds, refused in one line."""

import gzip
import hashlib
import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import small

from mnist_jax.data import sources
from mnist_jax.errors import DataError


def read(folder: Path) -> dict[str, bytes]:
    return sources.read_originals("mnist", {name: folder / name for name in small.NAMES})


def test_the_arrays_in_the_files_are_the_arrays_parsed(originals, truth):
    train, test = sources.parse("mnist", read(originals))
    for got, want in zip((*train, *test), (*truth[0], *truth[1]), strict=True):
        np.testing.assert_array_equal(got, want)
        assert got.dtype == want.dtype


def test_the_table_is_that_of_tfds():
    """Address, size and SHA-256 of every file; tfds looks them up by address."""
    tfds = pytest.importorskip("tensorflow_datasets")
    from tensorflow_datasets.core.download import checksums

    for dataset, source in sources.SOURCES.items():
        table = Path(tfds.__file__).parent / "url_checksums" / f"{dataset}.txt"
        known = checksums.load_url_infos(table)
        for name, file in source.files.items():
            assert file == (known[source.url + name].size, known[source.url + name].checksum)


@pytest.mark.parametrize("what", ["pipe", "device", "folder", "loop", "huge"])
def test_what_is_no_original_at_all_is_refused_at_once(originals, what):
    path = originals / sources.TEST_LABELS
    path.unlink()
    if what == "pipe":
        os.mkfifo(path)
    elif what == "folder":
        path.mkdir()
    elif what == "huge":  # takes no place on the disk
        with path.open("wb") as file:
            file.truncate(10**12)
    else:
        path.symlink_to({"device": "/dev/zero", "loop": path.name}[what])
    with pytest.raises(
        DataError, match=r"cannot read .*the four files of mnist are needed"
    ) as told:
        read(originals)
    assert str(path) in str(told.value)


@pytest.mark.parametrize("name", small.NAMES)
@pytest.mark.parametrize("damage", ["flip", "truncate", "extend", "empty", "remove"])
def test_a_damaged_original_is_refused_by_name(originals, name, damage):
    path = originals / name
    data = path.read_bytes()
    if damage == "remove":
        path.unlink()
    elif damage == "flip":
        path.write_bytes(data[:40] + bytes([data[40] ^ 1]) + data[41:])
    else:
        path.write_bytes({"truncate": data[:-1], "extend": data + b"\0", "empty": b""}[damage])
    with pytest.raises(DataError) as refused:
        read(originals)
    message = str(refused.value)
    assert str(path) in message
    assert "\n" not in message
    if damage != "remove":
        assert hashlib.sha256(path.read_bytes()).hexdigest() in message
        assert f"has {path.stat().st_size} bytes" in message
        assert sources.SOURCES["mnist"].files[name].sha256 in message


def test_the_error_says_whose_file_it_is(originals, tmp_path, monkeypatch):
    other = tmp_path / "fashion"
    small.write(other, train_count=61)
    monkeypatch.setitem(sources.SOURCES, "fashion_mnist", small.source_of(other, train_count=61))
    with pytest.raises(DataError, match=r"that is fashion_mnist's train-images"):
        read(other)


IMAGES = np.zeros((60, 28, 28), np.uint8)
LABELS = np.zeros(60, np.uint8)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (sources.TRAIN_IMAGES, b"not gzip", "damaged"),
        (sources.TRAIN_IMAGES, gzip.compress(small.idx(IMAGES))[:-20], "damaged"),
        (sources.TRAIN_IMAGES, gzip.compress(b""), "starts with"),
        (sources.TRAIN_IMAGES, gzip.compress(small.idx(IMAGES)[:-1]), "47055 of the 47056 bytes"),
        (sources.TRAIN_IMAGES, gzip.compress(small.idx(IMAGES) + b"\0"), "more than the 47056"),
        (sources.TRAIN_IMAGES, gzip.compress(small.idx(IMAGES[:59])), "starts with"),
        (sources.TRAIN_IMAGES, gzip.compress(small.idx(IMAGES[:, :, :27])), "starts with"),
        (sources.TRAIN_IMAGES, gzip.compress(small.idx(LABELS)), "starts with 00000801"),
        (sources.TRAIN_LABELS, gzip.compress(small.idx(IMAGES)), "starts with 00000803"),
        (sources.TRAIN_LABELS, gzip.compress(small.idx(LABELS[:59])), "starts with"),
        (sources.TRAIN_LABELS, gzip.compress(small.idx(LABELS + 10)), "labels run from 10 to 10"),
    ],
    # Bytes in a test's name would differ between processes: gzip writes the time.
    ids=lambda value: "content" if isinstance(value, bytes) else value,
)
def test_a_file_that_is_not_the_idx_file_expected_is_refused(originals, name, content, message):
    contents = {**read(originals), name: content}
    with pytest.raises(DataError, match=message) as refused:
        sources.parse("mnist", contents)
    assert name in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_bit_flip_that_only_the_checksum_of_gzip_sees_is_refused(originals):
    stored = gzip.compress(small.idx(IMAGES), compresslevel=0)
    spoiled = stored[:1000] + bytes([stored[1000] ^ 1]) + stored[1001:]
    with pytest.raises(DataError, match="damaged"):
        sources.parse("mnist", {**read(originals), sources.TRAIN_IMAGES: spoiled})


def test_a_file_that_unpacks_to_far_more_is_not_unpacked(originals):
    bomb = gzip.compress(small.idx(IMAGES) + bytes(100_000_000))
    contents = {**read(originals), sources.TRAIN_IMAGES: bomb}
    tracemalloc.start()
    with pytest.raises(DataError, match="more than"):
        sources.parse("mnist", contents)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2_000_000
