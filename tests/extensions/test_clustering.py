"""A clustering method that another distribution registers."""

from __future__ import annotations

from pathlib import Path

import yaml
from extensions.outside import install, lpcam
from tiny import recipe_values

from lpcam.method.prototypes import Prototypes


def test_a_clustering_of_another_distribution(
    tmp_path: Path, pictures: Path, weights: Path
) -> None:
    environment = install(
        tmp_path / "site", "toy_clustering", "lpcam.clusterings", "farthest", "make"
    )
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(yaml.safe_dump(recipe_values(pictures, tmp_path / "run", weights)))
    words = ("run", recipe, "--until", "prototypes", "--lpcam.clustering")
    done = lpcam(environment, *words, "farthest")
    assert done.returncode == 0, done.stderr
    found = Prototypes.load(tmp_path / "run" / "prototypes" / "prototypes.safetensors")
    assert found.foreground.keep.any()
    refused = lpcam(environment, *words, "nearest")
    assert refused.returncode == 2
    assert "cosine_kmeans, farthest" in refused.stderr
