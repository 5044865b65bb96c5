"""Values of LPCAM that may be ``auto``."""

import pytest
from pydantic import ValidationError

from lpcam.method.settings import AUTOMATIC, FALLBACK, LpcamSettings


def test_adaptive_leaves_every_value_that_may_be_automatic_to_the_run():
    settings = LpcamSettings.from_preset("adaptive")
    assert settings.automatic == {*AUTOMATIC}
    frozen = LpcamSettings.from_preset(FALLBACK)
    assert all(getattr(settings, name) == getattr(frozen, name) for name in AUTOMATIC)
    assert settings.early is not None


@pytest.mark.parametrize("name", AUTOMATIC)
def test_a_value_can_be_made_automatic_and_fixed_again(name):
    fallback = getattr(LpcamSettings.from_preset(FALLBACK), name)
    settings = LpcamSettings.from_preset("voc12.official", **{name: "auto"})
    assert settings.automatic == {name}
    assert getattr(settings, name) == fallback
    assert settings.model_dump()[name] == "auto"
    assert settings.changes() == {name: "auto"}
    fixed = LpcamSettings.from_preset("adaptive", **{name: fallback})
    assert name not in fixed.automatic
    assert fixed.changes() == {name: fallback}


def test_automatic_values_survive_a_file_and_a_copy():
    settings = LpcamSettings.from_preset("adaptive", tau=0.25)
    again = LpcamSettings.model_validate(settings.model_dump(mode="json"))
    assert again == settings
    assert again.automatic == settings.model_copy().automatic == {*AUTOMATIC} - {"tau"}


def test_fixed_values_are_no_longer_automatic_and_the_settings_do_not_change():
    settings = LpcamSettings.from_preset("adaptive")
    fixed = settings.fixed(tau=0.44, scales=(2.0, 1.0))
    assert (fixed.tau, fixed.scales) == (0.44, (2.0, 1.0))
    assert fixed.automatic == {*AUTOMATIC} - {"tau", "scales"}
    assert fixed.fitting["tau"] == 0.44
    assert fixed.fitting["clusters"] == "auto"
    assert settings.automatic == {*AUTOMATIC}


def test_other_values_cannot_be_automatic():
    with pytest.raises(ValidationError, match="restarts"):
        LpcamSettings.from_preset("frozen", restarts="auto")


@pytest.mark.parametrize("values", [{"weights": "ridge"}, {"centers": "unit"}])
def test_other_similarities_need_the_lengths_of_prototypes(values):
    assert LpcamSettings.from_preset("voc12.official", similarity="dot").similarity == "dot"
    assert LpcamSettings.from_preset("frozen", **values).cosine_only().similarity == "cosine"
    with pytest.raises(ValidationError, match=next(iter(values.values()))):
        LpcamSettings.from_preset("voc12.official", similarity="dot", **values)
    # the centres of scikit-learn's clusterings have their lengths whatever `centers` says
    LpcamSettings.from_preset("frozen", similarity="dot", clustering="kmeans")


@pytest.mark.parametrize("values", [{"base": "LPCAM-F"}, {"rounds": 0}, {"fusion": "sum"}])
def test_early_layers_refuse_what_they_do_not_know(values):
    with pytest.raises(ValidationError):
        LpcamSettings.from_preset("frozen", early=values)
