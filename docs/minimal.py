"""A complete training script without `fit`; the one to copy from.

Trains an MLP on MNIST, evaluates it on the test images after each epoch, and prints the results:
`python docs/minimal.py`.
"""

from functools import partial

import jax
import optax

from mnist_jax import load_dataset, steps
from mnist_jax.data.batches import num_batches
from mnist_jax.metrics import Metrics
from mnist_jax.models import make_model

DATASET, MODEL = "mnist", "mlp"
EPOCHS, BATCH_SIZE, SEED = 10, 100, 1234

data = load_dataset(DATASET)
model = make_model(MODEL, image_shape=data.spec.image_shape, num_classes=data.spec.num_classes)
per_epoch = num_batches(len(data.train.label), BATCH_SIZE)
tx = optax.adam(optax.cosine_decay_schedule(1e-3, EPOCHS * per_epoch))

# The functions are pure. Model and optimizer are bound before tracing; arrays are arguments.
init_state = jax.jit(partial(steps.init_state, model=model, tx=tx))
train_steps = jax.jit(
    partial(steps.train_steps, model=model, tx=tx, batch_size=BATCH_SIZE),
    donate_argnums=0,  # the old state's memory is reused
)
eval_steps = jax.jit(partial(steps.eval_steps, model=model, batch_size=BATCH_SIZE))

train, test = jax.device_put((data.train, data.test))  # uint8, once
key = jax.random.key(SEED)
state = init_state(key)
for epoch in range(EPOCHS):
    order = steps.epoch_permutation(key, epoch, size=len(train.label))
    # One call on the device for the whole epoch; it returns before the work is done.
    state, metrics, _ = train_steps(state, Metrics.zeros(), train, order, key, 0, per_epoch)
    tested = eval_steps(
        state.params,
        state.model_state,
        Metrics.zeros(),
        test,
        0,
        num_batches(len(test.label), BATCH_SIZE),
    )
    # The host waits for the device here.
    print(
        f"epoch {epoch + 1:2d}  train loss {metrics.loss:.4f}  "
        f"test loss {tested.loss:.4f}  test accuracy {tested.accuracy:.4f}"
    )
