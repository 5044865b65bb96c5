"""Runs of an experiment: shared results, what is done again, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tiny import digests, draw_folder, recipe_values, times, write_weights

from lpcam.pipeline.experiments.pictures import PICTURES
from lpcam.pipeline.experiments.writing import run_experiment
from lpcam.pipeline.recipe import load_recipe
from lpcam.pipeline.run import run
from lpcam.pipeline.run_folder import RunFolder
from lpcam.runtime.errors import ArtefactError, DataError
from lpcam.runtime.files import read_json


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    weights = write_weights(root / "weights.safetensors")
    path = root / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe_values(draw_folder(root / "d"), root / "run", weights)))
    return path


def definition(path: Path, **values: Any) -> Path:
    given = {
        "title": "Own",
        "about": "Nothing.",
        "sizes": {"tiny": {"seeds": [0, 1]}},
        "arms": [{"name": "base"}, {"name": "spread", "changes": {"lpcam.init": "k-means++"}}],
        "sweeps": [{"lpcam.tau": [0.1, 0.3]}],
        "plots": [
            {"kind": "sweep", "x": "lpcam.tau", "title": "tau"},
            {"kind": "threshold", "title": "threshold"},
        ],
        **values,
    }
    path.write_text(yaml.safe_dump(given))
    return path


@pytest.fixture(scope="module")
def made(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("experiments") / "own"
    source = definition(folder.parent / "own.yaml")
    results = run_experiment(source, "tiny", folder, recipe=str(recipe), command="lpcam own")
    return folder, results


def test_writes_results_tables_plots_and_a_page(made: tuple[Path, dict[str, Any]]) -> None:
    folder, results = made
    assert read_json(folder / "results.json") == results
    assert not results["failed"]
    methods = {(row["arm"], row["method"]) for row in results["rows"]}
    assert ("base", "CAM") in methods
    assert ("lpcam.tau 0.3", "LPCAM") in methods
    assert all(row["seeds"] == [0, 1] for row in results["rows"])
    for name in ("table.md", "table.tex", "report.html", "plots/1.svg", "plots/2.svg"):
        assert (folder / name).read_text("utf-8")
    assert (folder / "table.md").read_text("utf-8").count("\n|") == len(results["rows"]) + 1


def test_an_arm_has_the_bytes_of_the_same_run_alone(
    made: tuple[Path, dict[str, Any]], recipe: Path, tmp_path: Path
) -> None:
    changes = {"lpcam.tau": 0.3, "run.seed": 1, "run.folder": str(tmp_path / "alone")}
    run(load_recipe(recipe, {**changes, "name": "lpcam.tau_0.3-seed1"}), until="evaluate")
    alone, arm = (digests(f) for f in (tmp_path / "alone", made[0] / "runs/lpcam.tau_0.3-seed1"))
    differing = {name for name in alone.keys() | arm.keys() if alone.get(name) != arm.get(name)}
    # only the folder and the command differ, which these name
    assert differing <= {"recipe.yaml", "metrics.json", "evaluation/stage.json"}


def test_equal_stages_are_made_once(made: tuple[Path, dict[str, Any]]) -> None:
    runs = made[0] / "runs"
    maps = [next((runs / f"{arm}-seed0/cam").glob("*.npz")) for arm in ("base", "spread")]
    assert maps[0].samefile(maps[1])
    trained = [runs / f"base-seed{seed}/classifier/classifier.safetensors" for seed in (0, 1)]
    assert not trained[0].samefile(trained[1])


def test_an_unchanged_call_does_nothing(
    made: tuple[Path, dict[str, Any]], recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, results = made
    before = times(folder / "runs")
    monkeypatch.setattr("lpcam.pipeline.experiments.running.run", None)  # would fail
    again = run_experiment(
        folder.parent / "own.yaml", "tiny", folder, recipe=str(recipe), command="lpcam own"
    )
    assert again == results
    assert times(folder / "runs") == before


def test_new_labels_and_weights_make_runs_again(recipe: Path, tmp_path: Path) -> None:
    values = yaml.safe_load(recipe.read_text())
    root, weights = tmp_path / "d", tmp_path / "w.safetensors"
    shutil.copytree(values["data"]["root"], root)
    shutil.copy(values["classifier"]["weights"], weights)
    changes = {"data.root": str(root), "classifier.weights": str(weights)}
    how: dict[str, Any] = {"recipe": str(recipe), "changes": changes}
    one = {"sizes": {"tiny": {}}, "arms": [{"name": "a"}], "sweeps": [], "plots": []}
    source = definition(tmp_path / "own.yaml", **one)
    rows = [run_experiment(source, "tiny", tmp_path / "e", **how)["rows"]]
    labels = (root / "labels.csv").read_text()
    (root / "labels.csv").write_text(labels.replace("i05.png,red", "i05.png,blue"))
    rows.append(run_experiment(source, "tiny", tmp_path / "e", **how)["rows"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        state = {k: torch.rand_like(v.float()) for k, v in load_file(weights).items()}
    save_file(state, weights)
    rows.append(run_experiment(source, "tiny", tmp_path / "e", **how)["rows"])
    assert rows[0] != rows[1] != rows[2]


def test_a_failed_arm_does_not_lose_the_others_and_is_tried_again(
    recipe: Path, tmp_path: Path
) -> None:
    arms = [{"name": "wrong", "changes": {"lpcam.choices": str(tmp_path / "missing.yaml")}}]
    source = definition(
        tmp_path / "own.yaml",
        arms=[*arms, {"name": "base"}],
        sizes={"tiny": {}},
        sweeps=[],
        plots=[],
    )
    how: dict[str, Any] = {"recipe": str(recipe)}
    results = run_experiment(source, "tiny", tmp_path / "e", **how)
    ((failed,), rows) = results["failed"], results["rows"]
    assert failed["arm"] == "wrong"
    assert "missing.yaml" in failed["reason"]
    assert {row["arm"] for row in rows} == {"base"}
    assert "missing.yaml" in (tmp_path / "e/table.md").read_text("utf-8")
    assert run_experiment(source, "tiny", tmp_path / "e", **how)["failed"] == [failed]


def test_an_arm_drops_the_worst_prototypes_of_another(recipe: Path, tmp_path: Path) -> None:
    drop = {"arm": "base", "by": "size", "share": 0.5}
    source = definition(
        tmp_path / "own.yaml",
        arms=[{"name": "fewer", "drop": drop}, {"name": "base"}],
        sizes={"tiny": {}},
        sweeps=[],
        plots=[],
    )
    results = run_experiment(source, "tiny", tmp_path / "e", recipe=str(recipe))
    assert not results["failed"]
    chosen = read_json(tmp_path / "e/runs/fewer-seed0/chosen/stage.json")["output"]["choices"]
    assert {one["action"] for one in chosen} == {"drop"}


def test_several_processes_give_the_same_rows(
    made: tuple[Path, dict[str, Any]], recipe: Path, tmp_path: Path
) -> None:
    source = definition(tmp_path / "own.yaml")
    results = run_experiment(
        source, "tiny", tmp_path / "e", recipe=str(recipe), processes=2, command="lpcam own"
    )
    assert [row["values"] for row in results["rows"]] == [r["values"] for r in made[1]["rows"]]


def test_a_folder_belongs_to_one_experiment(
    made: tuple[Path, dict[str, Any]], recipe: Path, tmp_path: Path
) -> None:
    other = definition(tmp_path / "other.yaml")
    with pytest.raises(ArtefactError, match="own"):
        run_experiment(other, "tiny", made[0], recipe=str(recipe))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/letter.txt").write_text("dear")
    with pytest.raises(ArtefactError, match="mine"):
        run_experiment(other, "tiny", tmp_path / "mine", recipe=str(recipe))


def test_missing_data_are_refused_before_any_arm(recipe: Path, tmp_path: Path) -> None:
    source = definition(tmp_path / "own.yaml")
    changes = {"data.root": str(tmp_path / "nowhere")}
    with pytest.raises(DataError, match="nowhere"):
        run_experiment(source, "tiny", tmp_path / "e", recipe=str(recipe), changes=changes)
    assert not (tmp_path / "e/runs").exists()


def test_a_picture_that_cannot_be_drawn_does_not_lose_the_table(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(run: RunFolder) -> NoReturn:
        raise ArtefactError("no image fits")

    monkeypatch.setitem(PICTURES, "sheet", refuse)
    plots = [{"kind": "sheet", "title": "pictures"}]
    values: dict[str, Any] = {"sizes": {"tiny": {}}, "sweeps": [], "arms": [{"name": "a"}]}
    source = definition(tmp_path / "own.yaml", plots=plots, **values)
    results = run_experiment(source, "tiny", tmp_path / "e", recipe=str(recipe))
    assert results["plots"] == []
    assert results["rows"]
    assert "no image fits" in (tmp_path / "e/report.html").read_text("utf-8")
