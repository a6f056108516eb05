"""What `benchmarks.scaling` predicts: the flags of what is assumed, and the table."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.table import Table

from benchmarks import cost_model, launch, roofline, step
from benchmarks.cost_model import Bounds, Cluster, Link, StepTime
from benchmarks.peer_workers import job as jobs
from mnist_jax.errors import UsageError
from mnist_jax.models import MODELS, param_shapes
from mnist_jax.runs.checkpoint import tree_bytes

TITLE = "PREDICTION, not measured"
PER_HOST, PREDICTED = 8, (8, 64)  # devices
COUNTS_BYTES = 8  # of examples and hits, which are summed apart from the gradients and the loss
ABOVE_0 = ("step_ms", "nvlink_gb_s", "infiniband_gb_s")
LINKS = ("nvlink_gb_s", "nvlink_us", "infiniband_gb_s", "infiniband_us")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(launch.Options):
    """The flags of what is assumed."""

    step_ms: tuple[float, ...] = (0.1, 0.3, 1.0, 3.0)
    """Assumed by --predict: a step of --batch_size images on one device takes these."""
    fixed_ms: float = 0.0
    """Assumed by --predict: the part of it that a smaller batch does not shorten."""
    nvlink_gb_s: float = 450.0
    """Assumed: GB/s in one direction from a device to the other 7 of its host."""
    nvlink_us: float = 3.4
    """Assumed: latency of one pass among them."""
    infiniband_gb_s: float = 50.0
    """Assumed: GB/s in one direction from a device to other hosts."""
    infiniband_us: float = 14.0
    """Assumed: latency of one pass among those."""

    def __post_init__(self):
        super().__post_init__()
        for field in dataclasses.fields(Options):
            value = getattr(self, field.name)
            for number in value if isinstance(value, tuple) else (value,):
                bad = type(number) is float and not 0 <= number < math.inf
                if bad or (number == 0 and field.name in ABOVE_0):
                    least = "above 0" if field.name in ABOVE_0 else "from 0"
                    raise UsageError(
                        f"{field.name} is {number}; allowed is any finite number {least}; "
                        f"change --{field.name}"
                    )
        if self.fixed_ms >= min(self.step_ms):
            raise UsageError(
                f"fixed_ms is {self.fixed_ms}; allowed is less than step_ms, which is "
                f"{min(self.step_ms)}; change either"
            )

    def cluster(self) -> Cluster:
        """The links, in bytes and seconds."""
        inside = Link(1e9 * self.nvlink_gb_s, 1e-6 * self.nvlink_us)
        between = Link(1e9 * self.infiniband_gb_s, 1e-6 * self.infiniband_us)
        return Cluster(inside, between, PER_HOST)

    def assumed(self, images: int) -> list[StepTime]:
        """The lines through the assumed steps of so many images."""
        return [
            StepTime(1e-3 * self.fixed_ms, 1e-3 * (ms - self.fixed_ms) / images)
            for ms in self.step_ms
        ]


def rows(
    job: jobs.Job, times: Sequence[StepTime], options: Options, source: str
) -> list[dict[str, Any]]:
    """A row for each number of devices and step time, as the result file holds it.

    Args:
        job: the network, and the images of a step on one device.
        times: what a step takes on one device.
        options: the links.
        source: where the times come from, in a word.
    """
    model, cluster = MODELS[job.model](), options.cluster()
    size = tree_bytes(param_shapes(model))
    flops = roofline.train_work(model, job.batch_size, "gpu").direct_flops
    case = {key: step.named(job, "")[key] for key in ("model", "batch_size", "precision")}
    case |= {"step_time": source, "gradient_bytes": size}
    case |= {name: getattr(options, name) for name in LINKS}
    made = []
    for devices in PREDICTED:
        messages = size + roofline.FLOAT_BYTES, COUNTS_BYTES
        sum_s = sum(cost_model.all_reduce_s(devices, message, cluster) for message in messages)
        for time in times:
            step_s, here = time.of(job.batch_size), (time, job.batch_size, devices, sum_s)
            numbers = {
                "devices": devices,
                **time._asdict(),
                "step_s": step_s,
                "flops_per_s": flops / step_s,
                "all_reduce_s": sum_s,
                "weak": cost_model.weak(*here)._asdict(),
                "strong": cost_model.strong(*here)._asdict(),
            }
            made.append(case | numbers)
    return made


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """The rows of one job, an efficiency as its two bounds: nothing of the sum hidden, and all."""
    first = rows[0]
    mb, images = first["gradient_bytes"] / 1e6, first["batch_size"]
    title = f"{TITLE}: {first['model']}, {first['precision']}, {mb:.3g} MB of gradients, "
    made = Table(
        title=f"{title}one device's step {first['step_time']}",
        caption="links assumed: {} GB/s, {} µs in a host; {} GB/s, {} µs between hosts".format(
            *(f"{first[name]:g}" for name in LINKS)
        ),
        box=box.SIMPLE,
    )
    headings = ["devices", f"step of {images}, ms", "TFLOP/s", "sum, ms", f"weak, {images} each"]
    headings += [f"strong, {images} in all", "sum is 50 % at", "sum is 10 % at"]
    for heading in headings:
        made.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        numbers = 1e3 * row["step_s"], row["flops_per_s"] / 1e12, 1e3 * row["all_reduce_s"]
        bounds = (Bounds(**row[kind]) for kind in ("weak", "strong"))
        time = StepTime(row["overhead_s"], row["image_s"])
        batches = (
            cost_model.images_for(share, time, row["devices"], row["all_reduce_s"])
            for share in (0.5, 0.1)
        )
        made.add_row(
            str(row["devices"]),
            *(f"{number:.3g}" for number in numbers),
            *(f"{100 * low:.3g} to {100 * high:.3g} %" for low, high in bounds),
            *(f"{batch:,.0f} images" for batch in batches),
        )
    return made
