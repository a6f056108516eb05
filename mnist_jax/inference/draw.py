"""A page to draw on, and what a saved model makes of it: a server for one's own browser.

The page posts the drawing's grey levels, 448×448 bytes. Whoever can reach the server may draw, but
no other page in the same browser: a question is answered only where the page that asks is the
server's own (`Origin`), and the server goes by a name that nobody else can give it (`Host`). The
page itself may load nothing but what stands in it.
"""

import base64
import errno
import hashlib
import ipaddress
import json
import logging
import os
import re
import socket
from collections.abc import Callable, Collection
from importlib import resources
from typing import Any, NoReturn
from urllib.parse import urlsplit

import numpy as np

from mnist_jax.data import class_names
from mnist_jax.errors import DataError, NonFiniteError, UsageError
from mnist_jax.inference.predict import Predictor
from mnist_jax.inference.preprocess import to_mnist
from mnist_jax.inference.restore import LoadedRun
from mnist_jax.parallel import mesh as devices
from mnist_jax.runs import results as record
from mnist_jax.runs import run_dir as runs

SIDE = 448  # pixels of a drawing


def listen(host: str, port: int) -> socket.socket:
    """A socket that accepts connections at an address of this machine; port 0: at any free port.

    Raises:
        UsageError: the address is not this machine's, or the port is taken or forbidden.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, ValueError) as error:  # some texts are no names at all
        raise UsageError(
            f"host {host!r} has no address ({error}); allowed are this machine's, such as 127.0.0.1"
        ) from error
    family, address = found[0], found[4][0]
    try:
        return socket.create_server((address, port), family=family)
    except OSError as error:
        if error.errno in (errno.EADDRINUSE, errno.EACCES):
            remedy = f"--port, such as {_free_port(family)}, which is free, or 0 for any"
        else:
            remedy = "--host, such as 127.0.0.1"
        raise UsageError(
            f"cannot listen at {host}, port {port} ({os.strerror(error.errno or 0)}); "
            f"choose another {remedy}"
        ) from error


def _free_port(family: int) -> int:
    with socket.create_server(("", 0), family=family) as free:
        return free.getsockname()[1]


def url(listening: socket.socket, name: str = "") -> str:
    """What a browser opens that calls this machine by `name`; by default, one on this machine."""
    address, port = listening.getsockname()[:2]
    if not name and ipaddress.ip_address(address).is_unspecified:  # all of this machine's
        name = "127.0.0.1" if listening.family == socket.AF_INET else "::1"
    name = name or address
    return f"http://{f'[{name}]' if ':' in name else name}:{port}"


def is_private(listening: socket.socket) -> bool:
    """Whether only programs on this machine can connect."""
    return ipaddress.ip_address(listening.getsockname()[0]).is_loopback


def network_name(listening: socket.socket) -> str:
    """What other machines call this one: its address in the local network, or else its name."""
    address = listening.getsockname()[0]
    if not ipaddress.ip_address(address).is_unspecified:
        return address
    # No machine has these addresses, and connecting UDP sends nothing: it chooses the way out.
    nowhere = "192.0.2.1" if listening.family == socket.AF_INET else "2001:db8::1"
    try:
        with socket.socket(listening.family, socket.SOCK_DGRAM) as way_out:
            way_out.connect((nowhere, 9))
            return way_out.getsockname()[0]
    except OSError:  # no way leads there
        return socket.gethostname()


def reader(run: LoadedRun, platform: str | None = None) -> Callable[[np.ndarray], dict[str, Any]]:
    """What the model makes of a drawing, as a function for any thread; compiled once, here.

    Of an ensemble the mean is taken of all members that are finite; `run.notices` tells of others.

    Returns:
        grey levels (height, width) uint8 → the `probabilities` of the classes, the `image` that
        the network gets, 784 numbers, and how many `others` it is not; or a `message` where there
        is nothing to be read.

    Raises:
        DeviceError: the platform is absent.
        NonFiniteError: no network of the run is finite.
    """
    where = platform or run.config.platform, run.config.precision
    with devices.running_on(*where) as device:
        predictor = Predictor(run, device, batch_size=1)
        predictor(np.zeros((1, 28, 28, 1), np.uint8))  # compiles
    run.notices.extend(predictor.notices)

    def read(grey: np.ndarray) -> dict[str, Any]:
        try:
            digit = to_mnist(grey.astype(np.float32))
            with devices.running_on(*where):  # which holds for one thread
                (probabilities,) = predictor(digit.image[None])
        except (DataError, NonFiniteError) as error:
            return {"message": str(error)}
        return {
            "probabilities": probabilities.tolist(),
            "image": digit.image.ravel().tolist(),
            "others": digit.others,
        }

    return read


def about(run: LoadedRun) -> dict[str, Any]:
    """What the page says of the model.

    Raises:
        CheckpointError: the run's result is damaged.
    """
    result = runs.read_result(run.folder)
    known = "not complete" if result is None else record.accuracy_line(result)
    return {
        "model": f"{run.config.model} trained on {run.config.dataset}, {known}",
        "classes": class_names(run.config.dataset),
        "side": SIDE,
    }


def application(
    read: Callable[[np.ndarray], dict[str, Any]], model: dict[str, Any], names: Collection[str]
) -> Callable[..., Any]:
    """The server's WSGI application: the page at /, `model` at /model, `read` behind /read.

    Args:
        read: answers a question.
        model: for JSON.
        names: that the server goes by, beside localhost and addresses.
    """
    from werkzeug import exceptions
    from werkzeug.wrappers import Request, Response

    page = resources.files("mnist_jax").joinpath("draw.html").read_text("utf-8")
    headers = {
        "Content-Security-Policy": _policy(page),
        "Cache-Control": "no-store",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }

    def as_json(value: dict[str, Any]) -> Response:
        return Response(json.dumps(value), mimetype="application/json")

    def respond(request: Request) -> Response:
        if not _is_ours(request.host, names):
            raise exceptions.Forbidden("open the page by the server's address")
        match request.method, request.path:
            case "GET" | "HEAD", "/":
                return Response(page, mimetype="text/html")
            case "GET" | "HEAD", "/model":
                return as_json(model)
            case "POST", "/read":
                if request.headers.get("Origin") != f"{request.scheme}://{request.host}":
                    raise exceptions.Forbidden("only the server's own page is answered")
                grey = request.get_data()
                if len(grey) != SIDE**2:
                    raise exceptions.BadRequest(f"a drawing has {SIDE}×{SIDE} bytes")
                return as_json(read(np.frombuffer(grey, np.uint8).reshape(SIDE, SIDE)))
            case _, "/" | "/model" | "/read":
                raise exceptions.MethodNotAllowed(["POST"] if request.path == "/read" else ["GET"])
            case _:
                raise exceptions.NotFound

    @Request.application
    def answer(request: Request) -> Response:
        try:
            response = respond(request)
        except exceptions.HTTPException as error:
            response = Response.force_type(error.get_response())
        response.headers.extend(headers)
        return response

    return answer


def _policy(page: str) -> str:
    """The Content-Security-Policy under which the page's own style and script run, nothing else."""
    allowed = ["default-src 'none'", "connect-src 'self'", "img-src data:"]
    for name in ("script", "style"):
        (text,) = re.findall(f"<{name}>(.*?)</{name}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        allowed.append(f"{name}-src 'sha256-{digest}'")
    return "; ".join([*allowed, "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'"])


def _is_ours(host: str, names: Collection[str]) -> bool:
    """Whether a request's Host is one that only this machine answers to.

    A name can be made to lead here by whoever owns it, and then that page would be of one origin
    with ours; an address cannot.
    """
    try:
        name = urlsplit(f"//{host}").hostname or ""
        own = ("localhost", *(name.lower() for name in names))
        return name in own or bool(ipaddress.ip_address(name))
    except ValueError:
        return False


def serve(listening: socket.socket, app: Callable[..., Any]) -> NoReturn:
    """Answers until Ctrl-C.

    Raises:
        KeyboardInterrupt: at Ctrl-C, which is how it ends.
    """
    from waitress.server import create_server

    # A second question while the first is answered waits, which is no cause for a warning.
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)
    too_long = SIDE**2 + 1  # bytes; nothing longer than a drawing is read
    create_server(app, sockets=[listening], max_request_body_size=too_long).run()
    raise KeyboardInterrupt  # waitress has heard it, and closed
