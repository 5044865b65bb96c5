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

from lpcam.classifiers.classifier import Classifier
from lpcam.classifiers.feature_store import FeatureStore, image_pyramid
from lpcam.classifiers.features import FeaturePair
from lpcam.data.dataset import Item
from lpcam.data.folder import read_folder
from lpcam.data.images import limit_long_side, read_image
from lpcam.runtime.errors import PrototypeError
from lpcam.runtime.parallel import ordered_map

SCALES = (1.0, 0.5)


@pytest.fixture
def items(pictures: Path) -> list[Item]:
    return list(read_folder(pictures).items.values())[:4]


def make(classifier: Classifier, keep: Iterable[Item], **changes: Any) -> FeatureStore:
    options = {"flip": True, "maximum_side": 128, "dtype": "float16", "budget": 2**30}
    return FeatureStore(classifier, **{**options, **changes}, keep=[item.id for item in keep])


def count_passes(monkeypatch: pytest.MonkeyPatch, store: FeatureStore) -> list[int]:
    """A list that gets the number of images whenever the store's backbone is run."""
    passes: list[int] = []
    forward = store.classifier.features

    def counted(images: Tensor) -> Tensor:
        passes.append(images.shape[0])
        return forward(images)

    monkeypatch.setattr(store.classifier, "features", counted)
    return passes


def equal(a: FeaturePair, b: FeaturePair) -> bool:
    if a.mirrored is None or b.mirrored is None:
        return a.mirrored is b.mirrored and torch.equal(a.features, b.features)
    return torch.equal(a.features, b.features) and torch.equal(a.mirrored, b.mirrored)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_memory_and_backbone_give_the_same_bytes(
    classifier: Classifier, items: list[Item], monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    kept = make(classifier, items, dtype=dtype)
    fresh = make(classifier, items, dtype=dtype, budget=0)
    passes = count_passes(monkeypatch, kept)
    first = [pair for item in items for pair in kept.pairs([item], SCALES)]
    assert passes == [2] * 8  # image and mirror in one pass, four images, two scales
    again = [pair for item in items for pair in kept.pairs([item], SCALES)]
    assert len(passes) == 8  # nothing is computed twice
    other = [pair for item in items for pair in fresh.pairs([item], SCALES)]
    for one, two, three in zip(first, again, other, strict=True):
        assert one.features.dtype == torch.float32
        assert equal(one, two)
        assert equal(one, three)
    assert fresh.used == 0


@pytest.mark.parametrize("side", [128, 32])
def test_features_are_those_of_the_shrunk_image_rounded(
    classifier: Classifier, items: list[Item], side: int
) -> None:
    changes = {"maximum_side": side}
    (whole,) = make(classifier, [], dtype="float32", **changes).pairs([items[0]], (0.5,))
    (half,) = make(classifier, [], dtype="float16", **changes).pairs([items[0]], (0.5,))
    with torch.inference_mode():
        image = limit_long_side(read_image(items[0].image), side)[None]
        (expected,) = image_pyramid(classifier.folded(), image, (0.5,), flip=True)
    assert equal(whole, expected)
    assert torch.equal(half.features, expected.features.half().float())
    assert not torch.equal(half.features, expected.features)


@pytest.mark.parametrize(
    ("factor", "named"), [(1e7, "'i00'.*maps.features"), (float("nan"), "'i00'.*NaN")]
)
def test_features_that_cannot_be_kept(
    classifier: Classifier,
    items: list[Item],
    monkeypatch: pytest.MonkeyPatch,
    factor: float,
    named: str,
) -> None:
    half, whole = make(classifier, items), make(classifier, items, dtype="float32")
    for store in (half, whole):
        forward = store.classifier.features
        monkeypatch.setattr(
            store.classifier, "features", lambda images, forward=forward: forward(images) * factor
        )
    with pytest.raises(PrototypeError, match=named):
        list(half.pairs([items[0]], SCALES))
    assert half.used == 0
    if factor > 0:
        assert len(list(whole.pairs([items[0]], SCALES))) == 2


@pytest.fixture
def equal_items(tmp_path: Path) -> list[Item]:
    """Six images of one size."""
    rng = np.random.default_rng(3)
    items = []
    for number in range(6):
        path = tmp_path / f"e{number}.png"
        Image.fromarray(rng.integers(0, 256, (50, 66, 3), dtype=np.uint8)).save(path)
        items.append(Item(f"e{number}", path, (0,)))
    return items


def test_a_batch_is_its_images(
    classifier: Classifier, equal_items: list[Item], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make(classifier, equal_items)
    passes = count_passes(monkeypatch, store)
    together = list(store.pairs(equal_items[:4], SCALES))
    assert passes == [8, 8]
    for row, item in enumerate(equal_items[:4]):
        alone = make(classifier, []).pairs([item], SCALES)
        for batched, single in zip(together, alone, strict=True):
            for many, one in zip(batched[:2], single[:2], strict=True):
                assert torch.allclose(many[row], one[0], atol=1e-3)
    passes.clear()
    # other partners, in another order, from memory: the very same bytes
    (again,) = store.pairs([equal_items[3], equal_items[0]], (0.5,))
    assert passes == []
    assert torch.equal(again.features, together[1].features[[3, 0]])


def test_an_image_counts_once(classifier: Classifier, equal_items: list[Item]) -> None:
    """One that is kept and comes again beside one that is not takes no more of the budget."""
    first, second, third, *_ = equal_items
    store = make(classifier, [first, third])
    list(store.pairs([first], (1.0,)))
    size = store.used
    assert size > 0
    for partner in (second, second, second):
        list(store.pairs([first, partner], (1.0,)))
    assert store.used == size
    list(store.pairs([first, third], (1.0,)))
    assert store.used == 2 * size


@pytest.mark.parametrize("share", [0.0, 0.4, 2.0])
def test_threads_get_the_same_bytes_within_the_budget(
    classifier: Classifier, equal_items: list[Item], share: float
) -> None:
    expected = [list(make(classifier, []).pairs([item], SCALES)) for item in equal_items]
    whole = make(classifier, equal_items)
    for item in equal_items:
        list(whole.pairs([item], SCALES))
    store = make(classifier, equal_items, budget=int(whole.used * share))
    most = []

    def work(turn: int) -> tuple[int, list[FeaturePair]]:
        place = turn % len(equal_items)
        found = list(store.pairs([equal_items[place]], SCALES))
        most.append(store.used)
        return place, found

    for place, found in ordered_map(work, range(5 * len(equal_items)), 4):
        assert all(equal(a, b) for a, b in zip(found, expected[place], strict=True))
    assert max(most) <= store.budget
    assert (store.used > 0) == (share > 0)
    if share > 1:
        assert store.used == whole.used


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_precision_of_the_passes(
    classifier: Classifier, equal_items: list[Item], precision: str
) -> None:
    whole = make(classifier, [], dtype="float32").pairs(equal_items[:2], SCALES)
    fast = make(classifier, [], dtype="float32", precision=precision).pairs(equal_items[:2], SCALES)
    for expected, found in zip(whole, fast, strict=True):
        assert found.features.dtype == torch.float32
        assert not torch.equal(found.features, expected.features)
        assert (found.features - expected.features).norm() < 0.03 * expected.features.norm()


def test_later_changes_of_the_classifier_do_not_reach_the_store(
    classifier: Classifier, items: list[Item]
) -> None:
    store = make(classifier, [])
    (before,) = store.pairs(items[:1], (1.0,))
    with torch.no_grad():
        for parameter in classifier.parameters():
            parameter.zero_()
    (after,) = store.pairs(items[:1], (1.0,))
    assert equal(before, after)
