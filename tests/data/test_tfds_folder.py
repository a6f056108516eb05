"""The prepared folder is an ordinary one of tfds, written and read without TensorFlow."""

import os

import numpy as np
import pytest
from shared import ROOT, python

from mnist_jax.data import PrepareData, sources

tfds = pytest.importorskip("tensorflow_datasets")


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_stock_tfds_reads_what_was_prepared(originals, truth, data_dir, monkeypatch, name):
    class_names = sources.SOURCES[name].class_names
    entry = sources.SOURCES["mnist"]._replace(class_names=class_names)
    monkeypatch.setitem(sources.SOURCES, name, entry)
    PrepareData(dataset=name, data_dir=data_dir, manual_dir=originals).run()
    builder = tfds.builder(name, data_dir=data_dir)
    assert type(builder).__module__ == "tensorflow_datasets.image_classification.mnist"
    assert builder.info.features["label"].names == list(class_names)
    for split, want in zip(("train", "test"), truth, strict=True):
        examples = tfds.data_source(name, split=split, data_dir=data_dir)
        np.testing.assert_array_equal([example["image"] for example in examples], want.image)
        np.testing.assert_array_equal([example["label"] for example in examples], want.label)


def test_tensorflow_is_not_imported_and_tfds_only_when_needed(originals, data_dir, tmp_path):
    (tmp_path / "reach" / "tensorflow").mkdir(parents=True)
    (tmp_path / "reach" / "tensorflow" / "__init__.py").touch()
    code = """
import shutil, sys
from pathlib import Path
import mnist_jax, mnist_jax.training, small
from mnist_jax.data import PrepareData, load_dataset, sources
assert not {"tensorflow_datasets", "requests", "sklearn"} & set(sys.modules)
folder, data_dir = map(Path, sys.argv[1:])
sources.SOURCES["mnist"] = small.source_of(folder)
load_dataset("mnist", data_dir=data_dir, manual_dir=folder)
assert "tensorflow_datasets" not in sys.modules
PrepareData(data_dir=data_dir).run()
assert "tensorflow_datasets" in sys.modules, "the folder was not prepared"
shutil.rmtree(data_dir / "decoded")
print(load_dataset("mnist", data_dir=data_dir).source.split()[0])
assert "tensorflow" not in sys.modules
"""
    path = os.pathsep.join(map(str, (tmp_path / "reach", ROOT / "tests", ROOT)))
    done = python("-c", code, originals, data_dir, PYTHONPATH=path)
    assert (done.stdout.splitlines()[-1], done.stderr) == ("prepared", "")
