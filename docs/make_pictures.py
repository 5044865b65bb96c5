"""Make the pictures of the documentation from a finished run of the demo.

    python docs/make_pictures.py runs/demo

Needs Playwright and a Chromium for the pictures of the report; without them only the picture of
the demo is made.
"""

from __future__ import annotations

import argparse
import io
import shutil
from pathlib import Path
from typing import Any

from PIL import Image

from lpcam.data.drawing import CELL, GAP, TITLE

MOST_BYTES = 250_000
ROWS = (1, 2, 3, 7)
"""Rows of the run's sheet that make the picture of the demo."""
SECTIONS = {"report-viewer": "#viewer", "report-prototypes": "#prototype-viewer"}
CLASS = "petalmane"
"""Whose prototypes are shown."""
CORRECTED, BRICKS = "spirehorn", (15, 143, 73, 4)
"""The class whose prototypes are corrected, and some that show bricks."""
MOST_HEIGHT = 1140
CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "chrome")


def demo_picture(sheet: Image.Image) -> Image.Image:
    """The column titles and the chosen rows of a run's sheet, at 0.8 of its size."""
    heights = [(0, TITLE), *((TITLE + row * (CELL + GAP), CELL + GAP) for row in ROWS)]
    picture = Image.new("RGB", (sheet.width, sum(height for _, height in heights)), "white")
    at = 0
    for top, height in heights:
        picture.paste(sheet.crop((0, top, sheet.width, top + height)), (0, at))
        at += height
    size = round(picture.width * 0.8), round(picture.height * 0.8)
    return picture.resize(size, Image.Resampling.LANCZOS)


def report_pictures(report: Path, chromium: str) -> dict[str, Image.Image]:
    """Sections of the report as a reader sees them, by the name of the picture."""
    from playwright.sync_api import sync_playwright  # noqa: PLC0415 - only these pictures need it

    pictures = {}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium)
        # so high that the bar at the top covers nothing of what is shown
        page = browser.new_page(viewport={"width": 1100, "height": 5200})
        page.goto(report.resolve().as_uri())
        page.wait_for_selector("#viewer:not([hidden])")
        page.wait_for_timeout(500)
        for name, selector in SECTIONS.items():
            if name == "report-prototypes":
                page.locator("#prototype-class").select_option(label=CLASS)
                page.wait_for_timeout(500)
            pictures[name] = shot(page.locator(selector))
        page.locator("#prototype-class").select_option(label=CORRECTED)
        for number in BRICKS:
            menu = f"Choice about foreground prototype no. {number} of {CORRECTED}"
            page.get_by_label(menu, exact=True).select_option("context")
        page.wait_for_timeout(500)
        pictures["report-choices"] = shot(page.locator("#prototype-viewer"))
        browser.close()
    return pictures


def shot(part: Any) -> Image.Image:
    """A part of a page (a Playwright locator), cut where it is too high."""
    whole = Image.open(io.BytesIO(part.screenshot())).convert("RGB")
    return whole.crop((0, 0, whole.width, min(whole.height, MOST_HEIGHT)))


def save(picture: Image.Image, path: Path) -> None:
    """Write a PNG of few bytes: fewer colours if that is what it takes."""
    for colours in (256, 128, 64):
        few = picture.quantize(
            colours, Image.Quantize.MEDIANCUT, dither=Image.Dither.FLOYDSTEINBERG
        )
        buffer = io.BytesIO()
        few.save(buffer, "PNG", optimize=True)
        if buffer.tell() < MOST_BYTES:
            path.write_bytes(buffer.getvalue())
            print(f"{path}: {picture.width} x {picture.height}, {buffer.tell():,} bytes")
            return
    raise SystemExit(f"{path} would take {buffer.tell():,} bytes, more than {MOST_BYTES:,}")


def main() -> None:
    """Parse the arguments and make every picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run", type=Path, help="folder of a finished run of the demo")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "images")
    options = parser.parse_args()
    options.output.mkdir(exist_ok=True)
    save(demo_picture(Image.open(options.run / "sheet.png")), options.output / "demo.png")
    chromium = next(filter(None, map(shutil.which, CHROMIUM)), None)
    report = options.run / "report.html"
    if chromium is None or not report.is_file():
        print(f"no pictures of the report: {report if chromium else 'Chromium'} is missing")
        return
    for name, picture in report_pictures(report, chromium).items():
        save(picture, options.output / f"{name}.png")


if __name__ == "__main__":
    main()
