"""A mask format that another distribution registers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from extensions.outside import install, lpcam
from PIL import Image

from lpcam.data.masks import write_mask


def predicted(folder: Path) -> Path:
    """What ``lpcam predict`` writes for one image."""
    write_mask(folder / "masks" / "barn.png", np.repeat(np.uint8([[0, 2, 2, 1]]), 3, axis=0))
    Image.new("RGB", (4, 3)).save(folder / "barn.png")
    index = {
        "made_by": {"classes": {"cow": 1, "old, red barn": 2}, "run": "farm"},
        "images": {"barn": str(folder / "barn.png")},
        "skipped": [],
    }
    (folder / "predicted.json").write_text(json.dumps(index))
    return folder


def test_a_format_of_another_distribution(tmp_path: Path) -> None:
    environment = install(tmp_path / "site", "toy_format", "lpcam.formats", "areas", "AREAS")
    words = ("export", "masks", predicted(tmp_path), tmp_path / "out", "--format")
    done = lpcam(environment, *words, "areas")
    assert done.returncode == 0, done.stderr
    table = (tmp_path / "out" / "areas.csv").read_text()
    assert table == 'image,class,area\nbarn.png,cow,3\nbarn.png,"old, red barn",6\n'
    refused = lpcam(environment, *words, "area")
    assert refused.returncode == 2 and "overlays, areas" in refused.stderr.replace("'", "")
