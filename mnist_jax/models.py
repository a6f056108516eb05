"""The networks: logistic regression, an MLP and a CNN, from images to logits.

Kernels are Glorot-uniform (Glorot and Bengio, 2010) and biases zero at the start, as in Keras. A
new network is a class with a line in `MODELS`; flags set its hidden_sizes, dropout and activation.
"""

import dataclasses
import inspect
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype

from mnist_jax.errors import UsageError, running
from mnist_jax.ops.convolution import conv_general_dilated
from mnist_jax.ops.dense import dot_general
from mnist_jax.ops.pooling import max_pool_2x2

NUM_CLASSES, IMAGE_SHAPE = 10, (28, 28, 1)  # of MNIST
ACTIVATIONS = {"relu": nn.relu, "sigmoid": nn.sigmoid, "tanh": nn.tanh, "gelu": nn.gelu}
GLOROT = nn.initializers.glorot_uniform()
dense = partial(nn.Dense, kernel_init=GLOROT, dot_general=dot_general)
conv3x3 = partial(
    nn.Conv, kernel_size=(3, 3), kernel_init=GLOROT, conv_general_dilated=conv_general_dilated
)


class MaxPool(nn.Module):
    """2×2 max pooling."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """(batch, height, width, c) → (batch, ⌊height / 2⌋, ⌊width / 2⌋, c)."""
        return max_pool_2x2(x)


class Flatten(nn.Module):
    """Joins all axes but the first."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """(batch, ...) → (batch, product of the rest)."""
        return x.reshape((x.shape[0], -1))


class LogisticRegression(nn.Module):
    """A linear map from pixels to classes: 7,850 parameters for MNIST."""

    num_classes: int = NUM_CLASSES
    image_shape: tuple[int, int, int] = IMAGE_SHAPE
    dtype: Dtype | None = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Images (batch, *image_shape) → logits (batch, num_classes)."""
        x = Flatten(name="flatten")(x)  # (batch, 784)
        return dense(self.num_classes, name="logits", dtype=self.dtype)(x)


class MLP(nn.Module):
    """Fully connected layers with an activation between them: 244,522 parameters for MNIST."""

    num_classes: int = NUM_CLASSES
    image_shape: tuple[int, int, int] = IMAGE_SHAPE
    hidden_sizes: tuple[int, ...] = (256, 128, 64, 32)
    dropout: float = 0.0
    activation: str = "relu"
    dtype: Dtype | None = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Images (batch, *image_shape) → logits (batch, num_classes)."""
        x = Flatten(name="flatten")(x)  # (batch, 784)
        for i, size in enumerate(self.hidden_sizes, start=1):
            x = ACTIVATIONS[self.activation](dense(size, name=f"dense{i}", dtype=self.dtype)(x))
            if self.dropout:
                x = nn.Dropout(self.dropout, deterministic=not train, name=f"dropout{i}")(x)
        return dense(self.num_classes, name="logits", dtype=self.dtype)(x)


class CNN(nn.Module):
    """Two pairs of convolutions, two dense layers with dropout: 5,259,594 parameters for MNIST."""

    num_classes: int = NUM_CLASSES
    image_shape: tuple[int, int, int] = IMAGE_SHAPE
    hidden_sizes: tuple[int, ...] = (512, 256)
    dropout: float = 0.5
    dtype: Dtype | None = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Images (batch, *image_shape) → logits (batch, num_classes).

        ReLU after pooling gives the same as before it, from a quarter of the pixels.
        """
        dtype = self.dtype
        x = nn.relu(conv3x3(64, name="conv1", dtype=dtype)(x))  # (batch, 28, 28, 64)
        x = conv3x3(64, name="conv2", dtype=dtype)(x)  # (batch, 28, 28, 64)
        x = nn.relu(MaxPool(name="pool1")(x))  # (batch, 14, 14, 64)
        x = nn.relu(conv3x3(128, name="conv3", dtype=dtype)(x))  # (batch, 14, 14, 128)
        x = conv3x3(256, name="conv4", padding="VALID", dtype=dtype)(x)  # (batch, 12, 12, 256)
        x = nn.relu(MaxPool(name="pool2")(x))  # (batch, 6, 6, 256)
        x = Flatten(name="flatten")(x)  # (batch, 9216)
        for i, size in enumerate(self.hidden_sizes, start=1):  # (batch, 512), (batch, 256)
            x = nn.relu(dense(size, name=f"dense{i}", dtype=dtype)(x))
            x = nn.Dropout(self.dropout, deterministic=not train, name=f"dropout{i}")(x)
        return dense(self.num_classes, name="logits", dtype=dtype)(x)


MODELS: dict[str, type[nn.Module]] = {"logistic": LogisticRegression, "mlp": MLP, "cnn": CNN}
"""The networks by name: Flax modules with the fields `num_classes`, `image_shape` and `dtype`.

A module takes `train`, and `mask` (batch,), False for padding, if it wants it. Random numbers come
from the stream "dropout". Collections besides "params", such as "batch_stats", are the model's
state: training updates them. A scalar sown into "losses" is added to the loss."""

NOT_STATE = ("params", "losses", "intermediates")


def make_model(
    name: str,
    *,
    image_shape: tuple[int, int, int] = IMAGE_SHAPE,
    num_classes: int = NUM_CLASSES,
    dtype: Dtype | None = None,
    **options: Any,
) -> nn.Module:
    """The network of that name for images of a shape (height, width, channels).

    Raises UsageError: it cannot be trained on these images: it lacks a field, or returns no logits.
    """
    fields: dict[str, Any] = {"image_shape": image_shape, "num_classes": num_classes}
    fields |= {"dtype": dtype, **options}
    have = {field.name for field in dataclasses.fields(MODELS[name])}
    if missing := ", ".join(sorted(fields.keys() - have)):
        raise UsageError(f"the model {name!r} has no field {missing}; add it to the class")
    with running(f"the model {name!r} on images {list(image_shape)}"):
        model = MODELS[name](**fields)
        params, state = variable_shapes(model)
        x = jax.ShapeDtypeStruct((2, *image_shape), jnp.float32)
        jax.eval_shape(partial(forward, model), params, state, x)  # as in evaluation
        _, (logits, new_state, _) = trace_training(model, params, state)
    if logits.shape != (2, num_classes):
        shapes = f"shape {logits.shape} for two images; logits have shape {(2, num_classes)}"
        raise UsageError(f"the model {name!r} returns {shapes}")
    if jax.tree.structure(new_state) != jax.tree.structure(state):
        problem = f"the model {name!r} changes the structure of its state in training"
        raise UsageError(f"{problem}; sow into 'intermediates' or 'losses'")
    check_storable((params, state), f"the model {name!r}")
    return model


def check_storable(tree: Any, owner: str) -> None:
    """Raises UsageError if a leaf has a dtype that no checkpoint can hold: bfloat16, a key."""
    for dtype in (leaf.dtype for leaf in jax.tree.leaves(tree)):
        if getattr(dtype, "kind", "V") == "V":
            problem = f"{owner} has arrays of {dtype}, which no checkpoint can hold"
            raise UsageError(f"{problem}; keep them in float32, or a key as its key data")


def init_variables(model: nn.Module, key: jax.Array) -> tuple[Any, Any]:
    """Initial parameters, `{layer: {"kernel": …, "bias": …}}`, and model state; float32."""
    variables = model.init(key, jnp.zeros((1, *model.image_shape), jnp.float32), train=False)
    state = {name: value for name, value in variables.items() if name not in NOT_STATE}
    return variables.get("params", {}), state


def variable_shapes(model: nn.Module) -> tuple[Any, Any]:
    """`init_variables` with a `jax.ShapeDtypeStruct` at each leaf; computes nothing."""
    return jax.eval_shape(lambda: init_variables(model, jax.random.key(0)))


def forward(
    model: nn.Module,
    params: Any,
    model_state: Any,
    x: jax.Array,
    *,
    train: bool = False,
    mask: jax.Array | None = None,
    key: jax.Array | None = None,
) -> tuple[jax.Array, Any, jax.Array | float]:
    """Applies the network.

    Args:
        params, model_state: from `init_variables`.
        x: (batch, height, width, channels) float32.
        train: with dropout, and with the statistics of this batch.
        mask: (batch,) bool, False for padding; for modules that take it.
        key: for dropout.

    Returns the logits, (batch, num_classes) of at least float32; the new model state; and the sum
    of what the module sowed into "losses".
    """
    arguments: dict[str, Any] = {"train": train}
    if "mask" in inspect.signature(type(model).__call__).parameters:
        arguments["mask"] = mask
    logits, new = model.apply(
        {"params": params, **model_state},
        x,
        rngs=None if key is None else {"dropout": key},
        mutable=[*model_state, "losses"] if train else ["losses"],
        **arguments,
    )
    if not isinstance(logits, jax.Array):
        raise UsageError(f"the model returns a {type(logits).__name__}, no array of logits")
    sown = jax.tree.leaves(new.get("losses", {}))
    if shapes := [jnp.shape(x) for x in sown if jnp.ndim(x)]:
        raise UsageError(f"the model sows a loss of shape {shapes[0]}; sow a scalar, as its mean")
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    return logits, {name: new.get(name, model_state[name]) for name in model_state}, sum(sown)


def trace_training(
    model: nn.Module, params: Any, model_state: Any, batch_size: int = 2
) -> tuple[Any, Any]:
    """The jaxpr of `forward` in training, and the shapes of its results; computes nothing.

    Parameters and model state are arrays, or as from `variable_shapes`; the parameters are the
    jaxpr's first arguments.
    """
    x = jax.ShapeDtypeStruct((batch_size, *model.image_shape), jnp.float32)
    mask = jax.ShapeDtypeStruct((batch_size,), bool)
    key = jax.eval_shape(lambda: jax.random.key(0))
    trace = jax.make_jaxpr(partial(forward, model, train=True), return_shape=True)
    return trace(params, model_state, x, mask=mask, key=key)


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
        variable_shapes(model)
    return list(seen.values())
