"""Models that others have trained, with their own head, as classifiers of this package."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import timm
import torch
from torch import nn

from lpcam.classifier import PRETRAINED, PROBE_SIZE, Classifier, Preprocessing, check_backbone
from lpcam.errors import ClassifierError
from lpcam.finder import class_names

TOLERANCE = 1e-4
"""Largest difference, as a share of the largest logit, that counts as rounding."""


def timm_classifier(
    name: str,
    *,
    weights: str | Path = PRETRAINED,
    classes: Sequence[str] | None = None,
    arguments: Mapping[str, Any] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Classifier:
    """A timm model with the head that it was trained with.

    Its head must be linear in the mean of its feature map, which is tried: head and mean must give
    the model's own logits. A bias of the head counts in the scores; no class map has one (eq. 1).

    Args:
        name: of the model in timm.
        weights: ``"pretrained"`` (timm's, over the network on first use) or a safetensors file of
            the whole model.
        classes: N names; default: those of ImageNet where the model has its classes, else numbers.
        arguments: further ones of ``timm.create_model``.
        mean, std: of RGB in [0, 1]; default: those of timm's pretrained cfg.

    Returns:
        a classifier that cannot be saved (its prototypes can).

    Raises:
        ClassifierError: if timm does not know the name, the weights cannot be had or do not fit,
            or the head is none of that kind; the message says what was found.
    """
    with torch.random.fork_rng(devices=[]):  # the first weights are random, and replaced
        model = _model(name, weights, dict(arguments or {}))
        head = model.get_classifier()
        if not isinstance(head, nn.Linear):
            raise _no_linear_head(name, f"its head is {type(head).__name__}, not one linear layer")
        config: Mapping[str, Any] = getattr(model, "pretrained_cfg", None) or {}
        classifier = Classifier(
            model,
            class_names(model, head.out_features) if classes is None else classes,
            Preprocessing(
                tuple(mean if mean is not None else config.get("mean", (0.485, 0.456, 0.406))),
                tuple(std if std is not None else config.get("std", (0.229, 0.224, 0.225))),
            ),
        )
        _take_head(classifier, model, head, name)
    return classifier


def _model(name: str, weights: str | Path, arguments: dict[str, Any]) -> Any:
    """A timm model in evaluation mode."""
    check_backbone(name)
    pretrained = str(weights) == PRETRAINED
    try:
        model: Any = timm.create_model(name, pretrained=pretrained, **arguments)
    except Exception as error:  # whatever timm, torch or a hub client raises, one message serves
        raise ClassifierError(
            f"timm could not make {name!r}{' with its pretrained weights' if pretrained else ''}: "
            f"{error}. Without a network, give weights as the path of a safetensors file"
        ) from error
    if not pretrained:
        _load(model, Path(weights), name)
    return model.eval()


def _take_head(classifier: Classifier, model: Any, head: nn.Linear, name: str) -> None:
    """Move the head of a model to its classifier, if it is the linear one that is needed."""
    if head.out_features != len(classifier.classes):
        raise ClassifierError(
            f"{name!r} has {head.out_features} classes, but {len(classifier.classes)} names were "
            "given; give one name a class, in the order of its logits"
        )
    if head.in_features != classifier.head.in_features:
        raise _no_linear_head(
            name,
            f"its feature map has {classifier.head.in_features} channels and its head takes "
            f"{head.in_features}, so something lies between",
        )
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, 3, *PROBE_SIZE, generator=generator).to(head.weight)
    with torch.no_grad():
        expected = model(image)
        classifier.head = head
        difference = float((classifier(image) - expected).abs().max())
    largest = float(expected.abs().max())
    if not difference <= TOLERANCE * max(1.0, largest):  # of NaN every comparison is false
        raise _no_linear_head(
            name,
            f"its head on the mean of its feature map gives logits that differ by {difference:.3g} "
            f"from its own, which reach {largest:.3g}",
        )
    model.reset_classifier(0)  # else the head's weights would stand twice among its parameters


def _no_linear_head(name: str, found: str) -> ClassifierError:
    return ClassifierError(
        f"the head of {name!r} cannot serve as it is: {found}. CAM needs logits that are a linear "
        "layer on the mean of the feature map, as those of ResNet, RegNet, EfficientNet and "
        "MobileNetV2 are; or train a linear head on this backbone ('lpcam classify')"
    )


def _load(model: nn.Module, path: Path, name: str) -> None:
    try:
        state = safetensors.torch.load_file(path)
        model.load_state_dict(state, strict=True)
    except (safetensors.SafetensorError, OSError, RuntimeError) as error:
        raise ClassifierError(
            f"the weights {str(path)!r} cannot be used for {name!r}: "
            f"{' '.join(str(error).split()):.300}; give a safetensors file of the whole model, "
            f"its head included, or {PRETRAINED!r}"
        ) from error
