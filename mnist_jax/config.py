"""Config: what a run is made of. Its fields are the flags of `train.py`, with their help texts."""

import dataclasses
import json
import math
import re
import shlex
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mnist_jax.atomic_io import user_path
from mnist_jax.data import DATASETS, DEFAULT_DATA_DIR
from mnist_jax.errors import UsageError, unknown_choice
from mnist_jax.models import ACTIVATIONS, MODELS

FORMAT_VERSION = 2  # of config.json and of a run's folder

OFF = ("shift", "rotation", "scale", "label_smoothing", "weight_decay", "ema_decay")
TUTORIAL = {"epochs": 10, "batch_size": 100, "learning_rate": 1e-3, "schedule": "constant"}
FAST = {"epochs": 4, "learning_rate": 1.5e-3, "schedule": "onecycle", "shift": 2.0}
# The values of the fields that are not given.
PRESETS: dict[str, dict[str, Any]] = {"tutorial": TUTORIAL | dict.fromkeys(OFF, 0.0)}
PRESETS["fast"] = PRESETS["tutorial"] | FAST
PRESETS["best"] = PRESETS["fast"] | {"epochs": 10, "rotation": 10.0, "scale": 0.1}
MODEL_OPTIONS = ("hidden_sizes", "dropout", "activation")  # fields that a model's class may have
PLATFORMS = ("auto", "cpu", "gpu", "tpu")
ADDRESS = re.compile(r"(\[[0-9a-fA-F:.]+\]|[^\s:\[\]]+):\d{1,5}")


def _runtime(default: Any) -> Any:
    """A field that says where or how a run executes; it changes no number."""
    return dataclasses.field(default=default, metadata={"runtime": True})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """A training run, as it was asked for. None means: take the preset's or the model's value.

    `resolve` fills these values in. `dataclasses.replace` changes any field, the preset and the
    model included. `python train.py --help` explains the fields.

    Raises:
        UsageError: a value is not allowed; the message says what is.
    """

    model: str = "cnn"
    """The network: logistic, mlp or cnn."""

    dataset: str = "auto"
    """The images: mnist, fashion_mnist, kmnist, digits (1,797 images that come with scikit-learn),
    or auto: mnist, or digits with a warning if MNIST cannot be downloaded."""

    preset: str = "tutorial"
    """The recipe. It sets every value of the recipe that you do not give. tutorial: Adam at a
    constant rate for 10 epochs. fast: 4 epochs of shifted images with a one-cycle rate. best: 10
    epochs, images also rotated and scaled."""

    epochs: int | None = None
    """Passes over the training images. None: the preset's (10; fast 4)."""

    batch_size: int | None = None
    """Images per training step; fewer in an epoch's last batch. None: the preset's (100)."""

    learning_rate: float | None = None
    """Adam's step size; with a schedule, its highest value. None: the preset's (0.001; fast and
    best 0.0015)."""

    schedule: str | None = None
    """The learning rate over the run: constant, cosine (decays to 0) or onecycle (rises for the
    first 30 % of the steps, then decays). None: the preset's."""

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

    label_smoothing: float | None = None
    """Fraction of each training label that is spread over all classes; 0 or more, below 1. None:
    the preset's (0)."""

    weight_decay: float | None = None
    """Decoupled weight decay of the kernels, as in AdamW. None: the preset's (0)."""

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
    """Activation after each hidden layer of the MLP: relu or sigmoid. None: the model's own."""

    precision: str = "float32"
    """Precision of matrix products: float32, tf32 (NVIDIA GPUs from Ampere on) or bfloat16 (layers
    compute in bfloat16, parameters stay float32)."""

    deterministic: bool = False
    """Give the same bits from the same seed on a GPU too, at some cost in speed. A CPU and a TPU
    always do."""

    max_steps: int | None = None
    """End the run after this many steps, within an epoch or not. None: after the last epoch."""

    data_dir: Path = _runtime(DEFAULT_DATA_DIR)
    """Folder for prepared and decoded data sets."""

    manual_dir: Path | None = _runtime(None)
    """Folder with the data set's four original .gz files, for a machine without a network."""

    workdir: Path | None = _runtime(None)
    """Folder for the run's files. Give the folder of an interrupted run to resume it. None:
    runs/<dataset>-<model>-<UTC time>."""

    platform: str = _runtime("auto")
    """Platform to run on: cpu, gpu, tpu, or auto, the best that JAX finds."""

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
    """Folder for train.py's compilation cache, which makes the next start faster. None: no cache.
    From Python, set jax_compilation_cache_dir yourself."""

    tensorboard: bool = _runtime(False)
    """Also write TensorBoard logs into the run's folder."""

    report: bool = _runtime(False)
    """Write report.html, a page with figures of the run, into the run's folder at the end."""

    profile: Path | None = _runtime(None)
    """Write a profiler trace of one call of the training program into this folder, for TensorBoard
    or Perfetto, and list the ten costliest operations. None: no trace."""

    debug: bool = _runtime(False)
    """Show the traceback of an error."""

    def __post_init__(self):
        for name, value in vars(self).items():
            if value is None and getattr(Config, name) is None:
                continue
            if name in CHOICES and value not in CHOICES[name]:
                raise unknown_choice(name, value, CHOICES[name])
            if name in RULES:
                allowed, legal = RULES[name]
                if not allowed(value):
                    raise UsageError(f"{name} is {value!r}; allowed is {legal}; change --{name}")
            if name in MODEL_OPTIONS and name not in _model_defaults(self.model):
                raise UsageError(f"the model {self.model!r} has no {name}; leave --{name} out")
        if self.seed + (self.seeds or 1) > 2**32:
            raise UsageError(f"seeds is {self.seeds}; seed + seeds may be up to 4294967296")
        explicit = self.coordinator not in (None, "auto")
        if {self.num_processes is not None, self.process_id is not None} != {explicit}:
            raise UsageError(
                "--coordinator=HOST:PORT, --num_processes and --process_id belong together; give "
                "all three or none"
            )
        if (index := self.process_id or 0) > (last := (self.num_processes or 1) - 1):
            raise UsageError(f"process_id is {index}; allowed is 0 to {last}")

    def resolve(self) -> "Config":
        """The same run with every value filled in: from the preset, the model, and ~ in paths."""
        values = PRESETS[self.preset] | _model_defaults(self.model)
        values |= {name: value for name, value in vars(self).items() if value is not None}
        for name, value in values.items():
            if name in PATHS:
                values[name] = user_path(value)
            elif isinstance(value, np.generic):  # as from np.logspace
                values[name] = value.item()
            elif isinstance(value, list):
                values[name] = tuple(value)
        return dataclasses.replace(self, **values)

    def model_options(self) -> dict[str, Any]:
        """The arguments of the model's class."""
        config = self.resolve()
        return {name: getattr(config, name) for name in _model_defaults(self.model)}

    def all_seeds(self) -> range:
        """The seeds of all networks of the run."""
        return range(self.seed, self.seed + (self.seeds or 1))

    def hyperparameters(self) -> dict[str, Any]:
        """The values that can change a number in the run, as JSON can hold them."""
        runtime = {f.name for f in dataclasses.fields(self) if "runtime" in f.metadata}
        values = self.resolve().to_json().items()
        return {name: value for name, value in values if name not in runtime | {"version"}}

    def defaults(self) -> "Config":
        """This model and preset with nothing else given."""
        return Config(model=self.model, preset=self.preset).resolve()

    def command_line(self) -> str:
        """The shortest shell command that trains the same, in a folder of its own."""
        config, default = self.resolve(), self.defaults()
        words = ["python", "train.py", f"--model={self.model}"]
        if self.preset != "tutorial":
            words.append(f"--preset={self.preset}")
        # Some runtime fields decide which data and which kind of device are used.
        for name in (*self.hyperparameters(), "data_dir", "manual_dir", "platform"):
            value = getattr(config, name)
            if value == getattr(default, name):
                continue
            if isinstance(value, bool):
                words.append(f"--{name}" if value else f"--no_{name}")
            elif isinstance(value, tuple):
                words += [f"--{name}", *map(str, value)]
            else:
                words.append(f"--{name}={value}")
        return shlex.join(words)

    def to_json(self) -> dict[str, Any]:
        """All fields as JSON can hold them, with the format's version."""
        values = json.loads(json.dumps(dataclasses.asdict(self), default=str))
        return {"version": FORMAT_VERSION, **values}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Config":
        """The resolved Config that `to_json` turned into `values`.

        Raises:
            UsageError: the values are of another format version, or one is not allowed.
            TypeError: a field is unknown.
        """
        given = dict(values)
        if (version := given.pop("version", 1)) != FORMAT_VERSION:
            raise UsageError(
                f"the run has format version {version!r} and this program reads {FORMAT_VERSION}; "
                "use the version of mnist_jax that made it, or train again"
            )
        return cls(**given).resolve()


PATHS = ("data_dir", "manual_dir", "workdir", "compilation_cache", "profile")


def _model_defaults(model: str) -> dict[str, Any]:
    """The model's own values of the options that its class has."""
    fields = dataclasses.fields(MODELS[model])
    return {field.name: field.default for field in fields if field.name in MODEL_OPTIONS}


def _is_int(value: Any, least: int, most: float = math.inf) -> bool:
    is_int = isinstance(value, int | np.integer) and not isinstance(value, bool)
    return is_int and bool(least <= value <= most)


def _is_number(value: Any) -> bool:
    # A larger whole number overflows a float.
    return isinstance(value, float | np.floating) or _is_int(value, -(2**63), 2**63)


CHOICES: dict[str, Collection[str]] = {
    "model": MODELS,
    "dataset": ("auto", *DATASETS),
    "preset": PRESETS,
    "precision": ("float32", "tf32", "bfloat16"),
    "platform": PLATFORMS,
    "schedule": ("constant", "cosine", "onecycle"),
    "activation": ACTIVATIONS,
}
Rule = tuple[Callable[[Any], Any], str]  # a test of a value, and what it allows in words
COUNT: Rule = (lambda n: _is_int(n, 1), "a whole number, 1 or more")
INDEX: Rule = (lambda n: _is_int(n, 0), "a whole number, 0 or more")
FRACTION: Rule = (lambda x: _is_number(x) and 0 <= x < 1, "0 or more and less than 1")
AMOUNT: Rule = (lambda x: _is_number(x) and 0 <= x < math.inf, "any finite number from 0")
SWITCH: Rule = (lambda x: isinstance(x, bool), "true or false")
RULES: dict[str, Rule] = {
    **dict.fromkeys(("epochs", "batch_size", "max_steps", "num_processes"), COUNT),
    **dict.fromkeys(("validation", "process_id"), INDEX),
    **dict.fromkeys(("shift", "rotation", "scale", "weight_decay"), AMOUNT),
    **dict.fromkeys(("label_smoothing", "ema_decay", "dropout"), FRACTION),
    **dict.fromkeys(("normalize", "deterministic", "tensorboard", "report", "debug"), SWITCH),
    "coordinator": (lambda a: a == "auto" or ADDRESS.fullmatch(a), "auto or HOST:PORT"),
    "seed": (lambda n: _is_int(n, 0, 2**32 - 1), "0 to 4294967295"),
    "seeds": (lambda n: _is_int(n, 1, 100_000), "a whole number, 1 to 100000"),
    "learning_rate": (lambda x: AMOUNT[0](x) and x > 0, "any finite number above 0"),
    "steps_per_call": (lambda n: n == "auto" or _is_int(n, 1), f"'auto' or {COUNT[1]}"),
    "devices": (lambda n: n == "all" or _is_int(n, 1), f"'all' or {COUNT[1]}"),
    "checkpoint_every": (lambda s: _is_number(s) and s >= 0, "any number of seconds from 0"),
    "hidden_sizes": (
        lambda v: isinstance(v, tuple | list) and all(_is_int(n, 1, 1_000_000) for n in v),
        "whole numbers, 1 to 1000000",
    ),
}
