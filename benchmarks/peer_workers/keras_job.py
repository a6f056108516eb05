"""The job of `train.py --model=logistic` as a Keras script: for `benchmarks.startup`.

python -m benchmarks.peer_workers.keras_job DATA.npz EPOCHS BATCH_SIZE
"""

import sys

import numpy as np

from benchmarks.peer_workers import tf_keras


def main(path: str, epochs: int, batch_size: int) -> None:
    """Loads, trains with an evaluation after every epoch, evaluates and prints."""
    with np.load(path) as arrays:
        image, label, test_image, test_label = (arrays[f"arr_{i}"] for i in range(4))
    image, test_image = (x.astype(np.float32) / 255 for x in (image, test_image))
    tf_keras.keras.utils.set_random_seed(1234)
    net = tf_keras.compiled("logistic")
    test = test_image, test_label
    net.fit(image, label, batch_size=batch_size, epochs=epochs, validation_data=test, verbose="2")
    loss, accuracy = net.evaluate(*test, batch_size=tf_keras.jobs.EVAL_BATCH_SIZE, verbose=0)
    print(f"test loss: {loss:.4f}, test accuracy: {100 * accuracy:.2f} %")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
