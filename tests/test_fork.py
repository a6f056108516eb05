"""What a fork may not do: fail, replace a name of the package, mix with another fork."""

from concurrent.futures import ThreadPoolExecutor

import optax
import pytest

from mnist_jax import LOSSES, OPTIMIZERS, Config, fit, load_run
from mnist_jax.errors import UsageError, unknown_choice
from mnist_jax.fork import REGISTRIES


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("x = 1\nx.y", "fails in line 2: AttributeError: 'int' object has no attribute 'y'"),
        ("def f(:", "fails in line 1: SyntaxError: invalid syntax"),
        ("exec('def f(): exit(2)', ns := {}); ns['f']()", "fails in line 1: SystemExit: 2"),
        ("x = '\0'", "fails.*: (Value|Syntax)Error: .*null bytes"),
        ("exit(3)", "fails in line 1: SystemExit: 3"),
        ("", "unknown loss 'focal2'; choose from .*cross_entropy"),
        ('from mnist_jax import LOSSES\nLOSSES["focal2"] = 3', "loss 'focal2' is no function"),
        ('from mnist_jax import MODELS\nMODELS["mlp"] = 3', "replaces the model 'mlp' of mnist"),
        ("import mnist_jax\nmnist_jax.PRESETS['fast']['shift'] = 1", "fails in line 2: TypeError"),
    ],
)
def test_a_fork_that_fails_is_a_usage_error(tmp_path, code, message):
    (tmp_path / "fork.py").write_text(code)
    before = {name: dict(registry) for name, registry in REGISTRIES.items()}
    with pytest.raises(UsageError, match=message):
        Config(fork=tmp_path / "fork.py", loss="focal2")
    assert before["model"] == REGISTRIES["model"]
    assert "choose from those that --fork adds" in str(unknown_choice("loss", "mine", []))


BROKEN = """
import flax.linen as nn
import optax
from mnist_jax import AUGMENTATIONS, DATASETS, LOSSES, MODELS, OPTIMIZERS
from mnist_jax.models import LogisticRegression

class Noisy(LogisticRegression):
    __call__ = nn.compact(lambda self, x, *, train=False: nn.Dropout(0.5, deterministic=False)(x))
class Sown(LogisticRegression):
    @nn.compact
    def __call__(self, x, *, train=False):
        self.sow("losses", "size", x.mean((1, 2, 3)))
        return super().__call__(x)
class Plain(LogisticRegression):
    __call__ = nn.compact(lambda self, x, *, train=False: nn.Dense(10)(x.reshape(len(x), -1)))
class Pair(LogisticRegression):
    __call__ = lambda self, x, *, train=False: (x, x)

OPTIMIZERS["broken"] = lambda rate: optax.GradientTransformation(lambda _: (), lambda *_: 1 / 0)
LOSSES["pair"], AUGMENTATIONS["none"] = lambda logits, batch: (logits, batch), lambda x, key: None
AUGMENTATIONS["broken"] = lambda batch, key: {**batch, "image": batch["pixels"]}
AUGMENTATIONS["half"] = lambda batch, key: {name: x[::2] for name, x in batch.items()}
OPTIMIZERS["none"] = lambda rate: None
LOSSES["broken"] = lambda logits, batch: logits.mean()
OPTIMIZERS["halved"] = lambda rate: optax.adamw(rate, mu_dtype="bfloat16")
DATASETS["broken"] = DATASETS["Digits"] = lambda: [1]
MODELS.update(broken=Noisy, sown=Sown, plain=Plain, pair=Pair)
DATASETS["absent"] = lambda: open("absent.csv")
"""


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("optimizer", "a step with .* in line 19 of fork.py: ZeroDivisionError: .*; --debug"),
        ("optimizer=halved", "the optimizer 'halved' has arrays of bfloat16, which no checkpoint"),
        ("optimizer=none", "the optimizer 'none' fails: AttributeError: 'NoneType' object has no"),
        ("augmentation", "line 21 of fork.py: KeyError: 'pixels'"),
        ("augmentation=half", "the augmentation changes the shape or the dtype of the image"),
        ("model=sown", r"the model sows a loss of shape \(2,\); sow a scalar, as its mean"),
        ("model", 'model .broken. .* in line 8 of fork.py: .*Dropout_0 needs PRNG for "drop'),
        ("model=pair", "the model returns a tuple, no array of logits"),
        ("loss=pair", r"the loss is a tuple, no array \(100,\)"),
        ("augmentation=none", "the augmentation returns no batch; a batch has image, label and"),
        ("model=plain", "the model 'plain' computes nothing in bfloat16; pass its field dtype"),
        ("dataset", "the function of broken returns a list, no Dataset"),
        ("dataset=Digits", "the function of Digits returns a list"),  # it is not digits
        ("dataset=absent", "the data set 'absent' fails in line 28 of fork.py: FileNotFound"),
        ("loss", r"the loss is float32\[\]; it has a float for each example, \(100,\)"),
    ],
)
def test_a_fork_that_cannot_train_is_refused_and_makes_no_folder(config, tmp_path, field, message):
    (tmp_path / "fork.py").write_text(BROKEN)
    field, _, name = field.partition("=")
    run = config(fork=tmp_path / "fork.py", precision="bfloat16", **{field: name or "broken"})
    with pytest.raises(UsageError, match=message):
        fit(run)
    assert not run.workdir.exists()


def test_two_versions_of_a_fork_are_read_in_one_process(tmp_path):
    code = "from mnist_jax import LOSSES, PRESETS\nLOSSES['f'] = lambda x, y, *, NAME=1: x\n"
    code, configs = code + "PRESETS['p'] = {'epochs': len('NAME')}", {}
    for name in ("old", "newer"):
        (fork := tmp_path / f"{name}.py").write_text(code.replace("NAME", name))
        configs[name] = Config(fork=fork, loss="f", preset="p", options=(f"{name}=3",))
    for name, config in configs.items():
        assert (config.resolve().epochs, config.arguments("loss")) == (len(name), {name: 3})


def test_a_run_that_is_read_leaves_the_names_of_the_reader(config, tmp_path, monkeypatch):
    fork, code = tmp_path / "fork.py", "LOSSES['f'] = lambda logits, batch: 0 * logits[:, 0]"
    fork.write_text(f"from mnist_jax import LOSSES\n{code}")
    teacher = fit(config(fork=fork, loss="f", max_steps=1)).workdir
    monkeypatch.setitem(LOSSES, "f", own := lambda logits, batch: logits[:, 0])
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(load_run, [teacher] * 40))
    fit(config(loss="f", init_from=teacher, workdir=tmp_path / "student", max_steps=1))
    assert LOSSES["f"] is own


def test_a_grid_sets_its_own_learning_rate_and_no_other(config, tmp_path, monkeypatch):
    def partly(rate):
        inject = optax.inject_hyperparams(optax.sgd)
        parts = {"kernel": inject(learning_rate=0.5), "bias": inject(learning_rate=rate)}
        return optax.partition(parts, lambda tree: {k: {n: n for n in tree[k]} for k in tree})

    monkeypatch.setitem(OPTIMIZERS, "partly", partly)
    fields = {"optimizer": "partly", "max_steps": 3}
    alone = fit(config(learning_rate=0.1, **fields)).record["params_sha256"]
    several = config(learning_rate=(0.1, 0.2), workdir=tmp_path / "grid", **fields)
    assert fit(several).record["params_sha256"][0] == alone
