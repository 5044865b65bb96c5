"""What an experiment may be, and the runs that are planned from it."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from lpcam.pipeline.experiments.definition import (
    Experiment,
    bundled_experiments,
    load_experiment,
    plan,
)
from lpcam.runtime.errors import RecipeError


def made(**values: object) -> Experiment:
    given = {
        "title": "t",
        "about": "a",
        "sizes": {"tiny": {"recipe": "demo"}},
        "arms": [{"name": "x"}],
    }
    return Experiment.model_validate({**given, **values})


@pytest.mark.parametrize("name", bundled_experiments())
def test_all_arms_of_bundled_experiments_can_be_built(name: str, tmp_path: Path) -> None:
    experiment = load_experiment(name)
    for size in experiment.sizes:
        planned = plan(experiment, size, tmp_path)
        assert {one.seed for one in planned} == set(experiment.sizes[size].seeds)
        arms = {one.arm.name for one in planned}
        assert len(planned) == len(arms) * len(experiment.sizes[size].seeds)
        assert experiment.against_arm is None or experiment.against_arm in arms


def test_sweeps_are_grids_and_equal_runs_share_a_folder(tmp_path: Path) -> None:
    grid = {"lpcam.tau": [0.1, 0.3], "lpcam.clusters": [12, 20]}
    base = {"recipe": "voc_animals", "seeds": [0, 1]}
    again = {"lpcam.mu_f": [0.8, 0.9]}  # 0.9 is the preset's, as in the arm without changes
    experiment = made(sizes={"light": base}, sweeps=[grid, again])
    planned = plan(experiment, "light", tmp_path)
    assert len(planned) == 2 * (1 + 4 + 2)
    assert {(p.recipe.lpcam.tau, p.recipe.lpcam.clusters) for p in planned[2:10]} == {
        (0.1, 12), (0.1, 20), (0.3, 12), (0.3, 20),
    }  # fmt: skip
    same = [p.folder for p in planned if p.arm.name in ("x", "lpcam.mu_f 0.9")]
    assert same[:2] == same[2:]
    assert same[0] != same[1]
    assert len({p.folder for p in planned}) == 2 * 6


def test_the_recipe_and_values_of_a_call_replace_those_of_the_size(tmp_path: Path) -> None:
    size = {"recipe": "demo", "changes": {"lpcam.tau": 0.2, "lpcam.preset": "small"}}
    arms = [{"name": "x"}, {"name": "y", "changes": {"lpcam.mu_f": 0.7}}]
    experiment = made(sizes={"light": size}, arms=arms)
    changes = {"lpcam.tau": 0.4, "lpcam.mu_f": 0.5}
    first, second = plan(
        experiment, "light", tmp_path, recipe="voc_animals", changes=changes, seeds=[7]
    )
    assert first.recipe.classifier.backbone == "mobilenetv2_100"
    assert (first.recipe.lpcam.tau, first.recipe.run.seed) == (0.4, 7)
    assert (first.recipe.lpcam.mu_f, second.recipe.lpcam.mu_f) == (0.5, 0.7)  # the arm's own


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ({"arms": []}, "sweeps"),
        ({"arms": [{"name": "x", "colour": "red"}]}, "colour"),
        ({"plots": [{"kind": "sweep", "title": "t", "x": "lpcam.tau"}]}, "lpcam.tau"),
        ({"sizes": {"huge": {}}}, "huge"),
        ({"arms": [{"name": "x", "drop": {"arm": "y", "by": "size", "share": 0.5}}]}, "'y'"),
    ],
)
def test_refuses_what_is_no_experiment(
    values: dict[str, object], names: str, tmp_path: Path
) -> None:
    given = {"title": "t", "about": "a", "sizes": {"tiny": {}}, "arms": [{"name": "x"}], **values}
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump(given))
    with pytest.raises(RecipeError, match=names):
        load_experiment(path)


def test_names_every_arm_that_cannot_be_built(tmp_path: Path) -> None:
    arms = [
        {"name": "good"},
        {"name": "wrong key", "changes": {"lpcam.tua": 0.1}},
        {"name": "wrong value", "changes": {"lpcam.tau": 7}},
        {"name": "no recipe", "recipe": {"light": "voc_animals"}},
    ]
    experiment = made(arms=arms, sizes={"tiny": {}})
    with pytest.raises(RecipeError) as raised:
        plan(experiment, "tiny", tmp_path, recipe=None)
    assert all(
        name in str(raised.value) for name in ("good", "wrong key", "wrong value", "no recipe")
    )
    with pytest.raises(RecipeError, match="tua") as raised:
        plan(experiment, "tiny", tmp_path, recipe="demo")
    assert "good" not in str(raised.value)


SET = {"name": "x", "changes": {"lpcam.tau": 0.2}}


@pytest.mark.parametrize(
    ("experiment", "size", "changes", "names"),
    [
        (made(), "official", {}, "official"),
        (made(arms=[{"name": "a b"}, {"name": "a_b"}]), "tiny", {}, "a_b"),
        (made(arms=[SET]), "tiny", {"lpcam.tau": 1}, "lpcam.tau"),
    ],
)
def test_refuses_what_cannot_be_planned(
    experiment: Experiment, size: str, changes: dict[str, object], names: str, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=names):
        plan(experiment, size, tmp_path, changes=changes)
