"""Everything but training, a dataclass a command: its flags are the fields, `run` does the job."""

from mnist_jax.commands.data import Data
from mnist_jax.commands.draw import Draw
from mnist_jax.commands.evaluate import Evaluate
from mnist_jax.commands.export import Export
from mnist_jax.commands.predict import Predict
from mnist_jax.commands.report import Report
from mnist_jax.commands.verify import Verify
from mnist_jax.commands.voting import Compare, Ensemble

COMMANDS: dict[str, type] = {
    "data": Data,
    "predict": Predict,
    "evaluate": Evaluate,
    "ensemble": Ensemble,
    "compare": Compare,
    "report": Report,
    "verify": Verify,
    "export": Export,
    "draw": Draw,
}
