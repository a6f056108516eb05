"""Many processes at once: one writes; the others are refused, or wait and find the work done."""

import re
import signal
import subprocess
import sys
import time

import pytest
import training


@pytest.mark.campaign
def test_of_twenty_starts_in_one_folder_one_wins(data_dir, tmp_path, counted):
    workdir = tmp_path / "run"
    words = ["--model=logistic", "--dataset=digits", "--epochs=1000000", f"--workdir={workdir}"]
    processes = [training.start(*words, f"--data_dir={data_dir}") for _ in range(20)]
    running, until = processes, time.monotonic() + 200
    while len(running) > 1 and time.monotonic() < until:
        time.sleep(0.1)
        running = [process for process in processes if process.poll() is None]
    for process in running:
        process.send_signal(signal.SIGTERM)
    ends = [(process.communicate()[1], process.returncode) for process in processes]
    winners = [status for _, status in ends if status == 143]
    refusal = rf"error: {workdir} is in use by another process; .*\n"
    refused = [err for err, status in ends if status == 2 and re.fullmatch(refusal, err)]
    counted("concurrency", starts=20, winners=len(winners), refused=len(refused))
    assert (len(winners), len(refused)) == (1, 19), ends


def test_all_that_prepare_one_data_folder_succeed(tmp_path, amount, counted):
    words = f"-m mnist_jax data --dataset=digits --data_dir={tmp_path}".split()
    command, pipe = [sys.executable, *words], subprocess.PIPE
    how = {"cwd": training.ROOT, "stdout": pipe, "stderr": pipe, "text": True}
    processes = [subprocess.Popen(command, **how) for _ in range(amount(2, 5))]
    ends = [(*process.communicate(timeout=300), process.returncode) for process in processes]
    succeeded = [out for out, err, status in ends if (err, status) == ("", 0)]
    counted("concurrency", preparing=len(processes), succeeded=len(succeeded))
    assert len(succeeded) == len(processes), ends
    assert sum("bundled with scikit-learn" in out for out in succeeded) == 1
    assert sum("cached in" in out for out in succeeded) == len(processes) - 1
