"""Keras on TensorFlow: `fit` and `evaluate` on NumPy arrays, without or with jit_compile.

A sample is one `fit`, long enough for what each call of it costs once (0.1 s) to be spread thin:
whole epochs for about 2 s, for the CNN steps for about 5 s. Left to itself, Keras 3.15 takes
jit_compile=False on a CPU.
"""

import os

os.environ["KERAS_BACKEND"] = "tensorflow"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras  # pyright: ignore[reportMissingImports]
import tensorflow as tf  # pyright: ignore[reportMissingImports]
from keras import layers  # pyright: ignore[reportMissingImports]

from benchmarks.peer_workers import job as jobs

MIN_SAMPLE_S, MIN_CNN_SAMPLE_S = 1.0, 2.5


def network(model: str) -> keras.Sequential:
    """The tutorial's network of that name, ending in logits."""
    net = [keras.Input((28, 28, 1))]
    if model == "cnn":
        net += [layers.Conv2D(64, 3, padding="same", activation="relu")]
        net += [layers.Conv2D(64, 3, padding="same", activation="relu"), layers.MaxPooling2D(2)]
        net += [layers.Conv2D(128, 3, padding="same", activation="relu")]
        net += [layers.Conv2D(256, 3, activation="relu"), layers.MaxPooling2D(2)]
    net.append(layers.Flatten())
    for size in jobs.HIDDEN_SIZES[model]:
        net.append(layers.Dense(size, activation="relu"))
        if model == "cnn":
            net.append(layers.Dropout(jobs.DROPOUT))
    return keras.Sequential([*net, layers.Dense(jobs.NUM_CLASSES)])


def compiled(model: str, **options: bool) -> keras.Sequential:
    """The network with Adam, the loss and the accuracy."""
    net = network(model)
    net.compile(
        optimizer=keras.optimizers.Adam(jobs.LEARNING_RATE, epsilon=jobs.EPSILON),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        **options,
    )
    return net


def make(job: jobs.Job, data: jobs.Data) -> jobs.Workload:
    """`fit` and `evaluate`, with the mode's jit_compile."""
    data = data.as_float()
    net = compiled(job.model, jit_compile=job.mode == "jit_compile=True")

    epoch = job.train_size // job.batch_size

    def fit(steps: int, epochs: int) -> None:
        image, label = data.image[: steps * job.batch_size], data.label[: steps * job.batch_size]
        net.fit(image, label, batch_size=job.batch_size, epochs=epochs, verbose=0)

    def train(state: None, steps: int) -> None:
        if steps >= epoch:
            fit(epoch, epochs=steps // epoch)
        if steps % epoch:
            fit(steps % epoch, epochs=1)

    def evaluate(state: None, batches: int) -> None:
        n, size = batches * jobs.EVAL_BATCH_SIZE, jobs.EVAL_BATCH_SIZE
        net.evaluate(data.test_image[:n], data.test_label[:n], batch_size=size, verbose=0)

    context = {"keras": keras.__version__, "tensorflow": tf.__version__}
    if job.model == "cnn":
        return jobs.Workload(None, train, evaluate, lambda _: None, context, MIN_CNN_SAMPLE_S)
    return jobs.Workload(None, train, evaluate, lambda _: None, context, MIN_SAMPLE_S, epoch)


if __name__ == "__main__":
    jobs.main(make)
