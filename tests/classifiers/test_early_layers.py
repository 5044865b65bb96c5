"""The rule that finds early layers, and their maps from a pass that is made anyway."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest
import timm
import torch
import torchvision
from tiny import BACKBONE, Patches, headed, state_of
from torch import Tensor, nn

from lpcam.classifiers.early_layers import Tap, early_layers, readings
from lpcam.runtime.errors import ClassifierError

Build = Callable[[], nn.Module]
SIZE = (96, 160)


def of_timm(name: str, **options: object) -> Build:
    return lambda: timm.create_model(name, **options)


STRIDED: dict[str, tuple[Build, tuple[str, str]]] = {
    "resnet": (of_timm("resnet18"), ("layer2", "layer3")),
    "convnext": (of_timm("convnext_atto"), ("stages.1", "stages.2")),
    "efficientnet": (of_timm("efficientnet_b0"), ("blocks.2", "blocks.4")),
    "mobilenet": (of_timm("mobilenetv3_small_050"), ("blocks.1", "blocks.3")),
    "the bundled one": (
        of_timm("mobilenetv2_100", pad_type="same", output_stride=16, num_classes=0),
        ("blocks.2", "blocks.4"),
    ),
    "torchvision's resnet": (torchvision.models.resnet18, ("layer2", "layer3")),
    "torchvision's convnext": (torchvision.models.convnext_tiny, ("features.3", "features.5")),
    "torchvision's efficientnet": (
        torchvision.models.efficientnet_b0,
        ("features.3", "features.5"),
    ),
    "torchvision's mobilenet": (torchvision.models.mobilenet_v2, ("features.6", "features.13")),
    "torchvision's swin, channels last": (torchvision.models.swin_t, ("features.3", "features.5")),
    # whose tables of positions look like maps
    "torchvision's swin v2": (torchvision.models.swin_v2_t, ("features.3", "features.5")),
}


@pytest.mark.parametrize("family", STRIDED)
def test_the_layers_before_the_last_level(family: str) -> None:
    build, expected = STRIDED[family]
    model = build().eval()
    before = state_of(model)[:5]
    assert early_layers(model) == expected
    with closing(Tap(model, expected)) as tap, torch.no_grad():
        model(torch.rand(2, 3, *SIZE))
        maps = tap.take(SIZE)
    assert [tuple(one.shape[2:]) for one in maps] == [(12, 20), (6, 10)]  # strides 8 and 16
    assert state_of(model)[:5] == before


@pytest.mark.parametrize(
    ("build", "size", "expected"),
    [
        (
            of_timm("vit_tiny_patch16_224", dynamic_img_size=True),
            SIZE,
            ("blocks.3", "blocks.7"),
        ),
        (
            of_timm("vit_small_patch14_reg4_dinov2", img_size=112),
            (112, 112),
            ("blocks.3", "blocks.7"),
        ),
        (
            lambda: torchvision.models.VisionTransformer(32, 8, 6, 4, 64, 128),
            (32, 32),
            ("encoder.layers.encoder_layer_1", "encoder.layers.encoder_layer_3"),
        ),
    ],
    ids=["class token", "registers", "torchvision's"],
)
def test_a_transformer_gives_the_blocks_at_a_third_and_two_thirds(
    build: Build, size: tuple[int, int], expected: tuple[str, ...]
) -> None:
    model = build().eval()
    found = early_layers(model, size)
    assert found == expected
    with closing(Tap(model, found)) as tap, torch.no_grad():
        model(torch.rand(1, 3, *size))
        (first, _) = tap.take(size)
    side = 14 if size == (112, 112) else 8 if size == (32, 32) else 16
    assert first.shape[2:] == (size[0] // side, size[1] // side)


def test_places_are_those_of_the_image() -> None:
    """A token or a cell of channels last stands where the patch of the image is."""
    places = torch.arange(13 * 19.0).reshape(1, 13, 19)
    tokens = torch.cat([torch.full((1, 1), -1.0), places.flatten(1)], dim=1)[..., None]
    (layer,) = readings(["x"], [tokens], (200, 300))  # patches of 16 pixels, the last cut
    assert (layer.layout, layer.prefix) == ("tokens", 1)
    assert torch.equal(layer.map(tokens, (200, 300))[:, 0], places)
    (layer,) = readings(["x"], [places[..., None].expand(-1, -1, -1, 50)], (200, 300))
    assert torch.equal(layer.map(places[..., None], (200, 300))[:, 0], places)


def test_all_layers_have_one_layout() -> None:
    """48 x 96 cells of 192 channels, channels last, look like 48 channels of 96 x 192 cells."""
    outputs = [torch.zeros(1, 48, 96, 192), torch.zeros(1, 24, 48, 384)]
    assert [layer.layout for layer in readings("ab", outputs, (384, 768))] == ["NHWC"] * 2


@pytest.mark.parametrize("output", [torch.zeros(2, 5), torch.zeros(1, 1000, 8), None, ()])
def test_what_is_no_map_is_refused(output: object) -> None:
    with pytest.raises(ClassifierError, match="not a map"):
        readings(["x"], [output], (64, 200))


@pytest.mark.parametrize("model", [Patches(), headed(), nn.Linear(3, 2)])
def test_a_model_without_levels_is_refused(model: nn.Module) -> None:
    with pytest.raises(ClassifierError, match=type(model).__name__):
        early_layers(model)


def test_images_of_other_channels() -> None:
    layers = [nn.Conv2d(1, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, 2, 1)]
    model = nn.Sequential(*layers, nn.Flatten())
    assert early_layers(model, (64, 64), 1) == ("0", "1")
    with pytest.raises(ClassifierError, match="Sequential"):
        early_layers(model, (64, 64), 3)


def doubling() -> nn.Sequential:
    return nn.Sequential(nn.AvgPool2d(2), nn.AvgPool2d(2), nn.AvgPool2d(2))


def test_each_thread_takes_its_own_maps() -> None:
    model, barrier = doubling(), threading.Barrier(4)
    tap = Tap(model, ("0", "1"))

    def work(value: int) -> list[Tensor]:
        model(torch.full((1, 3, 16, 24), float(value)))
        barrier.wait(timeout=60)  # all have made their pass
        return tap.take((16, 24))

    with ThreadPoolExecutor(4) as pool:
        for value, maps in enumerate(pool.map(work, range(4))):
            assert [tuple(one.shape[1:]) for one in maps] == [(3, 8, 12), (3, 4, 6)]
            assert all(bool((one == value).all()) for one in maps)


def test_maps_are_taken_once_and_hooks_go_even_after_an_error() -> None:
    model = doubling()
    with pytest.raises(ZeroDivisionError), closing(Tap(model, ("0", "1"))) as tap:
        model(torch.zeros(1, 3, 16, 24))
        assert len(tap.take((16, 24))) == 2
        with pytest.raises(ClassifierError, match="NoneType"):
            tap.take((16, 24))
        _ = 1 / 0
    assert not any(module._forward_hooks for module in model.modules())
    with pytest.raises(ClassifierError, match="'none'"):
        Tap(model, ("none",))


def test_a_copy_has_a_tap_of_its_own() -> None:
    model = timm.create_model(BACKBONE, num_classes=0).eval()
    tap = Tap(model, early_layers(model))
    twin, own = copy.deepcopy((model, tap))
    with torch.no_grad():
        twin(torch.rand(1, 3, 64, 64))
    assert len(own.take((64, 64))) == 2
    with pytest.raises(ClassifierError, match="NoneType"):
        tap.take((64, 64))
