"""Predicts the classes of pictures, or of images of a data set, with a saved model."""

import dataclasses
import itertools
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import tyro
from PIL import Image

from mnist_jax.atomic_io import user_path
from mnist_jax.data import class_names
from mnist_jax.errors import DataError, DeviceError, UsageError, printable
from mnist_jax.inference.flags import PlatformFlags, RunFolder, print_warnings
from mnist_jax.inference.preprocess import Digit, read_digit
from mnist_jax.inference.restore import Predictor, load_run, load_runs
from mnist_jax.parallel import mesh
from mnist_jax.runs.statistics import percent

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp")
BATCH_SIZE = 8  # small, so that the first answers come soon
Pictures = Annotated[
    tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="PICTURE [PICTURE ...]")
]


def predict(
    workdir: str | Path,
    images: str | Path | Sequence[str | Path] | np.ndarray,
    *,
    platform: str | None = None,
) -> np.ndarray:
    """The probabilities of the classes, by a run's model, or the mean of its members'.

    >>> from mnist_jax import predict
    >>> predict("runs/mnist-cnn", "seven.png").argmax(1)  # doctest: +SKIP
    array([7])

    Args:
        workdir: the run's folder.
        images: one or several picture files, prepared by `preprocess.read_digit`; or an array
            (n, 28, 28, 1) uint8 of images like those of the data set, which is used as it is.
        platform: cpu, gpu, tpu or auto; None for the run's own.

    Returns:
        (n, classes) float32, the classes in the order of `data.class_names`.

    Raises:
        UsageError: the folder holds no run, or `images` is something else.
        CheckpointError: the run has no usable checkpoint.
        DataError: a picture cannot be read or shows no digit.
        DeviceError: the platform is absent.
        NonFiniteError: the outputs of all members are not finite.
    """
    run = load_run(workdir)
    if not isinstance(images, np.ndarray):
        paths = [images] if isinstance(images, str | Path) else images
        images = np.array([read_digit(path).image for path in paths], np.uint8)
    if images.shape != (len(images) or 1, 28, 28, 1) or images.dtype != np.uint8:
        got = f"images is {images.dtype}{list(images.shape)}"
        raise UsageError(f"{got}; allowed are paths of pictures, or an array uint8[n, 28, 28, 1]")
    with mesh.use_device(platform or run.config.platform, run.config.precision) as device:
        return Predictor(run, device)(images).mean.astype(np.float32)


class Answer(NamedTuple):
    """A picture with the probabilities of the classes, or with the error that prevents them."""

    path: Path
    digit: Digit | None = None
    probabilities: Sequence[float] = ()  # of the classes
    error: DataError | None = None
    warnings: tuple[str, ...] = ()


def list_pictures(path: Path) -> list[Path]:
    """The pictures in a folder by their suffix, sorted; otherwise the path itself.

    Subfolders and hidden files are skipped.
    """
    files = sorted(path.glob("[!.]*")) if path.is_dir() else []
    files = [file for file in files if file.suffix.lower() in SUFFIXES and not file.is_dir()]
    return files or [path]


def read_pictures(paths: Iterable[Path]) -> Iterator[Answer]:
    """Reads pictures and folders of them: answers still without probabilities."""
    for path in itertools.chain.from_iterable(map(list_pictures, paths)):
        try:
            if path.is_dir():
                raise DataError(f"{path} holds no file that ends in {', '.join(SUFFIXES)}")
            digit = read_digit(path)
        except DataError as error:
            yield Answer(path, error=error)
            continue
        several = f"{path} seems to hold {digit.others + 1} digits; the largest is used"
        yield Answer(path, digit, warnings=(several,) if digit.others else ())


def answer(predictor: Predictor, pictures: Iterator[Answer]) -> Iterator[Answer]:
    """Adds the probabilities, in batches, to the pictures that show a digit."""
    while batch := list(itertools.islice(pictures, BATCH_SIZE)):
        images = [picture.digit.image for picture in batch if picture.digit]
        prediction = predictor(np.stack(images)) if images else None
        probabilities = iter(prediction.mean.tolist() if prediction else ())
        for picture in batch:
            if picture.digit and prediction:
                warnings = (*picture.warnings, *prediction.warnings)
                picture = picture._replace(probabilities=next(probabilities), warnings=warnings)
            yield picture


@dataclasses.dataclass(frozen=True, kw_only=True)
class Predict(PlatformFlags):
    """Predicts which digit, or other class, each picture shows.

    A line holds the most probable class and its probability, the second one, and the file.
    """

    folder: RunFolder
    """The run's folder. With --seeds=K: the mean of its networks' probabilities."""

    pictures: Pictures
    """PNG, JPEG, BMP, GIF or WebP files, and folders of them."""

    json: bool = False
    """Print one JSON object for each picture instead."""

    save_preprocessed: Path | None = None
    """Folder for what the network sees of each picture, such as 0001-seven.png for seven.jpg."""

    def run(self) -> None:
        """Prints an answer or an error for each picture; a DataError follows if any has none."""
        if not self.pictures:
            raise UsageError("no picture is named; name files, or folders of them")
        (run,) = load_runs([self.folder])
        names = class_names(run.config.dataset)
        print_warnings(run.warnings)
        print_warnings(mesh.enable_compilation_cache(run.config.compilation_cache))
        failed, count, shown = 0, 0, set()
        with mesh.use_device(self.platform or run.config.platform, run.config.precision) as device:
            predictor = Predictor(run, device, batch_size=BATCH_SIZE)
            answers = answer(predictor, read_pictures(map(user_path, self.pictures)))
            for count, found in enumerate(answers, 1):
                if found.error is not None:
                    failed += 1
                    print(printable(f"error: {found.error}"), file=sys.stderr)
                print_warnings(printable(text) for text in found.warnings if text not in shown)
                shown.update(found.warnings)
                if found.digit and self.save_preprocessed:
                    name = f"{count:04d}-{found.path.stem}.png"
                    _save(found.digit.image, user_path(self.save_preprocessed), name)
                if self.json or not found.error:
                    print((_json if self.json else _line)(found, names), flush=True)
        if failed:
            raise DataError(f"{failed} of {count} have no answer; the lines above say why")


def _save(image: np.ndarray, folder: Path, name: str) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[..., 0]).save(folder / name)
    except OSError as error:
        raise DeviceError(f"save_preprocessed: cannot write {folder} ({error.strerror})") from error


def _line(found: Answer, names: Sequence[str]) -> str:
    width, pairs = max(map(len, names)), zip(found.probabilities, names, strict=True)
    best = sorted(pairs, reverse=True)[:2]
    cells = [f"{name:{width}s}  {percent(probability):>8s}  " for probability, name in best]
    return "".join([*cells, printable(str(found.path))])


def _json(found: Answer, names: Sequence[str]) -> str:
    if found.error is not None:
        return json.dumps({"file": str(found.path), "error": str(found.error)})
    probability = max(found.probabilities)
    label = found.probabilities.index(probability)
    record = {"file": str(found.path), "label": label, "name": names[label]}
    return json.dumps({**record, "probability": probability, "probabilities": found.probabilities})
