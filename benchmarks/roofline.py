"""Says how near a training step, and each of its layers, comes to what the device can do.

The roof is the best sample of products of square matrices, and of copies of arrays, of several
sizes. A step takes at least its operations at the one rate and its bytes at the other (at the array
size nearest to its bytes); the larger is its limit. Bytes are each layer's output and its gradient,
written and read once, parameters, gradients, Adam's moments; operations as in docs/benchmarks.md.
"""

import argparse
import math
import re
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import jaxprs_in_params

from benchmarks import launch, results, step, timing
from benchmarks.results import Case, Recorder, Results
from benchmarks.workers import ours
from benchmarks.workers.job import Job
from mnist_jax import compiler
from mnist_jax.models import count_parameters, layers, trace_training, variable_shapes

PREFIX, PRODUCT, COPY = "roofline_", "matrix_product", "copy"
REST = "update and the rest"
Product = tuple[str, int, int]  # layer, operations by definition, operations on this platform
ON_CPU, ELSEWHERE = (1024, 2048, 4096), (4096, 8192)  # rows and columns of the matrices
COPY_BYTES = (2**20, 2**25, 2**28)
SPREAD = 0.05  # a larger interquartile range of a roof's samples brings a warning
DATASHEETS = {  # dense peak FLOP/s, by the makers
    r"H100.*HBM3|H200(?! NVL)": {"bfloat16": 989.4e12, "tf32": 494.7e12, "float32": 66.9e12},
    r"H100 PCIe": {"bfloat16": 756e12, "tf32": 378e12, "float32": 51e12},
    r"A100\b": {"bfloat16": 312e12, "tf32": 156e12, "float32": 19.5e12},
    r"TPU v5 lite": {"bfloat16": 197e12},
    r"TPU v6 lite": {"bfloat16": 918e12},
}


class Work(NamedTuple):
    """What a training step, or a part of it, must at least do."""

    flops: int  # floating-point operations of the products that run
    direct_flops: int  # the same by the definition of each layer
    bytes: int  # to and from memory


def products(jaxpr: Any, names: Sequence[str], platform: str, within: str = "") -> list[Product]:
    """The products of a traced function, in order, each with the layer of `names` it is in."""
    found: list[Product] = []
    for eqn in jaxpr.eqns:
        scopes, params = str(eqn.source_info.name_stack).split("/"), eqn.params
        layer = within or next((scope for scope in scopes if scope in names), "")
        if eqn.primitive.name in ("dot_general", "conv_general_dilated"):
            factor, size = [x.aval for x in eqn.invars][:2], eqn.outvars[0].aval.size
            if eqn.primitive.name == "dot_general":
                axes = params["dimension_numbers"][0][0]
                terms = math.prod(factor[0].shape[axis] for axis in axes)
            else:  # a kernel's window and its input features
                terms = factor[1].size // factor[1].shape[params["dimension_numbers"].rhs_spec[0]]
            found.append((layer, 2 * size * terms, 2 * size * terms))
        elif eqn.primitive.name == "cond":  # of the platforms, the last for all others
            inner = [products(x.jaxpr, names, platform, layer) for x in params["branches"]]
            counts = [sum(run for *_, run in some) for some in inner]
            pairs = zip(params.get("branches_platforms") or (), counts, strict=False)
            run = next((n for which, n in pairs if platform in (which or ())), counts[-1])
            found.append((layer, counts[-1], run or counts[-1]))
        else:
            times = params["length"] if eqn.primitive.name == "scan" else 1
            for x in jaxprs_in_params(params):
                inner = products(x, names, platform, layer)
                found += [(name, times * direct, times * run) for name, direct, run in inner]
    return found


def works(model: Any, batch_size: int, platform: str) -> dict[str, Work]:
    """The work of each layer, of the update with what is outside of layers, and of all ("")."""
    params, state = variable_shapes(model)
    traced, _ = trace_training(model, params, state, batch_size)
    rows = [row for row in layers(model) if row.kind not in ("Flatten", "Dropout")]
    names = [row.name for row in rows]
    flops, direct_flops = defaultdict[str, int](int), defaultdict[str, int](int)
    for i, (name, direct, run) in enumerate(products(traced.jaxpr, names, platform)):
        passes = 3 if i else 2  # the images need no gradient
        flops[name] += passes * run
        direct_flops[name] += passes * direct
    size = 4 * batch_size * jnp.dtype(model.dtype or jnp.float32).itemsize
    moved = {row.name: size * math.prod(row.output_shape) + 8 * row.parameters for row in rows}
    found = {name: Work(flops[name], direct_flops[name], moved[name]) for name in names}
    found[REST] = Work(flops[""], direct_flops[""], 28 * count_parameters(params))
    return found | {"": Work(*(sum(part) for part in zip(*found.values(), strict=True)))}


def time_loop(body: Any, state: Any, args: Any, samples: int, group: int) -> dict[str, Any]:
    """The fields of a `Benchmark` of a turn of `body`, (i, state, args) → state."""

    @partial(jax.jit, donate_argnums=0)
    def turns(state: Any, args: Any) -> Any:  # constant args would be folded
        return lax.fori_loop(0, group, lambda i, state: body(i, state, args), state)

    def call(state: Any, count: int) -> Any:
        for _ in range(count // group):
            state = turns(state, args)
        return state

    limits: dict[str, Any] = {"samples": samples, "min_sample_s": 0.05, "warmup_s": (0.3, 3.0)}
    return timing.measure(call, state, sync=jax.block_until_ready, unit=group, **limits)[0]


def time_product(size: int, precision: str, samples: int) -> dict[str, Any]:
    """Times a product of two square matrices."""
    x, other = jax.random.normal(jax.random.key(0), (2, size, size))
    rotation, _ = jnp.linalg.qr(other)  # products neither grow nor shrink
    args = rotation.astype(compiler.COMPUTE_DTYPE[precision] or jnp.float32)
    group = max(1, 4096 // size)  # the largest takes a second on a CPU
    times = time_loop(lambda _, x, other: x @ other, x.astype(args.dtype), args, samples, group)
    found = {"name": PRODUCT, "precision": precision, "mode": f"{size} × {size}"}
    return times | found | {"details": {"amount": 2 * size**3}}


def time_copy(size_bytes: int, samples: int) -> dict[str, Any]:
    """Times reading and writing so many bytes."""
    start = jax.random.normal(jax.random.key(0), (size_bytes // 4,))
    group = max(4, min(256, 2**27 // size_bytes))
    times = time_loop(lambda i, x, _: x + i.astype(jnp.float32), start, (), samples, group)
    mode, amount = f"{size_bytes / 1e6:.3g} MB", 2 * size_bytes
    return times | {"name": COPY, "mode": mode, "details": {"amount": amount}}


def run(platform: str, precisions: list[str], samples: int) -> dict[str, Any]:
    """Measures the roof; returns the content of a result file."""
    with compiler.use_device(platform, "float32"):
        found = [time_copy(size, samples) for size in COPY_BYTES]
    for precision in precisions:
        with compiler.use_device(platform, precision) as device:
            compiler.check_precision(precision, device)
            for size in ON_CPU if device.platform == "cpu" else ELSEWHERE:
                found.append(time_product(size, precision, samples))
    return {"context": {}, "benchmarks": found, "tables": {}}


class Roof(NamedTuple):
    """The best rates of a device; that of copies by the size of the array in bytes."""

    flops_per_s: float
    bytes_per_s: dict[int, float]

    def limit_s(self, work: Work) -> float:
        """The least time for some work."""
        near = min(self.bytes_per_s, key=lambda size: abs(math.log(size / max(1, work.bytes))))
        # A GPU copies a small array as slowly as it launches: a larger one says its rate.
        rate = max(rate for size, rate in self.bytes_per_s.items() if size >= near)
        return max(work.flops / self.flops_per_s, work.bytes / rate)


def roof(found: Results, precision: str) -> Roof:
    """The roof that a file's benchmarks measured."""
    rates = [(b, b.details["amount"] / min(b.samples_s)) for b in found.benchmarks if not b.model]
    products = [x for b, x in rates if b.name == PRODUCT and b.precision == precision]
    copies = {b.details["amount"] // 2: x for b, x in rates if b.name == COPY}
    return Roof(max(products), copies)


def measure(options: argparse.Namespace, recorder: Recorder) -> None:
    """Measures the steps, takes their traces, and measures the roof."""
    options.mode, options.what, options.trace = ["many"], ["train"], True
    step.measure(options, recorder, PREFIX)
    how = {"precisions": options.precision, "samples": max(5, options.repeats // 4)}
    launch.measure(recorder, "benchmarks.roofline:run", "roof", platform=options.platform, **how)
    found = recorder.found
    for job in step.jobs_of(options) if found.cases(PRODUCT) else ():
        fields = {name: getattr(job, name) for name in ("model", "batch_size", "precision")}
        for row in found.tables.get("trace", []):
            if fields.items() <= row.items():
                [case] = found.cases(PREFIX + step.TRAIN, **fields)
                recorder.row("roofline", **fields, **account(job, case, found, row["layer_shares"]))


def account(job: Job, case: Case, found: Results, shares: dict[str, float]) -> dict[str, Any]:
    """What the row of a step says: its work, its limit, and those of its layers."""
    rates, model = roof(found, job.precision), ours.model_of(job)
    parts = works(model, job.batch_size, found.context["platform"])
    whole = parts.pop("")
    sheets = [x for name, x in DATASHEETS.items() if re.search(name, found.context["device"])]
    peak = sheets[0].get(job.precision) if sheets else None
    shares = {**shares, REST: shares.get("other", 0.0), "a step": 1.0}
    rows = []
    for name, work in [("a step", whole), *parts.items()]:
        times = {"limit_s": rates.limit_s(work), "seconds": shares.get(name, 0.0) * case.seconds}
        rows.append({"part": name, **work._asdict(), **times})
    rate, most = whole.direct_flops / case.seconds, rates.flops_per_s
    return {"of_matrix_rate": rate / most, "mfu": peak and rate / peak, "parts": rows}


def share_text(share: float) -> str:
    """A share of a rate of operations by definition, with the reason if it is over 100 %."""
    why = " (over 100 %: the device computes fewer operations than the definition has)"
    return f"{share:.0%}{why * (share > 1)}"


def report(found: Results) -> list[str]:
    """The roof, and a table for each network."""
    rows, parts = [], []
    for b in (b for b in found.benchmarks if not b.model):
        unit = "GFLOP/s" if b.name == PRODUCT else "GB/s"
        times_s = min(b.samples_s), np.median(b.samples_s)
        best, middle = (f"{b.details['amount'] / s / 1e9:,.4g}" for s in times_s)
        rows.append([b.name, b.mode, b.precision, str(len(b.samples_s)), best, middle, unit])
        if (spread := timing.spread(b.samples_s)) > SPREAD:
            half = f"warning: half of the {len(b.samples_s)} samples of {b.name} {b.mode} span"
            parts.append(f"{half} {spread:.0%} of the median; is the device idle?")
    headings = ["roof", "size", "precision", "samples", "best", "median", ""]
    parts.insert(0, results.table("The roof", headings, rows))
    for row in found.tables.get("roofline", []):
        cells = []
        for e in row["parts"]:
            work = e["flops"] / 1e9, e["direct_flops"] / 1e9, e["bytes"] / 1e6
            numbers = [*work, 1e3 * e["limit_s"], 1e3 * e["seconds"]]
            near = f"{e['limit_s'] / e['seconds']:.2f}" if e["seconds"] else "-"
            cells.append([e["part"], *(f"{x:.4g}" for x in numbers), near])
        title = f"{row['model']}, batch {row['batch_size']}, {row['precision']}"
        headings = ["part", "GFLOP", "by definition", "MB", "limit ms", "ms", "limit ÷ time"]
        line = f"By definition, {share_text(row['of_matrix_rate'])} of the measured matrix rate"
        line += f"; MFU by the datasheet {share_text(row['mfu'])}." if row["mfu"] else "."
        if any(e["limit_s"] > e["seconds"] > 0 for e in row["parts"]):
            line += " warning: a part beats its limit: the roof is too low, or its share is wrong."
        parts += [results.table(title, headings, cells), line]
    return [*parts, *step.trace_tables(found)]


if __name__ == "__main__":
    raise SystemExit(launch.main(__doc__, measure, launch.CASES, report, repeats=40))
