import contextlib
import socket
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import small

from mnist_jax.data import sources
from mnist_jax.data.split import Split


@pytest.fixture
def originals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of four small files that the source table takes for MNIST's, served nowhere."""
    folder = tmp_path / "originals"
    small.write(folder)
    monkeypatch.setitem(sources.SOURCES, "mnist", small.source_of(folder))
    return folder


@pytest.fixture
def truth(originals: Path) -> tuple[Split, Split]:
    """What the files of `originals` hold."""
    return small.write(originals)


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Makes every connection and every name look-up fail; lists what was tried."""
    tried: list[object] = []

    def refuse(*args: object, **kwargs: object) -> None:
        tried.append(args)
        raise OSError("the network is unreachable")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return tried


@contextlib.contextmanager
def _serving(handler: type[SimpleHTTPRequestHandler], folder: Path) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()


class Handler(SimpleHTTPRequestHandler):
    """Serves a folder. What goes wrong, if anything, is set by the test."""

    status: dict[str, int] = {}  # noqa: RUF012  file name → the status to answer with
    stalls: set[str] = set()  # noqa: RUF012  files of which only half arrives
    released = threading.Event()

    def do_GET(self) -> None:
        name = Path(self.path).name
        if name in self.status:
            self.send_error(self.status[name])
        elif name in self.stalls:
            data = (Path(self.directory) / name).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            self.released.wait(30)
        else:
            super().do_GET()

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server(originals: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Handler]]:
    """Serves `originals` at the address the source table names; returns what to spoil."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    class Spoilable(Handler):
        status: dict[str, int] = {}  # noqa: RUF012
        stalls: set[str] = set()  # noqa: RUF012
        released = threading.Event()

    with _serving(Spoilable, originals) as url:
        source = sources.SOURCES["mnist"]._replace(url=url)
        monkeypatch.setitem(sources.SOURCES, "mnist", source)
        yield Spoilable
        Spoilable.released.set()
