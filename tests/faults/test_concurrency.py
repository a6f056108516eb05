"""Many processes at once: one writes, the others are refused, or wait and find it done."""

import re
import signal
import subprocess
import sys
import time

import pytest
import training


def test_of_twenty_starts_in_one_folder_one_wins(data_dir, tmp_path, counted):
    """Shown to fail with the folder's lock left out."""
    words = ["--model=logistic", "--dataset=digits", "--epochs=1000000"]
    where = [f"--workdir={tmp_path / 'run'}", f"--data_dir={data_dir}"]
    processes, deadline = (
        [training.start(*words, *where) for _ in range(20)],
        time.monotonic() + 120,
    )
    while len(running := [p for p in processes if p.poll() is None]) > 1:
        if time.monotonic() > deadline:
            break
        time.sleep(0.1)
    for process in running:
        process.send_signal(signal.SIGTERM)
    ends = {process.pid: (process.communicate()[1], process.returncode) for process in processes}
    winners = [process.pid for process in running if ends[process.pid][1] == 143]
    refusal = rf"error: .* is in use by process {winners[0]};.*\n"
    clean = [err for err, status in ends.values() if status == 2 and re.fullmatch(refusal, err)]
    counted("concurrency", starts=20, winners=len(winners), clean_refusals=len(clean))
    assert (len(winners), len(clean)) == (1, 19), ends


@pytest.mark.mnist
def test_five_that_prepare_one_data_folder_all_succeed(mnist_dir, tmp_path, counted):
    """Shown to fail with the data folder's lock left out."""
    where = [f"--data_dir={tmp_path}", f"--manual_dir={mnist_dir}"]
    command = [sys.executable, "-m", "mnist_jax", "data", *where]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, cwd=training.ROOT, **pipes) for _ in range(5)]
    ends = [(*process.communicate(timeout=300), process.returncode) for process in processes]
    succeeded = [out for out, err, status in ends if (err, status) == ("", 0)]
    counted("concurrency", preparing=5, succeeded=len(succeeded))
    assert len(succeeded) == 5, ends
    sources = sorted(re.search(r"10,000 test images, (\w+)", out)[1] for out in succeeded)
    assert sources == ["decoded"] * 4 + ["original"]
