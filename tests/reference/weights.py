"""Seeded weights, batch and probes, the same for Keras and for this package. NumPy is enough."""

import numpy as np

SEED = 1234
BATCH_SIZE = 8
PROBES = 3  # random directions along which each gradient is compared

# Kernel shapes in the order the layers run: (height, width, in, out) of a convolution, (in, out) of
# a dense layer. Keras and Flax use the same layouts and flatten NHWC in the same order.
MLP = {"dense1": (784, 256), "dense2": (256, 128), "dense3": (128, 64), "dense4": (64, 32)}
CNN = {"conv1": (3, 3, 1, 64), "conv2": (3, 3, 64, 64), "conv3": (3, 3, 64, 128)}
CNN |= {"conv4": (3, 3, 128, 256), "dense1": (9216, 512), "dense2": (512, 256)}
KERNELS: dict[str, dict[str, tuple[int, ...]]] = {
    "logistic": {"logits": (784, 10)},
    "mlp": {**MLP, "logits": (32, 10)},
    "cnn": {**CNN, "logits": (256, 10)},
}


def make_weights(model: str) -> dict[str, dict[str, np.ndarray]]:
    """Glorot-uniform kernels and small nonzero biases, `{layer: {kernel, bias}}`."""
    rng = np.random.default_rng([SEED, 0])
    weights = {}
    for layer, shape in KERNELS[model].items():
        field = int(np.prod(shape[:-2]))
        limit = np.sqrt(6 / (field * (shape[-2] + shape[-1])))
        kernel = (2 * rng.random(shape) - 1) * limit
        weights[layer] = {"kernel": kernel, "bias": (2 * rng.random(shape[-1]) - 1) * 0.1}
    return weights


def make_batch() -> tuple[np.ndarray, np.ndarray]:
    """Images (batch, 28, 28, 1) float64 in 0..1 and labels (batch,) int32.

    The images are noise with constant areas, where pooling has ties.
    """
    rng = np.random.default_rng([SEED, 1])
    image = (256 * rng.random((BATCH_SIZE, 28, 28, 1))).astype(np.uint8)
    image[:, :6] = 0
    image[: BATCH_SIZE // 2, 10:22, 8:24] = 200
    image[0] = 0
    label = (10 * rng.random(BATCH_SIZE)).astype(np.int32)
    return image / 255, label


def make_probes(shape: tuple[int, ...]) -> np.ndarray:
    """Random directions, (PROBES, size), of variance 1: an error moves projections by its norm."""
    rng = np.random.default_rng([SEED, 2, *shape])
    return (2 * rng.random((PROBES, int(np.prod(shape)))) - 1) * np.sqrt(3)


def make_ties() -> tuple[np.ndarray, np.ndarray]:
    """Activations (2, 6, 8, 3) with ties in most 2×2 windows, and a cotangent (2, 3, 4, 3)."""
    rng = np.random.default_rng([SEED, 3])
    activations = np.floor(3 * rng.random((2, 6, 8, 3)))
    return activations, 1 + np.arange(2 * 3 * 4 * 3, dtype=np.float64).reshape(2, 3, 4, 3)
