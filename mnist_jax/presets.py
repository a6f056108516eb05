"""The presets: named values for the flags that are not given. docs/recipes.md has their results."""

from types import MappingProxyType
from typing import Any

OFF = ("shift", "rotation", "scale", "ema_decay")
TUTORIAL = {"epochs": 10, "batch_size": 100, "learning_rate": 1e-3, "schedule": "constant"}
TUTORIAL |= {"optimizer": "adam", "loss": "cross_entropy"}
FAST = {"epochs": 4, "learning_rate": 1.5e-3, "schedule": "onecycle", "shift": 2.0}
BEST = FAST | {"epochs": 10, "rotation": 10.0, "scale": 0.1}
# Read-only: a fork adds presets, but must not change those of other runs.
PRESETS: dict[str, Any] = {
    name: MappingProxyType(TUTORIAL | dict.fromkeys(OFF, 0.0) | changes)
    for name, changes in {"tutorial": {}, "fast": FAST, "best": BEST}.items()
}
