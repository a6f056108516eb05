"""A disk that is full, and one that cannot be written: real ones, in a namespace of the test's."""

import shutil
import subprocess
import sys

import pytest
import training

UNSHARE = ["unshare", "--mount", "--map-root-user"]


def may_mount() -> bool:
    if shutil.which("unshare") is None:
        return False
    trial = [*UNSHARE, "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    return subprocess.run(trial, capture_output=True).returncode == 0


pytestmark = pytest.mark.skipif(not may_mount(), reason="needs Linux and the right to mount")


def on_small_disk(folder, script: str) -> subprocess.CompletedProcess:
    """Runs `script` where `folder` is a disk of 300 kB: room for two checkpoints and a half."""
    mounted = f"set -e; mount -t tmpfs -o size=300k tmpfs {folder}; set +e; {script}"
    command = [*UNSHARE, "bash", "-c", mounted]
    return subprocess.run(command, cwd=training.ROOT, capture_output=True, text=True)


def train(folder, data_dir) -> str:
    words = training.flags("logistic", folder / "run", data_dir)
    return f"{sys.executable} train.py {' '.join(words)} > /dev/null; echo $?"


def test_a_full_disk_ends_the_run_which_goes_on_once_there_is_room(data_dir, tmp_path):
    """Shown to fail with `Run._writing` that lets the OSError through."""
    (disk := tmp_path / "disk").mkdir()
    (kept := tmp_path / "kept").mkdir()
    again = train(disk, data_dir)
    script = f"{again}; mount -o remount,size=9M {disk}; {again}; cp {disk}/run/*.json* {kept}"
    done = on_small_disk(disk, script)
    assert done.stdout.split() == ["6", "0"], done.stderr
    (line,) = done.stderr.splitlines()
    assert "(No space left on device); free some space or choose another --workdir" in line
    whole = training.start(*training.flags("logistic", tmp_path / "whole", data_dir))
    _, err = whole.communicate(timeout=300)
    assert whole.returncode == 0, err
    assert training.outcome(kept) == training.outcome(tmp_path / "whole")


def test_a_read_only_folder_is_named(data_dir, tmp_path):
    script = f"mount -o remount,ro {tmp_path}; {train(tmp_path, data_dir)}"
    done = on_small_disk(tmp_path, script)
    assert done.stdout.split() == ["6"], done.stderr
    assert done.stderr == (
        f"error: cannot write the run's folder {tmp_path / 'run'} (Read-only file system); "
        "choose another --workdir\n"
    )
