"""What the frameworks' processes have in common: the job, its data, the clock and the answer.

    python -m benchmarks.peer_workers.pytorch '{"model": "mlp"}'

prints one JSON object as its last line. Inside the clock: taking a batch from the training images
in memory, in an order drawn before (Keras draws its own), dropout, forward, backward, the update
(`train`); or loss and hits of every test image (`eval`). Outside: imports, making the data,
compilation.

Images are random, never zeros. Two things spare the others work: this project takes uint8 and
normalises each batch inside the clock, where they are handed float32 from 0 to 1; and it sums loss
and hits while training, as only Keras does too.
"""

import dataclasses
import json
import resource
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
    """How to use the framework; each worker names its own."""
    what: tuple[str, ...] = ("train", "eval")
    batch_size: int = 100
    precision: str = "float32"
    """On a CPU only this project's own worker knows others."""
    platform: str = "auto"
    """Where: cpu, gpu, or auto, the best that the framework's worker takes by itself."""
    train_size: int = 60_000
    test_size: int = 10_000
    samples: int = 20
    budget_s: float = 1.5
    warmup_s: float = 3.0
    min_sample_s: float = 0.1

    @property
    def eval_batches(self) -> int:
        """Batches in an evaluation."""
        return -(-self.test_size // EVAL_BATCH_SIZE)


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
        image /= 255  # in place, so that the peak of memory stays training's
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
        evaluate: (state, batches) → anything, evaluates that many batches of test images.
        sync: waits for all that either returned.
        context: versions and whatever else the result file's context should say.
        min_sample_s: least time in a sample, where the framework needs more than the job's.
        multiple_of: training steps in a sample are a multiple of this.
        any_length: whether one program runs any number of steps.
        whole: whether every number of steps is compiled, so that all are to be such multiples.
        analysis: what the compiler says of the memory of a training step, if it does.
    """

    state: Any
    train: Callable[[Any, int], Any]
    evaluate: Callable[[Any, int], Any]
    sync: Callable[[Any], Any]
    context: dict[str, Any]
    min_sample_s: float = 0.0
    multiple_of: int = 1
    any_length: bool = False
    whole: bool = False
    analysis: Any = None


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
    common = {
        "samples": job.samples,
        "warmup_s": job.warmup_s,
        "budget_s": job.budget_s,
        "min_sample_s": max(job.min_sample_s, workload.min_sample_s),
        "sync": workload.sync,
        "any_length": workload.any_length,
        "whole": workload.whole,
    }
    if "train" in job.what:
        multiple_of = workload.multiple_of
        times, state = timing.measure(workload.train, state, multiple_of=multiple_of, **common)
        answer["train"] = times._asdict()
        answer["harness_s"] = timing.overhead_s(state, workload.sync)
        answer["peak_rss_bytes"] = peak_rss_bytes()
    if "eval" in job.what:

        def evaluate(_: Any, batches: int) -> Any:
            for first in range(0, batches, job.eval_batches):
                # Each is waited for: an evaluation's numbers are what one evaluates for.
                result = workload.evaluate(state, min(job.eval_batches, batches - first))
                workload.sync(result)

        times, _ = timing.measure(evaluate, None, multiple_of=job.eval_batches, **common)
        answer["eval"] = times.per(job.eval_batches)._asdict()
    return answer


def peak_rss_bytes() -> int:
    """The most memory this process ever had resident, its imports and data included.

    Linux hands `ru_maxrss` down from the process that started this one, so there VmHWM is read.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def asked() -> Job:
    """The job on the command line."""
    return Job(**json.loads(sys.argv[1]))


def main(make: Callable[[Job, Data], Workload]) -> None:
    """Does the job on the command line and prints the answer."""
    print(json.dumps(run(asked(), make)), flush=True)
