"""Base classes of settings: sections of a recipe, and settings that are filled from a preset."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self, TypeVar

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    create_model,
    model_validator,
)

from lpcam.runtime.errors import RecipeError

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
BUNDLED = "bundled:"  #: Prefix of weights that ship with the package.


class Section(BaseModel):
    """Settings that refuse unknown keys and do not change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


S = TypeVar("S", bound=Section)


def against_base(value: Any, info: ValidationInfo) -> Any:
    """Resolve a relative path against the folder of the recipe that names it."""
    base = (info.context or {}).get("base")
    if isinstance(value, str) and base is not None:
        # Absolute, because a run keeps its recipe in another folder.
        return (Path(base) / Path(value).expanduser()).absolute()
    return value


RecipePath = Annotated[Path, BeforeValidator(against_base)]
"""A path of a recipe; a relative one is taken from the recipe's own folder."""


class WeightsSection(Section):
    """A section with ``weights``: a word, or the path of a safetensors file."""

    @model_validator(mode="before")
    @classmethod
    def _weights_path(cls, given: Any, info: ValidationInfo) -> Any:
        weights = given.get("weights") if isinstance(given, Mapping) else None
        if not isinstance(weights, str) or not weights.endswith(".safetensors"):
            return given
        if weights.startswith(BUNDLED):
            path = resources.files("lpcam").joinpath("assets", weights.removeprefix(BUNDLED))
            return {**given, "weights": str(path)}
        return {**given, "weights": str(against_base(weights, info))}


class TrainedSection(Section):
    """A section of a network."""

    trained: RecipePath | None = None
    """File of a trained network, which ``lpcam convert`` writes from a released one; it is used
    without training."""


class PresetModel(Section):
    """Settings that are filled from the preset ``preset``, then from the values given beside it.

    Presets are in ``TABLE.yaml`` beside the subclass's module, or its attribute ``presets``.
    """

    table: ClassVar[str]
    presets: ClassVar[Mapping[str, Mapping[str, Any]] | None] = None
    preset: str

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        name = given.get("preset", cls.model_fields["preset"].default)
        if not isinstance(name, str) or name not in _presets(cls):
            allowed = ", ".join(cls.preset_names())
            raise ValueError(f"unknown preset {name!r}; allowed: {allowed}")
        return {**_presets(cls)[name], "preset": name, **given}

    @classmethod
    def preset_names(cls) -> list[str]:
        """Names of the presets."""
        return list(_presets(cls))

    @classmethod
    def preset_values(cls, name: str) -> dict[str, Any]:
        """Values of one preset as a fresh dict; RecipeError lists the names if it is unknown."""
        presets = _presets(cls)
        if name not in list(presets):
            allowed = ", ".join(presets)
            raise RecipeError(f"unknown {cls.table} preset {name!r}; there are {allowed}")
        return dict(presets[name])

    @classmethod
    def from_preset(cls, name: str | None = None, **changes: Any) -> Self:
        """Settings of a preset (None: the usual one) with changes; RecipeError if it is unknown."""
        name = name or str(cls.model_fields["preset"].default)
        cls.preset_values(name)
        return cls.model_validate({"preset": name, **changes})

    def changes(self) -> dict[str, Any]:
        """The values that differ from the preset's own, which a protocol must state."""
        own = type(self).from_preset(self.preset).model_dump()
        return {k: v for k, v in self.model_dump().items() if v != own[k]}


@cache
def _presets(model: type[PresetModel]) -> Mapping[str, Mapping[str, Any]]:
    if model.presets is not None:
        return model.presets
    package = model.__module__.rpartition(".")[0]
    text = resources.files(package).joinpath(f"{model.table}.yaml").read_text(encoding="utf-8")
    presets: dict[str, dict[str, Any]] = yaml.safe_load(text)
    return presets


def with_settings(section: type[S], methods: Mapping[str, Any]) -> type[S]:
    """A subclass with a field for each method that has settings, unless the section has it."""
    fields: dict[str, Any] = {
        name: (method.settings, method.settings.model_validate({}))
        for name, method in methods.items()
        if method.settings is not None and name not in section.model_fields
    }
    place: dict[str, Any] = {"__module__": section.__module__, "__doc__": section.__doc__}
    made: type[S] = create_model(section.__name__, __base__=section, **place, **fields)
    return made
