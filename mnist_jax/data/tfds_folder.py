"""Prepares a folder for tensorflow-datasets (tfds), without TensorFlow.

The MNIST builder of tfds encodes images with TensorFlow; the one here with Pillow. The folder it
writes, `<data_dir>/mnist/3.0.1`, is an ordinary one, which `tfds.data_source("mnist")` reads.
"""

import io
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from mnist_jax.data.sources import SOURCES
from mnist_jax.data.split import Split


def folder_of(name: str, data_dir: Path) -> Path:
    """Where tfds keeps the prepared data set."""
    return data_dir / name / SOURCES[name].version


def prepare(name: str, data_dir: Path, train: Split, test: Split) -> None:
    """Writes `folder_of(name, data_dir)`, unless it exists; complete or not at all.

    Raises:
        ImportError: tfds is not installed.
    """
    if folder_of(name, data_dir).exists():
        return
    import tensorflow_datasets as tfds  # takes most of a second
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
                description=f"Prepared from the files of {source.url}",
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
