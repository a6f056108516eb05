"""MNIST digit classification in functional JAX and Flax.

>>> from mnist_jax import Config, fit
>>> result = fit(Config(model="logistic", dataset="digits", epochs=5))  # doctest: +SKIP
>>> result.record["test_correct"], result.record["test_count"]  # doctest: +SKIP
"""

import importlib.metadata

from mnist_jax.callbacks import Callback, Result
from mnist_jax.config import Config
from mnist_jax.data import DATASETS, Dataset, load_dataset
from mnist_jax.models import MODELS
from mnist_jax.training import fit

__all__ = [
    "DATASETS",
    "MODELS",
    "Callback",
    "Config",
    "Dataset",
    "Result",
    "evaluate",
    "fit",
    "load_dataset",
    "load_run",
    "predict",
]


def __getattr__(name):  # TEMPORARY, until inference/ has moved to the new restore.py
    import importlib

    modules = {"evaluate": "evaluate", "predict": "predict", "load_run": "restore"}
    if name not in modules:
        raise AttributeError(name)
    return getattr(importlib.import_module(f"mnist_jax.inference.{modules[name]}"), name)


try:
    __version__ = importlib.metadata.version("mnist-jax")
except importlib.metadata.PackageNotFoundError:  # a checkout that is not installed
    __version__ = "unknown"
