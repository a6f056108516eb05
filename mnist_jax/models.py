"""The three networks, from a linear one to a convolutional one. All return logits.

Kernels start Glorot-uniform (Glorot and Bengio, 2010) and biases at zero, as in Keras. A new
network is a class here and a line in `MODELS`; of its fields, `hidden_sizes`, `dropout` and
`activation` become settable by flags.
"""

from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype
from jax import lax

from mnist_jax.data.split import NUM_CLASSES
from mnist_jax.errors import UsageError
from mnist_jax.ops import convolution

IMAGE_SHAPE = (28, 28, 1)


def dense(features: int, **kwargs) -> nn.Dense:
    """A fully connected layer."""
    kernel_init = nn.initializers.glorot_uniform()
    return nn.Dense(features, kernel_init=kernel_init, dot_general=dot_general, **kwargs)


NARROW = 16  # outputs; a CPU's vector register holds this many float32


def dot_general(
    x: jax.Array, kernel: jax.Array, dimension_numbers: Any, precision: Any = None, **kwargs
) -> jax.Array:
    """`jax.lax.dot_general`, with a gradient that a CPU computes faster for a narrow kernel.

    The kernel's gradient xᵀ g has rows as short as the layer is narrow, and XLA's CPU multiplies
    such matrices at a third of the speed of the transposed product gᵀ x. Transposing the kernel
    before makes that the product of the gradient; the barrier keeps XLA from undoing it.
    """
    dot = partial(lax.dot_general, precision=precision, **kwargs)

    def with_transposed_kernel(x, kernel):
        contract_last = (((x.ndim - 1,), (1,)), ((), ()))
        return dot(x, lax.optimization_barrier(kernel.T), contract_last)

    plain = partial(dot, dimension_numbers=dimension_numbers)
    if kernel.ndim != 2 or kernel.shape[1] > NARROW:
        return plain(x, kernel)
    return lax.platform_dependent(x, kernel, cpu=with_transposed_kernel, default=plain)


def conv3x3(features: int, **kwargs) -> nn.Conv:
    """A 3×3 convolution of stride 1, by the fastest route on each platform."""
    return nn.Conv(
        features,
        (3, 3),
        kernel_init=nn.initializers.glorot_uniform(),
        conv_general_dilated=convolution.conv_general_dilated,
        **kwargs,
    )


class MaxPool(nn.Module):
    """The largest of each 2×2 pixels. A module only so that it shows in the table of layers."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(batch, height, width, c) → (batch, height / 2, width / 2, c)."""
        return convolution.max_pool_2x2(x)


class Flatten(nn.Module):
    """All of an example's numbers in a row."""

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


ACTIVATIONS = {"relu": nn.relu, "sigmoid": nn.sigmoid}


class MLP(nn.Module):
    """Fully connected layers with an activation between: 244,522 parameters."""

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
"""The networks by name: classes with the fields `num_classes` and `dtype`, called with `train`. All
their state is parameters, and what they draw at random comes from the keys "dropout"."""


def init_params(model: nn.Module, key: jax.Array) -> Any:
    """Fresh float32 parameters: a tree of dicts, `{layer: {"kernel": …, "bias": …}}`."""
    return model.init(key, jnp.zeros((1, *IMAGE_SHAPE)))["params"]


def params_of(model: nn.Module) -> Any:
    """The shapes and dtypes of the model's parameters; nothing is computed."""
    return jax.eval_shape(lambda: init_params(model, jax.random.key(0)))


def check_model(name: str, model: nn.Module) -> None:
    """Refuses a network that the steps cannot train; nothing is computed.

    Raises:
        UsageError: it keeps state besides its parameters, or its results are no logits.
    """
    key, x = jax.random.key(0), jnp.zeros((1, *IMAGE_SHAPE))
    variables = jax.eval_shape(lambda: model.init(key, x))
    if others := sorted(variables.keys() - {"params"}):
        raise UsageError(
            f"the model {name!r} keeps {', '.join(others)}; all its state must be parameters; with "
            "nn.LayerNorm or nn.GroupNorm in place of nn.BatchNorm it is"
        )
    rngs = {"dropout": key}
    logits: Any = jax.eval_shape(lambda v: model.apply(v, x, train=True, rngs=rngs), variables)
    expected = (1, getattr(model, "num_classes", NUM_CLASSES))
    if logits.shape != expected:
        raise UsageError(
            f"the model {name!r} makes {logits.shape} of an image; logits are {expected}"
        )


def count_parameters(params: Any) -> int:
    """How many numbers the tree holds."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


class Layer(NamedTuple):
    """A row of the table of layers; `output_shape` leaves the batch out."""

    name: str
    kind: str
    output_shape: tuple[int, ...]
    parameters: int


def layers(model: nn.Module) -> list[Layer]:
    """The model's layers in the order they run, found by tracing it: nothing is computed."""
    seen: dict[str, Layer] = {}  # a layer used twice is one row

    def record(call, args, kwargs, context):
        output = call(*args, **kwargs)
        if context.module.scope is not None and len(context.module.path) == 1:
            params = context.module.variables.get("params", {})
            name, kind = context.module.name or "", type(context.module).__name__
            shape = getattr(output, "shape", ())[1:]
            seen[name] = Layer(name, kind, shape, count_parameters(params))
        return output

    with nn.intercept_methods(record):
        params_of(model)
    return list(seen.values())
