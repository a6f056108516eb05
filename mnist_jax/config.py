"""What a run is made of: one frozen, validated object. The flags are made from its fields."""

import dataclasses
import math
from pathlib import Path
from typing import Any, Literal

from mnist_jax.data import DATASETS, DEFAULT_DATA_DIR
from mnist_jax.errors import UsageError, unknown_choice
from mnist_jax.models import MODELS

# A recipe's values stand in for the fields of the same names that are not given.
PRESETS: dict[str, dict[str, Any]] = {
    "post": {"epochs": 10, "batch_size": 100, "learning_rate": 1e-3, "normalize": True},
}
PRECISIONS = ("float32", "tf32", "bfloat16")
PLATFORMS = ("auto", "cpu", "gpu", "tpu")


def _from_preset() -> Any:
    """A field that takes the preset's value unless it is given."""
    return dataclasses.field(default=None)


def _execution(default: Any) -> Any:
    """A field that says where or how a run goes, and cannot change a number in it."""
    return dataclasses.field(default=default, metadata={"execution": True})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """A training run. Once made, it is valid, and every field holds the value that will be used.

    Raises:
        UsageError: a value is not allowed; the message says what is.
    """

    model: str = "cnn"
    """The network: logistic, mlp or cnn."""

    dataset: str = "auto"
    """The images: mnist, fashion_mnist, kmnist, digits (1,797 that come with scikit-learn), or
    auto, which is mnist where it can be had and otherwise, with a notice, digits."""

    preset: str = "post"
    """The recipe that fills in what is not given. post: the tutorial's, Adam at a constant rate."""

    epochs: int = _from_preset()
    """Passes over the training images."""

    batch_size: int = _from_preset()
    """Images a step. The last batch of an epoch may be smaller and is trained on too."""

    learning_rate: float = _from_preset()
    """Adam's step size."""

    normalize: bool = _from_preset()
    """Scale pixels from 0..255 to 0..1."""

    seed: int = 1234
    """Fixes the initial weights, the order of the images and the dropout; 0 to 4294967295."""

    hidden_sizes: tuple[int, ...] | None = None
    """Units of each hidden dense layer, such as 256 128 64 32. None: the model's own."""

    dropout: float | None = None
    """Share of hidden units dropped while training, 0 to 1 (exclusive). None: the model's own."""

    precision: str = "float32"
    """float32 (exact products everywhere), tf32 (products with 10-bit mantissas, on hardware that
    has them) or bfloat16 (layers computed in bfloat16, parameters kept in float32)."""

    max_steps: int | None = None
    """End the run after this many steps, the partial epoch included in the metrics."""

    data_dir: Path = _execution(DEFAULT_DATA_DIR)
    """Prepared and decoded data sets are kept here."""

    manual_dir: Path | None = _execution(None)
    """Folder with the data set's four original .gz files, for a machine without network."""

    workdir: Path | None = _execution(None)
    """Folder for the run's files. None: runs/<dataset>-<model>-<UTC time>."""

    platform: str = _execution("auto")
    """Device to run on: cpu, gpu, tpu, or auto, the best that JAX finds."""

    steps_per_call: int | Literal["auto"] = _execution("auto")
    """Steps in one call of the compiled program. auto: about a second's worth on a CPU, an epoch
    on an accelerator. Never changes the result."""

    compilation_cache: Path | None = _execution(Path("~/.cache/mnist_jax/compiled"))
    """Compiled programs are kept here, so that the next start need not compile. None: nowhere."""

    tensorboard: bool = _execution(False)
    """Also write the metrics of each epoch for TensorBoard, into the run's folder."""

    debug: bool = _execution(False)
    """Show the traceback of an error."""

    def __post_init__(self):
        if self.preset not in PRESETS:
            raise unknown_choice("preset", self.preset, PRESETS)
        for name, value in PRESETS[self.preset].items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        for name in ("data_dir", "manual_dir", "workdir", "compilation_cache"):
            if (path := getattr(self, name)) is not None:
                object.__setattr__(self, name, Path(path).expanduser())
        if self.model not in MODELS:
            raise unknown_choice("model", self.model, MODELS)
        if self.dataset not in ("auto", *DATASETS):
            raise unknown_choice("dataset", self.dataset, ("auto", *DATASETS))
        if self.precision not in PRECISIONS:
            raise unknown_choice("precision", self.precision, PRECISIONS)
        if self.platform not in PLATFORMS:
            raise unknown_choice("platform", self.platform, PLATFORMS)
        _check("epochs", self.epochs, self.epochs >= 1, "1 or more")
        _check("batch_size", self.batch_size, self.batch_size >= 1, "1 or more")
        rate = self.learning_rate
        _check("learning_rate", rate, 0 < rate < math.inf, "any finite number above 0")
        _check("seed", self.seed, 0 <= self.seed < 2**32, "0 to 4294967295")
        if self.max_steps is not None:
            _check("max_steps", self.max_steps, self.max_steps >= 1, "1 or more")
        if self.steps_per_call != "auto":
            calls = self.steps_per_call
            _check("steps_per_call", calls, calls >= 1, "'auto', or 1 or more")
        if self.dropout is not None:
            _check("dropout", self.dropout, 0 <= self.dropout < 1, "0 or more and less than 1")
        if self.hidden_sizes is not None:
            positive = all(size >= 1 for size in self.hidden_sizes)
            _check("hidden_sizes", self.hidden_sizes, positive, "sizes of 1 or more")
        fields = {field.name for field in dataclasses.fields(MODELS[self.model])}
        for name in self.model_options():
            if name not in fields:
                raise UsageError(f"the model {self.model!r} has no {name}; leave --{name} out")

    def model_options(self) -> dict[str, Any]:
        """The fields that were given and belong to the model's class."""
        given = {"hidden_sizes": self.hidden_sizes, "dropout": self.dropout}
        return {name: value for name, value in given.items() if value is not None}

    def to_json(self) -> dict[str, Any]:
        """All fields as JSON can hold them."""
        return {
            name: str(value) if isinstance(value, Path) else value
            for name, value in dataclasses.asdict(self).items()
        }

    def identity(self) -> dict[str, Any]:
        """The fields that can change a number in the run, as JSON can hold them."""
        execution = {f.name for f in dataclasses.fields(self) if "execution" in f.metadata}
        return {name: value for name, value in self.to_json().items() if name not in execution}


def _check(name: str, value: Any, allowed: bool, legal: str) -> None:
    if not allowed:
        raise UsageError(f"{name} is {value!r}; allowed is {legal}; change --{name}")
