"""Where the data comes from, in which order, and what is said about it."""

import hashlib
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import small

from mnist_jax import atomic_io as storage
from mnist_jax.data import DATASETS, Dataset, builders, cache, load_dataset, sources
from mnist_jax.errors import DataError, UsageError


def assert_holds(dataset: Dataset, truth) -> None:
    for got, want in zip((dataset.train, dataset.test), truth, strict=True):
        np.testing.assert_array_equal(got.image, want.image)
        np.testing.assert_array_equal(got.label, want.label)
        assert (got.image.dtype, got.label.dtype) == (np.uint8, np.int32)


def snapshot(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def cache_file(data_dir: Path) -> Path:
    return data_dir / "decoded" / "mnist-3.0.1.safetensors"


# The order of sources


def test_every_source_gives_the_same_arrays_in_the_same_order(
    originals, truth, data_dir, no_network
):
    first = load_dataset("mnist", data_dir=data_dir, manual_dir=originals)
    again = load_dataset("mnist", data_dir=data_dir)
    cache_file(data_dir).unlink()
    prepared = load_dataset("mnist", data_dir=data_dir)
    for dataset, source in (
        (first, "original files in"),
        (again, "decoded cache"),
        (prepared, "prepared folder"),
    ):
        assert_holds(dataset, truth)
        assert dataset.source.startswith(source)
        assert (dataset.name, dataset.notices) == ("mnist", ())
        assert len(dataset.class_names) == 10


def test_a_download_ends_as_a_prepared_folder_and_a_cache_and_nothing_else(
    truth, data_dir, server, capfd
):
    dataset = load_dataset("mnist", data_dir=data_dir)
    assert_holds(dataset, truth)
    assert dataset.source.startswith("downloaded from http://127.0.0.1")
    assert sorted(path.name for path in data_dir.iterdir()) == [".mnist.lock", "decoded", "mnist"]
    assert [path.name for path in (data_dir / "mnist").iterdir()] == ["3.0.1"]
    assert capfd.readouterr() == ("", "")


def test_a_good_cache_is_read_without_tfds_or_network(
    originals, truth, data_dir, no_network, monkeypatch
):
    load_dataset("mnist", data_dir=data_dir, manual_dir=originals)
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    monkeypatch.setitem(sys.modules, "filelock", None)  # reading takes no lock
    assert_holds(load_dataset("auto", data_dir=data_dir), truth)
    assert not no_network


# manual_dir


@pytest.mark.parametrize("name", ["auto", "mnist"])
@pytest.mark.parametrize("cached", [False, True])
def test_a_bad_manual_dir_is_an_error_whatever_else_there_is(originals, data_dir, name, cached):
    if cached:
        load_dataset("mnist", data_dir=data_dir, manual_dir=originals)
    path = originals / sources.TEST_LABELS
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    with pytest.raises(DataError, match=sources.TEST_LABELS):
        load_dataset(name, data_dir=data_dir, manual_dir=originals)
    with pytest.raises(DataError, match="is not a folder"):
        load_dataset(name, data_dir=data_dir, manual_dir=originals / "absent")


def test_auto_with_a_manual_dir_is_mnist(originals, truth, data_dir, no_network):
    dataset = load_dataset("auto", data_dir=data_dir, manual_dir=originals)
    assert (dataset.name, dataset.notices) == ("mnist", ())
    assert_holds(dataset, truth)


def test_a_home_that_nobody_has_is_a_folder_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_dataset("digits", data_dir="~nobody_has_it").notices == ()
    assert Path("~nobody_has_it").is_dir()
    with pytest.raises(DataError, match="~nobody_has_it/originals is not a folder"):
        load_dataset("mnist", data_dir=tmp_path, manual_dir="~nobody_has_it/originals")


def test_digits_take_no_manual_dir(originals, data_dir):
    with pytest.raises(UsageError, match="--manual_dir"):
        load_dataset("digits", data_dir=data_dir, manual_dir=originals)


def test_an_unknown_name_is_answered_with_the_known_ones(data_dir):
    with pytest.raises(UsageError, match="auto, digits, fashion_mnist, kmnist, mnist; did you"):
        load_dataset("mnits", data_dir=data_dir)
    assert DATASETS == ("mnist", "fashion_mnist", "kmnist", "digits")


# No network, and bad networks


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "kmnist"])
def test_without_network_the_error_says_what_to_fetch_and_where(name, data_dir, no_network):
    with pytest.raises(DataError) as refused:
        load_dataset(name, data_dir=data_dir)
    message = str(refused.value)
    source = sources.SOURCES[name]
    assert "\n" not in message
    for part in (source.url, *source.files, "--manual_dir=DIR", "--dataset=digits"):
        assert part in message
    assert no_network


def test_without_network_auto_is_the_digits_and_says_so(originals, data_dir, no_network):
    for _ in range(2):  # the digits' own cache must not silence the notice
        dataset = load_dataset("auto", data_dir=data_dir)
        assert dataset.name == "digits"
        assert "instead of MNIST" in dataset.notices[0]


def test_a_name_server_that_never_answers_is_not_waited_for(originals, data_dir, monkeypatch):
    monkeypatch.setattr(builders, "REACH_TIMEOUT_S", 0.3)
    monkeypatch.setattr("socket.getaddrinfo", lambda *args, **kwargs: time.sleep(5))
    source = sources.SOURCES["mnist"]._replace(url="http://mnist.invalid/")
    monkeypatch.setitem(sources.SOURCES, "mnist", source)
    with pytest.raises(DataError, match="no answer in"):
        load_dataset("mnist", data_dir=data_dir)


@pytest.mark.parametrize("name", [sources.TEST_LABELS, sources.TRAIN_IMAGES])
@pytest.mark.parametrize("status", [404, 503])
def test_an_error_of_the_server_is_told(data_dir, server, name, status):
    server.status[name] = status  # the first is noticed when asking, the second when downloading
    with pytest.raises(DataError, match=str(status)):
        load_dataset("mnist", data_dir=data_dir)
    dataset = load_dataset("auto", data_dir=data_dir)
    assert dataset.name == "digits"
    assert str(status) in dataset.notices[0]
    assert not (data_dir / "mnist").exists()
    server.status.clear()
    assert load_dataset("auto", data_dir=data_dir).name == "mnist"


def test_a_download_that_is_not_the_original_is_refused(originals, truth, data_dir, server):
    path = originals / sources.TRAIN_LABELS
    good = path.read_bytes()
    path.write_bytes(good[:-1] + b"\xff")
    with pytest.raises(DataError, match="checksum") as refused:
        load_dataset("mnist", data_dir=data_dir)
    assert "\n" not in str(refused.value)
    path.write_bytes(good)  # and the bad one was not kept
    assert_holds(load_dataset("mnist", data_dir=data_dir), truth)


def test_a_download_that_stalls_is_given_up(data_dir, server, monkeypatch):
    monkeypatch.setattr(builders, "STALL_TIMEOUT_S", 0.3)
    server.stalls.add(sources.TRAIN_IMAGES)
    with pytest.raises(DataError, match="cannot download mnist"):
        load_dataset("mnist", data_dir=data_dir)


# Damage


@pytest.mark.parametrize(
    "damage", ["flip", "truncate", "empty", "no digest", "foreign", "label", "shape"]
)
def test_a_damaged_cache_is_rebuilt_and_that_is_said_once(
    originals, truth, data_dir, no_network, damage
):
    load_dataset("mnist", data_dir=data_dir, manual_dir=originals)
    path = cache_file(data_dir)
    data = path.read_bytes()
    if damage == "no digest":
        path.with_name(path.name + ".sha256").unlink()
    elif damage == "foreign":  # whole, but of another data set
        cache.write(path, *(small.make_split(n, 3) for n in (59, 20)))
    elif damage == "label":
        cache.write(path, truth[0]._replace(label=truth[0].label + 10), truth[1])
    elif damage == "shape":  # one that NumPy does not have
        shape = [0, 2**40, 2**40]
        header = json.dumps({"x": {"dtype": "U8", "shape": shape, "data_offsets": [0, 0]}}).encode()
        storage.write_verified(path, len(header).to_bytes(8, "little") + header)
    else:
        flipped = data[:5000] + bytes([data[5000] ^ 16]) + data[5001:]
        path.write_bytes({"flip": flipped, "truncate": data[:-1], "empty": b""}[damage])
    repaired = load_dataset("mnist", data_dir=data_dir)
    assert_holds(repaired, truth)
    assert len(repaired.notices) == 1
    assert "rebuilt" in repaired.notices[0]
    assert path.read_bytes() == data
    assert load_dataset("mnist", data_dir=data_dir).notices == ()


@pytest.mark.parametrize("damage", ["truncate", "flip", "short", "remove", "pipe"])
def test_a_damaged_prepared_folder_is_left_alone_and_said(
    originals, truth, data_dir, no_network, damage
):
    load_dataset("mnist", data_dir=data_dir, manual_dir=originals)
    cache_file(data_dir).unlink()
    folder = data_dir / "mnist" / "3.0.1"
    (record,) = folder.glob("mnist-train*")
    data = record.read_bytes()
    if damage in ("remove", "pipe"):
        record.unlink()
        if damage == "pipe":
            os.mkfifo(record)
    elif damage == "short":
        info = json.loads((folder / "dataset_info.json").read_text())
        next(s for s in info["splits"] if s["name"] == "train")["shardLengths"] = ["59"]
        (folder / "dataset_info.json").write_text(json.dumps(info))
    else:
        # Past the header, inside the images.
        flipped = data[:20000] + bytes([data[20000] ^ 1]) + data[20001:]
        record.write_bytes({"truncate": data[: len(data) // 2], "flip": flipped}[damage])
    before = snapshot(folder)
    with pytest.raises(DataError, match=r"3\.0\.1.* cannot download"):
        load_dataset("mnist", data_dir=data_dir)
    dataset = load_dataset("mnist", data_dir=data_dir, manual_dir=originals)
    assert_holds(dataset, truth)
    assert str(folder) in dataset.notices[0]
    assert snapshot(folder) == before


@pytest.mark.parametrize("format", ["tfrecord", None])
@pytest.mark.parametrize("download", [False, True])
def test_a_folder_that_tensorflow_prepared_is_left_alone(
    originals, truth, data_dir, server, format, download
):
    folder = data_dir / "mnist" / "3.0.1"
    folder.mkdir(parents=True)
    info = {"name": "mnist", "version": "3.0.1"} | ({"fileFormat": format} if format else {})
    (folder / "dataset_info.json").write_text(json.dumps(info))
    (folder / "mnist-train.tfrecord-00000-of-00001").write_bytes(b"records")
    before = snapshot(folder)
    dataset = load_dataset("mnist", data_dir=data_dir, manual_dir=None if download else originals)
    assert_holds(dataset, truth)
    assert f"{folder} is not in the array_record format" in dataset.notices[0]
    assert dataset.source.startswith("downloaded" if download else "original files")
    assert snapshot(folder) == before
    assert load_dataset("mnist", data_dir=data_dir).notices == ()


# Folders that cannot be written, packages that are not installed


@pytest.mark.parametrize("name", ["file/data", "n" * 300])
def test_without_a_writable_folder_manual_files_and_digits_still_load(
    originals, truth, tmp_path, no_network, name
):
    (tmp_path / "file").write_text("in the way")
    data_dir = tmp_path / name
    dataset = load_dataset("mnist", data_dir=data_dir, manual_dir=originals)
    assert_holds(dataset, truth)
    assert ["cannot cache mnist" in notice for notice in dataset.notices] == [True]
    assert "cannot cache digits" in load_dataset("digits", data_dir=data_dir).notices[0]
    with pytest.raises(DataError, match=r"cannot write .*another --data_dir"):
        load_dataset("mnist", data_dir=data_dir)
    assert "cannot write" in load_dataset("auto", data_dir=data_dir).notices[0]


def test_a_full_disk_costs_the_cache_not_the_run(originals, truth, data_dir, monkeypatch):
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache.storage, "write_verified", full)
    monkeypatch.setattr(builders, "prepare", full)
    dataset = load_dataset("mnist", data_dir=data_dir, manual_dir=originals)
    assert_holds(dataset, truth)
    assert len([notice for notice in dataset.notices if "No space left" in notice]) == 2


def test_without_tfds_manual_files_are_read_directly_and_that_is_said(
    originals, truth, data_dir, monkeypatch
):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(DataError, match="pip install tensorflow-datasets, pass --manual_dir=DIR"):
        load_dataset("mnist", data_dir=data_dir)
    assert "not installed" in load_dataset("auto", data_dir=data_dir).notices[0]
    dataset = load_dataset("mnist", data_dir=data_dir, manual_dir=originals)
    assert_holds(dataset, truth)
    assert "tensorflow-datasets is not installed" in dataset.notices[0]
    assert load_dataset("mnist", data_dir=data_dir).notices == ()  # from the cache


# The real thing


@pytest.mark.mnist
def test_mnist_is_mnist(mnist_dir, tmp_path, monkeypatch):
    # Preparing 70,000 images takes 10 s and is tested above on fewer.
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    load_dataset("mnist", data_dir=tmp_path, manual_dir=mnist_dir)
    dataset = load_dataset("mnist", data_dir=tmp_path)
    train, test = dataset.train, dataset.test
    assert train.image.shape == (60_000, 28, 28, 1)
    assert test.image.shape == (10_000, 28, 28, 1)
    assert train.label[:5].tolist() == [5, 0, 4, 1, 9]
    assert test.label[:5].tolist() == [7, 2, 1, 0, 4]
    assert train.image.mean() == pytest.approx(33.318421, abs=1e-6)
    assert (train.image.min(), train.image.max()) == (0, 255)
    assert np.bincount(train.label).tolist() == [
        *(5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949)
    ]
    assert np.bincount(test.label).tolist() == [
        *(980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009)
    ]
