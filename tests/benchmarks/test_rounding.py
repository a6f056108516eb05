"""`benchmarks.rounding`, with a small network in the place of the CNN."""

import flax.linen as nn
import numpy as np
import pytest

from benchmarks import results, rounding
from mnist_jax import models
from mnist_jax.ops import convolution


class Small(nn.Module):
    @nn.compact
    def __call__(self, x, *, train=False):
        x = nn.relu(models.conv3x3(4)(x))
        return models.dense(10)(x.reshape(len(x), -1))


def test_each_way_trains_with_its_own_convolution(tmp_path, data_dir, monkeypatch, capsys):
    """Shown to fail where XLA's own is not put in the place of ours."""
    monkeypatch.setitem(rounding.MODELS, "cnn", Small)
    monkeypatch.setattr(rounding.Config, "model_options", lambda _: {})
    traced, conv3x3, trained = [], convolution.conv3x3, rounding.trained
    kernels = {}

    def ours(*args):
        traced.append(args)
        return conv3x3(*args)

    def watched(made, dataset, options, seed, factor):
        before = len(traced)
        end = trained(made, dataset, options, seed, factor)
        kernels[seed, factor, made] = len(traced) > before
        return end

    monkeypatch.setattr(convolution, "conv3x3", ours)
    monkeypatch.setattr(rounding, "trained", watched)
    output = tmp_path / "rounding.json"
    where = {"dataset": "digits", "data_dir": data_dir, "output": output}
    rounding.measure(rounding.Options(steps=20, repeats=2, **where))
    found = results.read(output)
    rows = found.tables["rounding"]
    assert [row["way"] for row in rows] == [*rounding.FACTORS] * 2
    # Ours is traced by the first network that is trained its way, and never by XLA's.
    assert [*kernels.values()] == [True, False, False, False] + [False] * 4
    accuracy = {
        way: np.mean([row["correct"] / row["count"] for row in rows if row["way"] == way])
        for way in rounding.FACTORS
    }
    assert accuracy[rounding.XLAS] == pytest.approx(accuracy[rounding.OURS], abs=0.05)
    assert f"{100 * accuracy[rounding.OURS]:.2f}" in capsys.readouterr().out
    gradients = found.tables["gradients"]
    assert [row["way"] for row in gradients] == [rounding.OURS, rounding.XLAS] * 2
    for row in gradients:
        assert row["errors"].keys() == {
            f"{layer}/{kind}" for layer in ("Conv_0", "Dense_0") for kind in ("bias", "kernel")
        }
        assert all(0 < error < 1e-5 for error in row["errors"].values())
    assert gradients[0]["errors"] != gradients[1]["errors"]
