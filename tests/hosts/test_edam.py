"""EDAM: fusion with saliency, network, pairs, training, going on after a stop, files, maps."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import COLOURS, together
from torch import Tensor

from lpcam import engine
from lpcam.classifier import BackboneSpec, Classifier, Preprocessing
from lpcam.data.folder import read_folder
from lpcam.data.images import read_image, resize_image
from lpcam.data.items import Item
from lpcam.errors import ArtefactError, ClassifierError, DataError
from lpcam.hosts import edam
from lpcam.hosts.edam import (
    Edam,
    Encoder,
    Pair,
    Partners,
    build_edam,
    class_masks,
    fuse_saliency,
    maps_of,
    pairs_of,
    saliency_labels,
    sinusoidal_positions,
    train_edam,
)
from lpcam.presets import CrfSettings, EdamSettings, SaliencySettings
from lpcam.processes import Processes
from lpcam.refine.crf import DenseCrf
from lpcam.train import freeze

SPEC = BackboneSpec("test_resnet", {}, 16)
CLASSES = tuple(COLOURS)
PLAIN = SaliencySettings.from_preset("edam")
WITH_CRF = SaliencySettings.from_preset("edam.crf")
SETTINGS = EdamSettings.from_preset(
    "official",
    iterations=6,
    pairs=2,
    crop=48,
    long_side=(40, 64),
    warmup=2,
    width=8,
    hidden=12,
    freeze=["conv1", "bn1"],
    scales=[1.0, 0.5],
)
RAW = Preprocessing((0.5,) * 3, (0.5,) * 3)


@pytest.fixture
def fresh(weights: Path) -> Any:
    """Makes equal untrained networks."""
    return lambda settings=SETTINGS, seed=0: build_edam(
        SPEC, CLASSES, settings, weights=weights, seed=seed
    )


@pytest.fixture
def items(pictures: Path) -> list[Item]:
    """The tiny images; one has no label."""
    return list(read_folder(pictures).items.values())


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def labelled(*labels: tuple[int, ...]) -> list[Item]:
    return [Item(f"i{number}", Path(f"i{number}.png"), each) for number, each in enumerate(labels)]


# -- Fusion with saliency -----------------------------------------------------------------------


def fused(values: list[list[float]], level: int, settings: SaliencySettings = PLAIN) -> list[int]:
    """Labels of pixels of one saliency, each with a value a class."""
    maps = torch.tensor(values).T[:, None]
    saliency = torch.full((1, len(values)), level, dtype=torch.uint8)
    return fuse_saliency(maps, saliency, settings)[0].tolist()


def test_what_is_not_salient_is_background_unless_a_class_is_sure() -> None:
    values = [[0.3, 0.9], [0.951, 0.1], [0.2, 1.0], [0.96, 0.97], [0.0, 0.95], [0.0, 0.0]]
    assert fused(values, 20) == [0, 1, 2, 1, 0, 0]


def test_what_is_salient_has_the_best_class_unless_all_are_low() -> None:
    values = [[0.3, 0.9], [0.25, 0.1], [0.249, 0.24], [0.5, 0.5], [0.96, 0.97], [0.0, 0.0]]
    assert fused(values, 21) == [2, 1, 0, 1, 1, 0]


def test_posteriors_have_thresholds_of_their_own() -> None:
    levels = torch.tensor([[0, 0, 255, 255]], dtype=torch.uint8)
    scores = torch.tensor([[[0.9999, 0.999995, 1e-5, 5e-7]]])
    found = saliency_labels(scores, levels, theta=0.2, alpha=WITH_CRF.alpha, beta=WITH_CRF.beta)
    assert found.tolist() == [[0, 1, 1, 0]]


@pytest.mark.parametrize(("theta", "level"), [(0.2, 20), (0.29, 29), (1.27, 127), (0.0, 0)])
def test_grey_level_of_theta(theta: float, level: int) -> None:
    """Also where 100 times theta is rounded down, as 100 x 0.29 is."""
    settings = PLAIN.model_copy(update={"theta": theta})
    assert fused([[0.5]], level, settings) == [0]
    assert fused([[0.5]], level + 1, settings) == [1]


def test_fusion_is_that_of_twenty_one_channels() -> None:
    """The released way, with a channel for every class of VOC."""
    generator = torch.Generator().manual_seed(0)
    maps = torch.rand(3, 20, 30, generator=generator)
    maps[:, :4] = torch.tensor([0.97, 0.1, 0.99])[:, None, None]
    saliency = torch.randint(0, 60, (20, 30), generator=generator, dtype=torch.uint8)
    keys = [2, 7, 14]
    table = torch.zeros(21, 20, 30)
    table[[key + 1 for key in keys]] = maps
    table[table < 0.25] = -2
    table[table > 0.95] = 2
    table[0] = (saliency <= 20).float()
    found = torch.tensor([0, *(key + 1 for key in keys)])[fuse_saliency(maps, saliency, PLAIN)]
    assert torch.equal(found, table.argmax(0))
    assert set(found.unique().tolist()) == {0, 3, 8, 15}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_fusion_in_any_precision(dtype: torch.dtype) -> None:
    maps = torch.tensor([[[1.0, 0.5, 0.0]], [[0.0, 0.25, 0.0]]], dtype=dtype)
    found = fuse_saliency(maps, torch.zeros(1, 3, dtype=torch.uint8), PLAIN)
    assert found.dtype == torch.int64
    assert found.tolist() == [[1, 0, 0]]


@pytest.mark.parametrize("settings", [PLAIN, WITH_CRF])
def test_an_image_without_classes_is_background(settings: SaliencySettings) -> None:
    crf = (torch.zeros(4, 6, 3, dtype=torch.uint8), DenseCrf(CrfSettings.from_preset("edam")))
    saliency = torch.full((4, 6), 255, dtype=torch.uint8)
    found = fuse_saliency(
        torch.zeros(0, 4, 6), saliency, settings, crf=crf if settings.crf else None
    )
    assert found.shape == (4, 6)
    assert found.dtype == torch.int64
    assert not found.any()


def test_fusion_after_a_crf() -> None:
    """The CRF closes a gap in its object; saliency takes away what lies beside it."""
    image = torch.full((24, 32, 3), 30, dtype=torch.uint8)
    image[6:18, 4:14] = 200
    image[6:18, 18:28] = 200
    maps = torch.zeros(2, 24, 32)
    maps[0, 6:18, 4:14] = 0.7
    maps[0, 10:14, 7:11] = 1.0
    maps[0, 7, 5] = 0.2
    maps[1, 6:18, 18:28] = 0.6
    crf = DenseCrf(CrfSettings.from_preset("edam"))
    background = 1 - maps.amax(0, keepdim=True)
    posteriors = crf.refine_probabilities(image, torch.cat([background, maps]))[1:]
    saliency = torch.zeros(24, 32, dtype=torch.uint8)
    saliency[:, :16] = 255
    found = fuse_saliency(maps, saliency, WITH_CRF, crf=(image, crf))
    assert (found[6:18, 4:14] == 1).all()
    expected = saliency_labels(
        posteriors, saliency, theta=0.2, alpha=WITH_CRF.alpha, beta=WITH_CRF.beta
    )
    assert torch.equal(found, expected)
    assert fuse_saliency(maps, saliency, PLAIN)[7, 5] == 0


def test_maps_that_exceed_one_by_rounding_pass_the_crf() -> None:
    image = torch.zeros(5, 5, 3, dtype=torch.uint8)
    maps = torch.full((1, 5, 5), 1.0 + 1e-6)
    crf = DenseCrf(CrfSettings.from_preset("edam"))
    found = fuse_saliency(maps, torch.zeros(5, 5, dtype=torch.uint8), WITH_CRF, crf=(image, crf))
    assert (found == 1).all()


@pytest.mark.parametrize(
    ("maps", "saliency", "message"),
    [
        (torch.zeros(2, 4, 5), torch.zeros(4, 6, dtype=torch.uint8), "differ in size or device"),
        (torch.zeros(2, 4, 5), torch.zeros(4, 5), "multiply a map in .0, 1. by 255"),
        (torch.zeros(2, 4, 5), torch.zeros(4, 5, 3, dtype=torch.uint8), "shape .height, width"),
        (torch.zeros(4, 5), torch.zeros(4, 5, dtype=torch.uint8), "shape .classes, height, width"),
        (torch.full((1, 4, 5), math.nan), torch.zeros(4, 5, dtype=torch.uint8), "expected finite"),
        (torch.zeros(1, 4, 5).byte(), torch.zeros(4, 5, dtype=torch.uint8), "floating-point"),
    ],
)
def test_maps_and_saliency_that_do_not_fit(maps: Tensor, saliency: Tensor, message: str) -> None:
    with pytest.raises(DataError, match=message):
        fuse_saliency(maps, saliency, PLAIN)


def test_a_crf_is_there_where_the_settings_say_so() -> None:
    maps, saliency = torch.zeros(1, 4, 5), torch.zeros(4, 5, dtype=torch.uint8)
    crf = (torch.zeros(4, 5, 3, dtype=torch.uint8), DenseCrf(CrfSettings.from_preset("edam")))
    with pytest.raises(DataError, match=r"saliency.crf is True, but no CRF was given; .* give the"):
        fuse_saliency(maps, saliency, WITH_CRF)
    with pytest.raises(DataError, match=r"saliency.crf is False, but a CRF was given"):
        fuse_saliency(maps, saliency, PLAIN, crf=crf)


# -- Network ------------------------------------------------------------------------------------


def test_masks_share_each_pixel() -> None:
    scores = torch.tensor([3.0, -4.0, 0.0])[None, :, None, None].repeat(1, 1, 2, 1)
    scores[0, :, 1] = 0
    found = class_masks(scores)
    torch.testing.assert_close(found[0, :, 0, 0], torch.tensor([0.6, 0.8, 0.0]))
    assert not found[0, :, 1].any()
    squares = class_masks(drawn(2, 4, 5, 6)).square().sum(1)
    torch.testing.assert_close(squares, torch.ones(2, 5, 6))


def test_positions() -> None:
    code = sinusoidal_positions(7, 6)
    for place in (0, 1, 6):
        for i in range(3):
            angle = place / 10000 ** (2 * i / 6)
            assert float(code[place, 2 * i]) == pytest.approx(math.sin(angle), abs=1e-6)
            assert float(code[place, 2 * i + 1]) == pytest.approx(math.cos(angle), abs=1e-6)
    assert torch.equal(sinusoidal_positions(7, 5), sinusoidal_positions(7, 5)[:, :5])
    assert sinusoidal_positions(3, 5).shape == (3, 5)


def test_encoder_is_that_of_the_specification() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = Encoder(8, 2, 12, 0.1).eval()
        for parameter in encoder.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
    tokens = drawn(3, 5, 8)

    def norm(x: Tensor, layer: Any) -> Tensor:
        deviation = (x - x.mean(-1, keepdim=True)).square().sum(-1, keepdim=True).div(7).sqrt()
        return layer.weight * (x - x.mean(-1, keepdim=True)) / (deviation + 1e-6) + layer.bias

    first = norm(tokens, encoder.norms[0])
    heads = []
    for part in (slice(0, 4), slice(4, 8)):
        q, k, v = (layer(first)[..., part] for layer in (encoder.query, encoder.key, encoder.value))
        heads.append((q @ k.transpose(1, 2) / 2).softmax(-1) @ v)
    middle = tokens + encoder.joined(torch.cat(heads, -1))
    x = encoder.inner(norm(middle, encoder.norms[1]))
    gelu = 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    torch.testing.assert_close(encoder(tokens), middle + encoder.outer(gelu))


def test_network_is_that_of_the_specification(fresh: Any) -> None:
    network = fresh()
    images = drawn(4, 3, 49, 65)
    features = network.classifier.features(images)
    grid = features.shape[-2:]
    assert grid == (4, 5)
    scores = F.conv2d(features, network.activation.weight, padding=1)
    masks = network.masks(features)
    torch.testing.assert_close(masks, (scores / scores.norm(dim=1, keepdim=True)).abs())
    assert masks.shape == (4, len(CLASSES) + 1, *grid)
    reduced = F.conv2d(features, network.reduction.weight)
    code = sinusoidal_positions(20, 8)
    for pair in range(2):
        for row in range(3):
            tokens = torch.cat(
                [
                    (reduced[2 * pair + n] * masks[2 * pair + n, row]).flatten(1).T
                    + code
                    + network.segments.weight[n]
                    for n in range(2)
                ]
            )
            seen = network.encoders[row](tokens[None])[0]
            for n in range(2):
                logit = seen[20 * n : 20 * n + 20].mean(0) @ network.logits.weight[row]
                torch.testing.assert_close(network(images)[2 * pair + n, row], logit)


def test_images_of_a_pair_see_each_other_and_no_other(fresh: Any) -> None:
    network = fresh()
    images = drawn(4, 3, 48, 48)
    before = network(images)
    images[1] = drawn(3, 48, 48, seed=9)
    after = network(images)
    assert not torch.allclose(after[0], before[0])
    torch.testing.assert_close(after[2:], before[2:])


def test_a_class_without_attention_still_has_a_gradient(fresh: Any) -> None:
    """Every class is evaluated for every pair, and its encoder learns."""
    network = fresh().train()
    freeze(network.classifier.backbone, ["conv1"], norms=True)
    network(drawn(2, 3, 48, 48)).sum().backward()
    trained = {name for name, p in network.named_parameters() if p.grad is not None}
    assert {f"encoders.{row}.query.weight" for row in range(3)} <= trained
    assert {"activation.weight", "reduction.weight", "segments.weight", "logits.weight"} <= trained
    assert not any(name.startswith("classifier.backbone.conv1") for name in trained)
    assert float(network.activation.weight.grad[-1].abs().max()) > 0  # through the normalisation


def test_wideresnet38_keeps_signed_features() -> None:
    arguments = {"channels": [4, 4, 8, 8, 8, 8, 16], "depths": [1, 1, 1, 1]}
    network = build_edam(
        BackboneSpec("wideresnet38", arguments), CLASSES, SETTINGS, weights="random"
    )
    features = network.classifier.features(drawn(1, 3, 61, 83))
    assert features.shape == (1, 16, 8, 11)
    assert float(features.min()) < 0
    cut = build_edam(
        BackboneSpec("wideresnet38", {**arguments, "final_relu": True}),
        CLASSES,
        SETTINGS,
        weights="random",
    )
    assert float(cut.classifier.features(drawn(1, 3, 61, 83)).min()) >= 0


@pytest.mark.parametrize("name", ["test_efficientnet", "test_convnext", "test_vit"])
@pytest.mark.parametrize("size", [(64, 64), (61, 83)])
def test_any_backbone_and_size(name: str, size: tuple[int, int]) -> None:
    arguments = {"dynamic_img_size": True, "dynamic_img_pad": True} if name == "test_vit" else {}
    network = build_edam(BackboneSpec(name, arguments), CLASSES, SETTINGS, weights="random")
    logits = network(drawn(2, 3, *size))
    assert logits.shape == (2, 3)
    assert bool(torch.isfinite(logits).all())


def test_width_that_heads_cannot_share(fresh: Any) -> None:
    with pytest.raises(ClassifierError, match="width 9 is not a multiple of edam"):
        fresh(SETTINGS.model_copy(update={"width": 9}))


def test_an_odd_number_of_images(fresh: Any) -> None:
    with pytest.raises(ValueError, match="3 images are no pairs"):
        fresh()(drawn(3, 3, 48, 48))


def test_first_weights_depend_on_the_seed_alone(fresh: Any) -> None:
    first, again, other = fresh(), fresh(), fresh(seed=1)
    assert first.fingerprint() == again.fingerprint() != other.fingerprint()
    bound = math.sqrt(6 / (9 * (first.classifier.head.in_features + 4)))  # Xavier's
    weight = first.activation.weight.detach()
    assert 0.99 * bound < float(weight.abs().max()) <= bound


# -- Pairs --------------------------------------------------------------------------------------


def test_pairs_share_a_class() -> None:
    found = labelled((0,), (0, 1), (1,), (2,), (), (0, 1), (1,))
    pairs = pairs_of(found, 30, 2, 0)
    assert len(pairs) == 60
    for pair in pairs:
        assert pair.first != pair.second
        assert pair.label in found[pair.first].labels
        assert pair.label in found[pair.second].labels
    assert {pair.first for pair in pairs} == {0, 1, 2, 5, 6}


def test_every_image_comes_first_once_an_epoch() -> None:
    items = labelled(*[(k % 2,) for k in range(6)])
    pairs = pairs_of(items, 9, 2, 3)  # three epochs of three steps
    epochs = [pairs[start : start + 6] for start in (0, 6, 12)]
    for epoch in epochs:
        assert sorted(pair.first for pair in epoch) == list(range(6))
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert pairs == pairs_of(items, 9, 2, 3) != pairs_of(items, 9, 2, 4)


def test_partners_are_drawn_evenly() -> None:
    items = labelled((0, 1), (0,), (0,), (1,), (2,))
    partners = Partners(items)
    generator = np.random.default_rng(0)
    counts = Counter(partners.draw(0, generator) for _ in range(4000))
    assert set(counts) == {Pair(0, 1, 0), Pair(0, 2, 0), Pair(0, 3, 1)}
    assert counts[Pair(0, 3, 1)] / 4000 == pytest.approx(1 / 2, abs=0.04)
    assert counts[Pair(0, 1, 0)] / 4000 == pytest.approx(1 / 4, abs=0.04)


@pytest.mark.parametrize("labels", [(), ((0,), (1,), ()), ((0, 1),)])
def test_no_two_images_of_a_class(labels: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(DataError, match=f"among {len(labels)} images no two share a class"):
        pairs_of(labelled(*labels), 3, 1, 0)


# -- Training -----------------------------------------------------------------------------------


def test_training_takes_the_pairs(
    fresh: Any, items: list[Item], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The images and labels of each step are those of :func:`pairs_of`."""
    seen: list[Tensor] = []
    entropy = F.binary_cross_entropy_with_logits

    def record(logits: Tensor, target: Tensor) -> Tensor:
        seen.append(target)
        return entropy(logits, target)

    monkeypatch.setattr(F, "binary_cross_entropy_with_logits", record)
    train_edam(fresh(), items, SETTINGS, seed=5, folder=tmp_path)
    pairs = pairs_of(items, SETTINGS.iterations, SETTINGS.pairs, 5)
    expected = [items[number].labels for pair in pairs for number in pair[:2]]
    found = [tuple(row.nonzero()[:, 0].tolist()) for target in seen for row in target]
    assert found == expected


def test_loss_falls(fresh: Any, items: list[Item], tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(
        update={"iterations": 120, "learning_rate": 0.05, "jitter": (0.0,) * 4, "dropout": 0.0}
    )
    network = fresh(settings)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    history = train_edam(network, items, settings, seed=0, folder=tmp_path)
    assert [record["step"] for record in history] == list(range(4, 121, 4))
    losses = [record["loss"] for record in history]
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])
    assert not network.training
    modules = network.named_modules()
    norms = {name for name, module in modules if isinstance(module, torch.nn.BatchNorm2d)}
    for name, value in network.state_dict().items():
        inner = name.removeprefix("classifier.backbone.")
        fixed = name.rpartition(".")[0] in norms or name == "classifier.head.weight"
        frozen = fixed or inner.startswith("conv1.")
        if not name.endswith("key.bias"):  # which no softmax feels
            assert torch.equal(value, before[name]) == frozen, name


def test_optimiser_of_the_specification(
    fresh: Any, items: list[Item], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[dict[str, Any]]] = []
    step = torch.optim.SGD.step

    def record(self: torch.optim.SGD, *arguments: Any) -> Any:
        seen.append([dict(group) for group in self.param_groups])
        return step(self, *arguments)

    monkeypatch.setattr(torch.optim.SGD, "step", record)
    network = fresh()
    train_edam(network, items, SETTINGS, seed=0, folder=tmp_path)
    factors = [0.1, 0.55, 1.0, 0.75**0.9, 0.5**0.9, 0.25**0.9]
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    held = set()
    for groups, factor in zip(seen, factors, strict=True):
        for group in groups:
            assert group["momentum"] == 0.9
            for parameter in group["params"]:
                name = names[id(parameter)]
                held.add(name)
                head = name in ("activation.weight", "reduction.weight", "logits.weight")
                bias = name.endswith("bias")
                rate = 1e-3 * (10 if head else 1) * (2 if bias else 1)
                assert group["lr"] == pytest.approx(rate * factor), name
                assert group["weight_decay"] == (0 if bias else 5e-4), name
    trained = {name for name, p in network.named_parameters() if p.requires_grad}
    assert held == trained
    assert any(name.startswith("classifier.backbone.layer4") for name in trained)


def test_warm_up_longer_than_the_training() -> None:
    settings = SETTINGS.model_copy(update={"warmup": 10})
    factors = [edam.learning_rate_factor(step, settings) for step in range(6)]
    assert factors == pytest.approx([0.1, 0.19, 0.28, 0.37, 0.46, 0.55])
    none = SETTINGS.model_copy(update={"warmup": 0})
    assert edam.learning_rate_factor(0, none) == 1.0


@pytest.mark.parametrize("stopped_at", [1, 4])
def test_going_on_gives_the_same_bytes(
    fresh: Any,
    items: list[Item],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stopped_at: int,
) -> None:
    monkeypatch.setattr(engine, "CHECKPOINT_STEPS", 1)
    whole = fresh()
    history = train_edam(whole, items, SETTINGS, seed=0, folder=tmp_path / "whole")
    factor, stopped = edam.learning_rate_factor, fresh()

    def stop(step: int, settings: EdamSettings) -> float:
        if step == stopped_at:
            raise KeyboardInterrupt
        return factor(step, settings)

    with monkeypatch.context() as patched:
        patched.setattr(edam, "learning_rate_factor", stop)
        with pytest.raises(KeyboardInterrupt):
            train_edam(stopped, items, SETTINGS, seed=0, folder=tmp_path / "stopped")
    again = fresh()
    assert train_edam(again, items, SETTINGS, seed=0, folder=tmp_path / "stopped") == history
    assert again.fingerprint() == whole.fingerprint()


def test_several_processes_make_the_same_step(
    fresh: Any, items: list[Item], tmp_path: Path
) -> None:
    settings = SETTINGS.model_copy(update={"dropout": 0.0, "pairs": 3, "learning_rate": 0.05})
    alone = fresh(settings)
    history = train_edam(alone, items, settings, seed=0, folder=tmp_path / "alone")

    own = [fresh(settings), fresh(settings)]  # here, for threads share the generator

    def work(processes: Processes) -> list[dict[str, Any]]:
        folder = tmp_path / str(processes.rank)
        network = own[processes.rank]
        return train_edam(network, items, settings, seed=0, folder=folder, processes=processes)

    for network, found in zip(own, together(2, work), strict=True):
        for record, wanted in zip(found, history, strict=True):
            assert record == pytest.approx(wanted, abs=1e-5)
        for name, value in network.state_dict().items():
            torch.testing.assert_close(value, alone.state_dict()[name], atol=1e-5, rtol=1e-3)
    moved = (alone.activation.weight - fresh(settings).activation.weight).detach().abs().max()
    assert float(moved) > 1e-3  # more than the tolerance above


def test_labels_of_no_class(fresh: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"2 images have labels .* 3 classes: i0, i1"):
        train_edam(fresh(), labelled((7,), (7,), (1,)), SETTINGS, seed=0, folder=tmp_path)


def test_stages_that_are_not_there(fresh: Any, items: list[Item], tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(update={"freeze": ("conv1a",)})
    with pytest.raises(ClassifierError, match="no parameter of the backbone is below 'conv1a'"):
        train_edam(fresh(), items, settings, seed=0, folder=tmp_path)


@pytest.mark.parametrize("size", [(30, 70), (90, 20), (48, 48), (3, 200)])
def test_augmented_images(size: tuple[int, int]) -> None:
    image = np.random.default_rng(0).integers(0, 256, (*size, 3)).astype(np.uint8)
    found = edam.augment(image, RAW, SETTINGS, np.random.default_rng(1))
    assert found.shape == (3, 48, 48)
    assert found.dtype == torch.float32
    assert bool((found != 0).any())
    again = edam.augment(image, RAW, SETTINGS, np.random.default_rng(1))
    assert torch.equal(found, again)
    assert not torch.equal(found, edam.augment(image, RAW, SETTINGS, np.random.default_rng(2)))


def test_colours_are_those_of_the_resized_image() -> None:
    """Section 2: a change that clips does not commute with the filter that resizes."""
    image = np.zeros((60, 60, 3), np.uint8)
    image[:, ::2] = 250
    settings = SETTINGS.model_copy(
        update={"jitter": (1.0, 0.0, 0.0, 0.0), "long_side": (30, 30), "crop": 30}
    )
    found = [
        edam.augment(image, RAW, settings, np.random.default_rng(seed)) * 127.5 + 127.5
        for seed in range(20)
    ]
    brightest = max(float(levels.median()) for levels in found)
    assert brightest > 200  # of a grey of 125; of black and white, first clipped, it were 127


def test_augmented_colours() -> None:
    image = np.full((60, 60, 3), (90, 120, 160), np.uint8)
    still = SETTINGS.model_copy(update={"jitter": (0.0,) * 4, "long_side": (60, 60)})
    lit = still.model_copy(update={"jitter": (0.3, 0.0, 0.0, 0.0)})
    plain, *changed = (
        edam.augment(image, RAW, settings, np.random.default_rng(seed)) * 127.5 + 127.5
        for seed, settings in enumerate([still, *[lit] * 20])
    )
    assert torch.equal(plain[:, 5, 5].round(), torch.tensor([90.0, 120.0, 160.0]))
    levels = [float(found[1, 5, 5]) / 120 for found in changed]
    assert 0.69 <= min(levels) < 0.8
    assert 1.2 < max(levels) <= 1.31


# -- Files --------------------------------------------------------------------------------------


def test_saved_network_is_read_again(fresh: Any, tmp_path: Path) -> None:
    network = fresh()
    path = tmp_path / "edam.safetensors"
    network.save(path, {"by": "a test"})
    read = Edam.load(path)
    assert read.classes == CLASSES
    assert read.preprocessing == network.preprocessing
    assert read.fingerprint() == network.fingerprint()
    assert read.device.type == "cpu"
    images = drawn(2, 3, 48, 48)
    assert torch.equal(read(images), network(images))


def test_files_of_something_else(
    fresh: Any, classifier: Classifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "other.safetensors"
    classifier.save(path)
    with pytest.raises(ArtefactError, match="holds 'classifier', not a network of EDAM"):
        Edam.load(path)
    network = fresh()
    monkeypatch.setitem(network.sizes, "width", 16)
    network.save(path)
    with pytest.raises(ArtefactError, match="does not fit its own description"):
        Edam.load(path)
    with pytest.raises(ClassifierError, match="passed in or folded"):
        fresh().folded().save(path)


# -- Maps ---------------------------------------------------------------------------------------


def test_maps_are_those_of_the_specification(fresh: Any, items: list[Item]) -> None:
    """As released: each scale and mirror image is enlarged to the image, and all are summed."""
    network, image = fresh(), read_image(items[0].image)
    size = image.shape[:2]
    total = torch.zeros(3, *size)
    for scale in SETTINGS.scales:
        part = resize_image(image, (round(size[0] * scale), round(size[1] * scale)))
        tensor = network.preprocessing(part)[None]
        for flipped in (False, True):
            given = tensor.flip(-1) if flipped else tensor
            masks = network.masks(network.classifier.features(given))[:, :3].detach()
            large = F.interpolate(masks, size, mode="bilinear", align_corners=False)[0]
            total += large.flip(-1) if flipped else large
    found = maps_of(network, image, [0, 2], SETTINGS)
    expected = total[[0, 2]] / total[[0, 2]].amax((1, 2), keepdim=True)
    torch.testing.assert_close(found.high_res, expected, atol=1e-5, rtol=1e-5)
    assert found.cam.shape == (2, -(-size[0] // 4), -(-size[1] // 4))
    for maps in found:
        assert float(maps.min()) >= 0
        torch.testing.assert_close(maps.amax((1, 2)), torch.ones(2))
        assert not maps.requires_grad


def test_maps_of_the_folded_network(fresh: Any, items: list[Item]) -> None:
    network, image = fresh(), read_image(items[1].image)
    whole, folded = (maps_of(n, image, [1], SETTINGS) for n in (network, network.folded()))
    torch.testing.assert_close(folded.high_res, whole.high_res, atol=1e-4, rtol=1e-3)


def test_damaged_weights_make_no_maps(fresh: Any) -> None:
    network = fresh()
    with torch.no_grad():
        network.activation.weight[0, 0] = torch.nan
    with pytest.raises(ClassifierError, match="activation layer gave NaN or Inf"):
        maps_of(network, np.zeros((40, 50, 3), np.uint8), [0], SETTINGS)


def test_maps_without_mirror_image_and_without_classes(fresh: Any) -> None:
    image = np.random.default_rng(0).integers(0, 256, (17, 5, 3)).astype(np.uint8)
    settings = SETTINGS.model_copy(update={"flip": False})
    found = maps_of(fresh(), image, [], settings)
    assert found.high_res.shape == (0, 17, 5)
    assert found.cam.shape == (0, 5, 2)
    assert maps_of(fresh(), image, [1], settings).high_res.shape == (1, 17, 5)


@pytest.mark.parametrize("labels", [[3], [-1]])
def test_maps_of_the_implicit_background(fresh: Any, labels: list[int]) -> None:
    with pytest.raises(DataError, match="not all among the network's 3 classes"):
        maps_of(fresh(), np.zeros((20, 20, 3), np.uint8), labels, SETTINGS)
