"""The export commands, on a tiny run."""

from __future__ import annotations

import json
import shutil
import tarfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import recipe_values

from lpcam.cli.main import main
from lpcam.data.dataset import ClassTable
from lpcam.data.map_files import map_path, read_maps
from lpcam.data.masks import write_mask
from lpcam.data.voc import CLASSES
from lpcam.formats.map_folders import read_foreign_maps
from lpcam.formats.registry import FORMATS, MAP_FORMATS
from lpcam.pipeline.recipe import load_recipe, parse_recipe
from lpcam.pipeline.run import run
from lpcam.pipeline.run_folder import RunFolder
from lpcam.segmentation.networks.base import SegmenterSpec
from lpcam.segmentation.networks.deeplabv2 import NETWORK
from lpcam.segmentation.segmenter import build_segmenter


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, pictures: Path, weights: Path) -> RunFolder:
    """A run up to its seeds, with an untrained segmenter of VOC's classes and one tested mask."""
    found = RunFolder(tmp_path_factory.mktemp("export") / "run")
    values = recipe_values(pictures, found.path, weights)
    values["segment"] = {"network": "deeplabv2", "backbone": "test_resnet", "weights": "random"}
    run(parse_recipe(values, where="tiny"), until="seeds")
    spec = SegmenterSpec("deeplabv2", "test_resnet", {}, 16)
    table = ClassTable(CLASSES, tuple(range(1, 21)))
    build_segmenter(spec, table, weights="random").save(found.segmenter("lpcam"))
    write_mask(found.tested("lpcam") / "2008_000006.png", np.ones((5, 6), np.uint8))
    return found


def export(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert main(["export", *map(str, words)]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("format", FORMATS)
def test_masks(
    format: str, folder: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = export(capsys, "masks", folder.path, tmp_path, "--format", format, "--from", "seeds")
    assert told.startswith(f"12 masks, 14 objects, as {format} in {tmp_path}")
    index = json.loads((tmp_path / "exported.json").read_text())
    assert index["made_by"]["masks"] == "seeds" and "--from seeds" in index["made_by"]["command"]


def test_fiftyone_has_heat_and_scores(
    folder: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scored_run = RunFolder(shutil.copytree(folder.path, tmp_path / "run"))
    changes = {"run.folder": str(scored_run.path), "segment": None}
    run(load_recipe(scored_run.recipe, changes), until="evaluate")
    told = export(capsys, "fiftyone", scored_run.path, tmp_path / "set", "--from", "seeds")
    assert "as fiftyone in" in told
    samples = json.loads((tmp_path / "set/samples.json").read_text())["samples"]
    scored = json.loads(scored_run.image_scores.read_text())
    for sample in samples:
        name = Path(sample["filepath"]).stem
        assert sample["miou_lpcam"] == scored["LPCAM"][scored["ids"].index(name)]
        assert 0 <= sample["quality"] <= 1
        with Image.open(tmp_path / "set" / sample["heat"]["map_path"]) as image:
            heat = np.array(image) / 255
        maps = read_maps(map_path(scored_run / "lpcam", name)).high_res
        assert np.abs(heat - maps.max(axis=0, initial=0)).max() < 0.01
    assert len({sample["quality"] for sample in samples}) > 3
    words = ["masks", scored_run.path, tmp_path / "tasks", "--from", "seeds"]
    export(capsys, *words, "--format", "label-studio")
    tasks = json.loads((tmp_path / "tasks/tasks.json").read_text())
    scores = [task["predictions"][0]["score"] for task in tasks]
    assert scores == [sample["quality"] for sample in samples]


@pytest.mark.parametrize("format", MAP_FORMATS)
def test_maps(
    format: str, folder: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--background", "0.3"] if MAP_FORMATS[format].has_background else []
    told = export(capsys, "maps", folder.path, tmp_path, "--format", format, *words)
    assert told.startswith(f"12 map files of the style {format} in {tmp_path}")
    found = read_foreign_maps(tmp_path / "i01.npy", style=format)
    assert found.keys.tolist() == [1] and found.high_res.any()
    if words:
        assert main(["export", "maps", str(folder.path), str(tmp_path), "--format", format]) == 2
        assert "give its score" in capsys.readouterr().err


def test_networks_as_onnx(
    folder: RunFolder,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(name)
    unfolded = partial(torch.onnx.export, optimize=False)  # takes a third of the time
    monkeypatch.setattr(torch.onnx, "export", unfolded)
    told = export(capsys, "onnx", folder.path, tmp_path / "m.onnx")
    assert "for images of any size" in told and "logits" in told
    told = export(capsys, "segmenter", folder.path, tmp_path / "s.onnx", "--size", 64, 80)
    assert "for images of one size" in told and "labels" in told


def test_a_network_of_one_size_needs_it(
    folder: RunFolder,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(type(NETWORK), "one_size_export", True)
    assert main(["export", "segmenter", str(folder.path), str(tmp_path / "s.onnx")]) == 2
    assert "--size" in capsys.readouterr().err


def test_masks_for_the_server_of_voc(
    folder: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = export(capsys, "voc-server", folder.path, tmp_path, "--no-crf")
    archive = tmp_path / "comp6_test_cls.tar.gz"
    assert told == f"1 masks in {archive}\n"
    with tarfile.open(archive) as file:
        assert [Path(name).name for name in file.getnames()] == ["2008_000006.png"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["masks", "RUN", "OUT", "--format", "png"], "voc, coco, coco-polygons, yolo"),
        (["maps", "RUN", "OUT", "--format", "png"], "irn, amn, psa, psa-crf"),
        (["masks", "--help"], "voc, coco, coco-polygons, yolo"),
    ],
)
def test_formats_are_listed(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["export", *words])
    told = capsys.readouterr()
    assert message in " ".join((told.out + told.err).replace("'", "").split())


def test_what_a_run_does_not_have(
    folder: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = str(folder.path), str(tmp_path / "out")
    for words, message in (
        (["masks", run, out, "--format", "voc", "--from", "pseudo/x"], "'pseudo/x'; it has seeds"),
        (["maps", run, out, "--format", "irn", "--from", "x"], "no maps 'x'; it has lpcam, cam"),
        (["maps", str(tmp_path), out, "--format", "irn"], "holds no run"),
        (["onnx", str(tmp_path), out], "holds no run"),
        (["segmenter", run, out, "--trained-on", "truth"], "there are: lpcam"),
    ):
        assert main(["export", *words]) == 2
        assert message in capsys.readouterr().err
    assert map_path(folder / "lpcam", "i00").is_file()
