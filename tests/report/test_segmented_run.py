"""The report of a whole run with segmenters."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from explaining import collected_pages  # noqa: F401 - the fixture "collected"
from tiny import draw_folder, recipe_values

from lpcam.data.dataset import ClassTable
from lpcam.data.masks import read_index_mask, write_mask
from lpcam.pipeline.recipe import parse_recipe
from lpcam.pipeline.run import report, run
from lpcam.report.segmenters import image_miou

IRN = {"method": "irn", "irn": {"epochs": 1, "batch_size": 4, "crop": 64, "exponent": 4}}
SEGMENT = {
    "network": "deeplabv2",
    "backbone": "test_resnet",
    "weights": "random",
    "output_stride": 16,
    "validations": 2,
    "training": {"preset": "light", "iterations": 4, "batch_size": 4, "crop": 33},
}
Values = dict[str, Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, weights: Path) -> Path:
    """Of a run that ended with a report."""
    here = tmp_path_factory.mktemp("segmented")
    root = draw_folder(here / "boxes")
    values = recipe_values(root, here / "run", weights)
    values |= {"refine": IRN, "segment": SEGMENT, "report": {"images": 8, "searched": 4}}
    run(parse_recipe(values, where="tiny.yaml"), command="lpcam run tiny.yaml")
    return here / "run"


def test_the_page_shows_the_segmenters_of_the_run(folder: Path, collected: list[Any]) -> None:
    path = report(folder)
    (page,) = collected
    metrics = json.loads((folder / "metrics.json").read_text())
    given = page["segmenters"]
    assert [one["name"] for one in given["teachers"]] == ["cam", "lpcam"]
    assert [one["title"] for one in given["teachers"]] == ["CAM + IRN", "LPCAM + IRN"]
    assert all(one["images"] == 12 for one in given["teachers"])
    scored = [row for row in metrics["rows"] if row["stage"] == "segmentation"]
    assert [row["miou"] for row in given["rows"]] == [row["miou"] for row in scored]
    rows = [(row["teacher"], row["crf"]) for row in given["rows"]]
    assert rows == [(teacher, crf) for teacher in ("cam", "lpcam") for crf in (False, True)]
    assert given["history"] == metrics["segmenter_history"]
    titles = [one["title"] for one in page["networks"]]
    assert titles == ["IRN's network on CAM", "IRN's network on LPCAM"]
    # rows of the maps have thresholds, and are where they were
    assert {row["stage"] for row in page["rows"]} == {"seed", "pseudo"}
    names = [stage["name"] for stage in page["stages"]]
    at = names.index("pseudo")
    assert names[at : at + 4] == ["pseudo", "segment", "test", "evaluate"]
    text = path.read_text()
    assert 'id="segmenters"' in text and '<th scope="row">segment</th>' in text
    assert "scored on 12 images of the list <bdi>all</bdi>" in text


def test_its_images_show_the_masks_after_the_crf(
    folder: Path, collected: list[Any], tmp_path: Path
) -> None:
    shutil.copytree(folder, tmp_path / "run")
    for path in (tmp_path / "run" / "test").glob("*/*.png"):
        write_mask(path, np.full_like(read_index_mask(path), 2))  # those before it
    report(tmp_path / "run")
    given = collected[0]["segmenters"]
    assert len(given["images"]) == 8 and given["images_total"] == 12  # as many as in the viewer
    classes = ClassTable(("blue", "green", "red"), (1, 2, 3))
    for record in given["images"]:
        truth = read_index_mask(folder.parent / "boxes" / "masks" / f"{record['id']}.png")
        for name, score in record["miou"].items():
            mask = read_index_mask(folder / "test" / name / "crf" / f"{record['id']}.png")
            assert score == image_miou(mask, truth, classes)
            shown = [classes.mask_ids[index] for index in record["masks"][name]["classes"]]
            assert shown == [value for value in np.unique(mask) if value]


def test_the_images_leave_room_for_the_segmenters(
    folder: Path, collected: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    report(folder)
    (page,) = collected
    size = sum(len(json.dumps(one)) for one in page["images"])
    section = len(json.dumps({"segmenters": page["segmenters"]}))
    monkeypatch.setattr("lpcam.report.collect.MOST_BYTES", section + size)
    report(folder)
    monkeypatch.setattr("lpcam.report.collect.MOST_BYTES", section + size // 2)
    report(folder)
    counts = [len(one["images"]) for one in collected]
    assert counts == [8, 8, counts[2]] and 1 <= counts[2] <= 4
    assert [one["limited"] for one in collected] == [False, False, True]
