"""The recipes of the hosts on tiny folders, with random weights: every stage, every arm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny import small_run, times

from lpcam.data.masks import read_index_mask
from lpcam.pipeline.datasets import read_dataset
from lpcam.pipeline.recipe import load_recipe
from lpcam.pipeline.run import RunResult, run
from lpcam.runtime.errors import DataError, LpcamError, RecipeError
from lpcam.runtime.files import read_json

WIDE = {"channels": [4, 6, 8, 10, 12, 16, 20], "depths": [3, 1, 1, 1]}
TINY = {"classifier.backbone": "test_resnet"}
"""The whole ResNet-50 runs in test_recipes.py."""
AMN = {
    **TINY,
    "host.amn.epochs": 1,
    "host.amn.batch_size": 4,
    "host.amn.crop": 64,
}
MCTFORMER = {
    "host.backbone": "test_vit",
    "host.weights": "random",
    "host.mctformer.epochs": 1,
    "host.mctformer.warmup_epochs": 0,
    "host.mctformer.batch_size": 4,
    "host.mctformer.crop": 64,
    "host.lpcam.max_features": 40,
    "refine.psa.epochs": 1,
    "refine.psa.batch_size": 4,
    "refine.psa.crop": 72,
}
EDAM = {
    "host.edam.iterations": 2,
    "host.edam.pairs": 1,
    "host.edam.warmup": 1,
    "host.edam.crop": 64,
    "host.edam.long_side": [48, 64],
    "host.edam.width": 8,
    "host.edam.hidden": 8,
}
NARROW = {"classifier.arguments": WIDE}
RECIPES: dict[str, tuple[dict[str, Any], list[str], str]] = {
    "voc12-amn.official": (AMN, ["AMN", "AMN+LPCAM"], "IRN"),
    "coco14-amn.official": (AMN, ["AMN", "AMN+LPCAM"], "IRN"),
    "voc12-mctformer.official": (
        {**NARROW, **MCTFORMER},
        ["MCTformer", "MCTformer+LPCAM"],
        "PSA",
    ),
    "coco14-mctformer.official": (
        {**NARROW, **MCTFORMER},
        ["MCTformer", "MCTformer+LPCAM"],
        "PSA",
    ),
    "voc12-edam.official": (TINY, [], "saliency"),
    "voc_animals-amn": (
        {**{k: v for k, v in AMN.items() if k not in TINY}, "host.amn.dilations": [1, 2]},
        ["AMN", "AMN+LPCAM"],
        "IRN",
    ),
    "voc_animals-mctformer": (
        {k: v for k, v in MCTFORMER.items() if k not in ("host.backbone",)},
        ["MCTformer", "MCTformer+LPCAM"],
        "PSA",
    ),
    "voc_animals-edam": ({}, [], "saliency"),
    "voc12-edam-network.official": ({**NARROW, **EDAM}, ["EDAM"], "saliency"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_host(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """The rows of both arms, masks of every image, and a second run that has nothing to do."""
    changes, titles, refinement = RECIPES[name]
    root: Path = request.getfixturevalue("voc" if name.startswith("voc") else "coco")
    folder = tmp_path / "run"
    values = {**small_run(root, folder), **changes}
    if "animals" in name:
        values["data.classes"] = ["cow", "dog", "sheep"]
    if refinement == "saliency" and "animals" not in name:  # whose saliency is computed
        values["data.saliency"] = str(saliency_of(root, tmp_path / "saliency", name, values))
    recipe = load_recipe(name, values)
    result = run(recipe, command=f"lpcam run {name}")
    refined = titles or ["CAM", "LPCAM"]
    assert list(dict.fromkeys((row["stage"], row["method"]) for row in result.rows)) == [
        *(("seed", method) for method in ("CAM", "LPCAM-F", "LPCAM", *titles)),
        *(("pseudo", f"{method} + {refinement}") for method in refined),
    ]
    items = read_dataset(recipe, ("maps",)).select(recipe.data.list_of("maps"))
    values_of_masks = {0, *read_dataset(recipe, ("maps",)).classes.mask_ids}
    for title in refined:
        own = title.lower().replace("+", "_")
        folders = [folder / "pseudo" / own]
        folders += [folder / "host-seeds" / own] if titles else []
        for masks in folders:
            for item in items:
                mask = read_index_mask(masks / f"{item.id}.png")
                assert mask.shape == Image.open(item.image).size[::-1]
                assert set(np.unique(mask).tolist()) <= values_of_masks
                assert item.labels or not mask.any()
    if titles:
        assert recipe.host is not None
        protocol = result.rows[-1]["protocol"]
        assert protocol["host"]["method"] in name
        # what it was built of, not what the recipe's empty fields say
        built = recipe.classifier if recipe.host.backbone is None else recipe.host
        assert protocol["host"]["backbone"] == built.backbone
        assert protocol["host"]["weights"] == "random"
        assert "host" not in result.rows[0]["protocol"]  # CAM's
        history = read_json(folder / "metrics.json")["host_history"]
        assert all(history.values())
    assert result.report is not None
    before = times(folder)
    run(recipe, command=f"lpcam run {name}")
    assert times(folder) == before


def saliency_of(root: Path, folder: Path, name: str, values: dict[str, Any]) -> Path:
    """The middle of each image is salient."""
    folder.mkdir()
    recipe = load_recipe(name, {**values, "data.saliency": str(folder)})
    for item in read_dataset(recipe, ("maps",)).select(recipe.data.list_of("maps")):
        width, height = Image.open(item.image).size
        levels = np.zeros((height, width), np.uint8)
        levels[height // 4 : -height // 4, width // 4 : -width // 4] = 255
        Image.fromarray(levels).save(folder / f"{item.id}.png")
    return folder


def amn(root: Path, folder: Path, until: str = "host-maps", **changes: Any) -> RunResult:
    """A run of AMN with nothing behind it that takes long."""
    values = {**small_run(root, folder), **AMN, "refine.method": "crf", "report.images": 0}
    return run(load_recipe("voc12-amn.official", {**values, **changes}), until=until)


def test_one_line_swaps_cam_for_lpcam(voc: Path, tmp_path: Path) -> None:
    """``host.maps: [LPCAM]`` leaves the other arm out, and its files are those of both arms.

    Another threshold then makes other seeds and nothing else.
    """
    both, one = tmp_path / "both", tmp_path / "one"
    amn(voc, both)
    amn(voc, one, **{"host.maps": ["LPCAM"]})
    assert [p.name for p in sorted((one / "host-maps").iterdir())] == ["amn_lpcam"]
    for path in sorted((one / "host-maps" / "amn_lpcam").glob("*.npz")):
        assert path.read_bytes() == (both / "host-maps" / "amn_lpcam" / path.name).read_bytes()
    before = times(one)
    amn(voc, one, **{"host.maps": ["LPCAM"], "host.amn.threshold": 0.6})
    changed = {k.split("/")[0] for k, v in times(one).items() if before.get(k) != v}
    assert "host-seeds" in changed
    assert not changed & {"classifier", "cam", "lpcam", "host-labels", "host", "host-maps"}


def test_reading_b_maps_prototypes_of_amn_taught_by_cam(voc: Path, tmp_path: Path) -> None:
    """One network serves both arms; LPCAM's maps are those of its features."""
    changes = {
        "data.lists.prototypes": "train_aug",  # other images than those that get maps
        "data.lists.maps": "train",
        "host.amn.reading": "features",
        "host.lpcam.preset": "amn.voc12",
        "host.lpcam.max_features": 40,
    }
    result = amn(voc, tmp_path / "run", "evaluate", **changes)
    folder = tmp_path / "run"
    assert [p.name for p in (folder / "host").iterdir()] == ["amn"]
    assert (folder / "host-prototypes" / "amn_lpcam" / "prototypes.safetensors").is_file()
    one = (folder / "host-maps" / "amn" / "2007_000000.npz").read_bytes()
    assert one != (folder / "host-maps" / "amn_lpcam" / "2007_000000.npz").read_bytes()
    assert {row["method"] for row in result.rows} >= {"AMN", "AMN+LPCAM", "AMN+LPCAM + CRF"}


V1 = {"host.mctformer.version": "v1"}


@pytest.mark.parametrize(
    ("name", "changes", "field"),
    [
        ("amn", {"refine.maps": ["CAM", "EDAM"]}, "refine.maps has EDAM"),
        ("amn", {"host.method": "edam"}, "host.maps"),
        ("amn", {"host.method": "mctformer"}, "host.backbone"),
        ("amn", {"host.method": "amm"}, "amm.* amn, mctformer, edam"),
        ("amn", {"host.maps": ["CAM", "CAM"]}, r"host.maps \['CAM', 'CAM'\]"),
        ("amn", {"refine.method": "saliency"}, "data.saliency"),
        ("amn", {"data.saliency": "x"}, "data.saliency"),
        ("amn", {"host.weights": "random"}, "host.weights belongs to host.backbone"),
        ("amn", {"host.output_stride": 8}, "host.output_stride belongs to host.backbone"),
        ("amn", {"host.amn.reading": "features"}, "host.lpcam"),
        ("mctformer", V1, "version v1"),
        (
            "mctformer",
            {**V1, "host.maps": ["CAM"], "host.mctformer.split_maps": "patch"},
            "split_maps patch",
        ),
    ],
)
def test_a_recipe_that_does_not_fit_together(
    name: str, changes: dict[str, Any], field: str
) -> None:
    with pytest.raises(RecipeError, match=field):
        load_recipe(f"voc12-{name}.official", changes)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("voc12-amn.official", {"host.amn.freeze": ["conv_1"]}, "no parameter .* below 'conv_1'"),
        (
            "voc12-mctformer.official",
            {"host.weights": "/nowhere/deit.safetensors"},
            r"deit\.safetensors",
        ),
        (
            "voc12-mctformer.official",
            {"host.mctformer.attention_blocks": 99},
            "attention_blocks 99 is more than the",
        ),
        ("voc12-edam-network.official", {"host.edam.freeze": ["b99"]}, "no parameter .* 'b99'"),
    ],
)
def test_a_host_that_cannot_be_trained_is_refused_before_any_work(
    name: str, changes: dict[str, Any], message: str, voc: Path, tmp_path: Path
) -> None:
    values = {**small_run(voc, tmp_path / "run"), **RECIPES[name][0], **changes}
    if "edam" in name:
        values["data.saliency"] = str(saliency_of(voc, tmp_path / "saliency", name, values))
    with pytest.raises(LpcamError, match=message):
        run(load_recipe(name, values))
    assert not (tmp_path / "run" / "classifier").exists()


def test_saliency_maps_that_are_missing(voc: Path, tmp_path: Path) -> None:
    """Before any work."""
    values = {**small_run(voc, tmp_path / "run"), "data.saliency": str(tmp_path / "none")}
    with pytest.raises(DataError, match=r"there is no folder .*none of saliency maps"):
        run(load_recipe("voc12-edam.official", values))
    assert not (tmp_path / "run" / "classifier").exists()
