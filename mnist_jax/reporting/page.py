"""A page that needs nothing but itself: its text, its tables and its figures, as HTML."""

from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import jinja2

from mnist_jax import atomic_io as storage
from mnist_jax.errors import DeviceError, UsageError
from mnist_jax.reporting import plots
from mnist_jax.reporting.pictures import Picture

BEGINNING = b"<!DOCTYPE html>"


class Table(NamedTuple):
    """Rows under the names of their columns, if any; each row's first cell says what it is of.

    Tables of numbers have them to the right. Commands, for a shell, stand below.
    """

    heading: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    numbers: bool = True
    text: str = ""
    commands: Sequence[str] = ()


class Page(NamedTuple):
    """What a page shows, in this order. All of it is text; none is taken for HTML.

    `lead` is the test accuracy where there is one.
    """

    title: str
    lead: str
    summary: Sequence[str]
    notices: Sequence[str]
    results: Sequence[Table]
    pictures: Sequence[Picture]
    details: Sequence[Table]


def write(path: Path, page: bytes) -> None:
    """Writes the page, whole or not at all.

    Raises:
        UsageError: another file is there, which is not such a page.
        DeviceError: it cannot be written.
    """
    try:
        if path.is_file():
            with path.open("rb") as file:
                if file.read(len(BEGINNING)) != BEGINNING:
                    raise UsageError(f"{path} is there and is no page; choose another --output")
        storage.write_atomically(path, page)
    except OSError as error:
        raise DeviceError(
            f"cannot write {path} ({error.strerror}); choose another file or folder"
        ) from error


def render(page: Page) -> bytes:
    """The page as HTML."""
    source = resources.files("mnist_jax").joinpath("page.html").read_text("utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    colours = {"paper": plots.PAPER, "ink": plots.INK, "muted": plots.MUTED, "faint": plots.FAINT}
    dark = {name: plots.DARK[colour] for name, colour in colours.items()}
    html = environment.from_string(source).render(page=page, light=colours, dark=dark)
    return html.encode("utf-8", "replace")  # a file's name may hold what UTF-8 cannot
