"""The engine of a run: decided once, kept, and never mixed with another."""

from __future__ import annotations

import logging
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import draw_folder, recipe_values, write_weights

from lpcam.data.dataset import Item
from lpcam.data.map_files import read_maps
from lpcam.data.resize import scaled_size
from lpcam.pipeline import engine as module
from lpcam.pipeline.recipe import load_recipe
from lpcam.pipeline.run import run, segment
from lpcam.pipeline.run_folder import RunFolder
from lpcam.runtime.errors import ClassifierError, LpcamError
from lpcam.runtime.files import read_json, write_json

pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")
IMAGES = 8
MOST, MEAN = 1e-3, 1e-4  #: Accepted differences of maps in [0, 1] from those of torch.


@pytest.fixture
def values(tmp_path: Path) -> dict[str, Any]:
    data = draw_folder(tmp_path / "data", count=IMAGES)
    found = recipe_values(data, tmp_path / "run", write_weights(tmp_path / "weights.safetensors"))
    found["maps"]["dtype"] = "float16"
    return found


def made(values: dict[str, Any], folder: Path, **section: Any) -> RunFolder:
    values = {**values, "run": {**values["run"], "folder": str(folder), **section}}
    path = folder.parent / f"{folder.name}.yaml"
    write_json(path, values)  # JSON is YAML
    run(load_recipe(path))
    return RunFolder(folder)


def contents(folder: RunFolder, *names: str) -> dict[str, bytes]:
    return {
        f"{name}/{path.name}": path.read_bytes()
        for name in names
        for path in sorted((folder / name).glob("*"))
        if path.suffix in (".npz", ".png", ".safetensors")
    }


def record(folder: RunFolder) -> dict[str, Any]:
    found: dict[str, Any] = read_json(folder.engine_record)
    return found


def test_maps_are_those_of_torch(values: dict[str, Any], tmp_path: Path) -> None:
    runs = [made(values, tmp_path / name, engine=name) for name in ("torch", "onnxruntime")]
    for name in ("cam", "lpcam"):
        for path in sorted((runs[0] / name).glob("*.npz")):
            pair = [read_maps(folder / name / path.name).high_res for folder in runs]
            if pair[0].size:
                off = np.abs(pair[0] - pair[1]) / pair[0].max()
                assert off.max() <= MOST and off.mean() <= MEAN
    assert contents(runs[0], "cam") != contents(runs[1], "cam")  # else torch was used twice


def test_the_same_engine_gives_the_same_bytes(values: dict[str, Any], tmp_path: Path) -> None:
    names = ("classifier", "cam", "prototypes", "lpcam", "seeds")
    one = made(values, tmp_path / "one", engine="onnxruntime")
    two = made(values, tmp_path / "two", engine="onnxruntime", threads=2)
    assert contents(one, *names) == contents(two, *names)
    expected = contents(one, *names)
    for path in [*(one / "lpcam").glob("i0[01]*"), *one.engine.glob("*.onnx")]:
        path.unlink()  # as if it had been stopped
    write_json(one / "lpcam/stage.json", {**read_json(one / "lpcam/stage.json"), "done": False})
    assert contents(made(values, tmp_path / "one", engine="onnxruntime"), *names) == expected


def test_another_engine_makes_everything_again(
    values: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = made(values, tmp_path / "run", engine="onnxruntime")
    with caplog.at_level(logging.INFO):
        made(values, tmp_path / "run", engine="onnxruntime")
        assert "recomputing" not in caplog.text
        made(values, tmp_path / "run", engine="torch")
    assert "cam: recomputing" in caplog.text
    expected = made(values, tmp_path / "other", engine="torch")
    assert contents(folder, "cam", "lpcam", "seeds") == contents(expected, "cam", "lpcam", "seeds")


def test_what_auto_decided_stays_with_the_run(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values["lpcam"]["preset"] = "frozen"
    folder = made(values, tmp_path / "run", engine="auto")
    assert record(folder)["engine"] == "onnxruntime"
    before = contents(folder, "cam", "lpcam")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(LpcamError, match=r"lpcam\[onnx\]"):
        made(values, tmp_path / "run", engine="auto")
    assert contents(folder, "cam", "lpcam") == before


def test_auto_takes_torch_for_presets_of_the_paper(values: dict[str, Any], tmp_path: Path) -> None:
    values["lpcam"]["preset"] = "voc12.official"
    folder = made(values, tmp_path / "run", engine="auto")
    assert not list(folder.engine.glob("*.onnx"))
    choices = {one["key"]: one["value"] for one in read_json(folder.metrics)["choices"]}
    assert choices["run.engine"] == "torch"


def test_an_engine_that_gets_the_backbone_wrong_is_not_used(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(module.RunEngine, "classifier", wrong_unless_torch)
        folder = made(values, tmp_path / "run", engine="onnxruntime")
    assert record(folder)["engine"] == "torch" and "0.5" in record(folder)["reason"]
    choices = {one["key"]: one["value"] for one in read_json(folder.metrics)["choices"]}
    assert choices["run.engine"] == "torch"
    expected = made(values, tmp_path / "other", engine="torch")
    assert contents(folder, "cam", "lpcam") == contents(expected, "cam", "lpcam")


def wrong_unless_torch(_: Any, classifier: Any, *, engine: str, **__: Any) -> Any:
    if engine == "torch":
        return classifier.folded()
    raise ClassifierError("its outputs differ by 0.5")


def test_passes_are_as_few_as_can_be(values: dict[str, Any], tmp_path: Path) -> None:
    folder = made(values, tmp_path / "run")
    passes = {name: stage["passes"] for name, stage in read_json(folder.use).items()}
    # The classifier pools at 64 pixels. Images of another size have a pass for it; the maps have
    # one at each of two scales, but for images without a label; all else finds them in memory.
    sizes = [(r["height"], r["width"]) for r in read_json(folder.index)["records"].values()]
    scales = values["lpcam"]["scales"]
    pooled = [scaled_size(*size, 64 / max(size)) for size in sizes]
    known = sum(
        wanted in [scaled_size(*size, scale) for scale in scales]
        for size, wanted in zip(sizes, pooled, strict=True)
    )
    assert len(sizes) == IMAGES and known < IMAGES
    assert passes["classify"] == IMAGES
    assert passes["classify"] + passes["cam"] == IMAGES - known + 2 * (IMAGES - 1)
    assert all(passes[name] == 0 for name in ("prototypes", "lpcam", "seeds"))


def test_pooling_at_the_size_of_the_maps_needs_no_pass(
    values: dict[str, Any], tmp_path: Path
) -> None:
    values["classifier"]["probe"]["long_side"] = None
    folder = made(values, tmp_path / "run")
    passes = {name: stage["passes"] for name, stage in read_json(folder.use).items()}
    assert passes["classify"] == IMAGES and passes["cam"] == IMAGES - 1


def test_new_images_are_mapped_by_the_engine_of_the_run(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = made(values, tmp_path / "run", engine="onnxruntime")
    image = tmp_path / "data/images/i00.png"
    found = folder.explainer()(image, labels=["blue"]).lpcam
    assert "run" in dir(folder.explainer().classifier.backbone)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    expected = folder.explainer()(image, labels=["blue"]).lpcam  # by torch
    assert np.abs(found - expected).max() <= MOST
    assert isinstance(folder.explainer().classifier.backbone, torch.nn.Module)


def test_samples_are_small_and_large_images(tmp_path: Path) -> None:
    root = draw_folder(tmp_path / "data", count=5)
    items = [Item(path.stem, path, ()) for path in sorted((root / "images").glob("*.png"))]
    sizes = [item.read().shape[:2] for item in items]
    found = module.samples(items, [(s[0], s[1]) for s in sizes], (0.5, 2.0), 1000)
    areas = sorted(math.prod(size) for size in sizes)
    given = [math.prod(one.shape[-2:]) for one in found]
    assert given[1] == areas[2] and abs(given[0] - 4 * areas[0]) < 10
    assert abs(given[2] - areas[-1] / 4) < areas[-1] / 20
    assert all(float(one.min()) >= -1 and float(one.max()) <= 1 for one in found)


def test_masks_of_another_program_need_no_weights_of_a_classifier(
    values: dict[str, Any], tmp_path: Path
) -> None:
    values["classifier"]["weights"] = str(tmp_path / "missing.safetensors")
    values["lpcam"]["preset"] = "frozen"
    values["run"] |= {"engine": "auto"}
    values["segment"] = {
        "backbone": "test_resnet",
        "weights": "random",
        "training": {"preset": "light", "iterations": 1, "batch_size": 2, "crop": 49},
    }
    path = tmp_path / "given.yaml"
    write_json(path, values)
    segment(load_recipe(path), tmp_path / "data/masks")
    folder = RunFolder(values["run"]["folder"])
    assert record(folder)["engine"] == "onnxruntime"
    assert list((folder / "test/given").glob("*.png"))
