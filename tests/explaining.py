"""A tiny finished run, what explains images with it, and the data of its reports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import draw_folder, recipe_values, write_weights

from lpcam.pipeline.recipe import parse_recipe
from lpcam.pipeline.run import run
from lpcam.report.page import render


def tiny_run(folder: Path) -> Path:
    """A run on coloured boxes that has reached its prototypes, in ``folder/run``."""
    data = draw_folder(folder / "boxes")
    weights = write_weights(folder / "tiny.safetensors")
    values = recipe_values(data, folder / "run", weights)
    run(parse_recipe(values, where="tiny"), until="prototypes")
    return folder / "run"


@pytest.fixture(name="collected")
def collected_pages(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The data of every report's page that is made."""
    made = []

    def note(data: Any) -> str:
        made.append(json.loads(json.dumps(data)))
        return render(data)

    monkeypatch.setattr("lpcam.pipeline.stages.report.render", note)
    return made
