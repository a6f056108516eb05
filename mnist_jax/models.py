"""The networks: logistic regression, an MLP and a CNN, from images (batch, 28, 28, 1) to logits.

Kernels are Glorot-uniform (Glorot and Bengio, 2010) and biases zero at the start, as in Keras. A
new network is a class with a line in `MODELS`; flags set its hidden_sizes, dropout and activation.
"""

from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype

from mnist_jax.data.split import NUM_CLASSES
from mnist_jax.errors import UsageError
from mnist_jax.ops.convolution import conv_general_dilated, max_pool_2x2
from mnist_jax.ops.dense import dot_general

IMAGE_SHAPE = (28, 28, 1)
ACTIVATIONS = {"relu": nn.relu, "sigmoid": nn.sigmoid}
GLOROT = nn.initializers.glorot_uniform()
dense = partial(nn.Dense, kernel_init=GLOROT, dot_general=dot_general)
conv3x3 = partial(
    nn.Conv, kernel_size=(3, 3), kernel_init=GLOROT, conv_general_dilated=conv_general_dilated
)


class MaxPool(nn.Module):
    """2×2 max pooling."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(batch, height, width, c) → (batch, height / 2, width / 2, c)."""
        return max_pool_2x2(x)


class Flatten(nn.Module):
    """Joins all axes but the first."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(batch, ...) → (batch, product of the rest)."""
        return x.reshape((x.shape[0], -1))


class LogisticRegression(nn.Module):
    """A linear map from pixels to classes: 7,850 parameters."""

    num_classes: int = NUM_CLASSES
    dtype: Dtype | None = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Images (batch, 28, 28, 1) → logits (batch, num_classes)."""
        x = Flatten(name="flatten")(x)  # (batch, 784)
        return dense(self.num_classes, name="logits", dtype=self.dtype)(x)


class MLP(nn.Module):
    """Fully connected layers with an activation between them: 244,522 parameters."""

    num_classes: int = NUM_CLASSES
    hidden_sizes: tuple[int, ...] = (256, 128, 64, 32)
    dropout: float = 0.0
    activation: str = "relu"
    dtype: Dtype | None = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Images (batch, 28, 28, 1) → logits (batch, num_classes)."""
        x = Flatten(name="flatten")(x)  # (batch, 784)
        for i, size in enumerate(self.hidden_sizes, start=1):
            x = ACTIVATIONS[self.activation](dense(size, name=f"dense{i}", dtype=self.dtype)(x))
            if self.dropout:
                x = nn.Dropout(self.dropout, deterministic=not train, name=f"dropout{i}")(x)
        return dense(self.num_classes, name="logits", dtype=self.dtype)(x)


class CNN(nn.Module):
    """Two pairs of convolutions, then two hidden layers with dropout: 5,259,594 parameters."""

    num_classes: int = NUM_CLASSES
    hidden_sizes: tuple[int, ...] = (512, 256)
    dropout: float = 0.5
    dtype: Dtype | None = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Images (batch, 28, 28, 1) → logits (batch, num_classes)."""
        dtype = self.dtype
        x = nn.relu(conv3x3(64, name="conv1", dtype=dtype)(x))  # (batch, 28, 28, 64)
        x = nn.relu(conv3x3(64, name="conv2", dtype=dtype)(x))  # (batch, 28, 28, 64)
        x = MaxPool(name="pool1")(x)  # (batch, 14, 14, 64)
        x = nn.relu(conv3x3(128, name="conv3", dtype=dtype)(x))  # (batch, 14, 14, 128)
        x = nn.relu(conv3x3(256, name="conv4", padding="VALID", dtype=dtype)(x))  # (b, 12, 12, 256)
        x = MaxPool(name="pool2")(x)  # (batch, 6, 6, 256)
        x = Flatten(name="flatten")(x)  # (batch, 9216)
        for i, size in enumerate(self.hidden_sizes, start=1):  # (batch, 512), (batch, 256)
            x = nn.relu(dense(size, name=f"dense{i}", dtype=dtype)(x))
            x = nn.Dropout(self.dropout, deterministic=not train, name=f"dropout{i}")(x)
        return dense(self.num_classes, name="logits", dtype=dtype)(x)


MODELS: dict[str, type[nn.Module]] = {"logistic": LogisticRegression, "mlp": MLP, "cnn": CNN}
"""The networks by name. A class has the fields `num_classes` and `dtype`, takes `train`, keeps no
state besides parameters, and draws random numbers from the stream "dropout" only."""


def init_params(model: nn.Module, key: jax.Array) -> Any:
    """Initial float32 parameters as nested dicts: `{layer: {"kernel": …, "bias": …}}`."""
    return model.init(key, jnp.zeros((1, *IMAGE_SHAPE)))["params"]


def param_shapes(model: nn.Module) -> Any:
    """The tree of `init_params` with a `jax.ShapeDtypeStruct` at each leaf; computes nothing."""
    return jax.eval_shape(lambda: init_params(model, jax.random.key(0)))


def check_model(name: str, model: nn.Module) -> None:
    """Traces the model to check that it can be trained here; computes nothing.

    Raises:
        UsageError: it has state besides its parameters, or does not return logits.
    """
    key = jax.eval_shape(lambda: jax.random.key(0))
    x = jax.ShapeDtypeStruct((1, *IMAGE_SHAPE), jnp.float32)
    variables = jax.eval_shape(model.init, key, x)
    if others := sorted(variables.keys() - {"params"}):
        raise UsageError(
            f"the model {name!r} has the state {', '.join(others)}; only params is allowed; "
            "replace nn.BatchNorm by nn.LayerNorm or nn.GroupNorm"
        )

    def apply(variables: Any, x: jax.Array, key: jax.Array) -> Any:
        return model.apply(variables, x, train=True, rngs={"dropout": key})

    logits = jax.eval_shape(apply, variables, x, key)
    expected = (1, getattr(model, "num_classes", NUM_CLASSES))
    if logits.shape != expected:
        shapes = f"shape {logits.shape} for one image; logits have shape {expected}"
        raise UsageError(f"the model {name!r} returns {shapes}")


def count_parameters(params: Any) -> int:
    """The number of scalars in the tree."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


class Layer(NamedTuple):
    """A row of the table of layers."""

    name: str
    kind: str  # the module's class
    output_shape: tuple[int, ...]  # without the batch
    parameters: int


def layers(model: nn.Module) -> list[Layer]:
    """The model's layers in the order they first run, by tracing it; computes nothing."""
    seen: dict[str, Layer] = {}

    def record(call, args, kwargs, context):
        output, module = call(*args, **kwargs), context.module
        if module.scope is not None and len(module.path) == 1:
            shape = getattr(output, "shape", ())[1:]
            parameters = count_parameters(module.variables.get("params", {}))
            seen[module.path[0]] = Layer(module.path[0], type(module).__name__, shape, parameters)
        return output

    with nn.intercept_methods(record):
        param_shapes(model)
    return list(seen.values())
