"""The versions that every artefact records."""

from __future__ import annotations

import platform
import tomllib
from importlib import metadata
from pathlib import Path

import numpy as np
import torch

import lpcam
from lpcam.runtime.versions import __version__, versions


def test_versions_are_those_of_what_runs() -> None:
    found = versions()
    assert found["lpcam"] == __version__ == lpcam.__version__
    assert found["python"] == platform.python_version()
    assert found["numpy"] == np.__version__
    assert torch.__version__.startswith(found["torch"].split("+")[0])
    assert list(found) == ["lpcam", "python", "torch", "torchvision", "timm", "numpy", "pillow"]
    assert all(isinstance(value, str) and value for value in found.values())


def test_the_package_and_the_change_log_have_the_same_version() -> None:
    root = Path(__file__).parents[2]
    project = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))
    assert (
        project["tool"]["setuptools"]["dynamic"]["version"]["attr"]
        == "lpcam.runtime.versions.__version__"
    )
    assert f"\n## {__version__}" in (root / "CHANGELOG.md").read_text("utf-8")
    assert metadata.version("lpcam") == __version__
