"""UperNet on Swin: sizes, shapes, what it has beyond the library, weights of hub and files."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lpcam.runtime.errors import ClassifierError
from lpcam.segmentation.networks import upernet
from lpcam.segmentation.networks.base import SegmenterSpec
from lpcam.segmentation.networks.upernet import NETWORK, UperNetSwin

transformers = pytest.importorskip("transformers")

SWIN: dict[str, Any] = {"embed_dim": 12, "depths": [2, 1, 2, 1], "num_heads": [1, 2, 3, 4]}
TINY = {**SWIN, "channels": 16, "auxiliary_channels": 8}
NARROW = {**TINY, "window_size": 4}
SIZES_OF_IMAGES = [(33, 47), (64, 38)]


def images(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def tiny(labels: int = 3, **options: Any) -> UperNetSwin:
    options = {"arguments": TINY, "weights": "random", "size": "tiny", **options}
    spec = SegmenterSpec("upernet", options.pop("size"), options.pop("arguments"))
    return NETWORK.build(spec, labels, **options)[0]


def cells(size: tuple[int, int], stride: int) -> tuple[int, int]:
    return -(-size[0] // stride), -(-size[1] // stride)


def counted(width: int, depths: tuple[int, ...], heads: tuple[int, ...], labels: int) -> int:
    """Weights of UperNet-Swin, from the tables of its specification alone."""
    total = 3 * 16 * width + width + 2 * width  # patches and their norm
    for stage, (depth, count) in enumerate(zip(depths, heads, strict=True)):
        c = width * 2**stage
        attention = 4 * (c * c + c) + 13 * 13 * count
        total += depth * (attention + 8 * c * c + 5 * c + 4 * c)
        total += 2 * c  # the norm of the stage's map
        if stage < 3:
            total += 4 * c * 2 * c + 2 * 4 * c

    def unit(before: int, after: int, kernel: int) -> int:
        return before * after * kernel**2 + 2 * after

    top = 8 * width
    total += 4 * unit(top, 512, 1) + unit(top + 4 * 512, 512, 3)
    total += sum(unit(width * 2**n, 512, 1) + unit(512, 512, 3) for n in range(3))
    total += unit(4 * 512, 512, 3) + 512 * labels + labels
    return total + unit(4 * width, 256, 3) + 256 * labels + labels


@pytest.mark.parametrize(
    ("size", "about"), [("tiny", 59.8e6), ("small", 81.2e6), ("base", 121.2e6)]
)
def test_the_number_of_weights_by_hand(size: str, about: float) -> None:
    with torch.device("meta"):
        config = upernet._config(transformers, size, 21, {})
        network = UperNetSwin(transformers.UperNetForSemanticSegmentation(config))
    table = {
        "tiny": (96, (2, 2, 6, 2), (3, 6, 12, 24)),
        "small": (96, (2, 2, 18, 2), (3, 6, 12, 24)),
        "base": (128, (2, 2, 18, 2), (4, 8, 16, 32)),
    }
    found = sum(p.numel() for p in network.parameters())
    assert found == counted(*table[size], labels=21)
    assert abs(found - about) < 0.002 * about


@pytest.mark.parametrize("size", SIZES_OF_IMAGES)
def test_logits_at_stride_4_and_auxiliary_ones_at_16(size: tuple[int, int]) -> None:
    network, x = tiny(), images(2, 3, *size)
    with torch.no_grad():
        logits = network(x)
        (main, one), (auxiliary, weight) = network.outputs(x)
        assert logits.shape == (2, 3, *cells(size, 4))
        assert torch.equal(main, logits)
        assert auxiliary.shape == (2, 3, *cells(size, 16))
        assert (one, weight) == (1.0, 0.4)


def test_logits_before_the_library_enlarges_them() -> None:
    """With the same weights the library gives the same, enlarged and without dropout."""
    network = tiny()
    model = transformers.UperNetForSemanticSegmentation(
        upernet._config(transformers, "tiny", 3, TINY)
    ).eval()
    result = model.load_state_dict(network.state_dict(), strict=False)
    assert not result.unexpected_keys
    assert {k.rsplit(".", 1)[0] for k in result.missing_keys} == {"backbone.swin.layernorm"}
    x = images(1, 3, 50, 61)
    with torch.no_grad():
        enlarged = nn.functional.interpolate(network(x), (50, 61), mode="bilinear")
        assert torch.allclose(model(x).logits, enlarged, atol=1e-6)


def test_the_settings_of_the_specification() -> None:
    with torch.device("meta"):
        config = upernet._config(transformers, "tiny", 21, {})
        network = UperNetSwin(transformers.UperNetForSemanticSegmentation(config))
    swin = network.backbone.swin
    blocks = [block for stage in swin.encoder.layers for block in stage.blocks]
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in blocks]
    assert rates == pytest.approx([0.3 * n / 11 for n in range(12)])
    assert {block.window_size for block in blocks} == {7}
    assert [block.shift_size for block in blocks[:3]] == [0, 3, 0]
    assert swin.embeddings.patch_embeddings.projection.stride == (4, 4)
    assert swin.embeddings.position_embeddings is None
    assert set(network.backbone.hidden_states_norms) == {f"stage{n}" for n in (1, 2, 3, 4)}
    pools = [
        block[0].output_size for block in (b.layers for b in network.decode_head.psp_modules.blocks)
    ]
    assert pools == [1, 2, 3, 6]
    assert network.auxiliary_head.in_index == 2
    assert network.auxiliary_head.num_convs == 1


def test_dropout_of_whole_channels_before_both_classifiers() -> None:
    torch.manual_seed(0)
    network = tiny(arguments={**TINY, "channels": 400, "auxiliary_channels": 400}).train()
    for head in (network.decode_head, network.auxiliary_head):
        classifier = head.classifier
        nn.init.ones_(classifier.weight)
        x = torch.ones(1, 400, 2, 3)
        with torch.no_grad():
            found = classifier(x) / 400
            # a channel is dropped as a whole; the sums of two places may be rounded otherwise
            assert torch.allclose(found[..., 0, 0], found[..., 1, 2], rtol=1e-4)
            kept = float(found[0, 0, 0, 0]) * 0.9
            assert kept != 1.0
            assert abs(kept - 0.9) < 0.08
            assert torch.allclose(classifier.eval()(x) / 400, torch.ones(()))


def test_both_paths_of_a_block_are_dropped() -> None:
    network = tiny(arguments={**TINY, "drop_path": 1.0 - 1e-9})
    block = network.backbone.swin.encoder.layers[3].blocks[0]
    x = images(2, 4, 96)
    with torch.no_grad():
        assert not torch.equal(block(x, (2, 2), always_partition=True)[0], x)
        block.train()
        assert torch.equal(block(x, (2, 2), always_partition=True)[0], x)
        # a copy has switches of its own
        twin = copy.deepcopy(block).eval()
        assert not torch.equal(twin(x, (2, 2), always_partition=True)[0], x)
        assert torch.equal(block(x, (2, 2), always_partition=True)[0], x)


def published(folder: Path) -> nn.Module:
    """A classifier as the hub holds it: a folder with settings and weights."""
    model: nn.Module = transformers.SwinForImageClassification(transformers.SwinConfig(**SWIN))
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    model.save_pretrained(folder)  # type: ignore[operator]
    return model


def test_published_weights_from_a_folder_and_from_its_file(tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = published(tmp_path)
    file = tmp_path / "model.safetensors"
    assert any("attention.self.query" in name for name in load_file(file))
    by_folder = tiny(weights="pretrained", arguments={**TINY, "checkpoint": str(tmp_path)})
    by_file = tiny(weights=file)
    expected = {
        k.removeprefix("swin."): v
        for k, v in model.state_dict().items()
        if k.startswith("swin.") and "swin.layernorm" not in k
    }
    for network in (by_folder, by_file):
        found = network.backbone.swin.state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[k], expected[k]) for k in expected)
    # the rest is what the seed gives
    assert torch.equal(
        by_file.decode_head.bottleneck.conv.weight, tiny().decode_head.bottleneck.conv.weight
    )
    network = tiny(weights=file)
    save_file(network.backbone.swin.state_dict(), file)  # present names
    again = tiny(weights=file)
    assert all(
        torch.equal(a, b)
        for a, b in zip(again.state_dict().values(), network.state_dict().values(), strict=True)
    )


def test_a_checkpoint_that_cannot_be_had(tmp_path: Path) -> None:
    with pytest.raises(ClassifierError, match="cannot be loaded"):
        tiny(weights="pretrained", arguments={**TINY, "checkpoint": str(tmp_path)})


def test_a_checkpoint_of_another_network(tmp_path: Path) -> None:
    config = transformers.SwinConfig(**SWIN)
    transformers.SwinModel(config, add_pooling_layer=False).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    save_file({f"other.{k}": v for k, v in state.items()}, file, {"format": "pt"})
    with pytest.raises(ClassifierError, match="is missing"):
        tiny(weights="pretrained", arguments={**TINY, "checkpoint": str(tmp_path)})


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"depths": [2, 1, 4, 1]}, "blocks.2"),
        ({"depths": [2, 1, 1, 1]}, "blocks.1"),
        ({"embed_dim": 24}, "embeddings"),
    ],
)
def test_a_file_of_another_size(tmp_path: Path, change: dict[str, Any], key: str) -> None:
    published(tmp_path)
    with pytest.raises(ClassifierError, match=key):
        tiny(weights=tmp_path / "model.safetensors", arguments={**TINY, **change})


def test_without_transformers_the_message_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ClassifierError, match="transformers"):
        tiny()


def test_bad_sizes_and_arguments() -> None:
    with pytest.raises(ClassifierError, match="'huge'"):
        tiny(size="huge")
    with pytest.raises(ClassifierError, match="'width'"):
        tiny(arguments={"width": 3})
    with pytest.raises(ClassifierError, match="depths"):
        tiny(arguments={"depths": [2, 2]})
    with pytest.raises(ClassifierError, match="'tiny'"):
        tiny(arguments={**TINY, "embed_dim": "wide"})
