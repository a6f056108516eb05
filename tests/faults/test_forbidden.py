"""A run whose data is at hand opens no socket, and nothing in it is ever unpickled."""

import shutil
import subprocess
import sys

import pytest
import training

# Python tells its audit hooks of both; `pickle.find_class` is where a pickle begins to run code.
WATCHED = """
import os, runpy, sys

def refuse(event, arguments):
    if event.startswith("socket.") or event == "pickle.find_class":
        os.write(2, f"forbidden: {event} {arguments}\\n".encode())
        os._exit(99)

sys.addaudithook(refuse)
_, before, *words = sys.argv
exec(before)
module = words[0] == "-m"
sys.argv = words[module:]
run = runpy.run_module if module else runpy.run_path
run(sys.argv[0], run_name="__main__")
"""


def watched(*words: str, before: str = "") -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", WATCHED, before, *words]
    return subprocess.run(command, cwd=training.ROOT, capture_output=True, text=True)


def test_training_resuming_and_verifying_touch_neither(data_dir, tmp_path, counted):
    """Shown to fail with `prepared_info` asking a server, and with NumPy loading a pickle."""
    words = ["train.py", "--model=mlp", "--dataset=digits", f"--workdir={tmp_path / 'run'}"]
    where = f"--data_dir={data_dir}"
    finished = training.start(*words[1:], "--epochs=1", where, f"--workdir={tmp_path / 'first'}")
    assert finished.communicate() and finished.returncode == 0  # from here on the data is at hand
    stop = "from mnist_jax.trainer import Trainer; Trainer.evaluate = lambda *_: 1 / 0"
    assert watched(*words, where, before=stop).returncode == 1  # after training an epoch
    for command in (words, ["-m", "mnist_jax", "verify", str(tmp_path / "run")]):
        done = watched(*command, where)
        assert done.returncode == 0, done.stderr
    counted("no network, no pickles", commands=4, sockets=0, pickles=0)


@pytest.mark.parametrize(
    "forbidden",
    ["import socket; socket.socket()", "import pickle; pickle.loads(pickle.dumps(OSError))"],
)
def test_the_watch_sees_them(forbidden):
    assert watched("train.py", "--help").returncode == 0
    assert watched("train.py", "--help", before=forbidden).returncode == 99


@pytest.mark.skipif(not shutil.which("strace"), reason="needs strace")
def test_no_library_opens_one_either(data_dir, tmp_path):
    """Below Python, where an audit hook does not look."""
    command = ["strace", "-f", "-qq", "-e", "trace=socket", "-o", tmp_path / "calls"]
    words = ["train.py", "--model=logistic", "--dataset=digits", "--epochs=1"]
    where = [f"--data_dir={data_dir}", f"--workdir={tmp_path / 'run'}"]
    subprocess.run([*command, sys.executable, *words, *where], cwd=training.ROOT, check=True)
    calls = (tmp_path / "calls").read_text().splitlines()
    assert [call for call in calls if "AF_INET" in call] == []
