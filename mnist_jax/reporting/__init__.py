"""How a run is shown: console, figures, report, TensorBoard, profiler."""

from mnist_jax.callbacks import Callback
from mnist_jax.config import Config
from mnist_jax.errors import UsageError
from mnist_jax.reporting.console import Display


def make_callbacks(config: Config) -> list[Callback]:
    """The callbacks that a config asks for; the console comes last, to end with the accuracy.

    Raises UsageError if tensorboardX is missing, DeviceError if no profile can be written.
    """
    callbacks: list[Callback] = []
    # Imported when needed: Matplotlib takes half a second.
    if config.profile is not None:
        from mnist_jax.reporting.profiling import Profiler

        callbacks.append(Profiler(config.profile))
    if config.tensorboard:
        try:
            from mnist_jax.reporting.tensorboard import TensorBoard, TensorBoardSteps
        except ModuleNotFoundError as error:
            message = "--tensorboard needs tensorboardX; pip install tensorboardX"
            raise UsageError(message) from error
        callbacks.append(TensorBoardSteps() if config.log_steps else TensorBoard())
    if config.report:
        from mnist_jax.reporting.report import ReportWriter

        callbacks.append(ReportWriter())
    return [*callbacks, Display()]
