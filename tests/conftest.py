"""Fixtures that the tests share."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import BACKBONE, COLOURS, draw_folder, write_weights

from lpcam.classifiers.classifier import BackboneSpec, Classifier, build


def start_process_state() -> None:
    """Same random numbers and settings for every test, whichever tests ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    torch.set_num_threads(1)  # equal bytes, and workers do not compete for the processors
    torch.set_default_dtype(torch.float32)
    torch.set_grad_enabled(True)
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = False
    torch.backends.cudnn.benchmark = False


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[Any]) -> Iterator[None]:
    """Fixtures that several tests share do not depend on which of them comes first."""
    if fixturedef.scope != "function":
        start_process_state()
    return (yield)


@pytest.fixture(autouse=True)
def process_state() -> Iterator[None]:
    """Starts every test alike and restores the environment and working directory after it."""
    start_process_state()
    environment, folder = dict(os.environ), Path.cwd()
    yield
    os.chdir(folder)
    now = os.environ.get("PYTEST_CURRENT_TEST")
    os.environ.clear()
    os.environ.update(environment)
    if now is not None:
        os.environ["PYTEST_CURRENT_TEST"] = now
    start_process_state()


@pytest.fixture(autouse=True)
def weights_can_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights to download count as cached, so that no test asks a network for them."""
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: "model.safetensors")


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
