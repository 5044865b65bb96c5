"""``lpcam init``: a stranger's folder is looked at, and the recipe written for it works."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from tiny import draw_folder

from lpcam.data.folder import read_folder
from lpcam.pipeline.new_recipe import write_recipe
from lpcam.pipeline.recipe import load_recipe
from lpcam.runtime.errors import ClassifierError, DataError


def write(folder: Path, **options: str) -> tuple[Path, str]:
    return write_recipe(folder, options.pop("backbone", "mobilenetv2_100"), "pretrained", **options)


def test_the_recipe_loads_and_names_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = draw_folder(tmp_path / "my boxes")
    path, summary = write(folder)
    assert path == folder / "recipe.yaml"
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(path)
    assert recipe.name == "my boxes"
    assert recipe.data.kind == "folder"
    assert recipe.data.root.resolve() == folder
    assert recipe.data.classes == ("blue", "green", "red")
    assert recipe.classifier.backbone == "mobilenetv2_100"
    assert recipe.classifier.output_stride == 16
    assert recipe.classifier.weights == "pretrained"
    assert recipe.seeds.threshold is None
    assert recipe.folder == Path("runs/my boxes")
    # the folder is read with the recipe's own classes
    assert len(read_folder(recipe.data.root, classes=recipe.data.classes).items) == 12
    assert summary.splitlines()[0] == "12 images with labels, 12 of them with masks"
    text = path.read_text("utf-8")
    assert text.count("#") >= 8  # it is commented
    assert f"lpcam run {path}" in text


def test_the_summary_counts_and_lists_what_is_left_out(tmp_path: Path) -> None:
    folder = draw_folder(tmp_path / "boxes", masks=False)
    (folder / "images" / "i05.png").write_bytes(b"\x89PNG broken")
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(folder / "images" / "more.png")
    with (folder / "labels.csv").open("a") as file:
        file.write("gone.png,red\ni00.png,red\n")
    _, summary = write(folder)
    lines = summary.splitlines()
    assert lines[0] == "11 images with labels, 0 of them with masks"
    assert lines[1] == "images per class:"
    # i00 blue green (and red by its second line), i04 and i08 have two labels, i05 is damaged
    labels = [item.labels for item in read_folder(folder).items.values() if item.id != "i05"]
    for index, name in enumerate(("blue", "green", "red")):
        count = sum(index in of_image for of_image in labels)
        assert lines[2 + index] == f"  {name}: {count}   few: expect weak maps"
    assert "i00 (lines 2, 15)" in summary
    skipped = summary[summary.index("3 skipped:") :]
    assert "gone.png: labels.csv line 14 has no image" in skipped
    assert "more: it has no line in labels.csv; add one" in skipped
    assert "i05: cannot read image" in skipped


def test_outlines_of_annotations_are_counted_as_masks(tmp_path: Path) -> None:
    shapes: list[object] = [{"size": [8, 8], "counts": [60, 4]}, []]  # the second is a box alone
    for number in range(3):  # the last shows nothing: its mask is the background alone
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"{number}.png")
    document = {
        "images": [{"id": n, "file_name": f"{n}.png", "height": 8, "width": 8} for n in range(3)],
        "annotations": [
            {"id": n, "image_id": n, "category_id": 1, "iscrowd": 0, "segmentation": shape}
            for n, shape in enumerate(shapes)
        ],
        "categories": [{"id": 1, "name": "cow"}],
    }
    (tmp_path / "mine.json").write_text(json.dumps(document))
    _, summary = write(tmp_path / "mine.json")
    assert summary.splitlines()[0] == "3 images with labels, 2 of them with masks"


def test_the_first_wrong_mask_names_the_command_that_lists_all(tmp_path: Path) -> None:
    folder = draw_folder(tmp_path / "my boxes")
    Image.fromarray(np.zeros((5, 5), np.uint8)).save(folder / "masks" / "i02.png")
    message = (
        r"mask of 'i02': .* is 5 x 5 .*; save the mask in the size of the image\. All that is "
        r"wrong is listed by: lpcam data check '.*my boxes'$"
    )
    with pytest.raises(DataError, match=message):
        write(folder)


def test_an_existing_recipe_is_kept(tmp_path: Path) -> None:
    folder = draw_folder(tmp_path / "boxes")
    (folder / "recipe.yaml").write_text("mine")
    with pytest.raises(DataError, match=r"recipe\.yaml exists already; run it, or delete it"):
        write(folder)
    assert (folder / "recipe.yaml").read_text() == "mine"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Kühe & Pferde", "Kühe - Pferde"),
        (".hidden", "hidden"),
        ("a: {b} #c", "a- -b- -c"),
        ("x" * 150, "x" * 100),
        ("&&&", "run"),
    ],
)
def test_any_folder_name(tmp_path: Path, name: str, expected: str) -> None:
    folder = draw_folder(tmp_path / name, count=6)
    path, _ = write(folder)
    assert load_recipe(path).name == expected


def test_weights_of_a_file_are_found_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: Path
) -> None:
    folder = draw_folder(tmp_path / "boxes", count=6)
    shutil.copy(weights, tmp_path / "w.safetensors")
    monkeypatch.chdir(tmp_path)
    path, _ = write_recipe(folder, "test_resnet", "w.safetensors")
    monkeypatch.chdir(folder)
    recipe = load_recipe(path)
    assert recipe.classifier.weights == str(tmp_path / "w.safetensors")
    assert recipe.classifier.output_stride == 16


@pytest.mark.parametrize(
    "backbone",
    [
        "resnet18",
        "mobilenetv2_100",
        "efficientnet_b0",
        "convnext_atto",
        "test_vit",
    ],
)
def test_the_output_stride_suits_the_backbone(tmp_path: Path, backbone: str) -> None:
    path, _ = write(draw_folder(tmp_path / "boxes", count=6), backbone=backbone)
    stride = load_recipe(path).classifier.output_stride
    with torch.device("meta"):  # builds and forgets the weights
        try:
            timm.create_model(backbone, output_stride=16)
            expected = 16
        except TypeError:
            expected = None
    assert stride == expected


def test_a_backbone_or_weights_that_are_not_there(tmp_path: Path) -> None:
    folder = draw_folder(tmp_path / "boxes", count=6)
    with pytest.raises(ClassifierError, match=r"resnet5O.*resnet50"):
        write(folder, backbone="resnet5O")
    with pytest.raises(ClassifierError, match=r"no weights file '/.*gone\.safetensors'; give the"):
        write_recipe(folder, "test_resnet", "gone.safetensors")
    assert not (folder / "recipe.yaml").exists()


def test_a_class_without_an_image_is_left_out(tmp_path: Path) -> None:
    folder = draw_folder(tmp_path / "boxes", count=6)
    (folder / "classes.txt").write_text("blue\ngreen\nred\nyellow\n")
    path, summary = write(folder)
    assert load_recipe(path).data.classes == ("blue", "green", "red")
    assert "  yellow: 0   none: left out of the recipe" in summary.splitlines()
    # mask ids stay those of classes.txt
    table = read_folder(folder, classes=("red", "blue")).classes
    assert table.mask_ids == (3, 1)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("train2014", "val2014"), ("train2014", "val2014")),
        (("test", "train", "valid"), ("train", "valid")),
        (("test2017", "train2017", "val2014"), ("train2017", "test2017")),
        (("train",), None),
        (("val", "trainer"), None),
    ],
)
def test_annotations_for_training_and_validation_are_kept_apart(
    tmp_path: Path, names: tuple[str, ...], expected: tuple[str, str] | None
) -> None:
    """What is tested on is not trained on; a class that it alone shows cannot be learnt."""
    for number, name in enumerate(names):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / name / "1.png")
        (tmp_path / name / "_annotations.coco.json").write_text(
            json.dumps(
                {
                    "images": [{"id": 1, "file_name": "1.png", "height": 8, "width": 8}],
                    "annotations": [
                        {"id": 1, "image_id": 1, "category_id": 1 + ("train" not in name)}
                    ],
                    "categories": [{"id": 1, "name": "cow"}, {"id": 2, "name": "hen"}],
                }
            )
        )
    path, summary = write(tmp_path)
    data = load_recipe(path).data
    stages = ("classify", "prototypes", "maps", "evaluate", "test")
    if expected is None:
        assert [data.list_of(stage) for stage in stages] == ["all"] * 5
        assert "lists:" not in summary + path.read_text()
        return
    train, test = expected
    assert [data.list_of(stage) for stage in stages] == [train] * 4 + [test]
    assert data.classes == ("cow",)
    assert summary.splitlines()[1:5] == [
        f"lists: {train} to learn from, to map and to score; {test} to test",
        f"images per class, of {train}:",
        "  cow: 1   few: expect weak maps",
        "  hen: 0   none: left out of the recipe",
    ]
