"""Makes `mnist_jax/pretrained`, the network that comes with the package, from a finished run.

    python train.py --model=mlp --preset=best --epochs=40 --dataset=mnist
    python docs/make_pretrained.py RUN

It keeps the parameters, without the optimizer's state, and the run's JSON files, without paths.
"""

import json
import shutil
import sys
from pathlib import Path

import safetensors.numpy

from mnist_jax import Config
from mnist_jax.atomic_io import digest_lines, write_verified
from mnist_jax.flags import PATHS
from mnist_jax.inference.restore import PRETRAINED
from mnist_jax.runs.checkpoint import load_saved
from mnist_jax.runs.run_dir import CONFIG, ENVIRONMENT, MANIFEST, METRICS, RESULT


def make(run: Path) -> None:
    """Replaces the folder."""
    contents = {name: (run / name).read_bytes() for name in (CONFIG, ENVIRONMENT, METRICS, RESULT)}
    places = {name: value for name, value in Config().to_json().items() if name in PATHS}
    for name in (CONFIG, RESULT):
        values = json.loads(contents[name])
        (values if name == CONFIG else values["config"]).update(places)
        contents[name] = (json.dumps(values, indent=1) + "\n").encode()
    shutil.rmtree(PRETRAINED, ignore_errors=True)
    (PRETRAINED / "checkpoints").mkdir(parents=True)
    for name, data in contents.items():
        (PRETRAINED / name).write_bytes(data)
    (PRETRAINED / MANIFEST).write_bytes(digest_lines(contents))
    newest = max((run / "checkpoints").glob("*.safetensors"))
    arrays, rest, _ = load_saved(run)
    kept = {name: a for name, a in arrays.items() if not name.startswith("state/opt_state/")}
    metadata = {"format": str(json.loads(contents[CONFIG])["version"]), "rest": json.dumps(rest)}
    data = safetensors.numpy.save(kept, metadata)
    write_verified(PRETRAINED / "checkpoints" / newest.name, data)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    make(Path(sys.argv[1]))
