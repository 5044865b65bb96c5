"""Timm models with the head that they were trained with."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from tiny import BACKBONE

from lpcam.errors import ClassifierError
from lpcam.models import timm_classifier


def file_of(name: str, folder: Path, **options: object) -> tuple[torch.nn.Module, Path]:
    torch.manual_seed(0)
    model = timm.create_model(name, **options)
    save_file(model.state_dict(), folder / f"{name}.safetensors")
    return model.eval(), folder / f"{name}.safetensors"


@pytest.mark.parametrize("name", [BACKBONE, "test_efficientnet", "test_byobnet"])
def test_logits_are_the_models_own(name: str, tmp_path: Path) -> None:
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


def test_names_are_those_of_imagenet_and_each_another(tmp_path: Path) -> None:
    _, path = file_of(BACKBONE, tmp_path)
    names = timm_classifier(BACKBONE, weights=path).classes
    assert names[0] == "tench"
    assert names[134] == "crane (134)"
    assert len(set(names)) == 1000


def test_names_of_another_head(tmp_path: Path) -> None:
    _, path = file_of(BACKBONE, tmp_path, num_classes=3)
    three = {"num_classes": 3}
    assert timm_classifier(BACKBONE, weights=path, arguments=three).classes == (
        "class 0",
        "class 1",
        "class 2",
    )
    named = timm_classifier(BACKBONE, weights=path, arguments=three, classes=["a", "b", "c"])
    assert named.classes == ("a", "b", "c")
    with pytest.raises(ClassifierError, match="has 3 classes, but 2 names were given"):
        timm_classifier(BACKBONE, weights=path, arguments=three, classes=["a", "b"])


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("test_convnext", r"on the mean of its feature map gives logits that differ by 0\.\d+"),
        ("test_mambaout", r"feature map has 64 channels and its head takes 256, so something"),
    ],
)
def test_heads_that_are_not_linear_on_the_mean(name: str, found: str, tmp_path: Path) -> None:
    _, path = file_of(name, tmp_path)
    with pytest.raises(ClassifierError, match=f"{found}.*or train a linear head on this backbone"):
        timm_classifier(name, weights=path)


def test_a_model_without_a_head(tmp_path: Path) -> None:
    _, path = file_of(BACKBONE, tmp_path, num_classes=0)
    with pytest.raises(ClassifierError, match="its head is Identity, not one linear layer"):
        timm_classifier(BACKBONE, weights=path, arguments={"num_classes": 0})


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(ClassifierError, match=r"none\.safetensors' cannot be used for"):
        timm_classifier(BACKBONE, weights=tmp_path / "none.safetensors")
    _, path = file_of("test_efficientnet", tmp_path)
    with pytest.raises(ClassifierError, match="give a safetensors file of the whole model"):
        timm_classifier(BACKBONE, weights=path)
    with pytest.raises(ClassifierError, match="timm has no model 'resnet5O'; near it are"):
        timm_classifier("resnet5O")
    with pytest.raises(ClassifierError, match="timm could not make 'test_resnet'"):
        timm_classifier(BACKBONE, weights=path, arguments={"wheels": 3})
