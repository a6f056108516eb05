"""The flags of `train.py`: their types, defaults, help texts and allowed values."""

import dataclasses
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from mnist_jax.data import DEFAULT_DATA_DIR


def _runtime(default: Any) -> Any:
    """A field that says where or how a run executes; a run may resume with another value."""
    return dataclasses.field(default=default, metadata={"runtime": True})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags:
    """The fields of `Config`. A flag's help text is the string below it."""

    # What `--help` shows: the flags by title, the most used first; and, at its end, commands.
    GROUPS: ClassVar[dict[str, str]] = {
        "model": "model hidden_sizes dropout activation init_from fork options",
        "training": "preset epochs batch_size learning_rate schedule optimizer momentum "
        "weight_decay loss label_smoothing ema_decay seed seeds max_steps",
        "data": "dataset validation shift rotation scale augmentation normalize "
        "data_dir manual_dir",
        "device": "platform devices precision deterministic steps_per_call compilation_cache "
        "coordinator num_processes process_id",
        "run": "workdir checkpoint_every allow_code_change debug",
        "output": "report tensorboard log_steps profile",
    }
    EXAMPLES = (
        "--model=mlp --preset=fast --report",
        "--dataset=fashion_mnist --preset=best --workdir=runs/fashion",
        "--model=logistic --learning_rate 0.001 0.003 0.01 --seeds=3",
    )

    model: str = "cnn"
    """The network: logistic, mlp, cnn, or one that --fork adds."""

    dataset: str = "auto"
    """The images: mnist, fashion_mnist, kmnist, digits (1797 images that come with scikit-learn),
    one that --fork adds, the path of an .npz file or of a folder with four IDX files, or auto:
    mnist, or digits with a warning if MNIST cannot be downloaded."""

    preset: str = "tutorial"
    """A named set of values for the flags that you do not give. tutorial: Adam at a
    constant rate for 10 epochs. fast: 4 epochs of shifted images with a one-cycle rate. best: 10
    epochs, images also rotated and scaled. --fork may add others."""

    epochs: int | None = None
    """Passes over the training images. None: the preset's (10; fast 4)."""

    batch_size: int | None = None
    """Images per training step; fewer in an epoch's last batch. Also --bs. None: the preset's
    (100)."""

    optimizer: str | None = None
    """The optimizer: adam, adamw, sgd, lion, muon, or one that --fork adds. None: the preset's
    (adam)."""

    learning_rate: float | tuple[float, ...] | None = None
    """The optimizer's step size; with a schedule, its highest value. Several values train a network
    for each, in one program. Also --lr. None: the preset's (0.001; fast and best 0.0015)."""

    schedule: str | None = None
    """The learning rate over the run: constant, cosine (decays to 0) or onecycle (rises for the
    first 30 % of the steps, then decays). None: the preset's (constant; fast and best onecycle)."""

    normalize: bool = True
    """Scale pixels from 0..255 to 0..1."""

    shift: float | None = None
    """Shift each training image by up to this many pixels along each axis, at random. None: the
    preset's (0; fast and best 2)."""

    rotation: float | None = None
    """Rotate each training image at random, by up to this many degrees. None: the preset's (0; best
    10)."""

    scale: float | None = None
    """Scale each axis of a training image by up to this fraction, at random. None: the preset's (0;
    best 0.1)."""

    augmentation: str | None = None
    """An augmentation of the training batches that --fork adds, such as mixup. None: the preset's
    (none)."""

    loss: str | None = None
    """What training minimises: cross_entropy, or a loss that --fork adds. None: the preset's
    (cross_entropy)."""

    label_smoothing: float | None = None
    """Fraction of each training label that is spread over all classes; 0 or more, below 1. None:
    the loss's own (0)."""

    momentum: float | None = None
    """Momentum of the optimizer sgd. None: the optimizer's own (0)."""

    weight_decay: float | tuple[float, ...] | None = None
    """Decoupled weight decay, as in AdamW; adam's is of the kernels only. Several values train a
    network for each. None: the optimizer's own (adamw 0.0001, lion 0.001, others 0)."""

    ema_decay: float | None = None
    """Evaluate an exponential moving average (EMA) of the parameters with this decay, such as
    0.999. 0: evaluate the parameters themselves. None: the preset's (0)."""

    validation: int = 0
    """Hold out this many training images, the same for every seed, and report on them too."""

    seed: int = 1234
    """Seed of initial weights, image order, augmentation and dropout; 0 to 4294967295."""

    seeds: int | None = None
    """Train this many networks in one program, with consecutive seeds from --seed on, and report
    their mean. None: one network."""

    hidden_sizes: tuple[int, ...] | None = None
    """Units of each hidden dense layer, such as --hidden_sizes 256 128. None: the model's own."""

    dropout: float | None = None
    """Dropout rate of the hidden layers; 0 or more, below 1. None: the model's own."""

    activation: str | None = None
    """Activation after each hidden layer of the MLP: relu, sigmoid, tanh or gelu. None: the
    model's own."""

    init_from: Path | None = None
    """Start from the parameters of a saved run, in this folder. None: random parameters."""

    fork: Path | None = None
    """A Python file that adds models, optimizers, losses, augmentations, data sets or presets.
    None: no such file."""

    options: tuple[str, ...] = ()
    """Other keyword arguments of the model, the optimizer, the loss and so on, such as --options
    b1=0.8, or those of what --fork adds, such as gamma=3 depth=18."""

    precision: str = "float32"
    """Precision of matrix products: float32, tf32 (NVIDIA GPUs from Ampere on) or bfloat16 (layers
    compute in bfloat16, parameters stay float32)."""

    deterministic: bool = False
    """Give the same bits from the same seed on a GPU too, at some cost in speed. CPUs and TPUs
    always do, on machines of one kind."""

    max_steps: int | None = None
    """End the run after this many steps, within an epoch or not. None: after the last epoch."""

    data_dir: Path = _runtime(DEFAULT_DATA_DIR)
    """Folder for downloaded and decoded data sets."""

    manual_dir: Path | None = _runtime(None)
    """Folder with the data set's four original .gz files, for a machine without a network."""

    workdir: Path | None = _runtime(None)
    """Folder for the run's files. Give the folder of an interrupted run to resume it. None:
    runs/<dataset>-<model>-<UTC time>."""

    platform: str = _runtime("auto")
    """Platform to run on: cpu, gpu (cuda, rocm), tpu, or auto, the best that JAX finds. Also
    --device."""

    devices: int | Literal["all"] | None = _runtime(None)
    """Number of devices, or all. Each batch is split over them; with --seeds, the networks are.
    None: one device, or all devices of all processes if there are several."""

    coordinator: str | None = _runtime(None)
    """Train in several processes, which connect to process 0 at this HOST:PORT. auto: take the
    address from Slurm, Open MPI, Kubernetes or a TPU pod. None: a single process."""

    num_processes: int | None = _runtime(None)
    """Number of processes, with --coordinator=HOST:PORT."""

    process_id: int | None = _runtime(None)
    """Index of this process, from 0. Process 0 writes the run's folder and prints."""

    steps_per_call: int | Literal["auto"] = _runtime("auto")
    """Training steps per call of the compiled program. auto: about one second of steps on a CPU, an
    epoch on an accelerator. It does not change the result."""

    checkpoint_every: float = _runtime(60.0)
    """Seconds between checkpoints within an epoch. The run also saves after each epoch, unless a
    save is still in progress. 0: save after every call and every epoch."""

    compilation_cache: Path | None = _runtime(Path("~/.cache/mnist_jax/compiled"))
    """Folder for the compilation cache, which makes the next start faster. None: no cache."""

    tensorboard: bool = _runtime(False)
    """Also write TensorBoard logs into the run's folder."""

    log_steps: bool = _runtime(False)
    """With --tensorboard: also log the loss and the gradient norm of every step."""

    report: bool = _runtime(False)
    """Write report.html, a page with figures of the run, into the run's folder at the end."""

    profile: Path | None = _runtime(None)
    """Write a profiler trace of one call of the training program into this folder, for TensorBoard
    or Perfetto. None: no trace."""

    allow_code_change: bool = _runtime(False)
    """Resume a run even if the code of mnist_jax has changed since it began."""

    debug: bool = _runtime(False)
    """Show the traceback of an error."""


def _is_int(value: Any, least: int, most: float = math.inf) -> bool:
    is_int = isinstance(value, int | np.integer) and not isinstance(value, bool)
    return is_int and bool(least <= value <= most)


def _is_number(value: Any) -> bool:
    # A larger whole number overflows a float.
    return isinstance(value, float | np.floating) or _is_int(value, -(2**63), 2**63)


ADDRESS = re.compile(r"(\[[0-9a-fA-F:.]+\]|[^\s:\[\]]+):[1-9]\d{0,4}")
OPTION = re.compile(r"[a-zA-Z_]\w*=.+", re.DOTALL)
PATHS = ("data_dir", "manual_dir", "workdir", "compilation_cache", "profile", "fork", "init_from")
Rule = tuple[Callable[[Any], Any], str]  # a test of a value, and what it allows in words
COUNT: Rule = (lambda n: _is_int(n, 1), "a whole number, 1 or more")
INDEX: Rule = (lambda n: _is_int(n, 0), "a whole number, 0 or more")
FRACTION: Rule = (lambda x: _is_number(x) and 0 <= x < 1, "0 or more and less than 1")
AMOUNT: Rule = (lambda x: _is_number(x) and 0 <= x < math.inf, "any finite number from 0")
SWITCH: Rule = (lambda x: isinstance(x, bool), "true or false")


def _each(allowed: Callable[[Any], Any], legal: str) -> Rule:
    """A rule for one value, or for several different ones."""

    def all_allowed(value: Any) -> bool:
        values = value if isinstance(value, tuple | list) else (value,)
        return bool(values) and all(map(allowed, values)) and len(set(values)) == len(values)

    return all_allowed, f"{legal}, or several different ones"


RULES: dict[str, Rule] = {
    **dict.fromkeys(("epochs", "batch_size", "max_steps", "num_processes"), COUNT),
    **dict.fromkeys(("validation", "process_id"), INDEX),
    **dict.fromkeys(("shift", "rotation", "scale", "checkpoint_every"), AMOUNT),
    **dict.fromkeys(("label_smoothing", "ema_decay", "dropout", "momentum"), FRACTION),
    **{f.name: SWITCH for f in dataclasses.fields(Flags) if isinstance(f.default, bool)},
    "coordinator": (
        lambda a: a == "auto" or (ADDRESS.fullmatch(str(a)) and int(a.rpartition(":")[2]) < 2**16),
        "auto or HOST:PORT, with a port from 1 to 65535",
    ),
    "seed": (lambda n: _is_int(n, 0, 2**32 - 1), "0 to 4294967295"),
    "seeds": (lambda n: _is_int(n, 1, 100_000), "a whole number, 1 to 100000"),
    "learning_rate": _each(lambda x: AMOUNT[0](x) and x > 0, "any finite number above 0"),
    "weight_decay": _each(*AMOUNT),
    "steps_per_call": (lambda n: n == "auto" or _is_int(n, 1), f"'auto' or {COUNT[1]}"),
    "devices": (lambda n: n == "all" or _is_int(n, 1), f"'all' or {COUNT[1]}"),
    **dict.fromkeys(PATHS, (lambda path: isinstance(path, str | os.PathLike | None), "a path")),
    "data_dir": (lambda path: isinstance(path, str | os.PathLike), "a folder"),
    "dataset": (lambda name: isinstance(name, str), "a string, which is a name or a path"),
    "options": (
        lambda words: (
            isinstance(words, tuple | list)
            and all(OPTION.fullmatch(str(w)) for w in words)
            and len({str(w).partition("=")[0] for w in words}) == len(words)
        ),
        "words such as gamma=3, each name once; in Python a tuple",
    ),
    "hidden_sizes": (
        lambda v: isinstance(v, tuple | list) and v and all(_is_int(n, 1, 1_000_000) for n in v),
        "whole numbers, 1 to 1000000, such as 256 128; in Python a tuple",
    ),
}
