"""MCTformer's network: tokens, attention, PatchCAM, weights of a transformer, files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hosts.common import drawn
from safetensors.torch import save_file
from torch import Tensor

from lpcam.classifiers.classifier import BackboneSpec, build
from lpcam.hosts.mctformer import HOST
from lpcam.hosts.mctformer_network import (
    Mctformer,
    MctformerSettings,
    attend_block,
    build_mctformer,
    scale_positions,
)
from lpcam.runtime.errors import ClassifierError

CLASSES = ("blue", "green", "red")
SETTINGS = MctformerSettings.from_preset("default", crop=64)
WIDTH, DEPTH = 64, 6  # of test_vit


def fresh(
    name: str = "test_vit", arguments: dict[str, Any] | None = None, **changes: Any
) -> Mctformer:
    options: dict[str, Any] = {"weights": "random", "seed": 1, "settings": SETTINGS, **changes}
    return build_mctformer(BackboneSpec(name, arguments or {}), CLASSES, **options)


def vit_state(**changes: Any) -> dict[str, Tensor]:
    """A transformer's checkpoint with values that are all distinct."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = timm.create_model("test_vit", **{"img_size": 64, "num_classes": 10, **changes})
    return {k: drawn(*v.shape, seed=n) for n, (k, v) in enumerate(model.state_dict().items())}


@pytest.mark.parametrize("grid", [(1, 1), (3, 9), (14, 13), (31, 23), (44, 2)])
def test_positions_at_any_grid(grid: tuple[int, int]) -> None:
    table = drawn(1, 14 * 14, 5)
    assert scale_positions(table, grid).shape == (1, grid[0] * grid[1], 5)
    flat = scale_positions(torch.full((1, 14 * 14, 2), 3.0), grid)
    torch.testing.assert_close(flat, torch.full_like(flat, 3.0))


def test_positions_keep_rows_and_columns_apart() -> None:
    rows = torch.arange(14.0)[:, None].expand(14, 14).reshape(1, -1, 1)
    wide = scale_positions(rows, (14, 28)).reshape(14, 28)
    torch.testing.assert_close(wide, wide[:, :1].expand(14, 28))
    assert bool((wide[1:, 0] > wide[:-1, 0]).all())


@torch.no_grad()
def test_attention_of_a_block() -> None:
    block = fresh().blocks[0]
    tokens = drawn(2, 7, WIDTH)
    found, attention = attend_block(block, tokens)
    torch.testing.assert_close(found, block(tokens))
    joint = block.attn.qkv(block.norm1(tokens)).reshape(2, 7, 3, 2, 32)
    heads = [
        (joint[:, :, 0, h] @ joint[:, :, 1, h].transpose(1, 2) / 32**0.5).softmax(-1)
        for h in range(2)
    ]
    torch.testing.assert_close(attention, (heads[0] + heads[1]) / 2)


@torch.no_grad()
def test_attend_adds_up_the_blocks() -> None:
    network, images = fresh(), drawn(2, 3, 32, 48)
    tokens, grid = network.embed(images)
    attentions = []
    for block in network.blocks:
        tokens, attention = attend_block(block, tokens)
        attentions.append(attention)
    assert grid == (2, 3)
    found = network.attend(images, 2)
    expected = sum(a[:, :3, 3:] for a in attentions[-2:])
    torch.testing.assert_close(found.class_attention, expected.reshape(2, 3, 2, 3))
    torch.testing.assert_close(found.patch_affinity, sum(a[:, 3:, 3:] for a in attentions))
    torch.testing.assert_close(
        found.features, tokens[:, 3:].transpose(1, 2).reshape(2, WIDTH, 2, 3)
    )
    assert bool((found.features < 0).any())  # no ReLU, no norm


@torch.no_grad()
def test_scores_are_those_of_training() -> None:
    network, images = fresh(), drawn(2, 3, 48, 64)
    scores = network(images)
    found = network.attend(images, 3)
    torch.testing.assert_close(found.scores.classes, scores.classes)
    assert found.patch_cam is not None and network.head is not None
    torch.testing.assert_close(found.scores.patches, scores.patches)
    torch.testing.assert_close(found.patch_cam.mean((-2, -1)), scores.patches)
    torch.testing.assert_close(found.patch_cam, network.head(found.features))


@torch.no_grad()
def test_v1_has_class_tokens_alone() -> None:
    network = fresh(settings=SETTINGS.model_copy(update={"version": "v1"}))
    assert network(drawn(1, 3, 64, 64)).patches is None
    assert network.attend(drawn(1, 3, 64, 64), 3).patch_cam is None
    with pytest.raises(ClassifierError, match="V1 has no PatchCAM"):
        HOST.scorer(network)


@torch.no_grad()
def test_what_is_left_over_of_a_side_does_not_count() -> None:
    network, images = fresh(), drawn(1, 3, 53, 70)
    found = network.attend(images, 3)
    assert found.features.shape[-2:] == (3, 4)
    torch.testing.assert_close(found.features, network.attend(images[..., :48, :64], 3).features)


@torch.no_grad()
def test_an_image_smaller_than_a_patch_is_padded_with_the_mean_colour() -> None:
    network = fresh()
    images = torch.zeros(1, 3, 16, 16)
    images[..., :5, :9] = drawn(1, 3, 5, 9)
    found = network.attend(images[..., :5, :9], 3)
    torch.testing.assert_close(found.features, network.attend(images, 3).features)


@torch.no_grad()
def test_the_last_norm_is_never_applied() -> None:
    network, images = fresh(), drawn(1, 3, 64, 64)
    before = network(images).classes
    network.norm.weight.fill_(7.0)
    assert torch.equal(network(images).classes, before)
    assert not any(p.requires_grad for p in network.norm.parameters())


@torch.no_grad()
def test_constant_response_is_patch_cam_of_equal_neighbours() -> None:
    network = fresh()
    assert network.head is not None
    weight, bias = HOST.scorer(network)
    feature = drawn(WIDTH)
    same = network.head(feature[None, :, None, None].expand(1, WIDTH, 5, 5))[0, :, 2, 2]
    torch.testing.assert_close(weight @ feature + bias, same)


def test_class_token_and_its_position_are_copied(tmp_path: Path) -> None:
    state = vit_state()
    save_file(state, tmp_path / "vit.safetensors")
    network = fresh(weights=tmp_path / "vit.safetensors")
    assert torch.equal(network.cls_token, state["cls_token"].expand(1, 3, WIDTH))
    assert torch.equal(network.pos_embed[:, :3], state["pos_embed"][:, :1].expand(1, 3, WIDTH))
    assert torch.equal(network.pos_embed[:, 3:], state["pos_embed"][:, 1:])
    assert torch.equal(network.blocks[2].mlp.fc1.weight, state["blocks.2.mlp.fc1.weight"])
    assert network.head is not None and network.head.weight.shape == (3, WIDTH, 3, 3)


def test_positions_of_another_grid_are_resized(tmp_path: Path) -> None:
    state = vit_state()
    state["pos_embed"] = torch.cat(
        [state["pos_embed"][:, :1], torch.full((1, 16, WIDTH), 0.25)], dim=1
    )
    save_file(state, tmp_path / "vit.safetensors")
    settings = SETTINGS.model_copy(update={"crop": 100})
    network = fresh(weights=tmp_path / "vit.safetensors", settings=settings)
    assert network.pos_embed.shape == (1, 3 + 6 * 6, WIDTH)
    torch.testing.assert_close(network.pos_embed[:, 3:], torch.full((1, 36, WIDTH), 0.25))


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_weights_of_a_whole_mctformer(version: str, tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(update={"version": version})
    trained = fresh(seed=5, settings=settings)
    save_file(trained.state_dict(), tmp_path / "whole.safetensors")
    network = fresh(weights=tmp_path / "whole.safetensors", settings=settings)
    for name, tensor in trained.state_dict().items():
        assert torch.equal(network.state_dict()[name], tensor), name


def without(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {k: v for k, v in state.items() if k != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {**s, "dist_token": drawn(1, 1, 64)}, "unexpected .*dist_token"),
        (lambda s: without(s, "pos_embed"), "missing .*pos_embed"),
        (lambda s: {**s, "cls_token": drawn(1, 1, 32)}, "cls_token"),
        (lambda s: {**s, "cls_token": drawn(1, 2, 64)}, "cls_token"),
        (lambda s: {**s, "pos_embed": drawn(1, 18, 64)}, "pos_embed|cls_token"),
        (lambda s: {**s, "pos_embed": drawn(1, 17, 32)}, "pos_embed|cls_token"),
        (lambda s: without(s, "norm.bias"), r"1 missing \(first: norm.bias\)"),
        (lambda s: {**s, "norm.bias": torch.full((64,), torch.nan)}, "NaN or Inf in 'norm.bias'"),
    ],
)
def test_weights_that_do_not_fit(change: Any, message: str, tmp_path: Path) -> None:
    save_file(change(vit_state()), tmp_path / "vit.safetensors")
    with pytest.raises(ClassifierError, match=message):
        fresh(weights=tmp_path / "vit.safetensors")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "deit_smal_patch16_224"}, "deit_smal_patch16_224.*deit_small"),
        ({"name": "test_resnet"}, "needs a vision transformer, as deit_small_patch16_224"),
        ({"name": "test_vit2"}, "no class token, it has register tokens"),
        ({"name": "deit_tiny_distilled_patch16_224"}, "it has a distillation token"),
        ({"arguments": {"pre_norm": True}}, "a norm before the first block"),
        ({"arguments": {"patch_drop_rate": 0.5}}, "it drops patches"),
        ({"arguments": {"embed_dim": 63}}, "timm could not make 'test_vit'"),
        ({"arguments": {"img_size": 64}}, "the size of its images is mctformer.crop"),
        ({"weights": "none.safetensors"}, "no weights file"),
    ],
)
def test_transformers_of_another_kind(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ClassifierError, match=message):
        fresh(**changes)


def test_deit_small_is_that_of_the_specification() -> None:
    settings = MctformerSettings.from_preset("official")
    names = [str(n) for n in range(20)]
    network = build_mctformer(
        BackboneSpec("deit_small_patch16_224", {}), names, settings, weights="random"
    )
    assert network.cls_token.shape == (1, 20, 384)
    assert network.pos_embed.shape == (1, 20 + 196, 384)
    assert len(network.blocks) == 12 and network.blocks[0].attn.num_heads == 6
    assert network.blocks[0].norm1.eps == 1e-6
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in network.blocks]
    assert rates == pytest.approx([0.1 * n / 11 for n in range(12)])
    assert network.preprocessing.mean == pytest.approx((0.485, 0.456, 0.406))


STEM = {"depth": 2, "stem": "test_resnet"}


def test_a_stem_makes_the_patch_tokens(weights: Path) -> None:
    network = fresh(arguments=STEM, weights=weights)
    backbone = build(BackboneSpec("test_resnet", {}, 16), ("none",), weights=weights)
    images = drawn(2, 3, 53, 70)
    with torch.no_grad():
        tokens, grid = network.embed(images)
        features = backbone.features(images[..., :48, :64])
        patches = network.patch_embed.proj(features.flatten(2).transpose(1, 2))
        patches = patches + scale_positions(network.pos_embed[:, 3:], (3, 4))
    assert grid == (3, 4)
    torch.testing.assert_close(tokens[:, 3:], patches)
    expected = (network.cls_token + network.pos_embed[:, :3]).expand(2, 3, WIDTH)
    torch.testing.assert_close(tokens[:, :3], expected)
    assert network.preprocessing == backbone.preprocessing


def test_a_stem_is_frozen(weights: Path) -> None:
    network = fresh(arguments=STEM, weights=weights).train()
    assert network.training and network.patch_embed.training
    assert not any(module.training for module in network.patch_embed.classifier.modules())
    trained = {n for n, p in network.named_parameters() if p.requires_grad}
    assert not any(name.startswith("patch_embed.classifier") for name in trained)
    assert "patch_embed.proj.weight" in trained
    network(drawn(1, 3, 64, 64)).classes.sum().backward()
    assert network.patch_embed.proj.weight.grad is not None


def test_a_network_with_a_stem_is_saved_whole(weights: Path, tmp_path: Path) -> None:
    network = fresh(arguments=STEM, weights=weights, mean=(0.1, 0.2, 0.3))
    network.save(tmp_path / "network.safetensors")
    assert Mctformer.load(tmp_path / "network.safetensors").fingerprint() == network.fingerprint()
    assert network.preprocessing.mean == (0.1, 0.2, 0.3)
    other = fresh(arguments=STEM, weights=weights, mean=(0.1, 0.2, 0.3), seed=2)
    assert other.fingerprint() != network.fingerprint()


def test_stems_that_do_not_fit(weights: Path) -> None:
    with pytest.raises(ClassifierError, match="do not fit 'test_resnet' with arguments"):
        fresh(
            arguments={**STEM, "stem_arguments": {"block_args": {}, "layers": (1, 1, 1, 2)}},
            weights=weights,
        )
    with pytest.raises(ClassifierError, match="timm has no model 'test_resnt'"):
        fresh(arguments={"stem": "test_resnt"})
