"""The presets: named values for the flags that are not given. docs/recipes.md has their results."""

from typing import Any

OFF = ("shift", "rotation", "scale", "ema_decay")
TUTORIAL = {"epochs": 10, "batch_size": 100, "learning_rate": 1e-3, "schedule": "constant"}
FAST = {"epochs": 4, "learning_rate": 1.5e-3, "schedule": "onecycle", "shift": 2.0}
PRESETS: dict[str, dict[str, Any]] = {"tutorial": TUTORIAL | dict.fromkeys(OFF, 0.0)}
PRESETS["fast"] = PRESETS["tutorial"] | FAST
PRESETS["best"] = PRESETS["fast"] | {"epochs": 10, "rotation": 10.0, "scale": 0.1}
