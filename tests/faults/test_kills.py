"""SIGKILL at random moments, resumed until done: the end is that of a run nobody disturbed.

`python -m pytest tests/faults --kills=300` repeats the full record; the default is a quick part.
Shown to fail with the running metric sums left out of the checkpoint.
"""

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# (flags, share of all kills); steps enough for some seconds of training each.
RUNS = {
    "logistic": (["--epochs=60", "--batch_size=20", "--steps_per_call=40"], 0.6),
    "mlp": (["--epochs=20", "--batch_size=20", "--steps_per_call=20", "--dropout=0.2"], 0.3),
    "cnn": (["--max_steps=24", "--batch_size=40", "--steps_per_call=1"], 0.1),
}


def command(model: str, workdir: Path, data_dir: Path) -> list[str]:
    where = [f"--workdir={workdir}", f"--data_dir={data_dir}", "--dataset=digits"]
    flags = [*RUNS[model][0], *where, "--checkpoint_every=0"]
    return [sys.executable, "train.py", f"--model={model}", *flags]


def outcome(workdir: Path) -> tuple[str, list[dict]]:
    """The digest of the parameters, and metrics.jsonl without its times."""
    record = json.loads((workdir / "result.json").read_text())
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    timeless = [{k: v for k, v in row.items() if not k.endswith("_s")} for row in rows]
    return record["params_sha256"], timeless


def finished(process: subprocess.Popen) -> bool:
    _, err = process.communicate(timeout=120)
    assert process.returncode in (0, -9), err
    return process.returncode == 0


@pytest.mark.parametrize("model", RUNS)
def test_killed_and_resumed_until_done(model, data_dir, tmp_path, request):
    wanted = max(1, round(request.config.getoption("--kills") * RUNS[model][1]))
    rng = random.Random(f"{model} {wanted}")
    started = time.monotonic()
    subprocess.run(
        command(model, tmp_path / "whole", data_dir), cwd=ROOT, check=True, capture_output=True
    )
    longest_s = time.monotonic() - started
    whole, kills, runs = outcome(tmp_path / "whole"), 0, 0
    while kills < wanted:
        runs += 1
        workdir = tmp_path / str(runs)
        while True:
            process = subprocess.Popen(
                command(model, workdir, data_dir),
                cwd=ROOT,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            time.sleep(rng.uniform(0, longest_s))
            process.kill()
            if finished(process):
                break
            kills += 1
        assert outcome(workdir) == whole, workdir
    if file := request.config.getoption("--faults_record"):
        elapsed_s = round(time.monotonic() - started)
        row = {"test": "kills", "model": model, "kills": kills, "runs": runs, "mismatches": 0}
        with Path(file).open("a") as record:
            record.write(json.dumps({**row, "elapsed_s": elapsed_s}) + "\n")
