"""COCO: labels, order and painted masks are those of pycocotools; lists, layouts and bad files."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import lpcam.data.coco.painting as module
from lpcam.data.coco.dataset import AnnotatedImages, read_coco
from lpcam.data.coco.index import CocoAnnotation, compact
from lpcam.data.coco.painting import paint
from lpcam.data.masks import read_index_mask
from lpcam.runtime.errors import ArtefactError, DataError, LpcamError

SIZE = (40, 60)
CATEGORIES = [{"id": i, "name": name} for i, name in ((7, "train"), (2, "bicycle"), (90, "brush"))]


def box(x: float, y: float, width: float, height: float) -> list[float]:
    return [x, y, x + width, y, x + width, y + height, x, y + height]


def runs(mask: np.ndarray) -> list[int]:
    """Lengths of runs of 0, 1, 0, ... down the columns."""
    flat = mask.T.reshape(-1)
    ends = np.flatnonzero(np.diff(flat.astype(int))) + 1
    counts = np.diff([0, *ends, flat.size]).tolist()
    return [0, *counts] if flat[0] else counts


def whole(**changes: Any) -> dict[str, Any]:
    """A small file: crowds, both run-length codes, several polygons, overlapping objects."""
    coder = pytest.importorskip("pycocotools.mask", reason="pip install 'lpcam[coco]'")
    generator = np.random.default_rng(0)
    blobs = generator.random((3, *SIZE)) < 0.3
    text = coder.encode(np.asfortranarray(blobs[1].astype(np.uint8)))["counts"].decode()
    images = [
        {"id": i, "file_name": f"COCO_train2014_{i:012d}.jpg", "height": SIZE[0], "width": SIZE[1]}
        for i in (30, 9, 25, 581)
    ]
    shapes: list[tuple[int, int, int, Any]] = [
        (9, 7, 0, [box(5, 5, 30, 20)]),
        (30, 2, 0, [box(3.3, 1.7, 12.2, 30.1), box(30, 10, 45.5, 8)]),  # leaves the image
        (9, 2, 0, [box(10, 8, 4, 4), [40, 2, 55, 2, 47.5, 30]]),
        (9, 90, 1, {"size": [*SIZE], "counts": runs(blobs[0])}),
        (25, 90, 1, {"size": [*SIZE], "counts": runs(blobs[2])}),
        (30, 7, 0, {"size": [*SIZE], "counts": text}),
        (9, 7, 0, [box(0, 0, 12, 12)]),
    ]
    names = ("image_id", "category_id", "iscrowd", "segmentation")
    annotations = [
        {**dict(zip(names, values, strict=True)), "area": 1000.0 - n, "bbox": [0], "id": 100 - n}
        for n, values in enumerate(shapes)
    ]
    content = {"images": images, "annotations": annotations, "categories": CATEGORIES, **changes}
    return json.loads(json.dumps(content))  # a copy of its own, to be changed by a test


def write(root: Path, name: str = "annotations/instances_train2014.json", **changes: Any) -> Path:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(whole(**changes)))
    return path


def images(folder: Path, content: dict[str, Any] | None = None) -> None:
    for image in (content or whole())["images"]:
        path = folder / image["file_name"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "MSCOCO"
    write(root)
    images(root / "train2014")
    return root


def test_labels_order_and_masks_are_those_of_pycocotools(root: Path, tmp_path: Path) -> None:
    api_module = pytest.importorskip("pycocotools.coco")
    api = api_module.COCO(str(root / "annotations/instances_train2014.json"))
    folder = read_coco(root)
    dataset = folder.dataset
    numbers = sorted(api.imgs)
    assert dataset.lists["train2014"] == tuple(f"COCO_train2014_{n:012d}" for n in numbers)
    assert dataset.lists["all"] == dataset.lists["train2014"] == tuple(dataset.items)
    assert dataset.lists["train2014.labelled"] == dataset.lists["all.labelled"]
    assert dataset.lists["all"][:-1] == dataset.lists["all.labelled"]  # 581 shows nothing
    categories = sorted(api.cats)
    assert dataset.classes.names == ("bicycle", "train", "brush")
    assert dataset.classes.mask_ids == (1, 2, 3)
    assert dataset.label_source == "annotations (instances_train2014.json), crowds included"
    painted = folder.with_masks(tmp_path / "masks", dataset.items)
    for number, item in zip(numbers, painted.items.values(), strict=True):
        annotations = api.loadAnns(api.getAnnIds(imgIds=[number]))
        assert item.labels == tuple(
            sorted({categories.index(a["category_id"]) for a in annotations})
        )
        assert item.image == root / "train2014" / f"{item.id}.jpg"
        expected = np.zeros(SIZE, dtype=np.uint8)
        for annotation in annotations:
            if not annotation["iscrowd"]:
                region = api.annToMask(annotation).astype(bool)
                expected[region] = categories.index(annotation["category_id"]) + 1
        assert item.mask == tmp_path / "masks" / f"{item.id}.png"
        assert np.array_equal(read_index_mask(item.mask), expected)
    assert all(item.mask is None for item in dataset.items.values())
    assert not read_index_mask(tmp_path / "masks/COCO_train2014_000000000025.png").any()


def test_notices_count_what_masks_do_not_show(root: Path) -> None:
    notices = read_coco(root, classes=["brush", "train"]).dataset.notices
    counts = [re.findall(r"\d+|brush|bicycle", text) for text in notices]
    assert counts == [["2", "2"], ["brush"], ["bicycle", "2"], ["1", "4"]]


def test_boxes_alone_are_labels_without_masks(root: Path, tmp_path: Path) -> None:
    """What many tools export: enough for labels, nothing to score masks with."""
    write(root, annotations=changed("annotations", 0, segmentation=None)["annotations"])
    folder, bare = read_coco(root), "COCO_train2014_000000000009"
    assert folder.dataset.items[bare].labels
    assert any("without an outline" in text for text in folder.dataset.notices)
    painted = folder.with_masks(tmp_path / "masks", folder.dataset.items)
    without = [name for name, item in painted.items.items() if item.mask is None]
    assert without == [bare]


def test_chosen_classes_keep_their_mask_values(root: Path, tmp_path: Path) -> None:
    folder = read_coco(root, classes=["brush", "bicycle"])
    assert folder.dataset.classes.names == ("brush", "bicycle")
    assert folder.dataset.classes.mask_ids == (3, 1)
    assert [item.labels for item in folder.dataset.items.values()] == [(0, 1), (0,), (1,), ()]
    one = folder.dataset.lists["all"][0]
    masks = folder.with_masks(tmp_path / "masks", [one])
    assert masks.items[one].mask is not None
    assert set(np.unique(read_index_mask(masks.items[one].mask))) == {0, 1, 2}
    assert sum(item.mask is not None for item in masks.items.values()) == 1
    with pytest.raises(DataError, match=r"'bicyle' .*'bicycle'"):
        read_coco(root, classes=["bicyle"])


@pytest.mark.parametrize(
    ("annotations", "folder", "name"),
    [
        ("annotations/instances_mine.json", "mine", "mine"),
        ("annotations/mine.json", "images/mine", "mine"),
        ("mine/_annotations.coco.json", "mine", "mine"),
        ("mine.json", "images", "mine"),
        ("annotations.json", ".", "all"),
        ("annotations/instances_mine.json", "annotations", "mine"),
    ],
)
def test_layouts(tmp_path: Path, annotations: str, folder: str, name: str) -> None:
    root = tmp_path / "set"
    path = write(root, annotations)
    images(root / folder)
    for given in (root, path):
        for lists in (None, [name], [f"{name}.labelled"], ["all"]):
            dataset = read_coco(given, lists=lists).dataset
            assert len(dataset.lists[name]) == len(dataset.lists["all"]) == 4
            assert len(dataset.lists[f"{name}.labelled"]) == 3
            first = dataset.items["COCO_train2014_000000000009"]
            assert first.image.is_file()
            assert first.image.parent.resolve() == (root / folder).resolve()


def test_files_with_different_categories(root: Path) -> None:
    more = [*CATEGORIES, {"id": 5, "name": "x"}]
    write(root, "annotations/instances_val2014.json", categories=more)
    with pytest.raises(DataError, match=r"have different categories, first 5 \(x\)"):
        read_coco(root)


def test_only_the_files_that_lists_need_are_read(root: Path) -> None:
    other = [{**i, "id": i["id"] + 1, "file_name": f"v{i['id']}.jpg"} for i in whole()["images"]]
    write(root, "annotations/instances_val2014.json", images=other, annotations=[])
    images(root / "val2014", {"images": other})
    both = read_coco(root).dataset
    assert both.lists["val2014"] == tuple(f"val2014/v{n}" for n in (9, 25, 30, 581))
    assert both.lists["val2014.labelled"] == ()
    assert both.lists["all"] == both.lists["train2014"] + both.lists["val2014"]
    assert both.label_source == (
        "annotations (instances_train2014.json, instances_val2014.json), crowds included"
    )
    (root / "annotations/instances_train2014.json").write_text("broken")
    one = read_coco(root, lists=["val2014.labelled"]).dataset
    assert set(one.items) == set(both.lists["val2014"])
    with pytest.raises(DataError, match=r"instances_train2014.json cannot be read as JSON"):
        read_coco(root, lists=["val2014", "all"])


def test_names_that_are_not_cocos_own_get_the_lists_name(tmp_path: Path) -> None:
    for name in ("train", "valid"):
        write(tmp_path, f"{name}/_annotations.coco.json")
        images(tmp_path / name)
    dataset = read_coco(tmp_path).dataset
    assert len(dataset.items) == 8
    assert dataset.lists["valid"][0] == "valid/COCO_train2014_000000000009"
    item = dataset.items["train/COCO_train2014_000000000009"]
    assert item.image == tmp_path / "train" / "COCO_train2014_000000000009.jpg"
    assert dataset.label_source == (
        "annotations (train/_annotations.coco.json, valid/_annotations.coco.json), crowds included"
    )
    # whatever is read: an image is called the same in every command
    for name in ("train", "valid"):
        one = read_coco(tmp_path, lists=[name]).dataset
        assert one.lists[name] == tuple(one.items) == dataset.lists[name]
    # a file that is itself the root is the only one of its data set
    path = tmp_path / "train" / "_annotations.coco.json"
    assert "COCO_train2014_000000000009" in read_coco(path).dataset.items


def test_one_id_of_two_files_is_refused(tmp_path: Path) -> None:
    """A list that is named beside the only one that is found."""
    for name, image in (("annotations/instances_a.json", "b/1.jpg"), ("b.json", "1.jpg")):
        write(tmp_path, name, images=[{**whole()["images"][0], "file_name": image}], annotations=[])
        images(tmp_path / "a", {"images": [{"file_name": image}]})
    with pytest.raises(DataError, match=r"instances_a\.json and .*b\.json .*'b/1'"):
        read_coco(tmp_path, lists=["a", "b"])


def test_names_in_folders_with_accents_and_backslashes(tmp_path: Path) -> None:
    names = ["./a/Kühe 1.JPG", "b\\c\\x.y.png", "no_ending", "a/d.jpeg"]
    content = whole()["images"]
    for image, name in zip(content, names, strict=True):
        image["file_name"] = name
    path = write(tmp_path, "set.json", images=content)
    for name in ("a/Ku\u0308he 1.JPG", "b/c/x.y.png", "no_ending", "a/d.jpeg"):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / name).touch()
    dataset = read_coco(path).dataset
    # ids 9, 25, 30, 581
    assert dataset.lists["all"] == ("b/c/x.y", "no_ending", "a/K\u00fche 1", "a/d")
    assert all(item.image.is_file() for item in dataset.items.values())
    named = {item.file_name: item.image for item in dataset.items.values()}
    assert list(named) == ["b/c/x.y.png", "no_ending", "a/Ku\u0308he 1.JPG", "a/d.jpeg"]
    assert all(path == tmp_path / "images" / (name or "") for name, path in named.items())


def test_missing_images_are_left_out_with_one_reason(root: Path) -> None:
    for number in (9, 25):
        (root / "train2014" / f"COCO_train2014_{number:012d}.jpg").unlink()
    dataset = read_coco(root).dataset
    assert dataset.lists["all"] == tuple(f"COCO_train2014_{n:012d}" for n in (30, 581))
    assert [skip.id[-3:] for skip in dataset.skipped] == ["009", "025"]
    assert str(root / "train2014") in dataset.skipped[0].reason


def test_no_image_at_all(root: Path) -> None:
    for path in (root / "train2014").iterdir():
        path.unlink()
    message = r"none of the 4 images of .* 'COCO_train2014_000000000009.jpg'"
    for lists in (None, ["train2014"]):
        with pytest.raises(DataError, match=message):
            read_coco(root, lists=lists)
    write(root, "annotations/instances_val2014.json")
    images(root / "val2014")
    dataset = read_coco(root).dataset  # only what is asked for by name must be there
    assert dataset.lists["train2014"] == ()
    assert len(dataset.lists["val2014"]) == 4
    with pytest.raises(DataError, match=message):
        read_coco(root, lists=["train2014", "val2014"])


def test_missing_files_and_lists(root: Path, tmp_path: Path) -> None:
    for path, lists, message in (
        (tmp_path / "none", None, "none"),
        (root, ["val"], "'val' .*train2014, all"),
        (root / "annotations/instances_train2014.json", ["val"], "'val'.* train2014, all"),
        (root, ["../train2014"], "'../train2014'"),
        (root / "train2014", None, "'all'"),
    ):
        with pytest.raises(DataError, match=message):
            read_coco(path, lists=lists)


def changed(kind: str, place: int, **fields: Any) -> dict[str, Any]:
    """One entry changed; a field that is None is left out."""
    content = whole()
    content[kind][place].update(fields)
    content[kind][place] = {k: v for k, v in content[kind][place].items() if v is not None}
    return content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda: {**whole(), "images": []}, "'images'"),
        (lambda: {k: v for k, v in whole().items() if k != "annotations"}, "'annotations'"),
        (lambda: {**whole(), "annotations": [3]}, "annotation 0 .* 3"),
        (lambda: changed("annotations", 2, category_id=3), "annotation 98: category_id 3 "),
        (lambda: changed("annotations", 2, image_id=77), "annotation 98: image_id 77 "),
        (lambda: changed("annotations", 2, iscrowd=2), "iscrowd 2"),
        (lambda: changed("images", 1, height=-1), "images 1 height.*-1"),
        (lambda: changed("images", 1, width=4.5), "width.*got 4.5"),
        (lambda: changed("images", 1, file_name="a\udc80.jpg"), "file_name"),
        (
            lambda: changed("images", 1, file_name="COCO_train2014_000000000030.png"),
            "id 'COCO_train2014_000000000030'",
        ),
        (lambda: changed("categories", 1, name="train", supercategory="b"), "repeat: train"),
        (lambda: b'{"images": [1, 2', "JSON.*char 16"),
        (lambda: b'{"images": ' + b"[" * 100_000, "JSON.*recursion"),
        (lambda: b"[1]", "dictionary"),
    ],
)
def test_wrong_annotation_files(root: Path, content: Callable[[], Any], message: str) -> None:
    path, made = root / "annotations/instances_train2014.json", content()
    path.write_bytes(made if isinstance(made, bytes) else json.dumps(made).encode())
    with pytest.raises(DataError, match=message) as caught:
        read_coco(root)
    assert str(path) in str(caught.value)


def annotation(
    shape: Any, category: int = 1, *, crowd: bool = False, area: float | None = None
) -> CocoAnnotation:
    return CocoAnnotation(5, 1, category, crowd, area, compact(shape))


def code(mask: np.ndarray) -> dict[str, Any]:
    return {"size": [*mask.shape], "counts": runs(mask)}


def test_order_and_crowds() -> None:
    large, small, crowd = (np.zeros((4, 6), dtype=bool) for _ in range(3))
    large[:3, :4] = True
    small[1, 1] = True
    crowd[:, 3:5] = True
    objects = [
        annotation(code(small), 2, area=1),
        annotation(code(crowd), 1, crowd=True, area=8),
        annotation(code(large), 1, area=12),
    ]
    values = {1: 10, 2: 20}
    later = np.where(large, 10, 0)
    assert np.array_equal(paint(objects, (4, 6), values), later)
    sorted_ = np.where(small, 20, later)
    assert np.array_equal(paint(objects, (4, 6), values, order="area"), sorted_)
    void = np.where(crowd & (later == 0), 255, later)
    assert np.array_equal(paint(objects, (4, 6), values, crowds="void"), void)
    objects = [one._replace(area=None) for one in objects]
    assert np.array_equal(paint(objects, (4, 6), values, order="area"), sorted_)
    assert not paint([], (4, 6), values).any()


def test_run_length_codes_are_those_of_pycocotools() -> None:
    coder = pytest.importorskip("pycocotools.mask")
    generator = np.random.default_rng(1)
    for number in range(60):
        size = tuple(generator.integers(1, 90, 2).tolist())
        mask = generator.random(size) < generator.choice([0.02, 0.5, 0.98])
        if number % 3 == 0:  # long runs: numbers of several characters
            mask[:] = False
            mask[: size[0] // 2, : size[1] // 2] = True
        text = coder.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()
        for counts in (text, runs(mask)):
            shape = {"size": [*size], "counts": counts}
            assert np.array_equal(paint([annotation(shape)], size, {1: 1}), mask)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"size": [4, 5], "counts": [20]}, r"\[4, 5\], .* \[4, 6\]"),
        ({"size": [4, 6], "counts": [20]}, "20 pixels, .* 24"),
        ({"size": [4, 6], "counts": [30, -6]}, "counts"),
        ({"size": [4, 6], "counts": "z"}, "'z'"),
        ({"size": [4, 6], "counts": "P"}, "truncated"),
        ({"size": [4, 6], "counts": "o" * 30}, "'o'"),
        ([[0, 0, 3, 3]], "4 coordinates"),
        ([[0, 0, 3, 0, 3, 3], []], "0 coordinates"),
        ([[0, 0, 3, 0, 3, float("nan")]], "NaN"),
        ([[0, 0, 3, 0, 3, 10**400]], "polygon"),
        ([[0, 0, 3, 0, 3, 1e9]], "4 x 6"),
        ([[0, 0, 3, 0, 3, "3"]], "polygon"),
        (None, "no segmentation"),
    ],
)
def test_wrong_segmentations(shape: Any, message: str) -> None:
    with pytest.raises(DataError, match=f"annotation 5 .*{message}"):
        paint([annotation(shape)], (4, 6), {1: 1})


def test_what_else_cannot_be_painted() -> None:
    crowd = annotation([[0, 0, 3, 0, 3, 3]], crowd=True)
    with pytest.raises(DataError, match=r"annotation 5 .*crowd"):
        paint([crowd], (4, 6), {1: 1}, crowds="void")
    with pytest.raises(DataError, match="20000 x 20000"):
        paint([], (20_000, 20_000), {1: 1})


def test_polygons_need_pycocotools(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = read_coco(root)
    monkeypatch.setitem(sys.modules, "pycocotools.mask", None)
    with pytest.raises(LpcamError, match=r"'lpcam\[coco\]'"):
        folder.with_masks(tmp_path / "masks", folder.dataset.items)


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.png")}


def counted(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The masks that are written from now on."""
    written: list[Path] = []
    original = module.write_mask

    def write_mask(path: Path, mask: Any) -> None:
        written.append(path)
        original(path, mask)

    monkeypatch.setattr(module, "write_mask", write_mask)
    return written


def test_only_missing_masks_are_painted_by_any_number_of_workers(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, masks = read_coco(root), tmp_path / "masks"
    ids = folder.dataset.lists["all"]
    folder.with_masks(masks, ids[:2])
    with monkeypatch.context() as patch:
        written = counted(patch)
        dataset = read_coco(root).with_masks(masks, ids)
    assert [path.stem for path in written] == [*ids[2:]]
    assert dataset.items[ids[0]].mask == masks / f"{ids[0]}.png"
    folder.with_masks(tmp_path / "fresh", ids, workers=3)
    assert bytes_of(masks) == bytes_of(tmp_path / "fresh")
    assert len(bytes_of(masks)) == 4


@pytest.mark.parametrize("change", ["order", "crowds", "file", "values"])
def test_masks_of_something_else_are_painted_again(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    folder, masks = read_coco(root), tmp_path / "masks"
    ids = folder.dataset.lists["all"]
    folder.with_masks(masks, ids)
    options: dict[str, Any] = {}
    if change == "file":
        write(root, info={"version": 2})
    elif change == "values":
        write(root, categories=[{"id": 1, "name": "new"}, *CATEGORIES])
    else:
        options = {"order": "area"} if change == "order" else {"crowds": "void"}
    written = counted(monkeypatch)
    folder = read_coco(root)
    folder.with_masks(masks, ids[:1], **options)
    assert [path.stem for path in written] == [ids[0]]
    assert set(bytes_of(masks)) == {f"{ids[0]}.png"}  # no old one is left to be taken for new
    folder.with_masks(masks, ids, **options)
    folder.with_masks(tmp_path / "fresh", ids, **options)
    assert bytes_of(masks) == bytes_of(tmp_path / "fresh")


def test_a_stop_loses_no_mask_and_leaves_no_old_one(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, masks = read_coco(root), tmp_path / "masks"
    ids = folder.dataset.lists["all"]
    folder.with_masks(tmp_path / "fresh", ids, crowds="void")
    folder.with_masks(masks, ids)
    original = Path.unlink

    def stop(path: Path, missing_ok: bool = False) -> None:
        if path.name == f"{ids[1]}.png":
            raise KeyboardInterrupt
        original(path, missing_ok)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "unlink", stop)
        folder.with_masks(masks, ids, crowds="void")
    assert len(bytes_of(masks)) == 3
    folder.with_masks(masks, ids, crowds="void")
    assert bytes_of(masks) == bytes_of(tmp_path / "fresh")


def test_two_files_share_a_folder_of_masks(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = [{**image, "file_name": f"v{image['id']}.jpg"} for image in whole()["images"]]
    write(root, "annotations/instances_val2014.json", images=other)
    images(root / "val2014", {"images": other})
    # the images of train2014 again, with nothing on them
    empty = write(tmp_path, "empty.json", annotations=[])
    images(tmp_path / "empty")
    masks = tmp_path / "masks"

    def paint_list(name: str, **options: Any) -> int:
        with monkeypatch.context() as patch:
            written = counted(patch)
            folder = read_coco(empty) if name == "empty" else read_coco(root, lists=[name])
            folder.with_masks(masks, folder.dataset.lists[name], **options)
        return len(written)

    assert [paint_list(name) for name in ("train2014", "val2014", "train2014", "val2014")] == [
        4, 4, 0, 0
    ]  # fmt: skip
    assert paint_list("val2014", crowds="void") == 4  # options of one list are its own
    assert paint_list("train2014") == 0
    assert paint_list("empty") == 4
    assert not read_index_mask(masks / "COCO_train2014_000000000009.png").any()
    assert paint_list("val2014", crowds="void") == 0


def test_foreign_files_are_not_replaced(root: Path, tmp_path: Path) -> None:
    folder = read_coco(root)
    ids = folder.dataset.lists["all"]
    Image.new("L", (60, 40)).save(tmp_path / f"{ids[1]}.png")
    before = bytes_of(tmp_path)
    with pytest.raises(ArtefactError, match=re.escape(str(tmp_path))):
        folder.with_masks(tmp_path, ids)
    assert bytes_of(tmp_path) == before
    (tmp_path / "painted.json").write_text('{"kind": "walls"}')
    with pytest.raises(ArtefactError, match=r"painted\.json"):
        folder.with_masks(tmp_path, ids)
    assert bytes_of(tmp_path) == before


def broken(root: Path, **shapes: Any) -> AnnotatedImages:
    """Other outlines of annotations: a100 of image 9, a97 its crowd, a95 of image 30."""
    content = whole()["annotations"]
    for one in content:
        one["segmentation"] = shapes.get(f"a{one['id']}", one["segmentation"])
    write(root, annotations=content)
    return read_coco(root)


def test_an_outline_that_cannot_be_painted_costs_the_mask_of_its_image_alone(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = broken(root, a100=[[1, 2, 3, 4]], a95={"size": [9, 9], "counts": [81]})
    masks = tmp_path / "masks"
    names = [f"COCO_train2014_{number:012d}" for number in (9, 25, 30, 581)]
    for _ in range(2):
        caplog.clear()
        dataset = folder.with_masks(masks, folder.dataset.items, workers=2)
        assert dataset.items[names[0]].labels == (0, 1, 2)
        with_mask = [name for name in names if dataset.items[name].mask is not None]
        assert with_mask == [names[1], names[3]] == sorted(p.stem for p in masks.glob("*.png"))
        (record,) = caplog.records
        assert f"image {names[0]}.jpg: annotation 100 " in record.getMessage()
        assert dataset.notices[-1] == record.getMessage()
        folder = read_coco(root)
    write(root)  # correct again
    folder = read_coco(root)
    assert all(item.mask for item in folder.with_masks(masks, names).items.values())


@pytest.mark.parametrize("shape", [[[1, 2, 3, 4]], [[0, 0, 9, 0, 9, 9]], {"size": [1, 1]}])
def test_what_crowds_are_does_not_matter_where_they_are_background(
    root: Path, tmp_path: Path, shape: Any
) -> None:
    folder = broken(root, a97=shape)
    name = "COCO_train2014_000000000009"
    assert folder.with_masks(tmp_path / "masks", [name]).items[name].mask is not None
    void = folder.with_masks(tmp_path / "void", [name], crowds="void")
    assert void.items[name].mask is None
    assert "annotation 97 cannot be painted" in void.notices[-1]
    # a check tells of it, and has the mask all the same
    mask, (fault,) = folder.true_masks()[name]()
    assert mask is not None and set(np.unique(mask)) == {0, 1, 2}
    assert "annotation 97 cannot be painted" in fault


def test_an_image_of_another_size_than_its_annotations_has_no_mask(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = [f"COCO_train2014_{number:012d}" for number in (9, 25, 30)]
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    for name, size, more in zip(
        names, ((60, 44), (60, 40), (30, 20)), ({"exif": exif}, {}, {}), strict=True
    ):
        Image.new("RGB", size).save(root / "train2014" / f"{name}.jpg", **more)
    folder, masks = read_coco(root), tmp_path / "masks"
    dataset = folder.with_masks(masks, names)
    assert [dataset.items[name].mask is not None for name in names] == [False, True, False]
    assert re.search(rf"{names[0]}.* 40 x 60 .* 60 x 44", caplog.records[0].getMessage())
    mask, (fault,) = folder.true_masks()[names[2]]()
    assert mask is None
    assert re.search("40 x 60 .* 20 x 30", fault)
    # a corrected image gets its mask in the next call
    Image.new("RGB", (60, 40)).save(root / "train2014" / f"{names[0]}.jpg")
    assert folder.with_masks(masks, names).items[names[0]].mask is not None
