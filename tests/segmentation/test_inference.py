"""Probabilities of an image: scales, mirror images, fusion and the CRF, by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lpcam.classifiers.classifier import Preprocessing
from lpcam.data.dataset import ClassTable
from lpcam.runtime.errors import ClassifierError
from lpcam.segmentation import inference as predict
from lpcam.segmentation.inference import (
    label_mask,
    labels,
    make_crf,
    probabilities,
    refine,
    sides,
)
from lpcam.segmentation.settings import SegmentTestSettings

CLASSES = ClassTable(("red", "blue"), (3, 7))
WEIGHT = torch.tensor([[0.5, 0.25, -1.0], [2.0, 0.0, 0.0], [0.0, -1.0, 3.0]])
BIAS = torch.tensor([0.1, -0.2, 0.3])


class Linear(nn.Module):
    """Logits are linear in the mean colour of cells of ``stride`` pixels; a mirror is no matter."""

    preprocessing = Preprocessing((0.5, 0.4, 0.3), (0.2, 0.25, 0.5))
    classes = CLASSES
    device = torch.device("cpu")

    def __init__(self, stride: int = 1) -> None:
        super().__init__()
        self.stride = stride
        self.seen: list[tuple[int, ...]] = []
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        self.seen.append(tuple(images.shape))
        cells = F.avg_pool2d(images, self.stride, ceil_mode=True) if self.stride > 1 else images
        logits: Tensor = torch.einsum("lc,bchw->blhw", WEIGHT, cells)
        return logits + BIAS[:, None, None]


class Sided(Linear):
    """The column decides, so that a mirror image has other logits."""

    def forward(self, images: Tensor) -> Tensor:
        self.seen.append(tuple(images.shape))
        columns = torch.linspace(-1, 1, images.shape[-1]).expand(1, 1, *images.shape[-2:])
        return torch.cat([columns, 2 * columns, 0 * columns], 1)


class Fixed(Linear):
    """The same logits whatever it is shown."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, images: Tensor) -> Tensor:
        return self.logits


def settings(**changes: object) -> SegmentTestSettings:
    return SegmentTestSettings.from_preset("deeplabv2.official", **{"crf": None, **changes})


def photograph(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


def logits_of(image: np.ndarray) -> Tensor:
    """(3, H, W) of `Linear` with stride 1."""
    colours = torch.from_numpy(image).double() / 255
    normalised = (colours - torch.tensor([0.5, 0.4, 0.3])) / torch.tensor([0.2, 0.25, 0.5])
    return (normalised @ WEIGHT.double().T + BIAS).permute(2, 0, 1)


def with_crf(
    segmenter: nn.Module, image: np.ndarray, chosen: SegmentTestSettings, crf: object = None
) -> Tensor:
    found = probabilities(segmenter, image, chosen)  # type: ignore[arg-type]
    return refine(found, image, chosen, crf or make_crf(chosen))  # type: ignore[arg-type]


def near(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.double(), expected.double(), rtol=0, atol=2e-6)


@pytest.mark.parametrize("size", [(33, 47), (101, 35)])
def test_one_scale_is_the_softmax_of_the_logits(size: tuple[int, int]) -> None:
    image = photograph(*size)
    found = probabilities(Linear(), image, settings())
    assert found.shape == (3, *size) and found.dtype == torch.float32
    near(found, logits_of(image).softmax(0))


def test_logits_are_enlarged_to_the_image_before_the_softmax() -> None:
    logits = torch.zeros(1, 3, 1, 2)
    logits[0, 0, 0, 1] = 4.0
    found = probabilities(Fixed(logits), photograph(32, 32), settings())
    # centres of the two logits are at 7.5 and 23.5
    expected = ((torch.arange(32) - 7.5) / 16).clamp(0, 1) * 4.0
    near(found[0, 5], expected.exp() / (expected.exp() + 2))


@pytest.mark.parametrize("size", [(1, 1), (1, 70), (5, 3), (31, 40)])
def test_sides_that_are_too_short_are_enlarged_alone(size: tuple[int, int]) -> None:
    segmenter, image = Linear(4), photograph(*size)
    for align_corners in (False, True):
        found = probabilities(segmenter, image, settings(align_corners=align_corners))
        assert found.shape == (3, *size)
        near(found.sum(0), torch.ones(size))
    assert set(segmenter.seen) == {(1, 3, max(32, size[0]), max(32, size[1]))}


def test_sides_are_rounded_or_truncated() -> None:
    for scale, rounded, truncated in ((0.5, (50, 52), (50, 52)), (1.37, (138, 144), (138, 143))):
        assert sides((101, 105), scale, settings()) == rounded
        assert sides((101, 105), scale, settings(sides="truncated")) == truncated
    assert sides((101, 105), 0.01, settings()) == (32, 32)


@pytest.mark.parametrize(
    ("size", "expected"),
    [((375, 500), (512, 683)), ((500, 375), (683, 512)), ((100, 1000), (205, 2048))],
)
def test_an_image_is_resized_to_fit_both_bounds(
    size: tuple[int, int], expected: tuple[int, int]
) -> None:
    assert sides(size, 1.0, settings(resize=[2048, 512])) == expected
    height, width = sides(size, 0.5, settings(resize=[2048, 512]))
    assert abs(height - expected[0] / 2) <= 1 and abs(width - expected[1] / 2) <= 1


@pytest.mark.parametrize("align_corners", [False, True])
def test_scales_are_fused_as_the_settings_say(align_corners: bool) -> None:
    image = photograph(40, 45)
    normalised = Linear.preprocessing(image)[None]

    def at(size: tuple[int, int]) -> Tensor:
        scaled = F.interpolate(normalised, size, mode="bilinear", align_corners=align_corners)
        return Linear()(scaled)

    def enlarged(maps: Tensor) -> Tensor:
        return F.interpolate(maps, (40, 45), mode="bilinear", align_corners=False)[0]

    both = [at((40, 45)), at((80, 90))]
    expected = {
        "mean_logits": torch.stack([enlarged(m) for m in both]).mean(0).softmax(0),
        "mean_probabilities": torch.stack([enlarged(m).softmax(0) for m in both]).mean(0),
        "max_probabilities": torch.stack([enlarged(m).softmax(0) for m in both]).amax(0),
    }
    for fusion, wanted in expected.items():
        chosen = settings(scales=[1.0, 2.0], fusion=fusion, align_corners=align_corners)
        near(probabilities(Linear(), image, chosen), wanted)
    assert float(expected["max_probabilities"].sum(0).max()) > 1.0  # left as they are


def test_chunks_of_labels_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = settings(scales=[1.0, 0.8], flip=True)
    whole = probabilities(Linear(4), photograph(50, 60), chosen)
    monkeypatch.setattr(predict, "CHUNK_BYTES", 1)
    near(whole, probabilities(Linear(4), photograph(50, 60), chosen))


def test_logits_of_the_mirror_image_are_mirrored_back() -> None:
    image = photograph(40, 45)
    segmenter = Sided()
    found = probabilities(segmenter, image, settings(flip=True))
    near(found, torch.full((3, 40, 45), 1 / 3))  # x and -x have the mean 0
    assert len(segmenter.seen) == 2
    one = probabilities(Sided(), image, settings(fusion="max_probabilities"))
    both = probabilities(Sided(), image, settings(fusion="max_probabilities", flip=True))
    near(both, torch.maximum(one, one.flip(-1)))


def test_the_result_does_not_depend_on_threads_or_earlier_images() -> None:
    chosen = settings(scales=[0.75, 1.0], flip=True, crf="deeplab")
    crf = make_crf(chosen)
    image = photograph(50, 60)
    one = with_crf(Linear(4), image, chosen, crf)
    with_crf(Linear(4), photograph(50, 60, seed=1), chosen, crf)
    torch.set_num_threads(2)
    assert torch.equal(one, with_crf(Linear(4), image, chosen, crf))


def test_the_crf_smooths_what_has_one_colour() -> None:
    image = np.full((32, 40, 3), 90, np.uint8)
    image[:, 20:] = 200
    logits = torch.zeros(1, 3, 32, 40)
    logits[0, 1, :, :20], logits[0, 2, :, 20:] = 2.0, 2.0
    logits[0, :, 16, 6] = torch.tensor([3.0, 0.0, 0.0])  # one odd pixel
    chosen = settings(crf="deeplab")
    without = probabilities(Fixed(logits), image, chosen)
    assert int(labels(without)[16, 6]) == 0
    smooth = with_crf(Fixed(logits), image, chosen)
    expected = torch.ones(32, 40, dtype=torch.int64)
    expected[:, 20:] = 2
    assert torch.equal(labels(smooth), expected)
    near(smooth.sum(0), torch.ones(32, 40))


def test_the_crf_sees_the_image_or_the_wrapped_one() -> None:
    image, scores = photograph(32, 40), torch.full((2, 32, 40), 0.5)
    chosen = settings(crf="deeplab")
    crf = make_crf(chosen)
    assert crf is not None
    seen = []

    class Spy:
        def refine_probabilities(self, image: Tensor, probabilities: Tensor) -> Tensor:
            seen.append(image.numpy())
            return crf.refine_probabilities(image, probabilities)

    refine(scores, image, chosen, Spy())  # type: ignore[arg-type]
    refine(scores, image, settings(crf="deeplab", crf_image="wrapped"), Spy())  # type: ignore[arg-type]
    np.testing.assert_array_equal(seen[0], image)
    np.testing.assert_array_equal(seen[1], predict._wrapped(image))


def test_a_wrapped_image_by_hand() -> None:
    image = np.array([[[117, 116, 99], [122, 117, 104], [255, 0, 255], [123, 117, 105]]], np.uint8)
    # blue: 99 - 104.008 = -5.008, of which -5 is 251; green: 116 - 116.669, of which 0; ...
    expected = [[[251, 0, 251], [0, 0, 0], [150, 140, 132], [0, 0, 0]]]
    found = predict._wrapped(image)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, expected)


def test_labels_and_masks() -> None:
    scores = torch.tensor([[[0.2, 0.5, 0.4]], [[0.3, 0.5, 0.2]], [[0.5, 0.0, 0.4]]])
    found = labels(scores)
    assert found.dtype == torch.int64
    assert found.tolist() == [[2, 0, 0]]  # the first of equal ones
    np.testing.assert_array_equal(label_mask(found, CLASSES), [[7, 0, 0]])


@pytest.mark.parametrize(
    ("segmenter", "message"),
    [
        (Linear().train(), "training mode"),
        (Fixed(torch.zeros(1, 4, 5, 5)), r"expected \(1, 3, h, w\)"),
        (Fixed(torch.zeros(2, 3, 5, 5)), r"expected \(1, 3, h, w\)"),
        (Fixed(torch.zeros(3, 5, 5)), r"expected \(1, 3, h, w\)"),
        (Fixed(torch.full((1, 3, 5, 5), torch.nan)), "NaN"),
        (Fixed(torch.full((1, 3, 5, 5), torch.inf)), "NaN or infinite"),
    ],
)
def test_segmenters_that_are_refused(segmenter: Linear, message: str) -> None:
    with pytest.raises(ClassifierError, match=message):
        probabilities(segmenter, photograph(40, 40), settings())  # type: ignore[arg-type]
