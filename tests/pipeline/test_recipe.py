"""Recipes: what is refused and in which words, how values are replaced, where paths lead."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from lpcam.pipeline.recipe import Recipe, bundled_recipes, load_recipe, parse_recipe
from lpcam.runtime.errors import RecipeError


def values() -> dict[str, Any]:
    return {
        "name": "farm",
        "data": {"kind": "folder", "root": "pictures"},
        "classifier": {"backbone": "resnet18", "weights": "random"},
        "lpcam": {"preset": "voc12.official"},
    }


def changed(path: str, value: Any) -> dict[str, Any]:
    """The values with one key of a dotted path set."""
    whole = place = values()
    *sections, last = path.split(".")
    for section in sections:
        place = place.setdefault(section, {})
    place[last] = value
    return whole


def written(tmp_path: Path, whole: dict[str, Any] | str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(whole if isinstance(whole, str) else yaml.safe_dump(whole), encoding="utf-8")
    return path


def refusal(whole: Any) -> str:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(whole, where="r.yaml")
    return str(caught.value)


# -- What is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("wheels", "version, name, data, classifier, lpcam"),
        ("data.roots", "kind, root, labels, masks, coco, saliency, name, classes, lists"),
        ("data.lists.valid", "classify, validate, prototypes, maps, evaluate"),
        ("classifier.probe.epochs", "preset, long_side, mirror"),
        ("lpcam.taus", "preset, clusters, restarts, tau,"),
        ("seeds.level", "method, threshold, ignore_threshold"),
    ],
)
def test_an_unknown_key_names_itself_and_those_allowed(path: str, allowed: str) -> None:
    message = refusal(changed(path, 3))
    assert message.startswith("the recipe r.yaml has 1 problem(s):\n")
    assert f"\n  {path} = 3: unknown key; allowed here: {allowed}" in message


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("lpcam.tau", 1.5, "lpcam.tau = 1.5: Input should be less than or equal to 1"),
        ("lpcam.tau", "much", "lpcam.tau = 'much': Input should be a valid number"),
        ("data.kind", "zip", "data.kind = 'zip': Input should be 'voc', 'folder' or 'coco'"),
        ("classifier.output_stride", 12, "classifier.output_stride = 12: Input should be 8, 16 or"),
        ("seeds.method", "lpcam", "seeds.method = 'lpcam': Input should be 'CAM', 'LPCAM-F' or"),
        ("run.seed", -1, "run.seed = -1: Input should be greater than or equal to 0"),
        ("name", "a/b", "name = 'a/b': String should match pattern"),
        ("lpcam", "voc12.official", "lpcam = 'voc12.official': Input should be a valid dict"),
        ("data", {"kind": "voc"}, "data.root: is required and missing"),
        ("lpcam.preset", "voc13", "lpcam: unknown preset 'voc13'; allowed: voc12.official"),
        ("lpcam.context_lower", 0.9, "lpcam: context_lower 0.9 must be below mu_b 0.9"),
        ("version", 0, "version = 0: Input should be 1"),
    ],
)
def test_a_wrong_value_names_field_value_and_what_is_allowed(
    path: str, value: Any, message: str
) -> None:
    assert f"\n  {message}" in refusal(changed(path, value))


def test_all_problems_are_told_at_once() -> None:
    whole = changed("lpcam.tau", 2)
    whole["data"]["rot"] = 1
    del whole["name"]
    message = refusal(whole)
    assert "has 3 problem(s)" in message
    assert all(f"\n  {key}" in message for key in ("lpcam.tau = 2:", "data.rot = 1:", "name: is"))


def test_ignore_threshold_above_the_threshold() -> None:
    whole = changed("seeds", {"threshold": 0.2, "ignore_threshold": 0.25})
    assert "seeds.ignore_threshold 0.25 must not be above the threshold of the" in refusal(whole)
    # the threshold of the preset is 0.3
    whole = changed("seeds", {"ignore_threshold": 0.4})
    assert "the threshold of the seeds, 0.3 (seeds.threshold, or that of the l" in refusal(whole)
    whole = changed("seeds", {"ignore_threshold": 0.3})
    assert parse_recipe(whole, where="r").seeds.ignore_threshold == 0.3


def test_a_newer_version() -> None:
    message = refusal(changed("version", 2) | {"of_the_future": 1})
    assert message.startswith("the recipe r.yaml has version 2, this lpcam reads up to 1; upgrade")


def test_files_that_are_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"no recipe 'farm': it is neither a file nor .*voc_a"):
        load_recipe("farm")
    with pytest.raises(RecipeError, match="is not valid YAML"):
        load_recipe(written(tmp_path, "a: [1"))
    with pytest.raises(RecipeError, match=r"must be a mapping of sections, got \['a'\]"):
        load_recipe(written(tmp_path, "- a"))
    with pytest.raises(RecipeError, match="must be a mapping of sections, got None"):
        load_recipe(written(tmp_path, ""))
    (tmp_path / "recipe.yaml").write_bytes("name: é".encode("latin-1"))
    with pytest.raises(RecipeError, match=r"recipe\.yaml cannot be read as UTF-8:"):
        load_recipe(tmp_path / "recipe.yaml")


# -- Values on the command line -----------------------------------------------------------------


def test_overrides_of_nested_keys(tmp_path: Path) -> None:
    recipe = load_recipe(
        written(tmp_path, values()),
        [
            ("lpcam.tau", "0.25"),
            ("lpcam.preset", "coco14.paper"),
            ("lpcam.scales", "[1.0, 0.5]"),
            ("classifier.probe.long-side", "128"),
            ("data.classes", "[cow, pig]"),
            ("data.lists.maps", "train"),
            ("seeds.threshold", "null"),
            ("name", "other"),
        ],
    )
    assert (recipe.lpcam.tau, recipe.lpcam.clusters, recipe.lpcam.scales) == (0.25, 20, (1.0, 0.5))
    assert recipe.lpcam.changes() == {"scales": (1.0, 0.5)}  # 0.25 is the new preset's own tau
    assert recipe.classifier.probe.long_side == 128
    assert recipe.data.classes == ("cow", "pig")
    assert recipe.data.list_of("maps") == "train"
    assert recipe.data.list_of("prototypes") == "all"
    assert recipe.folder == Path("runs/other")
    assert recipe.fixed_threshold("LPCAM") == 0.3


def test_overrides_that_are_wrong(tmp_path: Path) -> None:
    path = written(tmp_path, values())
    with pytest.raises(RecipeError, match=r"lpcam\.tao = 1: unknown key; allowed here: .*tau"):
        load_recipe(path, [("lpcam.tao", "1")])
    with pytest.raises(RecipeError, match=r"--name\.first: 'name' is a value, not a section"):
        load_recipe(path, [("name.first", "1")])
    with pytest.raises(RecipeError, match=r"the value of --lpcam.scales, '\[1', is not valid YAML"):
        load_recipe(path, [("lpcam.scales", "[1")])


def test_relative_paths_of_the_file_and_of_the_command_line(
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
    recipe = load_recipe(
        path,
        [
            ("data.root", "pictures"),
            ("classifier.weights", "w.safetensors"),
            ("run.folder", "runs/a"),
        ],
    )
    assert recipe.data.root == tmp_path / "here" / "pictures"
    assert recipe.classifier.weights == str(tmp_path / "here" / "w.safetensors")
    assert recipe.folder == tmp_path / "here" / "runs" / "a"
    assert load_recipe(path, [("run.folder", "null")]).folder == Path("runs/farm")


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


# -- Defaults and bundled recipes ---------------------------------------------------------------


def test_usual_lists() -> None:
    recipe = parse_recipe(changed("data.kind", "voc"), where="r")
    stages = ("classify", "prototypes", "maps", "evaluate")
    assert [recipe.data.list_of(s) for s in stages] == ["train_aug", "train", "train", "train"]  # type: ignore[arg-type]
    recipe = parse_recipe(values(), where="r")
    assert {recipe.data.list_of(s) for s in stages} == {"all"}  # type: ignore[arg-type]


def test_seed_threshold() -> None:
    recipe = parse_recipe(changed("seeds.threshold", 0.0), where="r")
    assert recipe.fixed_threshold("LPCAM") == 0.0
    assert recipe.fixed_threshold("CAM") == 0.3  # the recipe's own is for the method of the seeds
    assert parse_recipe(values(), where="r").fixed_threshold("LPCAM") == 0.3


def test_parse_does_not_change_its_input_and_round_trips() -> None:
    whole = values()
    recipe = parse_recipe(whole, where="r")
    assert whole == values()
    dumped = recipe.model_dump(mode="json", by_alias=True)
    assert parse_recipe(dumped, where="again") == recipe


@pytest.mark.parametrize("name", bundled_recipes())
def test_bundled_recipes_load(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name, [("data.root", str(tmp_path))])
    assert isinstance(recipe, Recipe)
    assert recipe.name == name
    assert recipe.data.root == tmp_path


def test_there_are_bundled_recipes() -> None:
    assert "voc_animals" in bundled_recipes()


def test_a_folder_is_no_recipe_but_may_hold_one(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"voc_animals-mctformer$"):
        load_recipe(tmp_path)
    (tmp_path / "recipe.yaml").write_text("version: 1\n")
    with pytest.raises(RecipeError, match=r"; did you mean '.*recipe\.yaml'\?$"):
        load_recipe(tmp_path)


# -- Recipes based on others ---------------------------------------------------------------------


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_a_recipe_based_on_a_bundled_one(tmp_path: Path) -> None:
    """Its own values come first; of a section that names a preset none of the base's are left."""
    path = write(
        tmp_path / "mine.yaml",
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


def test_a_base_is_a_bundled_recipe(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.yaml", "base: mine.yaml\nname: mine\n")
    with pytest.raises(
        RecipeError, match=r"is based on 'mine\.yaml'; a base is one of the bundled"
    ):
        load_recipe(path)


def test_paths_are_absolute_for_the_recipe_that_a_run_keeps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(
        tmp_path / "mine.yaml",
        "base: voc_animals-deeplabv2\nname: mine\ndata: {root: photographs}\n"
        "segment: {weights: own.safetensors}\n",
    )
    monkeypatch.chdir(tmp_path)
    mine = load_recipe("mine.yaml")
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
        ("checkpoint: best\n  validations: 0", "checkpoint 'best' needs validations above 0"),
        ("masks: []", "segment.masks"),
        (
            "training: {preset: light, epochs: 3}",
            "iterations 1000 and epochs 3: give one and set the other to null",
        ),
        ("training: {preset: light, accumulation: 3}", "batch_size 8 is no multiple of accum"),
        ("training: {preset: light, scales: [2.0, 1.0]}", "must be a range: two, the smaller"),
    ],
)
def test_segmenters_that_cannot_be(values: str, message: str, tmp_path: Path) -> None:
    path = write(
        tmp_path / "mine.yaml",
        f"base: voc_animals\nname: mine\nrefine: {{method: irn}}\nsegment:\n  {values}\n",
    )
    with pytest.raises(RecipeError, match=re.escape(message)):
        load_recipe(path)
