"""A run that was cut anywhere ends as if it had not been."""

import json
import os
import signal
import threading

import pytest
import safetensors.numpy

from mnist_jax import Config, fit
from mnist_jax import atomic_io as storage
from mnist_jax.errors import CheckpointError, DeviceError, InterruptedRunError, UsageError
from mnist_jax.inference import restore as saved
from mnist_jax.inference.verify import verify
from mnist_jax.runs import run_dir as runs
from mnist_jax.signals import Stop
from mnist_jax.training import Callback


@pytest.fixture
def config(data_dir, tmp_path):
    def make(**fields) -> Config:
        defaults = {"model": "mlp", "dataset": "digits", "epochs": 2, "steps_per_call": 4}
        where = {"data_dir": data_dir, "workdir": tmp_path / "run"}
        return Config(**{**defaults, **where, **fields})

    return make


class StopAfter(Callback):
    """Asks for the end at the n-th thing that happens."""

    def __init__(self, stop: Stop, events: int):
        self.stop, self.events, self.resumed_at = stop, events, None

    def tick(self) -> None:
        self.events -= 1
        if self.events == 0:
            self.stop.signal = signal.SIGTERM

    def on_resume(self, step):
        self.resumed_at = step

    def on_chunk_end(self, epoch, step, last_step, sums, train_s):
        self.tick()

    def on_epoch_end(self, row):
        self.tick()


def metrics_of(folder) -> list[dict]:
    """Without the times."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.endswith("_s")} for row in rows]


MODELS = {
    "logistic": {},
    "mlp": {"dropout": 0.3},
    "cnn": {"batch_size": 400, "steps_per_call": 2, "hidden_sizes": (16,)},
}


@pytest.mark.parametrize("model", MODELS)
def test_a_run_cut_after_every_event_ends_as_one_that_was_not(config, tmp_path, model):
    fields = {"model": model, **MODELS[model]}
    whole = fit(config(workdir=tmp_path / "whole", **fields))
    cuts, resumed_at = 0, set()
    while True:
        stop = Stop()
        observer = StopAfter(stop, events=2)  # the first call of each process, and the one before
        try:
            result = fit(config(**fields), observer=observer, stop=stop)
            break
        except InterruptedRunError as interruption:
            assert interruption.exit_status == 143
            cuts += 1
            resumed_at.add(observer.resumed_at)
    assert cuts >= 4
    assert len(resumed_at) >= 4
    assert result.record["params_sha256"] == whole.record["params_sha256"]
    assert result.record["test_correct"] == whole.record["test_correct"]
    assert metrics_of(result.workdir) == metrics_of(whole.workdir)


def test_the_optimizer_is_restored_with_the_parameters(config, tmp_path):
    """Adam's moments, without which a resumed run would leap."""
    whole = fit(config(workdir=tmp_path / "whole"))
    stop = Stop()
    with pytest.raises(InterruptedRunError, match=r"at step 4; .*--workdir=.*run goes on"):
        fit(config(), observer=StopAfter(stop, events=2), stop=stop)
    again = fit(config(steps_per_call=1))  # how many steps a call has, changes nothing
    assert again.record["params_sha256"] == whole.record["params_sha256"]


def test_times_add_up_over_the_processes(config):
    stop = Stop()
    with pytest.raises(InterruptedRunError):
        fit(config(), observer=StopAfter(stop, events=3), stop=stop)
    seen = []

    class Clock(Callback):
        def on_chunk_end(self, epoch, step, last_step, sums, train_s):
            seen.append(train_s)

    record = fit(config(epochs=2), observer=Clock()).record
    assert seen[0] > 0
    assert record["timings"]["train_s"] > seen[0]


def cut(config, **fields):
    stop = Stop()
    with pytest.raises(InterruptedRunError):
        fit(config(**fields), observer=StopAfter(stop, events=6), stop=stop)
    return config().workdir


def test_a_damaged_checkpoint_is_told_and_the_one_before_it_continues(config, tmp_path):
    whole = fit(config(workdir=tmp_path / "whole"))
    folder = cut(config, checkpoint_every=0)
    newest = max((folder / "checkpoints").glob("*.safetensors"))
    newest.write_bytes(newest.read_bytes()[:-1])
    told = []

    class Listener(Callback):
        def on_warning(self, text):
            told.append(text)

    record = fit(config(), observer=Listener()).record
    assert newest.name in told[0]
    assert record["params_sha256"] == whole.record["params_sha256"]
    assert metrics_of(folder) == metrics_of(whole.workdir)


@pytest.mark.parametrize("loss", ["damaged", "removed"])
def test_there_is_never_a_silent_fresh_start(config, loss):
    folder = cut(config)
    for path in (folder / "checkpoints").iterdir():
        path.write_bytes(b"") if loss == "damaged" else path.unlink()
    before = (folder / "metrics.jsonl").read_bytes()
    assert before
    with pytest.raises(CheckpointError, match="start again"):
        fit(config())
    assert (folder / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rest: rest.update(epoch=10**12), "rows are not those of 1000000000000 epochs"),
        (lambda rest: rest["rows"][0].pop("epoch"), "rows are not those of 1 epochs"),
        (lambda rest: rest["rows"].append(5), "hold other than numbers"),
        (lambda rest: rest["rows"][0].update(step="many"), "hold other than numbers"),
        (lambda rest: rest["end"].update(test_count=10**400), "hold other than numbers"),
        (lambda rest: rest["seconds"].update(train_s=None), "hold other than numbers"),
        (lambda rest: rest.update(batch=-1), "stands at batch -1"),
        (lambda rest: rest.update(batch=10**30), "stands at batch 1000"),
        (lambda rest: rest.update(batch=True), "holds other things than"),
    ],
)
def test_a_checkpoint_that_holds_anything_else_is_refused(config, change, message):
    rewrite(cut(config), change)
    for read in (lambda: fit(config()), lambda: saved.load_run(config().workdir)):
        with pytest.raises(CheckpointError, match=message):
            read()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rest: rest["rows"][0].pop("test/loss"), "rows are not those of 1 epochs"),
        (lambda rest: rest["rows"][0]["train/loss"].pop(), "hold other than numbers"),
        (lambda rest: rest["rows"][0].update({"train/loss": 0.5}), "hold other than numbers"),
        (lambda rest: rest["end"].update(test_accuracy=[0.5, None]), "hold other than numbers"),
    ],
)
def test_a_checkpoint_of_another_ensemble_is_refused(config, change, message):
    rewrite(cut(config, seeds=2), change)
    for read in (lambda: fit(config(seeds=2)), lambda: saved.load_run(config().workdir)):
        with pytest.raises(CheckpointError, match=message):
            read()


def rewrite(folder, change) -> None:
    """Changes what stands beside the arrays, as another program might, with a digest to match."""
    path = max((folder / "checkpoints").glob("*.safetensors"))
    arrays = safetensors.numpy.load(path.read_bytes())
    with safetensors.safe_open(path, "numpy") as file:
        metadata = file.metadata()
    rest = json.loads(metadata["rest"])
    change(rest)
    metadata["rest"] = json.dumps(rest)
    storage.write_verified(path, safetensors.numpy.save(arrays, metadata))


def test_a_run_from_before_a_field_came_goes_on(config):
    cut(config)
    path = config().workdir / "config.json"
    before = json.loads(path.read_text())
    del before["microbatches"]
    path.write_text(json.dumps(before))
    with pytest.raises(UsageError, match=r"differs in microbatches \(was 1, now 2\)"):
        fit(config(microbatches=2))
    assert fit(config()).record["config"]["microbatches"] == 1


def test_another_config_is_refused_with_what_differs(config):
    cut(config)
    with pytest.raises(UsageError, match=r"differs in dropout \(was 0.0, now 0.1\)"):
        fit(config(dropout=0.1))
    with pytest.raises(UsageError, match=r"differs in deterministic \(was False, now True\)"):
        fit(config(deterministic=True))


def test_epochs_that_end_while_a_checkpoint_is_written_have_none(config, tmp_path, monkeypatch):
    """On an accelerator a run that is killed then has several lines more than its checkpoint."""

    class EndedAfter(Callback):
        def on_epoch_end(self, row):
            if row["epoch"] == 3:
                raise KeyboardInterrupt

    whole = fit(config(epochs=5, workdir=tmp_path / "whole"))
    monkeypatch.setattr(runs.Run, "is_saving", lambda self: True)
    with pytest.raises(KeyboardInterrupt):
        fit(config(epochs=5), observer=EndedAfter())
    folder = config().workdir
    assert [p.stem for p in folder.glob("checkpoints/*.safetensors")] == [
        "epoch-0000-step-00000000"
    ]
    assert len(metrics_of(folder)) == 3
    assert all(check.good for check in verify(folder))
    again = fit(config(epochs=5))
    assert again.record["params_sha256"] == whole.record["params_sha256"]
    assert metrics_of(folder) == metrics_of(whole.workdir)
    kept = sorted(p.stem for p in folder.glob("checkpoints/*.safetensors"))
    assert kept == ["epoch-0000-step-00000000", "epoch-0005-step-00000075"]
    every = fit(config(epochs=5, checkpoint_every=0, workdir=tmp_path / "every"))
    assert len([*every.workdir.glob("checkpoints/epoch-000[45]-*.safetensors")]) >= 2


def test_a_line_too_many_is_taken_back(config, tmp_path):
    """A process killed between writing an epoch's line and its checkpoint."""
    whole = fit(config(workdir=tmp_path / "whole"))
    folder = cut(config)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 2, "step": 3')
    fit(config())
    assert metrics_of(folder) == metrics_of(whole.workdir)


def test_a_save_that_fails_ends_the_run(config, monkeypatch):
    write = storage.write_verified

    def full(path, data):
        if "checkpoints" in str(path):
            raise OSError(28, "No space left on device")
        write(path, data)

    monkeypatch.setattr(storage, "write_verified", full)
    with pytest.raises(DeviceError, match=r"No space left.*free some space"):
        fit(config())
    assert not (config().workdir / "result.json").exists()


def test_the_process_that_holds_the_folder_is_named(config):
    """Not an earlier one, whose number stands there until the holder has written its own."""
    run = runs.Run(config().workdir, config())
    (run.folder / ".pid").write_text("999999999")
    late = threading.Timer(0.2, (run.folder / ".pid").write_text, [str(os.getpid())])
    late.start()
    try:
        with pytest.raises(UsageError, match=f"in use by process {os.getpid()}"):
            fit(config())
    finally:
        late.join()
        run.close()


def test_what_a_killed_process_was_writing_blocks_nobody(config):
    config().workdir.mkdir()
    (config().workdir / ".config.json.abc.tmp").write_text("{")
    folder = fit(config()).workdir
    assert not list(folder.glob(".*.tmp"))
