"""A full disk: a small one, mounted for the test alone."""

import shutil
import subprocess
import sys

import pytest
import training

UNSHARE = ["unshare", "--mount", "--map-root-user"]
TRIAL = [*UNSHARE, "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
MAY_MOUNT = shutil.which("unshare") and subprocess.run(TRIAL, capture_output=True).returncode == 0

pytestmark = pytest.mark.skipif(not MAY_MOUNT, reason="needs Linux and the right to mount")


def test_a_full_disk_ends_the_run_which_resumes_once_there_is_room(data_dir, tmp_path, whole):
    (disk := tmp_path / "disk").mkdir()
    (kept := tmp_path / "kept").mkdir()
    words = training.flags("logistic", disk / "run", data_dir)
    again = f"{sys.executable} train.py {' '.join(words)} > /dev/null; echo $?"
    # 300 kB: room for two and a half checkpoints.
    small, large = f"mount -t tmpfs -o size=300k tmpfs {disk}", f"mount -o remount,size=9M {disk}"
    script = f"{small} && {again}; {large} && {again}; cp {disk}/run/*.json* {kept}"
    command = [*UNSHARE, "bash", "-c", script]
    done = subprocess.run(command, cwd=training.ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["6", "0"], done.stderr
    (line,) = done.stderr.splitlines()
    assert "(No space left on device); free some space or choose another --workdir" in line
    assert training.outcome(kept) == whole("logistic")
