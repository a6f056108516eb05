"""Original files are recognised by their SHA-256, decoded, refused in one line."""

import gzip
import hashlib
from pathlib import Path

import numpy as np
import pytest
import small

from mnist_jax.data import sources
from mnist_jax.errors import DataError


def test_urls_and_digests_are_those_of_tfds():
    tfds = pytest.importorskip("tensorflow_datasets")
    for dataset, source in sources.SOURCES.items():
        table = Path(tfds.__file__).parent / "url_checksums" / f"{dataset}.txt"
        rows = [line.split("\t") for line in table.read_text().splitlines()]
        known = {url: sha256 for url, _, sha256, *_ in rows}
        for name, sha256 in source.files.items():
            assert known[source.url + name] == sha256


@pytest.mark.parametrize("name", small.NAMES)
def test_a_damaged_original_is_refused_by_name(originals, name):
    path, source = originals / name, sources.SOURCES["mnist"]
    data = path.read_bytes()
    flipped = data[:40] + bytes([data[40] ^ 1]) + data[41:]
    for damaged in (flipped, data[:-1], data + b"\0", b""):
        path.write_bytes(damaged)
        with pytest.raises(DataError) as refused:
            sources.read_originals("mnist", originals)
        found, again = hashlib.sha256(damaged).hexdigest(), f"get it again from {source.url}{name}"
        for part in (str(path), found, source.files[name], again):
            assert part in str(refused.value)
        assert "\n" not in str(refused.value)


IMAGES = small.idx(np.zeros((60, 28, 28), np.uint8))
STORED = bytearray(gzip.compress(IMAGES, compresslevel=0))
STORED[1000] ^= 1  # only the checksum of gzip shows it
REFUSED = [b"not gzip", gzip.compress(IMAGES)[:-20], bytes(STORED)]
REFUSED += [gzip.compress(data) for data in (b"", IMAGES[:-1], IMAGES + b"\0")]


@pytest.mark.parametrize("content", REFUSED, ids=range(6))
def test_a_file_that_is_not_the_idx_file_expected_is_refused(originals, content):
    contents = {**sources.read_originals("mnist", originals), sources.TRAIN_IMAGES: content}
    with pytest.raises(DataError, match=f"^{sources.TRAIN_IMAGES} is not an IDX file.*$"):
        sources.parse(contents)
