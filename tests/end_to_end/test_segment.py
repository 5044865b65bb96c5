"""From pseudo masks to a segmenter: training, masks of the list to test, figures, new images."""

from __future__ import annotations

import copy
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import digests, recipe_values, times

from lpcam.cli.main import main
from lpcam.data.images import read_image
from lpcam.data.masks import read_index_mask
from lpcam.evaluation.segmentation import confusion, scores, truth_labels
from lpcam.pipeline.recipe import parse_recipe
from lpcam.pipeline.run import run, segment
from lpcam.pipeline.run_folder import RunFolder
from lpcam.runtime.errors import ArtefactError, ClassifierError, DataError, RecipeError
from lpcam.runtime.files import read_json
from lpcam.segmentation import inference as predict
from lpcam.segmentation.segmenter import Segmenter
from lpcam.training import loop as engine

Values = dict[str, Any]
REFINE = {"method": "crf", "maps": ["CAM", "LPCAM"]}
SEGMENT = {
    "network": "deeplabv2",
    "backbone": "test_resnet",
    "weights": "random",
    "masks": ["CAM", "LPCAM", "truth"],
    "training": {
        "preset": "light",
        "iterations": 4,
        "batch_size": 4,
        "crop": 49,
    },
    "validations": 2,
}


def go(values: Values, **options: Any) -> Any:
    return run(parse_recipe(values, where="tiny.yaml"), command="lpcam run tiny.yaml", **options)


def changed(values: Values, **sections: Any) -> Values:
    return {**copy.deepcopy(values), **sections}


def in_folder(values: Values, folder: Path) -> Values:
    return changed(values, run={**values["run"], "folder": str(folder)})


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, pictures: Path, weights: Path) -> Values:
    """No test may change it."""
    values = recipe_values(pictures, tmp_path_factory.mktemp("finished") / "run", weights)
    values |= {"refine": REFINE, "segment": SEGMENT}
    go(values)
    return values


@pytest.fixture
def values(finished: Values, tmp_path: Path) -> Values:
    shutil.copytree(finished["run"]["folder"], tmp_path / "run")
    return in_folder(finished, tmp_path / "run")


def folder_of(values: Values) -> Path:
    return Path(values["run"]["folder"])


def made(values: Values) -> dict[str, str]:
    """Digests of a run's files but the recipe, which names the folder."""
    return {k: v for k, v in digests(folder_of(values)).items() if k != "recipe.yaml"}


def segmentation_rows(values: Values) -> dict[str, dict[str, Any]]:
    rows = read_json(folder_of(values) / "metrics.json")["rows"]
    return {row["method"]: row for row in rows if row["stage"] == "segmentation"}


def test_masks_that_show_no_class_score_no_segmenter(values: Values, tmp_path: Path) -> None:
    root = tmp_path / "boxes"
    shutil.copytree(values["data"]["root"], root)
    for path in (root / "masks").iterdir():
        Image.fromarray(np.array(Image.open(path)) * np.uint8(0)).save(path)
    values["data"] |= {"root": str(root), "anyway": True}
    section = {**SEGMENT, "masks": ["LPCAM"]}
    for _ in range(2):  # made, and up to date
        result = go(changed(values, segment=section, report={"images": 4}))
        assert result.rows == [] and result.report is not None
        assert "so the segmenters cannot be scored" in result.report.read_text("utf-8")


def test_masks_are_those_of_the_trained_network(finished: Values) -> None:
    folder = folder_of(finished)
    recipe = parse_recipe(finished, where="tiny.yaml")
    assert recipe.segment is not None
    crf = predict.make_crf(recipe.segment.test)
    assert crf is not None
    for name in ("cam", "lpcam", "truth"):
        segmenter = Segmenter.load(folder / "segment" / name / "segmenter.safetensors")
        for image in ("i00", "i03"):
            picture = read_image(Path(finished["data"]["root"], "images", f"{image}.png"))
            found = predict.probabilities(segmenter, picture, recipe.segment.test)
            mask = predict.label_mask(predict.labels(found), segmenter.classes)
            path = folder / "test" / name / f"{image}.png"
            assert np.array_equal(read_index_mask(path), mask)
            refined = predict.refine(found, picture, recipe.segment.test, crf)
            mask = predict.label_mask(predict.labels(refined), segmenter.classes)
            assert np.array_equal(read_index_mask(path.parent / "crf" / path.name), mask)
        assert not (folder / "segment" / name / engine.CHECKPOINT).exists()


def test_rows_are_the_scores_of_the_masks(finished: Values) -> None:
    root = Path(finished["data"]["root"])
    rows = segmentation_rows(finished)
    titles = {"cam": "CAM + CRF", "lpcam": "LPCAM + CRF", "truth": "true masks"}
    assert list(rows) == [
        f"DeepLabV2 on {title}{crf}" for title in titles.values() for crf in ("", ", CRF")
    ]
    recipe = parse_recipe(finished, where="tiny.yaml")
    segmenter = Segmenter.load(folder_of(finished) / "segment" / "cam" / "segmenter.safetensors")
    for name, title in titles.items():
        for crf in (False, True):
            masks = folder_of(finished) / "test" / name / ("crf" if crf else "")
            total = torch.zeros(4, 4, dtype=torch.int64)
            for path in sorted(masks.glob("*.png")):
                truth = truth_labels(read_index_mask(root / "masks" / path.name), segmenter.classes)
                own = truth_labels(read_index_mask(path), segmenter.classes)
                total += confusion(truth, own, 4)
            row = rows[f"DeepLabV2 on {title}{', CRF' if crf else ''}"]
            expected = scores(total, segmenter.classes.names)
            assert (row["miou"], row["fp"]) == (expected.miou, expected.fp)
            assert row["images"] == 12
            protocol = row["protocol"]
            assert protocol["crf"] == ("deeplab" if crf else False)
            assert protocol["threshold_source"] == "none: the most probable label"
            assert protocol["segmenter"]["training"]["iterations"] == 4
            assert protocol["segmenter"]["checkpoint"] == "last step"
            assert protocol["segmenter"]["tested_on_training_images"] == 12
            assert protocol["segmenter"]["mask_threshold"] == (None if name == "truth" else 0.5)
            assert protocol["segmenter"]["crf"]["bilateral_sxy"] == 67.0
            assert ("scales" in protocol) == (name != "truth")
            assert (protocol["refine"] is None) == (name == "truth")
    assert recipe.segment is not None
    history = read_json(folder_of(finished) / "metrics.json")["segmenter_history"]
    assert set(history) == {"cam", "lpcam", "truth"}
    assert [record["step"] for record in history["lpcam"]] == [1, 2, 3, 4]
    assert [record["step"] for record in history["lpcam"] if "validation_miou" in record] == [2, 4]


def test_a_second_run_does_nothing(values: Values) -> None:
    go(values)  # the recipe names the folder, which is a copy
    before = times(folder_of(values))
    go(values)
    assert times(folder_of(values)) == before


@pytest.mark.parametrize(
    ("key", "value", "redone"),
    [
        ("training", {**SEGMENT["training"], "learning_rate": 1e-4}, {"segment", "test"}),
        ("checkpoint", "best", {"test"}),
        ("test", {"preset": "multi_scale"}, {"test"}),
        ("validations", 0, {"segment", "test"}),  # its record of what made it is another
        ("masks", ["LPCAM"], set()),
    ],
)
def test_what_makes_a_stage_anew(values: Values, key: str, value: Any, redone: set[str]) -> None:
    folder = folder_of(values)

    def records() -> dict[str, int]:
        return {
            stage: (folder / stage / "lpcam" / "stage.json").stat().st_mtime_ns
            for stage in ("pseudo", "segment", "test")
        }

    before = records()
    go(changed(values, segment={**SEGMENT, "masks": ["LPCAM"], key: value}))
    after = records()
    assert {stage for stage in before if before[stage] != after[stage]} == redone
    assert len(segmentation_rows(values)) == 2


def test_a_stopped_training_goes_on(
    finished: Values, values: Values, monkeypatch: pytest.MonkeyPatch
) -> None:
    for stage in ("segment", "test"):
        shutil.rmtree(folder_of(values) / stage / "lpcam")
    save = engine._save

    def stop(*arguments: Any) -> None:
        save(*arguments)
        if arguments[3] == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(engine, "_save", stop)
    with pytest.raises(KeyboardInterrupt):
        go(values)
    assert (folder_of(values) / "segment" / "lpcam" / engine.CHECKPOINT).is_file()
    monkeypatch.setattr(engine, "_save", save)
    go(values)
    assert made(values) == made(finished)


def test_a_renamed_class_makes_the_segmenter_anew(values: Values) -> None:
    """Its name is in the segmenter's file, and so in all that is made with it."""
    root = folder_of(values).parent / "data"
    shutil.copytree(values["data"]["root"], root)
    labels = (root / "labels.csv").read_text().replace("green", "emerald")
    (root / "labels.csv").write_text(labels)
    (root / "classes.txt").write_text("blue\nemerald\nred\n")
    section = {**SEGMENT, "masks": ["LPCAM"], "validations": 0}
    go(changed(values, data={**values["data"], "root": str(root)}, segment=section))
    path = folder_of(values) / "segment" / "lpcam" / "segmenter.safetensors"
    assert Segmenter.load(path).classes.names == ("blue", "emerald", "red")


def test_the_best_weights_are_those_of_the_present_truth(values: Values) -> None:
    best = changed(values, segment={**SEGMENT, "masks": ["LPCAM"], "checkpoint": "best"})
    go(best)
    (folder_of(values) / "segment" / "lpcam" / "best.safetensors").unlink()
    go(best)  # made again
    assert (folder_of(values) / "segment" / "lpcam" / "best.safetensors").is_file()
    maps = {**values["maps"], "maximum_side": 70}
    with pytest.raises(ArtefactError, match=r"was chosen on other true masks .*; delete"):
        go(changed(best, maps=maps, segment={**best["segment"], "masks": ["truth"]}))


def test_what_is_refused_before_any_work(values: Values, tmp_path: Path) -> None:
    def refused(kind: type[Exception], message: str, **section: Any) -> None:
        folder = tmp_path / "new"
        with pytest.raises(kind, match=message):
            go(changed(in_folder(values, folder), segment={**SEGMENT, **section}))
        assert not (folder / "classifier").exists()

    own = str(tmp_path / "own.safetensors")
    refused(ClassifierError, r"segment\.weights: there is no file .*own", weights=own)
    refused(ClassifierError, "no pretrained weights", backbone=None, weights="pretrained")
    refused(ClassifierError, "timm has no model 'resnet_1'", backbone="resnet_1")
    (tmp_path / "own.safetensors").write_bytes(b"no tensors")
    refused(ClassifierError, r"own\.safetensors' cannot be read", weights=own)
    training = {**SEGMENT["training"], "batch_size": 14, "accumulation": 14}
    refused(ClassifierError, "12 images in 14 parts", training=training)
    swin = {"preset": "upernet.voc12.paper", "batch_size": 1}
    tiny = {"network": "upernet", "backbone": "tiny", "training": swin}
    tiny["arguments"] = {"embed_dim": 12, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2]}
    refused(ClassifierError, "need two images at a time, but a forward pass has 1", **tiny)


def test_masks_of_another_program(
    values: Values, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those that the run has made itself give the segmenter that the run has."""
    masks = folder_of(values) / "pseudo" / "lpcam"
    (tmp_path / "tiny.yaml").write_text(json.dumps(values))
    folder = tmp_path / "segmented"
    command = ["segment", str(tmp_path / "tiny.yaml"), str(masks)]
    command += ["--run.folder", str(folder)]
    assert main(command) == 0
    assert "DeepLabV2 on given masks" in capsys.readouterr().out
    own = folder_of(values) / "test" / "lpcam"
    for path in sorted(own.glob("*.png")):
        assert (folder / "test" / "given" / path.name).read_bytes() == path.read_bytes()
    rows = read_json(folder / "metrics.json")["rows"]
    assert {row["stage"] for row in rows} == {"segmentation"}
    assert all(len(row["protocol"]["given_masks"]) == 32 for row in rows)
    before = times(folder)
    assert main(command) == 0
    assert times(folder) == before


def test_bad_masks_of_another_program(values: Values, tmp_path: Path) -> None:
    recipe = parse_recipe(in_folder(values, tmp_path / "given"), where="tiny.yaml")
    masks = tmp_path / "masks"
    shutil.copytree(folder_of(values) / "pseudo" / "lpcam", masks)
    whole = Image.open(masks / "i05.png")
    (masks / "i05.png").unlink()
    with pytest.raises(DataError, match=r"1 of 12 images .* have no mask, e\.g\. .*i05\.png"):
        segment(recipe, masks)
    Image.fromarray(np.zeros((5, 7), np.uint8)).save(masks / "i05.png")
    with pytest.raises(DataError, match=r"i05.*5 x 7|i05.*7 x 5"):
        segment(recipe, masks)
    Image.fromarray(np.full((whole.height, whole.width), 255, np.uint8)).save(masks / "i05.png")
    segment(recipe, masks)
    folder = tmp_path / "given" / "segment" / "given"
    output, trained = read_json(folder / "stage.json")["output"], folder / "segmenter.safetensors"
    assert (output["images"], [skip["id"] for skip in output["dropped"]]) == (11, ["i05"])
    before = trained.read_bytes()  # a finished segmenter is kept where other masks are refused
    Image.fromarray(np.full((whole.height, whole.width), 77, np.uint8)).save(masks / "i05.png")
    with pytest.raises(DataError, match=r"i05.*77"):
        segment(recipe, masks)
    assert trained.read_bytes() == before


def test_a_recipe_that_makes_no_masks(values: Values, tmp_path: Path) -> None:
    without = in_folder(values, tmp_path / "new")
    without.pop("refine")
    with pytest.raises(RecipeError, match=r"makes no pseudo masks of CAM; add a section refine"):
        go(without)
    assert not (tmp_path / "new" / "classifier").exists()  # before any work
    with pytest.raises(RecipeError, match=r"whose pseudo masks are not made; add it to"):
        go(changed(values, refine={**REFINE, "maps": ["LPCAM"]}))
    only = changed(values)
    only.pop("segment")
    with pytest.raises(RecipeError, match=r"no stage 'test'.*--segment\.network"):
        go(only, until="test")
    with pytest.raises(RecipeError, match=r"names no segmenter; add a section"):
        segment(parse_recipe(only, where="tiny.yaml"), tmp_path)


def test_predict(values: Values, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = Path(values["data"]["root"], "images")
    run_folder, out = str(folder_of(values)), tmp_path / "out"
    assert main(["predict", str(images), "--run", run_folder, "--output", str(out)]) == 0
    for path in sorted((folder_of(values) / "test" / "lpcam" / "crf").glob("*.png")):
        assert np.array_equal(read_index_mask(out / "masks" / path.name), read_index_mask(path))
    index = read_json(out / "predicted.json")
    assert "lpcam predict" in json.dumps(index)
    plain = tmp_path / "plain"
    command = ["predict", str(images / "i00.png"), "--run", run_folder, "--output", str(plain)]
    assert main([*command, "--no-crf", "--trained-on", "cam", "--probabilities"]) == 0
    own = folder_of(values) / "test" / "cam" / "i00.png"
    assert np.array_equal(read_index_mask(plain / "masks" / "i00.png"), read_index_mask(own))
    assert (plain / "probabilities" / "i00.npz").is_file()
    capsys.readouterr()
    assert main([*command, "--trained-on", "given"]) == 2
    assert "no segmenter trained on given; there are: lpcam, cam, truth" in capsys.readouterr().err


def test_where_there_is_no_segmenter(tmp_path: Path, values: Values) -> None:
    with pytest.raises(ArtefactError, match=r"holds no run: there is no recipe\.yaml"):
        RunFolder(tmp_path / "nowhere").segmenters()
    shutil.rmtree(folder_of(values) / "segment")
    with pytest.raises(ArtefactError, match=r"has no segmenter trained; there are: none, bring"):
        RunFolder(folder_of(values)).segmenters()
    path = folder_of(values) / "recipe.yaml"
    text = path.read_text()
    path.write_text(re.sub(r"(?ms)^segment:\n.*?(?=^\w)", "segment: null\n", text))
    with pytest.raises(
        ArtefactError, match=r"trained no segmenter; run it with --segment\.network"
    ):
        RunFolder(folder_of(values)).segmenters()
