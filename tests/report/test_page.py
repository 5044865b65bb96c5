"""The page as text: its figures, and that every name is escaped."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from itertools import pairwise
from typing import Any

import pytest
from report.sample import HOSTILE, METHODS, sample

from lpcam.report.page import render
from lpcam.runtime.errors import ArtefactError

SECTIONS = [
    *("result", "words", "images", "curves", "classes"),
    *("parts", "prototypes", "confusions", "skipped", "stages"),
]


class Page(HTMLParser):
    """Elements with their attributes, headings, and the text outside scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.raw: dict[str, list[str]] = {"script": [], "style": []}
        self._inside: str | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag in self.raw:
            self._inside = tag
            self.raw[tag].append("")

    def handle_endtag(self, tag: str) -> None:
        if tag == self._inside:
            self._inside = None
        if tag in ("dt", "dd", "th", "td", "li", "p", "h1", "h2", "h3", "h4"):
            self.text += " "

    def handle_data(self, data: str) -> None:
        if self._inside is not None:
            self.raw[self._inside][-1] += data
        else:
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def data(self) -> dict[str, Any]:
        loaded: dict[str, Any] = json.loads(self.raw["script"][0])
        return loaded


def words(text: str) -> str:
    return " ".join(text.split())


@pytest.fixture(scope="module")
def page() -> Page:
    return Page(render(sample()))


def test_every_section_has_a_heading_and_a_link(page: Page) -> None:
    assert [one["id"] for one in page.all("section")] == SECTIONS
    targets = {one["href"] for one in page.all("a")}
    assert {f"#{name}" for name in SECTIONS} <= targets
    identities = [one["id"] for _, one in page.elements if "id" in one]
    assert len(identities) == len(set(identities))
    levels = [int(name[1]) for name, _ in page.elements if re.fullmatch("h[1-6]", name)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))


def test_the_headline_has_signed_differences(page: Page) -> None:
    text = words(page.text)
    # LPCAM 0.403 + 2 * 0.0425 = 48.8 against CAM 40.3; FN 29.0 against 25.0
    assert "LPCAM 0.50 48.8 +8.5 33.0 −2.0 29.0 +4.0 51.0 ±0.0 58.0 ±0.0" in text
    assert "CAM 0.30 40.3 35.0 25.0 51.0 58.0" in text
    assert "how ground truth was chosen" in text and "how fixed was chosen" in text


def test_the_conditions_are_shown(page: Page) -> None:
    text = words(page.text)
    for shown in (
        *("Image scales 1, 0.5", "Mirrored image used yes", "weight decay 0.001"),
        *("cam 70.1 s 3.0 GiB", "evaluate 1 h 02 min –"),
        *("Training of the network of AMN", "1.6893"),
    ):
        assert shown in text


def test_curves_have_words_and_a_table(page: Page) -> None:
    text = words(page.text)
    assert "CAM is highest at 0.25 with 45.0 percent and has 45.0 percent at its fixed" in text
    assert "LPCAM is highest at 0.45 with 45.0 percent" in text
    lines = [one for one in page.all("polyline") if "line" in str(one["class"])]
    assert len(lines) == 3 * len(METHODS)
    assert all(str(one["points"]).count(",") == 100 for one in lines)
    # threshold 0.25: mIoU 45.0, precision 30 + 12.5, recall 90 - 20
    assert "0.25 45.0 42.5 70.0" in text


def test_what_the_run_chose(page: Page) -> None:
    adaptive = Page(render(sample(adaptive=True)))
    text = words(adaptive.text)
    assert [one["id"] for one in adaptive.all("section")] == ["result", "chosen", *SECTIONS[1:]]
    assert {one["href"] for one in adaptive.all("a")} >= {"#chosen"}
    assert "Setting Value Reason lpcam.tau 0.50 plain words" in text
    # information 0.04, 0.08 and 0.12; the last is chosen
    assert "LPCAM 0.0400 0.44 LPCAM × early layers, round 1 0.0800 0.44" in text
    assert "early layers from CAM, round 2 (chosen) 0.1200 0.44" in text
    bars = [one["width"] for one in adaptive.all("rect") if one.get("class") == "iou m5"]
    assert bars[-2:] == ["33.33", "66.67"]
    assert "Each method at its automatic threshold" in text and "at its fixed" not in text
    assert "Automatic thresholds" in text and "Fixed thresholds" not in text
    assert "has 44.2 percent at its automatic threshold of 0.56" in text
    assert "What the run chose" not in words(page.text) and "Judge" not in words(page.text)


def test_some_thresholds_fixed_and_some_automatic() -> None:
    data = sample(adaptive=True)
    data["verdicts"] = {"CAM": data["verdicts"]["CAM"]}
    text = words(Page(render(data)).text)
    assert "Automatic or fixed thresholds" in text
    assert "at its automatic threshold of 0.56; LPCAM-F is highest" in text
    assert "at its fixed threshold of 0.56; LPCAM is highest" in text


def test_the_judge_needs_no_truth() -> None:
    page = Page(render(sample(masks=False, adaptive=True)))
    text = words(page.text)
    assert "LPCAM-E is highest at 0.50; its automatic threshold is 0.56" in text
    assert "The curves as a table" not in text and "best mIoU" not in text
    lines = [one for one in page.all("polyline") if "line" in str(one["class"])]
    assert len(lines) == 4


def test_nothing_is_loaded(page: Page) -> None:
    policy = next(
        str(one["content"]) for one in page.all("meta") if one.get("http-equiv") is not None
    )
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert "unsafe" not in policy and "http" not in policy
    for kind, raw in (("style", page.raw["style"][0]), ("script", page.raw["script"][1])):
        digest = base64.b64encode(hashlib.sha256(raw.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    for name, attributes in page.elements:
        for key in ("src", "href", "srcset", "data", "action"):
            value = str(attributes.get(key) or "#")
            assert value.startswith(("#", "data:")), (name, value)
        assert "style" not in attributes  # the policy would refuse it
        assert not [key for key in attributes if key.startswith("on")]
    assert "url(" not in page.raw["style"][0] and "@import" not in page.raw["style"][0]
    banned = r"\b(fetch|XMLHttpRequest|WebSocket|eval|innerHTML)\b"
    assert not re.findall(banned, page.raw["script"][1])


def test_hostile_names_are_text() -> None:
    page = Page(render(sample(classes=7, hostile=True, segmented=True, adaptive=True)))
    assert len(page.all("script")) == 2
    alts = " ".join(str(one["alt"]) for one in page.all("img"))
    for name in HOSTILE:
        assert words(name) in words(page.text)
        assert name in [one["name"] for one in page.data()["classes"]]
        assert name == HOSTILE[6] or (name in alts and words(name) in section(page))
    assert not set("<>&\u2028\u2029") & set(page.raw["script"][0])
    for one in page.all("img"):
        assert set(one) == {"src", "width", "height", "alt", "decoding"}
    assert not [name for name, one in page.elements if "style" in one]


def test_odd_values_and_order() -> None:
    """File names may hold bytes that are no UTF-8; they come as lone surrogates."""
    data = sample(2, 1)
    assert render(data) == render(dict(reversed(data.items())))
    data["skipped"] = [{"id": "caf\udce9", "reason": "unreadable"}]
    data["images"][0]["id"] = "caf\udce9"
    assert "caf?" in render(data).encode().decode()
    data["images"][0]["score"] = {"CAM": float("nan")}
    with pytest.raises(ArtefactError, match="JSON"):
        render(data)


def test_without_masks_nothing_is_scored() -> None:
    page = Page(render(sample(masks=False, segmented=True)))
    text = words(page.text)
    assert {one["id"] for one in page.all("section")} == {*SECTIONS, "segmenters"}
    assert "no true masks" in text and "Fixed thresholds" in text and "+8.5" not in text
    assert "Trained on LPCAM + IRN 1,464 masks of the list class 0" in section(page)
    assert "mIoU" not in section(page) and len(page.all("img")) == 6 * 4


def test_empty_sections_have_a_text() -> None:
    data = sample(0, 1, masks=False, meaning=False) | {"images_total": 1, "command": ""}
    page = Page(render(data))
    assert [one["id"] for one in page.all("section")] == SECTIONS
    assert "There are no images to show" in words(page.text) and "no prototypes" in words(page.text)


@pytest.fixture(scope="module")
def segmented() -> Page:
    return Page(render(sample(refined=True, segmented=True)))


def test_pseudo_masks_are_compared_with_those_of_cam(page: Page, segmented: Page) -> None:
    text = words(segmented.text)
    assert "Refinement of the maps method irn irn: beta 10 crf: steps 10" in text
    table = text.split("Pseudo masks: masks of the refined maps (IRN). ")[1]
    assert table.startswith("Each method at its own best threshold")
    # CAM 0.403 + 0.1; LPCAM 0.488 + 0.12, in this order although the data have the other
    assert "CAM + IRN 0.30 50.3 35.0 25.0 61.0 68.0 LPCAM + IRN 0.50 60.8 +10.5 33.0" in table
    dots = [str(one.get("class")) for one in segmented.all("span")]
    seed, pseudo = ["dot m0", "dot m1", "dot m2"], ["dot m0", "dot m2"]
    assert [one for one in dots if one.startswith("dot ")][:10] == [*seed, *seed, *pseudo, *pseudo]
    assert "Seeds: masks of the maps without refinement. Each" in text
    assert "Seeds:" not in words(page.text)


def section(page: Page) -> str:
    text = words(page.text)
    start = text.index("Segmenters trained on the masks")
    return text[start : text.index("Prototypes Each card")]


def test_segmenters_are_scored_in_a_table_of_their_own(segmented: Page) -> None:
    text = section(segmented)
    told = "scored on 1,449 images of the list val; weights of the last step; each pixel"
    alone, refined = text.split("The network aloneCRF: no; ")[1].split(
        "After a dense CRF (deeplab)CRF: yes; "
    )
    assert alone.startswith(told) and refined.startswith(told)
    assert "CAM + IRN 1,464 50.0 20.0 30.0 70.0 60.0 LPCAM + IRN 1,464 55.0 +5.0 20.0" in alone
    assert "true masks 1,464 60.0 +10.0" in alone
    assert "CAM + IRN 1,464 52.0 20.0 28.0" in refined
    assert "Masksof the list class 0" in text
    assert "Backbone resnet18 Mean none" in text and "batch size 10" in text
    others = words(segmented.text).replace(text, "")
    assert "1,464" not in others and "DeepLabV2" not in others


def test_learning_curves_have_words_and_tables(segmented: Page) -> None:
    text = section(segmented)
    assert "CAM + IRN goes from 1.78 at step 25 to 0.3 at step 1500;" in text
    # 1500 / 3000, in percent; measured three times
    assert "CAM + IRN goes from 16.7 at step 500 to 50 at step 1500" in text
    lines = [one for one in segmented.all("polyline") if "line" in str(one["class"])][-6:]
    counts = [str(one["points"]).count(",") for one in lines]
    assert counts == [60] * 3 + [3] * 3
    for one in lines:
        for point in str(one["points"]).split():
            x, y = map(float, point.split(","))
            assert 38 <= x <= 330 and 12 <= y <= 206
    assert str(lines[0]["points"]).split()[-1].startswith("330,")  # step 1500 of 1500
    assert "500 1.3000 16.7 1.3000 16.7" in text


def test_pictures_say_what_they_show(segmented: Page) -> None:
    text = section(segmented)
    assert "0000+10.0 Image" in text and "0001±0.0 Image" in text
    pictures = segmented.all("img")
    assert len(pictures) == 6 * 5 - 1  # an image has no truth
    alts = [str(one["alt"]) for one in pictures]
    assert "True mask of 0000: class 0" in alts
    assert "Mask of 0000 by the segmenter trained on CAM + IRN: no object" in alts
    assert all(str(one["src"]).startswith("data:image/webp;base64,") for one in pictures)
