"""A Chromium for the tests of pages; modules that import this are skipped where there is none."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
if CHROMIUM is None:
    pytest.skip("there is no chromium on the path", allow_module_level=True)

ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="module", name="browser")
def chromium() -> Iterator[Any]:
    """A headless browser that asks no proxy for this machine."""
    os.environ.setdefault("no_proxy", "127.0.0.1")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


def watched(browser: Any, own: tuple[str, ...], complaints: list[str], **options: Any) -> Any:
    """A new page; what its console says and what it asks of others is added to the complaints."""
    page = browser.new_context(**options).new_page()
    page.set_default_timeout(120_000)
    page.on("console", lambda message: complaints.append(f"console: {message.text}"))
    page.on("pageerror", lambda error: complaints.append(f"error: {error}"))
    page.on("dialog", lambda dialog: (complaints.append("dialog"), dialog.dismiss()))

    def asked(request: Any) -> None:
        if not request.url.startswith(own):
            complaints.append(f"request: {request.url}")

    page.on("request", asked)
    return page
