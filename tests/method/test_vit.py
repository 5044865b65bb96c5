"""Maps spread by attention, features without position bias, and the attention of real models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
import transformers
from torch import Tensor, nn

from lpcam import CAM, LPCAM
from lpcam.classifiers.classifier import Preprocessing
from lpcam.classifiers.features import FeaturePair
from lpcam.explain import gradcam
from lpcam.explain.explainer import Explainer
from lpcam.formats.models.lpcam_model import LPCAMModel
from lpcam.method.settings import LpcamSettings
from lpcam.method.vit import attended_pyramid, spread_by_attention, without_position_bias
from lpcam.runtime.errors import ClassifierError, PrototypeError

SETTINGS = LpcamSettings.from_preset(
    "voc12.official", scales=[1.0], flip=True, clusters=2, mu_f=0.1, tau=0.2
)


def attention_of(places: int, *batch: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*batch, places, places, generator=generator).softmax(-1)


def test_spreading_by_hand() -> None:
    """Balanced, [[0.9, 0.1], [0.5, 0.5]] is [[3/4, 1/4], [1/4, 3/4]], its square [[5/8, 3/8], ...].

    A balanced matrix [[x, 1 - x], [1 - x, x]] has x / (1 - x) = sqrt(0.9 * 0.5 / (0.1 * 0.5)).
    """
    pair = torch.tensor([[0.9, 0.1], [0.5, 0.5]])
    found = spread_by_attention(torch.tensor([[[1.0, 0.5]]]), pair)
    torch.testing.assert_close(found, torch.tensor([[[5 / 8 + 3 / 16, 3 / 8 + 5 / 16]]]))
    # two boxes; the place between and what lies below the threshold get and give nothing
    even = torch.full((4, 4), 0.25)
    found = spread_by_attention(torch.tensor([[[1.0, 0.3, 0.0, 0.5]]]), even, power=1)
    torch.testing.assert_close(found, torch.tensor([[[0.375, 0.0, 0.0, 0.375]]]))
    # a box holds places below the threshold that lie inside it
    corner = torch.tensor([[[1.0, 1.0], [1.0, 0.1]]])
    found = spread_by_attention(corner, even, power=1)
    torch.testing.assert_close(found, torch.full((1, 2, 2), 3.1 / 4))


def test_spreading_keeps_constants_and_follows_permutations() -> None:
    attention = attention_of(15, 2)
    constant = torch.full((2, 4, 3, 5), 0.7)
    torch.testing.assert_close(spread_by_attention(constant, attention), constant)
    assert not spread_by_attention(torch.zeros(2, 4, 3, 5), attention).any()
    maps = torch.rand(2, 4, 3, 5, generator=torch.Generator().manual_seed(1))
    found = spread_by_attention(maps, attention, threshold=0.0)
    assert found.shape == maps.shape and not torch.equal(found, maps)
    order = torch.randperm(15, generator=torch.Generator().manual_seed(2))
    moved = spread_by_attention(
        maps.flatten(2)[..., order].reshape(maps.shape),
        attention[:, order][:, :, order],
        threshold=0.0,
    )
    torch.testing.assert_close(moved.flatten(2), found.flatten(2)[..., order])
    one = spread_by_attention(maps[1], attention[1])
    torch.testing.assert_close(one, spread_by_attention(maps, attention)[1])
    assert spread_by_attention(maps.half(), attention).dtype == torch.float16


def test_position_bias_by_hand_and_its_invariances() -> None:
    noise = torch.tensor([[[[1.0, 3.0]], [[2.0, 2.0]]], [[[1.0, 5.0]], [[0.0, 0.0]]]])
    features = torch.tensor([[[[2.0, 2.0]], [[7.0, 5.0]]]])
    found = without_position_bias(features, noise)
    assert found.tolist() == [[[[3.5, 0.5]], [[7.0, 5.0]]]]
    torch.testing.assert_close(found.mean((-2, -1)), features.mean((-2, -1)))
    flat = torch.rand(8, 2, 1, 1).expand(8, 2, 1, 2)  # a model that does not know its places
    torch.testing.assert_close(without_position_bias(features, flat), features)


def timm_vit(name: str = "vit_tiny_patch16_224", side: int = 64, **options: Any) -> nn.Module:
    return timm.create_model(name, img_size=side, depth=3, num_classes=3, **options)


def eager_vit() -> nn.Module:
    model: Any = timm_vit()
    for block in model.blocks:
        block.attn.fused_attn = False
    return model


def of_torchvision() -> nn.Module:
    model = torchvision.models.VisionTransformer(64, 16, 3, 2, 24, 48, num_classes=3)
    nn.init.normal_(model.heads.head.weight)
    return model


def of_transformers(implementation: str) -> nn.Module:
    config = transformers.ViTConfig(
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=48,
        image_size=64,
        num_labels=3,
        attn_implementation=implementation,
    )
    return transformers.ViTForImageClassification(config)


def dinov2() -> nn.Module:
    config = transformers.Dinov2Config(
        hidden_size=24, num_hidden_layers=3, num_attention_heads=2, image_size=56, patch_size=14
    )
    return transformers.Dinov2Model(config)


TOKEN = {"pool": "token"}
MODELS: dict[str, tuple[Callable[[], nn.Module], int, dict[str, Any]]] = {
    "timm": (timm_vit, 64, TOKEN),
    "timm, not fused": (eager_vit, 64, TOKEN),
    "timm, registers": (lambda: timm_vit("vit_small_patch14_reg4_dinov2", 56), 56, TOKEN),
    "timm, rotary": (lambda: timm_vit("eva02_tiny_patch14_224", 56), 56, {}),
    "torchvision": (of_torchvision, 64, TOKEN),
    "transformers": (lambda: of_transformers("sdpa"), 64, TOKEN),
    "transformers, not fused": (lambda: of_transformers("eager"), 64, TOKEN),
    "transformers, DINOv2": (dinov2, 56, {"classes": ["a", "b", "c"]}),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_options_on_models_of_others(name: str) -> None:
    torch.manual_seed(0)
    make, side, options = MODELS[name]
    model = make()
    images = torch.rand(3, 3, side, side)
    plain = LPCAM(model, SETTINGS, **options).fit([(images, torch.arange(3))])
    source = plain.source_
    (pair,) = attended_pyramid(source, images, (1.0,), flip=False, blocks=2)
    places = pair.features.shape[-2:].numel()
    assert pair.attention is not None and pair.attention.shape == (3, places, places)
    share = pair.attention.sum(-1)  # the rest is attention on the prefix tokens
    assert bool((share > 0.3).all()) and bool((share < 1 + 1e-5).all())
    (mirror,) = attended_pyramid(source, images.flip(-1), (1.0,), flip=True, blocks=2)
    (both,) = attended_pyramid(source, images, (1.0,), flip=True, blocks=2)
    height, width = pair.features.shape[-2:]
    turned = mirror.attention.reshape(3, height, width, height, width).flip(2, 4)
    torch.testing.assert_close(both.attention, turned.reshape(3, places, places))
    before = plain(images)
    spread = plain.set_params(attention_blocks=2)(images)
    assert spread.shape == before.shape and float((spread - before).abs().mean()) > 1e-3
    torch.testing.assert_close(plain.set_params(attention_blocks=0)(images), before)
    free = LPCAM(model, SETTINGS, remove_position_bias=True, **options)
    free.fit([(images, torch.arange(3))])
    assert float((free(images) - before).abs().mean()) > 1e-4
    torch.testing.assert_close(
        free.source_.features(images).mean((-2, -1)), source.features(images).mean((-2, -1))
    )
    assert not any(module._forward_hooks for module in model.modules())


def test_attention_is_that_of_the_block() -> None:
    """Of timm's own attention layer, from the queries and keys that it makes."""
    model: Any = timm_vit()
    images = torch.rand(1, 3, 64, 64)
    source = CAM(model, SETTINGS, pool="token").source_
    (pair,) = attended_pyramid(source, images, (1.0,), flip=False, blocks=1)
    seen: list[Tensor] = []
    attention = model.blocks[-1].attn
    with attention.register_forward_pre_hook(lambda _, given: seen.append(given[0])):
        source.features(images)
    queries, keys, _ = attention.qkv(seen[0]).reshape(1, 17, 3, 3, 64).permute(2, 0, 3, 1, 4)
    weights = (queries @ keys.mT / 8).softmax(-1).mean(1)
    torch.testing.assert_close(pair.attention, weights[:, 1:, 1:].detach())


def test_the_options_reach_the_call_of_pytorch_grad_cam_and_the_explainer() -> None:
    torch.manual_seed(0)
    model, images = timm_vit(), torch.rand(3, 3, 64, 64)
    options: dict[str, Any] = {"attention_blocks": 2, "remove_position_bias": True, "pool": "token"}
    lpcam = LPCAM(model, SETTINGS, **options).fit([(images, torch.arange(3))])
    maps = lpcam(images)
    other = gradcam.LPCAM(model, settings=SETTINGS, prototypes=lpcam.prototypes_, **options)
    expected = maps[torch.arange(3), torch.arange(3)].numpy()
    np.testing.assert_allclose(other(images, [0, 1, 2]), expected, atol=1e-5)
    (one,) = lpcam(images[:1], [[1]], present=True)
    torch.testing.assert_close(one[1][0], maps[0, 1])
    normal = Preprocessing((0.0,) * 3, (1.0,) * 3)
    picture = (images[0].permute(1, 2, 0) * 255).byte().numpy()
    explained = Explainer(lpcam, preprocessing=normal)(picture, labels=lpcam.source_.classes[1:2])
    expected = lpcam(normal(picture)[None], [[1]])[0, 1].numpy()
    np.testing.assert_allclose(explained.lpcam[0], expected, atol=1e-5)


def test_what_has_no_such_attention_or_bias_is_refused() -> None:
    images = torch.rand(2, 3, 64, 64)
    for model, blocks in ((torchvision.models.resnet18(num_classes=3), 1), (timm_vit(), 4)):
        lpcam = CAM(model, SETTINGS, attention_blocks=blocks, pool=None if blocks == 1 else "token")
        with pytest.raises(ClassifierError, match=f"attention_blocks={blocks}"):
            lpcam(images)
    for wrong in (-1, True, 1.5):
        with pytest.raises(ValueError, match="attention_blocks"):
            CAM(timm_vit(), SETTINGS, attention_blocks=wrong, pool="token")(images)
    # prototypes with the bias are not those without; files have neither option
    model = timm_vit()
    plain = LPCAM(model, SETTINGS, pool="token").fit([(images, torch.arange(2))])
    with pytest.raises(PrototypeError):
        gradcam.LPCAM(model, prototypes=plain.prototypes_, remove_position_bias=True, pool="token")
    with pytest.raises(ClassifierError, match="attention_blocks"):
        LPCAMModel.from_lpcam(plain.set_params(attention_blocks=1))
    assert FeaturePair(images, None).attention is None
