"""A run whose data is at hand opens no socket, and unpickles nothing."""

import shutil
import subprocess
import sys

import pytest
import training

from mnist_jax.data import load_dataset

# Python tells its audit hooks of both; `pickle.find_class` is where a pickle begins to run code.
WATCHED = """
import os, sys

def refuse(event, arguments):
    if event.startswith("socket.") or event == "pickle.find_class":
        os.write(2, f"forbidden: {event} {arguments}\\n".encode())
        os._exit(99)

sys.addaudithook(refuse)
exec(sys.argv[1])
"""
COMMANDS = """
import train
from mnist_jax import __main__
_, _, workdir, data_dir = sys.argv
words = ["--model=logistic", "--dataset=digits", f"--workdir={workdir}", f"--data_dir={data_dir}"]
assert train.main([*words, "--epochs=1"]) == 0
assert __main__.main(["verify", workdir]) == 0
"""
CASES = {
    "train and verify": (COMMANDS, 0),
    "a socket": ("import socket; socket.socket()", 99),
    "a pickle": ("import pickle; pickle.loads(pickle.dumps(OSError))", 99),
}


@pytest.mark.parametrize(("code", "status"), CASES.values(), ids=CASES)
def test_no_sockets_and_no_pickles(code, status, data_dir, tmp_path):
    load_dataset("digits", data_dir=data_dir)
    command = [sys.executable, "-c", WATCHED, code, tmp_path / "run", data_dir]
    if shutil.which("strace"):  # sees what libraries do below Python
        trace = ["strace", "-f", "--seccomp-bpf", "-qq", "-e", "trace=socket"]
        command = [*trace, "-o", tmp_path / "calls", *command]
    done = subprocess.run(command, cwd=training.ROOT, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    if shutil.which("strace"):
        assert "AF_INET" not in (tmp_path / "calls").read_text()
