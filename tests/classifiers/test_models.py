"""Timm models with the head that they were trained with."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from tiny import BACKBONE

from lpcam.classifiers.classifier import timm_classifier
from lpcam.runtime.errors import ClassifierError


def file_of(name: str, folder: Path) -> tuple[torch.nn.Module, Path]:
    torch.manual_seed(0)
    model = timm.create_model(name)
    save_file(model.state_dict(), folder / f"{name}.safetensors")
    return model.eval(), folder / f"{name}.safetensors"


@pytest.mark.parametrize("name", [BACKBONE, "test_efficientnet", "test_byobnet"])
def test_logits_and_names_are_the_models_own(name: str, tmp_path: Path) -> None:
    model, path = file_of(name, tmp_path)
    before = torch.get_rng_state()
    classifier = timm_classifier(name, weights=path)
    assert torch.equal(torch.get_rng_state(), before)
    image = torch.randn(2, 3, 70, 90, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(classifier(image), model(image), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(classifier.folded()(image), model(image), rtol=1e-3, atol=1e-3)
    # weight and bias, once
    assert sum(len(value) == 1000 for value in classifier.state_dict().values() if value.ndim) == 2
    assert timm_classifier(name, weights=path).fingerprint() == classifier.fingerprint()
    assert (classifier.classes[0], classifier.classes[134]) == ("tench", "crane (134)")
    assert len(set(classifier.classes)) == 1000


@pytest.mark.parametrize("name", ["test_convnext", "test_mambaout"])
def test_heads_that_are_not_linear_on_the_mean(name: str, tmp_path: Path) -> None:
    _, path = file_of(name, tmp_path)
    with pytest.raises(ClassifierError, match=rf"'{name}' .* linear"):
        timm_classifier(name, weights=path)
