"""Every official recipe's networks, optimisers and lengths are those of the specifications."""

from __future__ import annotations

from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from parity.golden import load_json
from torch import Tensor, nn

from lpcam.classifiers.classifier import Classifier, build
from lpcam.classifiers.finetuning import finetune
from lpcam.data.dataset import ClassTable, Item
from lpcam.data.masks import write_mask
from lpcam.hosts.base import HostData
from lpcam.pipeline.recipe import bundled_recipes, load_recipe
from lpcam.pipeline.released import released_kinds
from lpcam.refine.base import Tools
from lpcam.runtime.distributed import Sharing
from lpcam.segmentation.networks.base import SegmenterSpec
from lpcam.segmentation.networks.registry import NETWORKS
from lpcam.segmentation.training import optimizer_of, plan_of
from lpcam.training import loop as engine
from lpcam.training.released import recognised

RECIPES = [name for name in bundled_recipes() if name.endswith((".official", ".paper"))]
KINDS = released_kinds()
IMAGES = {"voc12": 10_582, "coco14": 82_783}
CLASSES = {"voc12": 20, "coco14": 80}
Group = tuple[float, float]
"""Learning rate and weight decay."""


@pytest.fixture(autouse=True)
def cheap_first_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Constants in place of random numbers, which take most of the time here."""

    def fill(tensor: Tensor, *_: Any, **__: Any) -> Tensor:
        with torch.no_grad():
            return tensor.fill_(0.01)

    for name in ("kaiming_normal_", "kaiming_uniform_", "xavier_uniform_", "normal_", "uniform_"):
        monkeypatch.setattr(nn.init, name, fill)


class StoppedError(Exception):
    """Raised in place of a training."""


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The optimiser and the plan of the last training, none of which takes a step."""
    found: list[Any] = []

    def run(
        module: Any, optimizer: Any, make: Any, count: int, loss: Any, plan: Any, **_: Any
    ) -> Any:
        found[:] = [optimizer, plan]
        raise StoppedError

    monkeypatch.setattr(engine, "run", run)
    return found


def groups(optimizer: torch.optim.Optimizer) -> dict[Group, int]:
    """Number of tensors at each learning rate and weight decay."""
    found: Counter[Group] = Counter()
    for group in optimizer.param_groups:
        found[round(group["lr"], 9), group["weight_decay"]] += len(group["params"])
    return dict(found)


def momentum(optimizer: torch.optim.Optimizer) -> float:
    return float(optimizer.param_groups[0]["momentum"])


def check_names(network: nn.Module, name: str, classes: int | None = None) -> None:
    """Load tensors of the released names and shapes, with another number of classes if given."""
    golden = load_json(f"names/{name}")
    dtypes = golden.get("not_float32", {})
    state = {
        key: torch.zeros((), dtype=getattr(torch, dtypes.get(key, "float32"))).expand(
            shape if classes is None else [{20: classes, 21: classes + 1}.get(n, n) for n in shape]
        )
        for key, shape in golden["names"].items()
    }
    state |= {later: state[first] for later, first in golden.get("same_tensor", {}).items()}
    kind = recognised(state, KINDS)
    assert kind is not None
    kind.load(network, state)


def dilations(network: nn.Module) -> dict[int, int]:
    """Number of convolutions of each dilation above 1."""
    layers = (m for m in network.modules() if isinstance(m, nn.Conv2d))
    return dict(Counter(m.dilation[0] for m in layers if m.dilation[0] > 1))


def numbered(data: str) -> list[str]:
    return [f"class {n}" for n in range(CLASSES[data])]


WIDE = {2: 5, 4: 2}
"""Dilations of WideResNet-38: b5 with its two further blocks, b6, b7."""


@cache
def network_of(data: str, backbone: str) -> Classifier:
    name = (
        "voc12-mctformer.official"
        if backbone == "wideresnet38"
        else f"{data}-resnet50-irn.official"
    )
    section = load_recipe(name).classifier
    return build(section.spec(), numbered(data), weights="random")


@pytest.mark.parametrize("name", RECIPES)
def test_maps_and_thresholds(name: str) -> None:
    recipe, data = load_recipe(name), name.split("-", maxsplit=1)[0]
    assert (recipe.maps.dtype, recipe.maps.features) == ("float16", "float32")
    assert recipe.lpcam.preset == f"{data}.official"
    assert (recipe.lpcam.cam_threshold, recipe.lpcam.threshold) == (0.15, 0.3)
    assert recipe.lpcam.max_features is None
    every = "train_aug" if data == "voc12" else "train2014"
    assert {recipe.data.list_of("classify"), recipe.data.list_of("maps")} == {every}


@pytest.mark.parametrize(
    ("data", "backbone", "stride", "rates", "steps"),
    [
        ("voc12", "resnet50.tv_in1k", 16, {(0.1, 1e-4): 156, (1.0, 1e-4): 1}, 3_305),
        ("coco14", "resnet50.tv_in1k", 16, {(0.1, 1e-4): 156, (1.0, 1e-4): 1}, 25_865),
        ("voc12", "wideresnet38", 8, {(0.1, 5e-4): 35, (1.0, 5e-4): 1}, 9_915),
    ],
)
def test_classifiers(
    data: str,
    backbone: str,
    stride: int,
    rates: dict[Group, int],
    steps: int,
    trained: list[Any],
) -> None:
    uses = [r for n in RECIPES if n.startswith(data) and (r := load_recipe(n))]
    given = {"weights", "trained"}  # of one recipe it is the published classifier's file
    own = [r.classifier for r in uses if r.classifier.backbone == backbone]
    sections = {section.model_dump_json(exclude=given) for section in own}
    assert len(sections) == 1  # one classifier for all recipes
    (recipe, *_) = (r for r in uses if r.classifier.backbone == backbone)
    network, classes = network_of(data, backbone), CLASSES[data]
    wide = backbone == "wideresnet38"
    check_names(network, "psa_classifier" if wide else f"lpcam_classifier_{classes}")
    with torch.no_grad():
        assert network.features(torch.zeros(1, 3, 96, 64)).shape[2:] == (96 // stride, 64 // stride)
    assert dilations(network) == (WIDE if wide else {})
    items = [Item("one", Path("one.png"), (0,))] * IMAGES[data]
    with pytest.raises(StoppedError):
        finetune(network, items, [], recipe.classifier.finetune, seed=0, folder=Path())
    optimizer, plan = trained
    assert groups(optimizer) == rates
    assert momentum(optimizer) == (5e-4 if wide else 1e-4)
    assert (plan.steps, plan.batch) == (steps, 16)
    assert plan.rate(steps // 2) == pytest.approx((1 - (steps // 2) / steps) ** 0.9)


HOSTS: dict[str, tuple[str, dict[Group, int], int | None]] = {
    "voc12-amn.official": ("amn", {(5e-6, 1e-4): 156, (1e-4, 1e-4): 10}, 5 * 2),
    "coco14-amn.official": ("amn", {(5e-6, 1e-4): 156, (1e-4, 1e-4): 10}, 5 * 2),
    # the twenty logits are one tensor here; the released program has 22 at the tenfold rate
    "voc12-edam-network.official": ("edam", {(1e-3, 5e-4): 356, (1e-2, 5e-4): 3}, 33_050),
    # without the final norm, which the released program has and does not use
    "voc12-mctformer.official": ("mctformer_v2_20", {(6.25e-5, 0.05): 50, (6.25e-5, 0.0): 100}, 0),
    "coco14-mctformer.official": ("mctformer_v2_80", {(6.25e-5, 0.05): 50, (6.25e-5, 0.0): 100}, 0),
}


@pytest.mark.parametrize("name", HOSTS)
def test_hosts(name: str, trained: list[Any], tmp_path: Path) -> None:
    golden, rates, steps = HOSTS[name]
    recipe, data = load_recipe(name), name.split("-", maxsplit=1)[0]
    section = recipe.host
    assert section is not None
    chosen = recipe.classifier if section.backbone is None else section
    table = ClassTable.numbered(numbered(data), "test")
    host = section.host
    network = host.build(chosen.spec(), table.names, section.settings, weights="random", seed=0)
    check_names(network, golden, 80 if (data, golden) == ("coco14", "amn") else None)
    if golden == "amn":
        assert dilations(network) == {6: 1, 12: 1, 18: 1, 24: 1}
    elif golden == "edam":
        assert dilations(network) == WIDE
    write_mask(tmp_path / "a.png", np.array([[0, 1, 255]], np.uint8))
    items = [Item(f"i{n}", tmp_path / "a.png", (0,)) for n in range(32)]
    pairs = [(item, tmp_path / "a.png") for item in items]
    with pytest.raises(StoppedError):
        host.train(
            network, HostData(items, [], pairs, table), section.settings, seed=0, folder=tmp_path
        )
    optimizer, plan = trained
    assert groups(optimizer) == rates
    assert plan.steps == (steps or 60)  # MCTformer's 64 of a batch are the 32 images here
    kind = {"a": torch.optim.Adam, "e": torch.optim.SGD, "m": torch.optim.AdamW}[golden[0]]
    assert type(optimizer) is kind


REFINED: dict[str, tuple[str, dict[Group, int], float, int]] = {
    "irn": ("irn", {(0.1, 1e-4): 17, (1.0, 1e-4): 22}, 1e-4, 3),
    "psa": ("psa_affinity", {(0.01, 5e-4): 35, (0.1, 5e-4): 4}, 5e-4, 5),
}


@pytest.mark.parametrize(
    "name",
    ["voc12-resnet50-irn.official", "coco14-resnet50-irn.official", "voc12-mctformer.official"],
)
def test_refinements(name: str, trained: list[Any], tmp_path: Path) -> None:
    recipe, data = load_recipe(name), name.split("-", maxsplit=1)[0]
    section = recipe.refine
    assert section is not None
    golden, rates, slip, epochs = REFINED[section.method]
    classifier = network_of(data, recipe.classifier.backbone)
    random = recipe.classifier.model_copy(update={"weights": "random"})
    tools = Tools(
        device=torch.device("cpu"),
        classes=ClassTable.numbered(numbered(data), "test"),
        backbone=random,
        classifier=lambda: classifier,
        untrained=lambda: classifier,
        seed=0,
        items=[],
        sharing=Sharing(),
        memory=None,
        saliency=None,
    )
    method: Any = section.refinement
    network = method.build(section, tools)
    check_names(network, golden)
    labelled = [(Item("one", tmp_path / "one.png", (0,)), tmp_path)] * IMAGES[data]
    with pytest.raises(StoppedError):
        method.train(network, labelled, section, seed=0, folder=tmp_path)
    optimizer, plan = trained
    batch = 32 if section.method == "irn" else 8
    assert groups(optimizer) == rates
    assert momentum(optimizer) == slip
    assert (plan.steps, plan.batch) == (epochs * (IMAGES[data] // batch), batch)


SEGMENTERS = [name for name in RECIPES if load_recipe(name).segment is not None]


@pytest.mark.parametrize("name", SEGMENTERS)
def test_segmenters(name: str) -> None:
    recipe, data = load_recipe(name), name.split("-", maxsplit=1)[0]
    section = recipe.segment
    assert section is not None
    settings, labels = section.training, CLASSES[data] + 1
    large = data == "coco14"
    plan = plan_of(settings, IMAGES[data])
    if section.network == "upernet":  # its groups are in test_trainings
        assert (plan.steps, plan.batch) == (80_000 if large else 40_000, 16)
        assert plan.rate(1_500) == pytest.approx(1 - 1_500 / plan.steps)
        assert plan.rate(0) == pytest.approx(1e-6)
        return
    spec = SegmenterSpec(
        section.network, section.backbone or section.network, {}, None, settings.pyramid
    )
    network, preprocessing = NETWORKS[section.network].build(spec, labels, weights="random")
    optimizer = optimizer_of(network.parameter_groups(), settings)  # type: ignore[operator]
    if section.network == "deeplabv2":
        rate = 2e-4 if large else 2.5e-4
        expected = {(rate, 5e-4): 104, (rate * 10, 5e-4): 4, (rate * 20, 0.0): 4}
        assert (plan.steps, plan.batch, plan.accumulation) == (
            (100_000, 20, 2) if large else (20_000, 10, 2)
        )
        assert plan.rate(19) == plan.rate(10) != plan.rate(9)
        assert momentum(optimizer) == 0.9
        assert preprocessing.mean == pytest.approx([m / 255 for m in (122.675, 116.669, 104.008)])
        assert dilations(network) == {2: 23, 4: 3, 6: 1, 12: 1, 18: 1, 24: 1}
        shapes = {n: tuple(p.shape) for n, p in network.named_parameters() if "aspp" in n}
        assert {s for n, s in shapes.items() if n.endswith("weight")} == {(labels, 2048, 3, 3)}
    else:
        expected = {(7e-4, 0.0): 42, (7e-3, 0.0): 4}
        assert (plan.steps, plan.batch) == (30 * (IMAGES[data] // 4), 4)
        assert momentum(optimizer) == 1e-5
        check_names(
            nn.ModuleDict({"network": network}), "wideresnet38_segmenter", 80 if large else None
        )
        assert dilations(network) == {**WIDE, 12: 2}
    assert {(round(lr, 9), decay): n for (lr, decay), n in expected.items()} == groups(optimizer)
    with torch.no_grad():
        assert network(torch.zeros(1, 3, 65, 65)).shape == (1, labels, 9, 9)
