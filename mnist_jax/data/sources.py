"""The original files: where they are, how to know them, and how to read them.

URLs, sizes and SHA-256 are those of tensorflow-datasets. They stand here as well because files
given with --manual_dir are checked even where tensorflow-datasets is not installed.
"""

import gzip
import hashlib
import math
import struct
import zlib
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mnist_jax import atomic_io as storage
from mnist_jax.data.split import Split, check_split
from mnist_jax.errors import DataError

TRAIN_IMAGES = "train-images-idx3-ubyte.gz"
TRAIN_LABELS = "train-labels-idx1-ubyte.gz"
TEST_IMAGES = "t10k-images-idx3-ubyte.gz"
TEST_LABELS = "t10k-labels-idx1-ubyte.gz"
MAX_BYTES = 50_000_000  # of a file that is read; the largest original has 26,421,880


class File(NamedTuple):
    """What an original file must be."""

    size: int  # bytes, compressed
    sha256: str


class Source(NamedTuple):
    """A data set of four gzipped IDX files, under the name and version tfds gives it."""

    url: str  # ends in "/"; a file's name follows
    files: Mapping[str, File]
    class_names: tuple[str, ...]
    version: str = "3.0.1"
    train_count: int = 60_000
    test_count: int = 10_000


def _files(*four: tuple[int, str]) -> dict[str, File]:
    names = (TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES, TEST_LABELS)
    return {name: File(*file) for name, file in zip(names, four, strict=True)}


SOURCES: dict[str, Source] = {
    "mnist": Source(
        url="https://storage.googleapis.com/cvdf-datasets/mnist/",
        files=_files(
            (9912422, "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609"),
            (28881, "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c"),
            (1648877, "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6"),
            (4542, "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6"),
        ),
        class_names=tuple("0123456789"),
    ),
    "fashion_mnist": Source(
        url="http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        files=_files(
            (26421880, "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84"),
            (29515, "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845"),
            (4422102, "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073"),
            (5148, "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5"),
        ),
        class_names=(
            *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
            *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
        ),
    ),
    "kmnist": Source(
        url="http://codh.rois.ac.jp/kmnist/dataset/kmnist/",
        files=_files(
            (18165135, "51467d22d8cc72929e2a028a0428f2086b092bb31cfb79c69cc0a90ce135fde4"),
            (29497, "e38f9ebcd0f3ebcdec7fc8eabdcdaef93bb0df8ea12bee65224341c8183d8e17"),
            (3041136, "edd7a857845ad6bb1d0ba43fe7e794d164fe2dce499a1694695a792adfac43c5"),
            (5120, "20bb9a0ef54c7db3efc55a92eef5582c109615df22683c380526788f98e42a1c"),
        ),
        class_names=("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"),
    ),
}


def read_originals(name: str, paths: Mapping[str, Path]) -> dict[str, bytes]:
    """Reads the four files of `name` and checks that each is, byte for byte, the original.

    Args:
        name: a key of `SOURCES`.
        paths: where each file lies, by its original name.

    Returns:
        The compressed bytes, by the same names.

    Raises:
        DataError: a file is missing, unreadable or another one; says which file it should be.
    """
    contents = {}
    for filename, expected in SOURCES[name].files.items():
        path = paths[filename]
        try:
            data = storage.read_bounded(path, max_bytes=MAX_BYTES)
        except (OSError, ValueError) as error:
            raise DataError(
                f"cannot read {path}: {getattr(error, 'strerror', error)}; the four files of "
                f"{name} are needed: {', '.join(SOURCES[name].files)}"
            ) from error
        actual = hashlib.sha256(data).hexdigest()
        if actual != expected.sha256:
            raise DataError(
                f"{path} is not {name}'s {filename}: it has {len(data)} bytes and SHA-256 "
                f"{actual}{_whose(actual)}; expected {expected.size} bytes and "
                f"{expected.sha256}; get it again from {SOURCES[name].url}{filename}"
            )
        contents[filename] = data
    return contents


def _whose(sha256: str) -> str:
    """Whether it is a file of another data set: they all use the same four names."""
    for name, source in SOURCES.items():
        for filename, file in source.files.items():
            if file.sha256 == sha256:
                return f" (that is {name}'s {filename})"
    return ""


def parse(name: str, contents: Mapping[str, bytes]) -> tuple[Split, Split]:
    """Decodes the four files of `name` into train and test, in the files' order.

    Raises:
        DataError: a file is not gzip, or not the IDX file of the shape that `name` has.
    """
    source = SOURCES[name]

    def split(images: str, labels: str, count: int) -> Split:
        image = _read_idx(images, contents[images], (count, 28, 28))[..., np.newaxis]
        label = _read_idx(labels, contents[labels], (count,)).astype(np.int32)
        return check_split(Split(image, label), count, f"{name}'s {labels}")

    return (
        split(TRAIN_IMAGES, TRAIN_LABELS, source.train_count),
        split(TEST_IMAGES, TEST_LABELS, source.test_count),
    )


def _read_idx(filename: str, data: bytes, shape: tuple[int, ...]) -> np.ndarray:
    """Decodes a gzipped IDX file of unsigned bytes, which must have `shape`.

    An IDX file is a magic number (0x08 for bytes, then the number of dimensions), each dimension,
    and the values, row-major; the integers are 32-bit big-endian.
    """
    header = struct.pack(f">{1 + len(shape)}I", 0x0800 | len(shape), *shape)
    expected = len(header) + math.prod(shape)
    try:
        with gzip.GzipFile(fileobj=BytesIO(data)) as file:
            raw = file.read(expected + 1)  # the cap: a small file can unpack to gigabytes
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{filename} is damaged: {error}; get it again") from error
    if raw[: len(header)] != header:
        raise DataError(
            f"{filename} starts with {raw[: len(header)].hex()}, expected {header.hex()}: "
            f"an IDX file of bytes with shape {list(shape)}"
        )
    if len(raw) != expected:
        found = "more than" if len(raw) > expected else f"{len(raw)} of"
        raise DataError(f"{filename} unpacks to {found} the {expected} bytes of {list(shape)}")
    return np.frombuffer(raw, np.uint8, offset=len(header)).reshape(shape)
