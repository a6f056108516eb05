"""Makes the figures of the README and of these pages from finished runs of different models.

    python docs/make_figures.py RUN RUN RUN

It writes into docs/figures and prints a line of HTML for each figure.
"""

import dataclasses
import io
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from mnist_jax import cli
from mnist_jax.atomic_io import write_atomically
from mnist_jax.errors import UsageError
from mnist_jax.inference.flags import DataFlags, Runs, open_runs
from mnist_jax.inference.restore import dataset_of
from mnist_jax.reporting import plots, report


@dataclasses.dataclass(frozen=True, kw_only=True)
class MakeFigures(DataFlags):
    """Makes the figures of the documentation from runs of different models on one data set."""

    runs: Runs
    """The runs' folders."""

    output: Path = Path(__file__).parent / "figures"
    """Folder for the figures."""

    def run(self) -> None:
        """Writes each figure: as PNG if it contains an image, else as SVG."""
        self.output.mkdir(parents=True, exist_ok=True)
        for name, figure, text in self.figures():
            is_image = any(axes.images for axes in figure.axes)
            path = self.output / f"{name}.{'png' if is_image else 'svg'}"
            write_atomically(path, png(figure) if is_image else plots.svg(figure))
            width = round(96 * figure.get_figwidth())
            print(f'<img src="figures/{path.name}" width="{width}" alt="{text}">')

    def figures(self) -> Iterator[tuple[str, Figure, str]]:
        """File name, figure and alternative text of each."""
        runs = open_runs(self.runs)
        if len({run.config.model for run in runs}) < len(runs):
            raise UsageError("name one run of each model")
        dataset = dataset_of(runs[0], data_dir=self.data_dir, manual_dir=self.manual_dir)
        image, label, names = *dataset.train, dataset.class_names
        first = names[label[0]]
        yield "digit", digit(image[0], first), f"The first training image, labelled {first}"
        shown = [names[i] for i in label[:60]]
        yield "samples", plots.samples(image[:60], shown), "The first 60 training images"
        for found in report.comparison_page(runs)["figures"]:
            yield found.name, found.figure, found.heading
        for run in runs:
            for found in report.run_page(run, dataset, self.platform)["figures"]:
                yield f"{run.config.model}-{found.name}", found.figure, found.heading


@plots.styled
def digit(image: np.ndarray, name: str) -> Figure:
    """One image (28, 28, 1) uint8, dark on white, with pixel coordinates on the axes."""
    figure = Figure((3.2, 3.4))
    axes = figure.add_subplot()
    axes.imshow(image[..., 0], cmap="gray_r", vmin=0, vmax=255)
    axes.grid(visible=False)
    axes.set(title=name, xticks=(0, 9, 18, 27), yticks=(0, 9, 18, 27))
    return figure


@plots.styled
def png(figure: Figure) -> bytes:
    """The figure as a PNG file on white."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=192, metadata={"Software": None})
    return file.getvalue()


def main(argv: list[str]) -> int:
    """Runs the command; returns its exit status."""

    def make() -> None:
        words = [word for word in argv if word != "--debug"]
        description = MakeFigures.__doc__ or ""
        cli.parse(MakeFigures, words, prog="docs/make_figures.py", description=description).run()

    return cli.exit_status(make, debug="--debug" in argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
