"""What the frameworks' processes share: the job, its data, the clock and the answer.

    python -m benchmarks.workers.pytorch '{"model": "mlp"}'

prints one JSON object as its last line. Inside the clock of `train`: taking a batch from the
training images in memory in an order drawn before (Keras draws its own), dropout, forward,
backward, update. Of `eval`: loss and number of correct answers over every test image. Outside:
imports, making the data, compilation.

Images are random, never zeros. This project does two things more than the others: it takes uint8
and normalises each batch inside the clock, where the others are given float32 in 0..1; and it sums
loss and correct answers while training, as only Keras does too.

Needs NumPy and nothing else, so that it runs in every framework's interpreter.
"""

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks import timing

NUM_CLASSES = 10
HIDDEN_SIZES = {"logistic": (), "mlp": (256, 128, 64, 32), "cnn": (512, 256)}
LEARNING_RATE, EPSILON, DROPOUT = 1e-3, 1e-7, 0.5
EVAL_BATCH_SIZE = 250


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What one process measures."""

    model: str
    mode: str = ""
    """How the framework is used; each worker names its own modes."""
    what: tuple[str, ...] = ("train", "eval")
    batch_size: int = 100
    precision: str = "float32"
    platform: str = "auto"
    """cpu, gpu, tpu, or auto: the best that the framework takes by itself."""
    seeds: int | None = None
    """Networks trained in one program; None for one without an axis of members."""
    steps_per_call: int = 600
    """Steps of a compiled call where the length of a loop is part of the program."""
    slow_down: float = 0.0
    """Share of the steps that are done twice, to test that a comparison finds it."""
    train_size: int = 60_000
    test_size: int = 10_000
    samples: int = 20
    min_samples: int = 1
    budget_s: float = 1.5
    warmup_s: tuple[float, float] = (0.2, 3.0)
    min_sample_s: float = 0.1


class Data(NamedTuple):
    """Random images (n, 28, 28, 1) uint8 in 0..255, random labels (n,) int32, a random order."""

    image: np.ndarray
    label: np.ndarray
    order: np.ndarray
    test_image: np.ndarray
    test_label: np.ndarray

    def as_float(self) -> "Data":
        """The same with images in float32, 0 to 1."""
        image, test_image = self.image.astype(np.float32), self.test_image.astype(np.float32)
        image /= 255  # in place: one copy less at the peak of memory
        test_image /= 255
        return self._replace(image=image, test_image=test_image)

    def batch_index(self, i: int, batch_size: int) -> np.ndarray:
        """Which images batch `i` takes, epoch after epoch; all batches are full."""
        first = i % (len(self.order) // batch_size) * batch_size
        return self.order[first : first + batch_size]


class Workload(NamedTuple):
    """What a framework's worker makes of a job.

    Attributes:
        state: what training starts from.
        train: (state, steps) → state, runs that many steps.
        evaluate: state → anything, evaluates all test images.
        sync: waits for everything in what either returned.
        context: versions and whatever else the result file's context should say.
        details: what to record with the training step, such as its memory.
        unit: training steps come in multiples of this.
        min_sample_s: least time in a sample if the framework needs more than the job's.
        program: the compiled training steps, if the framework has them as one object.
    """

    state: Any
    train: Callable[[Any, int], Any]
    evaluate: Callable[[Any], Any]
    sync: Callable[[Any], Any]
    context: dict[str, Any]
    details: dict[str, Any]
    unit: int = 1
    min_sample_s: float = 0.0
    program: Any = None


def make_data(job: Job) -> Data:
    """The job's images and labels, the same in every process."""
    rng = np.random.default_rng(0)
    n, m = job.train_size, job.test_size
    return Data(
        rng.integers(0, 256, (n, 28, 28, 1), np.uint8),
        rng.integers(0, NUM_CLASSES, n, np.int32),
        rng.permutation(n).astype(np.int32),
        rng.integers(0, 256, (m, 28, 28, 1), np.uint8),
        rng.integers(0, NUM_CLASSES, m, np.int32),
    )


def run(job: Job, make: Callable[[Job, Data], Workload]) -> dict[str, Any]:
    """Measures the workload that `make` makes; returns the answer that `main` prints."""
    workload = make(job, make_data(job))
    answer: dict[str, Any] = {"context": workload.context}
    state = workload.state
    limits: dict[str, Any] = {
        "samples": job.samples,
        "min_samples": job.min_samples,
        "warmup_s": job.warmup_s,
        "budget_s": job.budget_s,
        "min_sample_s": max(job.min_sample_s, workload.min_sample_s),
        "sync": workload.sync,
    }
    if "train" in job.what:
        times, state = timing.measure(workload.train, state, unit=workload.unit, **limits)
        details = workload.details | {"peak_rss_bytes": peak_rss_bytes()}
        answer["train"] = times._asdict() | {"details": details}
    if "eval" in job.what:

        def evaluate(_: Any, times: int) -> None:
            for _ in range(times):  # each is waited for: its result is what one evaluates for
                workload.sync(workload.evaluate(state))

        limits["sync"] = lambda _: None
        times, _ = timing.measure(evaluate, None, **limits)
        answer["eval"] = times._asdict() | {"details": {}}
    return answer


def peak_rss_bytes() -> int | None:
    """The most memory this process ever had resident, imports and data included; on Linux."""
    status = Path("/proc/self/status")  # `ru_maxrss` would be the parent's where that is larger
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(x.split()[1]) * 1024 for x in lines if x.startswith("VmHWM")), None)


def asked() -> Job:
    """The job on the command line."""
    return Job(**json.loads(sys.argv[1]))


def main(make: Callable[[Job, Data], Workload]) -> None:
    """Does the job on the command line and prints the answer."""
    print(json.dumps(run(asked(), make)), flush=True)
