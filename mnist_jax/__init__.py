"""MNIST digit classification in functional JAX and Flax.

>>> from mnist_jax import Config, fit
>>> result = fit(Config(model="logistic", dataset="digits", epochs=5))  # doctest: +SKIP
>>> result.record["test_correct"], result.record["test_count"]  # doctest: +SKIP
"""

# ruff: noqa: E402
import importlib.metadata
import signal
import sys
import threading

# While a command imports JAX, Ctrl-C ends it at once; a traceback would look like a bug.
_is_command = (
    "".join(sys.argv[:1]).endswith(("-m", "mnist-jax", "train.py"))
    and threading.current_thread() is threading.main_thread()
    and signal.getsignal(signal.SIGINT) is signal.default_int_handler
)
if _is_command:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from mnist_jax.callbacks import Callback, Result
from mnist_jax.config import Config
from mnist_jax.data import DATASETS, Dataset, load_dataset
from mnist_jax.data.augment import AUGMENTATIONS
from mnist_jax.inference.evaluate import evaluate
from mnist_jax.inference.predict import predict
from mnist_jax.inference.restore import load_run
from mnist_jax.losses import LOSSES
from mnist_jax.models import MODELS
from mnist_jax.optimizer import OPTIMIZERS
from mnist_jax.presets import PRESETS
from mnist_jax.runs.run_dir import save_run
from mnist_jax.training import fit

if _is_command:
    signal.signal(signal.SIGINT, signal.default_int_handler)

__all__ = [
    "AUGMENTATIONS",
    "DATASETS",
    "LOSSES",
    "MODELS",
    "OPTIMIZERS",
    "PRESETS",
    "Callback",
    "Config",
    "Dataset",
    "Result",
    "evaluate",
    "fit",
    "load_dataset",
    "load_run",
    "predict",
    "save_run",
]

try:
    __version__ = importlib.metadata.version("mnist-jax")
except importlib.metadata.PackageNotFoundError:  # a checkout that is not installed
    __version__ = "unknown"
