"""``lpcam demo``: drawn once, run through, and nobody's files drawn over."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import digests, times

from lpcam.data import creatures
from lpcam.data.drawing import SheetRow, sheet
from lpcam.data.folder import read_folder
from lpcam.data.map_files import read_maps
from lpcam.pipeline import demo as module
from lpcam.pipeline.cache import locked
from lpcam.pipeline.demo import demo
from lpcam.pipeline.recipe import Recipe
from lpcam.pipeline.run import RunResult
from lpcam.pipeline.stages import evaluate
from lpcam.runtime.errors import ArtefactError, DataError


@pytest.fixture
def recipes(monkeypatch: pytest.MonkeyPatch) -> list[Recipe]:
    """The recipes that were asked to run; nothing is run."""
    asked: list[Recipe] = []

    def run(recipe: Recipe, **options: Any) -> RunResult:
        assert options == {"command": "lpcam demo"}
        asked.append(recipe)
        return RunResult(recipe.folder, [], [])

    monkeypatch.setattr(module, "run", run)
    return asked


def draw(folder: Path, images: int = 3, threads: int | None = None) -> RunResult:
    return demo(folder, threads, "lpcam demo", images=images, size=48)


def test_the_recipe_works_on_what_was_drawn(tmp_path: Path, recipes: list[Recipe]) -> None:
    result = draw(tmp_path / "demo", threads=1)
    (recipe,) = recipes
    assert result.folder == recipe.folder == tmp_path / "demo"
    assert recipe.data.root == tmp_path / "demo" / "data"
    assert recipe.run.threads == 1
    assert recipe.seeds.threshold is None  # the run chooses it
    assert Path(recipe.classifier.weights).is_file()
    data = read_folder(recipe.data.root)
    assert len(data.items) == 3
    assert data.classes.names == creatures.CLASSES
    assert data.part_names == creatures.PARTS
    assert data.skipped == ()
    assert all(item.mask and item.parts for item in data.items.values())


def test_a_second_call_draws_nothing(
    tmp_path: Path, recipes: list[Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    draw(tmp_path)
    before = times(tmp_path / "data")

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("drawn again")

    monkeypatch.setattr(creatures, "write", refuse)
    draw(tmp_path, threads=2)
    assert times(tmp_path / "data") == before
    assert len(recipes) == 2


def test_other_numbers_are_drawn_anew(tmp_path: Path, recipes: list[Recipe]) -> None:
    draw(tmp_path / "one", images=4)
    draw(tmp_path / "one", images=2)
    draw(tmp_path / "two", images=2)
    assert digests(tmp_path / "one" / "data") == digests(tmp_path / "two" / "data")


def test_a_stopped_drawing_is_drawn_anew(
    tmp_path: Path, recipes: list[Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(folder: Path, **_: object) -> None:
        (folder / "images").mkdir(parents=True)
        (folder / "images" / "9999.png").write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(creatures, "write", stop)
        with pytest.raises(KeyboardInterrupt):
            draw(tmp_path / "one")
    draw(tmp_path / "one")
    draw(tmp_path / "two")
    assert digests(tmp_path / "one" / "data") == digests(tmp_path / "two" / "data")


def test_files_of_somebody_else_are_left_alone(tmp_path: Path, recipes: list[Recipe]) -> None:
    (tmp_path / "data").mkdir()
    labels = tmp_path / "data" / "labels.csv"
    labels.write_text("mine")
    with pytest.raises(DataError, match=r"data holds files that the demo did not .*--folder"):
        draw(tmp_path)
    assert labels.read_text() == "mine"
    assert recipes == []


def test_a_folder_in_use_is_not_drawn_into(tmp_path: Path, recipes: list[Recipe]) -> None:
    with locked(tmp_path), pytest.raises(ArtefactError, match="another run"):
        draw(tmp_path)
    assert not (tmp_path / "data").exists()


def test_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small, but with all eight classes, every stage and the bundled weights."""
    drawn: list[tuple[str, SheetRow]] = []

    def draw_sheet(rows: list[SheetRow], *, map_title: str) -> bytes:
        drawn.extend((map_title, row) for row in rows)
        return sheet(rows, map_title=map_title)

    monkeypatch.setattr(evaluate, "sheet", draw_sheet)
    result = demo(tmp_path, 1, "lpcam demo", images=48, size=64)
    assert {(row["method"], row["threshold_source"]) for row in result.rows} == {
        (method, source)
        for method in ("CAM", "LPCAM-F", "LPCAM", "LPCAM-E")
        for source in ("ground truth", "automatic")
    }
    for row in result.rows:
        assert row["images"] == 48
        assert set(row["part_coverage"]) == set(creatures.PARTS)
    assert (tmp_path / "metrics.json").is_file()
    assert (tmp_path / "sheet.png").is_file()
    title, row = drawn[0]
    first = next(p for p in sorted((tmp_path / "lpcam_e").iterdir()) if 0 in read_maps(p).keys)
    assert (title, row.name) == ("LPCAM-E", creatures.CLASSES[0])
    assert np.array_equal(row.lpcam, read_maps(first).high_res[0])
    before = times(tmp_path)
    again = demo(tmp_path, 1, "lpcam demo", images=48, size=64)
    assert again.rows == result.rows
    assert times(tmp_path) == before
