"""A web page to draw digits on, with a saved model's answers.

The page posts a drawing as 448×448 grey levels. It loads nothing from elsewhere. The server answers
whoever reaches its address, also through a proxy: a reader of digits has nothing to hide.
"""

import dataclasses
import json
import logging
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from waitress.server import create_server
from werkzeug.wrappers import Request, Response

from mnist_jax.errors import DataError, NonFiniteError, UsageError, print_warnings
from mnist_jax.inference.flags import PlatformFlags, Positional, arg, open_runs
from mnist_jax.inference.preprocess import to_mnist
from mnist_jax.inference.restore import PRETRAINED, LoadedRun, Predictor
from mnist_jax.models import IMAGE_SHAPE
from mnist_jax.runs.results import accuracy_line

SIDE = 448  # pixels of a drawing


def read_drawing(predictor: Predictor, grey: np.ndarray) -> dict[str, Any]:
    """Reads a drawing, grey levels (height, width) uint8.

    Returns the probabilities of the classes, the image that the network sees, 784 numbers, and a
    warning, often empty; or, without a digit, only a message.
    """
    try:
        digit = to_mnist(grey)
        (probabilities,) = predictor(digit.image[None]).mean.tolist()
    except (DataError, NonFiniteError) as error:
        return {"message": str(error)}
    image = digit.image.ravel().tolist()
    return {"probabilities": probabilities, "image": image, "warning": digit.warning}


def title(run: LoadedRun) -> str:
    """What answers: the model, its data, and its accuracy if that is known."""
    accuracy = f"{run.step:,} steps done" if run.step else "accuracy unknown"
    if run.record is not None and run.record["steps"] == run.step:
        accuracy = accuracy_line(run.record)
    accuracy = "several networks" if "\n" in accuracy else accuracy
    return f"{run.config.model} trained on {run.data.name}, {accuracy}"


def application(predictor: Predictor, model: dict[str, Any]) -> Callable[..., Any]:
    """The WSGI application: the page at /, `model` at /model, `read_drawing` at /read."""
    page = Path(__file__).with_name("draw.html").read_text("utf-8")

    @Request.application
    def app(request: Request) -> Response:
        match request.method, request.path:
            case "GET", "/":
                return Response(page, mimetype="text/html")
            case "GET", "/model":
                return Response(json.dumps(model), mimetype="application/json")
            case "POST", "/read":
                grey = np.frombuffer(request.get_data(), np.uint8)
                if grey.size != SIDE**2:
                    return Response(f"a drawing has {SIDE}×{SIDE} bytes", 400)
                answer = read_drawing(predictor, grey.reshape(SIDE, SIDE))
                return Response(json.dumps(answer), mimetype="application/json")
        return Response("not found", 404)

    return app


@dataclasses.dataclass(frozen=True, kw_only=True)
class Draw(PlatformFlags):
    """Serves a page to draw digits on, which shows what a saved model reads."""

    folder: Annotated[Path | None, Positional, arg(metavar="[RUN]")] = None
    """The run's folder. With --seeds=K: the mean of its networks' probabilities. None: the MLP that
    comes with mnist_jax."""

    host: str = "127.0.0.1"
    """Address to listen on. 127.0.0.1: for this machine alone. 0.0.0.0: for every machine that can
    reach this one; there is no password."""

    port: int = 8000
    """Port to listen on. 0: any that is free."""

    def run(self) -> None:
        """Prints the page's address once the model is compiled, and serves until Ctrl-C."""
        if not self.host:  # which would mean every address
            raise UsageError("host is empty; name an address, such as 127.0.0.1")
        if not 0 <= self.port <= 65535:
            raise UsageError(f"port is {self.port}; allowed is 0 to 65535, 0 for any free one")
        try:
            listening = socket.create_server((self.host, self.port))
        except (OSError, ValueError) as error:
            problem = f"cannot listen on {self.host!r}, port {self.port} ({error})"
            raise UsageError(f"{problem}; choose another --host or --port") from error
        with listening:
            (run,) = open_runs([self.folder or PRETRAINED])
            predictor = Predictor(run, self.platform)
            print_warnings(predictor(np.zeros((1, *IMAGE_SHAPE), np.uint8)).warnings)  # compiles
            text = title(run)
            address, port = listening.getsockname()
            here = "127.0.0.1" if address == "0.0.0.0" else address
            print(f"{text}\ndraw at http://{here}:{port}  (Ctrl-C to quit)", flush=True)
            model = {"model": text, "classes": run.data.class_names, "side": SIDE}
            app = application(predictor, model)
            logging.getLogger("waitress.queue").setLevel(logging.ERROR)  # requests may wait
            create_server(app, sockets=[listening], max_request_body_size=SIDE**2 + 1).run()
