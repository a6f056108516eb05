"""A web page to draw digits on, served to the user's own browser, with a saved model's answers.

The page posts a drawing as 448×448 grey levels. Only the server's own page gets answers: the server
checks the headers Host (against DNS rebinding) and Origin (against other sites in the same
browser). The page's Content-Security-Policy lets it load nothing but its own script and style.
"""

import base64
import contextlib
import dataclasses
import hashlib
import ipaddress
import json
import logging
import re
import socket
from collections.abc import Callable
from importlib import resources
from typing import Any, NoReturn
from urllib.parse import urlsplit

import numpy as np
from waitress.server import create_server
from werkzeug.wrappers import Request, Response

from mnist_jax.data import class_names
from mnist_jax.errors import DataError, NonFiniteError, UsageError
from mnist_jax.inference.flags import PlatformFlags, RunFolder, print_warnings
from mnist_jax.inference.preprocess import to_mnist
from mnist_jax.inference.restore import LoadedRun, Predictor, load_run
from mnist_jax.parallel import mesh
from mnist_jax.runs.results import accuracy_line
from mnist_jax.runs.run_dir import read_result

SIDE = 448  # pixels of a drawing


def listen(host: str, port: int) -> socket.socket:
    """A socket that accepts connections at an address of this machine; port 0: any free port.

    Raises:
        UsageError: the address is not this machine's, or the port is taken or forbidden.
    """
    if not 0 <= port <= 65535:
        raise UsageError(f"port is {port}; allowed is 0 to 65535, 0 for any free one")
    try:
        family, *_, address = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0]
        return socket.create_server((address[0], port), family=family)
    except (OSError, ValueError) as error:
        problem = f"cannot listen at {host!r}, port {port} ({error})"
        remedy = "choose another --host, such as 127.0.0.1, or --port, such as 0 for any free one"
        raise UsageError(f"{problem}; {remedy}") from error


def addresses(listening: socket.socket) -> list[str]:
    """What browsers open; if the socket accepts all of this machine's addresses, here and there."""
    (address, port), family = listening.getsockname()[:2], listening.family
    is_ipv4, names = family == socket.AF_INET, [address]
    if ipaddress.ip_address(address).is_unspecified:
        names = ["127.0.0.1" if is_ipv4 else "::1"]
        with socket.socket(family, socket.SOCK_DGRAM) as udp, contextlib.suppress(OSError):
            # Sends nothing, but selects the interface. No machine has these addresses.
            udp.connect(("192.0.2.1" if is_ipv4 else "2001:db8::1", 9))
            names.append(udp.getsockname()[0])
    return [f"http://{name if is_ipv4 else f'[{name}]'}:{port}" for name in names]


def reader(run: LoadedRun, platform: str | None = None) -> Callable[[np.ndarray], dict[str, Any]]:
    """Compiles the run's model; returns a function that any thread may call.

    Grey levels (height, width) uint8 → the `probabilities` of the classes, the `image` that the
    network sees, 784 numbers, and how many `others` are ignored; or a `message` without a digit.
    """
    where = platform or run.config.platform, run.config.precision
    with mesh.use_device(*where) as device:
        predictor = Predictor(run, device, batch_size=1)
        run.warnings.extend(predictor(np.zeros((1, 28, 28, 1), np.uint8)).warnings)

    def read(grey: np.ndarray) -> dict[str, Any]:
        try:
            digit = to_mnist(grey)
            with mesh.use_device(*where):  # applies to one thread
                (probabilities,) = predictor(digit.image[None]).mean.tolist()
        except (DataError, NonFiniteError) as error:
            return {"message": str(error)}
        image = digit.image.ravel().tolist()
        return {"probabilities": probabilities, "image": image, "others": digit.others}

    return read


def application(
    read: Callable[[np.ndarray], dict[str, Any]], model: dict[str, Any], host: str
) -> Callable[..., Any]:
    """The WSGI application: the page at /, `model` at /model, the answers of `read` at /read."""
    page = resources.files("mnist_jax.inference").joinpath("draw.html").read_text("utf-8")
    headers = {
        "Content-Security-Policy": _policy(page),
        "Cache-Control": "no-store",
        "X-Content-Type-Options": "nosniff",
    }

    @Request.application
    def app(request: Request) -> Response:
        response = respond(request)
        response.headers.extend(headers)
        return response

    def respond(request: Request) -> Response:
        if not _is_own_host(request.host, host):
            return Response("open the page by the server's address", 403)
        match request.method, request.path:
            case "GET", "/":
                return Response(page, mimetype="text/html")
            case "GET", "/model":
                return Response(json.dumps(model), mimetype="application/json")
            case "POST", "/read":
                if request.headers.get("Origin") != f"{request.scheme}://{request.host}":
                    return Response("only the server's own page gets answers", 403)
                grey = np.frombuffer(request.get_data(), np.uint8)
                if grey.size != SIDE**2:
                    return Response(f"a drawing has {SIDE}×{SIDE} bytes", 400)
                answer = read(grey.reshape(SIDE, SIDE))
                return Response(json.dumps(answer), mimetype="application/json")
        return Response("not found", 404)

    return app


def _policy(page: str) -> str:
    """The Content-Security-Policy that allows the page's own script and style, nothing else."""
    allowed = ["default-src 'none'", "connect-src 'self'", "img-src data:"]
    for name in ("script", "style"):
        (text,) = re.findall(f"<{name}>(.*?)</{name}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        allowed.append(f"{name}-src 'sha256-{digest}'")
    return "; ".join([*allowed, "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'"])


def _is_own_host(value: str, host: str) -> bool:
    """Whether a Host header holds localhost, an IP address or the name `host`.

    A foreign site can make its own name resolve to this machine, but not an IP address.
    """
    try:
        name = urlsplit(f"//{value}").hostname
        return name in ("localhost", host.lower()) or bool(ipaddress.ip_address(name or ""))
    except ValueError:
        return False


def serve(listening: socket.socket, app: Callable[..., Any]) -> NoReturn:
    """Serves until Ctrl-C, which raises KeyboardInterrupt."""
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)  # requests may wait
    create_server(app, sockets=[listening], max_request_body_size=SIDE**2 + 1).run()
    raise KeyboardInterrupt  # waitress has caught it, and closed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Draw(PlatformFlags):
    """Serves a page to draw digits on, which shows what a saved model reads."""

    folder: RunFolder
    """The run's folder. With --seeds=K: the mean of its networks' probabilities."""

    host: str = "127.0.0.1"
    """Address to listen at. 127.0.0.1: for this machine alone. 0.0.0.0: for all that reach it."""

    port: int = 8000
    """Port to listen at. 0: any that is free."""

    def run(self) -> None:
        """Prints the page's address once the model is compiled, and serves until Ctrl-C."""
        with listen(self.host, self.port) as listening:
            run = load_run(self.folder)
            result = read_result(run.folder)
            accuracy = accuracy_line(result) if result else "not complete"
            text = f"{run.config.model} trained on {run.config.dataset}, {accuracy}"
            model = {"model": text, "classes": class_names(run.config.dataset), "side": SIDE}
            print_warnings(mesh.enable_compilation_cache(run.config.compilation_cache))
            read = reader(run, self.platform)
            print_warnings(run.warnings)
            if not ipaddress.ip_address(listening.getsockname()[0]).is_loopback:
                print_warnings(["every machine that reaches this one can open the page"])
            here, *others = addresses(listening)
            lines = [text, f"draw at {here}  (Ctrl-C to quit)"]
            print(
                *lines, *(f"from other machines at {url}" for url in others), sep="\n", flush=True
            )
            serve(listening, application(read, model, self.host))
