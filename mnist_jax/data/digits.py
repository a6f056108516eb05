"""The 1,797 handwritten digits bundled with scikit-learn: real data without a download."""

import numpy as np

from mnist_jax.data.dataset import Split

VERSION = "1.0.0"  # of the resampling below; it must change when the arrays do
TRAIN_COUNT = 1_437


def load() -> tuple[Split, Split]:
    """Returns train (1,437) and test (360) in MNIST's format.

    The originals are 8 × 8 with values in 0..16 and fill the frame, as an MNIST digit fills the
    central 20 × 20 of its 28 × 28. Each is resized to 20 × 20 (bicubic), scaled to 0..255 and
    given a border of 4.

    The last 360 in file order are test, because the file groups digits by writer: as in MNIST,
    nearly all test digits are by writers that are not in train.
    """
    from PIL import Image
    from sklearn.datasets import load_digits  # takes a second: only when needed

    pixels, label = load_digits(return_X_y=True)  # (1797, 64) in 0..16, (1797,)
    image = np.zeros((len(pixels), 28, 28, 1), np.uint8)
    for i, digit in enumerate(pixels.astype(np.float32).reshape(-1, 8, 8) * (255 / 16)):
        large = Image.fromarray(digit).resize((20, 20), Image.Resampling.BICUBIC)
        image[i, 4:24, 4:24, 0] = np.clip(np.rint(np.asarray(large)), 0, 255)  # bicubic overshoots
    label = label.astype(np.int32)
    train = Split(image[:TRAIN_COUNT], label[:TRAIN_COUNT])
    return train, Split(image[TRAIN_COUNT:], label[TRAIN_COUNT:])
