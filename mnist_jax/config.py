"""What a run is made of: one frozen, validated object. The flags are made from its fields."""

import dataclasses
import math
import re
import shlex
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mnist_jax import atomic_io as storage
from mnist_jax.data import DATASETS, DEFAULT_DATA_DIR
from mnist_jax.errors import UsageError, unknown_choice
from mnist_jax.models import ACTIVATIONS, MODELS

# A recipe's values stand in for the fields of the same names that are not given.
PRESETS: dict[str, dict[str, Any]] = {
    "tutorial": {
        "epochs": 10,
        "batch_size": 100,
        "learning_rate": 1e-3,
        "schedule": "constant",
        "normalize": True,
        "shift": 0.0,
        "rotation": 0.0,
        "scale": 0.0,
        "label_smoothing": 0.0,
        "weight_decay": 0.0,
        "ema_decay": 0.0,
    },
}
PRESETS["fast"] = PRESETS["tutorial"] | {
    "epochs": 4,
    "learning_rate": 1.5e-3,
    "schedule": "onecycle",
    "shift": 2.0,
}
PRESETS["best"] = PRESETS["fast"] | {"epochs": 10, "rotation": 10.0, "scale": 0.1}
SCHEDULES = ("constant", "cosine", "onecycle")
MODEL_OPTIONS = ("hidden_sizes", "dropout", "activation")  # that a model's class may have as well
PLATFORMS = ("auto", "cpu", "gpu", "tpu")
ADDRESS = re.compile(r"(\[[0-9a-fA-F:.]+\]|[^\s:\[\]]+):(\d{1,5})")


def _from_preset() -> Any:
    """A field that takes the preset's value unless it is given."""
    return dataclasses.field(default=None)


def _execution(default: Any) -> Any:
    """A field that says where or how a run goes, and cannot change a number in it."""
    return dataclasses.field(default=default, metadata={"execution": True})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """A training run. Once made, it is valid, and every field holds the value that will be used.

    So `dataclasses.replace` leaves the recipe as it is: for another preset or model make another
    Config. `python train.py --help` explains the fields.

    Raises:
        UsageError: a value is not allowed; the message says what is.
    """

    model: str = "cnn"
    """The network: logistic, mlp or cnn."""

    dataset: str = "auto"
    """The images: mnist, fashion_mnist, kmnist, digits (1,797 that come with scikit-learn), or
    auto: mnist where it can be had, otherwise digits, with a notice."""

    preset: str = "tutorial"
    """The recipe: what is not given is set by it. tutorial: the original's, Adam at a constant rate.
    fast: four epochs of shifted images, the rate rising and falling. best: ten, the images turned
    and stretched as well."""

    epochs: int = _from_preset()
    """Passes over the training images."""

    batch_size: int = _from_preset()
    """Images a training step. The last batch of an epoch may be smaller and is trained on too."""

    microbatches: int = 1
    """Compute the gradient of a batch in so many equal parts and sum these in one order, so that
    on CPUs the parameters have the same bits on any number of devices that divides it. A power of
    two."""

    learning_rate: float = _from_preset()
    """Adam's step size; with a --schedule that changes it, the highest."""

    schedule: str = _from_preset()
    """How the learning rate goes: constant, cosine (down to 0) or onecycle (up for the first 30 %
    of the steps, then down)."""

    normalize: bool = _from_preset()
    """Scale pixels from 0..255 to 0..1."""

    shift: float = _from_preset()
    """Move each training image by up to this many pixels, at random, along each axis."""

    rotation: float = _from_preset()
    """Turn each training image by up to this many degrees, at random."""

    scale: float = _from_preset()
    """Stretch or shrink each axis of a training image by up to this share, such as 0.1, at
    random."""

    label_smoothing: float = _from_preset()
    """Share of each training label that is spread over all classes, 0 or more and less than 1."""

    weight_decay: float = _from_preset()
    """Share of itself that each kernel loses at a step, times the learning rate (as AdamW does)."""

    ema_decay: float = _from_preset()
    """Evaluate an exponential average of the parameters with this decay, such as 0.999. 0: the
    parameters themselves."""

    validation: int = 0
    """Hold this many training images out, the same for every seed, and report on them too."""

    seed: int = 1234
    """Fixes the initial weights, the order of the images and the dropout; 0 to 4294967295."""

    seeds: int | None = None
    """Train this many networks in one program, with the seeds from --seed on, and report their
    mean. None: one."""

    hidden_sizes: tuple[int, ...] | None = None
    """Units of each hidden dense layer, such as --hidden_sizes 256 128. None: the model's own."""

    dropout: float | None = None
    """Share of hidden units dropped while training, 0 or more and less than 1. None: the model's
    own."""

    activation: str | None = None
    """What follows a hidden dense layer of the MLP: relu or sigmoid. None: the model's own."""

    precision: str = "float32"
    """Precision of products: float32 (full, on every device), tf32 (10-bit mantissas, on hardware
    that has it) or bfloat16 (layers compute in bfloat16, parameters stay float32)."""

    deterministic: bool = False
    """The same bits from the same seed on a GPU too, at some cost in speed. CPU and TPU give them
    in any case."""

    max_steps: int | None = None
    """End the run after this many steps, the partial epoch included in the metrics. None: after
    --epochs."""

    data_dir: Path = _execution(DEFAULT_DATA_DIR)
    """Folder where prepared and decoded data sets are kept."""

    manual_dir: Path | None = _execution(None)
    """Folder with the data set's four original .gz files, for a machine without network."""

    workdir: Path | None = _execution(None)
    """Folder for the run's files. None: runs/<dataset>-<model>-<UTC time>."""

    platform: str = _execution("auto")
    """Device to run on: cpu, gpu, tpu, or auto, the best that JAX finds."""

    devices: int | Literal["all"] | None = _execution(None)
    """How many of the platform's devices work on the run: a whole number or all. A batch is spread
    over them, or with --seeds the networks. None: one, and all where processes run together."""

    coordinator: str | None = _execution(None)
    """Work together with other processes, which find each other at this HOST:PORT, where process 0
    listens. auto: as Slurm, Open MPI, Kubernetes or a TPU pod tells them. None: alone."""

    num_processes: int | None = _execution(None)
    """How many processes there are, where --coordinator is not auto."""

    process_id: int | None = _execution(None)
    """Which of them this is, from 0. Process 0 writes the run's folder and shows the run."""

    steps_per_call: int | Literal["auto"] = _execution("auto")
    """Steps in one call of the compiled program. auto: about a second's worth on a CPU, an epoch
    on an accelerator. Never changes the result."""

    checkpoint_every: float = _execution(60.0)
    """Seconds between checkpoints inside an epoch. One follows each epoch too, but for those that
    end while another is being written. 0: one after every call and every epoch."""

    compilation_cache: Path | None = _execution(Path("~/.cache/mnist_jax/compiled"))
    """Folder where train.py keeps compiled programs, so that the next start need not compile. None:
    nowhere. From Python, set jax_compilation_cache_dir yourself: it belongs to the process."""

    tensorboard: bool = _execution(False)
    """Also write for TensorBoard, into the run's folder: the metrics of each epoch, samples of the
    images and, at the end, which digits were taken for which."""

    report: bool = _execution(False)
    """Make a page with pictures of the run at its end, report.html in the run's folder."""

    profile: Path | None = _execution(None)
    """Write a trace of some training steps into this folder, for TensorBoard or Perfetto, and list
    the ten costliest operations. None: do not."""

    profile_steps: tuple[int, int] | None = _execution(None)
    """First and last step of that trace, of one epoch, such as 101 150. None: those of the second
    call, on a CPU up to 50."""

    debug: bool = _execution(False)
    """Show the traceback of an error, and of a NaN the operation that made it (jax_debug_nans)."""

    def __post_init__(self):
        for name, value in vars(self).items():
            if isinstance(value, np.generic):  # as from np.logspace
                object.__setattr__(self, name, value.item())
            elif isinstance(value, list):
                object.__setattr__(self, name, tuple(value))
        if self.preset not in PRESETS:
            raise unknown_choice("preset", self.preset, PRESETS)
        recipe = PRESETS["tutorial"] | PRESETS[self.preset]
        if others := recipe.keys() - PRESETS["tutorial"].keys() - set(MODEL_OPTIONS):
            raise UsageError(
                f"the preset {self.preset!r} names {', '.join(sorted(others))}; allowed are "
                f"{', '.join((*PRESETS['post'], *MODEL_OPTIONS))}"
            )
        self._fill_in(recipe)
        expand_paths(self, "data_dir", "manual_dir", "workdir", "compilation_cache", "profile")
        for name, choices in CHOICES.items():
            if self._is_given(name) and getattr(self, name) not in choices:
                raise unknown_choice(name, getattr(self, name), choices)
        self._fill_in(_model_defaults(self.model))
        for name, rule in RULES.items():
            if self._is_given(name):
                self._check(name, *rule)
        most = self.batch_size
        legal = f"a power of two, 1 to {most}, the --batch_size"
        self._check("microbatches", lambda n: _is_int(n, 1, most) and not n & (n - 1), legal)
        if self.seeds is not None:
            most = min(100_000, 2**32 - self.seed)
            legal = "a whole number, 1 to 100000, with seed + seeds up to 4294967296"
            self._check("seeds", lambda n: _is_int(n, 1, most), legal)
        self._check_processes()
        if self.profile_steps is not None and self.profile is None:
            raise UsageError("profile_steps needs --profile=DIR; give both or neither")
        for name in MODEL_OPTIONS:
            if getattr(self, name) is not None and name not in _model_defaults(self.model):
                raise UsageError(f"the model {self.model!r} has no {name}; leave --{name} out")

    def _is_given(self, name: str) -> bool:
        """Whether a field holds a value: not None, or None where that is not its default."""
        return getattr(self, name) is not None or getattr(Config, name) is not None

    def _check(self, name: str, allowed: Callable[[Any], bool], legal: str) -> None:
        value = getattr(self, name)
        if not allowed(value):
            raise UsageError(f"{name} is {value!r}; allowed is {legal}; change --{name}")

    def _fill_in(self, values: dict[str, Any]) -> None:
        """Sets the fields that were not given."""
        for name, value in values.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)

    def _check_processes(self) -> None:
        address, numbers = self.coordinator, ("num_processes", "process_id")
        if address in ("auto", None):
            for name in numbers:
                if getattr(self, name) is not None:
                    raise UsageError(f"{name} needs --coordinator=HOST:PORT; give both or neither")
            return
        self._check("coordinator", is_address, "auto or HOST:PORT")
        for name in numbers:
            if getattr(self, name) is None:
                raise UsageError(f"--coordinator={address} needs --{name} as well")
        self._check("num_processes", *COUNT)
        last = self.num_processes - 1 if self.num_processes else 0
        self._check("process_id", lambda n: _is_int(n, 0, last), f"0 to {last}")

    def model_options(self) -> dict[str, Any]:
        """The arguments that the model's class is made with."""
        return {name: getattr(self, name) for name in _model_defaults(self.model)}

    def command_line(self) -> str:
        """The shortest command, for a shell, that trains like this, in a folder of its own.

        An empty `hidden_sizes`, which only Python can give, is beyond it.
        """
        usual = self.defaults()
        words = ["python", "train.py", f"--model={self.model}"]
        if self.preset != "tutorial":
            words.append(f"--preset={self.preset}")
        # Of execution, that without which it may find no data, or give other numbers.
        for name in (*self.hyperparameters(), "data_dir", "manual_dir", "platform"):
            value = getattr(self, name)
            if value == getattr(usual, name):
                continue
            if isinstance(value, bool):
                words.append(f"--{name}" if value else f"--no_{name}")
            elif isinstance(value, tuple):
                words += [f"--{name}", *map(str, value)]
            else:
                words.append(f"--{name}={value}")
        return shlex.join(words)

    def defaults(self) -> "Config":
        """What this would be with nothing given but the model and the preset."""
        return Config(model=self.model, preset=self.preset)

    def all_seeds(self) -> range:
        """The seeds that are trained with: one, or those of an ensemble's members."""
        return range(self.seed, self.seed + (self.seeds or 1))

    def to_json(self) -> dict[str, Any]:
        """All fields as JSON can hold them."""
        as_json = {type(Path()): str, tuple: list}
        fields = dataclasses.asdict(self).items()
        return {name: as_json.get(type(value), lambda x: x)(value) for name, value in fields}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Config":
        """The Config that `to_json` gave these values.

        Raises:
            UsageError: a value is not allowed.
            TypeError: a field is unknown, or of a kind that no Config has.
        """
        given: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in values.items()
        }
        return cls(**given)

    def hyperparameters(self) -> dict[str, Any]:
        """The fields that can change a number in the run, as JSON can hold them."""
        execution = {f.name for f in dataclasses.fields(self) if "execution" in f.metadata}
        return {name: value for name, value in self.to_json().items() if name not in execution}


def checked_path(name: str, path: str | Path) -> Path:
    """The path that a flag of this name was given, with ~ replaced.

    Raises:
        UsageError: no file can have that name.
    """
    return storage.user_path(path)


def expand_paths(options: Any, *names: str) -> None:
    """Replaces ~ in those fields of a frozen dataclass that hold a path.

    Raises:
        UsageError: no file can have that name.
    """
    for name in names:
        if (path := getattr(options, name)) is not None:
            object.__setattr__(options, name, checked_path(name, path))


def is_address(text: str) -> bool:
    """Whether a text is HOST:PORT, with a port that there can be."""
    found = ADDRESS.fullmatch(text)
    return found is not None and 0 < int(found[2]) < 2**16


def _model_defaults(model: str) -> dict[str, Any]:
    """Those of the options that the model's class has, with its own values."""
    fields = dataclasses.fields(MODELS[model])
    return {field.name: field.default for field in fields if field.name in MODEL_OPTIONS}


def _is_int(value: Any, least: int, most: float = math.inf) -> bool:
    return type(value) is int and least <= value <= most  # a bool is no count


def _is_number(value: Any) -> bool:
    # A whole number may be too large to be reckoned with others.
    return type(value) is float or (type(value) is int and abs(value) < 2**63)


def _are_sizes(value: Any) -> bool:
    few = isinstance(value, tuple | list) and len(value) <= 100
    return few and all(_is_int(size, 1, 1_000_000) for size in value)


def _is_window(value: Any) -> bool:
    pair = isinstance(value, tuple | list) and len(value) == 2
    return pair and _is_int(value[0], 1) and _is_int(value[1], value[0])


CHOICES: dict[str, Collection[str]] = {
    "model": MODELS,
    "dataset": ("auto", *DATASETS),
    "precision": ("float32", "tf32", "bfloat16"),
    "platform": PLATFORMS,
    "schedule": SCHEDULES,
    "activation": ACTIVATIONS,
}
Rule = tuple[Callable[[Any], bool], str]
"""What holds of a value, and that in words."""
COUNT: Rule = (lambda n: _is_int(n, 1), "a whole number, 1 or more")
SHARE: Rule = (lambda x: _is_number(x) and 0 <= x < 1, "0 or more and less than 1")
AMOUNT: Rule = (lambda x: _is_number(x) and 0 <= x < math.inf, "any finite number from 0")
SWITCH: Rule = (lambda x: type(x) is bool, "true or false")
# Of fields that depend on no other.
RULES: dict[str, Rule] = {
    **dict.fromkeys(("epochs", "batch_size", "max_steps"), COUNT),
    **dict.fromkeys(("shift", "rotation", "scale", "weight_decay"), AMOUNT),
    **dict.fromkeys(("label_smoothing", "ema_decay", "dropout"), SHARE),
    **dict.fromkeys(("normalize", "deterministic", "tensorboard", "report", "debug"), SWITCH),
    "validation": (lambda n: _is_int(n, 0), "a whole number, 0 or more"),
    "seed": (lambda n: _is_int(n, 0, 2**32 - 1), "0 to 4294967295"),
    "learning_rate": (lambda x: AMOUNT[0](x) and x > 0, "any finite number above 0"),
    "steps_per_call": (lambda n: n == "auto" or _is_int(n, 1), f"'auto' or {COUNT[1]}"),
    "devices": (lambda n: n == "all" or _is_int(n, 1), f"'all' or {COUNT[1]}"),
    "checkpoint_every": (lambda s: _is_number(s) and s >= 0, "any number of seconds from 0"),
    "profile_steps": (_is_window, "two whole numbers, 1 or more, the first not above the second"),
    # More could not even be traced.
    "hidden_sizes": (_are_sizes, "up to 100 whole numbers, 1 to 1000000"),
}
