"""The head of LPCAM: logits and maps of a feature map."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from lpcam.classifiers.features import FeaturePair
from lpcam.method.early import EarlyPrototypes
from lpcam.method.functional import (
    class_activation,
    foreground_minus_context,
    normalize,
    unit,
)
from lpcam.method.head import LPCAMHead


def small_head(**options: Any) -> LPCAMHead:
    weight = torch.tensor([[1.0, 2.0], [0.0, -1.0]])
    vectors = torch.tensor([[0.6, 0.8], [-1.0, 0.0]])
    return LPCAMHead(weight, vectors, torch.tensor([0.5, 0.0]), **options)


def test_logits_and_cosines_by_hand() -> None:
    features = torch.tensor([[[[3.0, 0.0]], [[4.0, 2.0]]]])  # (3, 4) and (0, 2)
    logits, maps = small_head(normalize=None)(features)
    assert logits.tolist() == [[1.5 + 2 * 3 + 0.5, -3.0]]
    # unit vectors (0.6, 0.8) and (0, 1)
    torch.testing.assert_close(maps, torch.tensor([[[[1.0, 0.8]], [[0.0, 0.0]]]]))
    again = small_head(normalize=None)(7 * features)[1]
    torch.testing.assert_close(again, maps)  # the length of a feature does not count


def test_maps_are_divided_by_their_maximum_and_zero_stays_zero() -> None:
    features = torch.tensor([[[[0.0, -1.0]], [[2.0, 0.0]]], [[[0.0, 0.0]], [[0.0, 0.0]]]])
    _, maps = small_head()(features)
    assert maps[0].tolist() == [[[1.0, 0.0]], [[0.0, 1.0]]]
    assert not maps[1].any()  # features of zero have no direction


def test_the_head_of_prototypes_is_equation_six() -> None:
    generator = torch.Generator().manual_seed(0)
    foreground, context = (torch.randn(k, 5, generator=generator) for k in (3, 2))
    features = torch.randn(2, 5, 3, 4, generator=generator)
    vector = foreground_minus_context(foreground, context)[None]
    _, maps = LPCAMHead(torch.zeros(1, 5), vector, normalize=None)(features)
    cosine = nn.functional.cosine_similarity
    rows = features[:, None], foreground[None, :, :, None, None], context[None, :, :, None, None]
    expected = cosine(rows[0], rows[1], dim=2).mean(1) - cosine(rows[0], rows[2], dim=2).mean(1)
    torch.testing.assert_close(maps[:, 0], expected.relu())


def test_wrong_shapes_are_refused() -> None:
    for shapes in (((2, 3), (2, 4)), ((2, 3), (2, 3), (3,))):
        with pytest.raises(ValueError, match=re.escape(str(shapes[-1]))):
            LPCAMHead(*map(torch.zeros, shapes))
    with pytest.raises(ValueError, match="'range'"):
        small_head(normalize="range")
    with pytest.raises(ValueError, match="3, 4, 4"):
        small_head()(torch.zeros(1, 3, 4, 4))


def test_half_precision_does_not_overflow() -> None:
    features = torch.tensor([[[[3000.0, 300.0]], [[4000.0, 0.0]]]])  # their squares would
    expected = small_head()(features)[1]
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        logits, maps = small_head().to(dtype)(features.to(dtype))
        assert logits.dtype == maps.dtype == dtype
        torch.testing.assert_close(maps.float(), expected, atol=0.01, rtol=0)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(small_head()(features)[1].float(), expected, atol=0.01, rtol=0)


def early_of(model_layers: int, classes: int, **values: Any) -> EarlyPrototypes:
    """Random unit centres; the last of each class is missing."""
    generator = torch.Generator().manual_seed(0)
    sides = [
        tuple(unit(torch.randn(classes, 4, 3, generator=generator), 2) for _ in range(model_layers))
        for _ in range(2)
    ]
    for side in (*sides[0], *sides[1]):
        side[:, -1] = 0
    means = tuple(torch.randn(3, generator=generator) for _ in range(model_layers))
    names = tuple(map(str, range(classes))), tuple(f"layer{n}" for n in range(model_layers))
    return replace(EarlyPrototypes(*names, means, *sides, nearest=2), **values)


@pytest.mark.parametrize("fusion", ["none", "fused", "alone"])
@pytest.mark.parametrize("base", ["CAM", "LPCAM"])
def test_the_head_of_early_layers_gives_their_maps(base: str, fusion: str) -> None:
    early = early_of(2, 2, base=base, fusion=fusion)
    generator = torch.Generator().manual_seed(1)
    features = torch.rand(3, 2, 2, 3, generator=generator)
    layers = [torch.randn(3, 3, *size, generator=generator) for size in ((6, 9), (3, 5))]
    for size in ((30, 40), None):
        logits, maps = small_head(early=early)(features, size, layers=layers)
        assert torch.equal(logits, small_head()(features)[0])
        to = size or (6, 9)  # the grid of the first early layer
        if base == "CAM":
            start = class_activation(features, small_head().weight).relu()
            whole = (32, 48) if size else to
            start = nn.functional.interpolate(start, whole, mode="bilinear")
            start = normalize(start[..., : to[0], : to[1]])
        elif size is None:
            start = nn.functional.interpolate(
                small_head(normalize=None)(features)[1], to, mode="bilinear"
            )
            start = normalize(start)
        else:
            start = small_head()(features, size)[1]
        for place in range(3):
            pairs = [FeaturePair(layer[place], None) for layer in layers]
            expected = early.maps(start[place], pairs, [0, 1])
            torch.testing.assert_close(maps[place], expected, atol=1e-6, rtol=0)


def test_the_head_of_early_layers_moves_with_its_tensors() -> None:
    early = early_of(1, 2, fusion="alone")
    head, layers = small_head(early=early), [torch.randn(1, 3, 4, 4)]
    state = head.state_dict()
    assert {"early_mean_0", "early_foreground_0", "early_context_0"} < state.keys()
    with torch.no_grad():
        head.early_foreground_0.copy_(early.context[0])
    changed = replace(early, foreground=early.context)
    features = torch.rand(1, 2, 2, 2)
    expected = small_head(early=changed)(features, layers=layers)[1]
    assert torch.equal(head(features, layers=layers)[1], expected)
    half = head.bfloat16()(features.bfloat16(), layers=[one.bfloat16() for one in layers])[1]
    torch.testing.assert_close(half.float(), expected, atol=0.1, rtol=0)
    with pytest.raises(ValueError, match="normalize"):
        small_head(early=early, normalize=None)
