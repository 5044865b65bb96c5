"""MCTformer V2 against the released program's, tolerance 1e-4."""

import pytest
import torch
from parity.golden import load

from lpcam.classifiers.classifier import BackboneSpec
from lpcam.hosts.mctformer import fuse, refine
from lpcam.hosts.mctformer_network import Mctformer, MctformerSettings, build_mctformer

TOLERANCE = 1e-4


def network_of(golden: dict[str, torch.Tensor]) -> Mctformer:
    state = {k.removeprefix("state."): v for k, v in golden.items() if k.startswith("state.")}
    count, width = state["cls_token"].shape[1:]
    arguments = {
        "embed_dim": width,
        "depth": int(golden["depth"]),
        "num_heads": int(golden["heads"]),
        "patch_size": int(golden["patch"]),
        "mlp_ratio": state["blocks.0.mlp.fc1.weight"].shape[0] / width,
    }
    network = build_mctformer(
        BackboneSpec("vit_tiny_patch16_224", arguments),
        [f"class {n}" for n in range(count)],
        MctformerSettings.from_preset("official", crop=golden["image"].shape[-1]),
        weights="random",
    )
    network.load_state_dict(state, strict=True)
    return network


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


@torch.no_grad()
def test_scores_in_training_and_test() -> None:
    golden = load("mctformer_v2")
    scores = network_of(golden)(golden["image"])
    close(scores.classes, golden["class_logits"])
    close(scores.patches, golden["patch_logits"])


@torch.no_grad()
@pytest.mark.parametrize(("image", "name"), [("image", "square"), ("wide_image", "wide")])
def test_what_maps_are_made_of(image: str, name: str) -> None:
    golden = load("mctformer_v2")
    found = network_of(golden).attend(golden[image], int(golden["layers_for_class_attention"]))
    close(found.scores.classes, golden[f"{name}_class_logits"])
    close(found.class_attention, golden[f"{name}_class_attention"])
    assert found.patch_cam is not None
    close(found.patch_cam.relu(), golden[f"{name}_patch_cam"])
    fused = fuse(found.class_attention, found.patch_cam, "product")
    close(fused, golden[f"{name}_fused"])
    close(refine(fused, found.patch_affinity), golden[f"{name}_refined"])
