"""`benchmarks.step` whose training step takes longer by a share: for `benchmarks.trust`.

python -m benchmarks.peer_workers.slowed 0.1 --model mlp --output FILE
"""

import sys
from typing import Any

from benchmarks import launch, step
from benchmarks.peer_workers import ours


def main(share: float) -> int:
    """Measures with the slow-down planted: of ten steps, one is done twice."""
    make = ours.make

    def slowed(*args: Any, **kwargs: Any) -> Any:
        workload = make(*args, **kwargs)
        return workload._replace(
            train=lambda state, count: workload.train(state, round((1 + share) * count)),
            multiple_of=10,  # of fewer no tenth can be done twice
        )

    ours.make = slowed
    return launch.command(step.Options, step.measure, "slowed", step.__doc__ or "")


if __name__ == "__main__":
    sys.exit(main(float(sys.argv.pop(1))))
