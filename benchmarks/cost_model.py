"""How long a step on many devices should take, from one device's step and the rates of the links.

Arithmetic only: nothing here is measured, and no device is touched. A batch is spread over n
devices; each computes its share, and the gradients are summed over all of them. With nothing of the
sum hidden behind the computing, a step takes both times one after the other; with all of it hidden,
the longer of the two. A real step lies between them if the rest of the model holds. It is slower
where links are shared, or where devices wait for the slowest of them.

The sum over the n devices of a host goes around a ring in 2 (n - 1) passes, each of 1/n of the
bytes: half of the passes add up, the others hand out the sums. No way of summing without help from
the switches lets each device send less (doc/PERFORMANCE.md of NVIDIA/nccl-tests). Each pass has its
latency. A library sends small messages another way, with less latency and at a lower rate; what
takes the shorter time counts. Both are how NCCL reckons with rings (src/graph/tuning.cc of
NVIDIA/nccl, commit b6475625); the constant that it adds for a call, 7 to 8 µs, is left out.

Over several hosts: the first half of a ring in each host, then each device goes around a ring of
its own with those of the same place in the other hosts, with the 1/n of the bytes that it has
summed, then the second half in each host. One after the other; each device has a network adapter to
itself, and the network no bottleneck.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# NCCL's protocol LL against Simple, in rings: a quarter of the rate; 0.6 µs in place of 3.4 over
# NVLink, 2.7 in place of 14.0 over a network.
QUICK_RATE, QUICK_LATENCY = 1 / 4, 1 / 5


class Link(NamedTuple):
    """What connects a device with the next.

    Attributes:
        bytes_per_s: in one direction.
        latency_s: of one pass.
    """

    bytes_per_s: float
    latency_s: float

    def quick(self) -> "Link":
        """The same for small messages."""
        return Link(QUICK_RATE * self.bytes_per_s, QUICK_LATENCY * self.latency_s)


class Cluster(NamedTuple):
    """Hosts of equally many devices.

    Attributes:
        inside: the link of the devices of a host.
        between: each device's link to other hosts.
        per_host: devices in a host.
    """

    inside: Link
    between: Link
    per_host: int


class StepTime(NamedTuple):
    """What a step takes on one device: overhead_s + images · image_s."""

    overhead_s: float
    image_s: float

    def of(self, images: float) -> float:
        """Seconds for a batch of so many images."""
        return self.overhead_s + images * self.image_s


def fit(images: Sequence[int], times_s: Sequence[float]) -> StepTime:
    """The line closest to measured steps in the squares of relative errors, neither part below 0.

    Args:
        images: batch sizes.
        times_s: seconds of a step with each.
    """
    from scipy.optimize import nnls

    times = np.asarray(times_s)
    rows = np.stack([np.ones(len(times)), np.asarray(images)], axis=1) / times[:, None]
    (overhead_s, image_s), _ = nnls(rows, np.ones(len(times)))
    return StepTime(float(overhead_s), float(image_s))


def ring_s(devices: int, size_bytes: float, link: Link) -> float:
    """Seconds for a sum around a ring: 2 (n - 1) / n · bytes / bandwidth + 2 (n - 1) · latency."""
    passes = 2 * (devices - 1)
    return passes * (size_bytes / devices / link.bytes_per_s + link.latency_s)


def all_reduce_s(devices: int, size_bytes: float, cluster: Cluster) -> float:
    """Seconds until every device has the sum of all devices' bytes.

    Raises:
        ValueError: the devices do not fill their hosts.
    """
    inside = min(devices, cluster.per_host)
    hosts, rest = divmod(devices, inside)
    if rest:
        raise ValueError(f"{devices} devices do not fill hosts of {inside}")

    def over(in_host: Link, between: Link) -> float:
        return ring_s(inside, size_bytes, in_host) + ring_s(hosts, size_bytes / inside, between)

    quick = cluster.inside.quick(), cluster.between.quick()
    return min(over(cluster.inside, cluster.between), over(*quick))


class Bounds(NamedTuple):
    """An efficiency with nothing of the sum hidden behind the computing, and with all of it."""

    nothing_hidden: float
    all_hidden: float


def _efficiency(ideal_s: float, share_s: float, sum_s: float) -> Bounds:
    return Bounds(ideal_s / (share_s + sum_s), ideal_s / max(share_s, sum_s))


def weak(step: StepTime, images: int, devices: int, sum_s: float) -> Bounds:
    """Efficiency with `images` on each device: one device's time over that of all.

    Args:
        step: one device's time.
        images: a device's, in a step.
        devices: how many.
        sum_s: seconds for summing the gradients.
    """
    share_s = step.of(images)
    return _efficiency(share_s, share_s, sum_s)


def strong(step: StepTime, images: int, devices: int, sum_s: float) -> Bounds:
    """Efficiency with `images` on all devices together: one device's time over n times that of all.

    Args: as for `weak`. Where the images do not divide, the largest share counts.
    """
    return _efficiency(step.of(images) / devices, step.of(-(-images // devices)), sum_s)


def images_for(share: float, step: StepTime, devices: int, sum_s: float) -> float:
    """The images in a step of all devices with which the sum takes that share of it, none hidden.

    Args:
        share: above 0 and below 1. The other arguments as for `weak`.

    Returns:
        Images; 0 where the overhead alone takes so long, infinite where no batch does.
    """
    missing_s = max(0.0, sum_s * (1 - share) / share - step.overhead_s)
    return devices * missing_s / step.image_s if step.image_s else math.inf if missing_s else 0.0
