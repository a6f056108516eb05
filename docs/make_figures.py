"""Makes the figures of the README and of these pages, from finished runs of all models.

    python docs/make_figures.py RUN RUN RUN

writes them into docs/figures, on white, and prints for each a line that shows it in Markdown.
"""

import dataclasses
import html
import sys
from collections.abc import Iterator
from pathlib import Path

from matplotlib.figure import Figure

from mnist_jax import atomic_io as storage
from mnist_jax import cli
from mnist_jax.commands.evaluating import Evaluating, Runs
from mnist_jax.errors import UsageError
from mnist_jax.inference import compare as ensemble
from mnist_jax.reporting import pictures, plots


@dataclasses.dataclass(frozen=True, kw_only=True)
class MakeFigures(Evaluating):
    """Makes the figures of the documentation from runs of different models on one data set."""

    folders: Runs
    """The runs' folders."""

    output: Path = Path(__file__).parent / "figures"
    """Folder for the figures."""

    def run(self) -> None:
        """Writes each figure: as SVG, or as PNG where it is made of pixels."""
        for name, figure, alt in self.figures():
            self.output.mkdir(parents=True, exist_ok=True)
            of_pixels = any(axes.images for axes in figure.axes)
            path = self.output / f"{name}.{'png' if of_pixels else 'svg'}"
            data = plots.png(figure) if of_pixels else plots.svg(figure)
            storage.write_atomically(path, data)
            width = round(96 * figure.get_figwidth())
            print(f'<img src="figures/{path.name}" width="{width}" alt="{html.escape(alt)}">')

    def figures(self) -> Iterator[tuple[str, Figure, str]]:
        """Name, figure and alternative text of each."""
        if not self.folders:
            raise UsageError("no run is named; name the folders of one run of each model")
        runs, dataset = self.load(self.folders)
        if len({run.config.model for run in runs}) < len(runs):
            raise UsageError("two runs are of the same model; name one of each")
        image, label, names = *dataset.train, dataset.class_names
        first = names[label[0]]
        yield "digit", plots.digit(image[0], first), f"The first training image, labelled {first}"
        shown = [names[i] for i in label[:60]]
        yield "samples", plots.samples(image[:60], shown), "The first 60 training images"
        for picture in pictures.of_several({run.config.model: run.progress.rows for run in runs}):
            yield picture.name, picture.figure, picture.alt
        for run in runs:
            predictions = ensemble.predict_all([run], dataset, platform=self.platform)
            for picture in pictures.of_one(run, dataset, predictions):
                yield f"{run.config.model}-{picture.name}", picture.figure, picture.alt


def main(argv: list[str]) -> int:
    """Runs the command; returns its exit status."""

    def make() -> None:
        words = [word for word in argv if word != "--debug"]
        description = MakeFigures.__doc__ or ""
        cli.parse(MakeFigures, words, prog="docs/make_figures.py", description=description).run()

    return cli.exit_status(make, debug="--debug" in argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
