"""Which source is read, what it leaves behind, and which failures are errors or warnings."""

import errno
import os
import sys
from pathlib import Path
from unittest import mock

import filelock
import numpy as np
import pytest
import small

from mnist_jax.data import Dataset, PrepareData, digits, load_dataset, sources
from mnist_jax.errors import DataError, DeviceError


def assert_holds(dataset: Dataset, truth) -> None:
    for got, want in zip((dataset.train, dataset.test), truth, strict=True):
        np.testing.assert_array_equal(got.image, want.image)
        np.testing.assert_array_equal(got.label, want.label)
        assert (got.image.dtype, got.label.dtype) == (np.uint8, np.int32)


def cache_file(data_dir: Path) -> Path:
    (file,) = (data_dir / "decoded").glob("mnist-*.safetensors")
    return file


def test_every_source_gives_the_same(originals, truth, data_dir, no_network, capfd, monkeypatch):
    """The cache needs neither tfds nor a network nor a lock."""
    first = load_dataset("auto", data_dir=data_dir, manual_dir=originals)
    PrepareData(data_dir=data_dir).run()
    assert capfd.readouterr() == (f"mnist: 60 train, 20 test images, cached in {data_dir}\n", "")
    cached = load_dataset("mnist", data_dir=data_dir)
    cache_file(data_dir).unlink()
    prepared = load_dataset("mnist", data_dir=data_dir)
    for module in ("tensorflow_datasets", "requests", "filelock"):
        monkeypatch.setitem(sys.modules, module, None)
    again = load_dataset("auto", data_dir=data_dir)
    origins = ("original files in", "cached in", "prepared folder", "cached in")
    for dataset, source in zip((first, cached, prepared, again), origins, strict=True):
        assert_holds(dataset, truth)
        assert dataset.source.startswith(source)
        assert (dataset.name, dataset.warnings, len(dataset.class_names)) == ("mnist", (), 10)
    assert capfd.readouterr() == ("", "")


def test_a_download_is_cached_and_never_repeated(truth, data_dir, server, capfd):
    dataset = load_dataset("mnist", data_dir=data_dir)
    assert_holds(dataset, truth)
    assert dataset.source.startswith("downloaded from http://127.0.0.1")
    cache_file(data_dir).unlink()
    assert_holds(load_dataset("auto", data_dir=data_dir), truth)
    assert server.requested == list(small.NAMES)
    assert capfd.readouterr() == ("", "")


def test_other_files_are_never_read_as_the_old_data(originals, data_dir, tmp_path, monkeypatch):
    PrepareData(data_dir=data_dir, manual_dir=originals).run()
    truth = small.write(tmp_path / "other", seed=7)
    monkeypatch.setitem(sources.SOURCES, "mnist", small.source_of(tmp_path / "other"))
    with pytest.raises(DataError, match=r"from other files.*move it away"):
        load_dataset("mnist", data_dir=data_dir, manual_dir=tmp_path / "other")
    (data_dir / "mnist").rename(tmp_path / "away")
    assert_holds(load_dataset("mnist", data_dir=data_dir, manual_dir=tmp_path / "other"), truth)


@pytest.mark.parametrize("name", ["auto", "mnist"])
@pytest.mark.parametrize("cached", [False, True])
def test_a_bad_manual_dir_is_an_error_whatever_else_is_there(originals, data_dir, name, cached):
    if cached:
        load_dataset("mnist", data_dir=data_dir, manual_dir=originals)
    path = originals / sources.TEST_LABELS
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    absent = "cannot read .*absent/.*: No such file.*; mnist needs train-images"
    for folder, message in ((originals, "is not mnist's"), (originals / "absent", absent)):
        with pytest.raises(DataError, match=message):
            load_dataset(name, data_dir=data_dir, manual_dir=folder)


@pytest.mark.parametrize("fault", ["http://x.invalid/", "http://127.0.0.1:9/", "stall", 404, 503])
def test_auto_is_digits_only_if_mnist_is_unreachable(truth, data_dir, server, monkeypatch, fault):
    monkeypatch.setattr(sources, "TIMEOUT_S", 0.3)
    with monkeypatch.context() as patch:
        if str(fault).startswith("http"):
            patch.setitem(sources.SOURCES, "mnist", sources.SOURCES["mnist"]._replace(url=fault))
        else:
            server.faults[sources.TEST_IMAGES] = fault
        for _ in range(2):  # a cache of the digits does not hide the warning
            dataset = load_dataset("auto", data_dir=data_dir)
            assert dataset.name == "digits"
            (warning,) = dataset.warnings
            assert "digits instead of MNIST: " in warning
            assert "--manual_dir=DIR" in warning and len(warning) < 210 and "\n" not in warning
        with pytest.raises(DataError, match=r"cannot download .*--manual_dir=DIR.*=digits"):
            load_dataset("mnist", data_dir=data_dir)
    server.faults.clear()
    assert_holds(load_dataset("auto", data_dir=data_dir), truth)


def test_a_data_dir_must_be_writable_and_unlocked(originals, data_dir, no_network, monkeypatch):
    data_dir.write_text("a file")
    cannot_write = pytest.raises(DeviceError, match=r"cannot write .*choose another --data_dir")
    with cannot_write:
        load_dataset("auto", data_dir=data_dir)
    data_dir.unlink()
    data_dir.mkdir()
    with monkeypatch.context() as full_disk, cannot_write:
        full_disk.setattr(os, "fsync", mock.Mock(side_effect=OSError(errno.ENOSPC, "No space")))
        load_dataset("digits", data_dir=data_dir)
    monkeypatch.setattr("mnist_jax.data.LOCK_TIMEOUT_S", 0.1)
    lock = filelock.FileLock(data_dir / ".mnist.lock")
    with lock, pytest.raises(DeviceError, match=r"lock.*could not be acquired"):
        load_dataset("auto", data_dir=data_dir)


def test_a_download_that_is_not_the_original_is_an_error(originals, truth, data_dir, server):
    path = originals / sources.TRAIN_LABELS
    good = path.read_bytes()
    path.write_bytes(good[:-1] + b"\xff")
    with pytest.raises(DataError, match=r"is not mnist's.*get it again"):
        load_dataset("auto", data_dir=data_dir)
    path.write_bytes(good)
    assert_holds(load_dataset("auto", data_dir=data_dir), truth)


def flipped(data: bytes) -> bytes:
    return data[:20_000] + bytes([data[20_000] ^ 1]) + data[20_001:]


TFDS_FOLDER = r"cannot use {path.parent} \(.*\); move it away"


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("decoded/*.safetensors", flipped, "the decoded cache is damaged: .*; delete {path}"),
        ("mnist/*/mnist-train*", lambda data: data[: len(data) // 2], TFDS_FOLDER),
        ("mnist/*/mnist-train*", flipped, TFDS_FOLDER),
        ("mnist/*/dataset_info.json", lambda data: b"", TFDS_FOLDER),
    ],
    ids=["cache", "truncated", "a bit of an image", "no info"],
)
def test_damaged_data_are_an_error_and_stay(originals, data_dir, no_network, file, change, message):
    PrepareData(data_dir=data_dir, manual_dir=originals).run()
    (path,) = data_dir.glob(file)
    if message == TFDS_FOLDER:
        cache_file(data_dir).unlink()
    path.write_bytes(change(path.read_bytes()))
    before = {file: file.read_bytes() for file in path.parent.iterdir()}
    with pytest.raises(DataError, match=message.format(path=path)) as failed:
        load_dataset("auto", data_dir=data_dir)
    assert "\n" not in str(failed.value)
    assert {file: file.read_bytes() for file in path.parent.iterdir()} == before


@pytest.mark.parametrize("fault", ["without tfds", "full disk"])
def test_a_tfds_folder_that_is_not_prepared_brings_a_warning(
    originals, truth, data_dir, monkeypatch, capsys, fault
):
    if fault == "without tfds":
        monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    else:  # as array_record does
        problem = RuntimeError("write() failed: No space left on device\nSource Location Trace:")
        prepare = mock.Mock(side_effect=problem)
        monkeypatch.setattr("mnist_jax.data.tfds_folder.prepare", prepare)
    PrepareData(data_dir=data_dir, manual_dir=originals).run()
    out, err = capsys.readouterr()
    assert out == f"mnist: 60 train, 20 test images, original files in {originals}\n"
    [line] = err.splitlines()
    assert line.startswith(f"warning: {data_dir / 'mnist' / '3.0.1'} is not prepared: ")
    again = load_dataset("mnist", data_dir=data_dir)
    assert_holds(again, truth)
    assert again.warnings == ()


def test_all_1797_digits_in_file_order_in_the_format_of_mnist():
    bundled = pytest.importorskip("sklearn.datasets").load_digits()
    train, test = splits = digits.load()
    assert (train.image.shape, test.image.shape) == ((1_437, 28, 28, 1), (360, 28, 28, 1))
    np.testing.assert_array_equal(np.concatenate([train.label, test.label]), bundled.target)
    assert np.bincount(test.label, minlength=10).min() >= 30  # every class is tested
    for split in splits:
        border = split.image.copy()
        border[:, 4:24, 4:24] = 0
        assert (split.image.dtype, split.image.max(), border.max()) == (np.uint8, 255, 0)
        assert 20 < split.image.mean() < 60  # MNIST: 33
    # Averaged back over its 2.5 × 2.5 pixels, each original pixel has its value.
    box = train.image[:, 4:24, 4:24, 0].repeat(2, 1).repeat(2, 2)  # (n, 40, 40)
    back = box.reshape(-1, 8, 5, 8, 5).mean((2, 4))
    assert np.corrcoef(back.ravel(), bundled.images[:1_437].ravel())[0, 1] > 0.98
