"""A refinement that another distribution registers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch.nn.functional as F
import yaml
from extensions.outside import install, lpcam
from tiny import recipe_values
from torch import from_numpy

from lpcam.data.map_files import map_path, read_maps
from lpcam.data.masks import read_index_mask


def test_a_refinement_of_another_distribution(
    pictures: Path, weights: Path, tmp_path: Path
) -> None:
    environment = install(tmp_path / "site", "toy_refinement", "lpcam.refinements", "toy", "TOY")
    run = tmp_path / "run"
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(yaml.safe_dump(recipe_values(pictures, run, weights)))
    words = ("run", recipe, "--refine.method", "toy", "--refine.toy.radius", 1, "--until")
    done = lpcam(environment, *words, "pseudo")
    assert done.returncode == 0, done.stderr
    for name in ("cam", "lpcam"):
        maps = read_maps(map_path(run / name, "i00")).high_res
        blurred = F.avg_pool2d(from_numpy(maps), 3, 1, 1, count_include_pad=False).numpy()
        found = read_maps(map_path(run / "pseudo" / name / "maps", "i00")).high_res
        assert np.abs(found - blurred).max() < 1 / 250
        assert read_index_mask(run / "pseudo" / name / "i00.png").any()
    refused = lpcam(environment, *words[:2], "--refine.method", "toys", "--until", "pseudo")
    assert refused.returncode == 2 and "saliency, toy" in refused.stderr
    assert lpcam(environment, *words, "evaluate").returncode == 0
    assert "LPCAM + blur" in (run / "metrics.json").read_text()
