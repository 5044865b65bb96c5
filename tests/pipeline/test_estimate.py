"""Time and disk of a run: what is counted, and how it grows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from tiny import draw_folder

from lpcam.data.dataset import Dataset
from lpcam.data.folder import read_folder
from lpcam.data.survey import Estimate
from lpcam.data.validation import check_images
from lpcam.pipeline import estimate
from lpcam.pipeline.estimate import estimate_run, usual_recipe
from lpcam.pipeline.recipe import Recipe, parse_recipe
from lpcam.pipeline.run import run

RECIPE = usual_recipe("test_resnet")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> tuple[Dataset, dict[str, tuple[int, int]]]:
    root = draw_folder(tmp_path_factory.mktemp("drawn"), count=12)
    dataset, records = check_images(read_folder(root))
    ids = list(dataset.items)
    lists = {"all": tuple(ids), "half": tuple(ids[4:8]), "bare": ("i03",), "none": ()}
    sizes = {name: (r["height"], r["width"]) for name, r in records.items()}
    return replace(dataset, lists=lists), sizes


def test_seconds_and_bytes_grow_with_pixels_and_labels(
    drawn: tuple[Dataset, dict[str, tuple[int, int]]],
) -> None:
    dataset, sizes = drawn
    result = estimate_run(dataset, sizes, RECIPE)
    assert result.timed == 10  # 11 have labels, one of them warms up
    assert result.disk["bare"] == result.disk["none"] == result.seconds["bare"] == 0
    assert 0 < result.seconds["half"] <= result.seconds["all"]

    def planes(name: str) -> int:
        items = [dataset.items[i] for i in dataset.lists[name]]
        return sum(sizes[i.id][0] * sizes[i.id][1] * len(i.labels) for i in items)

    ratio = result.disk["half"] / result.disk["all"]
    assert ratio == pytest.approx(planes("half") / planes("all"), rel=1e-3)
    assert result.repeated == ()


def test_disk_is_near_that_of_a_run(
    drawn: tuple[Dataset, dict[str, tuple[int, int]]], tmp_path: Path, weights: Path
) -> None:
    dataset, sizes = drawn
    root = next(iter(dataset.items.values())).image.parents[1]
    values = {
        **RECIPE.model_dump(mode="json", by_alias=True),
        "data": {"kind": "folder", "root": str(root)},
        "classifier": {
            "backbone": "test_resnet",
            "output_stride": 16,
            "weights": str(weights),
            "method": "probe",
        },
        "run": {"folder": str(tmp_path / "run"), "threads": 1, "device": "cpu"},
    }
    recipe: Recipe = parse_recipe(values, where="a test")
    result = estimate_run(dataset, sizes, recipe)
    run(recipe, until="seeds")
    written = sum(
        path.stat().st_size
        for folder in ("cam", "lpcam", "lpcam_f", "seeds")
        for path in (tmp_path / "run" / folder).rglob("i*")
    )
    assert result.disk["all"] == pytest.approx(written, rel=0.5)


def of_memory(drawn: tuple[Dataset, dict[str, tuple[int, int]]], memory: int) -> Estimate:
    return estimate_run(*drawn, RECIPE, memory=memory)


def test_features_that_do_not_fit_are_counted_again(
    drawn: tuple[Dataset, dict[str, tuple[int, int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    # a clock that goes on by a second at each look makes the times exact
    ticks = iter(range(10**6))
    monkeypatch.setattr(estimate.time, "perf_counter", lambda: float(next(ticks)))
    monkeypatch.setattr(estimate, "TIMED_SECONDS", 1e9)
    plenty, none = of_memory(drawn, 10**12), of_memory(drawn, 0)
    assert plenty.repeated == ()
    assert none.repeated == ("all", "half")
    timed, (share, whole) = plenty.timed, (plenty.seconds["all"], none.seconds["all"])
    assert timed == none.timed
    # three passes of CAM, LPCAM and, at one scale of three, the classifier, instead of one
    again = 2 + 1 / (1 + 0.25 + 2.25)
    making = (whole - again * share) / (1 - again)
    assert 0 < making < share < whole < again * share
