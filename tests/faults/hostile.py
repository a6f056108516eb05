"""Inputs that nobody should have to expect: strategies for Hypothesis.

Not a test: `test_fuzz.py` uses them.
"""

import copy
import dataclasses
import gzip
import io
import json
import os
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from mnist_jax.data import sources
from mnist_jax.runs import run_dir as runs


def mostly(usual: st.SearchStrategy[Any], *others: st.SearchStrategy[Any]) -> Any:
    """Half the time, and else one of the others."""
    return st.booleans().flatmap(lambda other: st.one_of(others) if other else usual)


@st.composite
def mutated(draw, valid: bytes) -> bytes:
    """`valid` with bytes replaced, removed and put in, or cut off."""
    for _ in range(draw(st.integers(1, 3))):
        begin = draw(st.integers(0, len(valid)))
        end = begin + draw(st.sampled_from((0, 1, 2, 8, len(valid))))
        valid = valid[:begin] + draw(st.binary(max_size=8)) + valid[end:]
    return valid


# IDX and gzip


def idx(array: np.ndarray) -> bytes:
    header = struct.pack(f">{1 + array.ndim}I", 0x0800 | array.ndim, *array.shape)
    return header + array.astype(np.uint8).tobytes()


def packed(content: bytes) -> bytes:
    return gzip.compress(content, mtime=0)


NAMES = (sources.TRAIN_IMAGES, sources.TRAIN_LABELS, sources.TEST_IMAGES, sources.TEST_LABELS)
PIXELS = np.arange(3 * 28 * 28).reshape(3, 28, 28)
IDX = dict(zip(NAMES, map(idx, (PIXELS, np.arange(3), PIXELS[:2], np.arange(2))), strict=True))
ZEROS = packed(bytes(10_000_000))
HEADERS = st.builds(
    lambda magic, shape, rest: struct.pack(f">{1 + len(shape)}I", magic, *shape) + rest,
    st.sampled_from((0x0801, 0x0803, 0x0D03)) | st.integers(0, 2**32 - 1),
    st.lists(st.sampled_from((0, 1, 2, 3, 28, 2**31, 2**32 - 1)), max_size=6),
    st.binary(max_size=20),
)


def idx_files(name: str) -> st.SearchStrategy[tuple[str, bytes, int]]:
    """A file's name, what is in it, and how often 10 MB of zeros follow."""
    content = (
        st.binary()
        | (st.binary() | mutated(IDX[name]) | HEADERS | st.just(IDX[name])).map(packed)
        | mutated(packed(IDX[name]))
    )
    return st.tuples(st.just(name), content, st.sampled_from((0, 0, 0, 1)))


# Pictures


def pictures() -> st.SearchStrategy[bytes]:
    """Files in every format, most of them mutated."""
    drawn = Image.new("L", (40, 30), 200)
    ImageDraw.Draw(drawn).line([(10, 5), (25, 5), (15, 25)], 20, 3)
    exif = Image.Exif()
    exif[0x0112] = 6
    kinds = [
        *((drawn, kind, {"exif": exif}) for kind in ("PNG", "JPEG", "WEBP")),
        *((drawn, kind, {}) for kind in ("BMP", "GIF", "TIFF")),
        (drawn.convert("CMYK"), "JPEG", {"progressive": True}),
        (drawn.convert("RGB").quantize(8), "PNG", {"transparency": 3}),
        (drawn.convert("LA"), "PNG", {}),
        (drawn.convert("1"), "BMP", {}),
        (Image.fromarray(np.asarray(drawn).astype(np.uint16) * 257), "PNG", {"transparency": 9}),
        *((drawn, kind, {"save_all": True, "append_images": [drawn]}) for kind in ("GIF", "WEBP")),
    ]
    files = []
    for picture, kind, options in kinds:
        picture.save(file := io.BytesIO(), kind, **options)
        files.append(file.getvalue())
    valid = st.sampled_from(files)
    return mostly(valid.flatmap(mutated), valid.flatmap(mutated).flatmap(mutated), valid)


# JSON

ODD_NUMBERS = (-1, 0, 2**31, 2**63, 10**9, 10**30, 10**400, 1e308, float("nan"), float("inf"))
ODD_TEXTS = ("", "..", "../../x", "~\0", "a\0", "~nobody/x", "\ud800", "a\nb", "\x1b[2J", "gpu")
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from((*ODD_NUMBERS, *ODD_TEXTS)),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=8,
)
# Too deep to read, nearly so, and a number of more digits than Python reads.
DEEP = st.sampled_from([b"[" * n + b"]" * n for n in (100, 900, 99_999)] + [b"9" * 5000])


@st.composite
def changed(draw, valid: Any) -> Any:
    """A JSON value with one at some depth replaced, removed or added."""
    if not isinstance(valid, dict | list) or not valid or draw(st.integers(0, 3)) == 3:
        like = ODD_TEXTS if isinstance(valid, str) else ODD_NUMBERS
        return draw(mostly(st.sampled_from(like), JSON))
    key = draw(st.sampled_from(sorted(valid) if isinstance(valid, dict) else range(len(valid))))
    how, valid = draw(st.sampled_from(("change", "remove", "add"))), copy.copy(valid)
    if how == "remove":
        del valid[key]
    elif how == "add" and isinstance(valid, dict):
        valid[draw(st.text(max_size=9))] = draw(JSON)
    else:
        valid[key] = draw(changed(valid[key]))
    return valid


def json_files(valid: dict[str, Any]) -> st.SearchStrategy[bytes]:
    """What might stand in the place of a file of these values."""
    once = changed(valid)
    values = (once | once.flatmap(changed)).map(lambda value: json.dumps(value).encode())
    deeper = st.builds(
        lambda key, deep: json.dumps({**valid, key: "@"}).encode().replace(b'"@"', deep),
        *(st.sampled_from(sorted(valid)), DEEP),
    )
    return mostly(values, deeper, DEEP, mutated(json.dumps(valid).encode()))


# A run's folder

BITS = {"BOOL": 8, "F4": 4, "F8_E4M3": 8, "BF16": 16, "F32": 32, "I32": 32, "F64": 64, "C64": 64}


def parts(content: bytes) -> tuple[dict[str, Any], bytes]:
    """What is in a safetensors file: its header, and behind it the arrays."""
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def checkpoint_files(valid: bytes) -> st.SearchStrategy[bytes]:
    header, body = parts(valid)
    rest = json.loads(header["__metadata__"]["rest"])

    def of(header: bytes) -> bytes:
        return len(header).to_bytes(8, "little") + header + body

    def with_value(name: str, value: Any) -> bytes:
        return of(json.dumps({**header, name: value}).encode())

    def with_rest(text: bytes) -> bytes:
        rest = text.decode(errors="replace")
        return with_value("__metadata__", {**header["__metadata__"], "rest": rest})

    def with_array(name: str, dtype: str, shape: list[int]) -> bytes:
        begin, end = header.get(name, {}).get("data_offsets", [len(body)] * 2)
        shape = [*shape, (end - begin) * 8 // BITS[dtype]]
        return with_value(name, {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]})

    def with_name_twice(two: tuple[str, Any]) -> bytes:
        return of(f"{json.dumps(dict([two]))[:-1]},{json.dumps(header)[1:]}".encode())

    names = st.sampled_from(sorted(header.keys() - {"__metadata__"}))
    shapes = st.lists(st.sampled_from((0, 1, 2**40)), max_size=3) | st.just([1] * 100)
    rows = changed(rest["rows"]).map(lambda rows: json.dumps({**rest, "rows": rows}).encode())
    pairs = st.sampled_from(sorted(header)).flatmap(
        lambda name: st.tuples(st.just(name), changed(header[name]))
    )
    return mostly(
        (json_files(rest) | rows).map(with_rest)
        | st.builds(with_array, names | st.text(), st.sampled_from(sorted(BITS)), shapes),
        changed(header["__metadata__"]).map(lambda value: with_value("__metadata__", value)),
        (json_files(header) | mutated(json.dumps(header).encode())).map(of),
        pairs.map(with_name_twice),
        mutated(valid),
    )


def huge(path: Path) -> None:
    """A file that would be seen in memory; on the disk it takes no place."""
    with path.open("wb") as file:
        file.truncate(10**9)


ODDITIES = {
    "nothing": lambda path, original: None,
    "folder": lambda path, original: path.mkdir(),
    "pipe": lambda path, original: os.mkfifo(path),
    "loop": lambda path, original: path.symlink_to(path.name),
    "device": lambda path, original: path.symlink_to("/dev/zero"),
    "link": lambda path, original: path.symlink_to(original),
    "huge": lambda path, original: huge(path),
    "bytes": lambda path, original: path.write_bytes(b"\xff" * 30),
}
ODD_FILES = st.sampled_from(sorted(ODDITIES))
FILE_NAMES = st.text(st.characters(codec="utf-8", exclude_characters="/\0"), max_size=60)
CHECKPOINT_NAMES = (
    st.builds("epoch-{:04d}-step-{:08d}.safetensors".format, *[st.integers(0, 10**12)] * 2)
    | FILE_NAMES.map("epoch-0009-step-00000099.safetensors{}".format)
    | FILE_NAMES.map(".{}.tmp".format)
).map("checkpoints/{}".format)
RECORDS = (*runs.RECORDS, runs.RESULT, runs.MANIFEST)


def changes(what: str, whole: Path) -> st.SearchStrategy[tuple[str, bytes | str]]:
    """A place in a run's folder, and what to put there."""

    def valid(name: str) -> bytes:
        return (whole / name).read_bytes()

    def at(place: str, *contents: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
        return st.tuples(st.just(place), st.one_of(contents))

    newest = max(whole.glob("checkpoints/*.safetensors")).relative_to(whole).as_posix()
    digest = f"{newest}.sha256"
    config, environment, result = (
        json.loads(valid(f"{name}.json")) for name in ("config", "environment", "result")
    )
    small = {"model": "mlp", "hidden_sizes": [8, 9], "seeds": 2, "workdir": "x"}
    numbers = st.sampled_from(ODD_NUMBERS) | st.integers(1, 9)
    sized = st.builds(
        lambda sizes, seeds: json.dumps({**small, "hidden_sizes": sizes, "seeds": seeds}).encode(),
        *(st.lists(numbers, max_size=3), numbers),
    )
    row = json.loads(valid("metrics.jsonl").splitlines()[0])
    rows = st.lists(json_files(row), max_size=4).map(b"\n".join)
    more = (".pid", ".lock", "checkpoints", "checkpoints/.x.tmp", "checkpoints/x.safetensors")
    return {
        "odd files": st.tuples(st.sampled_from((*RECORDS, newest, digest, *more)), ODD_FILES),
        "checkpoints": mostly(
            at(newest, checkpoint_files(valid(newest))),
            at(digest, mutated(valid(digest))),
            st.tuples(CHECKPOINT_NAMES, st.just(valid(newest)) | st.binary() | ODD_FILES),
        ),
        "config files": at("config.json", json_files(config), json_files(small), sized),
        "result files": mostly(
            at("result.json", json_files(result)),
            at("environment.json", json_files(environment)),
            at("metrics.jsonl", rows, mutated(valid("metrics.jsonl"))),
            at("manifest.sha256", mutated(valid("manifest.sha256"))),
        ),
    }[what]


def cleared(path: Path) -> Path:
    """The path, with nothing there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    return path


# Command lines

LEGAL = ("mlp", "digits", "tutorial", "auto", "cpu", "1", "2 3", "0.5", "None")
ODD_WORDS = ("--", "-", "-1", "=", "9" * 5000, "1e400", "nan", "-inf", "-x", "--help", "-h")
LIKE_TYROS = ("Error parsing --x", "Missing value for argument '--x'", "Unrecognized options: x")
ODD_VALUES = st.sampled_from((*ODD_WORDS, *LIKE_TYROS, *ODD_TEXTS)) | st.text(max_size=9)
VALUES = mostly(st.sampled_from(LEGAL), ODD_VALUES)


def lines(kind: type) -> st.SearchStrategy[list[str]]:
    """Words for a command with the flags of a dataclass."""
    names = st.sampled_from([field.name for field in dataclasses.fields(kind)])
    spelt = names.map("--{}".format) | names.map(lambda name: "--" + name.replace("_", "-"))
    misspelt = st.builds(
        lambda name, at, letter: f"--{name[:at]}{letter}{name[at + 1 :]}",
        *(names, st.integers(0, 9), st.text(max_size=1)),
    ) | st.builds("{}{}".format, st.sampled_from(("--no_", "--no-", "-", "---")), names)
    flags = mostly(spelt, spelt, misspelt)
    pairs = st.builds("{}={}".format, flags, VALUES)
    return st.lists(mostly(pairs, flags, VALUES), max_size=6)
