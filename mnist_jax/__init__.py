"""MNIST digit classification in functional JAX and Flax.

>>> from mnist_jax import Config, fit
>>> result = fit(Config(model="logistic", dataset="digits", epochs=5))  # doctest: +SKIP
>>> result.record["test_correct"], result.record["test_count"]  # doctest: +SKIP
"""

from mnist_jax.config import Config
from mnist_jax.data import Dataset, load_dataset
from mnist_jax.evaluation import evaluate
from mnist_jax.models import MODELS
from mnist_jax.prediction import predict
from mnist_jax.training import Result, fit

__all__ = [
    "MODELS",
    "Config",
    "Dataset",
    "Result",
    "evaluate",
    "fit",
    "load_dataset",
    "predict",
]
