"""The 1,797 handwritten digits that scikit-learn ships: real data with no download."""

import numpy as np

from mnist_jax.data.split import Split
from mnist_jax.errors import DataError

VERSION = "1.0.0"  # of the enlarging below; another method needs another number
TRAIN_COUNT = 1_437
TEST_COUNT = 360


def load() -> tuple[Split, Split]:
    """Returns train (1,437) and test (360), enlarged to MNIST's format.

    The originals are 8x8 counts of ink in 0..16 and fill their frame, as an MNIST digit fills the
    20x20 box in the middle of its 28x28. So each is scaled to 20x20 (bicubic), from 0..16 to
    0..255, and given a border of 4.

    The first 1,437 in file order are train, the last 360 test. Nothing is shuffled: the digits of
    a writer stand together, so nearly all test digits are by people the model has never seen, as
    in MNIST itself. A shuffled split would let it recognise the hand and flatter the accuracy.

    Raises:
        DataError: scikit-learn is not installed.
    """
    try:
        from PIL import Image
        from sklearn.datasets import load_digits  # takes a second: only when needed
    except ImportError as error:
        raise DataError(
            f"the digits come with scikit-learn, which is not installed ({error}); "
            "pip install scikit-learn pillow, or choose --dataset=mnist"
        ) from error
    cells, label = load_digits(return_X_y=True)  # (1797, 64) in 0..16, (1797,)
    image = np.zeros((len(cells), 28, 28, 1), np.uint8)
    for i, ink in enumerate(cells.astype(np.float32).reshape(-1, 8, 8) * (255 / 16)):
        large = Image.fromarray(ink).resize((20, 20), Image.Resampling.BICUBIC)
        image[i, 4:24, 4:24, 0] = np.clip(np.rint(np.asarray(large)), 0, 255)  # bicubic overshoots
    label = label.astype(np.int32)
    return (
        Split(image[:TRAIN_COUNT], label[:TRAIN_COUNT]),
        Split(image[TRAIN_COUNT:], label[TRAIN_COUNT:]),
    )
