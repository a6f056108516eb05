"""Writes the tutorial as notebooks, from its pages: `python docs/make_notebooks.py`."""

import json
import re
from pathlib import Path

DOCS = Path(__file__).parent


def cell(kind: str, source: str) -> dict:
    """A notebook's cell; kind is "markdown" or "code"."""
    code = {"execution_count": None, "outputs": []} if kind == "code" else {}
    return {"cell_type": kind, "metadata": {}, **code, "source": source.strip("\n")}


def notebook(text: str) -> str:
    """The notebook of a page: its Python and shell blocks become cells of code."""
    cells = []
    for part in re.split(r"(```\w+\n.*?```\n)", text, flags=re.DOTALL):
        if match := re.fullmatch(r"```(\w+)\n(.*?)```\n", part, re.DOTALL):
            language, code = match.groups()
            if language == "sh":  # anywhere, with the package installed
                code = code.replace("python train.py", "mnist-jax train")
                code = code.replace("python -m mnist_jax", "mnist-jax")
                code = re.sub(r"^", "!", code.strip(), flags=re.MULTILINE)
            cells.append(cell("code", code))
        elif part.strip():
            cells.append(cell("markdown", part))
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
