import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest
import training

from mnist_jax.runs import environment


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--campaign_record", help="JSON file for what tests/faults counts")


class FaultsRecord:
    """Collects what the tests counted with the fixture `counted`, and writes it at the end."""

    def __init__(self, file: Path, command: str):
        self.file, self.command, self.started = file, command, time.time()
        self.campaigns: list[dict] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call":
            rows = [value for name, value in report.user_properties if name == "counted"]
            more = {"outcome": report.outcome, "elapsed_s": round(report.duration, 1)}
            self.campaigns += [{**row, **more} for row in rows]

    def pytest_sessionfinish(self) -> None:
        elapsed_s = round(time.time() - self.started)
        record = {"version": 1, "command": self.command, "elapsed_s": elapsed_s}
        record["context"] = environment.describe(jax.devices()[0])
        record["campaigns"] = sorted(self.campaigns, key=lambda row: row["campaign"])
        self.file.write_text(json.dumps(record, indent=1) + "\n")


def pytest_configure(config: pytest.Config) -> None:
    file = config.getoption("--campaign_record")
    if file and not hasattr(config, "workerinput"):  # not in a worker of pytest-xdist
        command = "python -m pytest tests/faults" + " --campaign" * config.getoption("--campaign")
        config.pluginmanager.register(FaultsRecord(Path(file), command))


@pytest.fixture
def amount(pytestconfig: pytest.Config) -> Callable[[int, int], int]:
    return lambda quick, full: full if pytestconfig.getoption("--campaign") else quick


@pytest.fixture
def counted(record_property: Callable[[str, object], None]) -> Callable[..., None]:
    """(campaign, **counts): for the record. Call it before the counts are asserted."""
    return lambda campaign, **counts: record_property("counted", {"campaign": campaign, **counts})


@pytest.fixture(scope="session")
def whole(once: Callable[..., Any], data_dir: Path) -> Callable[[str], list]:
    return lambda model: once(
        f"whole-{model}", lambda folder: training.complete(model, folder / "run", data_dir)
    )
