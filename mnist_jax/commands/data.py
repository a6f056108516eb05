"""The command `data`."""

import dataclasses
from pathlib import Path

from mnist_jax import data, errors
from mnist_jax.config import expand_paths


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """Prepares a data set ahead of time, or checks one that is there."""

    dataset: str = "mnist"
    """The images: mnist, fashion_mnist, kmnist or digits."""

    data_dir: Path = data.DEFAULT_DATA_DIR
    """Folder where prepared and decoded data sets are kept."""

    manual_dir: Path | None = None
    """Folder with the data set's four original .gz files, for a machine without network."""

    def run(self) -> None:
        """Loads it, which proves every image and label, and says where it came from."""
        expand_paths(self, "data_dir", "manual_dir")
        if self.dataset not in data.DATASETS:
            raise errors.unknown_choice("dataset", self.dataset, data.DATASETS)
        loaded = data.load_dataset(self.dataset, data_dir=self.data_dir, manual_dir=self.manual_dir)
        for notice in loaded.notices:
            print(f"notice: {notice}")
        train, test = len(loaded.train.label), len(loaded.test.label)
        print(f"{loaded.name}: {train:,} train and {test:,} test images, {loaded.source}")
