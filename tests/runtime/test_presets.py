"""The presets say what the specification says, and nothing is chosen silently."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

# Written down again from the specification of LPCAM, sections 1, 3 and 4.
from lpcam.classifiers.finetuning import FinetuneSettings

# Written down again from the specification of LPCAM, sections 1, 3 and 4.
from lpcam.classifiers.linear import ProbeSettings

# Written down again from the specification of LPCAM, sections 1, 3 and 4.
from lpcam.method.settings import LpcamSettings
from lpcam.refine.crf import CrfSettings

# Written down again from the specification of LPCAM, sections 1, 3 and 4.
from lpcam.refine.irn import IrnSettings

# Written down again from the specification of LPCAM, sections 1, 3 and 4.
from lpcam.refine.pamr import PamrSettings
from lpcam.runtime.errors import RecipeError

# Written down again from the specification of LPCAM, sections 1, 3 and 4.
from lpcam.runtime.settings import preset_names, preset_values

# Written down again from the specification of LPCAM, sections 1, 3 and 4.
COMMON = {
    "mu_f": 0.9,
    "threshold": 0.3,
    "cam_threshold": 0.3,
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
    assert found == {
        "preset": "official",
        "epochs": 5,
        "batch_size": 16,
        "learning_rate": 0.1,
        "head_multiplier": 10.0,
        "momentum": 1e-4,
        "weight_decay": 1e-4,
        "power": 0.9,
        "long_side": (320, 640),
        "crop": 512,
        "freeze": ("conv1", "bn1"),
    }
    assert FinetuneSettings.from_preset("momentum").momentum == 0.9


@pytest.mark.parametrize(
    "model",
    [LpcamSettings, FinetuneSettings, ProbeSettings, IrnSettings, CrfSettings, PamrSettings],
)
def test_every_preset_is_complete_and_is_its_own_yardstick(
    model: type[LpcamSettings | FinetuneSettings | ProbeSettings],
) -> None:
    names = preset_names(model.table)
    assert names
    for name in names:
        settings = model.from_preset(name)
        assert settings.changes() == {}
        # the values are in the table alone: no field but the preset's name has a default
        assert preset_values(model.table, name).keys() == settings.model_dump().keys() - {"preset"}
    assert [n for n, f in model.model_fields.items() if not f.is_required()] == ["preset"]


def test_changes() -> None:
    settings = LpcamSettings.from_preset("voc12.official", tau=0.25, clusters=12, scales=[1, 0.5])
    assert settings.tau == 0.25
    assert settings.clusters == 12
    assert settings.mu_b == 0.9
    assert settings.changes() == {"tau": 0.25, "scales": (1.0, 0.5)}


def test_preset_values_are_a_copy() -> None:
    preset_values("lpcam", "voc12.official")["tau"] = 0.7
    assert preset_values("lpcam", "voc12.official")["tau"] == 0.1


def test_unknown_preset_names_those_there_are() -> None:
    with pytest.raises(RecipeError, match=r"unknown lpcam preset 'voc'; there are voc12.offic"):
        LpcamSettings.from_preset("voc")
    with pytest.raises(ValidationError, match=r"unknown preset 'voc'; allowed: voc12.official, "):
        LpcamSettings.model_validate({"preset": "voc"})
    with pytest.raises(RecipeError, match="unknown finetune preset 'x'; there are official, momen"):
        FinetuneSettings.from_preset("x")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tau": 1.5}, "less than or equal to 1"),
        ({"clusters": 0}, "greater than or equal to 1"),
        ({"scales": []}, "at least 1 item"),
        ({"scales": [1.0, 0.0]}, "greater than 0"),
        ({"init": "farthest"}, "'random' or 'k-means"),
        ({"mu_b": 0.05}, r"context_lower 0.05 must be below mu_b 0.05, or no context prototype"),
        ({"mu": 0.5}, "Extra inputs are not permitted"),
    ],
)
def test_wrong_values(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        LpcamSettings.from_preset("voc12.official", **change)


def test_settings_do_not_change() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        LpcamSettings.from_preset("voc12.official").tau = 0.5  # type: ignore[misc]
