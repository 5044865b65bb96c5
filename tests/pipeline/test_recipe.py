"""Recipes: what is refused, how values are replaced, where relative paths lead."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from lpcam.data.reader import ListName
from lpcam.pipeline.recipe import (
    Recipe,
    bundled_recipes,
    describe_fields,
    load_recipe,
    parse_recipe,
    parse_value,
)
from lpcam.runtime.errors import RecipeError

VALUES: dict[str, Any] = {
    "name": "farm",
    "data": {"kind": "folder", "root": "pictures"},
    "classifier": {"backbone": "resnet18", "weights": "random"},
    "lpcam": {"preset": "voc12.official"},
}


def changed(path: str, value: Any) -> dict[str, Any]:
    """The values with one key of a dotted path set."""
    whole = place = copy.deepcopy(VALUES)
    *sections, last = path.split(".")
    for section in sections:
        place = place.setdefault(section, {})
    place[last] = value
    return whole


def written(folder: Path, whole: dict[str, Any] | str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(whole if isinstance(whole, str) else yaml.safe_dump(whole), encoding="utf-8")
    return path


def refusal(whole: Any) -> str:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(whole, where="r.yaml")
    return str(caught.value)


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("wheels", {"version", "name", "data", "classifier", "lpcam", "host", "refine"}),
        ("data.roots", {"kind", "root", "labels", "masks", "coco", "saliency", "lists"}),
        ("data.lists.valid", {"classify", "validate", "prototypes", "maps", "evaluate"}),
        ("classifier.probe.epochs", {"preset", "long_side", "mirror"}),
        ("lpcam.taus", {"preset", "clusters", "restarts", "tau"}),
        ("seeds.level", {"method", "threshold", "ignore_threshold"}),
    ],
)
def test_an_unknown_key_is_refused_with_the_allowed_ones(path: str, allowed: set[str]) -> None:
    message = refusal(changed(path, 3))
    (line,) = [line for line in message.splitlines() if f"{path} = 3" in line]
    assert allowed <= set(line.partition("allowed here: ")[2].split(", "))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("lpcam.tau", 1.5, "lpcam.tau = 1.5: .*1"),
        ("lpcam.tau", "much", "lpcam.tau = 'much'"),
        ("data.kind", "zip", "data.* 'zip'.*voc"),
        ("classifier.output_stride", 12, "classifier.output_stride = 12: .*8, 16"),
        ("seeds.method", "lpcam", "seeds.method = 'lpcam': .*'LPCAM-F'"),
        ("run.seed", -1, "run.seed = -1"),
        ("name", "a/b", "name = 'a/b'"),
        ("lpcam", "voc12.official", "lpcam = 'voc12.official'"),
        ("data", {"kind": "voc"}, "data.root: .*missing"),
        ("lpcam.preset", "voc13", "lpcam: .*'voc13'.*voc12.official"),
        ("lpcam.context_lower", 0.9, "lpcam: context_lower 0.9 .*mu_b 0.9"),
        ("version", 0, "version = 0"),
        ("host.method", "none", "host: .*'none'.*amn"),
        ("refine.method", "nothing", "refine: .*'nothing'.*irn"),
        ("segment.network", "none", "segment.*deeplabv2.*'none'"),
    ],
)
def test_a_wrong_value_is_refused_with_the_field(path: str, value: Any, message: str) -> None:
    assert re.search(message, refusal(changed(path, value)))


def test_all_problems_are_listed() -> None:
    whole = changed("lpcam.tau", 2)
    whole["data"]["rot"] = 1
    del whole["name"]
    message = refusal(whole)
    assert "3 problem(s)" in message
    assert all(f"\n  {key}" in message for key in ("lpcam.tau = 2:", "data.rot = 1:", "name: is"))


def test_ignore_threshold_above_the_threshold() -> None:
    whole = changed("seeds", {"threshold": 0.2, "ignore_threshold": 0.25})
    assert "seeds.ignore_threshold 0.25" in refusal(whole)
    whole = changed("seeds", {"ignore_threshold": 0.4})  # the preset's threshold is 0.3
    assert "0.3 (seeds.threshold" in refusal(whole)
    whole = changed("seeds", {"ignore_threshold": 0.3})
    assert parse_recipe(whole, where="r").seeds.ignore_threshold == 0.3


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("report.images", 8),
        ("lpcam.early", {}),
        ("host.method", "amn"),
    ],
)
def test_other_similarities_have_neither_report_nor_early_layers_nor_host(
    path: str, value: Any
) -> None:
    values = {"lpcam.similarity": "dot", "report.images": 0}
    assert parse_recipe(VALUES, where="r").changed(values).lpcam.similarity == "dot"
    with pytest.raises(RecipeError, match="similarity dot"):
        parse_recipe(VALUES, where="r").changed({**values, path: value})


def test_a_host_has_no_other_similarity() -> None:
    own = {"preset": "mctformer.voc12", "similarity": "euclidean"}
    host = {"method": "mctformer", "backbone": "deit_small_patch16_224", "weights": "random"}
    assert "similarity euclidean" in refusal(changed("host", {**host, "lpcam": own}))


def test_a_newer_version_is_refused() -> None:
    assert "version 2" in refusal(changed("version", 2) | {"of_the_future": 1})


def test_files_that_are_not_recipes(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"'farm'.*voc_animals"):
        load_recipe("farm")
    for text, message in {"a: [1": "YAML", "- a": r"\['a'\]", "": "None"}.items():
        with pytest.raises(RecipeError, match=message):
            load_recipe(written(tmp_path, text))
    (tmp_path / "recipe.yaml").write_bytes("name: é".encode("latin-1"))
    with pytest.raises(RecipeError, match=r"recipe\.yaml.*UTF-8"):
        load_recipe(tmp_path / "recipe.yaml")
    with pytest.raises(RecipeError, match=r"did you mean '.*recipe\.yaml'"):
        load_recipe(tmp_path)


def test_changes_of_nested_keys(tmp_path: Path) -> None:
    changes = {
        "lpcam.tau": 0.25,
        "lpcam.preset": "coco14.paper",
        "lpcam.scales": [1.0, 0.5],
        "classifier.probe.long-side": 128,
        "data.classes": ["cow", "pig"],
        "data.lists.maps": "train",
        "seeds.threshold": None,
        "name": "other",
    }
    recipe = load_recipe(written(tmp_path, VALUES), changes)
    assert (recipe.lpcam.tau, recipe.lpcam.clusters, recipe.lpcam.scales) == (0.25, 20, (1.0, 0.5))
    assert recipe.lpcam.changes() == {"scales": (1.0, 0.5)}  # 0.25 is the new preset's own tau
    assert recipe.classifier.probe.long_side == 128
    assert recipe.data.classes == ("cow", "pig")
    assert recipe.data.list_of("maps") == "train"
    assert recipe.data.list_of("prototypes") == "all"
    assert recipe.folder == Path("runs/other")
    assert recipe.fixed_threshold("LPCAM") == 0.3


def test_a_loaded_recipe_changes_as_a_file_does(tmp_path: Path) -> None:
    path = written(tmp_path, changed("lpcam.clusters", 3))
    changes = {"lpcam.preset": "coco14.paper", "host.method": "amn", "host.lpcam": {}}
    found = load_recipe(path).changed(changes)
    assert found.lpcam.changes() == {"clusters": 3}
    assert found == load_recipe(path, changes)
    with pytest.raises(RecipeError, match=r"lpcam\.tao"):
        found.changed({"lpcam.tao": 1})
    assert found.changed({}) is found


def test_changes_that_are_wrong(tmp_path: Path) -> None:
    path = written(tmp_path, VALUES)
    with pytest.raises(RecipeError, match=r"lpcam\.tao = 1: .*tau"):
        load_recipe(path, {"lpcam.tao": 1})
    with pytest.raises(RecipeError, match=r"--name\.first: 'name'"):
        load_recipe(path, {"name.first": 1})
    with pytest.raises(RecipeError, match=r"--lpcam.scales, '\[1'"):
        parse_value("lpcam.scales", "[1")


def test_relative_paths_of_the_file_and_of_the_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = changed("classifier.weights", "../w.safetensors")
    whole["run"] = {"folder": "out"}
    (tmp_path / "here").mkdir()
    path = written(tmp_path, whole)
    monkeypatch.chdir(tmp_path / "here")
    for source in (path, Path("../recipe.yaml")):
        recipe = load_recipe(source)
        assert recipe.data.root.resolve() == tmp_path / "pictures"
        assert Path(recipe.classifier.weights).resolve() == tmp_path.parent / "w.safetensors"
        assert recipe.folder.resolve() == tmp_path / "out"
    changes = {
        "data.root": "pictures",
        "classifier.weights": "w.safetensors",
        "run.folder": Path("runs/a"),
        "data.labels": "folders",  # a word, not a path
    }
    recipe = load_recipe(path, changes)
    assert recipe.data.root == tmp_path / "here" / "pictures"
    assert recipe.classifier.weights == str(tmp_path / "here" / "w.safetensors")
    assert recipe.folder == tmp_path / "here" / "runs" / "a"
    assert recipe.data.labels == "folders"
    assert load_recipe(path, {"run.folder": None}).folder == Path("runs/farm")


def test_absolute_home_and_named_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    absolute = str(tmp_path / "a" / "w.safetensors")
    for weights, expected in {
        absolute: absolute,
        "~/w.safetensors": str(tmp_path / "w.safetensors"),
        "pretrained": "pretrained",
        "random": "random",
    }.items():
        whole = changed("classifier.weights", weights)
        recipe = parse_recipe(whole, base=tmp_path / "b", where="r")
        assert recipe.classifier.weights == expected
    whole = changed("data.root", "~/pictures")
    assert parse_recipe(whole, base=tmp_path / "b", where="r").data.root == tmp_path / "pictures"


def test_usual_lists() -> None:
    stages: tuple[ListName, ...] = ("classify", "prototypes", "maps", "evaluate")
    recipe = parse_recipe(changed("data.kind", "voc"), where="r")
    assert [recipe.data.list_of(s) for s in stages] == ["train_aug", "train", "train", "train"]
    recipe = parse_recipe(VALUES, where="r")
    assert {recipe.data.list_of(s) for s in stages} == {"all"}


def test_seed_threshold() -> None:
    recipe = parse_recipe(changed("seeds.threshold", 0.0), where="r")
    assert recipe.fixed_threshold("LPCAM") == 0.0
    assert recipe.fixed_threshold("CAM") == 0.15  # the recipe's own is for the method of the seeds


def test_a_recipe_survives_a_round_trip() -> None:
    whole = copy.deepcopy(VALUES)
    recipe = parse_recipe(whole, where="r")
    assert whole == VALUES
    dumped = recipe.model_dump(mode="json", by_alias=True)
    assert parse_recipe(dumped, where="again") == recipe


@pytest.mark.parametrize("name", bundled_recipes())
def test_bundled_recipes_load(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name, {"data.root": str(tmp_path)})
    assert isinstance(recipe, Recipe)
    assert recipe.name == name
    assert recipe.data.root == tmp_path


def test_fields_name_every_key() -> None:
    rows = describe_fields()
    keys = [key for key, _, _ in rows]
    assert len(keys) == len(set(keys))
    expected = {"lpcam.tau", "data.lists.validate", "classifier.probe.long_side", "run.seed"}
    assert expected | {"host.amn.threshold", "refine.irn.epochs", "data.coco.order"} <= set(keys)
    assert [key for key, kind, _ in rows if not kind] == []
    assert "voc12.official" in {key: meaning for key, _, meaning in rows}["lpcam.preset"]


def test_a_recipe_based_on_a_bundled_one(tmp_path: Path) -> None:
    """Its own values come first; a section that names a preset replaces the base's whole one."""
    path = written(
        tmp_path,
        "base: voc_animals\nname: mine\ndata: {classes: [cat], root: photographs}\n"
        "lpcam: {preset: voc12.official}\n",
    )
    base, mine = load_recipe("voc_animals"), load_recipe(path)
    assert (mine.name, mine.data.classes) == ("mine", ("cat",))
    assert mine.data.root == tmp_path / "photographs"
    assert mine.data.lists == base.data.lists
    assert mine.classifier == base.classifier
    assert mine.lpcam.preset == "voc12.official"
    assert mine.lpcam.changes() == {}


def test_a_base_must_be_a_bundled_recipe(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"'mine\.yaml'"):
        load_recipe(written(tmp_path, "base: mine.yaml\nname: mine\n"))


def test_paths_are_absolute_for_the_recipe_that_a_run_keeps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(
        tmp_path,
        "base: voc_animals-deeplabv2\nname: mine\ndata: {root: photographs}\n"
        "segment: {weights: own.safetensors}\n",
    )
    monkeypatch.chdir(tmp_path)
    mine = load_recipe("recipe.yaml")
    assert mine.data.root == tmp_path / "photographs"
    assert mine.segment is not None
    assert mine.segment.weights == str(tmp_path / "own.safetensors")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ("network: upernet", "training.pyramid"),
        (
            "network: wideresnet38\n  backbone: resnet50\n"
            "  training: {preset: wideresnet38.official}",
            "'resnet50'",
        ),
        (
            "network: upernet\n  training: {preset: upernet.voc12.paper}\n  output_stride: 16",
            "output_stride",
        ),
        ("checkpoint: best\n  validations: 0", "'best'.*validations"),
        ("masks: []", "segment.masks"),
        ("training: {preset: light, epochs: 3}", "iterations 1000 and epochs 3"),
        ("training: {preset: light, accumulation: 3}", "batch_size 8.*accum"),
        ("training: {preset: light, scales: [2.0, 1.0]}", "scales"),
    ],
)
def test_segmenters_that_cannot_be(values: str, message: str, tmp_path: Path) -> None:
    path = written(
        tmp_path,
        f"base: voc_animals\nname: mine\nrefine: {{method: irn}}\nsegment:\n  {values}\n",
    )
    with pytest.raises(RecipeError, match=message):
        load_recipe(path)
