"""Predicts the classes of pictures, or of images of a data set, with a saved model."""

import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import jax
import numpy as np
from PIL import Image

from mnist_jax.atomic_io import user_path
from mnist_jax.errors import DataError, UsageError, print_warnings, printable, writing
from mnist_jax.inference.flags import PlatformFlags, Positional, arg, open_runs
from mnist_jax.inference.preprocess import read_digit
from mnist_jax.inference.read_image import FORMATS
from mnist_jax.inference.restore import PRETRAINED, LoadedRun, Predictor, load_run
from mnist_jax.models import IMAGE_SHAPE
from mnist_jax.runs.run_dir import CONFIG, has_begun
from mnist_jax.runs.statistics import percent

Metavar = arg(metavar="[RUN] PICTURE [PICTURE ...]", help_behavior_hint="(required)")


def predict(
    workdir: str | Path | LoadedRun,
    images: str | Path | Sequence[str | Path] | np.ndarray | jax.Array,
    *,
    platform: str | None = None,
) -> np.ndarray:
    """The probabilities of the classes, by a run's model, or the mean of its members'.

    >>> from mnist_jax import predict
    >>> predict("runs/mnist-cnn", "seven.png").argmax(1)  # doctest: +SKIP
    array([7])

    Args:
        workdir: the run's folder, or what `load_run` read from it.
        images: picture files, or folders of them (sorted by name), prepared by
            `preprocess.read_digit`; or an array (n, height, width, channels) uint8 of images like
            those of the data set, used as it is.
        platform: cpu, gpu, tpu or auto; None for the run's own.

    Returns:
        (n, classes) float32, the classes in the order of `LoadedRun.data.class_names`.

    Raises:
        UsageError: an array has another shape or dtype, or the folder holds no run.
        DataError: a picture cannot be read or shows no digit.
    """
    run = load_run(workdir)
    if not isinstance(images, np.ndarray | jax.Array):
        paths = [images] if isinstance(images, str | Path) else images
        files = [file for path in map(user_path, paths) for file in _files_of(path)]
        images = np.array([read_digit(file).image for file in files], np.uint8)
    return Predictor(run, platform)(np.asarray(images)).mean.astype(np.float32)


def _files_of(path: Path) -> list[Path]:
    """The pictures in a folder by the endings of their names, sorted; else the path itself."""
    if not os.path.isdir(path):
        return [path]
    formats = Image.registered_extensions() | {".heic": FORMATS[0]}  # an error, not silence
    named = (file for file in sorted(path.glob("[!.]*")) if os.path.isfile(file))
    return [file for file in named if formats.get(file.suffix.lower()) in FORMATS] or [path]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Predict(PlatformFlags):
    """Predicts which digit, or other class, each picture shows.

    A line holds the most probable class and its probability, the second one, and the file.
    """

    paths: Annotated[tuple[Path, ...], Positional, Metavar]
    """The run's folder, then PNG, JPEG, BMP, GIF, TIFF or WebP files, and folders of them. Without
    RUN: the MLP that comes with mnist_jax. Of several networks in a run: the mean of
    their probabilities."""

    json: bool = False
    """Print one JSON object for each picture instead."""

    save_preprocessed: Path | None = None
    """Folder for what the network sees of each picture, such as 0001-seven.png for seven.jpg."""

    def run(self) -> None:
        """Prints an answer or an error for each picture; a DataError follows if any has none."""
        folder, paths = self._run_and_pictures()
        (run,) = open_runs([folder])
        for text in (run.record or {}).get("warnings", ()):  # such as other data than MNIST
            print_warnings([f"when {folder} was trained: {text}"])
        predictor, failed = Predictor(run, self.platform), 0
        print_warnings(predictor(np.zeros((1, *IMAGE_SHAPE), np.uint8)).warnings)  # compiles
        for number, path in enumerate(paths, 1):
            try:
                digit = read_digit(path)
            except DataError as error:
                failed += 1
                print(printable(f"error: {error}"), file=sys.stderr)
                if self.json:
                    print(json.dumps({"file": str(path), "error": str(error)}), flush=True)
                continue
            if digit.warning:
                print_warnings([f"{path}: {digit.warning}"])
            if self.save_preprocessed:
                name = f"{number:04d}-{path.stem}.png"
                target = user_path(self.save_preprocessed)
                with writing(target, "--save_preprocessed"):
                    target.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(digit.image[..., 0]).save(target / name)
            (probabilities,) = predictor(digit.image[None]).mean.tolist()
            names = run.data.class_names
            print(self._answer(path, probabilities, names, digit.warning), flush=True)
        if failed:
            count = f"{failed} of {len(paths)}"
            raise DataError(f"pictures without an answer: {count}; the lines above say why")

    def _run_and_pictures(self) -> tuple[Path, list[Path]]:
        """The run's folder and the pictures that `paths` name."""
        folder, named = PRETRAINED, list(map(user_path, self.paths))
        # Not Path's own tests, which raise for names that are too long.
        if named and os.path.isfile(named[0] / CONFIG):
            folder = named.pop(0)
        elif len(named) > 1 and not os.path.exists(named[0]):
            raise UsageError(f"{named[0]} is neither a run nor a picture; name a run's folder")
        for path in named:
            if has_begun(path):
                raise UsageError(f"{path} is a run; name one run, before the pictures")
        if not named:
            raise UsageError("no picture is named; name files, or folders of them")
        return folder, [file for path in named for file in _files_of(path)]

    def _answer(
        self, path: Path, probabilities: list[float], names: Sequence[str], warning: str
    ) -> str:
        if self.json:
            label = int(np.argmax(probabilities))
            found = {"file": str(path), "label": label, "name": names[label], "warning": warning}
            found |= {"probability": probabilities[label], "probabilities": probabilities}
            return json.dumps(found)
        width = max(map(len, names))
        best = sorted(zip(probabilities, names, strict=True), reverse=True)[:2]
        cells = [f"{name:{width}s}  {percent(probability):>8s}  " for probability, name in best]
        return "".join([*cells, printable(str(path))])
