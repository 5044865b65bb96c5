"""The command that runs experiments."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from tiny import draw_folder, recipe_values, write_weights

from lpcam.cli.main import main
from lpcam.pipeline.experiments.definition import bundled_experiments


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    weights = write_weights(tmp_path / "weights.safetensors")
    values = recipe_values(draw_folder(tmp_path / "d"), tmp_path / "run", weights)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def definition(path: Path, **values: object) -> Path:
    given = {
        "title": "Own",
        "about": "a",
        "sizes": {"light": {}},
        "arms": [{"name": "x"}],
        **values,
    }
    path.write_text(yaml.safe_dump(given))
    return path


def test_lists_every_bundled_experiment(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["experiment", "--list"]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert names == bundled_experiments()


def test_runs_an_experiment_on_a_recipe(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = definition(tmp_path / "own.yaml")
    words = ["experiment", str(own), str(recipe), "--lpcam.tau", "0.2", "--folder"]
    assert main([*words, str(tmp_path / "e"), "--seeds", "3"]) == 0
    shown = capsys.readouterr().out
    assert "LPCAM-F" in shown
    assert str(tmp_path / "e" / "report.html") in shown
    written = yaml.safe_load((tmp_path / "e/runs/x-seed3/recipe.yaml").read_text())
    assert (written["lpcam"]["tau"], written["run"]["seed"]) == (0.2, 3)


def test_a_failed_arm_is_status_1(recipe: Path, tmp_path: Path) -> None:
    arms = [{"name": "x", "changes": {"lpcam.choices": str(tmp_path / "missing.yaml")}}]
    own = definition(tmp_path / "own.yaml", arms=arms)
    assert main(["experiment", str(own), str(recipe), "--folder", str(tmp_path / "e")]) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["none"], "'none'"),
        (["OWN", "--size", "tiny"], "'tiny'"),
        (["OWN"], "no recipe"),
        (["MANY", "demo"], "201 runs.*--yes"),
        (["OWN", "demo", "--lpcam.tua", "1"], "tua"),
    ],
)
def test_refuses_before_it_writes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    sweeps = [{"run.memory": [1 + n / 8 for n in range(200)]}]
    files = {
        "OWN": definition(tmp_path / "own.yaml"),
        "MANY": definition(tmp_path / "many.yaml", sweeps=sweeps),
    }
    given = [str(files.get(word, word)) for word in words]
    assert main(["experiment", *given, "--folder", str(tmp_path / "e")]) == 2
    told = capsys.readouterr().err
    assert re.search(message, told, re.DOTALL)
    assert not (tmp_path / "e").exists()
