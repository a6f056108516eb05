"""Writes the tutorial as notebooks, from its pages: `python docs/make_notebooks.py`."""

import json
import re
import shlex
from pathlib import Path

from mnist_jax import cli
from mnist_jax.flags import Flags

DOCS = Path(__file__).parent


def cell(kind: str, source: str) -> dict:
    """A notebook's cell; kind is "markdown" or "code"."""
    code = {"execution_count": None, "outputs": []} if kind == "code" else {}
    return {"cell_type": kind, "metadata": {}, **code, "source": source.strip("\n")}


def in_python(command: str) -> str:
    """A command of the shell for a cell, which runs it in the notebook's own process."""
    _, _, rest = command.partition(" -m mnist_jax ")
    if rest:
        return f"main({shlex.split(rest)});".replace("'", '"')
    return f"fit(Config({fields(command.removeprefix('python train.py '))}))"


def fields(flags: str) -> str:
    """Flags as the arguments of `Config`."""
    values = vars(cli.parse(Flags, shlex.split(flags), prog="", description=""))
    names = re.findall(r"--(?:no-)?(\w+)", flags)
    given = {name: values[name] for name in values if name in names}
    texts = (f"{n}={str(v) if isinstance(v, Path) else v!r}" for n, v in given.items())
    return ", ".join(texts).replace("'", '"')


def notebook(text: str) -> str:
    """The notebook of a page: its Python and shell blocks become cells of code.

    Commands on the reader's own pictures stay text.
    """
    cells, imports = [], "from mnist_jax import Config, fit\n\n"
    for part in re.split(r"(```\w+\n.*?```\n)", text, flags=re.DOTALL):
        match = re.fullmatch(r"```(\w+)\n(.*?)```\n", part, re.DOTALL)
        if match and "mnist_jax draw" not in part:
            language, code = match.groups()
            if language == "sh":
                code = imports + "\n".join(map(in_python, code.strip().splitlines()))
                imports = ""
            if "main(" in code:
                code = f"from mnist_jax.__main__ import main\n\n{code}"
            cells.append(cell("code", code))
        elif part.strip():
            part = re.sub(r"`--(\w+)`", r"`\1`", part)  # flags in the text
            flags = re.compile(r"`(--\w+[ =][^`]+)`")  # and those with their values
            cells.append(cell("markdown", flags.sub(lambda m: f"`{fields(m[1])}`", part)))
    for number, each in enumerate(cells):
        each["id"] = f"cell-{number}"
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    content = {"cells": cells, "metadata": {"kernelspec": kernel}}
    content |= {"nbformat": 4, "nbformat_minor": 5}
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    for page in ("tutorial.md", "tutorial.ko.md"):
        path = DOCS / page
        text = path.read_text(encoding="utf-8")
        path.with_suffix(".ipynb").write_text(notebook(text), encoding="utf-8")
