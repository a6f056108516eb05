"""`draw`: the server; its page, and that of `report`, in a browser."""

import contextlib
import http.client
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from shared import ROOT

from mnist_jax import predict
from mnist_jax.inference import draw
from mnist_jax.inference.preprocess import to_mnist
from mnist_jax.inference.restore import Predictor, load_run

SIDE = draw.SIDE
STROKE = np.zeros((SIDE, SIDE), np.uint8)  # a 1
STROKE[SIDE // 5 : -SIDE // 5, SIDE // 2 - 16 : SIDE // 2 + 16] = 255


@pytest.fixture(scope="module")
def address(runs):
    command = [sys.executable, "-m", "mnist_jax", "draw", str(runs / "one"), "--port=0"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=ROOT, **pipes)
    shown = [process.stdout.readline() for _ in range(2)]
    found = re.match(r"draw at http://(127\.0\.0\.1:\d+) ", shown[1])
    assert found, process.communicate()
    assert shown[0].startswith("logistic trained on digits, test accuracy: ")
    yield found[1]
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")


def ask(address: str, method: str, path: str, body: bytes | None = None, **headers: str):
    with contextlib.closing(http.client.HTTPConnection(address, timeout=60)) as connection:
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()


def test_a_drawing_gets_the_model_s_answer(address, runs):
    status, _, body = ask(address, "POST", "/read", STROKE.tobytes())
    found, image = json.loads(body), to_mnist(STROKE).image
    assert (status, found["warning"], found["image"]) == (200, "", image.ravel().tolist())
    expected = predict(runs / "one", image[None])[0]
    np.testing.assert_allclose(found["probabilities"], expected, rtol=1e-4)
    status, _, body = ask(address, "POST", "/read", bytes(SIDE**2))
    assert (status, list(json.loads(body))) == (200, ["message"])
    older = load_run(runs / "one")._replace(step=30)  # its last checkpoint is lost
    assert draw.title(older) == "logistic trained on digits, 30 steps done"


def test_other_requests_get_a_status(address):
    status, _, page = ask(address, "GET", "/")  # which loads nothing else
    assert status == 200 and not re.search(rb"(src|href)=.?(https?:)?/", page)
    through_a_proxy = {"Host": "codespace.example", "Origin": "https://codespace.example"}
    assert ask(address, "GET", "/read", **through_a_proxy)[0] == 404
    for more, status in ((-1, 400), (1, 413), (0, 200)):
        found = ask(address, "POST", "/read", bytes(SIDE**2 + more), **through_a_proxy)
        assert found[0] == status


def test_threads_get_the_mean_of_the_members(runs):
    predictor = Predictor(load_run(runs / "many"), "cpu")
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(draw.read_drawing, [predictor] * 3, [STROKE] * 3))
    expected = predict(runs / "many", to_mnist(STROKE).image[None])[0]
    for answer in found:
        np.testing.assert_allclose(answer["probabilities"], expected, rtol=1e-4)


def test_an_impossible_address_gets_one_line(runs, command):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for words, message in (
            (["--port=70000"], "port is 70000; allowed is 0 to 65535"),
            (["--host="], "host is empty; name an address"),
            (["--host=no such host"], "cannot listen on 'no such host'"),
            (["--host=192.0.2.1", "--port=0"], "choose another --host or --port"),
            ([f"--port={taken.getsockname()[1]}"], "Address already in use"),
        ):
            status, _, err = command("draw", runs / "one", *words)
            assert (status, err.count("\n"), message in err) == (2, 1, True), err


@pytest.fixture
def browser(tmp_path):
    """Chromium; at the end it must have logged nothing."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("needs Chromium and its chromedriver")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in ("--headless", "--no-sandbox", f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with webdriver.Chrome(options, webdriver.ChromeService(driver)) as found:
        yield found
        assert found.get_log("browser") == []


def set_width(browser, width: int) -> None:
    size = {"width": width, "height": 600, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


@pytest.mark.campaign
def test_a_digit_is_drawn_and_read(browser, address):
    from selenium.webdriver.common.actions.action_builder import ActionBuilder
    from selenium.webdriver.common.actions.pointer_input import PointerInput
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.wait import WebDriverWait

    def find(css):
        return browser.find_elements("css selector", css)

    def text(css):
        return find(css)[0].text

    def wait(condition):
        WebDriverWait(browser, 60, 0.05).until(lambda _: condition())

    def open_page(width):
        set_width(browser, width)
        browser.get(f"http://{address}/")
        wait(lambda: len(find("#bars tr")) == 10)
        assert text("#message") == "Nothing drawn yet."

    def draw_line(kind):
        paper = find("#drawing")[0]
        end = round(0.3 * paper.size["height"])
        actions = ActionBuilder(browser, mouse=PointerInput(kind, kind), duration=20)
        actions.pointer_action.move_to(paper, 0, -end).pointer_down()
        actions.pointer_action.move_to(paper, 0, 0).move_to(paper, 0, end).pointer_up()
        actions.perform()

    def answer():
        wait(lambda: text("#message").startswith("Read as "))
        wait(lambda: find("#answer")[0].get_attribute("aria-busy") == "false")
        return [float(cell.text.removesuffix(" %")) for cell in find("#bars .share")]

    open_page(1000)
    draw_line("mouse")
    by_mouse = answer()
    best = by_mouse.index(max(by_mouse))
    assert sum(by_mouse) == pytest.approx(100, abs=0.5)
    assert text("#best") == text("#bars .best th") == str(best)
    assert text("#message") == f"Read as {best}, {by_mouse[best]:.1f} %."
    shares = [100 * float(bar.get_attribute("value")) for bar in find("#bars progress")]
    assert shares == pytest.approx(by_mouse, abs=0.1)
    find("#clear")[0].click()
    assert (text("#message"), text("#best")) == ("Nothing drawn yet.", "")
    browser.execute_script("isEmpty = false; ask()")  # as with ink too faint to be found
    wait(lambda: text("#message").startswith("no digit found"))
    open_page(400)
    draw_line("touch")
    assert answer() == pytest.approx(by_mouse, abs=5)  # the finger drew, and did not scroll
    page = "document.documentElement"  # on a phone all of it is in sight
    assert browser.execute_script(f"return [{page}.scrollWidth, {page}.scrollHeight]") == [400, 600]
    open_page(1000)
    browser.switch_to.active_element.send_keys(Keys.TAB)
    paper = browser.switch_to.active_element
    assert paper == find("#drawing")[0]
    for key in (*[Keys.ARROW_UP] * 8, Keys.SPACE, *[Keys.ARROW_DOWN] * 16, Keys.SPACE):
        paper.send_keys(key)
    assert answer()[1] == pytest.approx(by_mouse[1], abs=25)  # nearly the mouse's stroke
    paper.send_keys(Keys.DELETE)
    assert text("#message") == "Nothing drawn yet."


@pytest.mark.campaign
@pytest.mark.parametrize(("more", "images"), [([], 4), (["many"], 2)])
def test_a_report_is_shown_whole(browser, runs, more, images, command, tmp_path):
    folders = [runs / name for name in ("one", *more)]
    page = tmp_path / "page.html"
    assert command("report", *folders, f"--output={page}")[0] == 0
    run = browser.execute_script
    for width, scheme, paper in ((400, "dark", "15, 18, 22"), (1000, "light", "255, 255, 255")):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        set_width(browser, width)
        browser.get(page.as_uri())
        assert run("return getComputedStyle(document.body).backgroundColor") == f"rgb({paper})"
        assert run("return document.documentElement.scrollWidth") <= width
        widths = run("return [...document.images].map(i => i.naturalWidth)")
        assert len(widths) == images and min(widths) > 300
    cut = """return [...document.querySelectorAll(".wide")]
        .filter(table => table.scrollWidth > table.clientWidth).map(table => table.ariaLabel)"""
    assert run(cut) == []
