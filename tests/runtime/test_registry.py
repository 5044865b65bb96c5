"""Registries: entries of the package and of other distributions, imported when they are needed."""

from __future__ import annotations

import sys
from importlib import metadata

import pytest

from lpcam.runtime import registry
from lpcam.runtime.registry import Registry, RegistryError

OWN = {"pi": "math:pi", "slow": "no_module_of_this_name:X"}


def with_points(monkeypatch: pytest.MonkeyPatch, **points: str) -> None:
    """Let other distributions announce entries of the group ``toys``."""

    def found(group: str) -> list[metadata.EntryPoint]:
        assert group == "toys"
        return [metadata.EntryPoint(name, value, group) for name, value in points.items()]

    monkeypatch.setattr(registry, "entry_points", found)


def test_own_entries_come_first_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    with_points(monkeypatch, tau="math:tau", e="math:e")
    numbers: Registry[float] = Registry("number", "toys", OWN)
    assert list(numbers) == ["pi", "slow", "e", "tau"]
    assert len(numbers) == 4
    assert "tau" in numbers and "phi" not in numbers
    assert numbers["tau"] == 2 * numbers["pi"]


def test_a_method_is_imported_when_it_is_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    with_points(monkeypatch)
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    modules: Registry[object] = Registry("function", "toys", {"one": "colorsys:rgb_to_hsv"})
    assert "one" in modules
    assert "colorsys" not in sys.modules
    assert modules["one"] is modules["one"]
    assert "colorsys" in sys.modules


def test_an_unknown_name_is_refused_with_the_known_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    with_points(monkeypatch, e="math:e")
    numbers: Registry[float] = Registry("number", "toys", OWN)
    with pytest.raises(RegistryError, match=r"^there is no number 'phi'; there are pi, slow, e$"):
        numbers["phi"]
    assert numbers.get("phi") is None
    assert numbers.get("phi", 1.6) == 1.6


def test_a_name_is_registered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with_points(monkeypatch, pi="math:e")
    with pytest.raises(RegistryError, match=r"'pi'.*math:pi.*math:e"):
        list(Registry("number", "toys", OWN))
