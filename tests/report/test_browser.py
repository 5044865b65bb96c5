"""The page in a real browser: what it draws, says and asks for."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from browsing import chromium, watched  # noqa: F401 - the fixture "browser"
from report.sample import (
    DRAWN,
    FIXED,
    HOSTILE,
    array,
    blob,
    enlarged,
    picture,
    sample,
    unit,
    unpacked,
)

from lpcam.evaluation.segmentation import confusion, scores
from lpcam.method.choices import parse_choices, settled
from lpcam.method.seeds import seeds
from lpcam.report.page import render

DIFFERENCE = """([one, other]) => {
  const pixels = (key) => {
    const canvas = document.querySelector(`canvas[data-panel="${key}"]`);
    const copy = new OffscreenCanvas(canvas.width, canvas.height).getContext("2d");
    copy.drawImage(canvas, 0, 0);
    return copy.getImageData(0, 0, canvas.width, canvas.height);
  };
  const [a, b] = [pixels(one), pixels(other)];
  const found = [];
  for (let i = 0; i < a.data.length; i += 4) {
    found.push(Number([0, 1, 2].some((c) => a.data[i + c] !== b.data[i + c])));
  }
  return { width: a.width, height: a.height, found: found.join("") };
}"""
Open = Callable[..., Any]


@pytest.fixture(scope="module")
def data() -> dict[str, Any]:
    return sample()


@pytest.fixture
def open_page(browser: Any, tmp_path: Path) -> Iterator[Open]:
    """Open the page of some data; afterwards nothing may have gone wrong or left the page."""
    complaints: list[str] = []
    pages = []

    def open_page(data: dict[str, Any], *, wait: str | None = "image", **options: Any) -> Any:
        file = tmp_path / "report.html"
        file.write_text(render(data), encoding="utf-8")
        options = {"viewport": {"width": 1200, "height": 900}, **options}
        page = watched(browser, (file.as_uri(), "data:"), complaints, **options)
        pages.append(page)
        page.goto(file.as_uri())
        if wait is not None:
            drawn(page, wait)
        return page

    yield open_page
    for page in pages:
        page.context.close()
    assert not complaints


def drawn(page: Any, panel: str) -> None:
    page.wait_for_selector(f'canvas[data-panel="{panel}"]:not([aria-label=""])')


def settle(page: Any) -> None:
    """Until what is due in the next frame has been drawn."""
    page.wait_for_selector("#viewer[aria-busy=false]")
    page.evaluate("() => new Promise((done) => requestAnimationFrame(() => setTimeout(done, 0)))")


def set_threshold(page: Any, value: float) -> None:
    page.evaluate(
        """(value) => {
          const slider = document.getElementById("threshold");
          slider.value = value;
          slider.dispatchEvent(new Event("input", { bubbles: true }));
        }""",
        value,
    )
    settle(page)


def choose_image(page: Any, identity: str) -> None:
    page.select_option("#filter", "0")
    texts = page.locator("#image option").all_text_contents()
    at = next(i for i, text in enumerate(texts) if text.startswith(identity))
    page.select_option("#image", str(at))
    settle(page)


def shown_iou(page: Any, method: str) -> tuple[float | None, str]:
    """The exact value that the page keeps and the text that it shows."""
    place = page.locator(f'data[data-of="seed {method}"]')
    value = place.get_attribute("value")
    return (None if value is None else float(value)), place.text_content()


def marked(page: Any, panel: str) -> np.ndarray:
    """Where a panel is not the plain image, bool (H, W)."""
    answer = page.evaluate(DIFFERENCE, [panel, "image"])
    found = np.frombuffer(answer["found"].encode(), np.uint8) == ord("1")
    return found.reshape(answer["height"], answer["width"])


def test_the_slider_redraws_the_seeds(open_page: Open, data: dict[str, Any]) -> None:
    """Pixel by pixel what lpcam.method.seeds makes of the same planes, and the IoU of
    lpcam.evaluation.segmentation."""
    page = open_page(data)
    entry = data["images"][3]  # two labels
    assert len(entry["labels"]) == 2
    choose_image(page, entry["id"])
    page.evaluate("() => { document.getElementById('opacity').value = 1; }")
    truth = torch.from_numpy(unpacked(entry["masks"]["truth"]).astype(np.int64))
    names = [one["name"] for one in data["classes"]]
    for threshold, method in itertools.product((0.0, 0.2, 0.63, 0.99), DRAWN):
        set_threshold(page, threshold)
        assert page.text_content("#threshold-value") == f"{threshold:.2f}"
        planes = unpacked(entry["planes"][method])
        drawn_mask = marked(page, f"seed {method}")
        expected = seeds(enlarged(planes, *drawn_mask.shape), threshold).numpy() > 0
        assert 0 < expected.mean() < 1 or threshold in (0.0, 0.99)
        assert np.mean(drawn_mask != expected) < 0.002

        seed = seeds(enlarged(planes, *truth.shape), threshold)
        labels = torch.tensor([0, *(label + 1 for label in entry["labels"])])[seed]
        counted = scores(confusion(truth, labels, len(names) + 1), names).per_class
        wanted = [counted[names[label]]["iou"] for label in entry["labels"]]
        value, text = shown_iou(page, method)
        assert value == pytest.approx(np.mean(wanted), abs=1e-4)
        assert f"at {threshold:.2f}" in text
        told = float(re.search(r"([\d.]+) %", text)[1]) / 100  # type: ignore[index]
        assert told == pytest.approx(np.mean(wanted), abs=1e-3)


def test_a_threshold_between_two_steps(open_page: Open, data: dict[str, Any]) -> None:
    """Mask and IoU are of the same threshold, and the page says which."""
    page = open_page({**data, "fixed": {**FIXED, "CAM": 0.304}})
    entry = data["images"][3]
    choose_image(page, entry["id"])
    page.evaluate("() => { document.getElementById('opacity').value = 1; }")
    fixed = marked(page, "seed CAM")
    value, text = shown_iou(page, "CAM")
    assert value == pytest.approx(unpacked(entry["iou"]["CAM"])[:, 30].mean() / 10000, abs=1e-6)
    assert text.endswith("at 0.30")
    assert page.text_content("#threshold-value") == "CAM 0.30, LPCAM 0.45"
    told = "Shown at the nearest step of 0.01: CAM at 0.30, fixed is 0.304"
    assert page.text_content("#shown").endswith(told)
    set_threshold(page, 0.3)
    assert np.array_equal(marked(page, "seed CAM"), fixed)
    assert told not in page.text_content("#shown")
    assert "nearest step" not in open_page(data).text_content("#shown")


def test_the_class_picker_shows_one_class(open_page: Open, data: dict[str, Any]) -> None:
    page = open_page(data)
    entry = data["images"][3]
    choose_image(page, entry["id"])
    texts = page.locator("#class option").all_text_contents()
    names = [data["classes"][label]["name"] for label in entry["labels"]]
    assert texts == ["All labels of the image", *names]
    whole = marked(page, "seed LPCAM")
    parts = []
    for label in entry["labels"]:
        page.select_option("#class", str(label))
        settle(page)
        parts.append(marked(page, "seed LPCAM"))
        assert data["classes"][label]["name"] in page.get_attribute(
            'canvas[data-panel="map LPCAM"]', "aria-label"
        )
    assert all(part.any() for part in parts)
    assert not (parts[0] & parts[1]).any()
    assert np.array_equal(parts[0] | parts[1], whole)


def test_filters_and_keys(open_page: Open, data: dict[str, Any]) -> None:
    page = open_page(data)

    def position() -> str:
        settle(page)
        return page.text_content("#position")

    assert page.locator("#filter option:checked").text_content() == "Most improved (3)"
    assert position() == "1 of 3"
    page.focus("#viewer")
    keys = ("ArrowRight", "j", "j", "k", "ArrowLeft", "ArrowLeft")
    for key, wanted in zip(keys, (2, 3, 3, 2, 1, 1), strict=True):
        page.keyboard.press(key)
        assert position() == f"{wanted} of 3"
    # on the slider the arrows are the slider's
    page.focus("#threshold")
    before = page.input_value("#threshold")
    page.keyboard.press("ArrowRight")
    assert position() == "1 of 3"
    assert float(page.input_value("#threshold")) == pytest.approx(float(before) + 0.01)
    page.keyboard.press("j")
    assert position() == "2 of 3"
    options = page.locator("#filter option").all_text_contents()
    assert "Worst (2)" in options  # an id that is not shown is left out
    with_first = sum(0 in entry["labels"] for entry in data["images"])
    assert options[0] == "All images (12)" and f"class 0 ({with_first})" in options
    page.select_option("#filter", label="Worst (2)")
    assert position() == "1 of 2"
    assert data["highlights"]["worst"][0] in page.text_content("#shown")


def test_prototypes_of_one_class_at_a_time(open_page: Open, data: dict[str, Any]) -> None:
    page = open_page(data, wait="prototype")
    cards = page.locator("button.prototype")
    assert cards.count() == 10
    assert page.locator("button.prototype.rejected").count() == 2
    assert "24 of 36 kept, 5 shown" in page.text_content("#sides")
    assert "score 0.95 decides by μf" in cards.nth(0).text_content()
    assert cards.nth(0).locator("sub").text_content() == "f"
    assert cards.nth(5).locator("sub").text_content() == "b"
    canvas = page.locator('canvas[data-panel="prototype"]')
    first = canvas.evaluate("(one) => one.toDataURL()")
    assert "foreground prototype no. 0 of class 0" in canvas.get_attribute("aria-label")
    caption = page.locator("#example figcaption")
    assert "no. 0: cosine from −0.05 (dark) to 0.62 (bright). " in caption.text_content()
    cards.nth(8).focus()
    page.keyboard.press("Enter")
    page.wait_for_selector('canvas[aria-label*="context prototype no. 3"]')
    assert canvas.evaluate("(one) => one.toDataURL()") != first
    assert cards.nth(8).get_attribute("aria-pressed") == "true"
    assert cards.nth(0).get_attribute("aria-pressed") == "false"
    page.select_option("#prototype-class", "2")
    page.wait_for_selector('canvas[aria-label*="no. 0 of class 2"]')
    assert cards.count() == 10
    # look-alikes have two maps a method
    page.wait_for_selector("#confusion-list article")
    assert page.locator("#confusion-list article canvas").count() == 5
    assert "98.0 %" in page.text_content("#confusion-list")


PIXELS = """(wanted) => {
  const canvas = document.querySelector(`canvas[data-preview="${wanted}"]`);
  const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  return Array.from({ length: canvas.width }, (_, x) => data[4 * x] + data[4 * x + 1]);
}"""


def choosing() -> dict[str, Any]:
    """Two foreground prototypes that fire left and right, and one of the context, in the middle."""
    data = sample()
    one = data["prototypes"]["classes"][0]
    fire = np.full((5 + 5, 1, 30), 0.5, np.float32)  # a cosine of 0
    for card, place in ((0, slice(0, 10)), (1, slice(20, 30)), (5, slice(10, 20))):
        fire[card, :, place] = 1.0
    kept = {"foreground": (0, 1), "context": (0,)}
    for side, numbers in kept.items():
        for card in one["sides"][side]["prototypes"]:
            card["kept"] = card["number"] in numbers
    means = np.stack([(fire[0] + fire[1]) / 2, fire[5]])
    grey = picture(np.full((8, 60, 3), 100, np.uint8))
    one["previews"] = [
        {
            "id": "p",
            "picture": grey,
            "width": 60,
            "height": 8,
            "means": array(np.rint(65535 * means).astype(np.uint16)),
            "cosines": unit(fire),
        }
    ]
    one["counts"] = [2, 1]
    data["prototypes"] |= {"digest": "d" * 32, "choices": []}
    return data


def test_choices_change_maps_at_once_and_are_saved(open_page: Open, tmp_path: Path) -> None:
    page = open_page(choosing(), wait="prototype")
    page.wait_for_selector("canvas[data-preview]")

    def bright() -> str:
        """Where the map is above half of its largest value: left, middle, right."""
        row = np.array(page.evaluate(PIXELS, "p"), float)
        parts = row[8], row[30], row[52]
        return "".join(
            "x" if part > min(row) + 0.5 * (max(row) - min(row)) else "." for part in parts
        )

    def choose(what: str, action: str) -> None:
        page.select_option(f'select[aria-label="Choice about {what} of class 0"]', action)
        page.wait_for_function("() => new Promise((done) => setTimeout(() => done(true), 50))")

    assert bright() == "x.x"
    choose("foreground prototype no. 0", "drop")
    assert bright() == "..x"
    assert "1 foreground and 1 context" in page.text_content("#choices-note")
    choose("foreground prototype no. 1", "drop")
    assert "No foreground prototype" in page.text_content("#choices-note")
    choose("foreground prototype no. 1", "")
    choose("foreground prototype no. 0", "keep")
    choose("foreground prototype no. 1", "context")
    assert bright() == "x.."
    choose("context prototype no. 0", "drop")
    page.fill(
        'input[aria-label="Name of foreground prototype no. 0 of class 0"]', 'head: "top" – 头'
    )
    page.keyboard.press("Tab")
    with page.expect_download() as waiting:
        page.click("#save-choices")
    file = waiting.value
    assert file.suggested_filename == "prototypes.yaml"
    file.save_as(tmp_path / "prototypes.yaml")
    found = parse_choices((tmp_path / "prototypes.yaml").read_bytes(), "d" * 32, "x")
    assert [(one.place, one.action, one.name, one.by) for one in settled(found)] == [
        (("class 0", "context", 0), "drop", None, "person"),
        (("class 0", "foreground", 0), "keep", 'head: "top" – 头', "person"),
        (("class 0", "foreground", 1), "context", None, "person"),
    ]


def test_early_layers_have_maps_and_cards(open_page: Open) -> None:
    page = open_page(sample(adaptive=True), wait="prototype")
    settle(page)
    assert shown_iou(page, "LPCAM-E")[0] == shown_iou(page, "LPCAM")[0]
    assert page.text_content("#threshold-value") == "CAM 0.56, LPCAM 0.56, LPCAM-E 0.56"
    cards = page.locator("#sides button")
    assert cards.count() == 12
    early = cards.nth(10)
    assert early.text_content() == "No. 7 of blocks.2nearest to 26%"
    assert early.locator("svg").count() == 0 and early.locator("img").count() == 3
    early.click()
    page.wait_for_selector('canvas[aria-label*="early foreground prototype no. 7 of blocks.2"]')
    titles = page.locator("#sides h3").all_text_contents()
    assert titles[2] == "Early layers: foreground72, 1 shown"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(open_page: Open, scheme: str) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="no axe-core")
    data = sample(classes=7, hostile=True, segmented=True, adaptive=True)
    page = open_page(data, color_scheme=scheme, reduced_motion="reduce")
    page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    settle(page)
    results = axe.Axe().run(page)
    assert results.violations_count == 0, results.generate_report()


@pytest.mark.parametrize("width", [360, 768])
def test_a_narrow_page_does_not_scroll_sideways(open_page: Open, width: int) -> None:
    data = sample(classes=7, hostile=True, segmented=True, adaptive=True)
    page = open_page(data, viewport={"width": width, "height": 740})
    page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    choose_image(page, data["images"][6]["id"])
    settle(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    # what is wider than the screen is inside something that scrolls by itself
    sticking_out = page.evaluate(
        """(width) => [...document.querySelectorAll("main *, header *, footer *")]
          .filter((one) => one.getBoundingClientRect().right > width + 1
            && !one.closest(".scroll, optgroup, option"))
          .map((one) => one.outerHTML.slice(0, 100))""",
        width,
    )
    assert not sticking_out


def test_print_shows_content_and_hides_controls(open_page: Open, data: dict[str, Any]) -> None:
    page = open_page(data, color_scheme="dark")
    page.emulate_media(media="print")
    page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    assert not page.is_visible("nav") and not page.is_visible("#threshold")
    assert page.is_visible("table.headline") and page.is_visible('canvas[data-panel="truth"]')
    assert page.is_visible("text=The curves as a table") is False
    assert page.locator("details[open]").count() == page.locator("details").count()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    page.set_viewport_size({"width": 690, "height": 900})  # A4 less its margins
    settle(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 690


def test_hostile_names_are_inert(open_page: Open) -> None:
    data = sample(classes=7, hostile=True)
    page = open_page(data, wait="prototype")
    assert page.title() == f"{HOSTILE[0]} · LPCAM report"
    page.wait_for_selector("#confusion-list article")
    for at, name in enumerate(HOSTILE):
        page.select_option("#prototype-class", str(at))
        page.select_option("#filter", "0")
        page.select_option("#image", str(at))
        settle(page)
        assert " ".join(name.split()) in " ".join(page.text_content("#shown").split())
    assert page.locator("script").count() == 2
    assert page.locator("img[onerror], [onload]").count() == 0
    assert page.locator("img:not([src^='data:'])").count() == 0


def test_without_masks_no_iou_is_shown(open_page: Open) -> None:
    page = open_page(sample(masks=False))
    settle(page)
    for method in DRAWN:
        value, text = shown_iou(page, method)
        assert value is None and text == f"threshold {FIXED[method]:.2f}"
    assert not page.is_visible("#spark") and not page.is_visible("#outline")
    before = marked(page, "seed LPCAM").sum()
    set_threshold(page, 0.9)
    assert marked(page, "seed LPCAM").sum() < before


def test_further_masks_and_planes_are_shown(open_page: Open, data: dict[str, Any]) -> None:
    """Those of one image do not stay for the next."""
    first, second = (dict(entry) for entry in data["images"][:2])
    first["masks"] = {**first["masks"], "pseudo mask of LPCAM": first["masks"]["truth"]}
    first["extra"] = {"boundary": unit(blob(15, 20, 0.5, 0.5, 0.3))}
    page = open_page({**data, "images": [first, second], "highlights": {}})
    assert marked(page, "more pseudo mask of LPCAM").any()
    assert marked(page, "more boundary").any()
    assert page.is_visible("text=Boundary")
    choose_image(page, second["id"])
    assert not page.is_visible('canvas[data-panel="more boundary"]')


def test_an_image_without_labels(open_page: Open, data: dict[str, Any]) -> None:
    empty = {**data["images"][0], "labels": [], "score": {}}
    empty["planes"] = dict.fromkeys(DRAWN, array(np.zeros((0, 15, 20), np.uint8)))
    empty["iou"] = dict.fromkeys(DRAWN, array(np.zeros((0, 100), np.uint16)))
    page = open_page({**data, "images": [empty], "highlights": {}})
    settle(page)
    assert "no label" in page.text_content("#shown")
    assert not marked(page, "seed CAM").any()
    assert "undefined" in shown_iou(page, "CAM")[1]


def test_empty_places(open_page: Open, data: dict[str, Any]) -> None:
    one = data["prototypes"]["classes"][0]
    side = {"total": 0, "kept": 0, "prototypes": []}
    nothing = {**one, "example": None, "sides": {"foreground": side, "context": side}}
    page = open_page({**data, "prototypes": {**data["prototypes"], "classes": [nothing]}})
    assert page.is_visible("text=This class has no prototypes of this kind.")
    assert page.is_visible("text=No example image of this class")


def test_segmenters_are_shown_without_script(open_page: Open) -> None:
    page = open_page(sample(segmented=True), wait=None, java_script_enabled=False)
    assert page.is_visible("table.segmented") and page.is_visible("ol.segmented")
    assert page.locator("#segmenters svg.chart").count() == 2
    pictures = page.locator("#segmenters img")
    assert pictures.count() == 29
    assert pictures.first.evaluate("(one) => [one.naturalWidth, one.naturalHeight]") == [40, 30]
    # beside each other, as wide as each other
    boxes = [pictures.nth(place).bounding_box() for place in range(5)]
    assert len({round(box["y"]) for box in boxes}) == 1
    assert len({round(box["width"]) for box in boxes}) == 1


def test_500_images_are_drawn_one_at_a_time(open_page: Open) -> None:
    page = open_page(sample(500, 20))
    assert page.text_content("#position").endswith("of 3")
    assert page.locator("canvas").count() < 50
    assert page.locator("*").count() < 10_000
