"""A segmentation network that another distribution registers."""

from __future__ import annotations

from pathlib import Path

import yaml
from extensions.outside import install, lpcam
from tiny import recipe_values

from lpcam.data.masks import read_index_mask
from lpcam.runtime.files import read_json


def test_a_network_of_another_distribution(tmp_path: Path, pictures: Path, weights: Path) -> None:
    environment = install(tmp_path / "site", "toy_network", "lpcam.networks", "cells", "NETWORK")
    values = recipe_values(pictures, tmp_path / "run", weights)
    training = {"preset": "light", "iterations": 4, "batch_size": 4, "crop": 48}
    values["segment"] = {"network": "cells", "weights": "random", "training": training}
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(yaml.safe_dump(values))
    done = lpcam(environment, "segment", recipe, pictures / "masks", "--run.folder", tmp_path / "r")
    assert done.returncode == 0, done.stderr
    rows = read_json(tmp_path / "r" / "metrics.json")["rows"]
    assert [row["method"] for row in rows] == [
        "Cells on given masks",
        "Cells on given masks, CRF",
    ]
    image = pictures / "images" / "i00.png"
    words = ("predict", image, "--run", tmp_path / "r", "--output", tmp_path / "out")
    done = lpcam(environment, *words)
    assert done.returncode == 0, done.stderr
    assert read_index_mask(tmp_path / "out" / "masks" / "i00.png").max() <= 3
    refused = lpcam(environment, "segment", recipe, tmp_path, "--segment.network", "cell")
    assert refused.returncode == 2 and "upernet, cells" in refused.stderr
