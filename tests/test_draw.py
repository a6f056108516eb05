"""`python -m mnist_jax draw`: the page in a browser, and the server behind it."""

import http.client
import ipaddress
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from werkzeug.test import Client

from mnist_jax import Config, __main__, fit
from mnist_jax.errors import NonFiniteError
from mnist_jax.inference import draw
from mnist_jax.inference import preprocess as images
from mnist_jax.inference import restore as saved

ROOT = Path(__file__).resolve().parents[1]
SIDE = draw.SIDE


@pytest.fixture(scope="module")
def folders(data_dir, tmp_path_factory):
    """A run of one seed, and one of three."""
    folder = tmp_path_factory.mktemp("runs")
    for name, seeds in {"one": None, "three": 3}.items():
        where = {"data_dir": data_dir, "workdir": folder / name}
        fit(Config(model="logistic", dataset="digits", epochs=20, seeds=seeds, **where))
    return folder


@pytest.fixture(scope="module")
def address(folders):
    """Where a server listens, in a process of its own that Ctrl-C ends without a traceback."""
    process = subprocess.Popen(
        [sys.executable, "-m", "mnist_jax", "draw", f"--workdir={folders / 'one'}", "--port=0"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    shown = [process.stdout.readline() for _ in range(2)]
    found = re.search(r"draw at http://(127\.0\.0\.1:\d+) ", shown[1])
    assert found, process.communicate()
    assert shown[0].startswith("logistic trained on digits, test accuracy: ")
    yield found[1]
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "interrupted\n")


def ask(address: str, method: str, path: str, body: bytes | None = None, **headers: str):
    """Status, headers and body of the answer."""
    connection = http.client.HTTPConnection(address, timeout=60)
    try:
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()
    finally:
        connection.close()


def a_stroke() -> np.ndarray:
    """A 1 as a person draws it."""
    grey = np.zeros((SIDE, SIDE), np.uint8)
    grey[SIDE // 5 : -SIDE // 5, SIDE // 2 - 16 : SIDE // 2 + 16] = 255
    return grey


def test_the_page_may_load_nothing_but_what_stands_in_it(address):
    status, headers, body = ask(address, "GET", "/")
    assert (status, headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    policy = headers["Content-Security-Policy"].split("; ")
    assert {"default-src 'none'", "connect-src 'self'", "frame-ancestors 'none'"} <= set(policy)
    assert not re.search(rb"(src|href)=.?(https?:)?/", body)
    assert ask(address, "HEAD", "/")[::2] == (200, b"")


def test_a_drawing_is_answered_with_what_the_model_makes_of_it(address, folders):
    headers = {"Origin": f"http://{address}"}
    status, _, body = ask(address, "POST", "/read", a_stroke().tobytes(), **headers)
    found = json.loads(body)
    digit = images.to_mnist(a_stroke().astype(np.float32))
    assert (status, found["others"]) == (200, 0)
    assert found["image"] == digit.image.ravel().tolist()
    expected = saved.Classifier(saved.load_run(folders / "one"), draw.devices.select_device("cpu"))
    np.testing.assert_allclose(found["probabilities"], expected(digit.image[None])[0, 0], rtol=1e-4)
    blank = bytes(SIDE**2)
    status, _, body = ask(address, "POST", "/read", blank, **headers)
    assert (status, list(json.loads(body))) == (200, ["message"])


@pytest.mark.parametrize(
    ("method", "path", "headers", "size", "status"),
    [
        ("GET", "/nowhere", {}, None, 404),
        ("GET", "/../draw.html", {}, None, 404),
        ("GET", "/read", {}, None, 405),
        ("POST", "/", {}, 0, 405),
        ("GET", "/", {"Host": "evil.example"}, None, 403),
        ("GET", "/", {"Host": "[::1"}, None, 403),
        ("GET", "/", {"Host": ""}, None, 403),
        ("GET", "/model", {"Host": "evil.example:8000"}, None, 403),
        ("POST", "/read", {"Host": "evil.example", "Origin": "http://evil.example"}, SIDE**2, 403),
        ("POST", "/read", {"Origin": "http://evil.example"}, SIDE**2, 403),
        ("POST", "/read", {"Origin": "https://{own}"}, SIDE**2, 403),
        ("POST", "/read", {"Origin": "http://127.0.0.1:1"}, SIDE**2, 403),
        ("POST", "/read", {"Origin": "null"}, SIDE**2, 403),
        ("POST", "/read", {}, SIDE**2, 403),
        ("POST", "/read", {"Origin": "http://{own}"}, 0, 400),
        ("POST", "/read", {"Origin": "http://{own}"}, SIDE**2 - 1, 400),
        ("POST", "/read", {"Origin": "http://{own}"}, SIDE**2 + 1, 413),
        ("POST", "/read", {"Origin": "http://{own}"}, SIDE**2, 200),
        ("GET", "/", {"Host": "localhost"}, None, 200),
        ("GET", "/", {"Host": "[::1]:80"}, None, 200),
    ],
)
def test_others_are_turned_away(address, method, path, headers, size, status):
    body = None if size is None else a_stroke().tobytes()[:size].ljust(size, b"x")
    headers = {name: value.format(own=address) for name, value in headers.items()}
    assert ask(address, method, path, body, **headers)[0] == status


def test_a_body_without_end_is_not_read(address):
    """Nothing of it is sent, but how long it is; the answer comes all the same."""
    for header in (f"Content-Length: {10**15}", "Transfer-Encoding: chunked"):
        name, _, port = address.partition(":")
        with socket.create_connection((name, int(port)), timeout=60) as connection:
            start = f"POST /read HTTP/1.1\r\nHost: {address}\r\n{header}\r\n\r\n"
            connection.sendall(start.encode() + b"fffff\r\n" + bytes(0xFFFFF))
            assert connection.recv(100).startswith(b"HTTP/1.1 413 ")


def test_a_model_is_compiled_once_and_its_members_are_asked_together(folders, monkeypatch):
    run = saved.load_run(folders / "three")
    traced, apply = [], type(run.model).apply

    def seen(*args, **options):
        traced.append(jax.config.jax_default_matmul_precision)
        return apply(*args, **options)

    monkeypatch.setattr(type(run.model), "apply", seen)
    read, found = draw.reader(run, "cpu"), []
    threads = [threading.Thread(target=lambda: found.append(read(a_stroke()))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert traced == ["highest"]
    digit = images.to_mnist(a_stroke().astype(np.float32)).image[None]
    members = saved.Classifier(run, draw.devices.select_device("cpu"))(digit)[:, 0]
    for answer in found:
        np.testing.assert_allclose(answer["probabilities"], members.mean(0), rtol=1e-4)


def test_members_that_are_not_finite_are_not_asked(folders):
    run = saved.load_run(folders / "three")
    bias = run.progress.state.params["logits"]["bias"] = np.array(
        run.progress.state.params["logits"]["bias"]
    )
    bias[1] = np.nan
    assert sum(draw.reader(run, "cpu")(a_stroke())["probabilities"]) == pytest.approx(1)
    assert run.notices == [f"seed 1235 of {run.folder} is not finite; it is left out"]
    bias[:] = np.nan
    with pytest.raises(NonFiniteError, match="no member is left"):
        draw.reader(run, "cpu")


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["--port=70000"], 2, "port is 70000; allowed is 0 to 65535"),
        (["--port=-1"], 2, "port is -1"),
        (["--port=http"], 2, "--port is 'http'; allowed is a whole number"),
        (["--host=no such host"], 2, "host 'no such host' has no address"),
        (["--host=" + "x" * 300], 2, "has no address"),
        (["--host=a\0b"], 2, "has no address"),
        (["--host=192.0.2.1", "--port=0"], 2, "choose another --host, such as 127.0.0.1"),
        (["--platform=gup"], 2, "did you mean gpu"),
        (["--workdir=nowhere", "--port=0"], 2, "nowhere holds no run"),
    ],
)
def test_a_mistake_is_answered_in_one_line(folders, capsys, words, status, message):
    assert __main__.main(["draw", f"--workdir={folders / 'one'}", *words]) == status
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_where_a_port_is_in_use_a_free_one_is_named(folders, capsys):
    with draw.listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        assert __main__.main(["draw", f"--workdir={folders / 'one'}", f"--port={port}"]) == 2
    err = capsys.readouterr().err
    found = re.search(rf"port {port} \(Address already in use\); .* such as (\d+), which", err)
    assert found
    draw.listen("127.0.0.1", int(found[1])).close()


@pytest.fixture
def shown(folders, capsys, monkeypatch):
    """What `draw` says for a --host, and what its server answers by a name and at a port."""

    def show(host: str):
        served = []

        def serve(listening, app):
            served.append((listening.getsockname()[1], app))
            raise KeyboardInterrupt

        monkeypatch.setattr(draw, "serve", serve)
        monkeypatch.setattr(draw, "reader", lambda *_: None)
        words = [f"--workdir={folders / 'one'}", f"--host={host}", "--port=0"]
        assert __main__.main(["draw", *words]) == 130
        [(port, app)] = served
        said = capsys.readouterr()
        open_to_all = "every machine that reaches this one can open the page" in said.err
        assert open_to_all == (host in ("0.0.0.0", "::"))

        def status(name: str) -> int:
            return Client(app).get("/model", base_url=f"http://{name}:{port}").status_code

        return re.findall(
            rf"(?:draw|from other machines) at http://(\S+):{port}\b", said.out
        ), status

    return show


@pytest.mark.parametrize(("host", "local"), [("0.0.0.0", "127.0.0.1"), ("::", "[::1]")])
def test_a_server_for_other_machines_names_the_address_they_open(shown, host, local):
    (here, there), status = shown(host)
    assert here == local
    if there == socket.gethostname():
        pytest.skip("this machine is in no network")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    socket.create_server((there.strip("[]"), 0), family=family).close()  # it is this machine's
    assert not ipaddress.ip_address(there.strip("[]")).is_loopback
    assert status(there) == 200


def test_outside_of_networks_a_machine_goes_by_its_name(shown, monkeypatch):
    def fails(*_):
        raise OSError("Network is unreachable")

    monkeypatch.setattr(socket.socket, "connect", fails)
    monkeypatch.setattr(socket, "gethostname", lambda: "Study")
    (here, there), status = shown("0.0.0.0")
    assert (here, there) == ("127.0.0.1", "Study")
    assert [status(name) for name in ("Study", "study", "study.example")] == [200, 200, 403]


def test_a_server_for_this_machine_names_no_other_address(shown, monkeypatch):
    monkeypatch.setattr(socket, "gethostname", lambda: "study")
    found, status = shown("127.0.0.1")
    assert found == ["127.0.0.1"]
    assert status("study") == 403


# In a browser


@pytest.fixture
def browser(tmp_path):
    if not (chromium := shutil.which("chromium") or shutil.which("google-chrome")):
        pytest.skip("needs Chromium and its chromedriver")
    if not (driver := shutil.which("chromedriver")):
        pytest.skip("needs chromedriver, Chromium's own")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    quiet = ("background-networking", "component-update", "sync", "gpu", "quic")
    root = ["--no-sandbox"] if os.name == "posix" and os.geteuid() == 0 else []
    flags = ["--headless", "--no-first-run", *(f"--disable-{name}" for name in quiet), *root]
    for flag in (*flags, f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    found = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield found
    found.quit()


class Page:
    """What a person does on the page, and sees there."""

    def __init__(self, browser, address: str):
        from selenium.webdriver.support.wait import WebDriverWait

        self.browser, self.address = browser, address
        self.wait = WebDriverWait(browser, 60, 0.05)

    def open(self, width: int, *, dark: bool = False) -> None:
        theme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": theme})
        size = {"width": width, "height": 600, "deviceScaleFactor": 1, "mobile": width < 500}
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.browser.get(f"http://{self.address}/")
        self.wait.until(lambda _: self.said() == "Nothing drawn yet.")
        self.wait.until(lambda _: len(self("#bars tr")) == 10)

    def __call__(self, css: str) -> list:
        return self.browser.find_elements("css selector", css)

    def said(self) -> str:
        return self("#said")[0].text

    def draw(self, *points: tuple[float, float], kind: str = "mouse") -> None:
        """A stroke through these points of the paper, from its upper left (0, 0) to (1, 1)."""
        from selenium.webdriver.common.actions.action_builder import ActionBuilder
        from selenium.webdriver.common.actions.pointer_input import PointerInput

        paper = self("#drawing")[0]
        places = [[round((part - 0.5) * paper.size["width"]) for part in at] for at in points]
        actions = ActionBuilder(self.browser, mouse=PointerInput(kind, kind), duration=20)
        pointer = actions.pointer_action
        pointer.move_to(paper, *places[0]).pointer_down()
        for place in places[1:]:
            pointer.move_to(paper, *place)
        pointer.pointer_up()
        actions.perform()

    def keys(self, *keys: str) -> None:
        for key in keys:
            self.browser.switch_to.active_element.send_keys(key)

    def answered(self) -> list[float]:
        """Waits for an answer; the shares of the classes in percent, as they are shown."""
        self.wait.until(lambda _: self.said().startswith("Read as "))
        self.wait.until(lambda _: self("#answer")[0].get_attribute("aria-busy") == "false")
        return [float(cell.text.removesuffix(" %")) for cell in self("#bars .share")]

    def seen(self) -> int:
        """How many of the 28×28 pixels that the network gets are not black."""
        script = """
const copy = new OffscreenCanvas(28, 28).getContext("2d", {willReadFrequently: true});
copy.drawImage(document.getElementById("seen"), 0, 0);
const data = copy.getImageData(0, 0, 28, 28).data;
return data.filter((value, i) => i % 4 === 0 && value).length"""
        return self.browser.execute_script(script)

    def brightness(self, file: Path) -> float:
        """The mean of a screenshot, which is kept, from 0 to 255."""
        assert self.browser.save_screenshot(str(file))
        with Image.open(file) as shot:
            return float(np.mean(shot.convert("L")))


def test_a_digit_is_drawn_and_read(browser, address, tmp_path):
    """With a mouse, a finger and keys, in light and dark, on a screen and on a phone."""
    from selenium.webdriver.common.keys import Keys

    page = Page(browser, address)
    page.open(1000)
    assert page.seen() == 0
    assert page("#drawing")[0].accessible_name == "Paper to draw on"
    page.draw((0.5, 0.2), (0.5, 0.8))
    shares = page.answered()
    assert sum(shares) == pytest.approx(100, abs=0.5)
    best = shares.index(max(shares))
    assert page("#best")[0].text == page("#bars .best th")[0].text == str(best)
    assert page.said() == f"Read as {best}, {shares[best]:.1f} %."
    assert 20 < page.seen() < 200
    widths = [bar.size["width"] for bar in page("#bars .bar")]
    assert widths.index(max(widths)) == best
    assert page.brightness(tmp_path / "light.png") > 200

    page("#clear")[0].click()
    assert page.said() == "Nothing drawn yet."
    assert (page.seen(), page("#best")[0].text) == (0, "")

    browser.execute_script("isEmpty = false; ask()")  # as of ink too faint to be any
    page.wait.until(lambda _: page.said().startswith("no digit found"))

    page.open(400, dark=True)
    page.draw((0.5, 0.8), (0.5, 0.5), (0.5, 0.2), kind="touch")
    assert sum(page.answered()) == pytest.approx(100, abs=0.5)
    end = "return ink.getImageData(side / 2, side / 5, 1, 1).data[3]"
    assert browser.execute_script(end) == 255  # the finger drew, and did not scroll
    assert browser.execute_script("return document.documentElement.scrollWidth") == 400
    assert page("#answer")[0].location["y"] > page("#clear")[0].location["y"]
    assert page.brightness(tmp_path / "dark.png") < 70

    page.open(1000)
    page.keys(Keys.TAB)
    assert browser.switch_to.active_element == page("#drawing")[0]
    page.keys(*[Keys.ARROW_UP] * 8, Keys.SPACE, *[Keys.ARROW_DOWN] * 16, Keys.SPACE)
    assert page.answered()[1] == pytest.approx(shares[1], abs=25)  # nearly the stroke of the mouse
    page.keys(Keys.DELETE)
    assert page.said() == "Nothing drawn yet."

    assert browser.get_log("browser") == []
