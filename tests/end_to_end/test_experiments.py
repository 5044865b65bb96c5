"""The bundled experiments at their smallest size, on drawings."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from lpcam.cli.main import main
from lpcam.pipeline.experiments.definition import bundled_experiments, load_experiment
from lpcam.runtime.files import read_json

TINY = [name for name in bundled_experiments() if "tiny" in load_experiment(name).sizes]
EXTRAS = {"upernet": "transformers"}
"""Words of an experiment that show that it needs a module."""


@pytest.mark.parametrize("name", TINY)
def test_tiny(name: str, tmp_path: Path) -> None:
    """Every arm has a scored row, and every comparison is of rows that exist."""
    experiment = load_experiment(name)
    arms = list(experiment.all_arms("tiny"))
    for word, module in EXTRAS.items():
        if word in str(arms) and find_spec(module) is None:
            pytest.skip(f"needs {module}")
    folder = tmp_path / "experiment"
    given = ["--size", "tiny", "--folder", str(folder), "--run.threads", "1"]
    assert main(["experiment", name, *given]) == 0
    results = read_json(folder / "results.json")
    assert not results["failed"]
    assert {row["arm"] for row in results["rows"]} == {arm.name for arm in arms}
    methods = {row["method"] for row in results["rows"]}
    compared = {row["method"] for row in results["rows"] if row["against"] is not None}
    assert {one for one in experiment.against if one in methods} <= compared
    assert not any(row["published"] for row in results["rows"])  # the paper has no drawings
    assert (folder / "report.html").is_file()
