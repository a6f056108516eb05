"""What the frameworks' processes share: job, data, clock and findings. NumPy is enough."""

import dataclasses
import json
import pkgutil
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks import timing

TRAIN, EVALUATION = "train_step", "evaluation"
NUM_CLASSES, IMAGE_SHAPE = 10, (28, 28, 1)
HIDDEN_SIZES = {"logistic": (), "mlp": (256, 128, 64, 32), "cnn": (512, 256)}
LEARNING_RATE, EPSILON, DROPOUT = 1e-3, 1e-7, 0.5
MANY, ONE, HOST = "many steps a call", "one dispatch a step", "host arrays"
EAGER, COMPILED = "eager", "torch.compile"
GRAPH, COMPILED_GRAPH = "CUDA graph of the step", "torch.compile, CUDA graph of the step"
FIT, FIT_JIT = "fit", "fit, jit_compile"
EPOCH, EPOCH_JIT = "fit, epoch an execution", "fit, jit_compile, epoch an execution"
KNOWN = (MANY, ONE, HOST, EAGER, COMPILED, GRAPH, COMPILED_GRAPH, FIT, FIT_JIT, EPOCH, EPOCH_JIT)


def serve() -> None:
    """Calls `module:function` of the command line with arguments in JSON; prints its answer."""
    found = pkgutil.resolve_name(sys.argv[1])(**json.loads(sys.argv[2]))
    print("\n" + json.dumps(found), flush=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What one process measures."""

    model: str
    framework: str = "mnist_jax"
    mode: str = MANY
    what: Sequence[str] = ("train", "eval")
    batch_size: int = 100
    precision: str = "float32"
    platform: str = "auto"
    fork: str | None = None  # the file that adds the model
    options: Sequence[str] = ()  # its keyword arguments, such as width=64
    dataset: str = "auto"  # it may take some of them
    image_shape: Sequence[int] = IMAGE_SHAPE
    num_classes: int = NUM_CLASSES
    seeds: int | None = None  # networks in one program; None for one without an axis of members
    devices: int = 1  # what a batch is divided among
    slow_down: float = 0.0  # share of the steps that are done twice
    trace: bool = False  # count the kernels of a step afterwards
    train_size: int = 60_000
    test_size: int = 10_000
    samples: int = 60
    budget_s: float = 1.5  # this and the next two as in `timing.measure`
    warmup_s: Sequence[float] = (0.2, 3.0)
    min_sample_s: float = 0.01

    def case(self) -> dict[str, Any]:
        """The fields by which what was measured is found again."""
        mode = f"{self.seeds} seeds, {self.mode}" if self.seeds else self.mode
        mode += f", {self.devices} devices" if self.devices > 1 else ""
        names = ("framework", "model", "batch_size", "precision")
        return {name: getattr(self, name) for name in names} | {"mode": mode}

    @property
    def name(self) -> str:
        """The case in words."""
        return ", ".join(map(str, self.case().values()))


class Data(NamedTuple):
    """Random images (n, height, width, channels) uint8, labels (n,) int32, a random order."""

    image: np.ndarray
    label: np.ndarray
    order: np.ndarray
    test_image: np.ndarray
    test_label: np.ndarray

    def as_float(self) -> "Data":
        """The same with training images in float32, 0 to 1."""
        return self._replace(image=np.divide(self.image, 255, dtype=np.float32))

    def batch_index(self, i: int, batch_size: int) -> np.ndarray:
        """Which images batch `i` takes, epoch after epoch; all batches are full."""
        first = i % (len(self.order) // batch_size) * batch_size
        return self.order[first : first + batch_size]


def make_data(job: Job) -> Data:
    """The job's images and labels, the same in every process."""
    rng = np.random.default_rng(0)
    n, m = job.train_size, job.test_size
    return Data(
        rng.integers(0, 256, (n, *job.image_shape), np.uint8),
        rng.integers(0, job.num_classes, n, np.int32),
        rng.permutation(n).astype(np.int32),
        rng.integers(0, 256, (m, *job.image_shape), np.uint8),
        rng.integers(0, job.num_classes, m, np.int32),
    )


@dataclasses.dataclass(kw_only=True)
class Workload:
    """What a framework's worker makes of a job."""

    train: Callable[[Any, int], Any]  # (state, steps) → state, runs that many steps
    sync: Callable[[Any], Any] = lambda _: None  # waits for everything in what those two returned
    evaluate: Callable[[Any], Any] | None = None  # state → anything, for all test images
    state: Any = None  # what training starts from
    unit: int = 1  # training steps come in multiples of this
    context: dict[str, Any] = dataclasses.field(default_factory=dict)  # such as versions
    details: dict[str, Any] = dataclasses.field(default_factory=dict)  # recorded with the step
    trace: Callable[[Any], dict[str, Any]] | None = None  # state → what a step consists of


def run(job: Job, make: Callable[[Job, Data], Workload], found: dict[str, Any]) -> None:
    """Measures the workload that `make` makes and adds to the content of a result file."""
    workload = make(job, make_data(job))
    found["context"].update(workload.context)
    state, case = workload.state, job.case()
    limits = {n: getattr(job, n) for n in ("samples", "budget_s", "min_sample_s", "warmup_s")}
    if "train" in job.what:
        own = {"sync": workload.sync, "unit": workload.unit}
        times, state = timing.measure(workload.train, state, **own, **limits)
        details = times.pop("details") | workload.details
        found["benchmarks"].append({"name": TRAIN, **case, **times, "details": details})
    if "eval" in job.what and (evaluate := workload.evaluate):

        def repeat(_: Any, times: int) -> None:
            for _ in range(times):  # each is waited for: its result is what one evaluates for
                workload.sync(evaluate(state))

        times, _ = timing.measure(repeat, None, sync=lambda _: None, **limits)
        details = times.pop("details") | {"images": job.test_size}
        found["benchmarks"].append({"name": EVALUATION, **case, **times, "details": details})
    if job.trace and workload.trace:
        found["tables"].setdefault("trace", []).append(case | workload.trace(state))


def run_all(cases: Sequence[dict[str, Any]], make: str | Callable[..., Workload]) -> dict[str, Any]:
    """Does the jobs of these fields one after the other; returns the content of a result file."""
    made = pkgutil.resolve_name(make) if isinstance(make, str) else make
    found: dict[str, Any] = {"context": {"excluded": {}}, "benchmarks": [], "tables": {}}
    for job in (Job(**fields) for fields in cases):
        try:
            run(job, made, found)
        except Exception as error:  # any: the other jobs are measured all the same
            why = f"{type(error).__name__}: {error}".partition("\n")[0]
            found["context"]["excluded"][job.name] = why
        print("\n" + json.dumps(found), flush=True)  # it counts if the process dies later
    return found
