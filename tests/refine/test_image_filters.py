"""What the dense CRF promises: batches, threads, precision, thin images, bad input."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lpcam.refine.crf import CrfSettings, DenseCrf
from lpcam.runtime.errors import DataError

refined = DenseCrf(CrfSettings.from_preset("psa")).refine_probabilities


def drawn(*size: int, count: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    """An image (H, W, 3) and scores (count, H, W) that sum to one."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand((1, 3, 3, 4), generator=generator) * 255
    smooth = torch.nn.functional.interpolate(coarse, size, mode="bilinear")[0]
    noisy = smooth + torch.randn((3, *size), generator=generator) * 6
    image = noisy.clamp(0, 255).to(torch.uint8).permute(1, 2, 0).contiguous()
    return image, (torch.rand((count, *size), generator=generator) * 4).softmax(0)


def test_scores_of_a_pixel_still_sum_to_one() -> None:
    for size in ((20, 24), (1, 17), (17, 1), (1, 1), (2, 2)):
        found = refined(*drawn(*size))
        torch.testing.assert_close(found.sum(0), torch.ones(size), atol=1e-5, rtol=0)
        assert float(found.min()) >= 0


def test_leading_axes_share_the_image() -> None:
    image, scores = drawn(10, 12)
    batch = torch.stack([scores, scores.flip(-1)])[None]
    expected = torch.stack([refined(image, each) for each in batch[0]])[None]
    torch.testing.assert_close(refined(image, batch), expected, atol=1e-5, rtol=0)


def test_same_bytes_with_other_threads() -> None:
    given = drawn(90, 120)
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 1):
            torch.set_num_threads(count)
            found.append(refined(*given))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtype_is_kept(dtype: torch.dtype) -> None:
    image, scores = drawn(8, 9)
    found = refined(image, scores.to(dtype))
    assert found.dtype is dtype
    torch.testing.assert_close(found.float(), refined(image, scores), atol=0.05, rtol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_gpu() -> None:
    image, scores = drawn(60, 80)
    found = refined(image.cuda(), scores.cuda())
    assert found.device.type == "cuda"
    torch.testing.assert_close(found.cpu(), refined(image, scores), atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("image", "scores", "message"),
    [
        (torch.zeros(4, 5, 3), torch.zeros(2, 4, 5), "float32"),
        (torch.zeros(3, 4, 5).byte(), torch.zeros(2, 4, 5), "uint8"),
        (torch.zeros(4, 5, 3).byte(), torch.zeros(2, 5, 4), r"\(2, 5, 4\)"),
        (torch.zeros(4, 5, 3).byte(), torch.zeros(2, 4, 5).long(), "int64"),
        (torch.zeros(4, 5, 3).byte(), torch.full((2, 4, 5), math.nan), "(?i)nan"),
    ],
)
def test_bad_input(image: Tensor, scores: Tensor, message: str) -> None:
    with pytest.raises(DataError, match=message):
        refined(image, scores)
