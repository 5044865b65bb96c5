"""IRNet: pyramid, branches, loss, training, going on after a stop, files, boundary maps."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lpcam.classifiers.classifier import BackboneSpec, Preprocessing
from lpcam.data.map_files import MapFile
from lpcam.data.resize import resize
from lpcam.pipeline.recipe import RefineSection
from lpcam.refine import irn
from lpcam.refine.base import Job, Picture, Source
from lpcam.refine.irn import IrnSettings, boundary_map, irn_loss
from lpcam.refine.irn_network import build_irn
from lpcam.refine.walk import pair_offsets, path
from lpcam.runtime.errors import ClassifierError

SPEC = BackboneSpec("test_resnet", {}, 16)
RAW = Preprocessing((0.5,) * 3, (0.5,) * 3)
SETTINGS = IrnSettings.from_preset(
    "official", epochs=2, batch_size=3, crop=48, radius=4, learning_rate=0.05
)


@pytest.fixture
def fresh(weights: Path) -> Any:
    """Makes equal untrained networks."""
    return lambda displacement=True, seed=0: build_irn(
        SPEC, weights=weights, displacement=displacement, seed=seed
    )


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def drawn_labels(*shape: int, values: tuple[int, ...] = (0, 1, 2, 255), seed: int = 0) -> Tensor:
    numbers = torch.randint(0, len(values), shape, generator=torch.Generator().manual_seed(seed))
    return torch.tensor(values, dtype=torch.uint8)[numbers]


def test_levels_of_a_resnet(fresh: Any) -> None:
    pyramid = fresh().pyramid
    found = [(level.channels, level.stride) for level in pyramid.levels]
    assert found == [(32, 2), (32, 4), (48, 8), (192, 16), (96, 16)]
    assert pyramid.multiple == 1
    images = drawn(2, 3, 61, 83)
    backbone = pyramid.backbone
    stem = backbone.maxpool(backbone.act1(backbone.bn1(backbone.conv1(images))))
    features = pyramid(images)
    torch.testing.assert_close(features[0], stem)
    torch.testing.assert_close(features[1], backbone.layer1(stem))
    torch.testing.assert_close(features[4], backbone.forward_features(images))


def test_a_backbone_without_fine_features() -> None:
    spec = BackboneSpec("test_vit", {"dynamic_img_size": True, "dynamic_img_pad": True})
    with pytest.raises(ClassifierError, match=r"at strides \[16\]; IRN needs 4 and 8 among them"):
        build_irn(spec, weights="random")


def test_boundary_branch_is_that_of_the_specification(fresh: Any) -> None:
    network = fresh()
    images = drawn(2, 3, 61, 83)
    boundary = network.branches.boundary
    parts = []
    features = network.pyramid(images)
    for unit, feature, factor in zip(boundary.units, features, (1, 1, 2, 4, 4), strict=True):
        assert unit.convolution.bias is None
        found = F.group_norm(
            F.conv2d(feature, unit.convolution.weight), 4, unit.norm.weight, unit.norm.bias
        )
        if factor > 1:
            found = F.interpolate(found, scale_factor=factor, mode="bilinear")
        parts.append(F.relu(found[..., :16, :21]))
    expected = F.conv2d(torch.cat(parts, 1), boundary.last.weight, boundary.last.bias)[:, 0]
    torch.testing.assert_close(network(images)[0], expected)


def test_displacement_branch_is_that_of_the_specification(fresh: Any) -> None:
    branch = fresh().branches.displacement
    units = [*branch.units, branch.middle, branch.late]
    found = [(u.convolution.out_channels, u.norm.num_groups, u.factor) for u in units]
    deep = (256, 16)
    assert found[:3] == [(64, 8, 1), (128, 16, 1), (*deep, 1)]
    assert found[3:] == [(*deep, 2), (*deep, 2), (*deep, 2), (*deep, 1)]
    assert [u.convolution.in_channels for u in units[-2:]] == [768, 448]
    assert branch.last.bias is None


def test_mean_shift_is_subtracted_in_evaluation_alone(fresh: Any) -> None:
    network = fresh()
    images = drawn(1, 3, 48, 48)
    before = network(images)[1]
    network.branches.displacement.shift.copy_(torch.tensor([0.25, -2.0]))
    moved = network(images)[1]
    torch.testing.assert_close(moved[0, 0], before[0, 0] - 0.25)
    torch.testing.assert_close(moved[0, 1], before[0, 1] + 2)
    torch.testing.assert_close(network.train()(images)[1], before)


def loss_by_pairs(
    logits: Tensor, labels: Tensor, radius: int, displacement: Tensor
) -> dict[str, float]:
    """The specification's sums, pair by pair."""
    edge = logits.double().sigmoid()
    reach = radius - 1
    batch, height, width = labels.shape
    sums = dict.fromkeys(("background", "foreground", "different", "still", "moved"), 0.0)
    counts = dict.fromkeys(("background", "foreground", "different"), 0)
    for b in range(batch):
        for y in range(height - reach):
            for x in range(reach, width - reach):
                for dy, dx in pair_offsets(radius):
                    first, second = int(labels[b, y, x]), int(labels[b, y + dy, x + dx])
                    if 255 in (first, second):
                        continue
                    affinity = 1 - max(float(edge[b, y + p, x + q]) for p, q in path((dy, dx)))
                    delta = (displacement[b, :, y, x] - displacement[b, :, y + dy, x + dx]).double()
                    if first != second:
                        kind = "different"
                        sums[kind] -= math.log(1 + 1e-5 - affinity)
                    else:
                        kind = "foreground" if first else "background"
                        sums[kind] -= math.log(affinity + 1e-5)
                        if first:
                            delta = delta - torch.tensor([dy, dx])
                        sums["moved" if first else "still"] += float(delta.abs().sum())
                    counts[kind] += 1
    return {
        "positive": sum(sums[k] / (counts[k] + 1e-5) for k in ("background", "foreground")) / 2,
        "negative": sums["different"] / (counts["different"] + 1e-5),
        "displacement_foreground": sums["moved"] / (2 * counts["foreground"] + 1e-5),
        "displacement_background": sums["still"] / (2 * counts["background"] + 1e-5),
    }


@pytest.mark.parametrize(
    "values", [(0, 1, 2, 255), (0, 0, 255), (3, 3, 255), (0, 7), (255, 255), (4, 9)]
)
def test_loss_pair_by_pair(values: tuple[int, ...]) -> None:
    """With kinds of pairs that do not occur, too."""
    logits, displacement = 2 * drawn(2, 9, 10), drawn(2, 2, 9, 10, seed=1)
    labels = drawn_labels(2, 9, 10, values=values)
    found = irn_loss(logits, labels, 3, displacement)
    expected = loss_by_pairs(logits, labels, 3, displacement)
    for name, value in expected.items():
        assert float(getattr(found, name)) == pytest.approx(value, rel=1e-4, abs=1e-6), name
    plain = irn_loss(logits, labels, 3)
    assert float(plain.displacement_foreground) == float(plain.displacement_background) == 0
    assert torch.equal(plain.positive, found.positive)


@pytest.mark.parametrize("size", [(40, 90), (200, 7)])
def test_augmented_labels_stay_on_their_pixels(size: tuple[int, int]) -> None:
    """At scale 1 the red value of each labelled cell's pixel is its label, also mirrored."""
    label = drawn_labels(*size, values=tuple(range(254))).numpy()
    image = np.repeat(label[:, :, None], 3, axis=2)
    settings = SETTINGS.model_copy(update={"scale": (1.0, 1.0)})
    labelled = 0
    for seed in range(6):
        tensor, labels = irn.augment(RAW, settings, image, label, np.random.default_rng(seed))
        assert tensor.shape == (3, 48, 48)
        assert labels.shape == (12, 12)
        assert labels.dtype == torch.uint8
        red = torch.round((tensor[0, 2::4, 2::4] * 0.5 + 0.5) * 255).to(torch.uint8)
        known = labels != 255
        assert torch.equal(red[known], labels[known])
        assert bool((tensor[:, 2::4, 2::4][:, ~known] == 0).all())
        labelled += int(known.sum())
    assert labelled > 0


def test_boundary_map(fresh: Any) -> None:
    network = fresh().train()
    image = np.random.default_rng(0).integers(0, 256, (61, 83, 3)).astype(np.uint8)
    found = boundary_map(network, image)
    assert found.shape == (16, 21)
    assert 0 <= float(found.min()) <= float(found.max()) <= 1
    tensor = network.pyramid.preprocessing(image)[None]
    with torch.no_grad():
        logits, mirrored = network(tensor)[0], network(tensor.flip(-1))[0].flip(-1)
    torch.testing.assert_close(found, torch.sigmoid(0.5 * logits + 0.5 * mirrored)[0])
    mirror = boundary_map(network, np.ascontiguousarray(image[:, ::-1]))
    torch.testing.assert_close(mirror, found.flip(-1))


def test_networks_with_equal_pyramids_share_an_images_features(
    fresh: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = fresh(seed=0), fresh(seed=1)
    image = np.random.default_rng(0).integers(0, 256, (61, 83, 3)).astype(np.uint8)
    alone = [boundary_map(network, image) for network in (first, second)]
    shared: dict[str, Any] = {}
    assert torch.equal(boundary_map(first, image, shared, "a"), alone[0])
    monkeypatch.setattr(second.pyramid, "forward", None)
    assert torch.equal(boundary_map(second, image, shared, "a"), alone[1])
    with pytest.raises(TypeError):
        boundary_map(second, image, shared, "b")


@pytest.mark.parametrize(
    ("preset", "method", "shift", "expected"),
    [
        ("adaptive", "LPCAM-E", 0.2, 0.61),
        ("adaptive", "LPCAM-E", 0.0, 0.41),
        ("adaptive", "LPCAM-E", 0.8, 0.99),
        ("official", "CAM", -0.1, 0.15),
        # walked to the power of 1.5, so 0.64 is 0.8 ** 1.5 before it
        ("default", "LPCAM", 0.1, (0.41 ** (2 / 3) + 0.1) ** 1.5),
    ],
)
def test_the_threshold_moves_with_that_of_the_seeds(
    preset: str, method: str, shift: float, expected: float
) -> None:
    section = RefineSection(method="irn", irn={"preset": preset})
    source = Source(method, "maps", Path(), "key", 0.5, shift)
    assert irn.REFINEMENT.threshold(section, source) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("walked", ["maps", "cleaned"])
def test_what_walks(walked: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The maps, or of each class the part within its seed, which the CRF drew to the border."""
    seen: list[Tensor] = []

    def propagate(maps: Tensor, *_: Any) -> Tensor:
        seen.append(maps)
        return maps

    network = SimpleNamespace(folded=lambda: None, pyramid=SimpleNamespace(state_dict=dict))
    network.to = lambda _: network
    monkeypatch.setattr(irn.Irn, "load", lambda _: network)
    monkeypatch.setattr(irn, "boundary_map", lambda *_: torch.zeros(6, 8))
    monkeypatch.setattr(irn, "propagate", propagate)
    image = torch.zeros(24, 32, 3, dtype=torch.uint8)
    image[:, 16:] = torch.tensor([200, 40, 40], dtype=torch.uint8)
    planes = torch.full((2, 24, 32), 0.3)
    planes[1, :, 18:] = 0.8  # 2 pixels short of the colour's border
    cam = resize(planes, (6, 8))
    maps = MapFile(np.array([0, 3]), cam.numpy(), planes.numpy(), {})
    section = RefineSection(method="irn", irn={"preset": "adaptive", "walked": walked})
    same = {"memory": None, "accelerate": lambda network, _: network}
    lent: Any = SimpleNamespace(device=torch.device("cpu"), **same)
    job = Job(section, Source("LPCAM-E", "lpcam_e", Path(), "key", 0.5), lent)
    item: Any = SimpleNamespace(id="a")
    irn.REFINEMENT.refiner(job, Path(), tmp_path)(Picture(item, maps, image, planes))
    inside = planes.clone()
    inside[0], inside[1, :, :16] = 0, 0
    torch.testing.assert_close(seen[0], cam if walked == "maps" else resize(inside, (6, 8)))
    assert (tmp_path / "boundaries" / "a.png").is_file()
    keys = irn.REFINEMENT.key(job).keys()
    assert ({"crf", "seed_threshold"} <= keys) == (walked == "cleaned")
