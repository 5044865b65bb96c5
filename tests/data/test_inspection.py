"""A survey of a data set: counts by hand, every kind of finding, words that fit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lpcam.data.dataset import ClassTable, Dataset, Item, Skip
from lpcam.data.inspection import _may_be_one, survey
from lpcam.data.open_dataset import Truth
from lpcam.data.survey import Estimate, Finding, Survey
from lpcam.runtime.errors import LpcamError

LABELS = {"a": (0,), "b": (0, 1), "c": (1,), "d": (), "e": (0, 1)}
MASKS = {"a": [0, 1, 255], "b": [1, 2], "c": [0, 2]}
"""Values in the mask of each image; d and e have none."""


def make(
    folder: Path,
    labels: dict[str, tuple[int, ...]] = LABELS,
    masks: dict[str, list[int]] = MASKS,
    classes: tuple[str, ...] = ("cow", "dog"),
    **more: object,
) -> Dataset:
    """A data set of images that all differ, 6 wide, the n-th 4 + n high."""
    items = {}
    for number, (name, of) in enumerate(labels.items()):
        image, path = folder / f"{name}.png", None
        Image.new("RGB", (6, 4 + number), (number, 0, 0)).save(image)
        if name in masks:
            path = folder / f"{name}-mask.png"
            mask = np.full((4 + number, 6), masks[name][0], np.uint8)
            mask[0, : len(masks[name])] = masks[name]
            Image.fromarray(mask).save(path)
        items[name] = Item(name, image, of, path)
    lists = {"train": ("a", "b"), "val": ("c",), "all": tuple(items)}
    table = ClassTable(classes, tuple(range(1, len(classes) + 1)))
    kept = {of: tuple(i for i in ids if i in items) for of, ids in lists.items()}
    dataset = Dataset("fields", table, items, kept, "labels.csv")
    return replace(dataset, **more)  # type: ignore[arg-type]


def found(result: Survey, kind: str) -> Finding:
    (one,) = [finding for finding in result.findings if finding.kind == kind]
    return one


def kinds(result: Survey) -> list[str]:
    return [finding.kind for finding in result.findings if finding.kind != "pixels"]


def test_counts_are_those_by_hand(tmp_path: Path) -> None:
    result = survey(make(tmp_path), workers=2)
    assert result.suffixes == {".png": 5}
    assert result.sizes == {"smallest": (4, 6), "median": (6, 6), "largest": (8, 6)}
    assert (result.whole.images, result.whole.labelled, result.whole.masks) == (5, 4, 3)
    assert result.together.tolist() == [[3, 2], [2, 3]]
    assert result.alone == (1, 1)
    train, val, everything = result.lists
    assert (train.images, train.masks, train.classes, train.within) == (2, 2, (2, 1), ("all",))
    assert (val.classes, everything.within, everything.labelled) == ((0, 1), (), 4)
    assert kinds(result) == ["small classes", "no label", "no negatives"]
    assert found(result, "small classes").names == ("cow (3)", "dog (3)")
    assert found(result, "no label").names == ("d",)
    assert result.problems == () and "Nothing needs attention." in result.summary()


def test_labels_and_masks_that_disagree(tmp_path: Path) -> None:
    masks = {**MASKS, "a": [0, 2], "d": [1, 2], "c": [0, 255]}
    result = survey(make(tmp_path, masks=masks))
    unsaid, unseen = found(result, "mask without label"), found(result, "label without mask")
    assert unsaid.names == ("a", "d")
    assert unsaid.text.endswith("(dog 2, cow 1)") and unsaid.attention
    assert unseen.names == ("a", "c") and unseen.text.endswith("(cow 1, dog 1)")
    # two of three labelled masks lack an object: no longer some difficult ones
    assert unseen.attention
    few = survey(make(tmp_path, masks={**MASKS, "c": [0, 255]}))
    assert not found(few, "label without mask").attention


def test_masks_of_0_and_255_alone(tmp_path: Path) -> None:
    result = survey(make(tmp_path, masks={name: [0, 255] for name in "abc"}))
    assert "write the class's number instead (1 for cow)" in found(result, "mask values").text
    assert "label without mask" not in kinds(result)


@pytest.mark.parametrize(
    ("masks", "values"),
    [({"d": [0]}, "0"), ({"a": [0], "d": [0]}, "0"), ({"a": [9], "d": [0, 255]}, "0, 9, 255")],
)
def test_masks_that_show_no_class(tmp_path: Path, masks: dict[str, list[int]], values: str) -> None:
    """A run scores nothing by them; d has no label, a is labelled with a cow."""
    result = survey(make(tmp_path, masks=masks))
    finding = found(result, "no truth")
    assert finding.attention and finding.names == tuple(masks)
    assert f"in them: {values}; 0 is background" in finding.text
    assert "label without mask" not in kinds(result)
    assert ("mask values" in kinds(result)) == ("9" in values)


def test_masks_that_cannot_be_used_do_not_stop_it(tmp_path: Path) -> None:
    dataset = make(tmp_path)
    Image.new("RGB", (6, 4)).save(tmp_path / "a-mask.png")
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(tmp_path / "b-mask.png")
    (tmp_path / "c-mask.png").unlink()
    result = survey(dataset)
    texts = {f.names[0]: f.text for f in result.findings if f.kind == "mask"}
    words = {"a": "holds colours", "b": "is 9 x 9 (height x width)", "c": "No such file"}
    assert set(texts) == set(words)
    for name, text in texts.items():
        assert words[name] in text and str(tmp_path) not in text


def test_broken_and_left_out_images_are_grouped_by_reason(tmp_path: Path) -> None:
    labels = {f"cow {n}": (0,) for n in range(6)}
    dataset = make(tmp_path, labels, {}, lists={"all": tuple(labels)})
    for name in ("cow 1", "cow 4"):
        (tmp_path / f"{name}.png").write_bytes(b"")
    (tmp_path / "cow 2.png").write_bytes(b"text")
    gone = [Skip(f"x_{n}", f"there is no image {tmp_path}/JPEGImages/x_{n}.jpg") for n in range(9)]
    result = survey(replace(dataset, skipped=tuple(gone)))
    texts = [(f.names, f.text) for f in result.findings if f.kind == "left out"]
    assert [len(names) for names, _ in texts] == [9, 2, 1]
    assert texts[0][1] == "9 images left out (e.g. there is no image x_0.jpg)"
    assert texts[1][0] == ("cow 1", "cow 4")
    assert "the file is empty" in texts[1][1]
    assert texts[2][1].startswith("1 image left out (cannot read image ")
    assert result.whole.images == result.lists[0].images == 3
    assert "x_0; x_1; x_2 and 6 more" in result.summary()
    assert len(result.as_json()["findings"][0]["names"]) == 9  # the JSON has them all


def test_truth_that_annotations_give_is_tried(tmp_path: Path) -> None:
    """As of COCO, where masks are not files yet."""

    def mask(*values: int) -> np.ndarray:
        return np.array([values], np.uint8)

    def without_extra() -> tuple[None, tuple[str, ...]]:
        raise LpcamError("masks from polygons need pycocotools")

    text = "/data/x.json: annotation {} cannot be painted: it is cut off"
    truth: Truth = {
        "a": lambda: (mask(0, 1, 2), ()),  # labelled with 1 alone
        "b": lambda: (None, (text.format(4), text.format(5))),
        "c": lambda: (mask(0, 2), (text.format(6),)),
        "d": lambda: (None, ()),  # a box alone
        "e": without_extra,
    }
    dataset = make(tmp_path, masks={})
    result = survey(dataset, truth=truth, workers=2)
    wrong = {f.names: f.text for f in result.findings if f.kind == "annotations" and f.attention}
    assert wrong == {
        ("b", "c"): "2 images with wrong annotations (e.g. x.json: annotation 4 cannot be painted: "
        "it is cut off)",
        ("e",): "1 image with wrong annotations (masks from polygons need pycocotools)",
    }
    assert found(result, "mask without label").names == ("a",)
    assert [one.masks for one in (result.whole, *result.lists)] == [2, 1, 1, 2]
    assert survey(dataset).whole.masks == 0


def test_duplicates(tmp_path: Path) -> None:
    labels = dict.fromkeys("abcdefgh", (0,)) | {"f": (1,), "h": (0,)}
    dataset = make(tmp_path, labels, {})
    for source, copy in (("a", "b"), ("e", "f"), ("a", "c"), ("g", "h")):
        (tmp_path / f"{copy}.png").write_bytes((tmp_path / f"{source}.png").read_bytes())
    dataset = replace(
        dataset, lists={"train": ("a", "b", "d"), "val": ("c", "e", "f"), "more": ("d", "g")}
    )
    result = survey(dataset)
    assert found(result, "duplicates with other labels").names == ("e = f",)
    assert found(result, "duplicates across lists").names == ("a = b = c",)
    plain = found(result, "duplicates")
    assert (plain.names, plain.attention) == (("g = h",), False)
    assert len(result.problems) == 2
    # beside a list of all images nothing lies in lists that share nothing
    whole = replace(dataset, lists={"train": ("a", "b"), "all": tuple(labels)})
    assert "duplicates across lists" not in kinds(survey(whole))


@pytest.mark.parametrize(
    ("one", "other", "images", "same"),
    [
        ("dining table", "diningtable", 90, True),
        ("cow", "cows", 90, True),
        ("hrose", "horse", 3, True),
        ("horse", "house", 90, False),
        ("class 1", "class 2", 3, False),
        ("type-1", "type 11", 90, False),
    ],
)
def test_names_that_may_be_one_class(one: str, other: str, images: int, same: bool) -> None:
    assert _may_be_one(one, other, images, 100) is same
    assert _may_be_one(other, one, 100, images) is same


def test_names_of_classes_and_images(tmp_path: Path) -> None:
    labels = {"a": (0,), "b": (1,), "img": (0,)}
    dataset = make(tmp_path, labels, {}, ("cow", "Cow"))
    items = {**dataset.items, "IMG": replace(dataset.items["a"], id="IMG")}
    result = survey(replace(dataset, items=items))
    assert found(result, "class names").names == ("cow (3), Cow (1)",)
    assert found(result, "image names").names == ("img, IMG",)


def test_classes_lists_and_labels_that_are_empty(tmp_path: Path) -> None:
    labels = {"a": (), "b": (), "c": ()}
    dataset = make(tmp_path, labels, {}, lists={"x": ("a", "b"), "y": ("b", "c"), "z": ()})
    result = survey(replace(dataset, notices=("something was noticed",)))
    assert found(result, "empty classes").names == ("cow", "dog")
    assert found(result, "no label").attention  # of every image
    lists = [f for f in result.findings if f.kind == "lists"]
    assert [(f.names, f.attention) for f in lists] == [(("z",), True), (("b",), False)]
    assert lists[1].text == "the lists x and y share 1 image"
    assert found(result, "notice").text == "something was noticed"
    assert result.findings[0].attention and not result.findings[-1].attention


def test_lists_that_others_make_up_are_not_compared(tmp_path: Path) -> None:
    """As COCO's: NAME.labelled, and all of its files together."""
    labels = {"a": (0,), "b": (), "c": (1,), "d": (), "e": (0,)}
    lists = {"train": ("a", "b"), "test": ("c", "d"), "all": tuple("abcd")}
    lists |= {f"{of}.labelled": tuple(i for i in ids if labels[i]) for of, ids in lists.items()}
    lists |= {"mine.labelled": ("c", "e")}
    notice = "2 of 5 images have no label"
    result = survey(make(tmp_path, labels, {}, lists=lists, notices=(notice, "other")))
    texts = [f.text for f in result.findings if f.kind == "lists"]
    assert texts == ["the lists test and mine.labelled share 1 image"]
    # of images without a label a finding tells already
    assert found(result, "no label").names == ("b", "d")
    assert found(result, "notice").text == "other"


def test_json_holds_everything(tmp_path: Path) -> None:
    result = survey(make(tmp_path))
    value = json.loads(json.dumps(result.as_json(), allow_nan=False))
    assert value["co_occurrence"] == {"cow": {"cow": 3, "dog": 2}, "dog": {"cow": 2, "dog": 3}}
    assert value["sizes"]["largest"] == {"height": 8, "width": 6}
    assert value["classes"][1] == {
        "name": "dog",
        "mask_id": 2,
        "images": 3,
        "alone": 1,
        "lists": {"train": 1, "val": 1, "all": 3},
    }
    assert value["lists"][0]["within"] == ["all"]
    assert value["needs_attention"] is False
    assert value["estimate"] is None


def test_the_summary_counts_each_class(tmp_path: Path) -> None:
    lines = survey(make(tmp_path)).summary().splitlines()
    assert lines[0].startswith("fields: 5 images (.png), 2 classes, 3 masks")
    head = next(line for line in lines if line.startswith("class"))
    assert head.split()[:5] == ["class", "images", "train", "val", "alone"]
    rows = [line.split() for line in lines if line.startswith(("cow", "dog"))]
    assert rows == [
        ["cow", "3", "2", "0", "1", "dog", "67", "%"],
        ["dog", "3", "1", "1", "1", "cow", "67", "%"],
    ]


def test_summary_of_many_classes_is_short_and_narrow(tmp_path: Path) -> None:
    names = tuple(f"class number {n}" for n in range(60))
    labels = {f"i{n}": tuple(range(n, 60, 7)) for n in range(12)}
    result = survey(make(tmp_path, labels, {}, names, lists={"all": tuple(labels)}))
    lines = result.summary(80).splitlines()
    assert max(map(len, lines)) <= 80 and len(lines) < 48
    assert "... 36 more" in lines
    # a name with markup is words
    odd = survey(make(tmp_path, {"a": (0,)}, {}, ("[red]cow :cow:",), lists={"all": ("a",)}))
    assert "[red]cow :cow:" in odd.summary()


def test_an_estimate_is_told(tmp_path: Path) -> None:
    seconds, disk = (
        {"train": 3.0, "val": 400.0, "all": 9e4},
        {"train": 10**6, "val": 5, "all": 10**9},
    )
    made = Estimate("net", (1.0, 0.5), True, "cpu", 2, 12, seconds, disk, ("all",))
    result = survey(
        make(tmp_path), estimate=lambda _dataset, sizes: replace(made, timed=len(sizes))
    )
    text = " ".join(result.summary().split())
    assert "5 images timed here with net, scales 1, 0.5 and flip, 2 workers on cpu" in text
    assert "train 2 2 2 3 s 1 MB all" in text and "all 5 4 3 25.0 h 1.0 GB" in text
    assert "The features of all do not fit" in text
    assert result.as_json()["estimate"]["seconds"] == seconds
