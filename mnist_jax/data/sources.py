"""The original files of each data set: URL, SHA-256 and format."""

import contextlib
import gzip
import hashlib
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mnist_jax import atomic_io
from mnist_jax.data.dataset import Split
from mnist_jax.errors import DataError

TRAIN_IMAGES = "train-images-idx3-ubyte.gz"
TRAIN_LABELS = "train-labels-idx1-ubyte.gz"
TEST_IMAGES = "t10k-images-idx3-ubyte.gz"
TEST_LABELS = "t10k-labels-idx1-ubyte.gz"
TIMEOUT_S = 10.0  # to connect, and for each wait for more bytes


class UnreachableError(DataError):
    """A file cannot be downloaded: no network, an error status, a broken connection."""

    def __init__(self, url: str, reason: str):
        super().__init__(url, reason)  # both, to be pickled
        self.reason = reason

    def __str__(self) -> str:
        advice = "download the four files and pass --manual_dir=DIR, or use --dataset=digits"
        return f"cannot download {self.args[0]}: {self.reason}; {advice}"


class Source(NamedTuple):
    """A data set of four gzipped IDX files, under the name and version that tfds uses."""

    url: str  # ends in "/"; a file's name follows
    files: Mapping[str, str]  # name → SHA-256
    class_names: tuple[str, ...]
    version: str = "3.0.1"

    @property
    def key(self) -> str:
        """Identifies the content: the SHA-256 of the files' SHA-256."""
        return hashlib.sha256("".join(self.files.values()).encode()).hexdigest()


# URLs and SHA-256 are those of tensorflow-datasets.
SOURCES: dict[str, Source] = {
    "mnist": Source(
        url="https://storage.googleapis.com/cvdf-datasets/mnist/",
        files={
            TRAIN_IMAGES: "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
            TRAIN_LABELS: "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
            TEST_IMAGES: "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
            TEST_LABELS: "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
        },
        class_names=tuple("0123456789"),
    ),
    "fashion_mnist": Source(
        url="http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        files={
            TRAIN_IMAGES: "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
            TRAIN_LABELS: "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
            TEST_IMAGES: "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
            TEST_LABELS: "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
        },
        class_names=(
            *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
            *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
        ),
    ),
    "kmnist": Source(
        url="http://codh.rois.ac.jp/kmnist/dataset/kmnist/",
        files={
            TRAIN_IMAGES: "51467d22d8cc72929e2a028a0428f2086b092bb31cfb79c69cc0a90ce135fde4",
            TRAIN_LABELS: "e38f9ebcd0f3ebcdec7fc8eabdcdaef93bb0df8ea12bee65224341c8183d8e17",
            TEST_IMAGES: "edd7a857845ad6bb1d0ba43fe7e794d164fe2dce499a1694695a792adfac43c5",
            TEST_LABELS: "20bb9a0ef54c7db3efc55a92eef5582c109615df22683c380526788f98e42a1c",
        },
        class_names=("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"),
    ),
}


def read_originals(name: str, folder: Path) -> dict[str, bytes]:
    """Reads the four files of `name`, compressed, and checks each against its SHA-256.

    Raises DataError if a file is missing, unreadable or not the original.
    """
    return {filename: _read_original(name, filename, folder) for filename in SOURCES[name].files}


def _read_original(name: str, filename: str, folder: Path) -> bytes:
    source, path = SOURCES[name], folder / filename
    try:
        data = path.read_bytes()
    except OSError as error:
        needed = ", ".join(source.files)
        raise DataError(f"cannot read {path}: {error.strerror}; {name} needs {needed}") from error
    actual, expected = hashlib.sha256(data).hexdigest(), source.files[filename]
    if actual != expected:
        problem = f"{path} is not {name}'s: its SHA-256 is {actual}, not {expected}"
        raise DataError(f"{problem}; get it again from {source.url}{filename}")
    return data


def download(name: str, folder: Path) -> None:
    """Downloads those of the four files that are not in `folder` yet.

    Raises UnreachableError if a file cannot be downloaded.
    """
    import requests

    folder.mkdir(parents=True, exist_ok=True)
    for filename in SOURCES[name].files:
        with contextlib.suppress(DataError):
            _read_original(name, filename, folder)
            continue
        url = SOURCES[name].url + filename
        # The SHA-256 is that of the stored bytes, so the server must not compress them again.
        headers = {"Accept-Encoding": "identity"}
        try:
            response = requests.get(url, headers=headers, timeout=TIMEOUT_S)
            response.raise_for_status()
        except OSError as error:  # of requests; also one of a wrong REQUESTS_CA_BUNDLE
            reason = str(getattr(error.args[0], "reason", error))  # of an error of urllib3
            # Without the connection, which urllib3 names first, and its three tracebacks.
            raise UnreachableError(url, reason.rpartition("): ")[2]) from None
        atomic_io.write_atomically(folder / filename, response.content)


def parse(contents: Mapping[str, bytes]) -> tuple[Split, Split]:
    """Decodes the four files, from `read_originals`, into train and test, in the files' order."""

    def split(images: str, labels: str) -> Split:
        image, label = read_idx(images, contents[images]), read_idx(labels, contents[labels])
        return Split(image[..., np.newaxis], label.astype(np.int32))

    return split(TRAIN_IMAGES, TRAIN_LABELS), split(TEST_IMAGES, TEST_LABELS)


def read_idx(filename: str, data: bytes) -> np.ndarray:
    """Decodes an IDX file of unsigned bytes, gzipped if its name ends in .gz.

    It holds a magic number (0x08 for bytes, then the number of dimensions), each dimension, and the
    values, row-major; the integers are 32-bit big-endian.

    Raises DataError if the file has another format, or ends early.
    """
    try:
        raw = gzip.decompress(data) if filename.endswith(".gz") else data
        dimensions = struct.unpack_from(">I", raw)[0] - 0x0800
        shape = struct.unpack_from(f">{dimensions}I", raw, 4)
        return np.frombuffer(raw, np.uint8, offset=4 + 4 * dimensions).reshape(shape)
    except (OSError, EOFError, ValueError, struct.error, zlib.error) as error:
        raise DataError(f"{filename} is not an IDX file ({error})") from error
