"""Files with the names and shapes of released checkpoints are recognised, converted and loaded."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from parity.golden import load_json
from torch import Tensor

from lpcam.classifiers.classifier import Classifier
from lpcam.data.voc import CLASSES
from lpcam.formats.weights import convert_weights
from lpcam.hosts.mctformer_network import Mctformer
from lpcam.pipeline.released import released_kinds
from lpcam.runtime.errors import ArtefactError
from lpcam.training.released import RESNET50_COPIES, recognised

KINDS = released_kinds()
State = dict[str, Tensor]


def state_of(name: str) -> State:
    """Tensors of the names and shapes of a released file, the values of one tensor all equal."""
    golden = load_json(f"names/{name}")
    dtypes = golden.get("not_float32", {})
    state = {
        key: torch.tensor(number / 1000, dtype=getattr(torch, dtypes.get(key, "float32"))).expand(
            shape
        )
        for number, (key, shape) in enumerate(golden["names"].items())
    }
    return state | {later: state[first] for later, first in golden.get("same_tensor", {}).items()}


def saved(state: Any, path: Path) -> Path:
    torch.save({key: tensor.clone() for key, tensor in state.items()}, path)
    return path


@pytest.mark.parametrize(
    ("name", "section", "classes"),
    [
        ("lpcam_classifier_20", "classifier", 20),
        ("lpcam_classifier_80", "classifier", 80),
        ("psa_classifier", "classifier", 20),
        ("amn", "host", 20),
        ("edam", "host", 20),
        ("mctformer_v1_20", "host", 20),
        ("mctformer_v1_80", "host", 80),
        ("mctformer_v2_20", "host", 20),
        ("mctformer_v2_80", "host", 80),
        ("irn", "refine", 0),
        ("irn_inference", "refine", 0),
        ("psa_affinity", "refine", 0),
        ("wideresnet38_segmenter", "segment", 20),
    ],
)
def test_every_tensor_finds_its_place(name: str, section: str, classes: int) -> None:
    state = state_of(name)
    kind = recognised(state, KINDS)
    assert kind is not None
    assert (kind.section, kind.classes(state) if kind.classes else 0) == (section, classes)
    network = kind.build([f"class {n}" for n in range(classes)])
    kind.load(network, state)

    def values(state: State, left_out: str) -> set[float]:
        kept = [t for n, t in state.items() if not re.match(left_out, n) and t.is_floating_point()]
        return {round(float(tensor.flatten()[0]), 3) for tensor in kept}

    ours = "|".join(map(re.escape, kind.ours)) or "$"
    assert values(network.state_dict(), ours) <= values(state, RESNET50_COPIES)  # none of its own


@pytest.mark.parametrize(
    ("name", "wrapped"),
    [("lpcam_classifier_20", "module."), ("mctformer_v2_20", "_orig_mod.module.")],
)
def test_a_file_becomes_a_network(name: str, wrapped: str, tmp_path: Path) -> None:
    state = state_of(name)
    contents = {wrapped + key: tensor.clone() for key, tensor in state.items()}
    source, target = tmp_path / "released.pth", tmp_path / "converted.safetensors"
    torch.save(contents if "lpcam" in name else {"model": contents}, source)
    done = convert_weights(source, target, kinds=KINDS)
    network: Any = (Classifier if "lpcam" in name else Mctformer).load(target)
    assert tuple(network.classes) == CLASSES
    if "lpcam" in name:
        assert "classifier.trained" in done
        expected = state["resnet50.layer1.0.conv1.weight"]
        assert torch.equal(network.backbone.layer1[0].conv1.weight, expected)
    else:
        assert "host.trained" in done
        assert torch.equal(network.head.weight, state["head.weight"])


def test_a_second_classifier_takes_the_backbone_of_the_first(tmp_path: Path) -> None:
    assert list(state_of("recam_predictor_20")) == ["classifier.weight"]
    head = torch.arange(20.0)[:, None, None, None].expand(20, 2048, 1, 1)
    first = saved(state_of("lpcam_classifier_20"), tmp_path / "res50_cam.pth")
    second = saved({"classifier.weight": head}, tmp_path / "recam.pth")
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    convert_weights(first, one, kinds=KINDS)
    with pytest.raises(ArtefactError, match="--onto"):
        convert_weights(second, two, kinds=KINDS)
    convert_weights(second, two, kinds=KINDS, onto=one)
    assert torch.equal(Classifier.load(two).weight, head.flatten(1))


def other_shape(state: State) -> None:
    state["classifier.weight"] = torch.zeros(20, 512, 1, 1)


def other_classes(state: State) -> None:
    state["classifier.weight"] = torch.zeros(21, 2048, 1, 1)


def half(state: State) -> None:
    state.update({key: tensor.half() for key, tensor in state.items()})


def two_kinds(state: State) -> None:
    state["label_enc.weight"] = torch.zeros(2048, 20)


@pytest.mark.parametrize(
    ("expected", "change"),
    [
        ("missing: backbone.bn1.weight", lambda state: state.pop("resnet50.bn1.weight")),
        ("unknown: extra", lambda state: state.update(extra=torch.zeros(3))),
        ("of another shape: head.weight", other_shape),
        ("not float32", half),
        ("21 classes", other_classes),
        ("AMN's network", two_kinds),
    ],
)
def test_what_does_not_fit_is_named(
    expected: str, change: Callable[[State], object], tmp_path: Path
) -> None:
    state = state_of("lpcam_classifier_20")
    change(state)
    source, target = saved(state, tmp_path / "w.pth"), tmp_path / "w.safetensors"
    with pytest.raises(ArtefactError, match=expected):
        convert_weights(source, target, kinds=KINDS)
    assert not target.exists()
