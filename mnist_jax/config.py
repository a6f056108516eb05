"""Config: the settings of a training run, checked and resolved. Its fields are in `flags`."""

import ast
import dataclasses
import inspect
import itertools
import json
import os
import shlex
from collections.abc import Callable, Collection, Sequence
from typing import Any

import flax.linen as nn
import numpy as np

from mnist_jax.atomic_io import user_path
from mnist_jax.data import DATASETS, DataSpec
from mnist_jax.data.files import is_path
from mnist_jax.errors import UsageError, unknown_choice
from mnist_jax.flags import PATHS, RULES, Flags
from mnist_jax.fork import COMPONENTS, REGISTRIES, load_fork
from mnist_jax.models import ACTIVATIONS
from mnist_jax.presets import PRESETS

FORMAT_VERSION = 3  # of config.json and of a run's folder

# The component whose keyword argument a field sets; the component has a default of its own.
ARGUMENTS: dict[str, str] = dict.fromkeys(("hidden_sizes", "dropout", "activation"), "model")
ARGUMENTS |= {"momentum": "optimizer", "weight_decay": "optimizer", "label_smoothing": "loss"}
# Fields of a model, and arguments of functions, that the package sets.
FROM_DATA = ("dtype", "image_shape", "num_classes", "name", "parent")
RESERVED = ("name", "learning_rate", "schedule", "steps", "data_dir", "manual_dir")
GRID = ("learning_rate", "weight_decay")  # may have several values: a network for each
CHOICES: dict[str, Collection[str]] = {
    **{name: registry for name, registry in REGISTRIES.items() if name != "dataset"},
    "precision": ("float32", "tf32", "bfloat16"),
    "platform": ("auto", "cpu", "gpu", "tpu", "cuda", "rocm"),
    "schedule": ("constant", "cosine", "onecycle"),
    "activation": ACTIVATIONS,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Flags):
    """The settings of a training run. A field that is None takes the value of the preset, the
    model, the optimizer or the loss.

    `resolve` fills these values in. To change the preset, the model, the optimizer or the loss,
    call `dataclasses.replace` before `resolve`. `python train.py --help` explains the fields.

    Raises UsageError if a value is not allowed; the message says what is.
    """

    def __post_init__(self):
        if self.fork is not None:
            load_fork(self.fork)
        for name, value in vars(self).items():
            if value is None and getattr(Config, name) is None:
                continue
            # A list, because a wrong value need not be hashable.
            choices = ["auto", *DATASETS] if name == "dataset" else [*CHOICES.get(name, ())]
            if value not in choices and (lower := str(value).lower()) in choices:
                object.__setattr__(self, name, lower)
            elif name in CHOICES and value not in choices:
                raise unknown_choice(name, value, choices)
            if name in RULES:
                allowed, legal = RULES[name]
                if not allowed(value):
                    raise UsageError(f"{name} is {value!r}; allowed: {legal}; change --{name}")
        self._check_arguments()
        if int(self.seed) + int(self.seeds or 1) > 2**32:  # those of NumPy would overflow
            raise UsageError("seed + seeds is above 4294967296, the largest sum; lower --seed")
        explicit = self.coordinator not in (None, "auto")
        if [self.num_processes is not None, self.process_id is not None] != [explicit, explicit]:
            raise UsageError(
                "--coordinator=HOST:PORT, --num_processes and --process_id belong together; give "
                "all three or none"
            )
        if self.log_steps and not self.tensorboard:
            raise UsageError("--log_steps logs into --tensorboard; give both, or none")
        last = (self.num_processes or 1) - 1
        if (self.process_id or 0) > last:
            raise UsageError(f"process_id is {self.process_id}; allowed is 0 to {last}")

    def _check_arguments(self) -> None:
        """Each argument that is given must belong to a component of the run."""
        called = {kind: f"the {kind} {name!r}" for kind, name in self._component_names().items()}
        for kind, part in self.components().items():
            needed, fits = "function", callable(part)
            if kind == "model":
                needed = "subclass of flax.linen.Module"
                fits = inspect.isclass(part) and issubclass(part, nn.Module)
            if not fits:
                raise UsageError(f"{called[kind]} is no {needed}")
        known = {n: x for part in self.components().values() for n, x in keywords(part).items()}
        own, given = self._own_arguments(), [n for n in ARGUMENTS if getattr(self, n) is not None]
        for name in given:
            if name not in own:
                who = called[ARGUMENTS[name]]
                raise UsageError(f"{who} has no argument {name} to set; leave --{name} out")
        for name, value in self.option_values().items():
            if name not in known:
                *parts, last = called.values()
                problem = f"{', '.join(parts)} and {last} have no argument {name} to set"
                raise UsageError(f"{problem}; remove {name} from --options")
            if isinstance(known[name], bool) and isinstance(value, str):
                raise UsageError(f"{name} of --options is {value!r}; allowed are True and False")
            if name in given:  # both are in a resolved config, and equal
                pair = [_plain(name, x) for x in (value, getattr(self, name))]
                first, second = (x.lower() if isinstance(x, str) else x for x in pair)
                if first != second:
                    raise UsageError(f"--{name} and {name} of --options differ; leave one out")

    def check_options(self) -> None:
        """Raises UsageError if an option belongs to two components. Runs that exist may have it."""
        for name in self.option_values():
            kinds = [kind for kind, part in self.components().items() if name in keywords(part)]
            if len(kinds) > 1:
                both = " and ".join(f"the {kind} {getattr(self, kind)!r}" for kind in kinds)
                raise UsageError(f"{both} have an argument {name}; rename one, or leave it out")

    def components(self) -> dict[str, Callable[..., Any]]:
        """The model's class, and the functions of the optimizer, the loss and so on, by field."""
        if self.fork is not None:  # another fork may have used the same names since
            load_fork(self.fork)
        return {kind: COMPONENTS[kind][name] for kind, name in self._component_names().items()}

    def _component_names(self) -> dict[str, str]:
        preset = PRESETS["tutorial"] | PRESETS[self.preset]
        names = {kind: getattr(self, kind) or preset.get(kind) for kind in COMPONENTS}
        for kind, name in names.items():  # of the preset: those of fields are checked
            if kind != "dataset" and name not in (None, *COMPONENTS[kind]):
                raise unknown_choice(kind, name, COMPONENTS[kind])
        return {kind: name for kind, name in names.items() if name in COMPONENTS[kind]}

    def option_values(self) -> dict[str, Any]:
        """`options` by name; a value is a Python literal, or else a string."""
        values: dict[str, Any] = {}
        for name, _, text in (word.partition("=") for word in self.options):
            try:
                values[name] = ast.literal_eval(text)
            except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
                values[name] = text
        return values

    def arguments(self, kind: str) -> dict[str, Any]:
        """The keyword arguments of a component, such as "model", that fields and options set."""
        if kind not in self.components():
            return {}
        names, config = keywords(self.components()[kind]), self.resolve()
        fields = {n: getattr(config, n) for n, owner in ARGUMENTS.items() if owner == kind}
        fields = {n: value for n, value in fields.items() if value is not None}
        return {n: v for n, v in (self.option_values() | fields).items() if n in names}

    def _own_arguments(self) -> dict[str, Any]:
        """The fields of `ARGUMENTS` that this run's components take, with their defaults."""
        found = {kind: keywords(part) for kind, part in self.components().items()}
        return {n: found[kind][n] for n, kind in ARGUMENTS.items() if n in found.get(kind, {})}

    def resolve(self) -> "Config":
        """The same run with every value filled in, and ~ expanded in paths."""
        own = self._own_arguments()
        preset = PRESETS["tutorial"] | PRESETS[self.preset]
        if wrong := [name for name in preset if getattr(Config, name, "") is not None]:
            problem = f"the preset {self.preset!r} sets {', '.join(wrong)}"
            raise UsageError(f"{problem}; allowed are flags whose default is None")
        # What the parts, the preset and the user set; the later one counts.
        values = {name: value for name, value in own.items() if _is_allowed(name, value)}
        values |= {n: preset[n] for n in preset if n not in ARGUMENTS or n in own}
        values |= {name: value for name, value in vars(self).items() if value is not None}
        values |= {n: v for n, v in self.option_values().items() if n in own}
        return dataclasses.replace(self, **{n: _plain(n, value) for n, value in values.items()})

    def model_arguments(self, data: DataSpec) -> dict[str, Any]:
        """The arguments of `make_model` for these data, besides the dtype."""
        sizes = {"image_shape": data.image_shape, "num_classes": data.num_classes}
        return {"name": self.model, **sizes, **self.arguments("model")}

    def optimizer_arguments(self) -> dict[str, Any]:
        """The arguments of `make_optimizer`, besides the number of steps.

        Of several values the largest: each network then has its own in the optimizer's state.
        """
        config, values = self.resolve(), self.arguments("optimizer")
        values |= {"learning_rate": config.learning_rate, "schedule": config.schedule}
        largest = {n: max(v) for n, v in values.items() if n in GRID and isinstance(v, tuple)}
        return {"name": config.optimizer, **values, **largest}

    def members(self) -> list[dict[str, Any]]:
        """What distinguishes each network of the run: its values in the grid, and its seed."""
        seeds = range(self.seed, self.seed + (self.seeds or 1))
        rows = itertools.product(*self.grid.values(), seeds)
        return [dict(zip((*self.grid, "seed"), row, strict=True)) for row in rows]

    def member_labels(self) -> list[str]:
        """A name for each network of the run, such as "learning_rate 0.001, seed 1234"."""
        return [member_label(member) for member in self.members()]

    @property
    def grid(self) -> dict[str, Sequence[float]]:
        """The hyperparameters with several values."""
        values = {name: getattr(self, name) for name in GRID}
        return {name: v for name, v in values.items() if isinstance(v, tuple | list)}

    @property
    def num_members(self) -> int | None:
        """The number of networks that are trained in one program; None for a single one."""
        return len(self.members()) if self.grid or self.seeds is not None else None

    def hyperparameters(self) -> dict[str, Any]:
        """The values that can change a number in the run, as JSON can hold them.

        A fork is there with the SHA-256 of its file.
        """
        runtime = {f.name for f in dataclasses.fields(self) if "runtime" in f.metadata}
        values = self.resolve().to_json()
        if self.fork is not None:
            values["fork"] = load_fork(self.fork)
        values["options"].sort()
        return {name: v for name, v in values.items() if name not in runtime | {"version"}}

    def defaults(self) -> "Config":
        """This model and preset with nothing else given."""
        return Config(model=self.model, preset=self.preset, fork=self.fork).resolve()

    def command_line(self) -> str:
        """The shortest shell command that trains the same, in a folder of its own."""
        config, default = self.resolve(), self.defaults()
        parts = {kind: getattr(self, kind) for kind in COMPONENTS}
        own = Config(preset=self.preset, fork=self.fork, **parts).resolve()  # of these components
        words = ["python", "train.py", f"--model={self.model}"]
        if self.preset != "tutorial":
            words.append(f"--preset={self.preset}")
        # Some runtime fields decide which data and which kind of device are used.
        for name in (*self.hyperparameters(), "data_dir", "manual_dir", "platform"):
            value = getattr(config, name)
            usual = getattr(own if name in ARGUMENTS else default, name)
            if value is None or (value == usual and name != "fork"):
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
        values = json.loads(json.dumps(dataclasses.asdict(self), default=os.fspath))
        return {"version": FORMAT_VERSION, **values}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Config":
        """The resolved Config that `to_json` turned into `values`; ignores unknown fields."""
        names = {field.name for field in dataclasses.fields(cls)}
        config = cls(**{name: value for name, value in values.items() if name in names}).resolve()
        # The name of arrays stays a name, even where a folder is called the same.
        return dataclasses.replace(config, dataset=values.get("dataset", config.dataset))


def _plain(name: str, value: Any) -> Any:
    """A field's value: a path without ~, tuples in place of lists, no numbers of NumPy."""
    if name in PATHS:
        return user_path(value)
    if name == "dataset" and value not in ("auto", *DATASETS) and is_path(value):
        return str(user_path(value).absolute())
    if isinstance(value, list | tuple):
        return tuple(_plain("", element) for element in value)
    return value.item() if isinstance(value, np.generic) else value


def _is_allowed(name: str, value: Any) -> bool:
    """Whether a component's default can be the flag's value; if not, the component keeps it."""
    if name in CHOICES:
        return isinstance(value, str) and value in CHOICES[name]
    return value is not None and bool(RULES[name][0](value))


def member_label(member: dict[str, Any]) -> str:
    """The name of one of `Config.members`."""
    return ", ".join(f"{name} {value}" for name, value in member.items())


def group_by_point(members: Sequence[dict[str, Any]]) -> dict[str, list[int]]:
    """The indices of the members that share their values in the grid, by their label.

    Without a grid the label is "".
    """
    found: dict[str, list[int]] = {}
    for index, member in enumerate(members):
        values = {name: value for name, value in member.items() if name != "seed"}
        found.setdefault(member_label(values), []).append(index)
    return found


def keywords(function: Callable[..., Any]) -> dict[str, Any]:
    """The parameters of a function, or the fields of a module's class, that `--options` can set.

    By name, with their defaults; None for a keyword argument without one.
    """
    is_model = inspect.isclass(function) and issubclass(function, nn.Module)
    hidden = FROM_DATA if is_model else RESERVED
    return {
        p.name: None if p.default is p.empty else p.default
        for p in inspect.signature(function).parameters.values()
        if (p.default is not p.empty or p.kind is p.KEYWORD_ONLY or is_model)
        and p.name not in hidden
    }
