"""COCO JSON as other tools write it: read with the right masks, or refused with the question."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from lpcam.cli.main import main
from lpcam.data.masks import read_index_mask

pytest.importorskip("pycocotools", reason="pip install 'lpcam[coco]'")
SIZE = (20, 30)
NAMES = ("a", "b", "c")
OBJECTS = [  # image, class, top, left, bottom, right
    (0, 0, 4, 5, 12, 20),
    (1, 1, 10, 15, 18, 28),
    (2, 0, 0, 0, 6, 6),
    (2, 1, 8, 8, 20, 20),
]
Content = dict[str, Any]
Change = Callable[[Content], Any]


def region(place: int) -> np.ndarray:
    _, _, top, left, bottom, right = OBJECTS[place]
    mask = np.zeros(SIZE, bool)
    mask[top:bottom, left:right] = True
    return mask


def truth(image: int) -> np.ndarray:
    mask = np.zeros(SIZE, np.uint8)
    for place, (of, kind, *_) in enumerate(OBJECTS):
        if of == image:
            mask[region(place)] = kind + 1
    return mask


def runs(mask: np.ndarray, start: int = 0) -> list[int]:
    flat = mask.T.reshape(-1)
    counts = np.diff([0, *np.flatnonzero(np.diff(flat.astype(int))) + 1, flat.size]).tolist()
    return [0, *counts] if flat[0] else counts


def code(place: int, *, compressed: bool = False) -> dict[str, Any]:
    shape = {"size": [*SIZE], "counts": runs(region(place))}
    if not compressed:
        return shape
    from pycocotools import mask as coder  # noqa: PLC0415

    return {**shape, "counts": coder.frPyObjects(shape, *SIZE)["counts"].decode()}


def plain() -> Content:
    """What COCO itself would hold."""
    images = [
        {"id": n + 1, "file_name": f"{name}.png", "height": SIZE[0], "width": SIZE[1]}
        for n, name in enumerate(NAMES)
    ]
    annotations = [
        {
            "id": n + 1,
            "image_id": image + 1,
            "category_id": kind + 1,
            "iscrowd": 0,
            "area": (bottom - top) * (right - left),
            "bbox": [left, top, right - left, bottom - top],
            "segmentation": [[left, top, right, top, right, bottom, left, bottom]],
        }
        for n, (image, kind, top, left, bottom, right) in enumerate(OBJECTS)
    ]
    categories = [{"id": 1, "name": "cow"}, {"id": 2, "name": "dog"}]
    return {"images": images, "annotations": annotations, "categories": categories}


def each(kind: str, **fields: Any) -> Change:
    """Sets fields of every entry; functions get its place and the entry, None removes the field."""

    def change(content: Content) -> None:
        for n, entry in enumerate(content[kind]):
            for key, value in fields.items():
                entry[key] = value(n, entry) if callable(value) else value
                if entry[key] is None:
                    del entry[key]

    return change


def both(*changes: Change) -> Change:
    def change(content: Content) -> None:
        for one in changes:
            one(content)

    return change


def named(pattern: str, key: str = "file_name") -> Change:
    names = {key: lambda n, _: pattern.format(NAMES[n])}
    return each("images", **({"file_name": None} | names))


def drop(kind: str, *keys: str) -> Change:
    return each(kind, **dict.fromkeys(keys))


def shapes(make: Callable[[list[float]], Any]) -> Change:
    return each("annotations", segmentation=lambda _, one: make(one["segmentation"][0]))


def pairs(polygon: list[float]) -> list[list[float]]:
    return [polygon[n : n + 2] for n in range(0, len(polygon), 2)]


def listed_twice(content: Content, **fields: Any) -> None:
    content["images"].append({**content["images"][0], "id": 77, **fields})
    content["annotations"][0]["image_id"] = 77


def two_ids_of_one_name(content: Content, parents: tuple[str, str] = ("", "")) -> None:
    content["categories"].append({"id": 9, "name": "cow", "supercategory": parents[1]})
    content["categories"][0]["supercategory"] = parents[0]
    content["categories"][1]["supercategory"] = parents[0]
    content["annotations"][2]["category_id"] = 9


def roboflow(content: Content) -> None:
    each("categories", supercategory="farm")(content)
    content["categories"].insert(0, {"id": 0, "name": "farm", "supercategory": "none"})


READ: dict[str, tuple[Change, list[str]]] = {
    "text ids": (
        both(
            each("images", id=lambda n, _: f"img-{n}"),
            each("annotations", image_id=lambda _, one: f"img-{one['image_id'] - 1}"),
        ),
        [],
    ),
    "ids as text and floats, pylabel": (
        each(
            "annotations",
            image_id=lambda _, one: str(one["image_id"]),
            category_id=lambda _, one: float(one["category_id"]),
            iscrowd="0",
        ),
        [],
    ),
    "no sizes": (drop("images", "height", "width"), []),
    "sizes of 0": (each("images", height=0, width=0), []),
    "sizes as floats and text": (each("images", height="20", width=30.0), []),
    "listed twice": (listed_twice, ["listed twice (ids 1 and 77)"]),
    "absolute names": (named("/home/me/farm/{}.png"), ["by the end of"]),
    "Windows names": (named(r"C:\Users\me\farm\{}.png"), ["by the end of"]),
    "addresses, LVIS": (
        both(named("http://host/2017/{}.png?x=1", "coco_url"), each("images", neg_category_ids=[])),
        ["by the end of"],
    ),
    "files on a drive": (named("file:///C:/farm/{}.png", "path"), ["by the end of"]),
    "Label Studio 1.16": (named(r"..\..\label-studio\media\upload\4\{}.png"), ["by the end of"]),
    "Label Studio, local": (named("/data/local-files/?d=farm%2F{}.png"), ["by the end of"]),
    "Label Studio, folder": (named("../images/{}.png"), []),
    "nothing but what is needed": (drop("annotations", "iscrowd", "area", "bbox", "id"), []),
    "annotation ids per image, CVAT": (each("annotations", id=0), []),
    "categories from 0 with gaps": (
        both(
            each("categories", id=lambda n, _: n * 7),
            each("annotations", category_id=lambda _, one: one["category_id"] * 7 - 7),
        ),
        [],
    ),
    "two ids of one name, labelme2coco": (two_ids_of_one_name, ["'cow' has the ids 1 and 9"]),
    "Roboflow's parent": (roboflow, ["is no class: farm"]),
    "polygon not in a list, myvision": (shapes(lambda p: p), []),
    "polygon in two lists": (shapes(lambda p: [[p]]), []),
    "points as pairs": (shapes(lambda p: [pairs(p)]), []),
    "pairs not in a list": (shapes(pairs), []),
    "compressed": (
        each("annotations", segmentation=lambda n, _: code(n, compressed=True)),
        [],
    ),
    "compressed, str() of bytes": (
        each(
            "annotations",
            segmentation=lambda n, _: {
                **(shape := code(n, compressed=True)),
                "counts": str(shape["counts"].encode()),
            },
        ),
        [],
    ),
    "background without annotations": (
        lambda content: content["categories"].insert(0, {"id": 0, "name": "_background_"}),
        [],
    ),
    "not a number": (each("annotations", area=float("nan"), bbox=[float("nan")] * 4), []),
}


def write(
    root: Path, content: Any, name: str = "farm.json", folder: str = "images", ending: str = ".png"
) -> Path:
    for image in range(len(NAMES)):
        path = root / folder / f"{NAMES[image]}{ending}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(truth(image) * 90).convert("RGB").save(path)
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return path


def check_masks(path: Path, masks: Path, *options: str, least: float = 0.95) -> None:
    assert main(["data", "masks", str(path), str(masks), *options]) == 0
    for image, name in enumerate(NAMES):
        found = read_index_mask(next(masks.rglob(f"{name}.png")))
        for value in np.unique(truth(image)):
            one, other = found == value, truth(image) == value
            assert (one & other).sum() >= least * (one | other).sum(), (name, value)


def check(path: Path, masks: Path, *options: str) -> None:
    """The masks are right, labels agree with them, and a recipe of the two classes is written."""
    check_masks(path, masks, *options)
    assert main(["data", "check", str(path), "--no-estimate", *options]) == 0
    assert main(["init", str(path), *options]) == 0
    recipe = path.parent if path.is_file() else path
    data = yaml.safe_load((recipe / "recipe.yaml").read_text())["data"]
    assert data["classes"] == ["cow", "dog"]
    if "--crowds" in options:
        assert data["coco"] == {"crowds": options[-1]}


@pytest.mark.parametrize("name", READ)
def test_what_has_one_meaning_is_read(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, told = READ[name]
    content = plain()
    change(content)
    check(write(tmp_path / "farm", content), tmp_path / "masks")
    printed = " ".join(capsys.readouterr().out.split())
    for text in told:
        assert text in printed


def test_objects_that_mean_ignore_are_void(tmp_path: Path) -> None:
    content = plain()
    content["categories"].append({"id": 3, "name": "void"})
    content["annotations"][3]["category_id"] = 3
    path = write(tmp_path / "farm", content)
    assert main(["data", "masks", str(path), str(tmp_path / "masks")]) == 0
    mask = read_index_mask(tmp_path / "masks" / "c.png")
    assert np.array_equal(mask == 255, truth(2) == 2)
    assert np.array_equal(mask == 1, truth(2) == 1)


@pytest.mark.parametrize("shape", ["polygon", "runs"])
def test_crowds_that_may_be_objects_are_asked_for(
    shape: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """CVAT's brush masks, and polygons that a tool marked."""
    content = plain()
    each("annotations", iscrowd=1)(content)
    if shape == "runs":
        each("annotations", segmentation=lambda n, _: code(n))(content)
    name, folder = "annotations/instances_default.json", "images/default"
    root = write(tmp_path / "farm", content, name, folder).parent.parent
    for command in (["init"], ["data", "check"], ["data", "masks"]):
        more = [str(tmp_path / "x")] if "masks" in command else []
        assert main([*command, str(root), *more]) == 2
        assert "CVAT" in (error := capsys.readouterr().err) and "--crowds objects" in error
    check(root, tmp_path / "masks", "--crowds", "objects")
    if shape == "polygon":
        return
    assert main(["data", "masks", str(root), str(tmp_path / "none"), "--crowds", "void"]) == 0
    void = read_index_mask(tmp_path / "none" / "a.png")
    assert np.array_equal(void == 255, truth(0) > 0)


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("labels.json", "data"),  # fiftyone
        ("annotations/person_keypoints_default.json", "images/default"),  # CVAT
        ("annotations/instances_train2017.json", "train2017"),  # mmdetection
        ("result.json", "images"),  # Label Studio
        ("_annotations.coco.json", "."),  # Roboflow
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_layouts_and_encodings(tmp_path: Path, name: str, folder: str, encoding: str) -> None:
    text = json.dumps(plain()).encode(encoding)
    path = write(tmp_path / "farm", text, name, folder)
    check_masks(path, tmp_path / "masks")
    check_masks(tmp_path / "farm", tmp_path / "masks of the folder")


def test_sizes_are_those_of_the_upright_image(tmp_path: Path) -> None:
    content = plain()
    drop("images", "height", "width")(content)
    path = write(tmp_path / "farm", content)
    turned = Image.fromarray(np.rot90(truth(0)) * 90)
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying, turned clockwise to be upright
    turned.save(path.parent / "images" / "a.png", exif=exif)
    check(path, tmp_path / "masks")


def test_endings_in_capitals(tmp_path: Path) -> None:
    check(write(tmp_path / "farm", plain(), ending=".PNG"), tmp_path / "masks")


@pytest.mark.parametrize("shape", [[], [[]], {}, None])
def test_boxes_are_labels_without_masks(
    shape: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = plain()
    content["annotations"][0]["segmentation"] = shape
    path = write(tmp_path / "farm", content)
    assert main(["init", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "3 images with labels, 2 of them with masks" in printed
    assert "cow: 2" in printed


def at(kind: str, place: int, **fields: Any) -> Change:
    return lambda content: content[kind][place].update(fields)


def another_path(content: Content) -> None:
    content["images"][0]["file_name"] = "/one/a.png"
    content["images"][1]["file_name"] = "/two/a.png"


def without(key: str) -> Change:
    return lambda content: content.pop(key)


def instead(value: Any) -> Change:
    def change(content: Content) -> None:
        content.clear()
        content["instead"] = value

    return change


REFUSED: dict[str, tuple[Change, str]] = {
    "ids 1 and '1'": (at("images", 1, id="1"), "two images have the id 1"),
    "one id of two files, VIA": (at("images", 1, id=1), "two images have the id 1"),
    "sizes contradict": (
        lambda content: listed_twice(content, width=99),
        "listed twice (ids 1 and 77)",
    ),
    "two paths, one file": (another_path, "'/two/a.png'"),
    "unknown image": (at("annotations", 1, image_id=8), "image_id 8 is unknown"),
    "unknown category": (at("annotations", 1, category_id=8), "category_id 8 is unknown"),
    "text category, VIA": (at("annotations", 1, category_id=None), "category_id None"),
    "one name in two attributes, VIA": (
        lambda content: two_ids_of_one_name(content, ("kind", "mother")),
        "mother",
    ),
    "item_id": (drop("annotations", "image_id"), "image_id"),
    "no categories": (without("categories"), "'categories'"),
    "image_info": (without("annotations"), "image_info"),
    "panoptic": (at("annotations", 0, segments_info=[], file_name="a.png"), "panopticapi"),
    "captions": (at("annotations", 0, caption="A cow."), "captions"),
    "LabelMe": (instead({"shapes": [], "imagePath": "a.png"}), "LabelMe"),
    "VIA": (instead({"a.png9": {"regions": [{"region_attributes": {}}]}}), "VIA"),
    "CreateML": (instead([{"annotations": [{"coordinates": {"x": 1}}]}]), "CreateML"),
    "a list of tasks": (instead([{"a": 1}]), "label_studio"),
    "results": (instead([{"image_id": 1, "category_id": 1, "score": 0.5}]), "results"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_several_meanings_is_refused(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, phrase = REFUSED[name]
    content = plain()
    change(content)
    path = write(tmp_path / "farm", content.get("instead", content))
    for command in (["init"], ["data", "check"]):
        assert main([*command, str(path)]) == 2
        assert phrase in capsys.readouterr().err


def test_a_file_that_is_elsewhere_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "farm", plain(), folder="photographs")
    assert main(["init", str(path)]) == 2
    assert "there is " + str(tmp_path / "farm" / "photographs" / "a.png") in capsys.readouterr().err


def test_one_of_several_files_is_not_guessed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = plain()
    named("C:/x/{}.png")(content)
    path = write(tmp_path / "farm", content)
    write(tmp_path / "farm", content, folder="farm")
    assert main(["init", str(path)]) == 2
    error = capsys.readouterr().err
    assert "images/a.png" in error
    assert "farm/a.png" in error
    path.unlink()
    zipped = write(tmp_path / "farm", b"\x1f\x8b\x08", "farm.json.gz")
    assert main(["init", str(zipped)]) == 2
    assert "gunzip" in capsys.readouterr().err


@pytest.mark.parametrize("polygon", [[1, 1, 5, 5], [1, 1, 5, 1, 5, 5, 9], [0.1, 0.1, 1, 0.1, 1, 1]])
def test_outlines_that_cannot_be_painted_are_listed(
    polygon: list[float], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = plain()
    content["annotations"][0]["segmentation"] = [polygon]
    path = write(tmp_path / "farm", content)
    assert main(["data", "check", str(path), "--no-estimate"]) == 1
    printed = " ".join(capsys.readouterr().out.split())
    assert "1 image with wrong annotations (farm.json: annotation 1 cannot be painted" in printed


@pytest.mark.parametrize("hole", [False, True])
def test_files_of_supervision_are_read(
    hole: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Polygons through the centres of pixels; masks with holes are run lengths of crowds."""
    supervision = pytest.importorskip("supervision")
    root = tmp_path / "farm"
    path = write(root, plain())
    masks = [region(n) for n in range(len(OBJECTS))]
    for mask, (_, _, top, left, *_) in zip(masks, OBJECTS, strict=True):
        mask[top + 2, left + 2] = not hole
    found = {}
    for image, name in enumerate(NAMES):
        places = [n for n, one in enumerate(OBJECTS) if one[0] == image]
        found[str(root / "images" / f"{name}.png")] = supervision.Detections(
            xyxy=np.zeros((len(places), 4)),
            mask=np.stack([masks[n] for n in places]),
            class_id=np.array([OBJECTS[n][1] for n in places]),
        )
    dataset = supervision.DetectionDataset(["cow", "dog"], [*found], found)
    dataset.as_coco(annotations_path=str(path))
    if not hole:
        return check_masks(path, tmp_path / "masks", least=0.6)
    assert main(["init", str(path)]) == 2
    assert "supervision" in capsys.readouterr().err
    return check_masks(path, tmp_path / "masks", "--crowds", "objects")
