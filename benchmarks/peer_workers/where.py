"""Describes a platform's device, in a process that gives it back: for the whole suite."""

import json
import sys
from typing import Any

from mnist_jax.parallel import mesh as devices
from mnist_jax.runs import environment


def main(question: dict[str, Any]) -> dict[str, Any]:
    """What `environment.describe` says."""
    return environment.describe(devices.select_device(question["platform"]))


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
