"""The commands on data sets and files of other programs, as a user types them."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import draw_folder, recipe_values, write_weights

from lpcam.cli import main
from lpcam.data.images import read_index_mask
from lpcam.masks import write_mask
from lpcam.pipeline import run
from lpcam.recipe import parse_recipe
from lpcam.storage import read_json, read_maps, write_json


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run up to its seeds."""
    base = tmp_path_factory.mktemp("commands")
    folder, weights = draw_folder(base / "boxes"), write_weights(base / "weights.safetensors")
    run(parse_recipe(recipe_values(folder, base / "run", weights), where="tiny"), until="seeds")
    return base / "run"


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(list(arguments)) == 2
    return capsys.readouterr().err


# -- Export ------------------------------------------------------------------------------------


def test_masks_of_a_run_as_coco(done: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    arguments = ["export", "masks", str(done), str(output), "--format", "coco"]
    assert main(arguments) == 0
    index = read_json(output / "exported.json")
    assert index["made_by"]["masks"] == "seeds"
    assert index["made_by"]["command"] == f"lpcam {' '.join(arguments)}"
    written = [path for path in output.glob("*.json") if path.name != "exported.json"]
    document = json.loads(written[0].read_text())
    assert len(document["images"]) == 12
    assert [c["name"] for c in document["categories"]] == ["blue", "green", "red"]
    areas = dict.fromkeys(range(1, 4), 0)
    for one in document["annotations"]:
        areas[one["category_id"]] += one["area"]
    values = np.concatenate([read_index_mask(p).ravel() for p in (done / "seeds").glob("*.png")])
    assert areas == {i: int((values == i).sum()) for i in range(1, 4)}


@pytest.mark.parametrize("format", ["irn", "psa"])
def test_maps_of_a_run_go_out_and_come_back(format: str, done: Path, tmp_path: Path) -> None:
    out, back = tmp_path / "npy", tmp_path / "npz"
    assert main(["export", "maps", str(done), str(out), "--format", format, "--from", "cam"]) == 0
    assert len(list(out.glob("*.npy"))) == 12
    assert main(["import", "maps", str(out), str(back), "--style", format]) in (0, 1)
    own = read_maps(done / "cam" / "i00.npz")
    theirs = read_maps(back / "i00.npz")
    assert theirs.keys.tolist() == own.keys.tolist()
    np.testing.assert_allclose(theirs.high_res, own.high_res, atol=1e-3)


def test_images_without_a_class_come_back_where_the_data_set_is_known(
    done: Path, tmp_path: Path
) -> None:
    """PSA's style has no size for them: MCTformer writes no file."""
    out, back = tmp_path / "npy", tmp_path / "npz"
    main(["export", "maps", str(done), str(out), "--format", "psa"])
    (out / "i03.npy").unlink()
    data = str(done.parent / "boxes")
    arguments = ["import", "maps", str(out), str(back), "--data", data, "--style", "psa"]
    assert main(arguments) == 1  # left out, and said so
    assert not (back / "i03.npz").exists()
    assert main([*arguments, "--no-file-no-class"]) == 0
    assert read_maps(back / "i03.npz").high_res.shape[0] == 0


def test_predicted_masks_are_exported_in_the_order_of_their_classes(
    tmp_path: Path,
) -> None:
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


def test_what_cannot_be_exported(
    done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    masks, maps = ["export", "masks", str(done), out], ["export", "maps", str(done), out]
    assert "no format was given; choose one by --format voc|coco|" in refused(capsys, *masks)
    assert "not irn; choose one by --format" in refused(capsys, *masks, "--format", "irn")
    message = refused(capsys, *masks, "--format", "coco", "--from", "pseudo/lpcam")
    assert "has no masks 'pseudo/lpcam'; it has seeds" in message
    message = refused(capsys, *maps, "--format", "irn", "--from", "x")
    assert "has no maps 'x'; it has lpcam, cam, lpcam_f" in message
    assert "have one: --background is its score" in refused(capsys, *maps, "--format", "amn")
    message = refused(capsys, *maps, "--format", "irn", "--background", "0.2")
    assert "have no background: --background" in message
    message = refused(capsys, *maps, "--format", "irn", "--instances")
    assert "--instances belongs to masks" in message
    message = refused(capsys, "export", "masks", str(tmp_path), out, "--format", "coco")
    assert "holds neither a run nor what 'lpcam predict' wrote" in message
    message = refused(capsys, "export", "onnx", str(done), out, "--format", "coco")
    assert "--format belongs to masks and maps; leave it out" in message
    assert not Path(out).exists()


# -- Import ------------------------------------------------------------------------------------


def test_cls_labels_become_a_table(tmp_path: Path) -> None:
    source, output = tmp_path / "cls_labels.npy", tmp_path / "labels.csv"
    vector = np.zeros(20, np.float32)
    vector[[7, 14]] = 1
    np.save(source, np.array({2007000032: vector}, dtype=object), allow_pickle=True)
    assert main(["import", "labels", str(source), str(output)]) == 0
    with output.open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert row == {"image": "2007_000032", "labels": "cat;person"}


def test_names_of_classes_that_are_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refused(
        capsys, "import", "labels", "x.npy", str(tmp_path / "l.csv"), "--classes", "voc13"
    )
    assert "no class names 'voc13': give voc12, coco14, or a file" in message


def test_a_hugging_face_data_set_becomes_a_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    datasets = pytest.importorskip("datasets")
    pictures = [Image.fromarray(np.full((9, 9, 3), v, np.uint8)) for v in (10, 200)]
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["dark", "light"])}
    )
    made = datasets.Dataset.from_dict({"image": pictures, "label": [0, 1]}, features=features)
    made.save_to_disk(str(tmp_path / "stored"))
    output = tmp_path / "folder"
    assert main(["import", "huggingface", str(tmp_path / "stored"), str(output)]) == 0
    assert f"next: lpcam init {output}" in capsys.readouterr().out
    assert main(["data", "check", str(output), "--no-estimate"]) in (0, 1)
    assert "2 images (.png), 2 classes" in capsys.readouterr().out


# -- Data --------------------------------------------------------------------------------------


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


def test_masks_are_painted_of_annotations(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    Image.fromarray(np.zeros((2, 3, 3), np.uint8)).save(tmp_path / "images" / "a.png")
    shape = {"size": [2, 3], "counts": [2, 2, 2]}  # down the columns: the middle one
    one = {"id": 1, "image_id": 5, "category_id": 9, "iscrowd": 0, "segmentation": shape}
    document = {
        "images": [{"id": 5, "file_name": "a.png", "height": 2, "width": 3}],
        "annotations": [{**one, "area": 2}],
        "categories": [{"id": 9, "name": "cow"}],
    }
    (tmp_path / "mine.json").write_text(json.dumps(document))
    output = tmp_path / "masks"
    assert main(["data", "masks", str(tmp_path / "mine.json"), str(output)]) == 0
    assert read_index_mask(output / "a.png").tolist() == [[0, 1, 0], [0, 1, 0]]


def test_a_recipe_for_a_json_file_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``lpcam init`` knows what it looks at."""
    image = np.zeros((40, 40, 3), np.uint8)
    Image.fromarray(image).save(tmp_path / "a.png")
    document = {
        "images": [{"id": 5, "file_name": "a.png", "height": 40, "width": 40}],
        "annotations": [
            {
                "id": 1,
                "image_id": 5,
                "category_id": 9,
                "iscrowd": 0,
                "area": 1,
                "bbox": [0, 0, 1, 1],
            }
        ],
        "categories": [{"id": 9, "name": "cow"}],
    }
    (tmp_path / "mine.json").write_text(json.dumps(document))
    weights = write_weights(tmp_path / "weights.safetensors")
    arguments = ["--backbone", "test_resnet", "--weights", str(weights)]
    assert main(["init", str(tmp_path / "mine.json"), *arguments]) == 0
    text = (tmp_path / "recipe.yaml").read_text()
    assert "kind: coco" in text and "root: mine.json" in text
    assert "cow: 1" in capsys.readouterr().out
