"""A person corrects prototypes in the report of steel defects, and the run follows."""

from __future__ import annotations

import csv
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from browsing import chromium, watched  # noqa: F401 - the fixture "browser"

from lpcam.pipeline.recipe import load_recipe
from lpcam.pipeline.run import run
from lpcam.pipeline.run_folder import RunFolder
from lpcam.runtime.files import read_json

EACH = 12  #: Images of each kind of defect.


@pytest.fixture(scope="module")
def finished(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run on a few images of each defect, with its report."""
    steel, weights = shared / "data/steel", shared / "weights/mobilenetv2_100_imagenet.safetensors"
    if not steel.is_dir() or not weights.is_file():
        pytest.skip("the photographs of steel or the weights are not there")
    here = tmp_path_factory.mktemp("steel")
    rows = list(csv.DictReader((steel / "labels.csv").read_text().splitlines()))
    of_class = defaultdict(list)
    for row in rows:
        if ";" not in row["labels"] and row["labels"]:
            of_class[row["labels"]].append(row)
    (here / "data/images").mkdir(parents=True)
    lines = ["image,labels"]
    for row in (row for some in of_class.values() for row in some[:EACH]):
        shutil.copy(steel / "images" / row["image"], here / "data/images" / row["image"])
        lines.append(f"{row['image']},{row['labels']}")
    (here / "data/labels.csv").write_text("\n".join(lines) + "\n")
    section = load_recipe("voc_animals").classifier
    own = ("backbone", "arguments", "output_stride", "mean", "std")
    changes: dict[str, Any] = {f"classifier.{name}": getattr(section, name) for name in own}
    changes |= {
        "data.root": str(here / "data"),
        "name": "steel",
        "run.folder": str(here / "run"),
        "classifier.weights": str(weights),
        "classifier.probe": {"preset": "default"},
        "lpcam": {"preset": "frozen", "scales": [1.0], "flip": False, "clusters": 4, "restarts": 1},
        "report.images": 36,
    }
    run(load_recipe("demo", changes))
    return RunFolder(here / "run")


def test_what_a_person_says_in_the_report_changes_the_maps(
    finished: RunFolder, browser: Any, tmp_path: Path
) -> None:
    before = {path.name: path.read_bytes() for path in sorted((finished / "lpcam").glob("*.npz"))}
    complaints: list[str] = []
    page = watched(browser, (finished.report.as_uri(), "data:"), complaints)
    page.goto(finished.report.as_uri())
    first = page.wait_for_selector('select[aria-label^="Choice about foreground prototype"]')
    label = first.get_attribute("aria-label")
    first.select_option("context")
    with page.expect_download() as waiting:
        page.click("#save-choices")
    waiting.value.save_as(tmp_path / "prototypes.yaml")
    assert not complaints
    recipe = load_recipe(finished.recipe, {"lpcam.choices": str(tmp_path / "prototypes.yaml")})
    run(recipe, until="evaluate")
    (choice,) = read_json(finished.metrics)["protocol"]["prototype_choices"]
    assert (choice["action"], choice["by"]) == ("context", "person")
    assert f"no. {choice['index']} of {choice['class']}" in label
    records = finished.load_recipe().data.root
    table = csv.DictReader((Path(records) / "labels.csv").read_text().splitlines())
    labels = {Path(row["image"]).stem: row["labels"] for row in table}
    after = {path.name: path.read_bytes() for path in sorted((finished / "lpcam").glob("*.npz"))}
    assert before.keys() == after.keys()
    changed = {name for name in before if before[name] != after[name]}
    of_class = {f"{image}.npz" for image, given in labels.items() if given == choice["class"]}
    assert changed and changed <= of_class
