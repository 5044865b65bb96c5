"""A reader that another distribution registers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import yaml
from extensions.outside import install, lpcam
from tiny import recipe_values


def named(pictures: Path, folder: Path) -> Path:
    """Images of one label each, named by it."""
    folder.mkdir()
    rows = (pictures / "labels.csv").read_text().splitlines()[1:]
    for row in rows:
        image, _, labels = row.partition(",")
        if labels and ";" not in labels:
            shutil.copy(pictures / "images" / image, folder / f"{labels}+{image}")
    (folder / "named.txt").touch()
    return folder


def test_a_reader_of_another_distribution(tmp_path: Path, pictures: Path, weights: Path) -> None:
    environment = install(tmp_path / "site", "toy_reader", "lpcam.readers", "named", "READER")
    values = recipe_values(named(pictures, tmp_path / "images"), tmp_path / "run", weights)
    values["data"]["kind"] = "named"
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(yaml.safe_dump(values))
    done = lpcam(environment, "run", recipe, "--data.named.separator", "+")
    assert done.returncode == 0, done.stderr
    stage = json.loads((tmp_path / "run" / "classifier" / "stage.json").read_text())
    assert stage["parts"]["classes"] == ["blue", "green", "red"]
    assert len(list((tmp_path / "run" / "seeds").glob("*.png"))) > 3
    fields = lpcam(environment, "recipe", "--fields")
    assert "data.named.separator" in fields.stdout
    checked = lpcam(environment, "data", "check", tmp_path / "images", "--no-estimate")
    assert "names of the files" in checked.stdout, checked.stderr
    values["data"]["kind"] = "nameless"
    recipe.write_text(yaml.safe_dump(values))
    refused = lpcam(environment, "run", recipe)
    assert refused.returncode == 2 and "coco, named" in refused.stderr
