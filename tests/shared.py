"""What tests read of a run's folder."""

import json
from pathlib import Path
from typing import Any


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return list(map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()))


def rows_without_times(folder: Path) -> list[dict[str, Any]]:
    """The same for runs that computed the same."""
    return [{k: v for k, v in row.items() if not k.endswith("_s")} for row in rows_of(folder)]
