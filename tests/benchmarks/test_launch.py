"""Processes, what is said of the machine, and commands on a machine without tyro and tfds."""

import argparse
import dataclasses
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from benchmarks import launch
from benchmarks.results import Recorder
from benchmarks.workers.job import Job
from mnist_jax import DATASETS, Dataset


def test_the_user_s_cache_of_compiled_programs_is_not_handed_on(monkeypatch, tmp_path):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    program = "import os; print(os.environ.get('JAX_COMPILATION_CACHE_DIR'))"
    show = [sys.executable, "-c", program]
    assert launch.run(show)[0] == "None\n"
    assert launch.run(show, launch.shared_cache("/x"))[0] == "/x/compiled\n"


def test_a_failure_is_its_last_line_and_a_process_that_hangs_is_ended_with_its_children():
    with pytest.raises(launch.ProcessError, match=r"^ModuleNotFoundError: no such thing$"):
        launch.run([sys.executable, "-c", "raise ModuleNotFoundError('no such thing')"])
    with pytest.raises(launch.ProcessError, match=r"^cannot start /nowhere/python"):
        launch.run(["/nowhere/python"])
    started = time.monotonic()
    with pytest.raises(launch.ProcessError, match="not finished after 1 s"):
        launch.run(["bash", "-c", "sleep 60 & sleep 60"], timeout_s=1)
    assert time.monotonic() - started < 30


def test_sigterm_ends_a_command_with_all_that_it_measures(tmp_path):
    beats = tmp_path / "beats"
    beat = f"for i in {{1..300}}; do echo >> {beats}; sleep 0.1; done"
    command = "from benchmarks import launch; launch.main('', lambda _: launch.run({}), 'model')"
    inner = [sys.executable, "-c", command.format(["bash", "-c", beat])]
    process = subprocess.Popen([sys.executable, "-c", command.format(inner)])
    while not beats.exists():
        time.sleep(0.1)
    process.terminate()
    assert process.wait(timeout=30) == 143
    number = beats.stat().st_size
    time.sleep(1)
    assert beats.stat().st_size == number


def test_a_process_that_dies_keeps_what_it_measured_and_finding_nothing_ends_with_6(
    tmp_path, monkeypatch
):
    made = "os.kill(os.getpid(), 9) if job.seeds else Workload(train=lambda x, _: x)"
    code = f"import os\nfrom benchmarks.workers.job import Workload\nmake = lambda job, _: {made}"
    (tmp_path / "dying.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    job = Job(model="logistic", what=["train"], budget_s=0.0, min_sample_s=0.0)
    cases = [dataclasses.asdict(dataclasses.replace(job, seeds=n)) for n in (None, 2)]
    recorder, run_all = Recorder(None, {"platform": "cpu"}), "benchmarks.workers.job:run_all"
    launch.measure(recorder, run_all, "both", cases=cases, make="dying:make")
    launch.measure(recorder, "os:getcwd", "silent")
    assert [b.mode for b in recorder.found.benchmarks] == [job.mode]
    why = {"both": "exit status -9; out of memory?", "silent": "it printed no result"}
    assert recorder.found.context["excluded"] == why
    monkeypatch.setattr("sys.argv", ["step"])
    monkeypatch.setattr(launch, "where", lambda _: {"platform": "cpu"})
    assert launch.main("", lambda *_: None, launch.CASES, lambda _: []) == 6


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model=cn"], "error: unknown model 'cn'; choose from"),
        (["--fork=nowhere.py"], "error: cannot read the fork"),
        (["--dataset=nowhere.npz"], "error: cannot read"),
    ],
)
def test_what_is_not_there_is_one_line(words, message, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["step", *words])
    assert launch.main("", launch.random_images, launch.CASES) in (2, 3)
    assert capsys.readouterr().err.startswith(message)


def test_random_images_are_like_those_of_the_data_set(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    x, y = np.zeros((30, 8, 9, 3), np.uint8), np.arange(30) % 5
    np.savez("own.npz", x_train=x, y_train=y, x_test=x[:10], y_test=y[:10])
    options = argparse.Namespace(**launch.DEFAULTS | {"dataset": "own.npz"})
    launch.check(options)
    assert Path(options.dataset).is_absolute()
    own = "fork", "options", "dataset"
    sizes = {"image_shape": (8, 9, 3), "num_classes": 5, "train_size": 100, "test_size": 10}
    assert launch.random_images(options) == sizes | {n: getattr(options, n) for n in own}
    load = lambda *, size: Dataset.from_arrays("own", x[:, :size], y, x[:9, :size], y[:9])  # noqa: E731
    monkeypatch.setitem(DATASETS, "own", load)  # as a fork does
    options.dataset, options.options = "own", ["size=4"]
    assert launch.random_images(options)["image_shape"] == (4, 9, 3)


def test_every_command_starts_without_what_a_machine_with_a_gpu_may_lack(tmp_path, monkeypatch):
    blocked = ("tyro", "docstring_parser", "typeguard", "tensorflow_datasets")
    text = f"import sys; sys.modules.update(dict.fromkeys({blocked}))"
    (tmp_path / "sitecustomize.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    names = [path.stem for path in (launch.ROOT / "benchmarks").glob("*.py")]
    imports = "; ".join(f"import benchmarks.{name}" for name in names)
    launch.run([sys.executable, "-c", imports])
    assert "--budget_minutes" in launch.run([sys.executable, "-m", "benchmarks", "--help"])[0]
