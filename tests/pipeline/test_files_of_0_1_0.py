"""Files that version 0.1.0 wrote are read: a run folder, a saved LPCAM, and a folder for the hub.

The run is of tiny drawings, with a backbone of 3,660 weights. Its data set and weights are not
stored; the sums of maps were printed by version 0.1.0.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from lpcam import LPCAM
from lpcam.classifiers.classifier import Classifier
from lpcam.formats.models.lpcam_model import LPCAMModel
from lpcam.pipeline.run_folder import RunFolder

OLD = Path(__file__).parents[1] / "data_0_1_0"
RUN = RunFolder(OLD / "run")
IMAGE = np.random.default_rng(0).integers(0, 256, (64, 80, 3), dtype=np.uint8)


def test_a_run_folder() -> None:
    recipe = RUN.load_recipe()
    assert recipe.name == "tiny" and recipe.lpcam.clusters == 2 and recipe.lpcam.mu_f == 0.5
    explainer = RUN.explainer(device="cpu")
    assert explainer.mask_ids == (1, 2, 3)
    found = explainer(IMAGE, labels=["red", "green"])
    assert found.lpcam.sum(axis=(1, 2)) == pytest.approx([4470.59, 4121.91], rel=1e-3)
    assert found.cam.sum(axis=(1, 2)) == pytest.approx([1743.02, 1723.86], rel=1e-3)


def test_a_saved_lpcam() -> None:
    classifier = Classifier.load(RUN.classifier)
    lpcam = LPCAM(classifier).load(OLD / "lpcam.safetensors")
    images = classifier.preprocessing(IMAGE)[None]
    found = lpcam(images).sum((0, 2, 3)).tolist()
    assert found == pytest.approx([0.0, 3919.0, 4261.35], rel=1e-3)


def test_a_folder_of_a_model_hub() -> None:
    model = LPCAMModel.from_pretrained(OLD / "hub")
    assert model.preprocessing is not None
    with torch.no_grad():
        logits, maps = model(model.preprocessing(IMAGE)[None])
    assert logits[0].tolist() == pytest.approx([-1.1445, 0.1465, 0.4708], abs=1e-3)
    assert maps.sum((0, 2, 3)).tolist() == pytest.approx([0.0, 3484.92, 3645.97], rel=1e-3)
