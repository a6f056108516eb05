"""The command `predict`."""

import collections
import contextlib
import dataclasses
import itertools
import json
import os
import stat
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from mnist_jax import errors
from mnist_jax.commands.evaluating import REQUIRED, Computing
from mnist_jax.config import expand_paths
from mnist_jax.runs.statistics import percent

if TYPE_CHECKING:
    import numpy as np

    from mnist_jax.inference.predict import Prediction

BAR_AFTER_S = 2.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Predict(Computing):
    """Says which digit (or other thing) each picture shows, by a saved model."""

    images: Annotated[
        tuple[Path, ...],
        tyro.conf.Positional,
        tyro.conf.arg(metavar="PICTURE [PICTURE ...]", help_behavior_hint=REQUIRED),
    ]
    """Pictures (PNG, JPEG, BMP, GIF, WebP), and folders, of which all pictures are taken."""

    workdir: Path
    """The run's folder. Of a run with --seeds=K: the mean of its networks' answers."""

    largest: bool = False
    """Give no notice where a picture holds several digits. The largest is read in any case."""

    json: bool = False
    """Print one JSON object a picture instead."""

    save_preprocessed: Path | None = None
    """Folder for what the network sees of each picture, such as seven-28x28.png of seven.jpg. None:
    do not keep it."""

    def __post_init__(self):
        super().__post_init__()
        expand_paths(self, "workdir", "save_preprocessed")

    def run(self) -> None:
        """Prints an answer to each picture, and on stderr a line for each that has none.

        Raises:
            DataError: there are such. The others have been answered.
        """
        from mnist_jax import data
        from mnist_jax.inference import predict as prediction
        from mnist_jax.inference import preprocess as images
        from mnist_jax.inference import restore as saved
        from mnist_jax.parallel import mesh as devices

        if not self.images:
            raise errors.UsageError("no picture is named; name files, or folders of them")
        run = saved.load_run(self.workdir)
        saved.notice_incomplete(run)
        names = data.class_names(run.config.dataset)
        folder = self.save_preprocessed
        save = None if folder is None else _saver(folder)
        paths, unusable = [], []
        for path in self.images:
            try:
                paths += images.pictures_of(path)
            except errors.DataError as error:
                unusable.append(prediction.Prediction(path, error=error))

        failed = 0
        # Answers that come on a terminal one by one need no bar, and would break it.
        one_by_one = self.json if sys.stdout.isatty() else _is_pipe(sys.stdout)
        self.keep_compiled(run.config)
        platform, precision = self.platform or run.config.platform, run.config.precision
        with (
            devices.running_on(platform, precision) as device,
            _columns(paths, names) as show,
            _bar(len(unusable) + len(paths), wanted=not one_by_one) as advance,
        ):
            predictor = prediction.Predictor(run, device)
            for answer in itertools.chain(unusable, predictor.answers(paths)):
                advance()
                if self.json:
                    print(json.dumps(_record(answer, names)), flush=True)
                if answer.digit is None or answer.probabilities is None:
                    _tell(f"error: {answer.error}")
                    failed += 1
                    continue
                if answer.digit.others and not self.largest:
                    count = answer.digit.others + 1
                    _tell(
                        f"notice: {answer.path} seems to hold {count} digits; the largest is read"
                    )
                if not self.json:
                    show(answer.path, answer.probabilities)
                if save is not None:
                    save(answer.path, answer.digit.image)
        for notice in (*run.notices, *predictor.notices):
            _tell(f"notice: {notice}")
        if failed:
            of = len(paths) + len(unusable)
            raise errors.DataError(f"{failed} of {of} have no answer; the lines above say why")


def _tell(line: str) -> None:
    print(errors.printable(line), file=sys.stderr)


def _record(answer: "Prediction", names: Sequence[str]) -> dict[str, Any]:
    """An answer as JSON can hold it."""
    if answer.probabilities is None:
        return {"file": str(answer.path), "error": str(answer.error)}
    label = int(answer.probabilities.argmax())
    return {
        "file": str(answer.path),
        "label": label,
        "name": names[label],
        "probability": float(answer.probabilities[label]),
        "probabilities": answer.probabilities.tolist(),
    }


@contextlib.contextmanager
def _columns(
    paths: Sequence[Path], names: tuple[str, ...]
) -> Iterator[Callable[[Path, "np.ndarray"], None]]:
    """What shows an answer: on a terminal in a table at the end, else in a line at once."""
    from rich.table import Table
    from rich.text import Text

    from mnist_jax.reporting.console import PipeConsole

    console = PipeConsole(file=sys.stdout, highlight=False)
    table = Table(pad_edge=False)
    for heading in ("file", "label", "probability", "runner-up", "probability"):
        side = "right" if heading == "probability" else "left"
        table.add_column(heading, justify=side, overflow="fold")
    longest = max((len(errors.printable(str(path))) for path in paths), default=0)
    name_width = max(map(len, names))

    def show(path: Path, probabilities: "np.ndarray") -> None:
        file = errors.printable(str(path))
        cells: list[tuple[str, str]] = [
            (names[label], percent(float(probabilities[label])))
            for label in (-probabilities).argsort(kind="stable")[:2].tolist()
        ]
        if console.is_terminal:
            table.add_row(Text(file), *itertools.chain(*cells))  # a name may look like markup
        else:
            shown = (f"{name:{name_width}s}  {share:>8s}" for name, share in cells)
            print(f"{file:{longest}s}", *shown, sep="  ", flush=True)

    try:
        yield show
    finally:
        if table.row_count:
            console.print(table)


@contextlib.contextmanager
def _bar(total: int, *, wanted: bool) -> Iterator[Callable[[], None]]:
    """What counts one picture more, in a bar on stderr's terminal once that has taken a while."""
    from rich.progress import Progress

    from mnist_jax.reporting.console import PipeConsole

    progress = Progress(console=PipeConsole(stderr=True), transient=True, redirect_stdout=False)
    task = progress.add_task("reading", total=total)
    started = time.monotonic()

    def advance() -> None:
        progress.advance(task)
        due = time.monotonic() - started > BAR_AFTER_S
        if wanted and due and progress.console.is_terminal and not progress.live.is_started:
            progress.start()

    try:
        yield advance
    finally:
        if progress.live.is_started:
            progress.stop()


def _is_pipe(file: Any) -> bool:
    try:
        return stat.S_ISFIFO(os.fstat(file.fileno()).st_mode)
    except (OSError, ValueError):  # no file of the system
        return True


def _saver(folder: Path) -> Callable[[Path, "np.ndarray"], None]:
    """What writes an image into a folder, under the name of the picture it was made of.

    Raises:
        DeviceError: the folder cannot be made, or later written to.
    """
    from PIL import Image

    times: collections.Counter[str] = collections.Counter()  # pictures may have the same name

    def save(path: Path, image: "np.ndarray") -> None:
        times[path.stem] += 1
        number = f"-{times[path.stem]}" if times[path.stem] > 1 else ""
        with _writing(folder):
            Image.fromarray(image[..., 0]).save(folder / f"{path.stem}-28x28{number}.png")

    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return save


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise errors.DeviceError(
            f"cannot write {folder} ({error.strerror}); choose another --save_preprocessed"
        ) from error
