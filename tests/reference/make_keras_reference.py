"""Writes keras.json: logits, loss and gradients of the three networks as Keras computes them.

    python tests/reference/make_keras_reference.py

Made with Python 3.11.7, TensorFlow 2.21.0, Keras 3.15.1 and NumPy 2.4.6 on a CPU, in float64. The
networks return logits, and the loss takes logits. Dropout is off, because the random generators
differ. Gradients are stored as their norm and their projections onto seeded directions.
"""

import json
import os
import platform
import re
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf
import weights
from keras import layers


def build(name: str) -> keras.Sequential:
    """The tutorial's network, its layers named as in `mnist_jax.models`."""
    network = [keras.Input((28, 28, 1))]
    if name == "cnn":
        network += [
            layers.Conv2D(64, 3, padding="same", activation="relu", name="conv1"),
            layers.Conv2D(64, 3, padding="same", activation="relu", name="conv2"),
            layers.MaxPooling2D(2),
            layers.Conv2D(128, 3, padding="same", activation="relu", name="conv3"),
            layers.Conv2D(256, 3, padding="valid", activation="relu", name="conv4"),
            layers.MaxPooling2D(2),
        ]
    network.append(layers.Flatten())
    hidden_sizes = {"logistic": (), "mlp": (256, 128, 64, 32), "cnn": (512, 256)}[name]
    for i, size in enumerate(hidden_sizes, start=1):
        network.append(layers.Dense(size, activation="relu", name=f"dense{i}"))
        if name == "cnn":
            network.append(layers.Dropout(0.5))
    network.append(layers.Dense(10, name="logits"))
    return keras.Sequential(network, name=name)


def reference(name: str) -> dict[str, object]:
    """What Keras computes from the seeded weights and batch."""
    model = build(name)
    seeded = weights.make_weights(name)
    for layer, values in seeded.items():
        model.get_layer(layer).set_weights([values["kernel"], values["bias"]])
    image, label = weights.make_batch()
    cross_entropy = keras.losses.CategoricalCrossentropy(from_logits=True)
    with tf.GradientTape() as tape:
        logits = model(tf.constant(image), training=False)
        loss = cross_entropy(keras.utils.to_categorical(label, 10), logits)
    gradients = tape.gradient(loss, [v.value for v in model.trainable_variables])
    described: dict[str, dict[str, object]] = {layer: {} for layer in seeded}
    for variable, gradient in zip(model.trainable_variables, gradients, strict=True):
        layer, kind = variable.path.split("/")[-2:]
        if kind not in seeded[layer] or variable.dtype != "float64":
            raise SystemExit(f"expected a kernel or a bias in float64, got {variable}")
        projections = weights.make_probes(gradient.shape) @ gradient.numpy().ravel()
        norm = float(np.linalg.norm(gradient))
        described[layer][kind] = {"norm": norm, "projections": projections.tolist()}
    return {
        "parameters": model.count_params(),
        "logits": logits.numpy().tolist(),
        "loss": float(loss),
        "gradients": described,
    }


def pooling() -> dict[str, object]:
    """Max pooling of activations with ties, and its gradient."""
    activations, cotangent = weights.make_ties()
    x = tf.constant(activations)
    with tf.GradientTape() as tape:
        tape.watch(x)
        pooled = layers.MaxPooling2D(2)(x)
    gradient = tape.gradient(pooled, x, output_gradients=tf.constant(cotangent))
    return {"output": pooled.numpy().tolist(), "gradient": gradient.numpy().tolist()}


if __name__ == "__main__":
    keras.backend.set_floatx("float64")
    versions = {"python": platform.python_version(), "tensorflow": tf.__version__}
    versions |= {"keras": keras.__version__, "numpy": np.__version__}
    models = {name: reference(name) for name in weights.KERNELS}
    content = {"versions": versions, "pooling": pooling(), "models": models}
    text = json.dumps(content, indent=1)
    text = re.sub(r"\[[^][]*\]", lambda row: " ".join(row[0].split()), text)  # a row, a line
    Path(__file__).with_name("keras.json").write_text(text + "\n")
