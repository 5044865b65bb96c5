"""The judge without truth: hand-computed information, plateaus, ties, and what it must prefer."""

import math

import numpy as np
import pytest
import torch

from lpcam.evaluation.judge import (
    DISAGREEMENT,
    FEATURES,
    THRESHOLDS,
    choose,
    colour_bins,
    colour_information,
    curves,
    feature_information,
    quality,
    step_of,
    verdict,
)
from lpcam.method.early import EarlyImage, EarlyPrototypes


def at(threshold):
    return THRESHOLDS.index(threshold)


def test_bins_are_six_equal_parts_of_each_channel():
    image = np.array([[[0, 0, 0], [42, 43, 85], [86, 128, 255]]], np.uint8)
    assert colour_bins(image).tolist() == [[0, 0 * 36 + 1 * 6 + 1, 2 * 36 + 3 * 6 + 5]]


def test_colour_information_is_the_mutual_information_over_the_entropy():
    # two colours, half of the pixels each; the mask is right on three of four
    colours = torch.tensor([[0, 0, 7, 7]])
    best = torch.tensor([[0.1, 0.9, 0.9, 0.9]])
    joint = {(0, 0): 0.25, (0, 1): 0.25, (7, 1): 0.5}
    masks, bins = {0: 0.25, 1: 0.75}, {0: 0.5, 7: 0.5}
    expected = sum(p * math.log(p / (bins[b] * masks[f])) for (b, f), p in joint.items())
    found = colour_information(colours, best)
    assert found[at(0.5)].item() == pytest.approx(expected / math.log(2))
    assert found[at(0.02)].item() == 0.0  # everywhere
    assert found[at(0.98)].item() == 0.0  # nowhere
    # at the threshold itself a pixel is outside
    assert colour_information(colours, torch.tensor([[0.5, 0.5, 0.9, 0.9]]))[at(0.5)].item() == 1.0


def test_one_colour_tells_nothing():
    found = colour_information(torch.zeros(3, 4).long(), torch.rand(3, 4))
    assert found.tolist() == [0.0] * len(THRESHOLDS)


def test_feature_information_is_the_share_of_variance_between_both_sides():
    generator = torch.Generator().manual_seed(0)
    features = torch.rand(5, 4, 6, generator=generator)
    best = torch.rand(4, 6, generator=generator)
    found = feature_information(features, best)
    for threshold in (0.2, 0.5, 0.8):
        inside = best > threshold
        rows = features.flatten(1).T
        total = (rows - rows.mean(0)).square().sum()
        within = sum(
            (part - part.mean(0)).square().sum()
            for part in (rows[inside.flatten()], rows[~inside.flatten()])
        )
        assert found[at(threshold)].item() == pytest.approx(float(1 - within / total), abs=1e-5)


def test_features_that_are_all_alike_tell_nothing():
    assert feature_information(torch.ones(3, 4, 4), torch.rand(4, 4)).sum() == 0.0


def test_an_image_without_a_class_tells_nothing():
    found = curves(torch.arange(16).view(4, 4), torch.zeros(0, 4, 4), torch.rand(2, 2, 2))
    assert found.sum() == 0.0


def step(height: float, until: float) -> torch.Tensor:
    return torch.tensor([height if t <= until else 0.0 for t in THRESHOLDS], dtype=torch.float64)


def test_the_threshold_is_the_last_of_the_plateau_of_both_judges():
    found = verdict(torch.stack([torch.stack([step(0.2, 0.5), step(0.4, 0.62)])] * 3))
    assert (found.threshold, found.by_colours, found.by_features) == (0.5, 0.5, 0.62)
    assert found.information == pytest.approx(0.2 * 0.4**FEATURES)
    assert max(found.curve) == 1.0
    assert not found.disagree


def test_a_curve_counts_as_nearly_at_its_maximum_from_95_percent():
    curve = step(0.95, 0.8) + step(0.05, 0.3)
    below = step(0.94, 0.8) + step(0.06, 0.3)
    ones = torch.ones_like(curve)
    assert verdict(torch.stack([curve, ones])[None]).threshold == 0.8
    assert verdict(torch.stack([below, ones])[None]).threshold == 0.29


def test_judges_that_differ_by_more_than_the_bound_disagree():
    far = 0.5 + DISAGREEMENT + 0.03
    found = verdict(torch.stack([step(0.2, 0.5), step(0.4, far)])[None])
    assert found.disagree
    assert found.as_json()["disagree"]


def test_without_features_colours_decide_alone():
    found = verdict(torch.stack([step(0.2, 0.44), torch.ones(len(THRESHOLDS))])[None].double())
    assert found.threshold == found.by_colours == 0.44
    assert found.by_features is None
    assert not found.disagree


def test_maps_that_say_nothing_get_the_middle():
    assert verdict(torch.zeros(2, 2, len(THRESHOLDS), dtype=torch.float64)).threshold == 0.5


@pytest.mark.parametrize(("size", "expected"), [((375, 500), 3), ((64, 80), 2), ((20, 30), 1)])
def test_small_images_are_looked_at_more_finely(size, expected):
    assert step_of(size) == expected


def way(base, fusion="none"):
    return EarlyPrototypes(("a",), (), (), (), (), 1, base=base, fusion=fusion)


def picture(good: float, bad: float) -> EarlyImage:
    """An image of two colours: CAM marks one of them, LPCAM a part ``bad`` of the other too."""
    colours = torch.zeros(40, 40, dtype=torch.int64)
    colours[:, 20:] = 9
    cam = torch.zeros(1, 40, 40)
    cam[:, :, 20:] = good
    lpcam = cam.clone()
    lpcam[:, : round(40 * bad), :20] = good
    return EarlyImage((0,), (), {"CAM": cam, "LPCAM": lpcam}, colours)


def test_the_map_that_says_most_about_colours_is_chosen():
    ways = [way("LPCAM"), way("CAM")]
    chosen, verdicts = choose([picture(1.0, 0.5)] * 2, ways)
    assert chosen == 1
    assert verdicts[1].information == pytest.approx(1.0)


def test_of_maps_that_say_nearly_as_much_the_first_is_chosen():
    ways = [way("LPCAM"), way("CAM")]
    chosen, verdicts = choose([picture(1.0, 0.0)], ways)
    assert (chosen, verdicts[0].information) == (0, verdicts[1].information)
    chosen, verdicts = choose([picture(1.0, 0.5)] + [picture(1.0, 0.0)] * 30, ways)
    assert verdicts[0].information < verdicts[1].information
    assert chosen == 0


def test_the_choice_does_not_depend_on_the_number_of_threads():
    images = [picture(1.0, share / 10) for share in range(6)]
    found = [choose(images, [way("LPCAM"), way("CAM")], workers=n) for n in (1, 3)]
    assert found[0] == found[1]


def test_features_weigh_less_than_colours_between_maps():
    colours, features = step(0.2, 0.5), step(0.16, 0.5)
    found = verdict(torch.stack([colours, features])[None])
    assert found.information == pytest.approx(0.2 * 0.16**FEATURES)
    # at the same threshold: the features know nothing where the colours are best
    apart = torch.stack([step(0.2, 0.2), features * (torch.tensor(THRESHOLDS) > 0.3)])
    assert verdict(apart[None]).information == 0.0


def test_quality_falls_with_agreement_and_with_what_a_mask_says_of_colours() -> None:
    image = np.zeros((64, 64, 3), np.uint8)
    image[16:48, 16:48] = 255
    right = np.zeros((64, 64), np.uint8)
    right[16:48, 16:48] = 2
    half, moved = right.copy(), np.roll(right, 8, axis=1)
    half[:, :32] = 0
    assert quality(image, right, right) == pytest.approx(1)
    assert quality(image, right, half) == pytest.approx(0.5)
    assert quality(image, moved, moved) < 0.5
    assert quality(image, right, np.where(right, 1, 0).astype(np.uint8)) == 0  # another class
    assert quality(image, 0 * right, 255 * (right > 0)) == 1  # ignored pixels are of no class
