"""Dry runs: the arms that cannot be built, what is counted, and every official experiment."""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from lpcam.cli.main import main
from lpcam.pipeline.experiments import dry_run
from lpcam.pipeline.experiments.definition import (
    Experiment,
    bundled_experiments,
    load_experiment,
    plan,
)
from lpcam.runtime.errors import RecipeError

OFFICIAL = [name for name in bundled_experiments() if "official" in load_experiment(name).sizes]
KNOWN: dict[str, Any] = {}
once = dry_run._once


def known_to_all(known: dict[str, Any], key: object, make: Callable[[], Any]) -> Any:
    """What experiments share is made once for all of these tests."""
    return once(KNOWN, key, make)


def table(text: str) -> dict[str, list[float]]:
    """Hours, memory and disk of each line."""
    rows = re.findall(r"^(\S.*?) {2,}(?:\d+ +)?([\d.,]+) +([\d.,]+) +([\d.,]+)$", text, re.M)
    return {name: [float(one.replace(",", "")) for one in rest] for name, *rest in rows}


def planned(arms: list[dict[str, Any]], folder: Path, **values: Any) -> Any:
    fields = {"title": "t", "about": "a", "arms": arms, "sizes": {"tiny": {"recipe": "demo"}}}
    return plan(Experiment.model_validate(fields), "tiny", folder, changes=values)


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One working folder, from which recipes take their files, so that they are equal."""
    return tmp_path_factory.mktemp("empty")


@pytest.mark.parametrize("name", OFFICIAL)
def test_every_official_experiment_can_be_built_without_data_or_weights(
    name: str, monkeypatch: pytest.MonkeyPatch, empty: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    experiment = load_experiment(name)
    if any("upernet" in str(arm.recipe) for arm in experiment.arms) and not find_spec(
        "transformers"
    ):
        pytest.skip("needs the extra upernet")
    monkeypatch.setattr(dry_run, "_once", known_to_all)
    monkeypatch.chdir(empty)
    assert main(["experiment", name, "--size", "official", "--dry-run"]) == 0
    rows = table(capsys.readouterr().out)
    arms = [arm.name for arm in experiment.all_arms("official")]
    total = rows.pop("all, shared results once")
    assert set(rows) <= {arm[:43] for arm in arms}
    assert arms[0][:43] in rows
    assert all(one > 0 for row in rows.values() for one in row)
    for column in (0, 2):
        values = [row[column] for row in rows.values()]
        assert max(values) <= total[column] <= sum(values) + 0.1
    assert not [*empty.iterdir()]


def test_memory_of_the_sampled_features_is_what_a_run_asks_for(
    monkeypatch: pytest.MonkeyPatch, empty: Path
) -> None:
    """13 GiB for all features of VOC's train, and little for a bounded sample (reproduce.md)."""
    monkeypatch.setattr(dry_run, "_once", known_to_all)
    monkeypatch.chdir(empty)
    experiment = load_experiment("table1")
    found = [
        table(dry_run.describe(plan(experiment, "official", empty, changes=changes)))
        for changes in ({}, {"lpcam.max_features": 100})
    ]
    whole, bounded = (rows["ResNet-50"][1] for rows in found)
    assert 12 < whole < 14
    assert bounded < 1


def test_results_that_arms_share_are_counted_once(tmp_path: Path) -> None:
    """Another tau makes LPCAM's maps again, and neither the classifier nor CAM."""
    arms = [{"name": "a"}, {"name": "b", "changes": {"lpcam.tau": 0.3}}]
    values = {"lpcam.preset": "small", "classifier.method": "finetune", "lpcam.scales": [4.0]}
    rows = table(dry_run.describe(planned(arms, tmp_path, **values, **{"run.memory": 0.001})))
    total = rows["all, shared results once"]
    assert rows["a"] == rows["b"]
    assert rows["a"][2] < total[2] < 2 * rows["a"][2]
    same = [{"name": "a"}, {"name": "the same"}]
    rows = table(dry_run.describe(planned(same, tmp_path, **values)))
    assert [*rows] == ["a", "all, shared results once"]
    assert rows["a"] == rows["all, shared results once"]


def test_real_lists_take_the_place_of_supposed_ones(pictures: Path, tmp_path: Path) -> None:
    """12 pictures of three classes need less disk than the 400 drawings of the demo."""
    values = {"lpcam.preset": "small"}
    supposed, real = (
        table(dry_run.describe(planned([{"name": "a"}], tmp_path, **values, **{"data.root": root})))
        for root in (str(tmp_path / "none"), str(pictures))
    )
    assert real["a"][2] < supposed["a"][2] / 20


def test_all_arms_that_cannot_be_built_are_named(tmp_path: Path) -> None:
    arms = [
        {"name": "good"},
        {"name": "no such backbone", "changes": {"classifier.backbone": "resnet51"}},
        {"name": "no such list", "changes": {"data.lists.maps": "train_aug"}},
    ]
    with pytest.raises(RecipeError) as error:
        dry_run.describe(planned(arms, tmp_path))
    message = str(error.value)
    assert re.search("no such backbone: .*resnet51", message)
    assert re.search("no such list: .*train_aug.*--data.root", message)
    assert "good" not in message


def test_a_dry_run_that_fails_has_an_exit_status(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(
        "title: t\nabout: a\nsizes: {tiny: {recipe: demo}}\n"
        "arms: [{name: bad, changes: {classifier.backbone: resnet51}}]\n",
        "utf-8",
    )
    assert main(["experiment", str(path), "--size", "tiny", "--dry-run"]) == 2
    assert "bad: " in capsys.readouterr().err
