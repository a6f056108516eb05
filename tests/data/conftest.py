import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import small

from mnist_jax.data import sources
from mnist_jax.data.dataset import Split


@pytest.fixture
def originals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of four small files that stand for those of MNIST; no server has them."""
    small.write(tmp_path / "originals")
    monkeypatch.setitem(sources.SOURCES, "mnist", small.source_of(tmp_path / "originals"))
    return tmp_path / "originals"


@pytest.fixture
def truth(originals: Path) -> tuple[Split, Split]:
    return small.write(originals)


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    return tmp_path / "data"


class Handler(SimpleHTTPRequestHandler):
    """Serves a folder, with the faults that a test sets."""

    faults: dict[str, int | str]  # file name → the status of the answer, or "stall"
    requested: list[str]
    released: threading.Event

    def do_GET(self) -> None:
        name = Path(self.path).name
        self.requested.append(name)
        fault = self.faults.get(name)
        if fault == "stall":  # only half of the file arrives
            data = (Path(self.directory) / name).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2])
            self.released.wait(30)
        elif fault:
            self.send_error(fault)
        else:
            super().do_GET()

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server(originals: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Handler]]:
    """Serves `originals` at the URL of the source table; returns what a test can change."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    state = {"faults": {}, "requested": [], "released": threading.Event()}
    handler = type("Faulty", (Handler,), state)
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=originals)) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        source = sources.SOURCES["mnist"]._replace(url=f"http://127.0.0.1:{server.server_port}/")
        monkeypatch.setitem(sources.SOURCES, "mnist", source)
        yield handler
        handler.released.set()
        server.shutdown()
