"""YOLO's labels as tools write them, through the command line: right masks, or what is wrong."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from lpcam.cli.main import main
from lpcam.data.dataset import ClassTable
from lpcam.data.masks import read_index_mask, write_mask
from lpcam.data.open_dataset import kind_of, open_dataset
from lpcam.formats.masks.base import MaskEntry
from lpcam.formats.masks.export import export_masks

SIZE = (48, 64)
SQUARE = "0 0.25 0.25 0.75 0.25 0.75 0.75 0.25 0.75\n"  # rows 12 to 36, columns 16 to 48
BOX = "1 0.5 0.5 0.2 0.2\n"
YAML = "train: images\nval: images\nnames: [cow, dog]\n"
ONE = {"images/a.jpg": "", "labels/a.txt": SQUARE}


def square(value: int = 1, size: tuple[int, int] = SIZE) -> np.ndarray:
    mask = np.zeros(size, np.uint8)
    mask[size[0] // 4 : 3 * size[0] // 4, size[1] // 4 : 3 * size[1] // 4] = value
    return mask


def write(root: Path, files: Mapping[str, str]) -> Path:
    """A data set of some files: images are noise, others have the given text."""
    for number, (name, text) in enumerate(files.items()):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix in (".jpg", ".png", ".JPG"):
            noise = np.random.default_rng(number).integers(0, 255, (*SIZE, 3), dtype=np.uint8)
            Image.fromarray(noise).save(path)
        else:
            path.write_text(text.replace("ROOT", str(root)), "utf-8")
    return root


def iou(one: np.ndarray, other: np.ndarray) -> float:
    return float(((one == other) & (one > 0)).sum() / max(1, ((one > 0) | (other > 0)).sum()))


def painted(root: Path, output: Path) -> dict[str, np.ndarray]:
    assert main(["data", "masks", str(root), str(output)]) == 0
    files = {p.relative_to(output).with_suffix("").as_posix(): p for p in output.rglob("*.png")}
    return {name: read_index_mask(path) for name, path in files.items()}


SETS = {
    "ultralytics": {
        "dataset.yaml": "path: ../datasets/farm\ntrain: images/train\nval: images/val\n"
        "names: {0: cow, 1: dog}\n",
        **{"images/train/a.jpg": "", "labels/train/a.txt": SQUARE},
        **{"images/val/b.jpg": "", "labels/val/b.txt": SQUARE},
    },
    "roboflow": {
        "data.yaml": "train: ../train/images\nval: ../valid/images\ntest: ../test/images\nnc: 2\n"
        "names: ['cow', 'dog']\n",
        **{"train/images/a.jpg": "", "train/labels/a.txt": SQUARE},
        **{"valid/images/b.jpg": "", "valid/labels/b.txt": SQUARE},
    },
    "another machine's path": {
        "farm.yml": "path: /content/drive/farm\ntrain: /content/drive/farm/train/images\n"
        "validation: [valid/images]\nnames:\n  '0': cow\n  '7': dog\n",
        **{"train/images/a.jpg": "", "train/labels/a.txt": SQUARE},
        **{"valid/images/b.JPG": "", "valid/labels/b.txt": SQUARE.replace("0 ", "0.0 ", 1)},
    },
    "lists": {
        "data.yaml": "path: .\ntrain: [train.txt]\nval: lists/val.txt\nnames: [cow, dog]\n",
        "train.txt": "./images/x/a.jpg\n\n",
        "lists/val.txt": "D:\\farm\\images\\x\\b.jpg\nimages/x/gone.jpg\n",
        **{"images/x/a.jpg": "", "labels/x/a.txt": SQUARE},
        **{"images/x/b.jpg": "", "labels/x/b.txt": "\ufeff" + SQUARE},
    },
    "CVAT's YOLO 1.1": {
        "obj.data": "classes = 2\ntrain = data/train.txt\nnames = data/obj.names\n",
        "obj.names": "cow\ndog\n",
        "train.txt": "data/obj_train_data/a.jpg\ndata/obj_train_data/b.jpg\n",
        **{"obj_train_data/a.jpg": "", "obj_train_data/a.txt": SQUARE},
        **{"obj_train_data/b.jpg": "", "obj_train_data/b.txt": SQUARE},
    },
    "Label Studio's export": {
        "classes.txt": "cow\ndog\n",
        "notes.json": '{"categories": [], "info": {}}',
        **{"images/a.jpg": "", "labels/a.txt": SQUARE},
        **{"images/b.jpg": "", "labels/b.txt": SQUARE},
    },
    "Darknet": {
        "data/obj.names": "cow\ndog\n",
        "data/train.txt": "data/obj/a.jpg\n",
        "data/valid.txt": "data/obj/b.jpg\n",
        **{"data/obj/a.jpg": "", "data/obj/a.txt": SQUARE},
        **{"data/obj/b.jpg": "", "data/obj/b.txt": SQUARE},
    },
    "labelImg": {"classes.txt": "cow\ndog", "a.png": "", "a.txt": SQUARE}
    | {"b.jpg": "", "b.txt": SQUARE},
    "key points": {
        "data.yaml": YAML + "kpt_shape: [3, 2]\n",
        **{"images/a.jpg": "", "labels/a.txt": SQUARE},
        **{"images/b.jpg": "", "labels/b.txt": SQUARE},
        **{"images/c.jpg": "", "labels/c.txt": BOX.strip() + " 0.1" * 6},
    },
}


@pytest.mark.parametrize("name", SETS)
def test_layouts_of_tools(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write(tmp_path / "farm", SETS[name])
    assert main(["init", str(root), "--weights", "random"]) == 0
    assert "kind: yolo" in (root / "recipe.yaml").read_text("utf-8")
    main(["data", "check", str(root), "--no-estimate"])
    found = capsys.readouterr().out
    assert ("gone.jpg" in found, "../test/images" in found) == (
        name == "lists",
        name == "roboflow",
    )
    dataset = open_dataset(root).dataset
    shown = {i.id.rpartition("/")[2]: i.labels for i in dataset.items.values()}
    assert {**shown, "c": (1,)} == {"a": (0,), "b": (0,), "c": (1,)}
    if name in ("ultralytics", "roboflow", "another machine's path", "lists", "Darknet"):
        assert [len(dataset.lists[of]) for of in ("train", "val", "all")] == [1, 1, 2]
        chosen = open_dataset(root, lists=["val"]).dataset
        assert (*chosen.items,) == dataset.lists["val"] and [*chosen.lists] == ["val"]
    masks = painted(root, tmp_path / "masks")
    assert len(masks) == 2 and all(iou(mask, square()) == 1 for mask in masks.values())


def labelled(text: str, yaml: str = YAML) -> dict[str, str]:
    return {"images/a.jpg": "", "labels/a.txt": text, "data.yaml": yaml}


REFUSED = {
    "pixels": ("outside 0 to 1", labelled("0 32 24 20 20\n")),
    "NaN": ("nan", labelled("0 nan 0.5 0.1 0.1\n")),
    "class": ("class 2", labelled("2 0.5 0.5 0.1 0.1\n")),
    "gap": ("class 1 ", labelled(BOX, "train: images\nnames: {0: cow, 2: dog}\n")),
    "fraction": ("class 0.5", labelled("0.5 0.5 0.5 0.1 0.1\n")),
    "text": ("line 2", labelled(BOX + "cow 0.5 0.5 0.1 0.1\n")),
    "key points": ("kpt_shape", labelled(BOX.strip() + " 1" * 7)),
    "three numbers": ("line 1", labelled("0 0.5 0.5\n")),
    "yes": ("quotes", labelled(BOX, "train: images\nnames: [yes, no]\n")),
    "one name": ("names", labelled(BOX, "train: images\nnames: cow\n")),
    "no name": ("nc 2", labelled(BOX, "train: images\nnc: 2\n")),
    "shape": ("kpt_shape", labelled(BOX, YAML + "kpt_shape: [17, x]\n")),
    "nc": ("nc 3", labelled(BOX, YAML + "nc: 3\n")),
    "broken": ("not YAML", labelled(BOX, "train: [images\nnames: [cow")),
    "no names": ("classes.txt", ONE),
    "no train": ("images/t", labelled(BOX, "train: images/t\nval: images\nnames: [cow, dog]\n")),
    "one place": ("/x/val", labelled(BOX, "train: /x/images\nval: /x/val/images\nnames: [a, b]\n")),
    "in a folder": ("farm/ds", {f"ds/{name}": text for name, text in labelled(BOX).items()}),
    "two files": ("several", {**ONE, "a.yaml": YAML, "b.yaml": YAML}),
    "no labels": ("labels/a.txt", {"images/a.jpg": "", "data.yaml": YAML}),
    "Label Studio's export without images": (
        "farm/images",
        {"classes.txt": "cow\n", "notes.json": "{}", "labels/a.txt": SQUARE, "images/a.md": ""},
    ),
    "Label Studio's export of nothing": (
        "a label",
        {"classes.txt": "cow\n", "notes.json": "{}", "labels/a.txt": "", "images/a.jpg": ""},
    ),
    "Label Studio's export without classes": (
        "is empty",
        {"classes.txt": "", "notes.json": "{}", "labels/a.txt": BOX, "images/a.jpg": ""},
    ),
    "one id": ("same id", {**labelled(BOX), "images/a.png": ""}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    phrase, files = REFUSED[name]
    root = write(tmp_path / "farm", files)
    for command in (["init", "--weights", "random"], ["data", "check", "--no-estimate"]):
        assert main([*command, str(root)]) != 0
        assert phrase in "".join(capsys.readouterr())


NOTED = {
    "no file": ("images of no class: 1 (", {"images/b.jpg": ""}),
    "no image": ("in no list: 1 (b.txt)", {"labels/b.txt": BOX}),
    "predictions": ("sixth number", {"images/b.jpg": "", "labels/b.txt": BOX.strip() + " 0.9"}),
    "oriented boxes": ("oriented boxes", {}),
    "boxes": ("without an outline", {"images/b.jpg": "", "labels/b.txt": BOX}),
    "unread": ("b.heic", {"images/b.heic": ""}),
    "empty": ("label", {"images/b.jpg": "", "labels/b.txt": " \n"}),
}


@pytest.mark.parametrize("name", NOTED)
def test_what_is_doubtful_is_said(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    phrase, files = NOTED[name]
    root = write(tmp_path / "farm", {**labelled(SQUARE), **files})
    main(["data", "check", str(root), "--no-estimate"])
    assert phrase in " ".join(capsys.readouterr().out.split())
    assert main(["init", str(root), "--weights", "random"]) == 0
    assert phrase in " ".join(capsys.readouterr().out.split())
    masks = painted(root, tmp_path / "masks")
    assert iou(masks.pop("a"), square()) == 1
    assert [int(mask.max()) for mask in masks.values()] == [0] * (name in ("no file", "empty"))


def test_other_folders_are_not_taken(tmp_path: Path) -> None:
    for number, files in enumerate(
        (
            {"labels.csv": "image,labels\na.jpg,cow\n", **labelled(SQUARE)},
            {"train/cow/a.jpg": "", "val/cow/b.jpg": ""},  # YOLO's classification
            {"cow/a.jpg": "", "cow/a.txt": "a cow in 2 fields", "notes.txt": "1 2 3 4 5"},
            {"cow/a.jpg": "", "classes.txt": "cow\n", "compose.yaml": "a: !x\nnames: [cow]"},
        )
    ):
        root = write(tmp_path / str(number), files)
        (root / "other.yaml").write_bytes(b"names: \xe9")
        assert kind_of(root) == "folder"


def test_a_folder_of_a_list_takes_the_names_above_it(tmp_path: Path) -> None:
    files = {"train/images/a.jpg": "", "train/labels/a.txt": BOX, "data.yaml": YAML}
    root = write(tmp_path / "farm", files)
    assert kind_of(root / "train") == kind_of(root / "data.yaml") == "yolo"
    assert open_dataset(root / "train").dataset.items["a"].labels == (1,)


def test_outlines_are_in_the_upright_image(tmp_path: Path) -> None:
    root = write(tmp_path / "farm", labelled(SQUARE.replace("0.75", "0.5")))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (SIZE[1], SIZE[0])).save(root / "images" / "a.jpg", exif=exif)
    truth = np.zeros(SIZE[::-1], np.uint8)
    truth[16:32, 12:24] = 1
    assert iou(painted(root, tmp_path / "masks")["a"], truth) == 1


def blobs(seed: int) -> np.ndarray:
    """Two classes with holes, pieces and single pixels."""
    rng = np.random.default_rng(seed)
    mask = np.kron(rng.choice([0, 1, 2], size=(6, 8)), np.ones((8, 8)))
    mask[rng.random(SIZE) < 0.02] = 1
    return mask.astype(np.uint8)


def test_masks_that_were_exported_come_back(tmp_path: Path) -> None:
    entries = []
    for name in ("a", "barn/b"):
        entry = MaskEntry(name, tmp_path / f"in/{name}.png", tmp_path / f"in/{name}-mask.png")
        write(tmp_path, {f"in/{name}.png": ""})
        write_mask(entry.mask, blobs(len(name)))
        entries.append(entry)
    export_masks(entries, ClassTable(("cow", "dog"), (1, 2)), tmp_path / "out", "yolo")
    masks = painted(tmp_path / "out", tmp_path / "masks")
    assert {name: iou(masks[name], blobs(len(name))) for name in ("a", "barn/b")} == dict.fromkeys(
        ("a", "barn/b"), 1
    )


@pytest.mark.parametrize("tool", ["supervision", "ultralytics"])
def test_masks_of_other_tools(tool: str, tmp_path: Path) -> None:
    root = write(tmp_path / "farm", {"images/a.png": "", "data.yaml": YAML})
    row, column = np.mgrid[: SIZE[0], : SIZE[1]]
    truth = ((row - 22) ** 2 + (column - 30) ** 2 < 200).astype(np.uint8)
    truth[30:40, 5:12] = 2
    if tool == "supervision":
        sv = pytest.importorskip("supervision")
        box = np.array([[0, 0, 1, 1], [0, 0, 1, 1]], float)
        masks = np.stack([truth == 1, truth == 2])
        found = sv.Detections(xyxy=box, mask=masks, class_id=np.array([0, 1]))
        image = str(root / "images/a.png")
        data = sv.DetectionDataset(["cow", "dog"], [image], {image: found})
        data.as_yolo(annotations_directory_path=str(root / "labels"), approximation_percentage=0)
    else:  # as its convert_segment_masks_to_yolo_seg does
        cv2 = pytest.importorskip("cv2")
        lines = []
        for value in (1, 2):
            options = (cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
            for contour in cv2.findContours((truth == value).astype(np.uint8), *options)[0]:
                places = (contour.squeeze() / SIZE[::-1]).round(6)
                lines.append(f"{value - 1} {' '.join(map(str, places.ravel()))}\n")
        write(root, {"labels/a.txt": "".join(lines)})
    assert iou(painted(root, tmp_path / "masks")["a"], truth) > 0.99
