"""`--profile`: a trace of the second call of the train steps."""

from pathlib import Path

import jax

from mnist_jax.callbacks import Callback, Result
from mnist_jax.errors import writing
from mnist_jax.metrics import Metrics


class Profiler(Callback):
    """Writes a trace for TensorBoard or Perfetto into a folder; raises DeviceError if it cannot."""

    def __init__(self, folder: Path):
        with writing(folder, "--profile"):
            folder.mkdir(parents=True, exist_ok=True)
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
        """Prints where the trace is."""
        missing = "no trace, because the train steps were called less than twice"
        print(f"profile: {self.folder if self.calls > 1 else missing}")

    def close(self) -> None:
        """Ends a trace that is running."""
        self._trace(False)

    def _trace(self, on: bool) -> None:
        if on != self.tracing:
            jax.profiler.start_trace(self.folder) if on else jax.profiler.stop_trace()
            self.tracing = on
