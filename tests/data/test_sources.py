"""Original files are recognised by their SHA-256, read within bounds, refused in one line."""

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


def test_the_arrays_in_the_files_are_the_arrays_parsed(originals, truth):
    train, test = sources.parse("mnist", sources.read_originals("mnist", originals))
    for got, want in zip((*train, *test), (*truth[0], *truth[1]), strict=True):
        np.testing.assert_array_equal(got, want)
        assert got.dtype == want.dtype


def test_urls_and_digests_are_those_of_tfds():
    tfds = pytest.importorskip("tensorflow_datasets")
    for dataset, source in sources.SOURCES.items():
        table = Path(tfds.__file__).parent / "url_checksums" / f"{dataset}.txt"
        rows = [line.split("\t") for line in table.read_text().splitlines()]
        known = {url: sha256 for url, _, sha256, *_ in rows}
        for name, sha256 in source.files.items():
            assert known[source.url + name] == sha256


@pytest.mark.parametrize("name", small.NAMES)
@pytest.mark.parametrize("damage", ["flip", "truncate", "extend", "empty"])
def test_a_damaged_original_is_refused_by_name(originals, name, damage):
    path = originals / name
    data = path.read_bytes()
    flipped = data[:40] + bytes([data[40] ^ 1]) + data[41:]
    changed = {"flip": flipped, "truncate": data[:-1], "extend": data + b"\0", "empty": b""}
    path.write_bytes(changed[damage])
    with pytest.raises(DataError) as refused:
        sources.read_originals("mnist", originals)
    source, found = sources.SOURCES["mnist"], hashlib.sha256(changed[damage]).hexdigest()
    for part in (str(path), found, source.files[name], f"get it again from {source.url}{name}"):
        assert part in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("what", ["nothing", "pipe", "device", "folder", "loop", "huge"])
def test_what_is_not_a_file_of_that_size_is_refused_at_once(originals, what):
    path = originals / sources.TEST_LABELS
    path.unlink()
    if what == "pipe":
        os.mkfifo(path)
    elif what == "folder":
        path.mkdir()
    elif what == "huge":  # takes no space on the disk
        with path.open("wb") as file:
            file.truncate(10**12)
    elif what != "nothing":
        path.symlink_to({"device": "/dev/zero", "loop": path.name}[what])
    with pytest.raises(DataError, match=r"cannot read .*; mnist needs train-images") as refused:
        sources.read_originals("mnist", originals)
    assert str(path) in str(refused.value)


IMAGES = small.idx(np.zeros((60, 28, 28), np.uint8))
LABELS = small.idx(np.zeros(60, np.uint8))
STORED = bytearray(gzip.compress(IMAGES, compresslevel=0))
STORED[1000] ^= 1  # only the checksum of gzip shows it


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (sources.TRAIN_IMAGES, b"not gzip", "damaged"),
        (sources.TRAIN_IMAGES, gzip.compress(IMAGES)[:-20], "damaged"),
        (sources.TRAIN_IMAGES, bytes(STORED), "damaged"),
        (sources.TRAIN_IMAGES, gzip.compress(b""), "at least 0 bytes"),
        (sources.TRAIN_IMAGES, gzip.compress(IMAGES[:-1]), "at least 47055 bytes"),
        (sources.TRAIN_IMAGES, gzip.compress(IMAGES + b"\0"), "at least 47057 bytes"),
        (sources.TRAIN_IMAGES, gzip.compress(LABELS), "starts with 00000801"),
        (sources.TRAIN_LABELS, gzip.compress(IMAGES), "starts with 00000803"),
        (sources.TRAIN_LABELS, gzip.compress(LABELS[:8] + b"\x0a" * 60), "labels 10 to 10"),
    ],
    ids=range(9),
)
def test_a_file_that_is_not_the_idx_file_expected_is_refused(originals, name, content, message):
    contents = {**sources.read_originals("mnist", originals), name: content}
    with pytest.raises(DataError, match=message) as refused:
        sources.parse("mnist", contents)
    assert name in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_file_that_unpacks_to_far_more_is_not_unpacked(originals):
    contents = sources.read_originals("mnist", originals)
    contents[sources.TRAIN_IMAGES] = gzip.compress(IMAGES + bytes(100_000_000))
    tracemalloc.start()
    with pytest.raises(DataError, match="at least 47057 bytes"):
        sources.parse("mnist", contents)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2_000_000
