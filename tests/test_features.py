"""The feature store: the same bytes from memory and backbone, within its budget."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from lpcam import features
from lpcam.classifier import Classifier
from lpcam.data.folder import read_folder
from lpcam.data.images import limit_long_side, read_image
from lpcam.data.items import Item
from lpcam.errors import ImageError, PrototypeError
from lpcam.extract import FeaturePair, image_pyramid
from lpcam.features import FeatureStore, container_limits, default_budget

SCALES = (1.0, 0.5)


@pytest.fixture
def items(pictures: Path) -> list[Item]:
    return list(read_folder(pictures).items.values())[:4]


def make(classifier: Classifier, keep: Iterable[Item], **changes: Any) -> FeatureStore:
    options = {"flip": True, "maximum_side": 128, "dtype": "float16", "budget": 2**30}
    return FeatureStore(classifier, **{**options, **changes}, keep=[item.id for item in keep])


def count_passes(classifier: Classifier, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that gets an entry whenever the backbone is run."""
    passes: list[int] = []
    forward = classifier.features

    def counted(images: Tensor) -> Tensor:
        passes.append(images.shape[0])
        return forward(images)

    monkeypatch.setattr(classifier, "features", counted)
    return passes


def equal(a: FeaturePair, b: FeaturePair) -> bool:
    if a.mirrored is None or b.mirrored is None:
        return a.mirrored is b.mirrored and torch.equal(a.features, b.features)
    return torch.equal(a.features, b.features) and torch.equal(a.mirrored, b.mirrored)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_memory_and_backbone_give_the_same_bytes(
    classifier: Classifier, items: list[Item], monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    passes = count_passes(classifier, monkeypatch)
    kept = make(classifier, items, dtype=dtype)
    fresh = make(classifier, items, dtype=dtype, budget=0)
    first = [list(kept.pairs(item, SCALES)) for item in items]
    assert passes == [2] * 8  # image and mirror in one pass, four images, two scales
    again = [list(kept.pairs(item, SCALES)) for item in items]
    assert len(passes) == 8  # nothing is computed twice
    other = [list(fresh.pairs(item, SCALES)) for item in items]
    for of_first, of_again, of_other in zip(first, again, other, strict=True):
        for one, two, three in zip(of_first, of_again, of_other, strict=True):
            assert one.features.dtype == torch.float32
            assert equal(one, two)
            assert equal(one, three)
    assert fresh.used == 0


def test_features_are_those_of_the_image_rounded(classifier: Classifier, items: list[Item]) -> None:
    (whole,) = make(classifier, [], dtype="float32").pairs(items[0], (0.5,))
    (half,) = make(classifier, [], dtype="float16").pairs(items[0], (0.5,))
    with torch.inference_mode():
        (expected,) = image_pyramid(classifier, read_image(items[0].image), (0.5,), flip=True)
    assert equal(whole, expected)
    assert torch.equal(half.features, expected.features.half().float())
    assert not torch.equal(half.features, expected.features)


def test_scales_come_in_the_order_asked_for(classifier: Classifier, items: list[Item]) -> None:
    store = make(classifier, items)
    (alone,) = store.pairs(items[0], (0.5,))
    mixed = list(store.pairs(items[0], (1.0, 0.5)))  # the second from memory, the first not
    assert equal(mixed[1], alone)
    assert mixed[0].features.shape[-1] > alone.features.shape[-1]


@pytest.mark.parametrize("flip", [True, False])
def test_the_mirror_is_there_if_asked_for(
    classifier: Classifier, items: list[Item], monkeypatch: pytest.MonkeyPatch, flip: bool
) -> None:
    passes = count_passes(classifier, monkeypatch)
    store = make(classifier, items, flip=flip)
    for _ in range(2):
        (pair,) = store.pairs(items[0], (1.0,))
        assert (pair.mirrored is not None) == flip
    assert passes == [2 if flip else 1]
    bytes_a_view = pair.features.numel() * 2
    assert store.used == bytes_a_view * (2 if flip else 1)


def test_the_budget_is_kept(
    classifier: Classifier, items: list[Item], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make(classifier, items)
    sizes = []
    for item in items:
        before = whole.used
        list(whole.pairs(item, SCALES))
        sizes.append(whole.used - before)
    store = make(classifier, items, budget=sizes[0] + sizes[1])
    for item in items:
        list(store.pairs(item, SCALES))
    assert 0 < store.used <= store.budget
    passes = count_passes(classifier, monkeypatch)
    list(store.pairs(items[0], SCALES))
    assert passes == []  # the first to come is kept
    list(store.pairs(items[3], SCALES))
    assert passes  # what found no room is computed again
    assert store.used <= store.budget


def test_what_nobody_asks_for_again_is_never_kept(
    classifier: Classifier, items: list[Item], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make(classifier, items[1:])
    passes = count_passes(classifier, monkeypatch)
    for _ in range(2):
        list(store.pairs(items[0], SCALES))
    assert len(passes) == 4
    assert store.used == 0
    list(store.pairs(items[1], SCALES))
    assert store.used > 0


def test_too_large_for_half_precision(
    classifier: Classifier, items: list[Item], monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = classifier.features
    monkeypatch.setattr(classifier, "features", lambda images: forward(images) * 1e7)
    with pytest.raises(
        PrototypeError,
        match=r"features of image 'i00' are too large for half .*set maps\.features to float32",
    ):
        list(make(classifier, items).pairs(items[0], SCALES))
    assert len(list(make(classifier, items, dtype="float32").pairs(items[0], SCALES))) == 2


def test_nan_names_the_image(
    classifier: Classifier, items: list[Item], monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = classifier.features
    monkeypatch.setattr(classifier, "features", lambda images: forward(images) * float("nan"))
    store = make(classifier, items)
    with pytest.raises(PrototypeError, match="image 'i01': the backbone gave NaN or Inf"):
        list(store.pairs(items[1], SCALES))
    assert store.used == 0


def test_a_long_image_is_shrunk_first(classifier: Classifier, tmp_path: Path) -> None:
    path = tmp_path / "long.png"
    pixels = np.random.default_rng(0).integers(0, 256, (60, 300, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    (found,) = make(classifier, [], dtype="float32", maximum_side=100).pairs(
        Item("long", path, (0,)), (1.0,)
    )
    shrunk = limit_long_side(pixels, 100)
    assert shrunk.shape == (20, 100, 3)
    with torch.inference_mode():
        (expected,) = image_pyramid(classifier, shrunk, (1.0,), flip=True)
    assert equal(found, expected)


def test_an_image_that_cannot_be_read(classifier: Classifier, tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"cannot read image .*gone\.png"):
        list(make(classifier, []).pairs(Item("gone", tmp_path / "gone.png", (0,)), (1.0,)))


# -- how much memory there is ---------------------------------------------------------------------


def groups(tmp_path: Path, lines: str, files: dict[str, str]) -> list[int]:
    """The limits found where a process is in the groups of ``lines``."""
    membership = tmp_path / "cgroup"
    membership.write_text(lines, "utf-8")
    for name, text in files.items():
        path = tmp_path / "groups" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")
    return container_limits(membership, tmp_path / "groups")


@pytest.mark.parametrize(
    ("lines", "files", "expected"),
    [
        ("0::/\n", {"memory.max": "4096\n"}, {4096}),
        ("0::/\n", {"memory.max": "max\n"}, set()),
        # a group above may be the narrower one
        ("0::/a/b\n", {"a/memory.max": "50\n", "a/b/memory.max": "70\n"}, {50, 70}),
        # inside a container, the path is that of the host and only the root is seen
        ("0::/docker/123\n", {"memory.max": "80\n"}, {80}),
        (
            "5:cpu,cpuacct:/x\n4:memory:/x\n0::/\n",
            {"memory/x/memory.limit_in_bytes": "90\n", "cpu/x/memory.limit_in_bytes": "1\n"},
            {90},
        ),
        ("0::/\n", {}, set()),
    ],
)
def test_limits_of_control_groups(
    tmp_path: Path, lines: str, files: dict[str, str], expected: set[int]
) -> None:
    assert set(groups(tmp_path, lines, files)) == expected


def test_without_control_groups(tmp_path: Path) -> None:
    assert container_limits(tmp_path / "none", tmp_path) == []


def test_the_budget_is_a_quarter_of_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "container_limits", lambda: [])
    machine = default_budget()
    monkeypatch.setattr(features, "container_limits", lambda: [4000, 8000])
    assert default_budget() == 1000
    monkeypatch.setattr(features, "container_limits", lambda: [2**63 - 4096])  # version 1: none
    assert default_budget() == machine
