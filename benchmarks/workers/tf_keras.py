"""Keras on TensorFlow: `fit` on batches from arrays in memory.

With or without jit_compile (which Keras 3.15 does not choose by itself on a CPU), one step or an
epoch an execution. A sample is one `fit`, long beside the 0.1 s that each costs, on a
`tf.data.Dataset` that gathers batches as Keras does, without the autotuner's sleeps.
"""

import os

os.environ["KERAS_BACKEND"] = "tensorflow"

import keras  # pyright: ignore[reportMissingImports]
import tensorflow as tf  # pyright: ignore[reportMissingImports]
from keras import layers  # pyright: ignore[reportMissingImports]

from benchmarks.workers import job as jobs


def network(model: str) -> keras.Sequential:
    """The tutorial's network of that name, ending in logits."""
    net = [keras.Input((28, 28, 1))]
    if model == "cnn":
        net += [layers.Conv2D(64, 3, padding="same", activation="relu")]
        net += [layers.Conv2D(64, 3, padding="same"), layers.MaxPooling2D(2), layers.ReLU()]
        net += [layers.Conv2D(128, 3, padding="same", activation="relu")]
        net += [layers.Conv2D(256, 3), layers.MaxPooling2D(2), layers.ReLU()]
    net.append(layers.Flatten())
    for size in jobs.HIDDEN_SIZES[model]:
        net.append(layers.Dense(size, activation="relu"))
        if model == "cnn":
            net.append(layers.Dropout(jobs.DROPOUT))
    return keras.Sequential([*net, layers.Dense(jobs.NUM_CLASSES)])


def make(job: jobs.Job, data: jobs.Data) -> jobs.Workload:
    """`fit`, compiled as the mode says."""
    data = data.as_float()
    epoch = job.train_size // job.batch_size
    net = network(job.model)
    net.compile(
        optimizer=keras.optimizers.Adam(jobs.LEARNING_RATE, epsilon=jobs.EPSILON),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        jit_compile=job.mode in (jobs.FIT_JIT, jobs.EPOCH_JIT),
        steps_per_execution=epoch if job.mode in (jobs.EPOCH, jobs.EPOCH_JIT) else 1,
    )
    image, label = tf.constant(data.image), tf.constant(data.label)
    index = data.order[: epoch * job.batch_size].reshape(epoch, job.batch_size)
    batches = tf.data.Dataset.from_tensor_slices(index)
    batches = batches.map(lambda i: (tf.gather(image, i), tf.gather(label, i))).prefetch(2)
    options = tf.data.Options()
    options.autotune.enabled = False
    batches = batches.with_options(options)

    def train(state: None, steps: int) -> None:
        for length, epochs in ((epoch, steps // epoch), (steps % epoch, 1)):  # whole epochs; a part
            if length and epochs:
                net.fit(batches.take(length), epochs=epochs, verbose=0)

    context = {"keras": keras.__version__, "tensorflow": tf.__version__}
    unit = 1 if job.model == "cnn" else epoch  # a sample of the CNN is a part of an epoch
    return jobs.Workload(train=train, context=context, unit=unit)
