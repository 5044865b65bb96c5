"""Which masks of a folder are exported, what their images are called, and what is told."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote
from xml.etree import ElementTree

import numpy as np
import pytest
import yaml
from PIL import Image
from tiny import recipe_values

from lpcam.cli.main import main
from lpcam.data.dataset import Skip
from lpcam.data.map_files import MapFile, map_path, write_maps
from lpcam.data.masks import write_mask
from lpcam.formats.masks.export import export_masks
from lpcam.pipeline.recipe import parse_recipe
from lpcam.pipeline.run_folder import RunFolder
from lpcam.runtime.errors import ArtefactError
from lpcam.runtime.files import read_json, write_json

SIZE = (4, 6)


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", SIZE[::-1]).save(path)


def annotation_file(path: Path, file_names: Sequence[str]) -> None:
    """COCO's form: images of a cow each."""
    images = [
        {"id": n, "file_name": name, "height": SIZE[0], "width": SIZE[1]}
        for n, name in enumerate(file_names)
    ]
    outline = {"segmentation": [[0, 0, 3, 0, 3, 3]], "iscrowd": 0, "area": 4, "category_id": 1}
    annotations = [{"id": n, "image_id": n, **outline} for n in range(len(images))]
    path.parent.mkdir(parents=True, exist_ok=True)
    text = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "cow"}]}
    path.write_text(json.dumps(text))


def table(root: Path, names: Sequence[str]) -> Path:
    """A folder of images of a cow each."""
    for name in names:
        picture(root / "images" / name)
    lines = ["image,labels", *(f"{name},cow" for name in names)]
    (root / "labels.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return root


def run_of(folder: Path, data: dict[str, Any], ids: Sequence[str], **index: Any) -> Path:
    """The folder of a run whose seeds are done."""
    values = {**recipe_values(folder, folder, Path("weights.safetensors")), "data": data}
    recipe = parse_recipe(values, where="tiny").model_dump(mode="json", by_alias=True)
    folder.mkdir()
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, allow_unicode=True))
    write_json(folder / "index.json", {"records": {}, "skipped": [], "notices": [], **index})
    for name in ids:
        write_mask(folder / "seeds" / f"{name}.png", np.ones(SIZE, np.uint8))
    return folder


def names_in(run: Path, output: Path, *words: str) -> list[str]:
    """What coco, cvat and label-studio call the images, which must be the same."""
    for format in ("coco", "cvat", "label-studio"):
        options = ["--format", format, *(words if format == "label-studio" else ())]
        assert main(["export", "masks", str(run), str(output / format), *options]) == 0
    document = json.loads((output / "coco/annotations.json").read_text("utf-8"))
    found = [one["file_name"] for one in document["images"]]
    root = ElementTree.parse(output / "cvat/annotations.xml").getroot()
    assert [one.get("name") for one in root.iterfind("image")] == found
    tasks = json.loads((output / "label-studio/tasks.json").read_text("utf-8"))
    addresses = [unquote(one["data"]["image"].partition("?d=")[2]) for one in tasks]
    prefix = f"{words[1]}/" if words else ""
    assert addresses == [prefix + name for name in found]
    return found


def lists(name: str) -> dict[str, str]:
    return dict.fromkeys(("classify", "prototypes", "maps", "evaluate"), name)


@pytest.mark.parametrize("mapped", ["train", "all"])
def test_two_annotation_files_share_a_folder_of_images(mapped: str, tmp_path: Path) -> None:
    root = tmp_path / "data"
    for name in ("train", "val"):
        annotation_file(root / f"annotations/{name}.json", [f"{name}_0.jpg", f"sub/{name}_1.jpg"])
        picture(root / f"images/{name}_0.jpg")
        picture(root / f"images/sub/{name}_1.jpg")
    ids = [f"{n}/{i}" for n in ("train", "val") for i in (f"{n}_0", f"sub/{n}_1")]
    chosen = ids if mapped == "all" else ids[:2]
    data = {"kind": "coco", "root": str(root), "lists": lists(mapped)}
    run = run_of(tmp_path / "run", data, chosen)
    assert [one.id for one in RunFolder(run).masks().entries] == chosen
    expected = ["train_0.jpg", "sub/train_1.jpg", "val_0.jpg", "sub/val_1.jpg"][: len(chosen)]
    found = names_in(run, tmp_path / "out", "--image-root", "images")
    assert found == expected
    assert all((root / "images" / name).is_file() for name in found)


def roboflow(root: Path) -> Path:
    """Two lists with a folder and an annotation file each; both have a 0.jpg."""
    for name in ("train", "valid"):
        annotation_file(root / name / "_annotations.coco.json", ["0.jpg", f"{name}.jpg"])
        picture(root / name / "0.jpg")
        picture(root / name / f"{name}.jpg")
    return root


def test_images_of_one_list_keep_the_names_of_its_annotation_file(tmp_path: Path) -> None:
    root = roboflow(tmp_path / "data")
    data = {"kind": "coco", "root": str(root), "lists": lists("valid")}
    run = run_of(tmp_path / "run", data, ["valid/0", "valid/valid"])
    assert names_in(run, tmp_path / "out") == ["0.jpg", "valid.jpg"]


def test_images_of_several_folders_are_told_apart_by_their_paths(tmp_path: Path) -> None:
    root = roboflow(tmp_path / "data")
    data = {"kind": "coco", "root": str(root), "lists": lists("all")}
    ids = ["train/0", "train/train", "valid/0", "valid/valid"]
    run = run_of(tmp_path / "run", data, ids)
    found = names_in(run, tmp_path / "out")
    assert found == ["train/0.jpg", "train/train.jpg", "valid/0.jpg", "valid/valid.jpg"]
    assert all((root / name).is_file() for name in found)


def test_an_image_of_two_lists_is_named_once(tmp_path: Path) -> None:
    root = tmp_path / "data"
    for name in ("train", "val"):
        annotation_file(root / f"annotations/{name}.json", ["0.jpg", f"{name}.jpg"])
        picture(root / f"images/{name}.jpg")
    picture(root / "images/0.jpg")
    data = {"kind": "coco", "root": str(root), "lists": lists("all")}
    ids = ["train/0", "train/train", "val/0", "val/val"]
    masks = RunFolder(run_of(tmp_path / "run", data, ids)).masks()
    naming: tuple[str, ...] = ("coco", "coco-polygons", "cvat", "label-studio")
    for format in naming:
        done = export_masks(masks.entries, masks.classes, tmp_path / format, format)
        assert done.images == 3
        assert done.left_out == (
            Skip("val/0", "its image 0.jpg is that of 'train/0', whose mask is exported"),
        )
    done = export_masks(masks.entries, masks.classes, tmp_path / "yolo", "yolo")
    assert (tmp_path / "yolo/images/val/0.jpg").is_file() and done.images == 4


def test_label_studios_own_layout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its file names begin with images/."""
    root = tmp_path / "data"
    annotation_file(root / "result.json", ["images/0.jpg", "images/1.jpg"])
    picture(root / "images/0.jpg")
    picture(root / "images/1.jpg")
    data = {"kind": "coco", "root": str(root / "result.json")}
    run = run_of(tmp_path / "run", data, ["images/0", "images/1"])
    assert names_in(run, tmp_path / "out") == ["images/0.jpg", "images/1.jpg"]
    told = f"images are named by their paths below {root}"
    assert capsys.readouterr().out.count(told) == 3
    yolo = tmp_path / "out/yolo"
    assert main(["export", "masks", str(run), str(yolo), "--format", "yolo"]) == 0
    assert told not in capsys.readouterr().out
    for number in "01":
        assert (yolo / f"labels/{number}.txt").is_file()
        assert (yolo / f"images/{number}.jpg").read_bytes() == (
            root / f"images/{number}.jpg"
        ).read_bytes()


def test_an_image_has_the_unicode_form_that_it_has_on_disk(tmp_path: Path) -> None:
    name = "barn/ka\u0308lbchen 7.png"
    assert name == unicodedata.normalize("NFD", name)
    root = table(tmp_path / "data", [name])
    image_id = unicodedata.normalize("NFC", "barn/kälbchen 7")
    run = run_of(tmp_path / "run", {"kind": "folder", "root": str(root)}, [image_id])
    (found,) = names_in(run, tmp_path / "out", "--image-root", "images")
    assert found == name
    annotation_file(root / "annotations.json", [unicodedata.normalize("NFC", name)])
    other = run_of(
        tmp_path / "other", {"kind": "coco", "root": str(root / "annotations.json")}, [image_id]
    )
    assert names_in(other, tmp_path / "others") == [name]


def predicted(folder: Path, images: dict[str, str], skipped: Sequence[dict[str, str]] = ()) -> Path:
    """What ``lpcam predict`` wrote."""
    made_by = {"classes": {"cow": 1}, "run": "r"}
    index = {"format": 1, "kind": "lpcam predict", "made_by": made_by}
    write_json(folder / "predicted.json", {**index, "images": images, "skipped": [*skipped]})
    for name in images:
        write_mask(folder / "masks" / f"{name}.png", np.ones(SIZE, np.uint8))
    return folder


def test_predicted_images_are_called_as_their_files(tmp_path: Path) -> None:
    """Their keys have endings where two would be equal, and no sign that a file system refuses."""
    places = {"a.jpg": "a.jpg", "a.png": "a.png", "sub/b_c": "sub/b:c.png"}
    for path in places.values():
        picture(tmp_path / "images" / path)
    images = {key: str(tmp_path / "images" / path) for key, path in places.items()}
    folder = predicted(tmp_path / "one", images)
    assert names_in(folder, tmp_path / "out") == ["a.jpg", "a.png", "sub/b:c.png"]
    picture(tmp_path / "more/a.jpg")
    folder = predicted(tmp_path / "two", {**images, "a.jpg-2": str(tmp_path / "more/a.jpg")})
    found = names_in(folder, tmp_path / "outs")
    assert sorted(found) == ["images/a.jpg", "images/a.png", "images/sub/b:c.png", "more/a.jpg"]
    gone = predicted(tmp_path / "three", {"x": str(tmp_path / "gone/x.png")})
    assert names_in(gone, tmp_path / "last") == ["x.png"]


def left_out(run: Path, output: Path) -> dict[str, str]:
    """Reasons by image, of an export that leaves something out."""
    assert main(["export", "masks", str(run), str(output), "--format", "voc"]) == 1
    index = read_json(output / "exported.json")
    assert not {one["image"] for one in index["left_out"]} & set(
        (output / "ImageSets/Segmentation/all.txt").read_text().split()
    )
    return {one["image"]: one["reason"] for one in index["left_out"]}


def test_a_missing_mask_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = table(tmp_path / "data", ["a.png", "b.png", "c.png"])
    run = run_of(tmp_path / "run", {"kind": "folder", "root": str(root)}, ["a", "b", "c"])
    assert main(["export", "masks", str(run), str(tmp_path / "whole"), "--format", "voc"]) == 0
    (run / "seeds/b.png").unlink()
    reasons = left_out(run, tmp_path / "out")
    assert list(reasons) == ["b"]
    assert reasons["b"] == (
        f"there is no mask {run / 'seeds/b.png'}; bring the run up to date first"
    )
    assert "1 left out, the first: there is no mask" in capsys.readouterr().out
    for name in "ac":
        (run / f"seeds/{name}.png").unlink()
    write_mask(run / "seeds/x.png", np.ones(SIZE, np.uint8))
    with pytest.raises(ArtefactError, match="has no mask of any image of the list 'all'"):
        RunFolder(run).masks()


def test_a_missing_map_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = table(tmp_path / "data", ["a.png", "b.png"])
    run = run_of(tmp_path / "run", {"kind": "folder", "root": str(root)}, ["a", "b"])
    maps = MapFile(np.array([0]), np.ones((1, 1, 2), "f4"), np.ones((1, *SIZE), "f4"), {})
    for name in "ab":
        write_maps(map_path(run / "lpcam", name), maps, dtype="uint8")
    command = ["export", "maps", str(run), str(tmp_path / "out"), "--format", "irn"]
    assert main(command) == 0
    map_path(run / "lpcam", "a").unlink()
    command[3] = str(tmp_path / "again")
    assert main(command) == 1
    assert "1 of 2 images have no map" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "again").rglob("*.npy")] == ["b.npy"]


def test_an_image_that_the_run_skipped_is_told_with_its_reason(tmp_path: Path) -> None:
    root = table(tmp_path / "data", ["a.png", "b.png", "c.png", "d.png"])
    picture(root / "images/unlabelled.png")
    run = run_of(
        tmp_path / "run",
        {"kind": "folder", "root": str(root)},
        ["a"],
        skipped=[{"id": "b", "reason": "cannot read b"}],
    )
    # of maps that another program made
    write_json(run / "metrics.json", {"skipped": [{"id": "c", "reason": "the map c is small"}]})
    assert left_out(run, tmp_path / "out") == {
        "b": "the run skipped it: cannot read b",
        "c": "the run skipped it: the map c is small",
        "d": f"there is no mask {run / 'seeds/d.png'}; bring the run up to date first",
        "unlabelled": "it has no line in labels.csv; add one",
    }


def test_a_mask_whose_image_has_gone_is_told(tmp_path: Path) -> None:
    root = table(tmp_path / "data", ["a.png", "b.png", "barn/c 1.png"])
    run = run_of(tmp_path / "run", {"kind": "folder", "root": str(root)}, ["a", "b", "barn/c 1"])
    (root / "images/b.png").unlink()
    assert left_out(run, tmp_path / "row") == {  # once, as the data set tells it
        "b.png": f"labels.csv line 3 has no image below {root / 'images'}"
    }
    (root / "images/barn/c 1.png").unlink()
    table(root, ["a.png"])
    reasons = left_out(run, tmp_path / "out")
    assert list(reasons) == ["b", "barn/c 1"]
    assert "the list 'all' has no such image" in reasons["b"]


def test_boundaries_are_no_masks_of_images_that_have_gone(tmp_path: Path) -> None:
    root = table(tmp_path / "data", ["a.png"])
    run = run_of(tmp_path / "run", {"kind": "folder", "root": str(root)}, ["a"])
    for name in ("a", "boundaries/a"):
        write_mask(run / f"pseudo/lpcam/{name}.png", np.ones(SIZE, np.uint8))
    masks = RunFolder(run).masks()
    assert masks.name == "pseudo/lpcam"
    assert [entry.id for entry in masks.entries] == ["a"]
    assert not any(isinstance(entry, Skip) for entry in masks.entries)


def test_masks_after_a_crf_are_not_those_of_images_that_have_gone(tmp_path: Path) -> None:
    root = table(tmp_path / "data", ["a.png"])
    run = run_of(tmp_path / "run", {"kind": "folder", "root": str(root)}, [])
    for name in ("a", "crf/a"):
        write_mask(run / "test/lpcam" / f"{name}.png", np.ones(SIZE, np.uint8))
    for name in ("test/lpcam", "test/lpcam/crf"):
        (entry,) = RunFolder(run).masks(name).entries
        assert entry.id == "a"


def test_missing_predictions_are_told(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        picture(tmp_path / "images" / name)
    images = {name: str(tmp_path / f"images/{name}.png") for name in "ab"}
    skipped = {"image": "images/broken.png", "reason": "cannot read image images/broken.png"}
    folder = predicted(tmp_path / "predicted", images, [skipped])
    (folder / "masks/b.png").unlink()
    assert left_out(folder, tmp_path / "out") == {
        "b": f"there is no mask {folder / 'masks/b.png'}; run 'lpcam predict' again",
        "images/broken.png": "cannot read image images/broken.png",
    }
    (folder / "masks/a.png").unlink()
    with pytest.raises(ArtefactError, match="has no masks; run 'lpcam predict' first"):
        RunFolder(folder).masks()
