"""Masks for other tools: what the tools' own readers, or plain ones, find in them again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import yaml
from PIL import Image

from lpcam.data.dataset import ClassTable, Skip
from lpcam.data.drawing import overlay_mask
from lpcam.data.images import read_image
from lpcam.data.label_studio import painted
from lpcam.data.masks import read_index_mask, voc_palette, write_mask
from lpcam.data.voc import CLASSES, read_voc
from lpcam.formats.masks import export
from lpcam.formats.masks.base import MaskEntry
from lpcam.formats.masks.export import export_masks
from lpcam.formats.masks.label_studio import packed_runs
from lpcam.formats.registry import FORMATS
from lpcam.runtime.errors import ArtefactError, DataError, LpcamError

TABLE = ClassTable(("cow", "wild & <horse>"), (10, 3))
Masks = dict[str, np.ndarray]


def blobs(seed: int, size: tuple[int, int]) -> np.ndarray:
    """Holes, pieces, corners that touch, and ignored pixels."""
    rng = np.random.default_rng(seed)
    coarse = rng.choice([0, 3, 10, 10, 255], size=(size[0] // 4 + 1, size[1] // 4 + 1))
    mask = np.kron(coarse, np.ones((4, 4)))[: size[0], : size[1]]
    specks = rng.random(size) < 0.05
    mask[specks] = rng.choice([0, 3, 10], size=size)[specks]
    return mask.astype(np.uint8)


DRAWN: Masks = {
    "a": blobs(0, (31, 44)),
    "barn/cow 7": blobs(1, (20, 63)),
    "barn/корова": np.zeros((9, 12), dtype=np.uint8),
    "full": np.full((5, 6), 3, dtype=np.uint8),
}
OBJECTS: Masks = {name: np.where(mask == 255, 0, mask) for name, mask in DRAWN.items()}


@pytest.fixture
def entries(tmp_path: Path) -> list[MaskEntry]:
    found = []
    for number, (name, mask) in enumerate(DRAWN.items()):
        entry = MaskEntry(
            name, tmp_path / "images" / f"{name}.png", tmp_path / "masks" / f"{name}.png"
        )
        assert entry.image is not None
        write_mask(entry.mask, mask)
        entry.image.parent.mkdir(parents=True, exist_ok=True)
        picture = np.random.default_rng(number).integers(0, 256, (*mask.shape, 3), dtype=np.uint8)
        Image.fromarray(picture).save(entry.image)
        found.append(entry)
    return found


def read_voc_masks(output: Path, table: ClassTable, entries: Sequence[MaskEntry]) -> Masks:
    folder = output / "SegmentationClass"
    found = {entry.id: read_index_mask(folder / f"{entry.id}.png") for entry in entries}
    return {name: np.where(mask == 255, 0, mask) for name, mask in found.items()}


def read_coco(output: Path, table: ClassTable, entries: Sequence[MaskEntry]) -> Masks:
    coco = pytest.importorskip("pycocotools.coco").COCO(output / "annotations.json")
    names = {one["id"]: one["name"] for one in coco.dataset["categories"]}
    found = {}
    for image in coco.dataset["images"]:
        mask = np.zeros((image["height"], image["width"]), dtype=np.uint8)
        for one in coco.imgToAnns[image["id"]]:
            pixels = coco.annToMask(one).astype(bool)
            assert not mask[pixels].any()
            mask[pixels] = table.mask_ids[table.index(names[one["category_id"]])]
            assert one["area"] == pixels.sum() and one["iscrowd"] == 0
            y, x = np.nonzero(pixels)
            box = [x.min(), y.min(), x.max() + 1 - x.min(), y.max() + 1 - y.min()]
            assert one["bbox"] == box
        found[image["file_name"].removesuffix(Path(image["file_name"]).suffix)] = mask
    return found


def read_yolo(output: Path, table: ClassTable, entries: Sequence[MaskEntry]) -> Masks:
    """As Ultralytics reads labels: places times the size, fractions cut off, filled by OpenCV."""
    cv2 = pytest.importorskip("cv2")
    names = yaml.safe_load((output / "data.yaml").read_text("utf-8"))["names"]
    found = {}
    for entry in entries:
        mask = np.zeros(read_index_mask(entry.mask).shape, dtype=np.uint8)
        rounded = mask.copy()
        scale = np.array(mask.shape[::-1], dtype=np.float32)
        for line in (output / f"labels/{entry.id}.txt").read_text().splitlines():
            label, *places = line.split()
            assert len(places) >= 6 and all(0 <= float(place) <= 1 for place in places)
            points = np.array(places, dtype=np.float32).reshape(-1, 2) * scale
            value = table.mask_ids[table.index(names[int(label)])]
            cv2.fillPoly(mask, [points.astype(np.int32)], value)
            cv2.fillPoly(rounded, [np.rint(points).astype(np.int32)], value)
        assert (mask == rounded).all()
        found[entry.id] = mask
    return found


def unpacked(values: Sequence[int]) -> np.ndarray:
    """The values of a packing of Label Studio's, by its description."""
    bits = "".join(f"{value:08b}" for value in values)
    at = 0

    def take(count: int) -> int:
        nonlocal at
        at += count
        return int(bits[at - count : at], 2)

    total, word = take(32), take(5) + 1
    sizes = [take(4) + 1 for _ in range(4)]
    found: list[int] = []
    while len(found) < total:
        run = take(1)
        length = take(sizes[take(2)]) + 1
        found += [take(word)] * length if run else [take(word) for _ in range(length)]
    return np.array(found, dtype=np.uint8)


def read_label_studio(output: Path, table: ClassTable, entries: Sequence[MaskEntry]) -> Masks:
    view = ElementTree.parse(output / "label_config.xml").getroot()
    labels = {one.get("value") for one in view.iter("Label")}
    brush, image = view.find("BrushLabels"), view.find("Image")
    assert brush is not None and image is not None and image.get("value") == "$image"
    found = {}
    tasks = json.loads((output / "tasks.json").read_text("utf-8"))
    for entry, task in zip(entries, tasks, strict=True):
        mask = np.zeros(read_index_mask(entry.mask).shape, dtype=np.uint8)
        (prediction,) = task["predictions"]
        for one in prediction["result"]:
            assert (one["original_height"], one["original_width"]) == mask.shape
            assert (one["from_name"], one["to_name"]) == (brush.get("name"), image.get("name"))
            channels = unpacked(one["value"]["rle"]).reshape(*mask.shape, 4)
            assert set(np.unique(channels)) <= {0, 255}
            assert (channels == channels[:, :, :1]).all()
            (label,) = one["value"]["brushlabels"]
            assert label in labels
            mask[channels[:, :, 3] > 0] = table.mask_ids[table.index(label)]
        assert len({one["id"] for one in prediction["result"]}) == len(prediction["result"])
        found[entry.id] = mask
    return found


def read_cvat(output: Path, table: ClassTable, entries: Sequence[MaskEntry]) -> Masks:
    root = ElementTree.parse(output / "annotations.xml").getroot()
    assert root.findtext("version") == "1.1"
    labels = [one.findtext("name") for one in root.iterfind("meta/task/labels/label")]
    found = {}
    for number, image in enumerate(root.iterfind("image")):
        assert image.get("id") == str(number)
        height, width = int(image.attrib["height"]), int(image.attrib["width"])
        mask = np.zeros((height, width), dtype=np.uint8)
        for one in image.iterfind("mask"):
            assert one.get("label") in labels
            lengths = [int(run) for run in one.attrib["rle"].split(",")]
            inside = np.repeat(np.arange(len(lengths)) % 2, lengths).astype(bool)
            left, top, w, h = (int(one.attrib[k]) for k in ("left", "top", "width", "height"))
            place = mask[top : top + h, left : left + w]
            place[inside.reshape(h, w)] = table.mask_ids[table.index(one.attrib["label"])]
        name = image.attrib["name"]
        found[name.removesuffix(Path(name).suffix)] = mask
    return found


def read_label_studio_polygons(
    output: Path, table: ClassTable, entries: Sequence[MaskEntry]
) -> Masks:
    values = dict(zip(table.names, table.mask_ids, strict=True))
    found = {}
    for entry, task in zip(entries, json.loads((output / "tasks.json").read_text()), strict=True):
        size = read_index_mask(entry.mask).shape
        found[entry.id] = painted(task["predictions"][0]["result"], size, values)
    return found


def read_fiftyone(output: Path, table: ClassTable, entries: Sequence[MaskEntry]) -> Masks:
    info = json.loads((output / "metadata.json").read_text())["info"]
    targets = dict(zip(map(str, table.mask_ids), table.names, strict=True))
    assert info["default_mask_targets"] == targets
    found = {}
    samples = json.loads((output / "samples.json").read_text("utf-8"))["samples"]
    for entry, sample in zip(entries, samples, strict=True):
        assert Path(sample["filepath"]) == entry.image and sample["heat"] is None
        with Image.open(output / sample["masks"]["mask_path"]) as image:
            assert image.mode == "L"
            mask = np.where(np.array(image) == 255, 0, np.array(image))
        outside = np.ones(mask.shape, dtype=bool)
        for one in sample["objects"]["detections"]:
            x, y, width, height = np.multiply(one["bounding_box"], mask.shape[::-1] * 2)
            place = np.s_[round(y) : round(y + height), round(x) : round(x + width)]
            assert (mask[place] == table.mask_ids[table.index(one["label"])]).any()
            outside[place] = False
        assert not mask[outside].any()
        found[entry.id] = mask
    return found


READERS: dict[str, Callable[[Path, ClassTable, Sequence[MaskEntry]], Masks]] = {
    "voc": read_voc_masks,
    "coco": read_coco,
    "coco-polygons": read_coco,
    "yolo": read_yolo,
    "label-studio": read_label_studio,
    "label-studio-polygons": read_label_studio_polygons,
    "cvat": read_cvat,
    "fiftyone": read_fiftyone,
}


@pytest.mark.parametrize("instances", [False, True])
@pytest.mark.parametrize("format", READERS)
def test_a_round_trip_gives_every_pixel_back(
    format: str, instances: bool, entries: list[MaskEntry], tmp_path: Path
) -> None:
    done = export_masks(entries, TABLE, tmp_path / "out", format, instances=instances)
    found = READERS[format](tmp_path / "out", TABLE, entries)
    assert list(found) == list(DRAWN)
    for name, mask in OBJECTS.items():
        assert (found[name] == mask).all(), name
    assert done.images == 4 and done.left_out == ()
    assert done.ignored_pixels == sum(int((mask == 255).sum()) for mask in DRAWN.values())
    assert (done.annotations > 5) == instances or done.annotations == 5


def test_all_formats_but_pictures_have_a_reader() -> None:
    assert {*READERS, "overlays"} == set(FORMATS)


def test_supervision_and_the_voc_reader_read_voc(entries: list[MaskEntry], tmp_path: Path) -> None:
    chosen = [entries[0], entries[3]]  # supervision looks into one folder alone
    export_masks(chosen, TABLE, tmp_path / "voc", "voc")
    (tmp_path / "voc/JPEGImages").mkdir()
    for entry in chosen:
        Image.fromarray(read_image(entry.image or Path())).save(
            tmp_path / f"voc/JPEGImages/{entry.id}.jpg"
        )
    dataset = read_voc(tmp_path / "voc", lists=["all"], classes=TABLE.names)
    assert list(dataset.lists["all"]) == ["a", "full"]
    assert dataset.classes == TABLE
    assert [dataset.items[name].labels for name in ("a", "full")] == [(0, 1), (1,)]
    assert dataset.items["a"].mask == tmp_path / "voc/SegmentationClass/a.png"
    supervision = pytest.importorskip("supervision")
    read = supervision.DetectionDataset.from_pascal_voc(
        str(tmp_path / "voc/JPEGImages"), str(tmp_path / "voc/Annotations")
    )
    boxes = {Path(path).stem: found.xyxy.tolist() for path, _, found in read}
    assert boxes["full"] == [[0, 0, 6, 5]]


def test_voc_keeps_ignored_pixels_colours_and_values(
    entries: list[MaskEntry], tmp_path: Path
) -> None:
    done = export_masks(entries, TABLE, tmp_path / "voc", "voc")
    with Image.open(tmp_path / "voc/SegmentationClass/barn/cow 7.png") as image:
        assert image.mode == "P" and (np.array(image) == DRAWN["barn/cow 7"]).all()
        palette = image.getpalette()
    assert palette == voc_palette().ravel().tolist()
    names = (tmp_path / "voc/class_names.txt").read_text("utf-8").splitlines()
    assert len(names) == 10 and names[2] == "wild & <horse>" and names[9] == "cow"
    assert names[0] == "unused_1"
    assert done.ignored == "kept as 255"
    export_masks(entries, ClassTable(("cow", "bird"), (10, 3)), tmp_path / "voc", "voc")
    assert tuple((tmp_path / "voc/class_names.txt").read_text().split()) == CLASSES


def test_coco_names_sizes_and_numbers(entries: list[MaskEntry], tmp_path: Path) -> None:
    export_masks(entries, TABLE, tmp_path / "coco", "coco")
    found = json.loads((tmp_path / "coco/annotations.json").read_text("utf-8"))
    assert [one["id"] for one in found["categories"]] == [10, 3]
    assert found["images"][1] == {
        "id": 2, "file_name": "barn/cow 7.png", "height": 20, "width": 63,
    }  # fmt: skip
    assert [one["id"] for one in found["annotations"]] == [1, 2, 3, 4, 5]
    assert [one["image_id"] for one in found["annotations"]] == [1, 1, 2, 2, 4]
    assert found["annotations"][-1]["segmentation"] == {"size": [5, 6], "counts": [0, 30]}


def test_yolo_is_ready_for_training(entries: list[MaskEntry], tmp_path: Path) -> None:
    one = replace(entries[0], image=None)
    export_masks([one, *entries[1:]], TABLE, tmp_path / "yolo", "yolo")
    copy = tmp_path / "yolo/images/barn/cow 7.png"
    assert copy.read_bytes() == (entries[1].image or Path()).read_bytes()
    assert not (tmp_path / "yolo/images/a.png").exists()
    assert (tmp_path / "yolo/labels/barn/корова.txt").read_text() == ""
    assert (tmp_path / "yolo/labels/full.txt").read_text().startswith("1 0.075000 0.090000 ")
    data = yaml.safe_load((tmp_path / "yolo/data.yaml").read_text("utf-8"))
    assert data == {"train": "images", "val": "images", "names": {0: "cow", 1: "wild & <horse>"}}


def test_formats_that_copy_or_pair_by_ids_do_not_use_the_datas_names(
    entries: list[MaskEntry], tmp_path: Path
) -> None:
    named = [replace(entry, file_name=f"{n}.png") for n, entry in enumerate(entries)]
    export_masks(named, TABLE, tmp_path / "yolo", "yolo")
    assert (tmp_path / "yolo/images/barn/cow 7.png").is_file()
    export_masks(named, TABLE, tmp_path / "voc", "voc")
    annotation = ElementTree.parse(tmp_path / "voc/Annotations/barn/cow 7.xml")
    assert annotation.findtext("filename") == "barn/cow 7.png"
    export_masks(named, TABLE, tmp_path / "coco", "coco")
    assert list(read_coco(tmp_path / "coco", TABLE, named)) == ["0", "1", "2", "3"]


def test_yolo_drops_a_leading_folder_images(entries: list[MaskEntry], tmp_path: Path) -> None:
    """As in file names of Label Studio's COCO."""
    moved = [replace(entry, id=f"images/{entry.id}") for entry in entries]
    export_masks(moved, TABLE, tmp_path / "yolo", "yolo")
    assert (tmp_path / "yolo/images/barn/cow 7.png").is_file()
    found = read_yolo(tmp_path / "yolo", TABLE, entries)
    assert all((found[name] == mask).all() for name, mask in OBJECTS.items())


def test_label_studio_packs_runs_of_every_length() -> None:
    for pixels in (1, 2, 3, 4, 5, 63, 64, 65, 16384, 16385, 40000):
        mask = np.zeros((1, pixels + 3), dtype=bool)
        mask[0, 2:-1] = True
        assert (unpacked(packed_runs(mask)) == np.repeat(mask, 4) * 255).all()


def test_label_studio_images_may_lie_below_the_served_folder(
    entries: list[MaskEntry], tmp_path: Path
) -> None:
    """It refuses a storage that is the served folder itself."""

    def address(root: str) -> str:
        output = tmp_path / root.replace("/", "-")
        export_masks(entries[:1], TABLE, output, "label-studio", image_root=root)
        return str(json.loads((output / "tasks.json").read_text("utf-8"))[0]["data"]["image"])

    name = entries[0].name
    assert address("images") == address("images/") == f"/data/local-files/?d=images/{name}"
    assert address("my photos/1") == f"/data/local-files/?d=my%20photos/1/{name}"
    for wrong in ("/home/me/images", "../images", "/"):
        with pytest.raises(DataError, match="the image root"):
            address(wrong)
    with pytest.raises(
        DataError,
        match="the image root belongs to label-studio, label-studio-polygons, not to cvat",
    ):
        export_masks(entries, TABLE, tmp_path / "out", "cvat", image_root="images")
    assert not (tmp_path / "out").exists()


def test_an_overlay_is_the_image_with_its_mask(entries: list[MaskEntry], tmp_path: Path) -> None:
    laid = overlay_mask(np.full((5, 6, 3), 90, dtype=np.uint8), DRAWN["full"])
    Image.new("RGB", (6, 5), (90, 90, 90)).save(entries[3].image or Path())
    export_masks(entries, TABLE, tmp_path / "out", "overlays")
    found = read_image(tmp_path / "out/overlays/full.jpg").astype(int)
    assert np.abs(found - laid).max() <= 3
    assert (tmp_path / "out/overlays/barn/cow 7.jpg").is_file()


@pytest.mark.parametrize("format", FORMATS)
def test_files_do_not_depend_on_the_number_of_workers(
    format: str, entries: list[MaskEntry], tmp_path: Path
) -> None:
    for workers in (1, 3):
        output = tmp_path / f"out{workers}"
        options: dict[str, Any] = {"workers": workers, "instances": True, "made_by": {"run": "x"}}
        export_masks(entries, TABLE, output, format, **options)
    first, other = (
        {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}
        for root in (tmp_path / "out1", tmp_path / "out3")
    )
    assert first == other
    index = json.loads(first["exported.json"])
    assert sorted([*index["files"], "exported.json"]) == sorted(first)
    assert index["made_by"] == {"run": "x"} and index["instances"] is True


def test_evidence_is_asked_of_each_image_and_missing_images_are_left_out(
    entries: list[MaskEntry], tmp_path: Path
) -> None:
    asked: list[tuple[Any, str]] = []

    def evidence(image: Path | None, name: str) -> np.ndarray:
        if image is None:
            raise DataError("no image")
        asked.append((image, name))
        return np.zeros(read_image(image).shape[:2])

    given = [*entries[:-1], replace(entries[-1], image=None)]
    done = export_masks(given, TABLE, tmp_path / "out", "voc", instances=True, evidence=evidence)
    assert {(entries[0].image, "cow"), (entries[0].image, "wild & <horse>")} <= {*asked}
    assert [skip.id for skip in done.left_out] == [entries[-1].id]
    index = json.loads((tmp_path / "out/exported.json").read_text())
    assert index["instances"] is True and index["separated"] is True


def test_a_mask_of_an_image_that_lies_on_its_side(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (8, 5)).save(tmp_path / "a.jpg", exif=exif)
    write_mask(tmp_path / "a.png", np.full((8, 5), 3, dtype=np.uint8))
    entries = [MaskEntry("a", tmp_path / "a.jpg", tmp_path / "a.png")]
    assert export_masks(entries, TABLE, tmp_path / "out", "cvat").images == 1


def test_what_cannot_be_exported_is_left_out_with_its_reason(
    entries: list[MaskEntry], tmp_path: Path
) -> None:
    write_mask(tmp_path / "masks/other.png", np.full((31, 44), 4, dtype=np.uint8))
    write_mask(tmp_path / "masks/large.png", np.zeros((32, 44), dtype=np.uint8))
    (tmp_path / "images/broken.png").write_bytes(b"no image")
    image = entries[0].image
    bad = [
        MaskEntry("missing", None, tmp_path / "masks/missing.png"),
        MaskEntry("other", image, tmp_path / "masks/other.png"),
        MaskEntry("large", image, tmp_path / "masks/large.png"),
        MaskEntry("broken", tmp_path / "images/broken.png", tmp_path / "masks/other.png"),
    ]
    skip = Skip("../b.png", "it has no image")  # no id of a file: a row of a table, say
    with pytest.raises(DataError, match="there is no mask"):
        export_masks([skip], TABLE, tmp_path / "none", "coco")
    done = export_masks([skip, *bad[:2], *entries, *bad[2:]], TABLE, tmp_path / "out", "coco")
    assert done.images == 4 and done.annotations == 5
    reasons = {skip.id: skip.reason for skip in done.left_out}
    assert list(reasons) == ["../b.png", "missing", "other", "large", "broken"]
    index = json.loads((tmp_path / "out/exported.json").read_text())
    assert index["left_out"][0] == {"image": "../b.png", "reason": "it has no image"}
    assert "missing.png: No such file" in reasons["missing"]
    assert "it has the values [4], which are of no class" in reasons["other"]
    assert "is 32 x 44 (height x width), the upright image 31 x 44" in reasons["large"]
    assert "cannot read image" in reasons["broken"] and "broken.png" in reasons["broken"]
    found = json.loads((tmp_path / "out/annotations.json").read_text("utf-8"))
    assert [one["id"] for one in found["images"]] == [1, 2, 3, 4]
    assert "5 left out, the first: it has no image" in done.summary()


def test_nothing_is_written_where_every_mask_is_left_out(tmp_path: Path) -> None:
    bad = [MaskEntry("a", None, tmp_path / "a.png")]
    for format in ("coco", "voc"):
        with pytest.raises(DataError, match=r"no mask can be exported, the first because.*a\.png"):
            export_masks(bad, TABLE, tmp_path / format, format)
        assert [p.name for p in (tmp_path / format).rglob("*")] == ["exported.json"]


@pytest.mark.parametrize(
    ("format", "changes", "message"),
    [
        ("png", {}, r"'png'.*voc, coco, coco-polygons"),
        ("voc", {"id": "full"}, "'full' twice"),
        ("voc", {"id": "../a"}, "could leave its folder"),
        ("overlays", {"image": None}, "'a' has no image"),
        ("yolo", {"id": "b/images/a"}, "'b/images/a' has a folder 'images'"),
        ("yolo", {"id": "images/full"}, "'images/full' has a folder 'images'"),
    ],
)
def test_what_is_asked_for_wrongly_is_refused(
    entries: list[MaskEntry], tmp_path: Path, format: str, changes: Any, message: str
) -> None:
    with pytest.raises(LpcamError, match=message):
        export_masks([replace(entries[0], **changes), entries[3]], TABLE, tmp_path / "out", format)
    assert not (tmp_path / "out").exists()


def test_a_later_call_replaces_its_own_files_alone(
    entries: list[MaskEntry], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    export_masks(entries, TABLE, out, "yolo")
    (out / "labels/mine.txt").write_text("0 0 0 1 0 1 1\n")
    export_masks(entries[1:], TABLE, out, "yolo")
    assert sorted(p.name for p in (out / "labels").glob("*.txt")) == ["full.txt", "mine.txt"]
    assert not (out / "images/a.png").exists()
    with pytest.raises(ArtefactError, match=r"mine\.txt is there already"):
        export_masks([replace(entries[0], id="mine")], TABLE, out, "yolo")
    with pytest.raises(ArtefactError, match="holds masks exported as yolo; choose another"):
        export_masks(entries, TABLE, out, "coco")


def test_foreign_and_damaged_folders_are_left_alone(
    entries: list[MaskEntry], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "annotations.json").write_text("mine")
    with pytest.raises(ArtefactError, match=r"annotations\.json is there already"):
        export_masks(entries, TABLE, out, "coco")
    assert [p.name for p in out.iterdir()] == ["annotations.json"]
    index = {"kind": "lpcam export masks", "masks": "coco", "files": ["../masks/a.png"]}
    for text, message in (
        ('{"kind": "other"}', "was not written by 'lpcam export masks'"),
        (json.dumps(index), "is damaged .*could leave its folder"),
    ):
        (out / "exported.json").write_text(text)
        with pytest.raises(ArtefactError, match=message):
            export_masks(entries, TABLE, out, "coco")
    assert entries[0].mask.is_file()
    export_masks(entries, TABLE, tmp_path / "voc", "voc")
    own = [replace(entries[0], mask=tmp_path / "voc/SegmentationClass/a.png")]
    with pytest.raises(ArtefactError, match=r"a\.png .*to be exported itself"):
        export_masks(own, TABLE, tmp_path / "voc", "voc")


def test_a_stopped_export_is_done_again(
    entries: list[MaskEntry], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def stopped(path: Path, **options: Any) -> np.ndarray:
        if path == entries[2].mask:
            raise KeyboardInterrupt
        return read_index_mask(path, **options)

    for format in ("coco", "voc"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(export, "read_index_mask", stopped)
            export_masks(entries, TABLE, out, format)
        assert not (out / "annotations.json").exists()
        assert not list(out.glob(".*.tmp"))
        assert export_masks(entries, TABLE, out, format).images == 4
        shutil.rmtree(out)
