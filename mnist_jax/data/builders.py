"""Preparing and reading data sets with tensorflow-datasets (tfds), without TensorFlow.

tfds's own MNIST builder decodes and encodes through TensorFlow. The one here parses the original
files with NumPy and hands tfds PNG images; what it leaves behind, `<data_dir>/mnist/3.0.1`, is an
ordinary prepared data set that stock tfds reads. tfds takes most of a second to import, so that
happens inside the functions.
"""

import contextlib
import os
import queue
import shutil
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mnist_jax import atomic_io as storage
from mnist_jax.data.sources import SOURCES, TEST_LABELS, parse, read_originals
from mnist_jax.data.split import Split, check_split
from mnist_jax.errors import DataError

REACH_TIMEOUT_S = 8.0
STALL_TIMEOUT_S = 10.0


def prepared_folder(name: str, data_dir: Path) -> Path:
    """Where tfds keeps the prepared data set."""
    return data_dir / name / SOURCES[name].version


def prepared_info(folder: Path) -> dict[str, Any]:
    """What tfds noted about a prepared folder; empty where it is none."""
    try:
        return storage.read_json(folder / "dataset_info.json")
    except (OSError, storage.IntegrityError):
        return {}


def read(name: str, data_dir: Path) -> tuple[Split, Split]:
    """Reads a folder prepared as array_record, by this builder or another.

    Returns:
        train and test, in the order of the original files.

    Raises:
        DataError: the folder is damaged or incomplete.
        ImportError: tfds is not installed.
    """
    folder, source = prepared_folder(name, data_dir), SOURCES[name]
    in_order = prepared_info(folder).get("disableShuffling", False)
    for path in folder.iterdir():
        if not (path.is_file() or path.is_dir()):  # opening a pipe would wait for a writer
            raise DataError(f"{folder} is damaged: {path.name} is not a file")
    with _quiet_tfds() as tfds:
        try:
            builder = _builder(name, data_dir)
            splits = []
            for split in ("train", "test"):
                examples = builder.as_data_source(split)
                # All at once: one by one, array_record seeks for each, eight times as slow.
                examples = examples.__getitems__(list(range(len(examples))))
                image = np.stack([example["image"] for example in examples])
                label = np.array([example["label"] for example in examples], np.int32)
                if not in_order:
                    # Stored in the order of a hash of each example's key, which is its index.
                    hash_key = tfds.core.hashing.Hasher(split).hash_key
                    original = np.argsort(sorted(range(len(label)), key=hash_key))
                    image, label = image[original], label[original]
                splits.append(Split(image, label))
        except ImportError:
            raise
        except Exception as error:  # array_record, Pillow and protobuf each raise their own
            raise DataError(f"{folder} is damaged: {_one_line(error)}") from error
    train, test = splits
    return (
        check_split(train, source.train_count, str(folder)),
        check_split(test, source.test_count, str(folder)),
    )


def prepare(name: str, data_dir: Path, manual_dir: Path | None) -> tuple[Split, Split]:
    """Prepares `<data_dir>/<name>/<version>` from `manual_dir`, or from the network.

    All work happens in a folder of our own that is moved into place at the end, so a process
    killed at any moment leaves nothing that could be taken for data, and the next one cleans up.
    An existing prepared folder is never touched. The caller holds the lock of `cache.writing`.

    Raises:
        DataError: the files cannot be had, or are not the originals.
        ImportError: tfds is not installed.
        OSError: `data_dir` cannot be written.
    """
    staging = data_dir / f".preparing-{name}"
    shutil.rmtree(staging, ignore_errors=True)
    try:
        with _quiet_tfds() as tfds:
            if manual_dir is None:
                _check_reachable(name)
            builder = _builder(name, staging)
            config = tfds.download.DownloadConfig(manual_dir=manual_dir, try_download_gcs=False)
            builder.download_and_prepare(download_config=config, file_format="array_record")
        folder = prepared_folder(name, data_dir)
        if not storage.exists(folder):
            folder.parent.mkdir(exist_ok=True)
            Path(builder.data_dir).rename(folder)
        return builder.splits_in_order
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _builder(name: str, data_dir: Path) -> Any:
    """The tfds builder of `name`. Not registered: tfds has one of that name already."""
    import tensorflow_datasets as tfds
    from PIL import Image
    from tensorflow_datasets.core.download.checksums import UrlInfo
    from tensorflow_datasets.core.utils import Size

    source = SOURCES[name]
    dataset_name = name

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name = dataset_name
        VERSION = tfds.core.Version(source.version)
        # What tfds checks downloads against, and how it finds a file in manual_dir.
        url_infos = {  # noqa: RUF012
            source.url + filename: UrlInfo(Size(file.size), file.sha256, filename)
            for filename, file in source.files.items()
        }
        splits_in_order: tuple[Split, Split]

        def _info(self) -> Any:
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(
                    {
                        "image": tfds.features.Image(shape=(28, 28, 1)),
                        "label": tfds.features.ClassLabel(names=source.class_names),
                    }
                ),
                supervised_keys=("image", "label"),
                disable_shuffling=True,  # the order of the original files
            )

        def _split_generators(self, dl_manager: Any) -> Mapping[str, Any]:
            try:
                paths = dl_manager.download({f: source.url + f for f in source.files})
            except Exception as error:  # tfds, requests and urllib3 each raise their own
                raise DataError(
                    f"cannot download {name}: {_one_line(error)}; {_remedy(dataset_name)}"
                ) from error
            originals = read_originals(dataset_name, paths)
            train, test = self.splits_in_order = parse(dataset_name, originals)
            return {"train": self._generate_examples(train), "test": self._generate_examples(test)}

        def _generate_examples(self, split: Split) -> Iterator[tuple[int, dict[str, Any]]]:
            for i, (image, label) in enumerate(zip(*split, strict=True)):
                # An array would be encoded by TensorFlow; a Pillow image is not.
                yield i, {"image": Image.fromarray(image[..., 0]), "label": int(label)}

    return Builder(data_dir=data_dir)


def _remedy(name: str) -> str:
    source = SOURCES[name]
    return (
        f"download {', '.join(source.files)} from {source.url} by hand and pass --manual_dir=DIR, "
        "or choose --dataset=digits"
    )


def _check_reachable(name: str) -> None:
    """Asks the server for the smallest file, in bounded time.

    tfds retries for minutes, and a name server that does not answer blocks without any limit.
    So the question is put in a thread that is left behind when it takes too long.

    Raises:
        DataError: no good answer within `REACH_TIMEOUT_S`.
    """
    import requests

    url = SOURCES[name].url + TEST_LABELS
    answer: queue.Queue[str] = queue.Queue()

    def ask() -> None:
        try:
            with requests.get(url, stream=True, timeout=REACH_TIMEOUT_S) as response:
                answer.put("" if response.ok else f"HTTP status {response.status_code}")
        except Exception as error:  # whatever it is, it belongs to the asker
            answer.put(_one_line(error))

    threading.Thread(target=ask, daemon=True).start()
    try:
        problem = answer.get(timeout=REACH_TIMEOUT_S)
    except queue.Empty:
        problem = f"no answer in {REACH_TIMEOUT_S:.0f} s"
    if problem:
        raise DataError(f"cannot download {url}: {problem}; {_remedy(name)}")


@contextlib.contextmanager
def _quiet_tfds() -> Iterator[Any]:
    """Imports tfds; while it works, it prints nothing, and gives a dead connection up."""
    import requests
    import tensorflow_datasets as tfds
    from absl import logging
    from tensorflow_datasets.core.download import downloader
    from tensorflow_datasets.core.utils import py_utils, tqdm_utils

    send = requests.Session.send

    def send_in_bounded_time(self: Any, request: Any, **kwargs: Any) -> Any:
        kwargs["timeout"] = kwargs.get("timeout") or STALL_TIMEOUT_S  # tfds sets none
        return send(self, request, **kwargs)

    verbosity = logging.get_verbosity()
    with contextlib.ExitStack() as stack:
        stack.callback(logging.set_verbosity, verbosity)
        logging.set_verbosity(logging.ERROR)
        for owner, attribute, value in (
            (tqdm_utils, "_active", False),
            (downloader, "MAX_RETRIES", 3),  # its 10, each wait twice the last, take minutes
            (requests.Session, "send", send_in_bounded_time),
        ):
            stack.enter_context(py_utils.temporary_assignment(owner, attribute, value))
        null = stack.enter_context(Path(os.devnull).open("w"))
        stack.enter_context(contextlib.redirect_stdout(null))
        yield tfds


def _one_line(error: BaseException) -> str:
    """Another library's error as a part of one of ours: the cause at its root, on one line."""
    while error.__context__ is not None:
        error = error.__context__
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= 600 else text[:597] + "..."
