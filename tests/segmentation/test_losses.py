"""Losses of segmenters: sums and counts, sizes, parts of processes, batches without a label."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from lpcam.segmentation.losses import nearest, segmentation_loss


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def drawn_labels(*shape: int, values: tuple[int, ...] = (0, 1, 2, 255), seed: int = 0) -> Tensor:
    numbers = torch.randint(0, len(values), shape, generator=torch.Generator().manual_seed(seed))
    return torch.tensor(values)[numbers]


def by_pillow(labels: Tensor, size: tuple[int, int]) -> Tensor:
    image = Image.fromarray(labels.numpy().astype(np.uint8))
    resized = image.resize(size[::-1], Image.Resampling.NEAREST)
    return torch.from_numpy(np.array(resized).astype(np.int64))


def test_every_pair_of_lengths_picks_pillows_pixels() -> None:
    """Also where a centre falls between two pixels and rounding decides."""
    for length in [*range(1, 66, 3), 160, 225, 241, 255]:
        row = torch.arange(length)[None]
        for size in [*range(1, 130), 321]:
            assert torch.equal(nearest(length, size), by_pillow(row, (1, size))[0]), (length, size)


def loss_of(logits: Tensor, labels: Tensor, kind: str = "cross_entropy") -> Tensor:
    return segmentation_loss([(logits, 1.0)], labels, kind=kind, meet="full")  # type: ignore[arg-type]


def test_mean_and_balanced_means_by_hand() -> None:
    # three labels; the probability of the true one is 1/2 in the first pixel
    logits = torch.tensor([[2.0, 1.0, 1.0], [1.0, 2.0, 1.0], [1.0, 1.0, 6.0]]).log().T
    logits = logits[None, :, None]
    mean = loss_of(logits, torch.tensor([[[0, 2, 255]]]))
    assert mean.item() == pytest.approx((math.log(2) + math.log(4)) / 2)
    loss = loss_of(logits, torch.tensor([[[0, 1, 1]]]), "balanced")
    assert loss.item() == pytest.approx(math.log(2) + math.log(16) / 2)


@pytest.mark.parametrize("labels", [[0, 255, 255], [255, 2, 1]])
def test_a_part_without_pixels_adds_nothing(labels: list[int]) -> None:
    logits, truth = drawn(1, 3, 1, 3), torch.tensor([[labels]])
    both = [loss_of(logits, truth, kind) for kind in ("balanced", "cross_entropy")]
    torch.testing.assert_close(both[0], both[1])


def test_the_mean_is_torchs() -> None:
    logits, labels = drawn(3, 5, 9, 8), drawn_labels(3, 9, 8, values=(0, 1, 4, 255))
    expected = F.cross_entropy(logits, labels, ignore_index=255)
    torch.testing.assert_close(loss_of(logits, labels), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    logits, labels = drawn(1, 4, 6, 6).to(dtype), drawn_labels(1, 12, 12)
    for kind in ("cross_entropy", "balanced"):
        with torch.autocast("cpu", torch.bfloat16):
            found = segmentation_loss([(logits, 1.0)], labels, kind=kind, meet="full")
        expected = segmentation_loss([(logits.float(), 1.0)], labels, kind=kind, meet="full")
        assert found.dtype == torch.float32
        assert torch.equal(found, expected)


def test_double_precision_is_kept() -> None:
    logits, labels = drawn(1, 4, 6, 6).double().requires_grad_(), drawn_labels(1, 12, 12)
    for kind in ("cross_entropy", "balanced"):
        for meet in ("reduced", "full"):

            def loss(x: Tensor, kind: str = kind, meet: str = meet) -> Tensor:
                return segmentation_loss([(x, 0.4)], labels, kind=kind, meet=meet)

            assert loss(logits).dtype == torch.float64
            assert torch.autograd.gradcheck(loss, logits)


def test_reduced_losses_of_several_outputs_add_up() -> None:
    """DeepLabV2's four: each against Pillow's labels of its size (section 1)."""
    labels = drawn_labels(2, 65, 65)
    sides = (9, 5, 7, 9)
    outputs = [(drawn(2, 3, n, n, seed=k), 1.0) for k, n in enumerate(sides)]
    expected = torch.zeros(())
    for logits, _ in outputs:
        small = torch.stack([by_pillow(one, logits.shape[-2:]) for one in labels])
        expected = expected + F.cross_entropy(logits, small, ignore_index=255)
    found = segmentation_loss(outputs, labels, kind="cross_entropy", meet="reduced")
    torch.testing.assert_close(found, expected)


def test_full_losses_have_weights() -> None:
    """UperNet's two heads (section 3)."""
    labels = drawn_labels(2, 32, 40)
    main, auxiliary = drawn(2, 3, 8, 10), drawn(2, 3, 2, 3, seed=1)
    found = segmentation_loss(
        [(main, 1.0), (auxiliary, 0.4)], labels, kind="cross_entropy", meet="full"
    )
    large = [
        F.interpolate(x, size=(32, 40), mode="bilinear", align_corners=False)
        for x in (main, auxiliary)
    ]
    expected = [F.cross_entropy(x, labels, ignore_index=255) for x in large]
    torch.testing.assert_close(found, expected[0] + 0.4 * expected[1])


@pytest.mark.parametrize("kind", ["cross_entropy", "balanced"])
@pytest.mark.parametrize("meet", ["reduced", "full"])
def test_nothing_to_learn_gives_zero_with_a_gradient(kind: str, meet: str) -> None:
    logits = drawn(2, 3, 5, 5).requires_grad_()
    labels = torch.full((2, 17, 17), 255)
    loss = segmentation_loss([(logits, 1.0), (logits, 1.0)], labels, kind=kind, meet=meet)
    loss.backward()
    assert loss.item() == 0.0
    assert logits.grad is not None and torch.equal(logits.grad, torch.zeros_like(logits))


@pytest.mark.parametrize("kind", ["cross_entropy", "balanced"])
@pytest.mark.parametrize("meet", ["reduced", "full"])
def test_parts_of_two_processes_add_up_to_the_whole(kind: str, meet: str) -> None:
    labels = drawn_labels(4, 33, 33)
    labels[0] = 255  # the means of the parts are not the mean of all
    labels[1:, :20] = 255
    sizes = (5, 9)
    whole = [(drawn(4, 3, n, n, seed=n).requires_grad_(), 0.5 + k) for k, n in enumerate(sizes)]
    loss = segmentation_loss(whole, labels, kind=kind, meet=meet)
    expected = torch.autograd.grad(loss, [logits for logits, _ in whole])

    shares = [slice(0, 1), slice(1, 4)]
    counts: list[Tensor] = []
    for share in shares:
        outputs = [(logits[share], weight) for logits, weight in whole]
        segmentation_loss(
            outputs, labels[share], kind=kind, meet=meet, total=lambda x: counts.append(x) or x
        )
    assert len(counts) == 2, "one exchange for each process"
    parts = [
        segmentation_loss(
            [(logits[share], weight) for logits, weight in whole],
            labels[share],
            kind=kind,
            meet=meet,
            total=lambda _: counts[0] + counts[1],
        )
        for share in shares
    ]
    assert parts[0] == 0
    torch.testing.assert_close(parts[0] + parts[1], loss)
    found = torch.autograd.grad(parts[0] + parts[1], [logits for logits, _ in whole])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
