"""What runs on four devices of a CPU: `python tests/benchmarks/on_devices.py FILE`.

In a process of its own, as JAX asks once how many devices a CPU shall be. Its last line is one JSON
object; FILE becomes the result file of `benchmarks.scaling`.
"""

import json
import re
import sys

import jax
import numpy as np

from benchmarks import launch, scaling
from mnist_jax.parallel.mesh import Layout

SHAPES = {"kernel": (3, 5), "bias": (7,)}


def sums(any_length: bool) -> dict:
    """What `sum_alone` compiles and computes, where loops are as on a CPU or an accelerator."""
    scaling.dynamic_loop_bound = lambda device: any_length
    tree = {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in SHAPES.items()}
    program, start = scaling.sum_alone(tree, Layout(tuple(jax.devices())))
    before, count = jax.device_get(start), np.int32(3) if any_length else 3
    text = program.lower(start, count).compile().as_text()
    body = re.search(r"body=(%[\w.-]+)", text)
    assert body is not None
    loop = text[text.index(f"\n{body[1]} (") :].partition("\n}")[0]
    after = jax.device_get(program(start, count))
    return {
        "operands": [types.count("f32[") for types in re.findall(r" = (.*?) all-reduce\(", text)],
        "in_loop": "all-reduce(" in loop,
        "means": [np.allclose(after[n], before[n].mean(axis=0), atol=1e-6) for n in tree],
        "began_apart": [bool(np.ptp(before[n], axis=0).min() > 0) for n in tree],
    }


def main() -> None:
    found: dict = {"sums": [sums(any_length) for any_length in (False, True)]}
    words = "--model logistic --batch_size 10 --devices 2 3 --repeats 2 --output"
    sys.argv = ["scaling", *words.split(), sys.argv[1]]
    found["status"] = launch.command(scaling.Options, scaling.measure, "scaling", "")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
