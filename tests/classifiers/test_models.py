"""Timm models with the head that they were trained with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from tiny import BACKBONE

from lpcam.classifiers.classifier import timm_classifier
from lpcam.runtime.errors import ClassifierError


def file_of(name: str, folder: Path, **options: object) -> tuple[torch.nn.Module, Path]:
    torch.manual_seed(0)
    model = timm.create_model(name, **options)
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


def test_names_of_another_head(tmp_path: Path) -> None:
    _, path = file_of(BACKBONE, tmp_path, num_classes=2)
    options: dict[str, Any] = {"weights": path, "arguments": {"num_classes": 2}}
    assert timm_classifier(BACKBONE, **options).classes == ("class 0", "class 1")
    assert timm_classifier(BACKBONE, **options, classes=["a", "b"]).classes == ("a", "b")
    with pytest.raises(ClassifierError, match="2 classes, but 1"):
        timm_classifier(BACKBONE, **options, classes=["a"])


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("test_convnext", {}), ("test_mambaout", {}), (BACKBONE, {"num_classes": 0})],
)
def test_heads_that_are_not_linear_on_the_mean(
    name: str, arguments: dict[str, Any], tmp_path: Path
) -> None:
    _, path = file_of(name, tmp_path, **arguments)
    with pytest.raises(ClassifierError, match=rf"'{name}' .* linear"):
        timm_classifier(name, weights=path, arguments=arguments)


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    _, path = file_of("test_efficientnet", tmp_path)
    with pytest.raises(ClassifierError, match=path.name):
        timm_classifier(BACKBONE, weights=path)
    with pytest.raises(ClassifierError, match="'resnet5O'"):
        timm_classifier("resnet5O")
