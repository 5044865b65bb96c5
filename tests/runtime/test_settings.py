"""Settings: presets say what the specification says, and methods bring settings of their own."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
from pydantic import BaseModel, ValidationError

from lpcam.classifiers.finetuning import FinetuneSettings
from lpcam.classifiers.linear import ProbeSettings
from lpcam.hosts.base import HOSTS
from lpcam.method.settings import LpcamSettings
from lpcam.refine.base import REFINEMENTS
from lpcam.refine.crf import CrfSettings
from lpcam.runtime.errors import RecipeError
from lpcam.runtime.settings import PresetModel, Section, with_settings

# Written down again from the specification of LPCAM, sections 1, 3 and 4.
COMMON = {
    "mu_f": 0.9,
    "threshold": 0.3,
    "cam_threshold": 0.15,
    "flip": True,
    "scales": (1.0, 0.5, 1.5, 2.0),
}
VOC = {"clusters": 12, "tau": 0.1, "mu_b": 0.9, "images_per_class": None}
COCO = {"clusters": 20, "tau": 0.25, "mu_b": 0.5, "images_per_class": 100}
OFFICIAL = {
    "tau_inclusive": False,
    "split_maps": "multi_scale",
    "split_resize": "nearest",
    "init": "random",
    "centers": "mean",
    "tolerance": 5.0,
    "tolerance_kind": "absolute",
    "cam_epsilon": 1e-5,
    "max_features": None,
}
PAPER = {
    "tau_inclusive": True,
    "split_maps": "single_scale",
    "context_lower": None,
    "images_with_replacement": False,
    "cam_epsilon": 0.0,
    "max_features": None,
}
EXPECTED = {
    "voc12.official": {**COMMON, **VOC, **OFFICIAL, "context_lower": 0.05},
    "voc12.paper": {**COMMON, **VOC, **PAPER},
    "coco14.official": {
        **COMMON,
        **COCO,
        **OFFICIAL,
        "context_lower": 0.0,
        "images_with_replacement": True,
    },
    "coco14.paper": {**COMMON, **COCO, **PAPER},
}


@pytest.mark.parametrize("name", EXPECTED)
def test_lpcam_presets(name: str) -> None:
    found = LpcamSettings.from_preset(name).model_dump()
    assert {key: found[key] for key in EXPECTED[name]} == EXPECTED[name]
    assert found["preset"] == name


def test_official_finetuning_has_the_momentum_trap() -> None:
    """Specification of IRN, section 1: the weight decay sits in SGD's momentum slot."""
    found = FinetuneSettings.from_preset("official").model_dump()
    expected = {"epochs": 5, "batch_size": 16, "learning_rate": 0.1, "head_multiplier": 10.0}
    expected |= {"momentum": 1e-4, "weight_decay": 1e-4, "power": 0.9, "crop": 512}
    more = {"long_side": (320, 640), "freeze": ("conv1", "bn1")}
    assert found.items() >= {**expected, **more}.items()
    assert FinetuneSettings.from_preset("momentum").momentum == 0.9


METHODS = [method.settings for registry in (HOSTS, REFINEMENTS) for method in registry.values()]
TABLES = {m for m in METHODS if m is not None and issubclass(m, PresetModel)}
TABLES |= {LpcamSettings, FinetuneSettings, ProbeSettings, CrfSettings}


@pytest.mark.parametrize("model", sorted(TABLES, key=lambda m: m.__name__))
def test_presets_are_complete(model: type[PresetModel]) -> None:
    names = model.preset_names()
    assert model.model_fields["preset"].default in names
    for name in names:
        settings = model.from_preset(name)
        assert settings.changes() == {}
        # the values are in the table alone: no field but the preset's name has a default
        assert model.preset_values(name).keys() == settings.model_dump().keys() - {"preset"}
    assert [n for n, f in model.model_fields.items() if not f.is_required()] == ["preset"]


def test_changes() -> None:
    settings = LpcamSettings.from_preset("voc12.official", tau=0.25, clusters=12, scales=[1, 0.5])
    assert settings.tau == 0.25
    assert settings.clusters == 12
    assert settings.mu_b == 0.9
    assert settings.changes() == {"tau": 0.25, "scales": (1.0, 0.5)}
    assert settings.fitting["tau"] == 0.25
    assert "scales" not in settings.fitting
    with pytest.raises(ValidationError, match="frozen"):
        settings.tau = 0.5  # type: ignore[misc]


def test_an_unknown_preset_is_refused_with_the_known_ones() -> None:
    with pytest.raises(RecipeError, match=r"lpcam.*'voc'.*voc12\.official"):
        LpcamSettings.from_preset("voc")
    with pytest.raises(ValidationError, match=r"'voc'.*voc12\.official"):
        LpcamSettings.model_validate({"preset": "voc"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tau": 1.5}, "tau"),
        ({"clusters": 0}, "clusters"),
        ({"scales": []}, "scales"),
        ({"scales": [1.0, 0.0]}, "scales"),
        ({"init": "farthest"}, "'random' or 'k-means"),
        ({"mu_b": 0.05}, r"context_lower 0.05 .*mu_b 0.05"),
        ({"mu": 0.5}, "mu"),
    ],
)
def test_wrong_values(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        LpcamSettings.from_preset("voc12.official", **change)


class Toy(PresetModel):
    """Settings of a method of another distribution, with its presets in the class."""

    table: ClassVar[str] = "toy"
    presets: ClassVar[dict[str, dict[str, Any]]] = {"weak": {"power": 1}, "strong": {"power": 9}}
    preset: str = "weak"
    power: int


class Method:
    def __init__(self, settings: type[BaseModel] | None) -> None:
        self.settings = settings


class ToySection(Section):
    """A section that names a method."""

    method: str
    own: int = 3


def test_presets_of_another_distribution() -> None:
    assert Toy.from_preset("strong").power == 9
    assert Toy.model_validate({"power": 2}).changes() == {"power": 2}
    with pytest.raises(ValidationError, match=r"'huge'.*weak, strong"):
        Toy.model_validate({"preset": "huge"})


def test_a_section_has_a_field_for_the_settings_of_each_method() -> None:
    made = with_settings(
        ToySection, {"toy": Method(Toy), "plain": Method(None), "own": Method(Toy)}
    )
    assert issubclass(made, ToySection)
    assert (made.__name__, made.__doc__) == (ToySection.__name__, ToySection.__doc__)
    assert list(made.model_fields) == ["method", "own", "toy"]
    found: Any = made.model_validate({"method": "toy", "toy": {"preset": "strong"}})
    assert (found.toy.power, found.own) == (9, 3)
    assert made.model_validate({"method": "plain"}).toy == Toy.from_preset()  # type: ignore[attr-defined]
    with pytest.raises(ValidationError, match="plain"):
        made.model_validate({"method": "plain", "plain": {}})
