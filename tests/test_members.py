"""Many seeds in one program: each member is what a run of its own would be."""

import io
import json
import signal

import jax
import numpy as np
import pytest

from mnist_jax import Config, __main__, fit
from mnist_jax.errors import DeviceError, InterruptedRunError, NonFiniteError
from mnist_jax.parallel import mesh as devices
from mnist_jax.reporting import console as display
from mnist_jax.runs.results import accuracy_line
from mnist_jax.signals import Stop
from mnist_jax.training import Callback


@pytest.fixture
def config(data_dir, tmp_path):
    def make(**fields) -> Config:
        defaults = {"model": "logistic", "dataset": "digits", "epochs": 2, "data_dir": data_dir}
        return Config(**{**defaults, "workdir": tmp_path / "run", **fields})

    return make


MODELS = {
    "logistic": {},
    "mlp": {"dropout": 0.3, "shift": 2.0, "ema_decay": 0.9, "microbatches": 4},
    "cnn": {"batch_size": 50, "hidden_sizes": (16,), "max_steps": 3},
}


def last(result) -> dict:
    return json.loads((result.workdir / "metrics.jsonl").read_text().splitlines()[-1])


@pytest.mark.parametrize("model", MODELS)
def test_each_member_equals_the_run_of_its_seed(config, tmp_path, monkeypatch, model):
    fields = {"model": model, **MODELS[model]}
    alone = [fit(config(seed=n, workdir=tmp_path / f"alone{n}", **fields)) for n in (7, 8, 9)]
    for one_by_one in (True, False):
        monkeypatch.setattr("mnist_jax.trainer.members_take_turns", lambda *_, o=one_by_one: o)
        workdir = tmp_path / f"together{one_by_one}"
        together = fit(config(seeds=3, seed=7, workdir=workdir, **fields))
        if one_by_one:  # the same operations: the same bits
            digests = [run.record["params_sha256"] for run in alone]
            assert together.record["params_sha256"] == digests
        for name in ("train/loss", "test/loss"):
            each = [last(run)[name] for run in alone]
            np.testing.assert_allclose(last(together)[name], each, rtol=1e-3)


def test_the_record_holds_each_member_and_their_statistics(config, capsys):
    result = fit(config(seeds=3, validation=100), observer=display.Display())
    record = json.loads((result.workdir / "result.json").read_text())
    accuracies = record["test_accuracy"]
    assert len(accuracies) == len(set(record["params_sha256"])) == record["seeds"] == 3
    assert accuracies == [correct / 360 for correct in record["test_correct"]]
    found = record["statistics"]["test_accuracy"]
    assert found["mean"] == pytest.approx(np.mean(accuracies))
    assert found["sd"] == pytest.approx(np.std(accuracies, ddof=1))
    assert (found["best"], found["worst"]) == (max(accuracies), min(accuracies))
    assert set(record["statistics"]) == {f"{n}_accuracy" for n in ("train", "validation", "test")}
    rows = [
        json.loads(line) for line in (result.workdir / "metrics.jsonl").read_text().splitlines()
    ]
    assert rows[-1]["test/accuracy"] == accuracies
    assert all(len(rows[0][f"{name}/loss"]) == 3 for name in ("train", "validation", "test"))
    last = capsys.readouterr().out.splitlines()[-1]
    percent = f"{100 * found['mean']:.2f} % mean of 3 seeds, sd {100 * found['sd']:.2f}"
    assert last == f"test accuracy: {percent}"
    assert __main__.main(["verify", str(result.workdir), f"--data_dir={config().data_dir}"]) == 0


def test_an_ensemble_cut_anywhere_ends_as_one_that_was_not(config, tmp_path):
    fields = {"seeds": 2, "model": "mlp", "epochs": 2, "steps_per_call": 7}
    whole = fit(config(workdir=tmp_path / "whole", **fields)).record

    class StopAt(Callback):
        def __init__(self, stop):
            self.stop, self.calls = stop, 0

        def on_chunk_end(self, *_):
            self.calls += 1
            if self.calls == 2:
                self.stop.signal = signal.SIGTERM

    cuts = 0
    while True:
        stop = Stop()
        try:
            record = fit(config(**fields), observer=StopAt(stop), stop=stop).record
            break
        except InterruptedRunError:
            cuts += 1
    assert cuts >= 3
    assert record["params_sha256"] == whole["params_sha256"]
    assert record["test_correct"] == whole["test_correct"]


def test_a_member_that_is_not_finite_is_named_and_left_out(config, monkeypatch):
    """The first member's weights are made infinite; the others train on."""
    from mnist_jax.trainer import Trainer

    init = Trainer.init

    def spoilt(self):
        state = init(self)
        params = jax.tree.map(lambda leaf: leaf.at[0].set(np.inf), state.params)
        return state._replace(params=params)

    monkeypatch.setattr(Trainer, "init", spoilt)
    told = []

    class Listener(Callback):
        def on_warning(self, text):
            told.append(text)

    result = fit(config(seeds=3, steps_per_call=5), observer=Listener())
    record = result.record
    assert told == [
        "the training of seed 1234 is not finite any more; it is left out of the statistics"
    ]
    assert record["nonfinite_seeds"] == [1234]
    assert record["notices"] == told
    assert record["statistics"]["test_accuracy"]["n"] == 2
    content = (result.workdir / "metrics.jsonl").read_text()
    assert json.loads(content.splitlines()[0])["train/loss"][0] is None
    assert "NaN" not in content
    assert "mean of 2 seeds" in accuracy_line(record)
    row = json.loads(content.splitlines()[-1])
    kept = sum(row["test/accuracy"][1:]) / 2
    shown = display.Display()
    shown.console = display.Console(file=io.StringIO(), width=500)
    shown.on_epoch_end(row)
    assert f"test loss {sum(row['test/loss'][1:]) / 2:.4f} accuracy {kept:.4f}" in (
        shown.console.file.getvalue()
    )


def test_when_no_member_is_finite_the_run_ends(config):
    with pytest.raises(NonFiniteError, match="at step 2 "):
        fit(config(model="mlp", seeds=2, learning_rate=1e38))


def test_the_error_names_the_step_at_which_the_last_member_was_lost(config, monkeypatch):
    """The first is lost at once, the second after 20 steps, in the second epoch."""
    from mnist_jax.trainer import Trainer

    init, train = Trainer.init, Trainer.train

    def without(state, member):
        params = jax.tree.map(lambda leaf: leaf.at[member].set(np.inf), state.params)
        return state._replace(params=params)

    def spoiling(self, *args):
        state, *rest = train(self, *args)
        return without(state, 1) if np.all(state.step == 20) else state, *rest

    monkeypatch.setattr(Trainer, "init", lambda self: without(init(self), 0))
    monkeypatch.setattr(Trainer, "train", spoiling)
    with pytest.raises(NonFiniteError, match="at step 21 "):
        fit(config(seeds=2, steps_per_call=5))


def test_more_members_than_memory_holds_are_refused_with_how_many_fit(config):
    with pytest.raises(DeviceError, match=r"seeds is 100000.*at most \d+ fit"):
        fit(config(model="cnn", seeds=100_000))


def test_a_network_that_no_memory_holds_is_refused_before_it_is_made(config):
    with pytest.raises(DeviceError, match=r"the mlp needs at least .* GB.*change --hidden_sizes"):
        fit(config(model="mlp", hidden_sizes=(1_000_000, 1_000_000)))


def test_gradients_of_microbatches_are_counted_once_where_members_take_turns(config, monkeypatch):
    """Of the MLP: 244,522 parameters, kept with two moments and copied; 64 gradients of one."""
    asked = config(model="mlp", seeds=8, microbatches=64, max_steps=1)
    each, gradients = 2 * 3 * 4 * 244_522, 64 * 4 * 244_522
    monkeypatch.setattr(devices, "memory_bytes", lambda _: 8 * each + gradients - 1)
    with pytest.raises(DeviceError, match="at most 7 fit"):
        fit(asked)
    monkeypatch.setattr(devices, "memory_bytes", lambda _: 8.01 * each + gradients)
    fit(asked)


def test_no_decision_reads_the_test_images(config, tmp_path, monkeypatch):
    """Other test labels, the same parameters, bit for bit."""
    from mnist_jax import training

    plain = fit(config(preset="best", seeds=2, ema_decay=0.9)).record
    load = training.load_dataset

    def permuted(*args, **kwargs):
        dataset = load(*args, **kwargs)
        label = np.random.default_rng(0).permutation(dataset.test.label)
        return training.dataclasses.replace(dataset, test=dataset.test._replace(label=label))

    monkeypatch.setattr(training, "load_dataset", permuted)
    record = fit(
        config(preset="best", seeds=2, ema_decay=0.9, workdir=tmp_path / "permuted")
    ).record
    assert record["test_accuracy"] != plain["test_accuracy"]
    assert record["params_sha256"] == plain["params_sha256"]
