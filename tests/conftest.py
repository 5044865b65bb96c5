"""Fixtures that the tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny import BACKBONE, COLOURS, draw_folder, write_weights

from lpcam.classifier import BackboneSpec, Classifier, build


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Equal bytes and no fight over processors."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def threads_again() -> Iterator[None]:
    """Whatever number a test has set."""
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real photographs and weights, which are not part of the project."""
    default = Path(__file__).parents[2] / "shared"
    folder = Path(os.environ.get("LPCAM_SHARED", default))
    if not (folder / "data" / "voc_animals").is_dir():
        pytest.skip(f"no photographs in {folder}; set LPCAM_SHARED to the folder that holds data/")
    return folder


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of the tiny backbone, as a safetensors file."""
    return write_weights(tmp_path_factory.mktemp("weights") / "tiny.safetensors")


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny data set as a user's folder; not to be changed by a test."""
    return draw_folder(tmp_path_factory.mktemp("data") / "boxes")


@pytest.fixture
def classifier(weights: Path) -> Classifier:
    """An untrained classifier of the tiny data set's classes."""
    return build(BackboneSpec(BACKBONE, {}, 16), tuple(COLOURS), weights=weights)
