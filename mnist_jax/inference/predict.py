"""What a saved model says of images: those of a data set, and people's pictures."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from mnist_jax.config import checked_path
from mnist_jax.errors import DataError, UsageError
from mnist_jax.inference.preprocess import Digit, read_digit
from mnist_jax.inference.restore import Classifier, LoadedRun, finite_members, load_run, none_left
from mnist_jax.parallel import mesh as devices

# Images a call of the program. On a CPU as fast as more, and one alone is answered in a moment.
BATCH_SIZE = 32


def predict(
    workdir: str | Path,
    images: str | Path | Sequence[str | Path] | np.ndarray,
    *,
    platform: str | None = None,
) -> np.ndarray:
    """The probabilities that a run's model gives images; the mean of its members', if it has many.

    >>> from mnist_jax import predict
    >>> predict("runs/mnist-cnn", "seven.png").argmax(1)  # doctest: +SKIP
    array([7])

    Args:
        workdir: the run's folder.
        images: a person's picture or several, by their files, prepared as `images.read_digit`
            does; or an array (n, 28, 28, 1) uint8 as data sets hold them, taken as it is.
        platform: the device that computes; None for the run's own.

    Returns:
        (n, classes) float32, the classes in the order of `data.class_names`.

    Raises:
        UsageError: the folder holds no run, or there are no such images.
        CheckpointError: the run cannot be used.
        DataError: a picture that cannot be read, or shows no digit.
        DeviceError: the platform is absent.
        NonFiniteError: what the model gives, or every member, is not finite.
    """
    run = load_run(checked_path("workdir", workdir))
    if not isinstance(images, np.ndarray):
        paths = [images] if isinstance(images, str | Path) else images
        images = np.array([read_digit(path).image for path in paths], np.uint8)
    if images.shape != (len(images) or 1, 28, 28, 1) or images.dtype != np.uint8:
        raise UsageError(
            f"images are {images.dtype}{list(images.shape)}; allowed are one or more paths of "
            "pictures, or an array uint8[n, 28, 28, 1]"
        )
    with devices.running_on(platform or run.config.platform, run.config.precision) as device:
        return Predictor(run, device)(images)


class Prediction(NamedTuple):
    """What there is to say of a picture: what it shows and the probabilities, or an error.

    Attributes:
        path: the picture's.
        digit: what was found in it.
        probabilities: (classes,) float32.
        error: why there is neither.
    """

    path: Path
    digit: Digit | None = None
    probabilities: np.ndarray | None = None
    error: DataError | None = None


class Predictor:
    """A saved model, or the mean of an ensemble's members, on a device.

    To be made and called inside `devices.running_on`.

    Attributes:
        notices: members that were left out, and why.
    """

    def __init__(self, run: LoadedRun, device: jax.Device, *, batch_size: int = BATCH_SIZE):
        self.notices: list[str] = []
        self._run = run
        self._classify = Classifier(run, device, batch_size=batch_size)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Images (n, 28, 28, 1) uint8, at least one → probabilities (n, classes) float32.

        Raises:
            NonFiniteError: no member is left whose probabilities are finite.
        """
        finite, left_out = finite_members(self._run, self._classify(images))
        self.notices += [notice for notice in left_out if notice not in self.notices]
        if not finite:
            raise none_left(left_out)
        return np.mean(list(finite.values()), axis=0)

    def answers(self, paths: Sequence[Path]) -> Iterator[Prediction]:
        """Reads the pictures, a batch at a time, and yields an answer to each in their order."""
        for first in range(0, len(paths), BATCH_SIZE):
            batch = [_read(path) for path in paths[first : first + BATCH_SIZE]]
            seen = [answer.digit.image for answer in batch if answer.digit is not None]
            probabilities = iter(self(np.stack(seen)) if seen else ())
            for answer in batch:
                if answer.digit is not None:
                    answer = answer._replace(probabilities=next(probabilities))
                yield answer


def _read(path: Path) -> Prediction:
    try:
        return Prediction(path, digit=read_digit(path))
    except DataError as error:
        return Prediction(path, error=error)
