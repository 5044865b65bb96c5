"""DeepLabV2: the Caffe ResNet-101, the summed ASPP, the pyramid, and weights of any origin."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from lpcam.classifiers.classifier import RANDOM, Preprocessing
from lpcam.runtime.errors import ClassifierError
from lpcam.segmentation.networks.base import SegmenterSpec
from lpcam.segmentation.networks.deeplabv2 import (
    BLOCKS,
    CAFFE,
    DILATIONS,
    NETWORK,
    STRIDES,
    Aspp,
    CaffeResNet101,
    DeepLabV2,
    convert_names,
)

TINY = {"blocks": [1, 1, 1, 1], "width": 8}
PYRAMID = (0.5, 0.75)


def build(backbone: str, labels: int, **options: Any) -> tuple[DeepLabV2, Preprocessing]:
    names = ("arguments", "output_stride", "pyramid")
    chosen = {name: options.pop(name) for name in names if name in options}
    spec = SegmenterSpec("deeplabv2", backbone, **{"arguments": {}, **chosen})
    return NETWORK.build(spec, labels, **options)


def tiny(labels: int = 4, **options: Any) -> DeepLabV2:
    """A random Caffe network of one narrow block a stage."""
    options = {"arguments": TINY, "weights": RANDOM, "pyramid": PYRAMID, **options}
    return build(CAFFE, labels, **options)[0]


def images(*shape: int, seed: int = 0) -> Tensor:
    """Colours from 0 to 255 minus their mean, about."""
    return 60.0 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def whole() -> DeepLabV2:
    """The whole ResNet-101, with shapes but without numbers."""
    with torch.device("meta"):
        backbone = CaffeResNet101()
        return DeepLabV2(backbone, backbone.channels, 21, pyramid=PYRAMID)


def test_number_of_parameters(whole: DeepLabV2) -> None:
    expected = 3 * 64 * 7 * 7 + 2 * 64
    inputs = 64
    for count, middle in zip((3, 4, 23, 3), (64, 128, 256, 512), strict=True):
        outputs = 4 * middle
        expected += inputs * outputs + 2 * outputs  # the projection
        for _ in range(count):
            expected += inputs * middle + 9 * middle**2 + middle * outputs
            expected += 2 * (middle + middle + outputs)
            inputs = outputs
    assert expected == 42_500_160
    assert sum(p.numel() for p in whole.backbone.parameters()) == expected
    expected += 4 * (9 * 2048 * 21 + 21)
    assert sum(p.numel() for p in whole.parameters()) == expected == 44_048_532


def test_names_and_shapes_are_those_of_the_public_weights(whole: DeepLabV2) -> None:
    units = ["layer1.conv1"]
    for stage, count in enumerate(BLOCKS, start=2):
        for block in range(1, count + 1):
            parts = ["reduce", "conv3x3", "increase"] + ["shortcut"] * (block == 1)
            units += [f"layer{stage}.block{block}.{part}" for part in parts]
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    names = {f"{unit}.conv.weight" for unit in units}
    names |= {f"{unit}.bn.{name}" for unit in units for name in norm}
    state = whole.backbone.state_dict()
    assert set(state) == names
    assert state["layer4.block23.conv3x3.conv.weight"].shape == (256, 256, 3, 3)
    assert state["layer3.block1.shortcut.conv.weight"].shape == (512, 256, 1, 1)
    assert {k: tuple(v.shape) for k, v in whole.aspp.state_dict().items()} == {
        f"c{n}.{name}": shape
        for n in range(4)
        for name, shape in (("weight", (21, 2048, 3, 3)), ("bias", (21,)))
    }


def test_strides_and_dilations(whole: DeepLabV2) -> None:
    for number, (stride, dilation) in enumerate(zip((1, 2, 1, 1), (1, 1, 2, 4), strict=True)):
        assert (STRIDES[number], DILATIONS[number]) == (stride, dilation)
        for name, module in whole.backbone.get_submodule(f"layer{number + 2}").named_modules():
            if not isinstance(module, nn.Conv2d):
                continue
            strided = name in ("block1.reduce.conv", "block1.shortcut.conv")
            dilated = dilation if module.kernel_size == (3, 3) else 1
            assert module.stride == (stride if strided else 1,) * 2, name
            assert module.dilation == (dilated,) * 2, name
            assert module.padding == ((dilated if module.kernel_size == (3, 3) else 0),) * 2
    norms = [m for m in whole.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {norm.eps for norm in norms} == {1e-5}
    assert [(c.dilation, c.padding) for c in whole.aspp.children()] == [
        ((rate, rate), (rate, rate)) for rate in (6, 12, 18, 24)
    ]


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((321, 321), (41, 41)),
        ((160, 240), (21, 31)),  # without the rounding up of the pool: 20 and 30
        ((513, 375), (65, 48)),
        ((33, 100), (5, 13)),
    ],
)
def test_sides_of_the_features(
    whole: DeepLabV2, size: tuple[int, int], expected: tuple[int, int]
) -> None:
    features = whole.backbone(torch.zeros(2, 3, *size, device="meta"))
    assert features.shape == (2, 2048, *expected)


def test_a_block_by_hand() -> None:
    """The second stage of the backbone: its first block, written out."""
    block = CaffeResNet101(**TINY).layer3.block1  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    for name, buffer in block.named_buffers():
        if buffer.is_floating_point():
            buffer.copy_(torch.rand(buffer.shape, generator=generator) + ("var" in name))
    for name, parameter in block.named_parameters():
        if ".bn." in name:
            parameter.data = torch.rand(parameter.shape, generator=generator) - 0.3
    block.eval()
    state = block.state_dict()
    features = torch.randn(1, 32, 9, 7, generator=generator)

    def unit(name: str, given: Tensor, **options: Any) -> Tensor:
        found = F.conv2d(given, state[f"{name}.conv.weight"], **options)
        mean, variance, weight, bias = (
            state[f"{name}.bn.{part}"][:, None, None]
            for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (found - mean) / (variance + 1e-5).sqrt() * weight + bias

    every_other = features[..., ::2, ::2]  # what a 1 x 1 convolution with stride 2 sees
    found = unit("conv3x3", unit("reduce", every_other).relu(), padding=1).relu()
    expected = (unit("increase", found) + unit("shortcut", every_other)).relu()
    with torch.no_grad():
        assert torch.allclose(block(features), expected, atol=1e-5)


def test_rgb_is_reordered_to_bgr() -> None:
    backbone = CaffeResNet101(**TINY).eval()  # type: ignore[arg-type]
    seen: list[Tensor] = []
    backbone.layer1.conv1.conv.register_forward_hook(lambda *given: seen.append(given[1][0]))
    given = images(1, 3, 33, 34)
    backbone(given)
    assert torch.equal(seen[0], given[:, [2, 1, 0]])


def test_aspp_is_the_sum_of_its_convolutions() -> None:
    aspp = Aspp(1, 1, (1, 2))
    with torch.no_grad():
        aspp.c0.weight.fill_(1.0)
        aspp.c1.weight.fill_(10.0)
        aspp.c0.bias.fill_(100.0)
        aspp.c1.bias.fill_(1000.0)
        # ones on 3 x 3: the first sees 4, 6 or 9 of them, the second 4, 2 or 1
        found = aspp(torch.ones(1, 1, 3, 3))[0, 0]
    seen = torch.tensor([[4.0, 6.0, 4.0], [6.0, 9.0, 6.0], [4.0, 6.0, 4.0]])
    far = torch.tensor([[4.0, 2.0, 4.0], [2.0, 1.0, 2.0], [4.0, 2.0, 4.0]])
    assert torch.equal(found, seen + 10.0 * far + 1100.0)


class Spy(nn.Module):
    """A backbone that keeps what it was given and averages 8 x 8 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, given: Tensor) -> Tensor:
        self.seen.append(given)
        return F.avg_pool2d(given, 8, ceil_mode=True)


def test_scaled_sides_are_rounded_down(whole: DeepLabV2) -> None:
    spy = Spy()
    network = DeepLabV2(spy, 3, 2, pyramid=PYRAMID)
    network(torch.zeros(1, 3, 321, 375))
    assert [tuple(g.shape[-2:]) for g in spy.seen] == [(321, 375), (160, 187), (240, 281)]
    for scale, given in zip(PYRAMID, spy.seen[1:], strict=True):
        same = F.interpolate(spy.seen[0], scale_factor=scale, mode="bilinear")
        assert given.shape == same.shape
    shapes = [o.shape for o, _ in whole.outputs(torch.zeros(2, 3, 321, 321, device="meta"))]
    assert shapes == [(2, 21, side, side) for side in (41, 21, 31, 41)]


def test_outputs_and_maximum_by_hand() -> None:
    network = tiny()
    given = images(2, 3, 65, 50)
    with torch.no_grad():
        alone = [network.aspp(network.backbone(given))]
        for size in ((32, 25), (48, 37)):
            scaled = F.interpolate(given, size, mode="bilinear", align_corners=False)
            alone.append(network.aspp(network.backbone(scaled)))
        grid = alone[0].shape[-2:]
        resized = [F.interpolate(a, grid, mode="bilinear", align_corners=False) for a in alone]
        largest = torch.maximum(torch.maximum(resized[0], resized[1]), resized[2])
        outputs = network.outputs(given)
        assert [weight for _, weight in outputs] == [1.0] * 4
        for (found, _), expected in zip(outputs, [*alone, largest], strict=True):
            assert torch.equal(found, expected)
        assert torch.equal(network(given), largest)
    # each scale is the largest somewhere
    assert {int(n) for n in torch.stack(resized).argmax(0).unique()} == {0, 1, 2}


def backbone_state(seed: int = 9) -> dict[str, Tensor]:
    """Weights of a tiny backbone by the names of the public files."""
    return tiny(seed=seed).backbone.state_dict()


def write(path: Path, state: dict[str, Tensor]) -> Path:
    save_file({k: v.contiguous() for k, v in state.items()}, path)
    return path


@pytest.mark.parametrize("prefix", ["", "base.", "scale.", "module.base.", "network.backbone."])
def test_weights_files_with_prefixes_and_a_classifier(tmp_path: Path, prefix: str) -> None:
    expected = backbone_state()
    state = {f"{prefix}{name}": tensor for name, tensor in expected.items()}
    state |= {f"{prefix}fc.weight": torch.ones(1000, 256), f"{prefix}fc.bias": torch.ones(1000)}
    network = tiny(weights=write(tmp_path / "w.safetensors", state), seed=1)
    for name, tensor in network.backbone.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    assert torch.equal(network.aspp.c0.weight, tiny(seed=1).aspp.c0.weight)


def test_weights_of_older_names_without_counters_in_half_precision(tmp_path: Path) -> None:
    expected = {k: v for k, v in backbone_state().items() if not k.endswith("tracked")}
    old = {f"scale.{k.replace('shortcut', 'proj')}": v.half() for k, v in expected.items()}
    network = tiny(weights=str(write(tmp_path / "w.safetensors", old)))
    state = network.backbone.state_dict()
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor.half().float()), name
    with torch.no_grad():
        assert network(images(1, 3, 33, 33)).dtype == torch.float32


def test_an_aspp_in_the_file_is_taken_where_it_fits(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    donor = tiny(4, seed=9)
    path = write(tmp_path / "w.safetensors", donor.state_dict())
    with caplog.at_level(logging.INFO, "lpcam"):
        assert torch.equal(tiny(4, weights=path).aspp.c2.weight, donor.aspp.c2.weight)
        assert not caplog.records
        other = tiny(7, weights=path)
    assert "the ASPP in w.safetensors is of other labels or rates and is left out" in caplog.text
    assert torch.equal(other.aspp.c2.weight, tiny(7).aspp.c2.weight)
    with torch.no_grad():
        given = images(1, 3, 40, 40)
        assert torch.equal(other.backbone(given), donor.backbone(given))


def test_names_that_become_equal() -> None:
    with pytest.raises(ClassifierError, match=r"layer1\.x"):
        convert_names({"base.layer1.x": torch.ones(1), "scale.layer1.x": torch.ones(1)})


def test_arguments_that_the_caffe_backbone_lacks() -> None:
    with pytest.raises(ClassifierError, match="drop_rate"):
        tiny(arguments={"drop_rate": 0.1})
    with pytest.raises(ClassifierError, match="16"):
        tiny(output_stride=16)
    assert tiny(output_stride=8).backbone(images(1, 3, 65, 65)).shape[-1] == 9


@pytest.mark.parametrize(
    ("name", "stride", "sides"),
    [
        ("test_resnet", 16, (4, 6)),
        ("mobilenetv2_100", 16, (4, 6)),
        ("test_mambaout", None, (2, 3)),  # channels last
        ("test_vit", None, (4, 6)),  # tokens
    ],
)
def test_backbones_of_timm(name: str, stride: int | None, sides: tuple[int, int]) -> None:
    arguments = {"dynamic_img_pad": True, "dynamic_img_size": True} if "vit" in name else {}
    network, preprocessing = build(
        name, 5, arguments=arguments, output_stride=stride, weights=RANDOM, pyramid=PYRAMID
    )
    assert preprocessing.std[0] < 1.0
    given = images(2, 3, 64, 96) / 60.0
    assert [tuple(o.shape) for o, _ in network.outputs(given)][::3] == [(2, 5, *sides)] * 2
    assert all(p.ndim > 1 for p in network.parameter_groups()["backbone"])
    assert not any(name.startswith("backbone.classifier.head") for name in network.state_dict())


def test_what_timm_keeps_from_decay() -> None:
    network = build("test_vit", 2, arguments={"dynamic_img_pad": True}, weights=RANDOM)[0]
    groups = network.parameter_groups()
    names = {id(p): name.removeprefix("backbone.") for name, p in network.named_parameters()}
    free = {names[id(p)] for p in groups["no_decay"]}
    vit = "classifier.backbone"
    assert {f"{vit}.pos_embed", f"{vit}.cls_token", f"{vit}.norm.weight"} <= free
    assert f"{vit}.blocks.0.attn.qkv.weight" not in free


def test_an_unknown_backbone() -> None:
    with pytest.raises(ClassifierError, match="timm has no model 'resnet101_cafe'"):
        build("resnet101_cafe", 3, weights=RANDOM)
