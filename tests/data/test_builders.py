"""The prepared folder is an ordinary one of tfds's, made and read without TensorFlow."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import small

from mnist_jax.data import builders, sources

tfds = pytest.importorskip("tensorflow_datasets")


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "kmnist"])
def test_stock_tfds_reads_what_was_prepared(originals, truth, data_dir, monkeypatch, name):
    entry = sources.SOURCES[name]._replace(
        files=sources.SOURCES["mnist"].files, train_count=60, test_count=20
    )
    monkeypatch.setitem(sources.SOURCES, name, entry)
    data_dir.mkdir()
    builders.prepare(name, data_dir, originals)

    builder = tfds.builder(name, data_dir=data_dir)
    assert type(builder).__module__ == "tensorflow_datasets.image_classification.mnist"
    assert builder.info.features["label"].names == list(entry.class_names)
    assert builder.info.features["image"].shape == (28, 28, 1)
    for split, want in zip(("train", "test"), truth, strict=True):
        examples = tfds.data_source(name, split=split, data_dir=data_dir)
        assert len(examples) == len(want.label)
        np.testing.assert_array_equal([example["image"] for example in examples], want.image)
        np.testing.assert_array_equal([example["label"] for example in examples], want.label)


def test_a_shuffled_folder_is_read_in_the_order_of_the_original_files(truth, data_dir):
    """Stock builders shuffle by a hash. This one does as they do, but for the encoder."""
    from PIL import Image
    from tensorflow_datasets.image_classification import mnist

    class Stock(mnist.MNIST, skip_registration=True):
        name = "mnist"

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(truth[0]), "test": self._examples(truth[1])}

        def _examples(self, split):
            for i, (image, label) in enumerate(zip(*split, strict=True)):
                yield i, {"image": Image.fromarray(image[..., 0]), "label": int(label)}

        _generate_examples = _examples

    with builders._quiet_tfds():
        Stock(data_dir=data_dir).download_and_prepare(file_format="array_record")
    examples = tfds.data_source("mnist", split="train", data_dir=data_dir)
    stored = [example["label"] for example in examples]
    assert stored != truth[0].label.tolist()
    for got, want in zip(builders.read("mnist", data_dir), truth, strict=True):
        np.testing.assert_array_equal(got.image, want.image)
        np.testing.assert_array_equal(got.label, want.label)


def test_nothing_is_registered_in_place_of_a_stock_builder(originals, data_dir):
    data_dir.mkdir()
    builders.prepare("mnist", data_dir, originals)
    assert tfds.builder_cls("mnist").__module__.startswith("tensorflow_datasets.")


def test_an_existing_folder_is_never_replaced(originals, data_dir):
    folder = data_dir / "mnist" / "3.0.1"
    folder.mkdir(parents=True)
    (folder / "mine").write_text("keep")
    builders.prepare("mnist", data_dir, originals)
    assert [path.name for path in folder.iterdir()] == ["mine"]


def test_tensorflow_is_not_imported_and_tfds_only_when_needed(originals, data_dir, tmp_path):
    """With a package of that name within reach, so that an import would succeed."""
    (tmp_path / "reach" / "tensorflow").mkdir(parents=True)
    (tmp_path / "reach" / "tensorflow" / "__init__.py").touch()
    code = """
import sys
from pathlib import Path
from mnist_jax.data import load_dataset, builders, sources
import small
folder, data_dir = map(Path, sys.argv[1:])
sources.SOURCES["mnist"] = small.source_of(folder)
assert "tensorflow_datasets" not in sys.modules, "imported too early"
load_dataset("mnist", data_dir=data_dir, manual_dir=folder)
assert "tensorflow_datasets" in sys.modules, "the folder was not prepared"
builders.read("mnist", data_dir)
assert "tensorflow" not in sys.modules, "TensorFlow was imported"
"""
    here = Path(small.__file__).parent
    path = os.pathsep.join([str(tmp_path / "reach"), str(here), str(here.parents[1])])
    done = subprocess.run(
        [sys.executable, "-c", code, originals, data_dir],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
