"""A finished run on coloured boxes, and what explains images with it."""

from __future__ import annotations

from pathlib import Path

import pytest
from explaining import tiny_run

from lpcam.explain.explainer import Explainer
from lpcam.pipeline.run_folder import RunFolder


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run(tmp_path_factory.mktemp("explain"))


@pytest.fixture(scope="session")
def explainer(run: Path) -> Explainer:
    return RunFolder(run).explainer(device="cpu")
