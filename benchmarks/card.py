"""A suite's findings as one Markdown page."""

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import ledger, lowering, peers, roofline, step, sweep, time_to_accuracy, timing
from benchmarks.results import Results
from benchmarks.workers.job import MANY

VERSIONS = ("python", "jax", "jaxlib", "flax", "optax", "numpy", "torch")
METHOD = """\
- The clock of a step holds taking the batch, forward, backward and update. Imports, making the data
  and compilation are outside. Images, labels and weights are random.
- A launch is a process. It counts by its least sample on a CPU, where other work only adds to a
  time, by its median elsewhere; a time is the median over the launches. Intervals are of launches.
- Peers take turns with this project, with the same batches and samples; a ratio is of one round.
- The roof is the best sample of several sizes. A layer's time is its share of the kernels in a
  trace of the step, taken without CUDA graphs.
- Time to accuracy holds loading the data, not compiling; a seed that misses counts as infinite."""


def device_name(context: Mapping[str, Any]) -> str:
    """The name of the device; of a CPU, the model and the number of its cores."""
    if context["platform"] == "cpu":
        return f"{context['cpu'] or 'CPU'}, {context['cores']} cores"
    return context["device"]


def headline(found: Results) -> list[str]:
    """Six lines: device, step, batch size, roof, accuracy, and the time of train.py."""
    laws = [f"{model}: {law}" for (model, *_), (_, law) in sweep.sweeps(found).items() if law]
    reached = time_to_accuracy.times_of(found).items()
    spent = [ledger.summary(row) for row in found.tables.get("ledger", [])[-2:]]
    rows = [(row["model"], row["platform"]) for row in found.tables.get("lowering", [])]
    models = found.context["flags"]["model"]
    lowered = [p for p in lowering.PLATFORMS if all((model, p) in rows for model in models)]
    lines = {
        "device": [_device(found.context)],
        "step": _step(found),
        "batch size": laws[-1:],
        "roof": _roof(found),
        "accuracy": [time_to_accuracy.summary(*case, times_s) for case, times_s in reached],
        "train.py": spent + ([f"lowers for {', '.join(lowered)}"] if lowered else []),
    }
    texts = {name: "; ".join(filter(None, said)) for name, said in lines.items()}
    return [f"- {name}: {text or 'not measured'}" for name, text in texts.items()]


def _device(context: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {context[name]}" for name in VERSIONS if name in context)
    words = [device_name(context), context["system"], versions]
    if gpu := context.get("gpu"):
        clock = f"clock {gpu['clocks.sm']} of {gpu['clocks.max.sm']}, limit {gpu['power.limit']}"
        state = f"{clock}, throttling {gpu['clocks_event_reasons.active']}"
        words.append(f"driver {gpu['driver_version']}, {state}, other processes {gpu['processes']}")
    dirty = " with changes" if context["git_dirty"] else ""
    return "; ".join([*words, f"commit {context['git_commit']}{dirty}"])


def _step(found: Results) -> list[str]:
    """The slowest network of the first batch size, many steps a call."""
    if not (cases := found.cases(step.TRAIN, framework="mnist_jax", mode=MANY)):
        return []
    size = cases[0].first.batch_size
    case = max((c for c in cases if c.first.batch_size == size), key=lambda case: case.seconds)
    b, s, n = case.first, case.seconds, len(case.launches_s)
    times = f"{1e3 * s:.4g} ms a step, {s * 60_000 / b.batch_size:.3g} s an epoch of 60,000"
    speed = f"{b.batch_size / s:,.0f} images/s (n = {n})"
    said = [f"{b.model}, {b.precision}, batch {b.batch_size}: {times}, {speed}"]
    said += [timing.warning(b.samples_s)] if n == 1 else []
    if rival := peers.best(found, b.model):
        mode, r = rival
        ratio, low, high = peers.median_and_ends(r)
        what = f"PyTorch's fastest mode measured, {mode} (n = {len(r)})"
        said.append(f"{ratio:.2f} ({'range ' * (len(r) < 6)}{low:.2f} to {high:.2f}) of {what}")
    return said


def _roof(found: Results) -> list[str]:
    if not (rows := found.tables.get("roofline")):
        return []
    row, whole = rows[-1], rows[-1]["parts"][0]
    roof = roofline.roof(found, row["precision"])
    fields = {name: row[name] for name in ("model", "batch_size", "precision")}
    steps = found.cases(step.TRAIN, framework="mnist_jax", mode=MANY, **fields)
    seconds = steps[0].seconds if steps else whole["seconds"]  # in the line of the step, if there
    slower = seconds / whole["seconds"]
    copied = roof.bytes_per_s[max(roof.bytes_per_s)] / 1e9
    rates = f"{roof.flops_per_s / 1e9:,.4g} GFLOP/s ({row['precision']}), {copied:,.4g} GB/s"
    share = f"a step of the {row['model']} reaches {whole['limit_s'] / seconds:.0%} of its limit"
    share += f", {row['of_matrix_rate'] / slower:.2f} of the rate by its layers' definitions"
    mfu = row["mfu"] and roofline.share_text(row["mfu"] / slower)
    return [rates, share, *([f"MFU {mfu}"] if mfu else [])]


def markdown(found: Results, reports: Mapping[str, Sequence[str]]) -> str:
    """The page: the headline, each part's report, the method, and what was excluded."""
    blocks = [f"# {device_name(found.context)}", "\n".join(headline(found))]
    for name, parts in reports.items():
        blocks += ["## " + name.replace("_", " ").capitalize(), *filter(None, parts)]
    blocks += ["## Method", METHOD]
    if excluded := found.context["excluded"]:
        lines = (f"- {what}: {why}" for what, why in excluded.items())
        blocks += ["## Excluded", "\n".join(lines)]
    return "\n\n".join(blocks) + "\n"
