"""What a loader may give, what is refused, and that only the labelled classes are computed."""

import warnings
from collections import UserDict
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from tiny import Patches, headed, picture
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lpcam import CAM, LPCAM
from lpcam.method import multi_scale
from lpcam.method.batches import BATCH, read_images, read_labels
from lpcam.method.settings import LpcamSettings
from lpcam.runtime.errors import BatchError, ClassifierError, NotFittedError, PrototypeError

SETTINGS = LpcamSettings.from_preset(
    "voc12.official", clusters=2, scales=[1.0, 0.5], mu_f=0.5, tau=0.3
)
IMAGES = torch.stack([picture(0.9, 0.1), picture(0.1, 0.9), picture(0.8, 0.7)])
FIRST = torch.tensor([0, 1, 1])
NAMES = ("red", "green")


def images_as(kind: str) -> Any:
    return {"array": IMAGES.numpy(), "list": list(IMAGES), "float64": IMAGES.double()}[kind]


LOADERS: dict[str, Callable[[], Any]] = {
    "three": lambda: [(IMAGES, FIRST, "paths")],
    "list": lambda: [[IMAGES, FIRST.tolist()]],
    "parts of a data loader": lambda: DataLoader(TensorDataset(IMAGES, FIRST, FIRST), batch_size=2),
    "dictionary": lambda: [{"pixel_values": IMAGES, "labels": FIRST[:, None], "mask": None}],
    "Hugging Face": lambda: [UserDict(image=images_as("array"), label=FIRST.int().numpy())],
    "images": lambda: [{"images": images_as("list"), "label": FIRST.to(torch.uint8)}],
    "arrays": lambda: [(list(images_as("array")), np.eye(2, dtype=bool)[FIRST])],
    "names": lambda: [(IMAGES, ["red", "green", "green"])],
    "lists of names": lambda: [(images_as("float64"), (["red"], ("green",), np.array(["green"])))],
    "lists of indices": lambda: [(IMAGES, [[0], [1], {1}])],
    "tensors": lambda: [(IMAGES, [torch.tensor([0]), torch.tensor([1]), torch.tensor(1)])],
    "rows": lambda: [(IMAGES, [[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])],
    "row tensors": lambda: [(IMAGES, list(torch.eye(2)[FIRST]))],
}


@pytest.mark.parametrize("kind", LOADERS)
def test_accepted(kind: str) -> None:
    expected = LPCAM(headed(), SETTINGS, classes=NAMES).fit([(IMAGES, torch.eye(2)[FIRST])])
    found = LPCAM(headed(), SETTINGS, classes=NAMES).fit(LOADERS[kind]())
    torch.testing.assert_close(found.prototypes_.vectors(), expected.prototypes_.vectors())
    with_head = LPCAM(Patches(), SETTINGS, classes=NAMES).fit(LOADERS[kind]())
    assert with_head.source_.weight.shape == (2, 6)


BATCHES: dict[str, tuple[Any, str]] = {
    "images alone": (IMAGES, "without labels"),
    "images alone in a list": ([IMAGES], "without labels"),
    "no known key": ({"x": IMAGES, "labels": FIRST}, "'x', 'labels'"),
    "two keys": ({"image": IMAGES, "images": IMAGES, "label": FIRST}, "'images'"),
    "uint8": (((IMAGES * 255).byte(), FIRST), r"uint8.*255"),
    "one image": ((IMAGES[0], 0), r"images\[None\]"),
    "channels last": ((IMAGES.permute(0, 2, 3, 1), FIRST), r"permute\(0, 3, 1, 2\)"),
    "sizes": (([IMAGES[0], IMAGES[1, :, :32]], [0, 1]), "32"),
    "no image": ((IMAGES[:0], FIRST[:0]), r"\(0, 3"),
    "pictures": ((["a.png"], [0]), "a.png"),
    "None": ((IMAGES, None), "None"),
}


@pytest.mark.parametrize("kind", BATCHES)
def test_refused_batches(kind: str) -> None:
    batch, named = BATCHES[kind]
    with pytest.raises(BatchError, match=named):
        LPCAM(headed(), SETTINGS).fit([batch])
    with pytest.raises(BatchError, match=named):
        LPCAM(Patches(), SETTINGS, classes=NAMES).fit([batch])


LABELS: dict[str, tuple[Any, int, int, str]] = {
    "soft": (torch.tensor([[0.3, 0.7]]), 1, 2, "0.3"),
    "NaN": (torch.tensor([[float("nan"), 1.0]]), 1, 2, "nan"),
    "signs": (torch.tensor([[1, -1]]), 1, 2, "-1"),
    "counts": (np.array([[0, 2, 1]]), 1, 3, "2"),
    "pixels": (np.array([[0, 255, 0]], np.uint8), 1, 3, "255"),
    "negative": (torch.tensor([0, -1]), 2, 3, "-1"),
    "out of range": ([0, 3], 2, 3, "3"),
    "float indices": (torch.tensor([0.0, 1.0]), 2, 3, r"labels\.long"),
    "float in a list": ([0.0, 1.0], 2, 3, "0.0"),
    "another number": (torch.tensor([0]), 2, 3, r"\(1,\)"),
    "another number in a list": ([0], 2, 3, "1 labels for 2"),
    "padded": (torch.tensor([[0, 1, -100]]), 1, 5, r"\(1, 3\)"),
    "true or false": (torch.tensor([True, False]), 2, 2, "bool"),
    "binary": (torch.tensor([0, 1]), 2, 1, r"labels\[:, None\]"),
    "rows or indices": ([[0, 1], [1, 0]], 2, 2, "may be class indices or rows"),
    "rows or indices of one class": ([[0], [1]], 2, 1, "may be"),
    "transposed": ([torch.tensor([0, 1]), torch.tensor([1, 0])], 2, 2, "one for each class"),
    "transposed, three": ([torch.tensor([0, 1])] * 3, 2, 3, "one for each class"),
    "a string": ("cat", 3, 3, "'cat'"),
    "an unknown name": (["cow", "bee"], 2, 3, "'bee'"),
    "a name of two": (["dog"], 1, 4, "several.*'dog'"),
    "twice": ([[1, 1]], 1, 3, "repeat"),
    "nothing": ([None], 1, 3, "None"),
    "sparse scores": (torch.tensor([[0.0, 0.5]]).to_sparse(), 1, 2, "0.5"),
}


@pytest.mark.parametrize("kind", LABELS)
def test_refused_labels(kind: str) -> None:
    labels, count, classes, named = LABELS[kind]
    with pytest.raises(BatchError, match=named):
        read_labels(labels, count, ("cow", "dog", "hen", "dog")[:classes])


@pytest.mark.parametrize(
    ("labels", "count", "classes", "expected"),
    [
        (torch.eye(2, dtype=torch.int64), 2, 2, [[0], [1]]),  # a tensor (B, N) is no index list
        (torch.tensor([[0], [1]]), 2, 1, [[], [0]]),
        (torch.tensor([True, False]), 2, 1, [[0], []]),
        (torch.tensor([[2], [1]]), 2, 3, [[2], [1]]),
        (torch.tensor(2), 1, 3, [[2]]),
        (np.int64(2) * np.ones(2, np.uint16), 2, 3, [[2], [2]]),
        ([np.int32(2), torch.tensor(1)], 2, 3, [[2], [1]]),
        ([[2, 0], []], 2, 3, [[0, 2], []]),
        ([[0, 0, 1], [1, 0, 0]], 2, 3, [[2], [0]]),
        ([[True, False, True]], 1, 3, [[0, 2]]),
        ([["hen", "cow"], []], 2, 3, [[0, 2], []]),
        (["cow", "dog"], 2, 3, [[0], [1]]),
    ],
)
def test_readings_of_labels(
    labels: Any, count: int, classes: int, expected: list[list[int]]
) -> None:
    assert read_labels(labels, count, ("cow", "dog", "hen")[:classes]) == expected


def test_images_that_were_not_scaled_are_told_of() -> None:
    with pytest.warns(UserWarning, match="255"):
        read_images((IMAGES * 255).round(), 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for usual in (IMAGES, IMAGES * 5 - 2, (IMAGES * 255).round() - 123, torch.ones(1, 3, 4, 4)):
            read_images(usual, 3)


def test_loaders_that_end() -> None:
    class Once:
        def __init__(self) -> None:
            self.batches = iter([(IMAGES, FIRST)])

        def __iter__(self) -> Iterator[Any]:
            return self.batches

    for classes, loader in ((None, []), (NAMES, []), (NAMES, Once())):
        with pytest.raises(PrototypeError, match="no image"):
            LPCAM(Patches() if classes else headed(), SETTINGS, classes=classes).fit(loader)
    with pytest.raises(PrototypeError, match="no image"):
        list(LPCAM(headed(), SETTINGS).fit_maps(Once()))
    with pytest.raises(BatchError, match="int"):
        LPCAM(headed(), SETTINGS).fit(3)  # type: ignore[arg-type]


def test_one_sentence_says_what_a_batch_is() -> None:
    words = " ".join((LPCAM.fit.__doc__ or "").split())
    assert BATCH in words


@pytest.mark.parametrize("classes", ["cat", [], [1, 2], 3, {"a", "b"}])
def test_classes_are_a_list_of_names(classes: Any) -> None:
    with pytest.raises(ClassifierError, match="list of names"):
        LPCAM(headed(), SETTINGS, classes=classes).fit([(IMAGES, FIRST)])


@pytest.mark.parametrize("split_maps", ["multi_scale", "single_scale"])
def test_only_the_labelled_classes_are_computed(
    split_maps: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = SETTINGS.model_copy(update={"split_maps": split_maps})
    few = LPCAM(headed(), settings).fit([(IMAGES, FIRST)])
    maps = few(IMAGES)
    counts: list[int] = []

    def counted(scales: list[Tensor], *args: Any, **options: Any) -> Any:
        counts.append(scales[0].shape[-3])
        return fuse(scales, *args, **options)

    fuse = multi_scale.fuse_scales
    monkeypatch.setattr(multi_scale, "fuse_scales", counted)
    many = LPCAM(headed(1000), settings).fit([(IMAGES, FIRST)])
    torch.testing.assert_close(many.prototypes_.vectors()[:2], few.prototypes_.vectors())
    labels = [[1], [], [0, 1]]
    whole = many(IMAGES, labels)
    assert whole.shape == (3, 1000, 64, 96)
    assert whole.count_nonzero((0, 2, 3)).nonzero().flatten().tolist() == [0, 1]
    found = many(IMAGES, labels, present=True)
    for (indices, own), all_classes, given, of_few in zip(found, whole, labels, maps, strict=True):
        assert indices.dtype == torch.int64 and indices.tolist() == given
        torch.testing.assert_close(own, of_few[given], atol=1e-5, rtol=0)
        assert torch.equal(all_classes[indices], own)
    plain = CAM(headed(1000), settings)(IMAGES, labels, present=True)
    torch.testing.assert_close(plain[2][1], CAM(headed(), settings)(IMAGES)[2], atol=1e-5, rtol=0)
    assert set(counts) <= {1, 2}
    with pytest.raises(BatchError, match="needs labels"):
        many(IMAGES, None, present=True)


def test_scikit_learn() -> None:
    validation = pytest.importorskip("sklearn.utils.validation")
    utils = pytest.importorskip("sklearn.utils")
    exceptions = pytest.importorskip("sklearn.exceptions")
    lpcam = LPCAM(headed(), SETTINGS, random_state=3)
    tags = utils.get_tags(lpcam)
    assert tags.requires_fit and tags.target_tags.required
    assert not utils.get_tags(CAM(headed())).requires_fit
    with pytest.raises(exceptions.NotFittedError):
        validation.check_is_fitted(lpcam)
    validation.check_is_fitted(lpcam.fit([(IMAGES, FIRST)]))


def test_before_fit() -> None:
    lpcam = LPCAM(headed(), SETTINGS)
    assert not any(hasattr(lpcam, name) for name in ("prototypes_", "source_", "settings_"))
    with pytest.raises(ValueError, match="fit"):
        lpcam(IMAGES)
    with pytest.raises(BatchError):
        lpcam.partial_fit(IMAGES, ["a", "b"])
    with pytest.raises(NotFittedError):  # nothing was collected
        lpcam.prototypes_  # noqa: B018
    assert repr(LPCAM(headed(), "small", random_state=4)) == (
        "LPCAM(Sequential, settings='small', random_state=4)"
    )
    with pytest.raises(ValueError, match="'clusters'"):
        lpcam.set_params(random_state=9, clusters=3)
    assert lpcam.random_state == 0  # nothing is set if a name is wrong


def test_random_states() -> None:
    def seeds(make: Callable[[], Any]) -> list[int]:
        lpcam = LPCAM(headed(), SETTINGS, random_state=make())
        fits = [lpcam.fit([(IMAGES, FIRST)]).prototypes_.made_by["random_state"] for _ in range(2)]
        lpcam.partial_fit(IMAGES, FIRST)
        assert lpcam.prototypes_.made_by["random_state"] == fits[1]
        return fits

    assert seeds(lambda: 4) == seeds(lambda: np.int64(4)) == [4, 4]
    for kind in (np.random.RandomState, np.random.default_rng):
        first, second = seeds(lambda kind=kind: kind(0))
        assert first != second and seeds(lambda kind=kind: kind(0)) == [first, second]
    assert len({*seeds(lambda: None), *seeds(lambda: None)}) == 4
    with pytest.raises(ValueError, match=r"1\.5"):
        seeds(lambda: 1.5)
