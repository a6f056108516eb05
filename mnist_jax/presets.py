"""The presets: named values for the flags that are not given. docs/recipes.md has their results."""

from types import MappingProxyType
from typing import Any

TUTORIAL = {"epochs": 10, "batch_size": 100, "learning_rate": 1e-3, "schedule": "constant"}
TUTORIAL |= {"optimizer": "adam", "loss": "cross_entropy"}
TUTORIAL |= dict.fromkeys(("shift", "rotation", "scale", "ema_decay"), 0.0)
FAST = {"epochs": 4, "learning_rate": 1.5e-3, "schedule": "onecycle", "shift": 2.0}
BEST = FAST | {"epochs": 10, "rotation": 10.0, "scale": 0.1}
NAMED = {"tutorial": TUTORIAL, "fast": FAST, "best": BEST}  # what one leaves out is tutorial's
# Read-only: a fork adds presets, but must not change those of other runs.
PRESETS: dict[str, Any] = {name: MappingProxyType(values) for name, values in NAMED.items()}
