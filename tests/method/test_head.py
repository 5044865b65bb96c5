"""The head of LPCAM: logits and maps of a feature map."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

from lpcam.method.functional import foreground_minus_context
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
