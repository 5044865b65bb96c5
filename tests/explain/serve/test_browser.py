"""The local page in a real browser: upload, slider, classes, saved mask, no request elsewhere."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browsing import chromium, watched  # noqa: F401 - the fixture "browser"
from PIL import Image, ImageFilter
from tiny import draw_image

from lpcam.data.masks import read_index_mask
from lpcam.explain.explainer import Explainer
from lpcam.explain.serve import app as server
from lpcam.method.choices import Choice
from lpcam.method.seeds import seeds
from lpcam.pipeline.run_folder import RunFolder

uvicorn = pytest.importorskip("uvicorn", reason="the extra 'serve' is not installed")
HOSTILE = '<img src=x onerror="window.harmed=1">'
"""The name of the class that the tiny run calls "blue"."""
SMALL = {"width": 360, "height": 740}


class Served:
    """A page on a free port, and what answers it."""

    def __init__(self, explainer: Explainer, patches: Path) -> None:
        self.explainer = explainer
        self.socket = socket.socket()
        self.socket.bind(("127.0.0.1", 0))
        self.home = f"http://127.0.0.1:{self.socket.getsockname()[1]}/"
        app = server.application(
            explainer,
            name=f"{HOSTILE} run",
            port=self.socket.getsockname()[1],
            threads=1,
            patch=lambda *place: patches / f"{'-'.join(map(str, place))}.webp",
        )
        config = uvicorn.Config(app, log_level="warning", lifespan="off", ws="none")
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, args=([self.socket],), daemon=True)
        self.thread.start()
        deadline = time.monotonic() + 120
        while not self.server.started and time.monotonic() < deadline:
            time.sleep(0.02)

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(120)
        self.socket.close()


@pytest.fixture(scope="module")
def served(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    explainer = RunFolder(run).explainer(device="cpu")
    explainer.classes = (HOSTILE, *explainer.classes[1:])
    patches = tmp_path_factory.mktemp("patches")
    red = explainer.prototypes.foreground.sizes[2]
    for number in range(int((red > 0).sum())):
        Image.new("RGB", (8, 8), "red").save(patches / f"2-foreground-{number}.webp")
    served = Served(explainer, patches)
    yield served
    served.stop()


@pytest.fixture(scope="module")
def photograph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("photograph") / 'my <b>"cow".7.png'
    image = draw_image(["blue", "red"], (100, 120), np.random.default_rng(1))[0]
    # smooth, as the page shows it as a JPEG
    Image.fromarray(image).filter(ImageFilter.GaussianBlur(3)).save(path)
    return path


@pytest.fixture
def page(browser: Any, served: Served, request: pytest.FixtureRequest) -> Iterator[Any]:
    """The page; at the end, that nothing complained and nothing was asked of anybody else."""
    complaints: list[str] = []
    own = (served.home, "data:", f"blob:{served.home}")
    page = watched(browser, own, complaints, **getattr(request, "param", {}))
    page.goto(served.home)
    page.locator("#run", has_text="run").wait_for()
    page.expected_complaints = []
    yield page
    for text in page.expected_complaints:
        complaints.remove(next(c for c in complaints if text in c))
    assert not complaints
    assert page.evaluate("window.harmed") is None
    page.context.close()


def upload(page: Any, path: Path) -> None:
    page.set_input_files("#file", path)
    page.wait_for_selector("#viewer:not([hidden]):not(.stale)")
    page.locator("#status", has_text="pixels").wait_for()


def slide(page: Any, selector: str, value: float) -> None:
    page.locator(selector).fill(str(value))


def shares(page: Any) -> list[str]:
    found: list[str] = page.locator("#classes td.number").all_text_contents()
    return found


def pixels(page: Any, selector: str) -> np.ndarray:
    """(h, w, 3) of a canvas."""
    data = page.evaluate(
        """(selector) => {
            const canvas = document.querySelector(selector);
            const { width, height } = canvas;
            const pen = new OffscreenCanvas(width, height).getContext("2d");
            pen.drawImage(canvas, 0, 0);
            const { data } = pen.getImageData(0, 0, width, height);
            return [width, height, Array.from(data)];
        }""",
        selector,
    )
    return np.array(data[2], np.uint8).reshape(data[1], data[0], 4)[:, :, :3]


def test_slider_classes_and_method_change_the_mask_as_in_python(
    page: Any, served: Served, photograph: Path
) -> None:
    import torch  # noqa: PLC0415

    upload(page, photograph)
    maps = served.explainer.fast().highest(photograph, 3)
    rows = page.locator("#classes tr")
    assert rows.count() == 3
    assert [row.split("\t")[0] for row in rows.locator("bdi").all_inner_texts()] == list(
        maps.classes
    )
    assert page.locator("#threshold").input_value() == str(maps.threshold)
    for row in range(3):
        page.locator("#classes input[type=checkbox]").nth(row).check()
    seen = set()
    for method, planes in (("LPCAM", maps.lpcam), ("CAM", maps.cam)):
        page.select_option("#method", method)
        for threshold in (0.2, 0.5, 0.8):
            slide(page, "#threshold", threshold)
            values = seeds(torch.from_numpy(np.rint(planes * 255) / 255), threshold).numpy()
            expected = [100 * float((values == k).mean()) for k in (1, 2, 3)]
            found = [float(text.removesuffix(" %")) for text in shares(page)]
            assert found == pytest.approx(expected, abs=0.51)
            seen.add(tuple(found))
            assert page.locator("#threshold-value").text_content() == f"{threshold:.2f}"
    assert len(seen) == 6
    page.locator("#classes input[type=checkbox]").nth(1).uncheck()
    assert shares(page)[1] == "–"


def test_heat_is_drawn_as_in_python(page: Any, served: Served, photograph: Path) -> None:
    upload(page, photograph)
    maps = served.explainer.fast().highest(photograph, 3)
    for row, name in enumerate(maps.classes):
        page.locator("#classes th label").nth(row).click()
        assert page.locator(".of").first.text_content() == f"of {name}"
        label = page.locator("#lpcam").get_attribute("aria-label")
        assert label == f"LPCAM of {name} over the photograph"
        for method, selector in (("CAM", "#cam"), ("LPCAM", "#lpcam")):
            drawn = pixels(page, selector).astype(int)
            expected = maps.overlay(name=name, method=method).astype(int)  # type: ignore[arg-type]
            assert np.abs(drawn - expected).mean() < 4
    before = pixels(page, "#lpcam")
    slide(page, "#opacity", 0)
    assert np.abs(pixels(page, "#lpcam").astype(int) - maps.image).mean() < 6
    assert (pixels(page, "#lpcam") != before).any()


@pytest.mark.parametrize("method", ["LPCAM", "CAM"])
def test_saved_mask_is_that_of_python(
    page: Any, served: Served, photograph: Path, tmp_path: Path, method: Any
) -> None:
    upload(page, photograph)
    for row in range(3):
        page.locator("#classes input[type=checkbox]").nth(row).set_checked(row != 1)
    page.select_option("#method", method)
    slide(page, "#threshold", 0.37)
    with page.expect_download() as waiting:
        page.click("#save")
    assert waiting.value.suggested_filename == "my _b__cow_.7.mask.png"
    waiting.value.save_as(tmp_path / "mask.png")
    maps = served.explainer.fast().highest(photograph, 3)
    classes = [maps.classes[0], maps.classes[2]]
    expected = maps.mask(0.37, method=method, classes=classes)
    np.testing.assert_array_equal(read_index_mask(tmp_path / "mask.png"), expected)
    assert len(np.unique(expected)) > 1
    assert "Saved as my _b__cow_.7.mask.png" in page.locator("#status").text_content()


def test_full_quality_is_a_key_away_and_counts_for_the_saved_mask(
    page: Any, served: Served, photograph: Path, tmp_path: Path
) -> None:
    upload(page, photograph)
    assert page.locator("#quality").get_attribute("aria-pressed") == "false"
    assert "scale 1" in page.locator("#quality-note").text_content()
    page.locator("#show-1").check()
    for row in range(3):
        page.locator("#classes input[type=checkbox]").nth(row).set_checked(row > 0)
    slide(page, "#threshold", 0.41)
    for quality, explainer in (("full", served.explainer), ("fast", served.explainer.fast())):
        page.focus("#quality")
        page.keyboard.press("Enter")
        page.wait_for_selector(f"#quality[aria-pressed={str(quality == 'full').lower()}]")
        assert page.evaluate("document.activeElement.id") == "quality"
        # what was chosen stays
        assert page.locator("#show-1").is_checked()
        boxes = page.locator("#classes input[type=checkbox]")
        assert [boxes.nth(row).is_checked() for row in range(3)] == [False, True, True]
        assert page.locator("#threshold").input_value() == "0.41"
        maps = explainer.highest(photograph, 3)
        drawn = pixels(page, "#lpcam").astype(int)
        assert np.abs(drawn - maps.overlay(name=maps.classes[1]).astype(int)).mean() < 4
        with page.expect_download() as waiting:
            page.click("#save")
        waiting.value.save_as(tmp_path / f"{quality}.png")
        found = read_index_mask(tmp_path / f"{quality}.png")
        np.testing.assert_array_equal(found, maps.mask(0.41, classes=maps.classes[1:]))
    assert (tmp_path / "full.png").read_bytes() != (tmp_path / "fast.png").read_bytes()
    upload(page, photograph)  # another photograph: what was chosen for this one does not stay
    assert page.locator("#show-0").is_checked()


@pytest.mark.parametrize("event", ["drop", "paste"])
def test_drop_and_paste(page: Any, photograph: Path, event: str) -> None:
    page.evaluate(
        """([event, bytes]) => {
            const transfer = new DataTransfer();
            transfer.items.add(new File([new Uint8Array(bytes)], "x.png", { type: "image/png" }));
            const made = event === "drop"
                ? new DragEvent(event, { dataTransfer: transfer, bubbles: true, cancelable: true })
                : new ClipboardEvent(event, { clipboardData: transfer, bubbles: true });
            document.body.dispatchEvent(made);
        }""",
        [event, list(photograph.read_bytes())],
    )
    page.wait_for_selector("#viewer:not([hidden])")
    assert "x.png, 120 × 100 pixels" in page.locator("#status").text_content()


def test_what_cannot_be_read_is_told_and_the_last_photograph_stays(
    page: Any, photograph: Path, tmp_path: Path
) -> None:
    upload(page, photograph)
    bad = tmp_path / f"{HOSTILE.replace('/', '')}.jpg"
    bad.write_bytes(b"no image")
    page.expected_complaints = ["415"]
    page.set_input_files("#file", bad)
    page.wait_for_selector("#error:not([hidden])")
    assert "Refused: cannot read image" in page.locator("#error").text_content()
    assert page.locator("#viewer").is_visible()
    upload(page, photograph)
    assert page.locator("#error").is_hidden()


def test_too_large_files_are_not_even_sent(
    page: Any, photograph: Path, tmp_path: Path, served: Served
) -> None:
    large = tmp_path / "large.jpg"
    with large.open("wb") as file:
        file.truncate(server.Limits().size + 1)
    sent: list[str] = []
    page.on("request", lambda request: sent.append(request.url))
    page.set_input_files("#file", large)
    page.wait_for_selector("#error:not([hidden])")
    assert "large.jpg is larger than 32 MB" in page.locator("#error").text_content()
    assert not sent


def test_keys_alone(page: Any, photograph: Path) -> None:
    """From the start: the file, then class, box and slider by Tab, arrows and Space."""
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "file"
    upload(page, photograph)
    order = []
    for _ in range(9):
        page.keyboard.press("Tab")
        order.append(
            page.evaluate("document.activeElement.id || document.activeElement.type || ''")
        )
    assert order[:5] == ["quality", "threshold", "opacity", "method", "save"]
    page.focus("#threshold")
    before = float(page.locator("#threshold").input_value())
    page.keyboard.press("ArrowRight")
    assert float(page.locator("#threshold").input_value()) == pytest.approx(before + 0.01)
    page.focus("#show-0")
    page.keyboard.press("ArrowDown")
    assert page.locator("#show-1").is_checked()


@pytest.mark.parametrize(
    "page",
    [{"color_scheme": "light"}, {"color_scheme": "dark"}, {"viewport": SMALL}],
    indirect=True,
    ids=["light", "dark", "narrow"],
)
def test_accessible_and_within_the_screen(page: Any, photograph: Path) -> None:
    axe = pytest.importorskip(
        "axe_playwright_python.sync_playwright", reason="axe is not installed"
    )
    for full in (False, True):
        if full:
            upload(page, photograph)
        result = axe.Axe().run(page)
        assert result.violations_count == 0, result.generate_report()
        wide = page.evaluate("document.documentElement.scrollWidth - innerWidth")
        assert wide <= 0


def test_hostile_names_are_text(page: Any, photograph: Path) -> None:
    upload(page, photograph)
    assert HOSTILE in page.locator("#classes").inner_text()
    assert page.locator("#classes img").count() == 0
    assert page.locator("#run").text_content() == f"of {HOSTILE} run"
    assert '<b>"cow"' in page.locator("#status").text_content()


def test_choices_about_prototypes_change_the_maps(
    page: Any, served: Served, photograph: Path, tmp_path: Path
) -> None:
    explainer, plain = served.explainer, served.explainer.fast().highest(photograph, 3)
    numbers = list(range(int((explainer.prototypes.foreground.sizes[2] > 0).sum())))
    assert len(numbers) > 1
    upload(page, photograph)
    page.locator("#classes th label", has_text="red").click()
    assert page.locator("#cards li").count() == len(numbers)
    before = pixels(page, "#lpcam")

    def change(number: int, **chosen: str) -> None:
        what = f"foreground prototype no. {number} of red"
        page.locator("#viewer:not(.stale)").wait_for()
        with page.expect_response("**/maps*"):
            if "action" in chosen:
                page.select_option(f'select[aria-label="Choice about {what}"]', chosen["action"])
            else:
                page.fill(f'input[aria-label="Name of {what}"]', chosen["name"])
                page.keyboard.press("Tab")
        page.locator("#viewer:not(.stale)").wait_for()

    for number in numbers[1:]:
        change(number, action="keep")
    change(numbers[0], action="drop")
    change(numbers[1], name="lid")
    after = pixels(page, "#lpcam")
    choices = [Choice("red", "foreground", n, "keep") for n in numbers[1:]]
    choices += [Choice("red", "foreground", numbers[0], "drop")]
    choices += [Choice("red", "foreground", numbers[1], name="lid")]
    corrected = explainer.fast().with_choices(choices)
    maps = corrected.highest(photograph, 3)
    assert np.abs(maps.lpcam - plain.lpcam).max() > 0.05
    assert (after != before).any()
    expected = maps.overlay(name="red").astype(int)
    assert np.abs(after.astype(int) - expected).mean() < 4
    assert "lid" in page.locator("#classes th .parts").first.text_content()
    with page.expect_download() as waiting:
        page.click("#save-choices")
    waiting.value.save_as(tmp_path / "prototypes.yaml")
    assert explainer.prototypes.chosen(tmp_path / "prototypes.yaml", "equal").choices == (
        corrected.prototypes.choices
    )
