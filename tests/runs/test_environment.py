"""What a run records of its machine: enough to explain a number, and nothing private."""

import json

import jax

from mnist_jax.runs import environment


def test_what_changes_numbers_is_recorded_without_paths_and_addresses(monkeypatch):
    device = jax.devices()[0]  # XLA reads its flags now, and would refuse these
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_foo=1 --xla_dump_to=/home/somebody/dump")
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "10.0.0.1:1234")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/home/somebody/cache")
    monkeypatch.setenv("USER", "somebody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    found = environment.describe(device)
    assert found["variables"]["XLA_FLAGS"] == "--xla_cpu_foo=1"
    text = json.dumps(found)
    assert not [word for word in ("somebody", "10.0.0.1", "secret") if word in text]
    assert found["jax"] == jax.__version__
    assert (found["platform"], found["processes"]) == ("cpu", 1)
    assert {"python", "cpu", "cores", "instruction_set", "git_dirty"} <= found.keys()
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")  # as in a container
    assert environment.describe(device)["git_commit"] == found["git_commit"]
