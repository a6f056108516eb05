"""The whole suite, in a short form: one result file, one page, and figures.

    python -m benchmarks

Every part runs in a process of its own, as its own command would, and what it found is put together
in benchmarks/results/<device>-<UTC time>/: `results.json`, which `python -m benchmarks.compare`
reads, and `card.md` with its figures. --full lets every part measure all that it does by default.
"""

import dataclasses
import datetime
import re
import sys
import tempfile
from pathlib import Path
from typing import Any, Literal

from benchmarks import (
    batch_size,
    card,
    compare,
    input,
    launch,
    ledger,
    lowering,
    memory,
    results,
    roofline,
    step,
    time_to_accuracy,
)
from benchmarks.results import Recorder, Results
from mnist_jax.errors import DeviceError

PARTS: dict[str, Any] = {
    "step": step,
    "batch_size": batch_size,
    "ledger": ledger,
    "input": input,
    "roofline": roofline,
    "time_to_accuracy": time_to_accuracy,
    "memory": memory,
    "lowering": lowering,
}
Part = Literal[
    "step",
    "batch_size",
    "ledger",
    "input",
    "roofline",
    "time_to_accuracy",
    "memory",
    "lowering",
]
TELL_OF_COMPILING = ("ledger", "time_to_accuracy")
SHORT_SWEEP = (1, 8, 64, 512, 4096)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(launch.DataOptions):
    """The flags."""

    output: Path = launch.ROOT / "benchmarks" / "results"
    """Folder in which the findings get a folder of their own."""
    parts: tuple[Part, ...] = tuple(PARTS)  # pyright: ignore[reportAssignmentType]
    """Parts to measure, each also a command of its own: python -m benchmarks.step --help."""
    model: tuple[launch.Model, ...] = ("logistic", "mlp", "cnn")
    """Networks to measure. In the short form the CNN is measured in step and roofline only, where
    no accelerator is at hand."""
    platform: Literal["auto", "cpu", "gpu", "tpu"] = "auto"
    """Device to run on; auto: the best that JAX finds."""
    repeats: int = 10
    """Samples of each thing measured; fewer where those taken last 1.5 s."""
    launches: int = compare.LAUNCHES
    """Processes that time the training steps and evaluations, so that files can be compared; in the
    short form on a CPU, at most five, and one for the CNN."""
    full: bool = False
    """Let every part measure all that it does by default, which takes half an hour or more."""


def plan(options: Options, data: dict[str, Any], platform: Any) -> dict[str, list[Any]]:
    """What each part is asked to do: the options of one or several of its commands."""
    small: Any = tuple(m for m in options.model if options.full or m != "cnn" or platform != "cpu")
    common: dict[str, Any] = {"platform": options.platform, "repeats": options.repeats}
    trains: dict[str, Any] = {**data, "platform": options.platform, "model": small}
    sweep: dict[str, Any] = {} if options.full else {"batch_size": SHORT_SWEEP}
    repeats = options.repeats if options.full else min(3, options.repeats)
    # Of the six times of two networks five launches are enough for `compare` to judge.
    brief: dict[str, Any] = {} if options.full or platform != "cpu" else {"repeats": repeats}
    launches = min(5, options.launches) if brief else options.launches
    timed = [step.Options(model=small, launches=launches, **common | brief)] if small else []
    slow: Any = tuple(m for m in options.model if m not in small)
    if slow:
        timed.append(step.Options(model=slow, mode=("many",), **common))
    swept = [batch_size.Options(model=small, **sweep, **common | brief)]
    if platform != "cpu":
        both: Any = tuple(m for m in small if m != "cnn")  # of which a CPU needs minutes
        alone: Any = tuple(m for m in small if m not in both)
        swept = [
            batch_size.Options(model=both, platforms=("cpu", platform), **sweep, **common),
            batch_size.Options(model=alone, **sweep, **common),
        ]
    return {
        "step": timed,
        "batch_size": swept,
        "ledger": [ledger.Options(**trains, repeats=3)],
        "input": [input.Options(model=small, **common | brief)],
        "roofline": [roofline.Options(model=options.model, **common)],
        "time_to_accuracy": [time_to_accuracy.Options(**trains, repeats=repeats)],
        "memory": [memory.Options(model=small, **common)],
        "lowering": [lowering.Options(model=small)],
    }


def measure(options: Options) -> None:
    """Runs the parts one after the other, and writes what they found after each."""
    context = launch.where(options.platform)
    platform = context["platform"]
    data = options.prepare()
    context |= {"parts": {}, "dataset": data["dataset"]}
    now = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%SZ")
    name = re.sub(r"[^a-z0-9]+", "-", card.device_name(context).lower()).strip("-")
    folder = options.output / f"{name}-{now}"
    recorder = Recorder(folder / "results.json", context)
    planned = plan(dataclasses.replace(options, platform=platform), data, platform)
    found: dict[str, Recorder] = {}
    with tempfile.TemporaryDirectory() as scratch:
        kept = launch.keeping_compiled(scratch)
        for part in options.parts:
            # Many of their processes need the same programs, whose compiling is in no clock.
            variables = {} if part in TELL_OF_COMPILING else kept
            launch.say(f"== {part}")
            for number, asked in enumerate(planned[part]):
                if not asked.model:
                    continue
                file = Path(scratch) / f"{part}-{number}.json"
                command = f"python -m benchmarks.{part} {' '.join(launch.words(asked))}"
                command = command.replace(str(Path.home()), "~")
                recorder.context["parts"].setdefault(part, []).append(command)
                try:
                    asked = dataclasses.replace(asked, output=file)
                    launch.part(f"benchmarks.{part}", asked, variables)
                except launch.ProcessError as error:
                    recorder.leave_out(f"{part}{f' {number + 1}' * (number > 0)}", str(error))
                    if not file.is_file():  # what it had written by then
                        continue
                one = results.read(file)
                if one.context["device"] != context["device"]:
                    recorder.leave_out(part, f"it ran on {one.context['device']}")
                    continue
                recorder.take_in(one, f"{part}: ", part=part)
                of_part = one.context | {"left_out": {}}
                found.setdefault(part, Recorder(None, of_part)).take_in(one)
            recorder.write()
            write_card(folder, {part: one.found for part, one in found.items()})
    print(f"written: {folder}/card.md and results.json")
    if not found:
        raise DeviceError("nothing could be measured; see what the parts said")


def write_card(folder: Path, found: dict[str, Results]) -> None:
    """Writes the page and its figures."""
    context = results.read(folder / "results.json").context
    reports = {part: PARTS[part].report(one) for part, one in found.items()}
    (folder / "card.md").write_text(card.markdown(context, reports))
    card.draw(found, folder)


if __name__ == "__main__":
    sys.exit(launch.command(Options, measure, "python -m benchmarks", __doc__ or ""))
