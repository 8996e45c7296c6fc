"""The page in a real browser, on the real service with a simulated camera."""

import re
import shutil
import urllib.request
from collections.abc import Iterator
from json import dumps
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

from pipelines.simulator import SimulatorProcess, start_simulator

WEB = Path(__file__).parents[2] / "services" / "web"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
FLAGS += ["--disable-background-networking", "--disable-component-update"]
PICTURE = """(image) => {
  if (!image.naturalWidth) return null;
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = 32;
  const context = canvas.getContext("2d");
  context.drawImage(image, 0, 0, 32, 32);
  return context.getImageData(0, 0, 32, 32).data.join();
}"""  # what the tile shows now, as text


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    binary = next(filter(None, map(shutil.which, BROWSERS)), None)
    if binary is None:
        pytest.skip(f"no browser on this machine: install one of {', '.join(BROWSERS)}")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=binary, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def camera() -> Iterator[SimulatorProcess]:
    with start_simulator({"yard": "scene:7"}, username="viewer", password="pass word@1") as simulator:
        yield simulator


class Visit:
    """A page that remembers what went wrong on it and whom it asked."""

    def __init__(self, page: Page, url: str):
        self.page = page
        self.errors: list[str] = []
        self.hosts: set[str] = set()
        page.on("console", lambda message: self.errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("request", lambda request: self.hosts.add(urlsplit(request.url).netloc))
        page.on("websocket", lambda socket: self.hosts.add(urlsplit(socket.url).netloc))
        page.goto(url)
        expect(page.locator("#health")).to_have_text("healthy", timeout=20_000)

    def tile(self, stream: str) -> Locator:
        return self.page.locator(f'[data-stream="{stream}"]')


@pytest.fixture
def visit(browser: Browser, service, tmp_path: Path) -> Iterator[Visit]:
    page = browser.new_page(viewport={"width": 1400, "height": 900})
    visit = Visit(page, f"{service.url}/")
    yield visit
    page.screenshot(path=tmp_path / "page.png")
    page.close()


def address_of(camera: SimulatorProcess) -> str:
    """The camera's address without user and password."""
    return "rtsp://" + camera.urls[0].removeprefix("rtsp://").rpartition("@")[2]


def ask(url: str, method: str, body: object = None) -> None:
    request = urllib.request.Request(
        url, dumps(body).encode() if body else None, {"Content-Type": "application/json"}, method=method
    )
    urllib.request.urlopen(request, timeout=10).close()


def test_a_stream_comes_alive_and_goes(visit: Visit, service, camera: SimulatorProcess, tmp_path: Path):
    page, stream = visit.page, "page-yard"
    page.get_by_role("button", name="Add a stream").first.click()
    host_and_path = address_of(camera).removeprefix("rtsp://")
    page.get_by_label("Address").fill(f"rtsp://viewer:pass%20word@1@{host_and_path}")
    page.get_by_label("Stream id").fill(stream)
    assert page.get_by_label("Address").input_value() == address_of(camera), "the password must leave the address"
    assert page.get_by_label("Password").get_attribute("type") == "password"

    page.get_by_role("button", name="Probe").click()
    expect(page.locator("#verdict-title")).to_have_text("The camera works", timeout=20_000)
    assert page.locator("#stages li").count() >= 3
    expect(page.locator("#stages li:not(.good)")).to_have_count(0)
    assert page.locator("#snapshot-image").evaluate("(image) => image.decode().then(() => image.naturalWidth)") > 0
    page.screenshot(path=tmp_path / "probe.png")

    page.get_by_role("button", name="Add", exact=True).click()
    tile = visit.tile(stream)
    expect(tile.locator(".badge")).to_have_text("running", timeout=20_000)
    live = tile.locator("img.live")
    expect(live).to_be_visible(timeout=10_000)
    first = live.evaluate(PICTURE)
    # each picture is an element of its own, decoded before it takes its place
    newest = f"({PICTURE})(document.querySelector('[data-stream=\"{stream}\"] img.live'))"
    page.wait_for_function(f"(first) => {newest} !== first", arg=first)
    expect(tile.locator(".label")).not_to_have_text("–", timeout=10_000)
    expect(tile.locator('[data-figure="latency"]')).to_contain_text("ms", timeout=10_000)
    tile.get_by_text("Recognised", exact=True).hover()
    tip = tile.locator('[data-figure="models-tip"]')
    expect(tip).to_be_visible()
    expect(tip).to_have_text(re.compile(r"^motion9: a result for every frame, [\d.,]+ ms each$"))

    row = page.locator(".event:not(.state)", has_text=stream).first
    expect(row).to_be_visible(timeout=30_000)
    row.click()
    expect(tile).to_have_class(re.compile("marked"))
    page.screenshot(path=tmp_path / "live.png")

    tile.get_by_role("button", name=f"Pause {stream}").click()
    expect(tile.locator(".badge")).to_have_text("paused", timeout=10_000)
    tile.get_by_role("button", name=f"Resume {stream}").click()
    expect(tile.locator(".badge")).to_have_text("running", timeout=20_000)

    tile.get_by_role("button", name=f"Stop {stream}").click()
    page.get_by_role("button", name="Stop", exact=True).click()
    expect(tile.locator(".badge")).to_have_text("stopped", timeout=10_000)
    tile.get_by_role("button", name=f"Remove {stream}").click()
    page.get_by_role("button", name="Remove", exact=True).click()
    expect(tile).to_have_count(0, timeout=10_000)

    assert visit.errors == []
    assert visit.hosts <= {urlsplit(service.url).netloc, ""}, "a page that calls no one else"


def test_a_failed_probe_says_where_and_what_helps(visit: Visit, camera: SimulatorProcess):
    page = visit.page
    page.get_by_role("button", name="Add a stream").first.click()
    page.get_by_label("Address").fill(address_of(camera))
    page.get_by_label("User").fill("viewer")
    page.get_by_label("Password").fill("wrong-canary")
    page.get_by_role("button", name="Probe").click()
    failed = page.locator("#stages li.bad")
    expect(failed).to_have_count(1, timeout=20_000)
    expect(failed.locator(".hint")).not_to_be_empty()
    assert "canary" not in page.locator("#verdict").inner_text()
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Add a stream").first.click()
    assert page.get_by_label("Password").input_value() == "", "a closed dialog forgets the password"
    assert visit.errors == []


def test_names_are_text_never_markup(visit: Visit, service):
    name = "<img src=x onerror=document.title='owned'>"
    spec = {"id": "page-markup", "name": name, "enabled": False, "source": {"uri": "rtsp://127.0.0.1:9/none"}}
    ask(f"{service.url}/v1/streams?probe=false", "POST", spec)
    try:
        tile = visit.tile("page-markup")
        expect(tile.locator(".name")).to_have_text(name, timeout=10_000)
        expect(tile.locator(".badge")).to_have_text("stopped")
        assert visit.page.title() == "TSM Live"
        assert visit.errors == []
    finally:
        ask(f"{service.url}/v1/streams/page-markup", "DELETE")


@pytest.mark.parametrize("width", [400, 800, 1400])
def test_nothing_is_cut_off(visit: Visit, width: int):
    visit.page.set_viewport_size({"width": width, "height": 800})
    assert visit.page.evaluate("document.documentElement.scrollWidth") <= width
    add = visit.page.get_by_role("button", name="Add a stream").first
    box = add.bounding_box()
    assert box is not None
    assert box["x"] + box["width"] <= width


def test_the_page_refers_to_itself_alone():
    html, style = (WEB / "index.html").read_text(), (WEB / "style.css").read_text()
    script = "\n".join(file.read_text() for file in sorted(WEB.glob("*.js")))
    addresses = re.findall(r'(?:src|href)="([^"]*)"', html) + re.findall(r"url\(([^)]*)\)", style)
    assert [one for one in addresses if not re.match(r"static/|data:|#|openapi\.json|metrics", one)] == []
    assert re.findall(r'["\'`](?:https?:)?//(?!www\.w3\.org)[^"\'`]*|["\'`]/v1', script) == []
    assert re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b", script) == []
    assert re.findall(r"<script(?![^>]*src=)|\son\w+=|style=", html) == []
