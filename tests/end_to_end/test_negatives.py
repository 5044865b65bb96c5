"""A folder of negatives: it trains the classifier, measures the prototypes, and is in the keys."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny import recipe_values

from lpcam.method.prototypes import Prototypes
from lpcam.pipeline.recipe import parse_recipe
from lpcam.pipeline.run import run
from lpcam.pipeline.run_folder import RunFolder
from lpcam.runtime.errors import DataError
from lpcam.runtime.files import read_json

Values = dict[str, Any]


def draw(folder: Path, seed: int = 0) -> Path:
    """Grey images without any class, one of them in a subfolder."""
    random = np.random.default_rng(seed)
    (folder / "more").mkdir(parents=True)
    for name in ("a.png", "b.png", "more/a.png"):
        picture = random.integers(90, 120, (40, 48, 3), dtype=np.uint8)
        Image.fromarray(picture).save(folder / name)
    return folder


def with_folder(values: Values, folder: Path) -> Values:
    made = copy.deepcopy(values)
    made["data"]["negatives"] = str(folder)
    made["lpcam"] |= {"negatives": {"margin": 0.9, "hardest": 1.0, "reject_by": "folder"}}
    return made


@pytest.fixture
def values(tmp_path: Path, pictures: Path, weights: Path) -> Values:
    return recipe_values(pictures, tmp_path / "run", weights)


def go(values: Values) -> Path:
    return run(parse_recipe(values, where="tiny.yaml"), until="prototypes").folder


def record(folder: Path, result: str) -> dict[str, Any]:
    found: dict[str, Any] = read_json(folder / result / "stage.json")
    return found


def test_negatives_of_a_folder(values: Values, tmp_path: Path) -> None:
    folder = draw(tmp_path / "plain")
    plain = record(go(values), "prototypes")
    assert "negatives" not in plain["parts"]
    made = with_folder(values, folder)
    before = record(go(made), "classifier")
    found = Prototypes.load(RunFolder(made["run"]["folder"]).prototypes())
    rates = found.foreground.fire
    assert rates is not None and rates[found.foreground.sizes > 0].isfinite().all()
    rejected = [one for one in found.choices if one.by == "negatives"]
    assert record(go(made), "prototypes")["output"]["rejected"] == len(rejected) > 0
    assert found.foreground.keep.any(1).all()
    index = read_json(RunFolder(made["run"]["folder"]).index)
    assert {f"negatives/{name}" for name in ("a.png", "b.png", "more/a.png")} <= {*index["records"]}
    (folder / "b.png").unlink()  # other negatives train another classifier
    assert record(go(made), "classifier")["key"] != before["key"]


def test_folders_that_cannot_be_negatives(values: Values, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="none"):
        go(with_folder(values, tmp_path / "none"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty"):
        go(with_folder(values, tmp_path / "empty"))
    with pytest.raises(DataError, match="labelled"):
        go(with_folder(values, Path(values["data"]["root"]) / "images"))


def test_a_single_class_needs_negatives(values: Values, tmp_path: Path) -> None:
    root = tmp_path / "one"
    shutil.copytree(Path(values["data"]["root"]) / "images", root / "images")
    names = sorted(path.name for path in (root / "images").iterdir())[:6]
    (root / "labels.csv").write_text("image,labels\n" + "".join(f"{n},thing\n" for n in names))
    values["data"] = {"kind": "folder", "root": str(root)}
    recipe = parse_recipe(values, where="tiny.yaml")
    assert any("no negatives" in text for text in run(recipe, until="classify").warnings)
    values["data"]["negatives"] = str(draw(tmp_path / "plain"))
    recipe = parse_recipe(values, where="tiny.yaml")
    assert not run(recipe, until="classify").warnings
