"""CAM and LPCAM from an image and a classifier."""

import copy
import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import timm
import torch
from tiny import RED_AND_GREEN, Patches, headed, picture, state_of
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lpcam import CAM, LPCAM
from lpcam.classifiers.classifier import Classifier, Preprocessing
from lpcam.classifiers.early_layers import Tap, early_layers
from lpcam.classifiers.feature_store import image_pyramid
from lpcam.classifiers.features import FeaturePair, tensor_pyramid
from lpcam.classifiers.linear import ProbeSettings, fit_head
from lpcam.classifiers.wrapped import WrappedModel, wrap
from lpcam.explain.explainer import Explainer
from lpcam.method.choices import format_choices
from lpcam.method.early import EarlyImage, EarlyPrototypes, fit_early
from lpcam.method.functional import class_activation, normalize
from lpcam.method.head import LPCAMHead
from lpcam.method.reservoir import Reservoir, collect
from lpcam.method.settings import EarlySettings, LpcamSettings
from lpcam.runtime.errors import (
    ArtefactError,
    ClassifierError,
    NotFittedError,
    PrototypeError,
    RecipeError,
)

SETTINGS = LpcamSettings.from_preset(
    "voc12.official", clusters=2, scales=[1.0, 0.5], mu_f=0.5, tau=0.3
)


@pytest.fixture
def classifier() -> Classifier:
    """Two classes, red and green, on raw RGB."""
    found = Classifier(Patches(), ("red", "green"), Preprocessing((0.0,) * 3, (1.0,) * 3))
    with torch.no_grad():
        found.head.weight.copy_(RED_AND_GREEN)
    return found


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    images = torch.stack([picture(0.9, 0.1), picture(0.1, 0.9)])
    return images, torch.eye(2)


def test_lpcam_fit_and_call(classifier: Classifier, batch: tuple[Tensor, Tensor]) -> None:
    images, labels = batch
    lpcam = LPCAM(classifier, SETTINGS).fit([batch])
    maps = lpcam(images, labels)
    assert maps[0, 0, 32, 40] > 0.9
    assert maps[0, 0, 60, 90] == 0  # the blue ground is context and is subtracted
    assert maps.min() >= 0
    assert maps.max() <= 1
    without = LPCAM(classifier, SETTINGS, with_context=False).fit([batch])(images, labels)
    assert without[0, 0, 60, 90] > 0.05  # LPCAM-F has no context to subtract


def test_one_scale_without_flip_is_the_equation(
    classifier: Classifier, batch: tuple[Tensor, Tensor]
) -> None:
    images, _ = batch
    settings = SETTINGS.model_copy(update={"scales": (1.0,), "flip": False, "cam_epsilon": 0.0})
    found = CAM(classifier, settings)(images)
    plain = class_activation(classifier.features(images), classifier.weight).relu()
    plain = nn.functional.interpolate(plain, size=(64, 96), mode="bilinear", align_corners=False)
    torch.testing.assert_close(found, normalize(plain))


def test_both_pyramids_agree(classifier: Classifier) -> None:
    """PIL's bicubic on uint8 and the antialiased one on tensors, but for PIL's rounding."""
    generator = np.random.default_rng(0)
    image = generator.integers(0, 256, (50, 70, 3), dtype=np.uint8)
    tensor = classifier.preprocessing(image)[None]
    for by_pil, by_tensor in zip(
        image_pyramid(classifier, image[None], (1.0, 0.5, 1.5), flip=True),
        tensor_pyramid(classifier, tensor, (1.0, 0.5, 1.5), flip=True),
        strict=True,
    ):
        for one, other in zip(by_pil[:2], by_tensor[:2], strict=True):
            assert one is not None
            assert other is not None
            torch.testing.assert_close(one, other, atol=0.01, rtol=0)


def test_odd_tiny_and_large_images(classifier: Classifier, batch: tuple[Tensor, Tensor]) -> None:
    lpcam = LPCAM(classifier, SETTINGS).fit([batch])
    for size in ((1, 1), (17, 33), (15, 200)):
        maps = lpcam(torch.rand(1, 3, *size))
        assert maps.shape == (1, 2, *size)
        assert bool(torch.isfinite(maps).all())
    with pytest.raises(PrototypeError, match="NaN or Inf features"):
        lpcam(torch.full((1, 3, 32, 32), float("nan")))


def test_collect_uses_nearest_on_the_high_resolution_map() -> None:
    """500 pixels to 32 cells pick 0, 15, 31, 46, ...: the floor of i * 500 / 32."""
    cam = torch.zeros(1, 500, 1)
    picked = [i * 500 // 32 for i in range(32)]
    assert picked[:4] == [0, 15, 31, 46]
    cam[0, picked[3]] = 1.0
    features = torch.arange(32.0)[None, :, None] + 1
    reservoir = Reservoir(None, 0)
    collect(reservoir, features, [0], cam, SETTINGS, "image")
    found = reservoir.features(0, "foreground")
    assert found is not None
    assert found.tolist() == [[4.0]]
    assert reservoir.seen == {(0, "foreground"): 1, (0, "context"): 31}


def test_collect_drops_equality_when_strict_and_classes_that_were_not_drawn() -> None:
    cam = torch.tensor([[[0.3, 0.2, 0.4]]])
    features = torch.tensor([[[1.0, 2.0, 3.0]]])
    for inclusive, counts in ((False, (1, 1)), (True, (2, 1))):
        settings = SETTINGS.model_copy(
            update={"tau": cam[0, 0, 0].item(), "tau_inclusive": inclusive}
        )
        reservoir = Reservoir(None, 0)
        collect(reservoir, features, [0], cam, settings, "image")
        assert tuple(reservoir.seen.values()) == counts
    reservoir = Reservoir(None, 0)
    collect(reservoir, torch.ones(1, 1, 3), [0, 4], torch.ones(2, 1, 3), SETTINGS, "image", {4: 2})
    assert reservoir.seen == {(4, "foreground"): 6, (4, "context"): 0}
    collect(reservoir, torch.ones(1, 1, 3), [], torch.zeros(0, 1, 3), SETTINGS, "image")


def test_save_and_load(
    tmp_path: Path, classifier: Classifier, batch: tuple[Tensor, Tensor]
) -> None:
    images, labels = batch
    lpcam = LPCAM(classifier, SETTINGS, random_state=4).fit([batch])
    lpcam.save(tmp_path / "p.safetensors")
    again = LPCAM(classifier, SETTINGS).load(tmp_path / "p.safetensors")
    assert torch.equal(lpcam(images, labels), again(images, labels))
    assert again.prototypes_.made_by["random_state"] == 4
    with torch.no_grad():
        classifier.head.weight.add_(1.0)
    with pytest.raises(PrototypeError, match="but this classifier is"):
        LPCAM(classifier, SETTINGS).load(tmp_path / "p.safetensors")


def parts() -> list[tuple[Tensor, Tensor]]:
    """Three batches of unequal length."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for count in (2, 1, 3):
        shades = 0.8 + 0.2 * torch.rand(count, generator=generator)
        labels = torch.eye(2)[torch.arange(count) % 2]
        images = [
            picture(*((s, 0.1) if label[0] else (0.1, s)))
            for s, label in zip(shades.tolist(), labels, strict=True)
        ]
        found.append((torch.stack(images), labels))
    return found


@pytest.mark.parametrize("max_features", [None, 20])
def test_parts_give_the_bytes_of_one_fit(
    classifier: Classifier, tmp_path: Path, max_features: int | None
) -> None:
    settings = SETTINGS.model_copy(update={"max_features": max_features})
    whole = LPCAM(classifier, settings, random_state=2).fit(parts())
    piecewise = LPCAM(classifier, settings, random_state=2)
    for images, labels in parts():
        assert piecewise.partial_fit(images, labels) is piecewise
    for name, lpcam in (("whole", whole), ("parts", piecewise)):
        lpcam.save(tmp_path / name)
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "parts").read_bytes()
    assert piecewise.prototypes_.made_by["images"] == 6


def test_clustering_waits_until_it_is_needed(classifier: Classifier) -> None:
    lpcam = LPCAM(classifier, SETTINGS)
    first, second, _ = parts()
    with pytest.raises(NotFittedError):
        lpcam.save("p.safetensors")
    lpcam.partial_fit(*first).partial_fit(*second)
    before = lpcam.prototypes_
    assert before.made_by["images"] == 3
    lpcam(first[0])
    with pytest.raises(ValueError, match=r"\(2, 3\)"):
        lpcam.partial_fit(first[0], torch.ones(2, 3))
    assert lpcam.prototypes_ is before
    lpcam.partial_fit(*second)  # makes the prototypes out of date
    assert lpcam.prototypes_.made_by["images"] == 4


def test_fit_starts_anew(classifier: Classifier) -> None:
    first, second, third = parts()
    lpcam = LPCAM(classifier, SETTINGS).partial_fit(*first).fit([third])
    lpcam.fit([second, third])
    expected = LPCAM(classifier, SETTINGS).fit([second, third]).prototypes_
    assert lpcam.prototypes_.made_by == expected.made_by
    assert torch.equal(lpcam.prototypes_.vectors(), expected.vectors())


def test_maps_follow_corrected_prototypes(
    classifier: Classifier, batch: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    images, labels = batch
    lpcam = LPCAM(classifier, SETTINGS).fit([batch])
    plain = lpcam(images, labels)
    red = torch.nonzero(lpcam.prototypes_.foreground.sizes[0]).flatten().tolist()
    lpcam.prototypes_.keep("red", red).drop("red", red[:1]).name("red", red[1:], "lid")
    kept = lpcam.prototypes_.foreground.centers[0, red[1]]
    assert torch.equal(lpcam.prototypes_.foreground.prototypes(0), kept[None])
    changed = lpcam(images, labels)
    assert not torch.equal(changed[:, 0], plain[:, 0])
    assert torch.equal(changed[:, 1], plain[:, 1])
    maps = Explainer(lpcam)(np.zeros((64, 96, 3), np.uint8), labels=["red"])
    assert maps.parts["red"][0] == ("lid",)
    vectors = lpcam.prototypes_.vectors()
    assert torch.equal(LPCAMHead.from_lpcam(lpcam).vectors, vectors)
    assert torch.equal(Explainer(lpcam).vectors, vectors)
    lpcam.save(tmp_path / "p", reservoir=True)
    again = LPCAM(classifier, SETTINGS).load(tmp_path / "p")
    assert torch.equal(again(images, labels), changed)
    assert again.prototypes_.names == {"red": {red[1]: "lid"}}
    for one in (lpcam, again):
        with pytest.raises(PrototypeError, match="choices"):
            one.partial_fit(*batch)
    with pytest.raises(PrototypeError, match="red"):
        lpcam.prototypes_.move("red", red[1:])
    assert torch.equal(lpcam(images, labels), changed)
    path = tmp_path / "prototypes.yaml"
    path.write_text(format_choices(lpcam.prototypes_.choices, lpcam.prototypes_.digest))
    settings = SETTINGS.model_copy(update={"choices": path})
    assert torch.equal(LPCAM(classifier, settings).fit([batch])(images, labels), changed)


@pytest.mark.parametrize("max_features", [None, 20])
def test_what_was_loaded_goes_on_as_one_fit_or_is_refused(
    classifier: Classifier, tmp_path: Path, max_features: int | None
) -> None:
    path, settings = tmp_path / "p", SETTINGS.model_copy(update={"max_features": max_features})
    saved = LPCAM(classifier, settings, random_state=3).fit(parts()[:1])
    saved.save(path)
    lpcam = LPCAM(classifier, settings).partial_fit(*parts()[2]).load(path)
    assert torch.equal(lpcam.prototypes_.vectors(), saved.prototypes_.vectors())
    with pytest.raises(PrototypeError, match="reservoir=True"):
        lpcam.partial_fit(*parts()[1])
    with pytest.raises(PrototypeError, match="without their local features"):
        lpcam.save(path, reservoir=True)
    with pytest.raises(ArtefactError, match="none"):
        lpcam.load(tmp_path / "none")
    assert lpcam.prototypes_.made_by["images"] == 2  # a load that failed changes nothing

    saved.save(path, reservoir=True)
    with pytest.raises(PrototypeError, match="tau"):
        changed = settings.model_copy(update={"tau": 0.2})
        LPCAM(classifier, changed).load(path).partial_fit(*parts()[1])
    lpcam.load(path)
    for images, labels in parts()[1:]:
        lpcam.partial_fit(images, labels)
    whole = LPCAM(classifier, settings, random_state=3).fit(parts())
    for name, one in (("one", lpcam), ("other", whole)):
        one.save(tmp_path / name, reservoir=True)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()


def colours(count: int = 12) -> list[tuple[Tensor, Tensor]]:
    """Batches of red and green squares with their class indices."""
    generator = torch.Generator().manual_seed(0)
    shades = (0.6 + 0.4 * torch.rand(count, generator=generator)).tolist()
    images = [picture(*((0.1, s) if index % 2 else (s, 0.1))) for index, s in enumerate(shades)]
    labels = torch.arange(count) % 2
    return [(torch.stack(images[i : i + 5]), labels[i : i + 5]) for i in range(0, count, 5)]


def test_a_backbone_gets_a_head_first() -> None:
    loader = colours()
    with torch.inference_mode():
        lpcam = LPCAM(Patches(), SETTINGS, classes=["red", "green"]).fit(loader)
    assert isinstance(lpcam.source_, WrappedModel)
    assert lpcam.source_.new_head and not lpcam.source_.weight.is_inference()
    images = torch.stack([picture(0.9, 0.1), picture(0.1, 0.9)])
    assert lpcam.source_.logits(images).argmax(1).tolist() == [0, 1]
    maps = lpcam(images, torch.tensor([0, 1]))
    assert maps[0, 0, 32, 40] > 0.9
    assert maps[0, 0, 60, 90] < 0.1
    assert not maps[0, 1].any()
    # the head is that of the linear probe: on the mean of the map, each image and its mirror
    pooled = torch.cat([Patches()(batch).mean((-2, -1)) for batch, _ in loader])
    mirrored = torch.cat([Patches()(batch.flip(-1)).mean((-2, -1)) for batch, _ in loader])
    multi_hot = torch.eye(2)[torch.cat([labels for _, labels in loader])]
    expected = fit_head(
        torch.stack([pooled, mirrored], dim=1),
        multi_hot,
        ProbeSettings.from_preset("default"),
        ("red", "green"),
    )
    torch.testing.assert_close(lpcam.source_.weight, expected, rtol=1e-3, atol=1e-3)


def test_a_new_head_is_saved_with_its_prototypes(tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    lpcam = LPCAM(Patches(), SETTINGS, classes=["red", "green"]).fit(colours())
    lpcam.save(path)
    again = LPCAM(Patches(), SETTINGS, classes=["red", "green"]).load(path)
    images = colours()[0][0]
    assert torch.equal(again(images), lpcam(images))
    assert torch.equal(again.source_.weight, lpcam.source_.weight)
    assert torch.equal(LPCAM(Patches(), SETTINGS).load(path)(images), lpcam(images))
    assert LPCAM(Patches(), SETTINGS).load(path).source_.classes == ("red", "green")
    with pytest.raises(PrototypeError, match="class 0 is 'red' there and 'green' here"):
        LPCAM(Patches(), SETTINGS, classes=["green", "red"]).load(path)
    with pytest.raises(PrototypeError, match="2 classes, but 3 names"):
        LPCAM(Patches(), SETTINGS, classes=["red", "green", "blue"]).load(path)
    other = nn.Sequential(Patches(), nn.BatchNorm2d(6))
    with pytest.raises(PrototypeError, match="but this classifier is"):
        LPCAM(other, SETTINGS).load(path)


def test_names_are_no_part_of_the_weights(
    tmp_path: Path, batch: tuple[Tensor, Tensor], classifier: Classifier
) -> None:
    path, names = tmp_path / "p", ("red", "green")
    lpcam = LPCAM(headed(), SETTINGS, classes=names).fit([batch])
    lpcam.save(path)
    assert LPCAM(headed(), SETTINGS).fit([batch]).source_.fingerprint() == (
        lpcam.source_.fingerprint()
    )
    assert LPCAM(headed(), SETTINGS).load(path).source_.classes == names
    old = lpcam.source_.fingerprint(names)  # as version 0.1.0 wrote
    replace(lpcam.prototypes_, fingerprint=old).save(path)
    assert torch.equal(LPCAM(headed(), SETTINGS).load(path)(batch[0]), lpcam(batch[0]))
    with pytest.raises(PrototypeError, match="'red' there and 'green' here"):
        LPCAM(headed(), SETTINGS, classes=names[::-1]).load(path)
    with pytest.raises(PrototypeError, match="'red' there and 'green' here"):
        Explainer(LPCAM(headed(), classes=names[::-1]).fit([batch]).source_, lpcam.prototypes_)
    LPCAM(classifier, SETTINGS).fit([batch]).save(path)
    classifier.classes = names[::-1]
    with pytest.raises(PrototypeError, match="'red' there and 'green' here"):
        LPCAM(classifier, SETTINGS).load(path)


def by_data(model: nn.Module) -> None:
    model[-1].weight.data.mul_(2)  # type: ignore[index, union-attr]


def by_optimiser(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD(model.parameters(), lr=0.1).step()


def by_assignment(model: nn.Module) -> None:
    model[-1].weight = nn.Parameter(torch.rand(2, 6))  # type: ignore[index]


def by_state(model: nn.Module) -> None:
    model.load_state_dict({name: value + 1 for name, value in model.state_dict().items()})


@pytest.mark.parametrize("change", [by_data, by_optimiser, by_assignment, by_state])
def test_changed_weights_are_noticed(
    change: Callable[[nn.Module], None], batch: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    model = headed()
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    lpcam = LPCAM(model, SETTINGS).fit([batch])
    expected = lpcam(*batch)
    change(model)
    for use in (
        lambda: lpcam(*batch),
        lambda: lpcam.save(tmp_path / "p"),
        lambda: lpcam.partial_fit(*batch),
        lambda: LPCAMHead.from_lpcam(lpcam),
    ):
        with pytest.raises(PrototypeError, match="changed since fit"):
            use()
    model.load_state_dict(kept)  # written again, to the same values
    assert torch.equal(lpcam(*batch), expected)
    change(model)
    assert lpcam.fit([batch])(*batch).shape == expected.shape


def test_other_states_of_a_model_are_no_change(batch: tuple[Tensor, Tensor]) -> None:
    model = headed()
    lpcam = LPCAM(model, SETTINGS).fit([batch])
    expected = lpcam(*batch)
    model.train().requires_grad_(False)
    assert torch.equal(copy.deepcopy(lpcam)(*batch), expected)
    assert torch.equal(lpcam(*batch), expected)


def test_a_new_head_needs_two_passes_and_every_class() -> None:
    names = ["red", "green"]
    with pytest.raises(ClassifierError, match="iterator"):
        LPCAM(Patches(), SETTINGS, classes=names).fit(iter(colours()))
    with pytest.raises(ClassifierError, match="blue"):
        LPCAM(Patches(), SETTINGS, classes=[*names, "blue"]).fit(colours())
    with pytest.raises(ClassifierError, match="red, green"):
        LPCAM(Patches(), SETTINGS, classes=names).partial_fit(*colours()[0])
    with pytest.raises(PrototypeError, match="no image"):
        LPCAM(Patches(), SETTINGS, classes=names).fit([])


def test_class_indices_are_labels_too(classifier: Classifier, batch: tuple[Tensor, Tensor]) -> None:
    images, labels = batch
    by_hot = LPCAM(classifier, SETTINGS).fit([batch])
    by_index = LPCAM(classifier, SETTINGS).fit([(images, torch.tensor([0, 1]))])
    assert torch.equal(by_hot.prototypes_.vectors(), by_index.prototypes_.vectors())
    assert torch.equal(by_hot(images, labels), by_hot(images, torch.tensor([0, 1])))


def test_maps_serve_in_a_loss(classifier: Classifier, batch: tuple[Tensor, Tensor]) -> None:
    images, labels = batch
    lpcam = LPCAM(classifier, SETTINGS).fit([batch])
    for maps in (CAM(classifier, SETTINGS)(images), lpcam(images, labels)):
        prediction = torch.ones_like(maps, requires_grad=True)
        (prediction * maps).sum().backward()
        assert prediction.grad is not None
        assert torch.equal(prediction.grad, maps)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_classifier_in_half_precision(
    classifier: Classifier, batch: tuple[Tensor, Tensor], dtype: torch.dtype
) -> None:
    images, labels = batch
    expected = CAM(classifier, SETTINGS)(images)
    assert (CAM(classifier, SETTINGS)(images.to(dtype)) - expected).abs().mean() < 1e-2
    classifier.to(dtype)
    assert (CAM(classifier, SETTINGS)(images) - expected).abs().mean() < 1e-2
    maps = LPCAM(classifier, SETTINGS).fit([batch])(images, labels)
    assert maps.dtype == torch.float32


def test_parts_in_and_out_of_inference_mode(
    classifier: Classifier, batch: tuple[Tensor, Tensor]
) -> None:
    settings = SETTINGS.model_copy(update={"max_features": 3})
    lpcam = LPCAM(classifier, settings)
    with torch.inference_mode():
        lpcam.partial_fit(*batch)
    for _ in range(6):  # of a full sample rows are replaced in their place
        lpcam.partial_fit(*batch)
    plain = LPCAM(classifier, settings)
    for _ in range(7):
        plain.partial_fit(*batch)
    assert torch.equal(lpcam.prototypes_.vectors(), plain.prototypes_.vectors())


def test_a_fit_that_fails_leaves_nothing(
    classifier: Classifier, batch: tuple[Tensor, Tensor]
) -> None:
    def broken() -> Iterator[tuple[Tensor, Tensor]]:
        yield batch
        raise OSError("the disk is gone")

    lpcam = LPCAM(classifier, SETTINGS).fit([batch])
    with pytest.raises(OSError, match="the disk is gone"):
        lpcam.fit(broken())
    with pytest.raises(NotFittedError):
        lpcam.prototypes_.vectors()
    lpcam.partial_fit(*batch)
    assert lpcam.prototypes_.made_by["images"] == 2


def test_fit_and_fit_maps_draw_the_same_order(classifier: Classifier) -> None:
    images = torch.cat([images for images, _ in colours()])
    hot = torch.eye(2)[torch.cat([labels for _, labels in colours()])]
    found = []
    for fit in (LPCAM.fit, LPCAM.fit_maps):
        torch.manual_seed(0)
        loader = DataLoader(TensorDataset(images, hot), batch_size=4, shuffle=True)
        lpcam = LPCAM(classifier, SETTINGS.model_copy(update={"max_features": 20}))
        fit(lpcam, loader)  # type: ignore[operator]
        found.append(lpcam.prototypes_.vectors())
    assert torch.equal(*found)


def test_fit_maps(classifier: Classifier) -> None:
    lpcam = LPCAM(classifier, SETTINGS)
    loader = colours()
    found = lpcam.fit_maps(loader)
    assert lpcam.prototypes_.made_by["images"] == 12  # fitted before the first map is asked for
    batches = list(found)
    assert len(batches) == len(loader)
    for (images, labels, maps), (wanted, _) in zip(batches, loader, strict=True):
        assert torch.equal(images, wanted)
        assert torch.equal(maps, lpcam(images, labels))
    with pytest.raises(ClassifierError, match="iterator"):
        lpcam.fit_maps(iter(loader))


def test_parameters_are_those_of_the_constructor(classifier: Classifier) -> None:
    for kind in (CAM, LPCAM):
        names = list(inspect.signature(kind).parameters)
        extractor = kind(classifier, "small", classes=None)
        assert list(extractor.get_params()) == names
        assert extractor.get_params()["settings"] == "small"
        assert kind(**extractor.get_params()).get_params() == extractor.get_params()
        with pytest.raises(ValueError, match="'clusters'"):
            extractor.set_params(clusters=3)
    assert CAM(classifier).settings_ == LpcamSettings.from_preset("voc12.official")
    with pytest.raises(ClassifierError, match="classes, pool"):  # a classifier has its own
        CAM(classifier, SETTINGS, classes=["a"], pool="mean")(torch.rand(1, 3, 32, 32))


def test_set_params(classifier: Classifier, batch: tuple[Tensor, Tensor]) -> None:
    images, labels = batch
    lpcam = LPCAM(classifier, SETTINGS).fit([batch])
    assert lpcam.set_params(with_context=False) is lpcam
    without = LPCAM(classifier, SETTINGS, with_context=False).fit([batch])
    assert torch.equal(lpcam(images, labels), without(images, labels))
    one = SETTINGS.model_copy(update={"scales": (1.0,)})
    assert lpcam.set_params(settings=one).settings_.scales == (1.0,)
    assert not torch.equal(lpcam(images, labels), without(images, labels))
    lpcam.set_params(model=Patches(), classes=["red", "green"])
    with pytest.raises(NotFittedError, match="no prototypes"):
        lpcam(images)


@pytest.mark.parametrize(
    "options",
    [{"settings": {"clusters": 2}}, {"dtype": "float16"}, {"dtype": torch.int8}],
)
def test_arguments_of_other_types(
    classifier: Classifier, batch: tuple[Tensor, Tensor], options: dict[str, Any]
) -> None:
    (given,) = options.values()
    with pytest.raises((RecipeError, ValueError), match=re.escape(repr(given))):
        LPCAM(classifier, **options).fit([batch])


def test_a_set_of_names_has_no_order() -> None:
    with pytest.raises(ClassifierError, match="list of names"):
        wrap(Patches(), classes={"red", "green"})


def test_clones(classifier: Classifier, batch: tuple[Tensor, Tensor]) -> None:
    base = pytest.importorskip("sklearn.base")
    lpcam = LPCAM(classifier, SETTINGS, random_state=3).fit([batch])
    twin = base.clone(lpcam)
    assert isinstance(twin, LPCAM)
    assert twin.random_state == 3
    with pytest.raises(NotFittedError):
        twin.prototypes_  # noqa: B018
    assert torch.equal(twin.fit([batch])(batch[0]), lpcam(batch[0]))


EARLY = EarlySettings(clusters=3, nearest=2)


def convolutional(classes: int = 2) -> nn.Module:
    """A network of three levels, whose early layers are layer2 and layer3."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model("test_resnet", num_classes=classes, zero_init_last=False)
    return model.eval()


def squares(count: int = 6) -> list[tuple[Tensor, Tensor]]:
    """Batches of two images, red and green, unlike each other."""
    generator = torch.Generator().manual_seed(0)
    images = torch.stack([picture(0.9, 0.1), picture(0.1, 0.9)]).repeat(count // 2, 1, 1, 1)
    images = images + 0.1 * torch.randn(images.shape, generator=generator)
    return [(images[n : n + 2], torch.eye(2)) for n in range(0, count, 2)]


@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("base", ["CAM", "LPCAM"])
def test_early_layers_sharpen_the_maps_of_a_pass(base: Literal["CAM", "LPCAM"], flip: bool) -> None:
    model, batches = convolutional(), squares()
    settings = SETTINGS.fixed(scales=(0.5, 1.0), flip=flip)
    before = state_of(model)
    lpcam = LPCAM(model, settings, early=EARLY.model_copy(update={"base": base})).fit(batches)
    images, labels = batches[1]
    found = lpcam(images, labels)
    assert state_of(model) == before
    own = lpcam.early_
    assert own is not None
    assert (own.base, own.fusion, own.layers) == (base, "fused", early_layers(model))
    plain = {"CAM": CAM(model, settings), "LPCAM": LPCAM(model, settings).fit(batches)}[base]
    bases, views = plain(images, labels), [images, images.flip(-1)]
    with closing(Tap(model, own.layers)) as tap, torch.no_grad():
        passes = [model(view) is not None and tap.take((64, 96)) for view in views]
    for place in range(2):
        pairs = [
            FeaturePair(one[place], other[place] if flip else None)
            for one, other in zip(*passes, strict=True)
        ]
        expected = own.maps(bases[place, place][None], pairs, [place])
        torch.testing.assert_close(found[place, place], expected[0], atol=1e-5, rtol=0)
        assert not torch.equal(found[place, place], bases[place, place])
    every, present = lpcam(images), lpcam(images, labels, present=True)
    for place, (indices, maps) in enumerate(present):
        assert indices.tolist() == [place]
        torch.testing.assert_close(maps[0], found[place, place])
        torch.testing.assert_close(every[place, place], found[place, place])


def test_early_layers_without_scale_one() -> None:
    """The pass at scale 1 is added, and is not among the maps."""
    model, batches = convolutional(), squares()
    how = {"early": EARLY.model_copy(update={"fusion": "none"})}
    settings = SETTINGS.fixed(scales=(0.5,))
    lpcam = LPCAM(model, settings, **how).fit(batches)
    plain = LPCAM(model, settings).fit(batches)
    assert torch.equal(lpcam(*batches[0]), plain(*batches[0]))


def test_early_layers_of_a_classifier_and_of_a_new_head(classifier: Classifier) -> None:
    batches = squares()
    backbone = timm.create_model("test_resnet", num_classes=0, zero_init_last=False)
    whole = Classifier(backbone, ("red", "green"), Preprocessing((0.0,) * 3, (1.0,) * 3))
    bare = LPCAM(backbone, SETTINGS, classes=("red", "green"), early=True)
    for lpcam in (LPCAM(whole, SETTINGS, early=True), bare):
        maps = lpcam.fit(batches)(*batches[0])
        assert maps[0, 0].max() == 1
        assert lpcam.early_ is not None
        assert lpcam.early_.layers == early_layers(backbone)
        assert not any(module._forward_hooks for module in backbone.modules())
    with pytest.raises(ClassifierError, match="early"):
        LPCAM(classifier, SETTINGS, early=True).fit(batches)  # patches have no early layers


def test_early_prototypes_are_saved_with_the_others(tmp_path: Path) -> None:
    model, batches, path = convolutional(), squares(), tmp_path / "p.safetensors"
    lpcam = LPCAM(model, SETTINGS, early=EARLY).fit(batches)
    lpcam.save(path)
    for early in (False, True):  # the file says how the maps are made
        again = LPCAM(model, SETTINGS, early=early).load(path)
        assert torch.equal(again(*batches[0]), lpcam(*batches[0]))
    assert again.early_ is not None
    assert again.early_.described() == lpcam.early_.described()  # type: ignore[union-attr]
    with pytest.raises(PrototypeError, match="partial_fit"):
        LPCAM(model, SETTINGS).load(path).partial_fit(*batches[0])
    with pytest.raises(PrototypeError, match="but this classifier is"):
        LPCAM(headed(), SETTINGS).load(path)
    LPCAM(model, SETTINGS).fit(batches).save(path)
    with pytest.raises(PrototypeError, match=re.escape(str(path))):
        LPCAM(model, SETTINGS, early=True).load(path)


def test_early_layers_need_all_images_twice() -> None:
    model, batches = convolutional(), squares()
    lpcam = LPCAM(model, SETTINGS, early=EARLY)
    with pytest.raises(PrototypeError, match="partial_fit"):
        lpcam.partial_fit(*batches[0])
    with pytest.raises(ClassifierError, match="iterator"):
        lpcam.fit(iter(batches))
    *_, (_, _, maps) = lpcam.fit_maps(batches)
    assert torch.equal(maps, lpcam(*batches[-1]))
    assert "early=EarlySettings(" in repr(lpcam)
    assert lpcam.get_params()["early"] == EARLY
    with pytest.raises(NotFittedError):
        lpcam.set_params(early=False)(*batches[0])
    assert lpcam.fit(batches).early_ is None


def test_some_images_of_each_class_show_the_early_layers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same ones for any batches; all images of a rare class."""
    model, ((images, _), *_) = convolutional(), squares(2)
    which = [0] * 70 + [1] * 4
    images = images[which] + torch.linspace(0, 0.2, 74)[:, None, None, None]
    kept: list[list[EarlyImage]] = []

    def note(given: list[EarlyImage], *args: Any, **options: Any) -> list[EarlyPrototypes]:
        kept.append(given)
        return fit_early(given, *args, **options)

    monkeypatch.setattr("lpcam.method.extractors.fit_early", note)
    some = EARLY.model_copy(update={"images": 10})
    for size in (74, 7):
        batches = [(images[n : n + size], which[n : n + size]) for n in range(0, 74, size)]
        LPCAM(model, SETTINGS.fixed(scales=(1.0,)), early=some).fit(batches)
    counts = [sum(one.classes == [index] for one in kept[0]) for index in range(2)]
    assert 15 <= counts[0] <= 35  # 25 are expected of 70
    assert counts[1] == 4
    assert len(kept[0]) == len(kept[1])
    for one, other in zip(*kept, strict=True):
        torch.testing.assert_close(one.layers[0], other.layers[0], atol=1e-2, rtol=0)
        assert one.bases["LPCAM"].shape[1:] == one.layers[0].shape[1:]
    monkeypatch.setattr("lpcam.method.early.MEMORY", 0)
    LPCAM(model, SETTINGS.fixed(scales=(1.0,)), early=some).fit([(images, which)])
    assert len(kept[2]) == len(kept[0])  # a batch that was begun is kept
    LPCAM(model, SETTINGS.fixed(scales=(1.0,)), early=some).fit(batches)
    assert 0 < len(kept[3]) <= 7
