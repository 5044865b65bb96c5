"""The layouts that people have, as the formats' own documentation shows them: read, or refused.

Each is built small, with coloured boxes whose labels and masks are known, and given to ``lpcam
init`` and ``lpcam data check`` as a user types them; then the data set is opened as a run does.
"""

from __future__ import annotations

import csv
import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from tiny import BACKBONE, COLOURS, draw_image, write_weights

from lpcam.cli.main import main
from lpcam.data.masks import read_index_mask, voc_palette
from lpcam.pipeline.datasets import LISTS, read_dataset
from lpcam.pipeline.recipe import load_recipe

NAMES = tuple(COLOURS)
SIZE = (64, 80)


@dataclass(frozen=True)
class Picture:
    """An image, what it shows, and where: one box a class, as (x, y, width, height)."""

    name: str
    labels: tuple[str, ...]
    pixels: NDArray[np.uint8]
    mask: NDArray[np.uint8]

    def save(self, folder: Path, ending: str = ".jpg") -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.name}{ending}"
        Image.fromarray(self.pixels).save(path)
        return path

    def save_mask(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(self.mask)
        image.putpalette(voc_palette().tobytes())
        image.save(folder / f"{self.name}.png")

    @property
    def boxes(self) -> dict[str, tuple[int, int, int, int]]:
        found = {}
        for name in self.labels:
            rows, columns = np.nonzero(self.mask == 1 + NAMES.index(name))
            x, y = int(columns.min()), int(rows.min())
            found[name] = (x, y, int(columns.max()) + 1 - x, int(rows.max()) + 1 - y)
        return found


def pictures(*labels: str) -> list[Picture]:
    rng = np.random.default_rng(5)
    of_all = [tuple(filter(None, text.split(";"))) for text in labels]
    return [Picture(f"p{n}", one, *draw_image([*one], SIZE, rng)) for n, one in enumerate(of_all)]


ONE = pictures("blue", "green", "red", "blue", "green", "red")  # a label each
MANY = pictures("blue", "green;red", "", "red", "blue;green", "")
Root = Path
Truth = dict[str, tuple[str, ...]]  # labels by the end of the id


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def truth(of: list[Picture], prefix: str = "") -> Truth:
    return {f"{prefix}{one.name}": one.labels for one in of}


# -- Layouts: each writes below a folder ------------------------------------------------------


def image_folder(root: Path) -> None:
    for one in ONE:
        one.save(root / one.labels[0])


def splits(root: Path) -> None:
    """torchvision's and Ultralytics' for classification: root/train/class/x.jpg."""
    for split in ("train", "val"):
        image_folder(root / split)


def table(root: Path, header: str, separator: str, file: str = "labels.csv", **places: str) -> None:
    folder = root / places.get("folder", "images")
    path = root / file
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as stream:
        rows = csv.writer(stream)
        rows.writerow(header.split(","))
        for one in MANY:
            one.save(folder)
            one.save_mask(root / "masks") if "masks" in places else None
            name = f"{one.name}{places.get('ending', '.jpg')}"
            rows.writerow([name, separator.join(one.labels)])


def coco(of: list[Picture], *, crowd: bool = False, names: tuple[str, ...] = NAMES) -> str:
    images, annotations = [], []
    for number, one in enumerate(of, start=1):
        file = {"file_name": f"{one.name}.jpg", "height": SIZE[0], "width": SIZE[1]}
        images.append({"id": number, **file})
        for name, (x, y, width, height) in one.boxes.items():
            corners = [x, y, x + width, y, x + width, y + height, x, y + height]
            shape: object = [corners]
            if crowd:  # as CVAT writes brush masks
                whole = (one.mask == 1 + NAMES.index(name)).T.ravel()
                changes = np.flatnonzero(np.diff(np.r_[0, whole, 0]))
                counts = np.diff(np.r_[0, changes, whole.size]).tolist()
                shape = {"size": [*SIZE], "counts": counts}
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": 1 + names.index(name),
                    "segmentation": shape,
                    "bbox": [x, y, width, height],
                    "area": width * height,
                    "iscrowd": int(crowd),
                }
            )
    categories = [{"id": n, "name": name, "supercategory": ""} for n, name in enumerate(names, 1)]
    return json.dumps({"images": images, "annotations": annotations, "categories": categories})


def coco_folder(root: Path) -> None:
    write(root / "annotations" / "instances_train.json", coco(MANY))
    for one in MANY:
        one.save(root / "train")


def roboflow_coco(root: Path) -> None:
    names = ("colours", *NAMES)  # Roboflow puts a category above the others
    for split in ("train", "valid"):
        write(root / split / "_annotations.coco.json", coco(MANY, names=names))
        for one in MANY:
            one.save(root / split)
    write(root / "README.roboflow.txt", "colours - v1")


def cvat_coco(root: Path) -> None:
    write(root / "annotations" / "instances_default.json", coco(MANY, crowd=True))
    for one in MANY:
        one.save(root / "images" / "default")


def fiftyone_coco(root: Path) -> None:
    """COCODetectionDataset: data/ and labels.json."""
    write(root / "labels.json", coco(MANY))
    for one in MANY:
        one.save(root / "data")


def yolo(root: Path) -> None:
    for split, of in (("train", MANY), ("val", ONE)):
        for one in of:
            one.save(root / "images" / split)
            lines = []
            for name, (x, y, w, h) in one.boxes.items():
                corners = ((x, y), (x + w, y), (x + w, y + h), (x, y + h))
                shares = " ".join(f"{a / SIZE[1]:.6f} {b / SIZE[0]:.6f}" for a, b in corners)
                lines.append(f"{NAMES.index(name)} {shares}")
            write(root / "labels" / split / f"{one.name}.txt", "\n".join(lines))
    names = "".join(f"  {n}: {name}\n" for n, name in enumerate(NAMES))
    write(root / "data.yaml", f"path: .\ntrain: images/train\nval: images/val\nnames:\n{names}")


def xml(one: Picture) -> str:
    document = ElementTree.Element("annotation")
    ElementTree.SubElement(document, "filename").text = f"{one.name}.jpg"
    for name, (x, y, w, h) in one.boxes.items():
        found = ElementTree.SubElement(document, "object")
        ElementTree.SubElement(found, "name").text = name
        box = ElementTree.SubElement(found, "bndbox")
        for key, value in (("xmin", x), ("ymin", y), ("xmax", x + w), ("ymax", y + h)):
            ElementTree.SubElement(box, key).text = str(value)
    return ElementTree.tostring(document, "unicode")


def labelimg(root: Path) -> None:
    for one in MANY:
        one.save(root)
        write(root / f"{one.name}.xml", xml(one))


def voc(root: Path, *, masks: bool = True) -> None:
    for one in MANY:
        one.save(root / "JPEGImages")
        write(root / "Annotations" / f"{one.name}.xml", xml(one))
        one.save_mask(root / "SegmentationClass") if masks else None
    ids = "".join(f"{one.name}\n" for one in MANY)
    for name in ("train", "val"):
        write(root / "ImageSets" / "Segmentation" / f"{name}.txt", ids)
    write(root / "class_names.txt", "\n".join(NAMES))


def cvat_masks(root: Path) -> None:
    """CVAT's "Segmentation mask 1.1": colours, labelmap.txt, no Annotations."""
    lines = ["# label:color_rgb:parts:actions", "background:0,0,0::"]
    for value, name in enumerate(NAMES, start=1):
        lines.append(f"{name}:{','.join(map(str, voc_palette()[value].tolist()))}::")
    write(root / "labelmap.txt", "\n".join(lines))
    write(root / "ImageSets" / "Segmentation" / "default.txt", "\n".join(p.name for p in MANY))
    for one in MANY:
        one.save(root / "JPEGImages")
        (root / "SegmentationClass").mkdir(exist_ok=True)
        colours = Image.fromarray(voc_palette()[one.mask])
        colours.save(root / "SegmentationClass" / f"{one.name}.png")


def cvat_masks_and_labels(root: Path) -> None:
    cvat_masks(root)
    write(root / "class_names.txt", "\n".join(NAMES))
    lines = [f"{one.name}.jpg,{';'.join(one.labels)}" for one in MANY]
    write(root / "labels.csv", "\n".join(["image,labels", *lines]))


def voc_detection(root: Path) -> None:
    voc(root, masks=False)
    (root / "ImageSets" / "Segmentation").rename(root / "ImageSets" / "Main")


def cvat_xml(root: Path) -> None:
    for one in MANY:
        one.save(root / "images")
    boxes = '<image id="0" name="p0.jpg"><box label="blue" xtl="4" ytl="4"/></image>'
    write(root / "annotations.xml", f"<annotations><version>1.1</version>{boxes}</annotations>")


def labelme(root: Path) -> None:
    for one in MANY:
        one.save(root)
        shapes = [
            {"label": name, "points": [[x, y], [x + w, y + h]], "shape_type": "rectangle"}
            for name, (x, y, w, h) in one.boxes.items()
        ]
        about = {"version": "5.4.1", "flags": {}, "shapes": shapes, "imagePath": f"{one.name}.jpg"}
        write(root / f"{one.name}.json", json.dumps(about))


def hugging_face(root: Path, form: str) -> None:
    rows = [{"file_name": f"{one.name}.jpg", "label": one.labels[0]} for one in ONE]
    for one in ONE:
        one.save(root / "train")
    if form == "jsonl":
        write(root / "train" / "metadata.jsonl", "\n".join(map(json.dumps, rows)))
    else:
        lines = [f"{row['file_name']},{row['label']}" for row in rows]
        write(root / "train" / "metadata.csv", "\n".join(["file_name,label", *lines]))


def mvtec(root: Path) -> None:
    for one in pictures("", "", ""):
        one.save(root / "train" / "good", ".png")
        one.save(root / "test" / "good", ".png")
    for one in ONE:
        (kind,) = one.labels
        one.save(root / "test" / kind, ".png")
        (root / "ground_truth" / kind).mkdir(parents=True, exist_ok=True)
        mask = Image.fromarray((one.mask > 0).astype(np.uint8) * 255)
        mask.save(root / "ground_truth" / kind / f"{one.name}_mask.png")


def kaggle(root: Path) -> None:
    """train.csv of ids and tags separated by blanks beside train/, as Planet's."""
    table(root, "image_name,tags", " ", "train.csv", folder="train", ending="")


def via(root: Path) -> None:
    regions = [
        {"shape_attributes": {"name": "rect"}, "region_attributes": {"class": name}}
        for name in ONE[0].labels
    ]
    about = {"p0.jpg123": {"filename": "p0.jpg", "size": 123, "regions": regions}}
    write(root / "via_project.json", json.dumps({"_via_settings": {}, "_via_img_metadata": about}))
    for one in ONE:
        one.save(root)


def supervisely(root: Path) -> None:
    write(root / "meta.json", json.dumps({"classes": [{"title": n} for n in NAMES], "tags": []}))
    for one in ONE:
        one.save(root / "ds0" / "img")
        write(root / "ds0" / "ann" / f"{one.name}.jpg.json", json.dumps({"objects": []}))


def fiftyone(root: Path) -> None:
    write(root / "metadata.json", json.dumps({"name": "colours"}))
    write(root / "samples.json", json.dumps({"samples": [{"filepath": "data/p0.jpg"}]}))
    for one in ONE:
        one.save(root / "data")


def label_studio(root: Path) -> None:
    tasks = [
        {
            "id": n,
            "data": {"image": f"/data/local-files/?d=images/{one.name}.jpg"},
            "annotations": [
                {
                    "result": [
                        {
                            "type": "rectanglelabels",
                            "from_name": "label",
                            "to_name": "image",
                            "original_width": SIZE[1],
                            "original_height": SIZE[0],
                            "value": {
                                "x": 100 * x / SIZE[1],
                                "y": 100 * y / SIZE[0],
                                "width": 100 * w / SIZE[1],
                                "height": 100 * h / SIZE[0],
                                "rotation": 0,
                                "rectanglelabels": [name],
                            },
                        }
                        for name, (x, y, w, h) in one.boxes.items()
                    ]
                }
            ],
        }
        for n, one in enumerate(MANY, start=1)
    ]
    write(root / "tasks.json", json.dumps(tasks))
    for one in MANY:
        one.save(root / "images")


@dataclass(frozen=True)
class Case:
    """A layout, what is typed for it (``{}`` is its folder), and what comes of it."""

    build: Callable[[Path], None]
    typed: str
    labels: Truth | None = None  # of all images; None: it is refused
    masks: int = 0  # true masks, whose values are those that were drawn
    says: tuple[str, ...] = ()  # what the refusal or the summary says
    code: int = 0  # of data check: 1 if something needs attention
    runs: bool = False  # whether a whole run is made of it, up to the seeds


FOLDERS = {f"{one.labels[0]}/{one.name}": one.labels for one in ONE}
DEFECTS = {**FOLDERS, **{f"good/p{n}": () for n in range(3)}}
CASES: dict[str, Case] = {
    "ImageFolder": Case(image_folder, "{} --labels folders", FOLDERS),
    "ImageFolder, without the word": Case(image_folder, "{}", says=("--labels folders",)),
    "ImageFolder in splits": Case(splits, "{} --labels folders", says=("{}/train",)),
    "YOLO classification": Case(splits, "{}/train --labels folders", FOLDERS),
    "CSV": Case(lambda r: table(r, "image,labels", ";", masks=""), "{}", truth(MANY), 6),
    "CSV of tags": Case(
        lambda r: table(r, "filename,tags", ",", "tags.csv"),
        "{} --labels {}/tags.csv --separator ,",
        truth(MANY),
    ),
    "CSV of tags, without the word": Case(
        lambda r: table(r, "image,labels", ","), "{}", says=("--separator",)
    ),
    "Kaggle": Case(kaggle, "{}/train --labels {}/train.csv --separator ' '", truth(MANY)),
    "COCO JSON": Case(coco_folder, "{}", truth(MANY), 6),
    "Roboflow COCO": Case(roboflow_coco, "{}/train", truth(MANY), 6, ("colours",), 1),
    "CVAT COCO": Case(cvat_coco, "{}", says=("CVAT", "--crowds objects")),
    "CVAT COCO, as told": Case(cvat_coco, "{} --crowds objects", truth(MANY), 6, runs=True),
    "FiftyOne COCO": Case(fiftyone_coco, "{}", truth(MANY), 6),
    "Ultralytics YOLO": Case(yolo, "{}", truth(MANY, "train/"), 6),
    "VOC 2012": Case(voc, "{}", truth(MANY), 6),
    "labelImg": Case(labelimg, "{}", says=("labelImg", "JPEGImages")),
    "CVAT segmentation mask": Case(cvat_masks, "{}", says=("Annotations", "--labels FILE")),
    "CVAT segmentation mask, with labels": Case(
        cvat_masks_and_labels,
        "{} --kind voc --labels {}/labels.csv --palette {}/labelmap.txt",
        truth(MANY),
        6,
    ),
    "VOC detection": Case(voc_detection, "{}", truth(MANY)),
    "CVAT XML": Case(cvat_xml, "{}", says=("CVAT", "COCO JSON")),
    "LabelMe": Case(labelme, "{}", says=("LabelMe", "COCO JSON")),
    "metadata.csv": Case(lambda r: hugging_face(r, "csv"), "{}", says=("Hugging Face",)),
    "metadata.jsonl": Case(lambda r: hugging_face(r, "jsonl"), "{}", says=("Hugging Face",)),
    "MVTec AD": Case(mvtec, "{}", says=("MVTec", "--no-class good")),
    "MVTec AD, as told": Case(
        mvtec, "{}/test --labels folders --no-class good", DEFECTS, runs=True
    ),
    "VIA": Case(via, "{}", says=("VIA", "COCO JSON")),
    "Supervisely": Case(supervisely, "{}", says=("Supervisely", "COCO JSON")),
    "FiftyOne": Case(fiftyone, "{}", says=("FiftyOne", "COCO JSON")),
    "Label Studio": Case(label_studio, "{}", truth(MANY)),
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_weights(tmp_path_factory.mktemp("weights") / "tiny.safetensors")


@pytest.mark.parametrize("name", CASES)
def test_layout(
    tmp_path: Path, weights: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    case, root = CASES[name], tmp_path / "data"
    case.build(root)
    typed = shlex.split(case.typed.replace("{}", str(root)))
    code = main(["init", *typed, "--backbone", BACKBONE, "--weights", str(weights)])
    told = capsys.readouterr()
    said = told.out + told.err
    for word in case.says:
        assert word.replace("{}", str(root)) in said, said
    if case.labels is None:
        assert code == 2 and not list(root.rglob("recipe.yaml"))
        assert main(["data", "check", *typed, "--no-estimate"]) == 2
        return
    assert code == 0, said
    file = tmp_path / "check.json"
    code = main(["data", "check", *typed, "--no-estimate", "--json", str(file)])
    assert code == case.code, capsys.readouterr().out
    found = json.loads(file.read_text())
    assert [one["name"] for one in found["classes"] if one["images"]] == [*NAMES]
    (path,) = root.rglob("recipe.yaml")
    recipe = load_recipe(path, {"run.folder": str(tmp_path / "run")})
    dataset = read_dataset(recipe, LISTS, painted=tmp_path / "painted")
    names = dataset.classes.names
    assert {i: tuple(names[n] for n in one.labels) for i, one in dataset.items.items()} == (
        case.labels
    )
    masks = {i: one.read_mask() for i, one in dataset.items.items() if one.mask}
    assert len(masks) == case.masks
    values = [dataset.classes.mask_ids[names.index(one)] for one in NAMES]
    for image_id, mask in masks.items():
        one = next(one for one in MANY if image_id.rpartition("/")[2] == one.name)
        assert (mask == np.array([0, *values], np.uint8)[one.mask]).mean() > 0.99
    if case.runs:
        # CAM of these random weights has no positive value in an image
        options = ["--lpcam.clusters", "2", "--lpcam.scales", "[1.0]", "--lpcam.early.base"]
        options += ["LPCAM", "--until", "seeds"]
        assert main(["run", str(path), "--run.folder", str(recipe.folder), *options]) == 0
        for image_id, item in dataset.items.items():
            seed = read_index_mask(recipe.folder / "seeds" / f"{image_id}.png")
            shown = {dataset.classes.mask_ids[n] for n in item.labels}
            assert seed.shape == SIZE and {*np.unique(seed).tolist()} <= {0, *shown}
            assert not shown or seed.any()
