"""The report as a browser shows it: headless Chromium, where it is installed."""

import os
import shutil

import pytest

from mnist_jax import Config, fit
from mnist_jax.inference import restore as saved
from mnist_jax.reporting import page, report

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (BROWSER and DRIVER), reason="needs chromium and chromedriver on the PATH"
)
FLAGS = (
    *("--headless", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
)


@pytest.fixture(scope="module")
def pages(tmp_path_factory, data_dir):
    """The page of a run, and that of the same one twice."""
    folder = tmp_path_factory.mktemp("pages")
    where = {"data_dir": data_dir, "workdir": folder / "run"}
    fit(Config(model="logistic", dataset="digits", epochs=2, **where))
    runs = saved.load_runs([folder / "run"])
    dataset = saved.dataset_of(runs[0])
    for name, some in (("one", runs), ("two", runs * 2)):
        page.write(folder / f"{name}.html", report.make(some, dataset))
    return folder


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER or ""
    root = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    for flag in (*FLAGS, *root, f"--user-data-dir={tmp_path_factory.mktemp('browser')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


def shown(browser) -> list[str]:
    """Which images are not hidden: whether the light or the dark."""
    return browser.execute_script(
        "return [...document.images].filter(i => i.offsetParent).map(i => i.className)"
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(
    ("name", "title", "figures"), [("one", "logistic", 5), ("two", "2 runs", 2)]
)
def test_a_browser_shows_all_of_it_on_a_phone(name, title, figures, scheme, browser, pages):
    size = {"width": 400, "height": 800, "deviceScaleFactor": 2, "mobile": True}
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "screen", **media})
    browser.get((pages / f"{name}.html").as_uri())
    assert browser.title.startswith(f"{title} on digits")
    images = browser.execute_async_script("""
        const images = [...document.images], done = arguments[0];
        Promise.allSettled(images.map(image => image.decode())).then(() => done(
            images.map(image => [image.naturalWidth, image.getBoundingClientRect().width])));
    """)
    assert len(images) == 2 * figures
    assert all(natural > 300 and width in (0, 368) for natural, width in images)
    assert shown(browser) == [scheme] * figures
    assert browser.execute_script("return document.documentElement.scrollWidth") == 400
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print", **media})
    assert shown(browser) == ["light"] * figures  # paper is white
    assert browser.get_log("browser") == []


@pytest.mark.parametrize("width", [960, 1000, 1280])
def test_no_table_is_cut_on_a_screen(width, browser, pages):
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    for name in ("one", "two"):
        browser.get((pages / f"{name}.html").as_uri())
        cut = """return [...document.querySelectorAll(".wide")]
            .filter(table => table.scrollWidth > table.clientWidth).map(table => table.ariaLabel)"""
        assert browser.execute_script(cut) == []


def test_the_page_forbids_scripts(browser, pages, tmp_path):
    """Whatever came through the escaping would still not run."""
    html = (pages / "two.html").read_text()
    bad = tmp_path / "bad.html"
    bad.write_text(html.replace("<main>", "<main><script>document.title = 'run'</script>"))
    browser.get(bad.as_uri())
    assert browser.title == "2 runs on digits"
    assert "Content Security Policy" in browser.get_log("browser")[0]["message"]
