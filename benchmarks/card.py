"""A suite's findings as one Markdown page with figures."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks import batch_size, roofline
from benchmarks.results import Benchmark, Results

TITLES = {
    "step": "Training steps and evaluation",
    "batch_size": "Batch size",
    "ledger": "Where a run's time goes",
    "input": "Feeding the device",
    "roofline": "Under the roof",
    "time_to_accuracy": "Time to accuracy",
    "memory": "Memory",
    "lowering": "Other platforms",
}
FIGURES = {"batch_size": "batch_size.svg", "roofline": "roofline.svg"}
VERSIONS = ("python", "jax", "jaxlib", "flax", "optax", "numpy")
INK, BLUE, ORANGE, GREEN = "#767676", "#0072B2", "#D55E00", "#009E73"  # after Okabe and Ito


def markdown(context: Mapping[str, Any], reports: Mapping[str, list[Table | str]]) -> str:
    """The page: where it was measured, and each part's report."""
    versions = ", ".join(f"{name} {context[name]}" for name in VERSIONS)
    dirty = " with changes" if context["git_dirty"] else ""
    lines = [
        f"# {device_name(context)}",
        "",
        f"- device: {context['device']} ({context['platform']}, one of {context['devices']})",
        f"- host: {context['cpu']}, {context['cores']} cores; {context['system']}",
        f"- driver: {context.get('driver') or 'none'}",
        f"- versions: {versions}",
        f"- variables: {context['variables'] or 'none'}",
        f"- commit: {context['git_commit']}{dirty}",
        f"- command: `{' '.join(context['command'])}`",
        f"- date: {context['date']}",
        f"- data set: {context['dataset']}",
        "",
        "Times are medians; every sample stands in `results.json`. What each number means, and "
        "what is inside the clock: docs/benchmarks.md of the repository.",
    ]
    for name, parts in reports.items():
        lines += ["", f"## {TITLES[name]}", "", *(f"`{c}`  " for c in context["parts"][name])]
        if name in FIGURES:
            lines += ["", f"![{TITLES[name]}]({FIGURES[name]})"]
        for part in parts:
            lines += ["", *(part.splitlines() if isinstance(part, str) else as_markdown(part))]
    if lost := context["left_out"]:
        lines += ["", "## Left out", "", *(f"- {what}: {why}" for what, why in lost.items())]
    return "\n".join(lines) + "\n"


def as_markdown(table: Table) -> list[str]:
    """A table's lines."""
    rows = zip(*([*column.cells] for column in table.columns), strict=True)
    marks = ["---:" if column.justify == "right" else "---" for column in table.columns]
    cells = [[str(column.header) for column in table.columns], marks, *rows]
    title = [f"{table.title}", ""] if table.title else []
    return [*title, *("| " + " | ".join(map(str, row)) + " |" for row in cells)]


def device_name(context: Mapping[str, Any]) -> str:
    """What the one device is called that is measured: of a CPU, the model and its cores."""
    if context["platform"] == "cpu":
        return f"{context['cpu'] or 'CPU'}, {context['cores']} cores"
    return context["device"]


def draw(found: Mapping[str, Results], folder: Path) -> None:
    """Writes the figures of those parts that have one."""
    draws = {"batch_size": draw_batch_sizes, "roofline": draw_roofline}
    for name, file in FIGURES.items():
        if name in found and found[name].benchmarks:
            figure = draws[name](found[name].benchmarks)
            figure.savefig(folder / file, metadata={"Date": None})


def _axes(title: str, x: str, y: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, NullFormatter

    figure = Figure(figsize=(7, 4.2), layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    axes.set(xscale="log", yscale="log", title=title, xlabel=x, ylabel=y)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(EngFormatter())
        axis.set_minor_formatter(NullFormatter())
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    return figure, axes


def draw_batch_sizes(benchmarks: list[Benchmark]) -> Any:
    """Images a second by batch size, a line a network and platform."""
    figure, axes = _axes("Training throughput", "images a step", "images a second")
    sweeps: dict[tuple[str, str], list[Benchmark]] = {}
    for b in benchmarks:
        sweeps.setdefault((b.model, b.details["platform"]), []).append(b)
    for color, ((model, platform), sweep) in zip(
        [BLUE, ORANGE, GREEN, INK] * len(sweeps), sweeps.items(), strict=False
    ):
        sizes = [b.batch_size for b in sweep]
        speeds = [b.batch_size / b.median_s for b in sweep]
        axes.plot(sizes, speeds, "o-", color=color, markersize=4)
        axes.annotate(
            f" {model}, {platform}", (sizes[-1], speeds[-1]), color=color, va="center", fontsize=10
        )
        full = batch_size.saturation(sweep)
        axes.axvline(full, color=color, linestyle=":", linewidth=1)
    axes.margins(x=0.18)
    return figure


def draw_roofline(benchmarks: list[Benchmark]) -> Any:
    """Operations a second by intensity: the roof, whole steps and their layers."""
    figure, axes = _axes("Roofline", "operations a byte", "operations a second")
    precision = benchmarks[0].precision
    flops_per_s, bytes_per_s = roofline.roof(benchmarks, precision)
    work = [b for b in benchmarks if b.model and b.precision == precision and b.details["flops"]]
    ridge = flops_per_s / bytes_per_s
    if not work:
        return figure
    intensities = [b.details["flops"] / b.details["bytes"] for b in work]
    low, high = min(*intensities, ridge) / 2, max(*intensities, ridge) * 2
    axes.plot([low, ridge, high], [low * bytes_per_s, flops_per_s, flops_per_s], color=INK)
    name = f"{flops_per_s / 1e9:.3g} GFLOP/s, {precision}"
    axes.annotate(name, (ridge, flops_per_s), xytext=(0, 4), textcoords="offset points", color=INK)
    colors = dict(zip(dict.fromkeys(b.model for b in work), (BLUE, ORANGE, GREEN), strict=False))
    for b, intensity in zip(work, intensities, strict=True):
        whole, rate = b.name != roofline.LAYER, b.details["flops"] / b.median_s
        size = {"markersize": 9 if whole else 4, "color": colors[b.model]}
        axes.plot(intensity, rate, "*" if whole else "o", **size)
        name = b.model if whole else b.details["layer"]
        axes.annotate(f"  {name}", (intensity, rate), color=colors[b.model], fontsize=8)
    axes.set_ylim(top=2 * flops_per_s)
    return figure
