"""Dataset: the images and labels of a run in memory, checked where they enter."""

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from mnist_jax.errors import DataError, UsageError

MAX_CLASSES = 100_000  # without names for them; a larger label is a mistake


class Split(NamedTuple):
    """Images and their labels, in a fixed order."""

    image: np.ndarray  # (n, height, width, channels) uint8
    label: np.ndarray  # (n,) int32 from 0


class DataSpec(NamedTuple):
    """What a run's folder records of its data set."""

    name: str
    image_shape: tuple[int, int, int]  # height, width, channels
    class_names: tuple[str, ...]  # by label
    sha256: str | None = None  # of the arrays, if they are the user's own

    @property
    def num_classes(self) -> int:
        """The number of classes."""
        return len(self.class_names)


@dataclass(frozen=True, eq=False, repr=False)
class Dataset:
    """Training and test images, read-only, and where they came from."""

    name: str
    train: Split
    test: Split
    source: str  # where the arrays came from, in a few words
    warnings: tuple[str, ...]  # what the user should know, such as a substitution
    class_names: tuple[str, ...]
    validation: Split | None = None  # held out of `train`
    sha256: str | None = None  # of the arrays, if they are the user's own
    made: tuple[Split, Split] | None = None  # the train and test that it was made with

    def __post_init__(self):
        # No record would show a change in place.
        for array in itertools.chain(*self.made or (), self.validation or ()):
            array.flags.writeable = False

    @classmethod
    def from_arrays(
        cls,
        name: str,
        x_train: Any,
        y_train: Any,
        x_test: Any,
        y_test: Any,
        class_names: Sequence[str] = (),
    ) -> "Dataset":
        """A data set of your own arrays.

        Args:
            name: for the run's folder and its tables.
            x_train, x_test: images (n, height, width) or (n, height, width, channels), of whole
                numbers 0..255, or of bools or floats 0..1, which become multiples of 1/255.
            y_train, y_test: labels (n,), whole numbers from 0.
            class_names: by label; by default the numbers up to the largest training label.

        Raises DataError if the arrays are not so.
        """
        if "/" in name or name.endswith(".npz"):
            raise DataError(f"the name {name!r} looks like a path; choose another name")
        train, test = _split("training", x_train, y_train), _split("test", x_test, y_test)
        if train.image.shape[1:] != test.image.shape[1:]:
            shapes = f"{train.image.shape[1:]} and {test.image.shape[1:]}"
            raise DataError(f"{name}: training and test images differ in shape: {shapes}")
        if isinstance(class_names, set):
            raise DataError(f"{name}: class_names is a set, which has no order; pass a list")
        count = len(class_names) or min(int(train.label.max()) + 1, MAX_CLASSES)
        if (largest := max(train.label.max(), test.label.max())) >= count:
            allowed = f"{count} classes: allowed are 0 to {count - 1}"
            raise DataError(f"{name}: a label is {largest}, and there are {allowed}")
        names = tuple(map(str, class_names if len(class_names) else range(count)))
        digest = hashlib.sha256()
        for array in (*train, *test):
            digest.update(f"{array.dtype} {array.shape}\n".encode())
            digest.update(array.tobytes())
        warnings = () if 0 in train.label else (f"{name}: no training label is 0, the first class",)
        own = {"sha256": digest.hexdigest(), "made": (train, test)}
        return cls(name, train, test, "arrays", warnings, names, **own)

    def __repr__(self) -> str:
        train, test = len(self.train.label), len(self.test.label)
        return f"{self.name}: {train:,} train, {test:,} test images, {self.source}"

    @property
    def has_its_arrays(self) -> bool:
        """Whether it has the arrays of its name and SHA-256: `dataclasses.replace` changes any."""
        return self.made is not None and self.train is self.made[0] and self.test is self.made[1]

    @property
    def spec(self) -> DataSpec:
        """Name, shape and classes."""
        shape: Any = self.train.image.shape[1:]
        return DataSpec(self.name, shape, self.class_names, self.sha256)


def _split(part: str, images: Any, labels: Any) -> Split:
    """Images as uint8 (n, height, width, channels), labels as int32 (n,)."""
    try:
        image, label = np.asarray(images), np.asarray(labels)
    except ValueError as error:
        raise DataError(f"the {part} images or labels differ in shape ({error})") from error
    if image.ndim == 3:
        image = image[..., np.newaxis]
    found = f"the {part} images are {image.dtype}{list(image.shape)}"
    if image.ndim != 4 or not image.size or image.dtype.kind not in "uifb":
        raise DataError(f"{found}; allowed are numbers (n, height, width, channels)")
    _, height, width, channels = image.shape
    if height in (1, 3) and width == channels > 4:
        raise DataError(f"{found}; channels come last: pass np.moveaxis(images, 1, -1)")
    low, high, top = image.min(), image.max(), 1 if image.dtype.kind in "fb" else 255
    if not (low >= 0 and high <= top) or (high == 1 < top):  # also for NaN, and nearly black
        allowed = "whole numbers 0 to 255, or floats or bools 0 to 1 (0 and 1 alone as bools)"
        problem = f"the {part} images are {image.dtype} from {low} to {high}"
        raise DataError(f"{problem}; allowed are {allowed}")
    if top == 1:
        image = np.rint(image * 255.0)
    if label.shape == (len(image), 1):
        label = label[:, 0]
    if label.shape != (len(image),) or label.dtype.kind not in "ui":
        kind = f"{label.dtype}{list(label.shape)}"
        raise DataError(f"the {part} labels are {kind}; allowed are whole numbers ({len(image)},)")
    if not 0 <= label.min() <= label.max() < 2**31:
        span = f"from {label.min()} to {label.max()}"
        raise DataError(f"the {part} labels are {span}; labels are whole numbers from 0")
    return Split(image.astype(np.uint8), label.astype(np.int32))


def hold_out(train: Split, count: int) -> tuple[Split, Split]:
    """Takes `count` examples out of `train`, the same share of every class.

    The choice depends on the labels and the count alone, so that runs with other flags or another
    seed are compared on the same images. Returns the remaining and the held-out examples, each in
    the order of `train`.

    Raises UsageError if `count` is not from 1 to one less than the number of examples.
    """
    size = len(train.label)
    if not 0 < count < size:
        raise UsageError(f"validation is {count}; allowed is 0 to {size - 1}; change --validation")
    rng = np.random.default_rng(0)
    place = np.empty(size)
    for label in np.unique(train.label):
        members = np.flatnonzero(train.label == label)
        # Evenly spaced in [0, 1), in random order, so the first `count` places of all classes
        # hold an equal share of each, to within one example.
        place[members] = (rng.permutation(len(members)) + rng.uniform()) / len(members)
    held_out = np.zeros(size, bool)
    held_out[np.argsort(place, kind="stable")[:count]] = True
    rest = Split(train.image[~held_out], train.label[~held_out])
    return rest, Split(train.image[held_out], train.label[held_out])
