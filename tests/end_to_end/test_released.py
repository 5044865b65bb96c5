"""Released checkpoints: converted from the command line, and used by a run without training."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from parity.golden import load_json
from tiny import small_run
from torch import Tensor

from lpcam.cli.main import main
from lpcam.pipeline.recipe import load_recipe
from lpcam.pipeline.run import run
from lpcam.runtime.errors import ArtefactError, RecipeError


def released(name: str, folder: Path) -> Path:
    """A converted file of random weights with the names and shapes of a released one."""
    golden = load_json(f"names/{name}")
    counters = golden.get("not_float32", {})
    generator = torch.Generator().manual_seed(len(name))

    def drawn(key: str, shape: list[int]) -> Tensor:
        if key in counters:
            return torch.zeros(shape, dtype=getattr(torch, counters[key]))
        if key.endswith("running_var") or (key.endswith("weight") and len(shape) == 1):
            return torch.ones(shape)
        scale = math.sqrt(max(1, math.prod(shape[1:])))
        return torch.randn(shape, generator=generator) / scale

    state = {key: drawn(key, shape) for key, shape in golden["names"].items()}
    state |= {later: state[first] for later, first in golden.get("same_tensor", {}).items()}
    source, target = folder / f"{name}.pth", folder / f"{name}.safetensors"
    torch.save({"model": state} if "mctformer" in name else state, source)
    assert main(["convert", str(source), str(target)]) == 0
    source.unlink()
    return target


RESNET50 = {
    "host.maps": ["CAM"],
    "classifier.backbone": "resnet50.tv_in1k",
    "classifier.output_stride": 16,
    "classifier.dilated": False,
}


@pytest.mark.parametrize(
    ("recipe", "files", "changes", "rows", "untrained"),
    [
        (
            "voc12-amn.official",
            {"classifier": "lpcam_classifier_20", "host": "amn", "refine": "irn"},
            {"host.maps": ["CAM"]},
            ["AMN", "AMN + IRN"],
            ["refine-labels"],
        ),
        (
            "voc12-mctformer.official",
            {"classifier": "lpcam_classifier_20", "host": "mctformer_v2_20", "refine": "irn"},
            {**RESNET50, "refine.method": "irn"},
            ["MCTformer", "MCTformer + IRN"],
            ["refine-labels"],
        ),
        (
            "voc12-wideresnet38.official",
            {"segment": "wideresnet38_segmenter"},
            {"segment.test.scales": [0.5], "segment.test.crf": None},
            ["WideResNet-38 as given"],
            ["classifier", "maps", "pseudo"],
        ),
    ],
)
def test_released_networks_make_maps_and_masks(
    recipe: str,
    files: dict[str, str],
    changes: dict[str, Any],
    rows: list[str],
    untrained: list[str],
    voc: Path,
    tmp_path: Path,
) -> None:
    given = {f"{s}.trained": str(released(name, tmp_path)) for s, name in files.items()}
    folder = tmp_path / "run"
    lists = dict.fromkeys(("prototypes", "maps", "evaluate", "segment", "test"), "val")
    small = {**small_run(voc, folder), "data.lists": {"classify": "train", **lists}}
    values = {**small, "lpcam.scales": [0.5], "lpcam.flip": False, **given, **changes}
    result = run(load_recipe(recipe, values))
    methods = dict.fromkeys(row["method"] for row in result.rows)
    assert list(methods)[-len(rows) :] == rows
    assert not any((folder / name).exists() for name in untrained)
    assert (result.report is None) == ("segment" in files)


def test_a_trained_network_must_be_that_of_the_recipe(voc: Path, tmp_path: Path) -> None:
    file = str(released("lpcam_classifier_20", tmp_path))
    values = {**small_run(voc, tmp_path / "run"), "classifier.trained": file}
    run(load_recipe("voc12-resnet50-irn.official", values), until="classify")
    for changes, expected in (
        ({"classifier.output_stride": 32}, "output_stride"),
        ({"data.classes": ["cow", "dog"]}, "classes"),
        ({"host.trained": file}, "kind"),
        ({"host.trained": file, "host.maps": ["CAM", "LPCAM"]}, "host.maps"),
    ):
        with pytest.raises((ArtefactError, RecipeError), match=expected):
            run(load_recipe("voc12-amn.official", {"host.maps": ["CAM"], **values, **changes}))
