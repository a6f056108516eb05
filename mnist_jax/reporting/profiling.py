"""`--profile`: a trace of the second call of the train steps, and its costliest operations."""

import collections
import gzip
import json
from pathlib import Path

import jax

from mnist_jax.callbacks import Callback, Result
from mnist_jax.errors import DeviceError
from mnist_jax.metrics import Metrics


class Profiler(Callback):
    """Writes a trace for TensorBoard or Perfetto into a folder; raises DeviceError if it cannot."""

    def __init__(self, folder: Path):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DeviceError(f"cannot write --profile={folder}: {error.strerror}") from error
        self.folder, self.calls, self.tracing = folder, 0, False

    def on_epoch_begin(self, epoch: int, batch: int, num_batches: int) -> None:
        """Starts the trace if the first call ended an epoch, so that no evaluation is in it."""
        self._trace(self.calls == 1)

    def on_chunk_end(
        self, epoch: int, batch: int, num_batches: int, metrics: Metrics, train_s: float
    ) -> None:
        """Starts the trace after the first call, ends it after the second."""
        self.calls += 1
        self._trace(self.calls == 1 and batch < num_batches)

    def on_train_end(self, result: Result) -> None:
        """Prints the ten costliest operations; on a CPU their times are summed over threads."""
        if self.calls < 2:
            print("profile: no trace, because the train steps were called less than twice")
            return
        found = sorted(operation_seconds(self.folder).items(), key=lambda item: -sum(item[1]))
        total = sum(sum(seconds) for _, seconds in found)
        print(f"profile: {self.folder}\ncostliest operations:\n        ms   share    times")
        for name, s in found[:10]:
            print(f"{1e3 * sum(s):10.3f} {sum(s) / total:7.1%} {len(s):8,}  {name}")

    def close(self) -> None:
        """Ends a trace that is running."""
        self._trace(False)

    def _trace(self, on: bool) -> None:
        if on != self.tracing:
            jax.profiler.start_trace(self.folder) if on else jax.profiler.stop_trace()
            self.tracing = on


def operation_seconds(folder: Path) -> dict[str, list[float]]:
    """The seconds of each execution of every compiled operation in a folder's newest trace."""
    newest = max(folder.rglob("*.trace.json.gz"), key=lambda path: path.stat().st_mtime)
    seconds: dict[str, list[float]] = collections.defaultdict(list)
    for event in json.loads(gzip.decompress(newest.read_bytes()))["traceEvents"]:
        name = event.get("args", {}).get("hlo_op")
        # A loop or a call is skipped: its time is that of the operations inside it.
        if name and name.partition(".")[0] not in ("while", "call", "conditional"):
            seconds[name].append(event["dur"] * 1e-6)
    return seconds
