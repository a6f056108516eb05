"""MNIST digit classification in functional JAX and Flax.

>>> from mnist_jax import Config, fit
>>> result = fit(Config(model="logistic", dataset="digits", epochs=5))  # doctest: +SKIP
>>> result.record["test_correct"], result.record["test_count"]  # doctest: +SKIP
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mnist_jax.config import Config
    from mnist_jax.data import Dataset, load_dataset
    from mnist_jax.inference.evaluate import evaluate
    from mnist_jax.inference.predict import predict
    from mnist_jax.models import MODELS
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

# Imported when first asked for, so that a command can see to Ctrl-C before JAX is.
_MODULES = {
    "Config": "config",
    "Dataset": "data",
    "MODELS": "models",
    "Result": "training",
    "evaluate": "inference.evaluate",
    "fit": "training",
    "load_dataset": "data",
    "predict": "inference.predict",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
