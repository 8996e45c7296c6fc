"""Photograph the running page for the docs: `python docs/make_page_png.py http://127.0.0.1:8000/ docs/page.png`.

Run it beside `make demo`; it waits until the tiles are live and their score strips are filled.
"""

import argparse
import io
import shutil
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

LIMIT_BYTES = 300_000
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def photograph(url: str, tiles: int, seconds: float, scheme: str) -> bytes:
    """PNG of the page, 1400 x 900, once `tiles` pictures are live and `seconds` have passed."""
    binary = next(filter(None, map(shutil.which, BROWSERS)), None)
    if binary is None:
        raise SystemExit(f"no browser on this machine: install one of {', '.join(BROWSERS)}")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=binary, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1400, "height": 900}, color_scheme=scheme)
        page.goto(url)
        live = "[...document.querySelectorAll('img.live')].filter((image) => image.naturalWidth).length"
        page.wait_for_function(f"() => {live} >= {tiles}", timeout=60_000)
        page.wait_for_timeout(seconds * 1000)
        return page.screenshot()


def shrink(png: bytes) -> bytes:
    """The same picture with as many colours as fit the limit."""
    image = Image.open(io.BytesIO(png)).convert("RGB")
    for colours in (256, 192, 128, 96, 64):
        out = io.BytesIO()
        image.quantize(colours, dither=Image.Dither.NONE).save(out, "PNG", optimize=True)
        if out.tell() <= LIMIT_BYTES:
            return out.getvalue()
    raise SystemExit(f"the picture does not fit {LIMIT_BYTES} bytes")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("out", type=Path)
    parser.add_argument("--tiles", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--scheme", choices=("dark", "light"), default="dark")
    options = parser.parse_args()
    options.out.write_bytes(shrink(photograph(options.url, options.tiles, options.seconds, options.scheme)))


if __name__ == "__main__":
    main()
