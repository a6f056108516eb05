"""Writes and reads prepared folders of tensorflow-datasets (tfds), without TensorFlow.

The MNIST builder of tfds encodes and decodes images with TensorFlow; the one here with Pillow. The
folder it writes, `<data_dir>/mnist/3.0.1`, is an ordinary one that any tfds reads. tfds takes most
of a second to import, so the functions that need it import it.
"""

import io
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np

from mnist_jax.data.dataset import Split
from mnist_jax.data.sources import SOURCES, Source
from mnist_jax.errors import DataError, first_line


def path(name: str, data_dir: Path) -> Path:
    """Where tfds keeps the data set."""
    return data_dir / name / SOURCES[name].version


def _description(source: Source) -> str:
    """Recorded in the folder, so that it is never read as the data of other files."""
    return f"Prepared from original files with the combined SHA-256 {source.key}"


def read(folder: Path, source: Source) -> tuple[Split, Split]:
    """Reads train and test from a folder that `prepare` wrote for `source`.

    Raises DataError: the folder is damaged, or was prepared by another program or from other files.
    """
    import tensorflow_datasets as tfds

    def read_split(name: str) -> Split:
        examples = builder.as_data_source(name)
        # All at once: one by one, array_record seeks for each, eight times as slow.
        examples = examples.__getitems__(list(range(len(examples))))
        image = np.stack([example["image"] for example in examples])
        return Split(image, np.array([example["label"] for example in examples], np.int32))

    try:
        builder: Any = tfds.builder_from_directory(folder)
        if builder.info.description != _description(source):
            raise ValueError("it was prepared by another program or from other files")
        return read_split("train"), read_split("test")
    except Exception as error:  # tfds, array_record, Pillow and protobuf each raise their own
        problem = f"{type(error).__name__}: {first_line(error)}"
        install = "install it, or " if isinstance(error, ImportError) else ""
        raise DataError(f"cannot use {folder} ({problem}); {install}move it away") from error


def prepare(name: str, data_dir: Path, train: Split, test: Split) -> None:
    """Writes the folder of that name in `data_dir`, unless it exists; complete or not at all.

    Raises ImportError if tfds is not installed.
    """
    import tensorflow_datasets as tfds
    from PIL import Image

    source, dataset_name = SOURCES[name], name

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name = dataset_name
        VERSION = tfds.core.Version(source.version)

        def _info(self) -> Any:
            features = {
                "image": tfds.features.Image(shape=(28, 28, 1)),
                "label": tfds.features.ClassLabel(names=source.class_names),
            }
            return tfds.core.DatasetInfo(
                builder=self,
                description=_description(source),
                features=tfds.features.FeaturesDict(features),
                supervised_keys=("image", "label"),
                disable_shuffling=True,  # the order of the original files
            )

        def _split_generators(self, dl_manager: Any) -> Any:
            return {"train": self._generate_examples(train), "test": self._generate_examples(test)}

        def _generate_examples(self, split: Split) -> Any:
            for i, (image, label) in enumerate(zip(*split, strict=True)):
                # tfds encodes an array with TensorFlow, a Pillow image without.
                yield i, {"image": Image.fromarray(image[..., 0]), "label": int(label)}

    config = tfds.download.DownloadConfig(try_download_gcs=False)
    # Without the messages and the progress bars of tfds.
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        builder = Builder(data_dir=data_dir)
        builder.download_and_prepare(download_config=config, file_format="array_record")
