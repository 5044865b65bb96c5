"""The commands on data sets and files of other programs, as a user types them."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import draw_folder, recipe_values

from lpcam.cli.main import main
from lpcam.data.map_files import read_maps
from lpcam.data.masks import read_index_mask, write_mask
from lpcam.pipeline.recipe import load_recipe, parse_recipe
from lpcam.pipeline.run import run
from lpcam.runtime.files import read_json, write_json


@pytest.fixture(scope="module")
def part(tmp_path_factory: pytest.TempPathFactory, weights: Path) -> Path:
    """The folder of a run of some of its data set's classes, in an order of its own."""
    base = tmp_path_factory.mktemp("part")
    folder = draw_folder(base / "boxes")
    (folder / "classes.txt").write_text("pink\nblue\nblack\ngreen\nred\n")
    values = recipe_values(folder, base / "run", weights)
    values["data"]["classes"] = ["red", "blue"]
    values["data"]["anyway"] = True  # the masks are of three classes
    run(parse_recipe(values, where="tiny"), until="cam")
    return base / "run"


@pytest.fixture
def model(weights: Path) -> list[str]:
    """Options of lpcam init for the tiny backbone."""
    return ["--backbone", "test_resnet", "--weights", str(weights)]


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(list(arguments)) == 2
    return capsys.readouterr().err


def test_keys_of_some_classes_are_those_of_the_whole_data_set(
    part: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, data = tmp_path / "npy", ["--data", str(part.parent / "boxes")]
    assert main(["export", "maps", str(part), str(out), "--format", "irn", "--from", "cam"]) == 0
    assert (out / "classes.txt").read_text() == "red\t5\nblue\t2\n"
    own = {path.stem: read_maps(path).keys.tolist() for path in (part / "cam").glob("*.npz")}
    assert own["i00"] == [1] and own["i08"] == [0, 1]
    arguments = ["import", "maps", str(out)]

    def back(*options: str) -> dict[str, list[str]]:
        folder = tmp_path / f"npz{len(list(tmp_path.iterdir()))}"
        assert main([*arguments, str(folder), *options]) in (0, 1)
        found = {path.stem: read_maps(path) for path in folder.glob("*.npz")}
        return {
            name: sorted(maps.made_by["classes"][key] for key in maps.keys.tolist())
            for name, maps in found.items()
            if len(maps.keys)
        }

    expected = {n: sorted(["red", "blue"][k] for k in keys) for n, keys in own.items() if keys}
    table = ["--classes", str(out / "classes.txt")]
    for options in (table, data, [*data, *table]):
        assert back(*options) == expected
    capsys.readouterr()
    assert back(*data, "--classes", "blue").keys() == {
        k for k, v in expected.items() if "blue" in v
    }
    reds = sum("red" in names for names in expected.values())
    assert f"red {reds}" in capsys.readouterr().out
    (tmp_path / "two.txt").write_text("pink\nblue\n")
    (tmp_path / "kow.txt").write_text("kow\n")
    assert main([*arguments, str(tmp_path / "x"), "--classes", str(tmp_path / "two.txt")]) == 1
    assert "i02.npy is refused: it has the key 4" in capsys.readouterr().out
    for options, named in (
        ([*data, "--classes", str(tmp_path / "kow.txt")], "kow"),
        (["--classes", "blue"], "blue"),
        (["--lists", "train"], "--lists"),
        ([*data, "--lists", "train"], "train"),
    ):
        assert named in refused(capsys, *arguments, str(tmp_path / "x"), *options)


def test_maps_for_a_recipe_of_some_classes_are_imported_for_them(
    part: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, data = tmp_path / "npy", ["--data", str(part.parent / "boxes")]
    assert main(["export", "maps", str(part), str(out), "--format", "irn", "--from", "cam"]) == 0
    refine = ["refine", str(part / "recipe.yaml")]
    words = ["--refine.method", "crf", "--run.folder", str(tmp_path / "run")]
    assert main(["import", "maps", str(out), str(tmp_path / "all"), *data]) == 0
    message = refused(capsys, *refine, str(tmp_path / "all"), *words)
    assert "pink, blue, black, green, red" in message
    chosen = tmp_path / "chosen"
    assert main(["import", "maps", str(out), str(chosen), *data, "--classes", "red,blue"]) == 0
    assert main([*refine, str(chosen), *words]) == 0
    assert "skipped" not in capsys.readouterr().out
    for path in (part / "cam").glob("*.npz"):
        own, found = read_maps(path), read_maps(chosen / path.name)
        assert found.keys.tolist() == own.keys.tolist()
        np.testing.assert_allclose(found.high_res, own.high_res, atol=1e-3)


def test_predicted_masks_are_exported_in_the_order_of_their_classes(tmp_path: Path) -> None:
    """The index keeps names sorted; masks know their classes by value."""
    folder, image = tmp_path / "predicted", tmp_path / "a.png"
    Image.fromarray(np.zeros((4, 6, 3), np.uint8)).save(image)
    write_mask(folder / "masks" / "a.png", np.full((4, 6), 3, np.uint8))
    made_by = {"classes": {"zebra": 3, "ant": 7}, "run": "r"}
    index = {"format": 1, "kind": "lpcam predict", "made_by": made_by}
    write_json(folder / "predicted.json", {**index, "images": {"a": str(image)}, "skipped": []})
    output = tmp_path / "out"
    assert main(["export", "masks", str(folder), str(output), "--format", "voc"]) == 0
    names = (output / "class_names.txt").read_text().split("\n")
    assert names[2] == "zebra" and names[6] == "ant"


def test_cls_labels_become_a_table(tmp_path: Path) -> None:
    source, output = tmp_path / "cls_labels.npy", tmp_path / "labels.csv"
    vector = np.zeros(20, np.float32)
    vector[[7, 14]] = 1
    np.save(source, np.array({2007000032: vector}, dtype=object), allow_pickle=True)
    assert main(["import", "labels", str(source), str(output)]) == 0
    with output.open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert row == {"image": "2007_000032", "labels": "cat;person"}


def test_ids_that_are_paths_are_told_by_their_file_and_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    array, ids = tmp_path / "arr.npy", tmp_path / "ids.txt"
    np.save(array, np.ones((2, 20)))
    ids.write_text("2007_000032\n\n/JPEGImages/2007_000033.jpg /Masks/2007_000033.png\n")
    command = ["import", "labels", str(array), str(tmp_path / "l.csv"), "--ids", str(ids)]
    assert f"{ids} line 3" in refused(capsys, *command)
    ids.write_text("2007_000032\n2007_000033.jpg\n")
    assert main(command) == 0
    assert "\n2007_000033,aero" in (tmp_path / "l.csv").read_text()


def test_a_check_tells_and_writes_what_it_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = draw_folder(tmp_path / "boxes")
    (folder / "images" / "i05.png").write_bytes(b"no image")
    found = tmp_path / "found.json"
    arguments = ["data", "check", str(folder), "--no-estimate", "--json", str(found)]
    assert main(arguments) == 1  # something needs attention
    printed = capsys.readouterr().out
    assert "11 images (.png), 3 classes" in printed and "i05" in printed
    values = read_json(found)
    assert values["images"] == 11 and values["needs_attention"]
    assert values["command"].startswith("lpcam data check")


def test_labels_masks_and_classes_are_those_that_were_given(
    tmp_path: Path, model: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, table = draw_folder(tmp_path / "boxes"), tmp_path / "mine.jsonl"
    (folder / "classes.txt").write_text("blue\ngreen\nred\n")
    table.write_text('{"image": "i00.png", "labels": ["red"]}\n')
    drawn, found = (folder / "masks").rename(tmp_path / "drawn"), tmp_path / "found.json"
    words = ["--labels", str(table), "--masks", str(drawn), "--classes", "red,blue"]
    check = ["data", "check", str(folder), "--no-estimate", "--json", str(found)]
    assert main([*check, *words, "--kind", "folder"]) == 1  # the labels are wrong
    assert "1 image (.png), 2 classes, 1 mask; labels from mine.jsonl" in capsys.readouterr().out
    assert main(["init", str(folder), *model, *words]) == 0
    assert "1 images with labels, 1 of them with masks" in capsys.readouterr().out
    data = load_recipe(folder / "recipe.yaml").data
    assert (data.kind, data.labels, data.masks) == ("folder", table, drawn)
    assert data.classes == ("red",)  # no image shows blue
    (folder / "recipe.yaml").unlink()
    drawn = drawn.rename(folder / "drawn")
    assert main(["init", str(folder), *model, "--masks", str(drawn)]) == 0
    assert "\n  masks: drawn\n" in (folder / "recipe.yaml").read_text()


def make_voc(root: Path) -> Path:
    """i00 with a cow and i01 with a dog, lists train, more and val."""
    for name, label in (("i00", "cow"), ("i01", "dog")):
        text = f"<annotation><object><name>{label}</name></object></annotation>"
        for folder in ("Annotations", "JPEGImages", "ImageSets/Segmentation"):
            (root / folder).mkdir(parents=True, exist_ok=True)
        (root / "Annotations" / f"{name}.xml").write_text(text)
        Image.new("RGB", (40, 40)).save(root / "JPEGImages" / f"{name}.jpg")
    for name, ids in (("train", "i00"), ("more", "i00\ni01"), ("val", "i01")):
        (root / "ImageSets" / "Segmentation" / f"{name}.txt").write_text(ids)
    return root


def test_voc_takes_labels_masks_classes_and_lists(
    tmp_path: Path, model: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    root, table = make_voc(tmp_path / "voc"), tmp_path / "mine.csv"
    table.write_text("image,labels\ni00,sheep;cow\ni01,dog\n")
    write_mask(tmp_path / "drawn" / "i01.png", np.full((40, 40), 12, np.uint8))
    words = ["--classes", "sheep,dog", "--lists", "more", "--labels", str(table)]
    words += ["--masks", str(tmp_path / "drawn")]
    assert main(["init", str(root), *model, *words]) == 0
    printed = capsys.readouterr().out
    assert "2 images with labels, 1 of them with masks" in printed and "sheep: 1" in printed
    data = load_recipe(root / "recipe.yaml").data
    assert (data.kind, data.labels, data.masks) == ("voc", table, tmp_path / "drawn")
    assert data.classes == ("sheep", "dog")
    assert {data.list_of("classify"), data.list_of("maps"), data.list_of("test")} == {"more"}
    check = ["data", "check", str(root), "--no-estimate"]
    assert main([*check, "--lists", "val", "--classes", "dog"]) in (0, 1)
    assert "1 image (.jpg), 1 class" in capsys.readouterr().out
    assert "labels 'folders'" in refused(capsys, *check, "--labels", "folders")
    assert "gone" in refused(capsys, *check, "--masks", str(tmp_path / "gone"))


def test_lists_and_classes_of_coco_stand_in_the_recipe(
    tmp_path: Path, model: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "annotations").mkdir()
    for number, name in enumerate(("first", "second", "third")):
        (tmp_path / name).mkdir()
        Image.new("RGB", (40, 40)).save(tmp_path / name / f"{name}.png")
        one = {"id": 1, "image_id": 5, "category_id": 7 + number % 2, "iscrowd": 0, "area": 1}
        document = {
            "images": [{"id": 5, "file_name": f"{name}.png", "height": 40, "width": 40}],
            "annotations": [{**one, "bbox": [0, 0, 1, 1]}],
            "categories": [{"id": 7, "name": "cow"}, {"id": 8, "name": "dog"}],
        }
        (tmp_path / "annotations" / f"{name}.json").write_text(json.dumps(document))
    words = ["--lists", "first,second", "--classes", "cow"]
    assert main(["init", str(tmp_path), *model, *words]) == 0
    assert "2 images with labels" in capsys.readouterr().out
    data = load_recipe(tmp_path / "recipe.yaml").data
    assert (data.kind, data.classes) == ("coco", ("cow",))
    assert data.list_of("maps") == "first" and data.list_of("test") == "second"
    message = refused(capsys, "data", "check", str(tmp_path), "--labels", "x.csv")
    assert "labels" in message and "coco" in message


def test_options_of_a_check_that_do_nothing_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(draw_folder(tmp_path / "boxes"))
    message = refused(capsys, "data", "check", folder, "--recipe", "voc12", "--no-estimate")
    assert "--recipe" in message and "--no-estimate" in message
    for command in (["data", "check"], ["init"]):
        message = refused(capsys, *command, folder, "--lists", "train")
        assert "lists (train)" in message
        for option in ("--lists", "--classes"):
            with pytest.raises(SystemExit):
                main([*command, folder, option, "train,"])
            assert f"{option}: 'train,'" in capsys.readouterr().err
    assert not (tmp_path / "boxes" / "recipe.yaml").exists()


def test_masks_are_painted_of_annotations(
    tmp_path: Path, model: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "images").mkdir()
    Image.fromarray(np.zeros((2, 3, 3), np.uint8)).save(tmp_path / "images" / "a.png")
    shape = {"size": [2, 3], "counts": [2, 2, 2]}  # down the columns: the middle one
    one = {"id": 1, "image_id": 5, "category_id": 9, "iscrowd": 0, "segmentation": shape}
    document = {
        "images": [{"id": 5, "file_name": "a.png", "height": 2, "width": 3}],
        "annotations": [{**one, "area": 2}],
        "categories": [{"id": 9, "name": "cow"}],
    }
    source, output = tmp_path / "mine.json", tmp_path / "masks"
    source.write_text(json.dumps(document))
    assert main(["data", "masks", str(source), str(output)]) == 0
    assert read_index_mask(output / "a.png").tolist() == [[0, 1, 0], [0, 1, 0]]
    # and init writes a recipe for the file
    assert main(["init", str(source), *model]) == 0
    data = load_recipe(tmp_path / "recipe.yaml").data
    assert (data.kind, data.root, data.classes) == ("coco", source, ("cow",))
    folder = draw_folder(tmp_path / "boxes", count=2)
    assert str(folder) in refused(capsys, "data", "masks", str(folder), str(tmp_path / "more"))
