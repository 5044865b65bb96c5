"""WideResNet-38: layers, names and sizes; the segmenter on it; CAM, LPCAM and IRN on it."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from lpcam.classifiers.classifier import BackboneSpec, Preprocessing, build
from lpcam.classifiers.wideresnet38 import WideResNet38
from lpcam.pipeline.recipe import bundled_recipes, load_recipe
from lpcam.runtime.errors import ClassifierError
from lpcam.segmentation.networks.base import SegmenterSpec
from lpcam.segmentation.networks.wideresnet38 import NETWORK, WideResNet38LargeFov
from lpcam.training.optim import freeze

TINY = {"channels": [4, 6, 8, 10, 12, 16, 20], "depths": [2, 1, 2, 2]}
WHOLE = {"channels": TINY["channels"]}
"""Narrow, with as many blocks as the real one."""
SPEC = BackboneSpec("wideresnet38", TINY)
CLASSES = ("blue", "green")
SIZES = [(33, 41), (50, 39)]


def images(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def tiny(labels: int = 3, **options: object) -> WideResNet38LargeFov:
    options = {"arguments": TINY, "weights": "random", **options}
    spec = SegmenterSpec("wideresnet38", "wideresnet38", options.pop("arguments"))  # type: ignore[arg-type]
    return NETWORK.build(spec, labels, **options)[0]  # type: ignore[arg-type]


def cells(size: tuple[int, int], stride: int) -> tuple[int, int]:
    return -(-size[0] // stride), -(-size[1] // stride)


def test_the_number_of_weights_by_hand() -> None:
    with torch.device("meta"):
        backbone = timm.create_model("wideresnet38", num_classes=0)
        network = WideResNet38LargeFov(backbone, 21)
    square = 9
    convolutions = 3 * 64 * square
    norms = 0
    # b2 to b4: (channels before, after, blocks)
    for before, after, blocks in ((64, 128, 3), (128, 256, 3), (256, 512, 6)):
        convolutions += before * after * square + after * after * square + before * after
        convolutions += (blocks - 1) * 2 * after * after * square
        norms += before + after + (blocks - 1) * 2 * after
    # b5: 512, 512, 1024, then twice 1024, 512, 1024
    convolutions += (512 * 512 + 512 * 1024) * square + 512 * 1024
    convolutions += 2 * (1024 * 512 + 512 * 1024) * square
    norms += 512 + 512 + 2 * (1024 + 512)
    convolutions += 1024 * 512 + 512 * 1024 * square + 1024 * 2048 + 1024 * 2048  # b6
    norms += 1024 + 512 + 1024
    convolutions += 2048 * 1024 + 1024 * 2048 * square + 2048 * 4096 + 2048 * 4096  # b7
    norms += 2048 + 1024 + 2048 + 4096  # and bn7
    backbone_count = sum(p.numel() for p in backbone.parameters())
    assert backbone_count == convolutions + 2 * norms == 105_070_912
    head = 4096 * 512 * square + 512 + 512 * 21 * square + 21
    assert sum(p.numel() for p in network.parameters()) == backbone_count + head
    # 38 layers: the convolutions on the long way from the image, the shortcuts left out, and fc
    kernels = [n for n, p in backbone.named_parameters() if p.ndim == 4 and "branch1" not in n]
    assert len(kernels) + 1 == 38


def test_names_are_those_of_the_released_weights() -> None:
    with torch.device("meta"):
        names = set(timm.create_model("wideresnet38").state_dict())
    blocks = {name.split(".")[0] for name in names}
    plain = {
        *("b2", "b2_1", "b2_2", "b3", "b3_1", "b3_2"),
        *("b4", "b4_1", "b4_2", "b4_3", "b4_4", "b4_5", "b5", "b5_1", "b5_2"),
    }
    assert blocks == plain | {"conv1a", "b6", "b7", "bn7"}
    weights = {name for name in names if name.endswith(".weight")}
    expected = {"conv1a.weight", "bn7.weight"}
    for block in plain:
        parts = ["bn_branch2a", "conv_branch2a", "bn_branch2b1", "conv_branch2b1"]
        expected |= {f"{block}.{part}.weight" for part in parts}
    for block in ("b6", "b7"):
        parts = ["bn_branch2a", "conv_branch2a", "bn_branch2b1", "conv_branch2b1"]
        parts += ["bn_branch2b2", "conv_branch2b2"]
        expected |= {f"{block}.{part}.weight" for part in parts}
    expected |= {f"b{n}.conv_branch1.weight" for n in range(2, 8)}
    assert weights == expected
    assert not any(name.endswith("bias") for name in names if "conv" in name)


def test_strides_dilations_and_dropout() -> None:
    with torch.device("meta"):
        backbone = timm.create_model("wideresnet38")
    convolutions = {n: m for n, m in backbone.named_modules() if isinstance(m, nn.Conv2d)}
    strided = {n for n, m in convolutions.items() if m.stride == (2, 2)}
    assert strided == {f"b{n}.conv_branch{k}" for n in (2, 3, 4) for k in ("2a", "1")}
    dilations = {n: m.dilation[0] for n, m in convolutions.items() if m.dilation != (1, 1)}
    two = ["b5.conv_branch2b1", "b5_1.conv_branch2a", "b5_1.conv_branch2b1"]
    two += ["b5_2.conv_branch2a", "b5_2.conv_branch2b1"]
    four = {"b6.conv_branch2b1": 4, "b7.conv_branch2b1": 4}
    assert dilations == {**dict.fromkeys(two, 2), **four}
    dropouts = {n: m.p for n, m in backbone.named_modules() if isinstance(m, nn.Dropout2d)}
    assert sorted(dropouts.values()) == [0.3, 0.3, 0.5, 0.5]
    assert {n.split(".")[0] for n, p in dropouts.items() if p == 0.5} == {"b7"}


RECIPES = [
    name for name in bundled_recipes() if "wideresnet38" in str(load_recipe(name).classifier)
]


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_keep_dilations_and_train_what_the_specification_trains(name: str) -> None:
    """Sections 1 of EDAM and 4 of MCTformer: conv1a and all of b2 are frozen, later blocks not."""
    recipe = load_recipe(name)
    section = recipe.classifier
    spec = BackboneSpec(section.backbone, WHOLE, section.output_stride, section.dilated)
    backbone = build(spec, CLASSES, weights="random").backbone
    dilations = {
        n.split(".")[0]: m.dilation[0]
        for n, m in backbone.named_modules()
        if isinstance(m, nn.Conv2d) and m.dilation != (1, 1)
    }
    assert dilations == {"b5": 2, "b5_1": 2, "b5_2": 2, "b6": 4, "b7": 4}
    lists = [section.finetune.freeze]
    if recipe.refine is not None and recipe.refine.method == "psa":
        lists.append(recipe.refine.psa.freeze)
    if recipe.host is not None and recipe.host.method == "edam":
        lists.append(recipe.host.edam.freeze)
    assert len(lists) == 2
    for prefixes in lists:
        freeze(backbone, prefixes)
        trained = {n.split(".")[0] for n, p in backbone.named_parameters() if p.requires_grad}
        frozen = {n.split(".")[0] for n, p in backbone.named_parameters() if not p.requires_grad}
        assert frozen == {"conv1a", "b2", "b2_1", "b2_2"}
        assert {"b3", "b3_1", "b7", "bn7"} <= trained


def test_a_stage_without_output_stride_has_the_dilations_in_its_key() -> None:
    changes = {"classifier.dilated": False, "classifier.weights": "random"}
    section = load_recipe(RECIPES[0], changes).classifier
    strided = section.model_copy(update={"backbone": "resnet18", "output_stride": 16})
    for one, dilated in ((section, True), (strided, False)):
        assert one.spec().dilated is one.described()["dilated"] is dilated


@pytest.mark.parametrize("size", SIZES)
def test_features_and_intermediate_maps_at_any_size(size: tuple[int, int]) -> None:
    backbone = timm.create_model("wideresnet38", **TINY).eval()
    x = images(2, 3, *size)
    with torch.no_grad():
        features = backbone.forward_features(x)
        maps = backbone.forward_intermediates(x, intermediates_only=True)
        assert features.shape == (2, 20, *cells(size, 8))
        expected = [(6, 2), (8, 4), (10, 8), (12, 8), (20, 8)]
        assert [m.shape[1:] for m in maps] == [(c, *cells(size, s)) for c, s in expected]
        assert all(bool((m >= 0).all()) for m in maps)
        assert torch.equal(maps[-1], features)
        last, some = backbone.forward_intermediates(x, indices=[1, -1])
        assert torch.equal(last, features)
        assert torch.equal(some[0], maps[1])
        assert torch.equal(some[1], features)
        early = backbone.forward_intermediates(
            x, indices=[0, 2], stop_early=True, intermediates_only=True
        )
        assert [torch.equal(a, b) for a, b in zip(early, (maps[0], maps[2]), strict=True)]
        (final,) = backbone.forward_intermediates(x, indices=1, intermediates_only=True)
        assert torch.equal(final, features)


def test_a_block_by_hand() -> None:
    """Batch norm, ReLU, convolution twice; the shortcut takes the activated input."""
    backbone = WideResNet38(**TINY).eval()  # type: ignore[arg-type]
    for norm in (m for m in backbone.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    changing, same, x = backbone.b2, backbone.b2_1, images(1, 4, 9, 7)

    def branch(block: nn.Module, active: Tensor) -> Tensor:
        middle = block.get_submodule("bn_branch2b1")(block.get_submodule("conv_branch2a")(active))
        found: Tensor = block.get_submodule("conv_branch2b1")(middle.relu())
        return found

    with torch.no_grad():
        active = changing.get_submodule("bn_branch2a")(x).relu()  # type: ignore[union-attr]
        shortcut = changing.get_submodule("conv_branch1")(active)  # type: ignore[union-attr]
        y = changing(x)  # type: ignore[operator]
        assert torch.allclose(y, shortcut + branch(changing, active), atol=1e-6)  # type: ignore[arg-type]
        active = same.get_submodule("bn_branch2a")(y).relu()  # type: ignore[union-attr]
        assert torch.allclose(same(y), y + branch(same, active), atol=1e-6)  # type: ignore[operator,arg-type]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"channels": [4, 6]}, "7 and 4 positive integers"),
        ({"depths": [1, 1, 1, 0]}, "7 and 4 positive integers"),
        ({"channels": [4, 6, 8, 10, 11, 16, 20]}, "the fifth channel even"),
        ({"output_stride": 16}, "output stride 8 alone"),
        ({"width": 3}, "width"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ClassifierError, match=message):
        build(BackboneSpec("wideresnet38", arguments), CLASSES, weights="random")


def test_a_classifier_is_folded() -> None:
    made = build(SPEC, CLASSES, weights="random")
    assert made.preprocessing == Preprocessing((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    folded, x = made.folded(), images(2, 3, 45, 61)
    assert len(list(folded.parameters())) < len(list(made.parameters()))
    with torch.no_grad():
        assert torch.allclose(folded(x), made(x), atol=1e-5)


@pytest.mark.parametrize("size", SIZES)
def test_logits_at_stride_8(size: tuple[int, int]) -> None:
    network, x = tiny(), images(2, 3, *size)
    with torch.no_grad():
        logits = network(x)
        ((trained, weight),) = network.outputs(x)
        assert logits.shape == (2, 3, *cells(size, 8))
        assert torch.equal(trained, logits) and weight == 1.0


def test_the_head_is_two_dilated_convolutions() -> None:
    network = tiny()
    features = images(1, 20, 5, 6)
    layers = (network.fc1, network.fc2)
    assert [(m.kernel_size, m.dilation, m.padding) for m in layers] == [
        ((3, 3), (12, 12), (12, 12))
    ] * 2
    assert network.fc1.weight.shape == (512, 20, 3, 3)
    assert network.fc2.weight.shape == (3, 512, 3, 3)
    bound = (6 / (9 * 20 + 9 * 512)) ** 0.5  # Xavier
    assert 0.99 * bound < float(network.fc1.weight.detach().abs().max()) <= bound
    network.backbone.forward_features = lambda _: features  # type: ignore[method-assign]
    with torch.no_grad():
        # 12 cells away there is padding alone, so only the middle taps count
        one, two = (partial(F.conv2d, weight=m.weight[..., 1:2, 1:2], bias=m.bias) for m in layers)
        expected = two(one(features).relu())
        assert torch.allclose(network(images(1, 3, 32, 32)), expected, atol=1e-5)


def state_of(network: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    return {
        k.removeprefix(prefix): v.clone()
        for k, v in network.state_dict().items()
        if k.startswith(prefix)
    }


def test_a_file_of_the_backbone(tmp_path: Path) -> None:
    source, path = tiny(seed=5), tmp_path / "w.safetensors"
    state = state_of(source, "backbone.")
    # what old programs write: no counters of batches, and a classification head
    state = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    save_file({**state, "fc8.weight": torch.zeros(20, 20, 1, 1)}, path)
    network = tiny(weights=path)
    for name, tensor in state.items():
        assert torch.equal(network.backbone.state_dict()[name], tensor), name
    assert torch.equal(network.fc1.weight, tiny().fc1.weight)
    made = build(SPEC, CLASSES, weights=path)
    assert torch.equal(
        made.backbone.state_dict()["b7.conv_branch1.weight"], state["b7.conv_branch1.weight"]
    )


def test_a_file_with_the_head(tmp_path: Path) -> None:
    source, path = tiny(seed=5), tmp_path / "w.safetensors"
    state = state_of(source, "backbone.")
    state.update({f"fc1.{k}": v for k, v in state_of(source.fc1).items()})
    state.update({f"fc2.{k}": v for k, v in state_of(source.fc2).items()})
    save_file(state, path)
    x = images(1, 3, 40, 48)
    with torch.no_grad():
        assert torch.equal(tiny(weights=path)(x), source(x))
    with pytest.raises(ClassifierError, match=r"2 of another shape \(first: fc2.bias\)"):
        tiny(labels=4, weights=path)
    del state["fc1.weight"]
    save_file(state, path)
    with pytest.raises(ClassifierError, match=r"1 missing \(first: fc1.weight\)"):
        tiny(weights=path)


def test_a_file_of_a_classifier_of_this_package(tmp_path: Path) -> None:
    made, path = (
        build(SPEC, CLASSES, weights="random", mean=[0.5] * 3, seed=7),
        tmp_path / "c.safetensors",
    )
    made.save(path)
    spec = SegmenterSpec("wideresnet38", "wideresnet38", TINY)
    network, preprocessing = NETWORK.build(spec, 3, weights=path)
    x = images(1, 3, 40, 48)
    with torch.no_grad():
        assert torch.equal(network.backbone(x), made.features(x))
    assert preprocessing == made.preprocessing
    with pytest.raises(ClassifierError, match="arguments"):
        tiny(arguments={}, weights=path)
    other = build(BackboneSpec("test_resnet", {}), CLASSES, weights="random")
    other.save(path)
    with pytest.raises(ClassifierError, match=r"\d+ missing"):
        tiny(weights=path)
