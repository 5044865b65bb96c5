"""Recipes: everything that a run needs to know, as strict typed settings.

A recipe is a YAML file; values on the command line (``--classifier.method probe``) replace those of
the file. An unknown key or a wrong value is refused with the field, the value and what is allowed.
Sections name methods of the registries (readers, hosts, refinements, segmentation networks), and
have one field for the settings of each registered method.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from lpcam.classifiers.feature_store import FeatureSettings
from lpcam.classifiers.settings import ClassifierSection
from lpcam.data import reader
from lpcam.data.reader import READERS
from lpcam.hosts import base as hosts
from lpcam.method.settings import LpcamSettings, Method
from lpcam.refine import base as refinements
from lpcam.report.collect import ReportSection
from lpcam.runtime.errors import RecipeError
from lpcam.runtime.settings import Fraction, PresetModel, RecipePath, Section, with_settings
from lpcam.segmentation import settings as segmentation

VERSION: Literal[1] = 1
"""The recipe version that this package reads and writes."""

if TYPE_CHECKING:
    DataSection = reader.DataSection
    HostSection = hosts.HostSection
    RefineSection = refinements.RefineSection
else:
    DataSection = with_settings(reader.DataSection, READERS)
    HostSection = with_settings(hosts.HostSection, hosts.HOSTS)
    RefineSection = with_settings(refinements.RefineSection, refinements.REFINEMENTS)
SegmentSection = segmentation.SegmentSection


class MapsSection(FeatureSettings):
    """How maps are computed and stored, apart from the method's own settings."""

    dtype: Literal["uint8", "float16"] = "uint8"
    """uint8 stores 255 steps of each map's maximum, float16 takes three to four times the space."""

    def features_key(self) -> dict[str, Any]:
        """Settings that change the features, for a cache key."""
        return self.model_dump(include=set(FeatureSettings.model_fields))


class SeedsSection(Section):
    """How maps become seed masks."""

    method: Method = "LPCAM"
    """Method whose maps are cut into seed masks."""
    threshold: Fraction | None = None
    """Values above this are foreground; null takes the lpcam preset's."""
    ignore_threshold: Fraction | None = None
    """Pixels between this and the threshold become 255 (ignored); null: none."""


class SheetSection(Section):
    """The contact sheet at the end of a run."""

    images: Annotated[int, Field(ge=0, le=64)] = 8
    """Number of rows; 0 makes no sheet."""


class RunSection(Section):
    """Where a run writes and what it may use; none of this changes what a result means."""

    folder: RecipePath | None = None
    """Folder of the run; null: runs/NAME below the working folder."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Random seed; equal seeds give equal bytes on one machine."""
    device: str = "auto"
    """"auto" (a GPU where there is one), "cpu", "cuda", "cuda:1", ..."""
    threads: Annotated[int, Field(ge=1)] | None = None
    """Number of CPU threads, each for one image; null takes all available processors."""
    memory: Annotated[float, Field(gt=0.0)] | None = None
    """Memory each process may use for cached features and sampled features, in GiB; null takes half
    of the available memory. The passes through the backbone need more."""
    batch: Annotated[int, Field(ge=1)] | None = None
    """Maximum number of equally sized images in a backbone pass; null: 1 on a CPU, 8 on a GPU. More
    than 1 changes results by rounding."""


class Recipe(Section):
    """A whole recipe."""

    version: Literal[1] = VERSION
    """Version of the recipe's format."""
    name: Annotated[str, Field(pattern=r"^[\w][\w .-]*$", max_length=100)]
    """Name of the run; its folder is runs/NAME unless run.folder is given."""
    data: DataSection
    classifier: ClassifierSection
    lpcam: LpcamSettings
    maps: MapsSection = MapsSection()
    seeds: SeedsSection = SeedsSection()
    host: HostSection | None = None
    refine: RefineSection | None = None
    segment: SegmentSection | None = None
    sheet: SheetSection = SheetSection()
    report: ReportSection = ReportSection()
    run: RunSection = RunSection()

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        ignore, threshold = self.seeds.ignore_threshold, self.fixed_threshold(self.seeds.method)
        if ignore is not None and ignore > threshold:
            raise ValueError(
                f"seeds.ignore_threshold {ignore} must not be above the threshold of the seeds, "
                f"{threshold} (seeds.threshold, or that of the lpcam preset)"
            )
        made = ("CAM", "LPCAM", *(() if self.host is None else (a.title for a in self.host.arms)))
        for name in self.refined:
            if name not in made:
                raise ValueError(
                    f"refine.maps has {name}, which this run does not make; it makes "
                    f"{', '.join(made)} (see host.method and host.maps)"
                )
        if self.segment is not None and self.refine is not None:
            missing = [m for m in self.segmented if m != "truth" and m not in self.refined]
            if missing:
                raise ValueError(
                    f"segment.masks has {missing[0]}, whose pseudo masks are not made; add it to "
                    "refine.maps"
                )
        uses_saliency = self.refine is not None and self.refine.refinement.uses_saliency
        if uses_saliency and self.data.saliency is None:
            raise ValueError(
                "refine.method saliency needs data.saliency: a folder of ID.png, or the word "
                "'computed'"
            )
        if self.data.saliency is not None and not uses_saliency:
            raise ValueError("data.saliency is used only by refine.method saliency; leave it out")
        return self

    @property
    def refined(self) -> tuple[str, ...]:
        """The maps that pseudo masks are made from."""
        if self.refine is None:
            return ()
        if self.refine.maps is not None:
            return self.refine.maps
        if self.host is None:
            return ("CAM", "LPCAM")
        return tuple(arm.title for arm in self.host.arms)

    @property
    def segmented(self) -> tuple[str, ...]:
        """The masks that a segmenter is trained on each."""
        if self.segment is None:
            return ()
        return self.segment.masks or self.refined or ("CAM", "LPCAM")

    @property
    def folder(self) -> Path:
        """Folder of the run."""
        return self.run.folder or Path("runs") / self.name

    def fixed_threshold(self, method: Method) -> float:
        """The fixed threshold of a method's seeds.

        The preset's, unless ``seeds.threshold`` replaces it for the method of the seeds.
        """
        if method == self.seeds.method and self.seeds.threshold is not None:
            return self.seeds.threshold
        return self.lpcam.cam_threshold if method == "CAM" else self.lpcam.threshold

    def changed(self, changes: Mapping[str, Any]) -> Recipe:
        """The recipe with some values replaced.

        Args:
            changes: values by dotted key, such as ``{"lpcam.tau": 0.25}``.

        Raises:
            RecipeError: naming the field, the value and what is allowed.
        """
        if not changes:
            return self
        values = _given(self)
        for key, value in changes.items():
            set_value(values, key, value)
        return parse_recipe(values, where=self.name)


def _given(section: BaseModel) -> dict[str, Any]:
    """Values of a section as JSON; of presets only their names and what differs from them.

    A preset that is replaced would otherwise be overruled by all values of the one before.
    """
    values = section.model_dump(mode="json", by_alias=True)
    for name, field in type(section).model_fields.items():
        own, key = getattr(section, name), field.alias or name
        if isinstance(own, PresetModel):
            changes = own.changes()
            values[key] = {k: v for k, v in values[key].items() if k == "preset" or k in changes}
        elif isinstance(own, BaseModel):
            values[key] = _given(own)
    return values


# -- Reading -------------------------------------------------------------------------------------


def bundled_recipes() -> list[str]:
    """Names of the recipes that ship with the package."""
    folder = resources.files("lpcam.pipeline").joinpath("recipes")
    names = (file.name for file in folder.iterdir())
    return sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml"))


def bundled_text(name: str) -> str:
    """Text of a bundled recipe.

    Raises:
        RecipeError: if there is none of that name; the message lists those there are.
    """
    if name not in bundled_recipes():
        raise RecipeError(f"no bundled recipe {name!r}; there are {', '.join(bundled_recipes())}")
    return resources.files("lpcam.pipeline").joinpath("recipes", f"{name}.yaml").read_text("utf-8")


def load_recipe(source: str | Path, changes: Mapping[str, Any] | None = None) -> Recipe:
    """Read a recipe file, or a bundled one by name, and replace values.

    A file with ``base: NAME`` takes the values that it does not have from that bundled recipe.
    Relative paths in the file are taken from the file's folder, those of the changes from the
    working folder.

    Args:
        source: path of a file, or a bundled name.
        changes: values by dotted key, such as ``{"lpcam.tau": 0.25}``.

    Raises:
        RecipeError: naming the field, the value and what is allowed.

    Example:
        >>> load_recipe("demo", {"lpcam.tau": 0.25}).lpcam.tau
        0.25
    """
    values, base = _read_values(source)
    for key, value in (changes or {}).items():
        set_value(values, key, value)
    return parse_recipe(values, base=base, where=str(source))


def _read_values(source: str | Path) -> tuple[dict[str, Any], Path]:
    """Nested values of a recipe and its base; the folder that relative paths are taken from."""
    path = Path(source)
    if path.is_file():
        try:
            text, base = path.read_text(encoding="utf-8"), path.parent
        except (UnicodeDecodeError, OSError) as error:
            raise RecipeError(f"the recipe {source} cannot be read as UTF-8: {error}") from None
    elif str(source) in bundled_recipes():
        text, base = bundled_text(str(source)), Path()
    else:
        inner = path / "recipe.yaml"
        hint = f"; did you mean {str(inner)!r}?" if inner.is_file() else ""
        raise RecipeError(
            f"no recipe {str(source)!r}: it is neither a file nor one of the bundled recipes "
            f"{', '.join(bundled_recipes())}{hint}"
        )
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"the recipe {source} is not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise RecipeError(f"the recipe {source} must be a mapping of sections, got {values!r:.80}")
    bundled = values.pop("base", None)
    if bundled is not None:
        if bundled not in bundled_recipes():
            raise RecipeError(
                f"the recipe {source} is based on {bundled!r}; a base must be one of the bundled "
                f"recipes {', '.join(bundled_recipes())}"
            )
        values = _merged(_read_values(bundled)[0], values)
    return values, base


def _merged(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Nested values with some replaced; a section that names a preset is replaced as a whole."""
    found = dict(values)
    for key, value in changes.items():
        inner = found.get(key)
        if isinstance(value, Mapping) and isinstance(inner, Mapping) and "preset" not in value:
            found[key] = _merged(inner, value)
        else:
            found[key] = value
    return found


def parse_recipe(values: Mapping[str, Any], *, base: Path | None = None, where: str) -> Recipe:
    """Validate a recipe given as nested mappings.

    Args:
        values: the sections.
        base: folder that relative paths are taken from; None leaves them relative.
        where: what the recipe is called in messages.

    Raises:
        RecipeError: as :func:`load_recipe`.
    """
    version = values.get("version", VERSION)
    if isinstance(version, int) and version > VERSION:
        raise RecipeError(
            f"the recipe {where} has version {version}, but this lpcam reads up to {VERSION}; "
            "upgrade lpcam, or write the recipe again with 'lpcam init'"
        )
    try:
        return Recipe.model_validate(values, context={"base": base})
    except ValidationError as error:
        raise RecipeError(_explain(error, where)) from None


# -- Replacing values ----------------------------------------------------------------------------


def parse_value(key: str, text: str) -> Any:
    """The value of a dotted key from text: YAML, or the text itself for a path.

    Raises:
        RecipeError: if the text is not YAML.
    """
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"the value of --{key}, {text!r}, is not valid YAML: {error}") from None
    return text if _is_path(key) and value is not None else value


def set_value(values: dict[str, Any], key: str, value: Any) -> None:
    """Replace one of nested values; a relative path is taken from the working folder.

    Args:
        values: nested values, changed in place.
        key: dotted; ``-`` counts as ``_``.
        value: the new one.

    Raises:
        RecipeError: if the key goes through a value that is not a section.
    """
    *sections, last = key.replace("-", "_").split(".")
    place = values
    for part in sections:
        inner = place.get(part)
        if inner is None:
            inner = place[part] = {}
        if not isinstance(inner, dict):
            raise RecipeError(f"--{key}: {part!r} is a value, not a section")
        place = inner
    text = str(value)
    is_weights = last == "weights" and text.endswith(".safetensors") and ":" not in text
    is_path = _is_path(key) and value is not None and text not in _words(key)
    place[last] = str(Path(text).expanduser().absolute()) if is_weights or is_path else value


def _is_path(key: str) -> bool:
    field = _field(key.replace("-", "_").split("."))
    return field is not None and any(kind is Path for kind in _kinds(field))


def _words(key: str) -> set[str]:
    """The words that a path's key may have instead."""
    field = _field(key.replace("-", "_").split("."))
    return {kind for kind in _kinds(field) if isinstance(kind, str)}


def _field(location: Sequence[int | str]) -> Any:
    """Annotation of a field by its location; None if there is none."""
    kind: Any = Recipe
    for part in location:
        model = _section(kind)
        fields = {} if model is None else {f.alias or n: f for n, f in model.model_fields.items()}
        if part not in fields:
            return None
        kind = fields[str(part)].annotation
    return kind


def _kinds(annotation: Any) -> Iterator[Any]:
    """All types and literal values in an annotation."""
    yield annotation
    for inner in get_args(annotation):
        yield from _kinds(inner)


# -- Describing ----------------------------------------------------------------------------------


def _explain(error: ValidationError, where: str) -> str:
    lines = [f"the recipe {where} has {error.error_count()} problem(s):"]
    for problem in error.errors():
        field = ".".join(str(part) for part in problem["loc"]) or "(recipe)"
        message = problem["msg"].removeprefix("Value error, ")
        given = problem.get("input")
        if problem["type"] == "extra_forbidden":
            model = _section(_field(problem["loc"][:-1]) if len(problem["loc"]) > 1 else Recipe)
            allowed = [] if model is None else [f.alias or n for n, f in model.model_fields.items()]
            message = f"unknown key; allowed here: {', '.join(allowed)}"
        elif problem["type"] == "missing":
            lines.append(f"  {field}: is required and missing")
            continue
        shown = "" if isinstance(given, dict) else f" = {given!r:.80}"
        lines.append(f"  {field}{shown}: {message}")
    return "\n".join(lines)


def describe_fields(
    model: type[BaseModel] = Recipe, prefix: str = ""
) -> list[tuple[str, str, str]]:
    """Every key of a recipe as (dotted key, type, meaning)."""
    rows: list[tuple[str, str, str]] = []
    for name, field in model.model_fields.items():
        key = f"{prefix}{field.alias or name}"
        kind = field.annotation
        section = _section(kind)
        if section is not None:
            rows += describe_fields(section, f"{key}.")
        else:
            meaning = field.description or ""
            if name == "preset" and issubclass(model, PresetModel):
                allowed = ", ".join(model.preset_names())
                meaning = f"Gives the values that are not given beside it: {allowed}."
            rows.append((key, _kind(kind), " ".join(meaning.split())))
    return rows


def _kind(annotation: Any) -> str:
    """A field's type in words that a YAML file knows."""
    inner, origin = get_args(annotation), get_origin(annotation)
    if annotation is type(None):
        return "null"
    if origin is Annotated:
        return _kind(inner[0])
    if origin is Literal:
        return " or ".join(str(value) for value in inner)
    if origin in (Union, UnionType):
        return " or ".join(_kind(one) for one in inner)
    if origin is tuple:
        return f"list of {_kind(inner[0])}"
    if origin is dict:
        return "mapping"
    return "path" if annotation is Path else str(getattr(annotation, "__name__", annotation))


def _section(annotation: Any) -> type[BaseModel] | None:
    """The section that a field holds, if it holds one (or null)."""
    for kind in (annotation, *get_args(annotation)):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None
