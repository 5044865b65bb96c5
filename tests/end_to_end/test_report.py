"""The report of a whole run: made at its end, made again from its folder, never of half a run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from explaining import collected_pages  # noqa: F401 - the fixture "collected"
from tiny import draw_folder, recipe_values, times

from lpcam.cli.main import main
from lpcam.method.reservoir import SIDES
from lpcam.pipeline.recipe import parse_recipe
from lpcam.pipeline.run import report, run
from lpcam.runtime.errors import ArtefactError

Values = dict[str, Any]


def go(values: Values, **options: Any) -> Any:
    return run(parse_recipe(values, where="tiny.yaml"), command="lpcam run tiny.yaml", **options)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, weights: Path) -> Values:
    root = draw_folder(tmp_path_factory.mktemp("data") / "boxes")
    values = recipe_values(root, tmp_path_factory.mktemp("done") / "run", weights)
    values["report"] = {"images": 8, "searched": 6, "prototypes": 3, "patches": 2}
    go(values)
    return values


@pytest.fixture
def values(finished: Values, tmp_path: Path) -> Values:
    shutil.copytree(finished["run"]["folder"], tmp_path / "run")
    return {**finished, "run": {**finished["run"], "folder": str(tmp_path / "run")}}


def test_the_page_holds_the_figures(values: Values, collected: list[Any]) -> None:
    folder = Path(values["run"]["folder"])
    (folder / "report.html").unlink()
    result = go(values)
    assert result.report == folder / "report.html"
    (page,) = collected
    metrics = json.loads((folder / "metrics.json").read_text())
    assert page["title"] == result.rows[0]["dataset"]
    assert len(page["images"]) == 8
    assert page["images_total"] == 12
    text = result.report.read_text()
    for row in metrics["rows"]:
        assert f"{100 * row['miou']:.1f}" in text
    scores = json.loads((folder / "evaluation" / "images.json").read_text())
    known = dict(zip(scores["ids"], scores["LPCAM"], strict=True))
    for record in page["images"]:
        assert record["score"]["LPCAM"] == known[record["id"]]
    shown = {record["id"] for record in page["images"]}
    for names in page["highlights"].values():
        assert set(names) <= shown
    for one in page["prototypes"]["classes"]:
        for side in one["sides"].values():
            assert len(side["prototypes"]) <= 3
            assert all(len(p["patches"]) <= 2 for p in side["prototypes"])


def test_made_again_from_another_folder(
    values: Values,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    collected: list[Any],
) -> None:
    page = tmp_path / "run" / "report.html"
    page.unlink()
    go(values)
    recipe = (tmp_path / "run" / "recipe.yaml").read_bytes()
    page.unlink()
    monkeypatch.chdir(tmp_path)
    assert main(["report", "run"]) == 0
    assert capsys.readouterr().out == f"report in {page}\n"
    assert page.is_file()
    assert main(["report", "run"]) == 0  # asked for by name it is made, whether there or not
    at_the_end, again, once_more = collected
    for one in collected:  # the first did not know what a report takes
        one["stages"] = []
    assert at_the_end == again == once_more
    assert (tmp_path / "run" / "recipe.yaml").read_bytes() == recipe


def test_a_run_that_is_not_up_to_date_is_refused(values: Values, tmp_path: Path) -> None:
    (tmp_path / "run" / "lpcam" / "i03.npz").unlink()
    (tmp_path / "run" / "report.html").unlink()
    before = times(tmp_path / "run")
    with pytest.raises(ArtefactError, match=r"lpcam is missing, .*lpcam run .*yaml --run.folder"):
        report(tmp_path / "run")
    assert times(tmp_path / "run") == before


def test_after_an_upgrade(values: Values, monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures keep the versions that made them, and a report can be made of them."""
    folder = Path(values["run"]["folder"])
    go(values)
    before = (folder / "metrics.json").read_bytes()
    monkeypatch.setattr("lpcam.runtime.versions.__version__", "99.0")
    report(folder)
    assert (folder / "metrics.json").read_bytes() == before


def test_figures_that_change_take_the_page_with_them(values: Values) -> None:
    folder = Path(values["run"]["folder"])
    go({**values, "seeds": {"threshold": 0.4}}, until="evaluate")
    assert not (folder / "report.html").exists()


def test_no_run_and_no_report_wanted(values: Values, tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match=r"recipe\.yaml"):
        report(tmp_path)
    go({**values, "report": {"images": 0}})
    assert not (tmp_path / "run" / "report.html").exists()
    with pytest.raises(ArtefactError, match=r"report\.images"):
        report(tmp_path / "run")


def test_a_run_without_masks(finished: Values, tmp_path: Path, collected: list[Any]) -> None:
    root = tmp_path / "boxes"
    shutil.copytree(finished["data"]["root"], root)
    shutil.rmtree(root / "masks")
    values = {
        **finished,
        "data": {**finished["data"], "root": str(root)},
        "run": {**finished["run"], "folder": str(tmp_path / "run")},
    }
    result = go(values)
    assert result.rows == []
    (page,) = collected
    assert (page["curves"], page["highlights"]) == ({}, {})
    assert all(r["iou"] == {} and r["masks"] == {} for r in page["images"])
    assert page["images"][0]["planes"]["LPCAM"]["shape"][0] == len(page["images"][0]["labels"])


def test_a_run_that_chooses(finished: Values, tmp_path: Path, collected: list[Any]) -> None:
    """What a run chose itself is on its page, and so are its maps LPCAM-E."""
    values = {**finished, "run": {**finished["run"], "folder": str(tmp_path / "run")}}
    values["lpcam"] = {"preset": "adaptive", "max_features": 60, "early": {"clusters": 4}}
    result = go(values)
    (page,) = collected
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    stage = json.loads((tmp_path / "run" / "early" / "stage.json").read_text())
    assert page["choices"] == metrics["choices"] and page["verdicts"] == metrics["verdicts"]
    keys = [one["key"] for one in page["choices"]]
    assert {"lpcam.early", "threshold of CAM", "threshold of LPCAM-E"} <= set(keys)
    assert page["ways"] == stage["output"]["ways"]
    assert page["methods"][-1] == "LPCAM-E"
    assert all(list(one["planes"]) == ["CAM", "LPCAM", "LPCAM-E"] for one in page["images"])
    used = next(one for one in page["ways"] if one["chosen"])["fusion"] != "none"
    assert bool(page["prototypes"]["early"]) == used
    assert "What the run chose" in result.report.read_text()

    # made again without the run's features, and so without mirror images
    report(tmp_path / "run")
    again = collected[1]
    assert (again["images"], again["confusions"]) == (page["images"], page["confusions"])
    for one, other in zip(
        again["prototypes"]["classes"], page["prototypes"]["classes"], strict=True
    ):
        assert all(one["sides"][side] == other["sides"][side] for side in SIDES)
