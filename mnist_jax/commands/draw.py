"""The command `draw`."""

import dataclasses
import sys
from pathlib import Path

from mnist_jax import errors
from mnist_jax.commands.evaluating import Computing
from mnist_jax.config import expand_paths


@dataclasses.dataclass(frozen=True, kw_only=True)
class Draw(Computing):
    """Serves a page to draw on, which shows what a saved model makes of it."""

    workdir: Path
    """The run's folder. Of a run with --seeds=K: the mean of its networks' answers."""

    host: str = "127.0.0.1"
    """Address to listen at. 127.0.0.1: only this machine can open the page. 0.0.0.0: others in its
    network can too."""

    port: int = 8000
    """Port to listen at, 0 to 65535. 0: any that is free."""

    def __post_init__(self):
        super().__post_init__()
        expand_paths(self, "workdir")
        if not 0 <= self.port <= 65535:
            raise errors.UsageError(
                f"port is {self.port}; allowed is 0 to 65535, 0 for any that is free; change --port"
            )

    def run(self) -> None:
        """Prints the page's address once all is ready, and answers until Ctrl-C."""
        from mnist_jax.inference import draw
        from mnist_jax.inference import restore as saved
        from mnist_jax.parallel import mesh as devices

        with draw.listen(self.host, self.port) as listening:
            run = saved.load_run(self.workdir)
            model = draw.about(run)
            notices = devices.keep_compiled(run.config.compilation_cache)
            if not draw.is_private(listening):
                notices.append("every machine that reaches this one can open the page")
            read = draw.reader(run, self.platform)
            for notice in (*run.notices, *notices):
                print(f"notice: {notice}", file=sys.stderr)
            name = draw.network_name(listening)
            local, shared = draw.url(listening), draw.url(listening, name)
            others = "" if shared == local else f"\nfrom other machines at {shared}"
            print(f"{model['model']}\ndraw at {local}  Ctrl-C ends it{others}", flush=True)
            draw.serve(listening, draw.application(read, model, {self.host, name}))
