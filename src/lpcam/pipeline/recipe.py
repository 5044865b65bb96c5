"""Recipes: everything that a run needs to know, as strict typed settings.

A recipe is a YAML file; values on the command line (``--classifier.method probe``) replace those of
the file. An unknown key or a wrong value is refused with the field, the value and what is allowed.
Sections name methods of the registries (readers, hosts, refinements, segmentation networks), and
have one field for the settings of each registered method.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from lpcam.classifiers.engines import Engine
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

VERSION: Literal[1] = 1  #: The recipe version that this package reads and writes.

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
    """Type of stored maps. uint8: 255 steps of each maximum; float16: 3 to 4 times the space."""

    def features_key(self) -> dict[str, Any]:
        """Settings that change the features, for a cache key."""
        return self.model_dump(include=set(FeatureSettings.model_fields))


class SeedsSection(Section):
    """How maps become seed masks."""

    method: Method | None = None
    """Method whose maps are cut into seed masks. Null: LPCAM-E with early layers, else LPCAM."""
    threshold: Fraction | Literal["auto"] | None = None
    """Threshold of the seed masks: map values above it are foreground. Auto: the judge's, for all
    maps of the run. Null: the lpcam preset's."""
    ignore_threshold: Fraction | None = None
    """Map values from this to the threshold become 255 (ignored); null: none."""


class SheetSection(Section):
    """The contact sheet at the end of a run."""

    images: Annotated[int, Field(ge=0, le=64)] = 8
    """Number of rows of the sheet; 0 makes none."""


class RunSection(Section):
    """Where a run writes and what it may use; none of this changes what a result means."""

    folder: RecipePath | None = None
    """Folder of the run; null: runs/NAME below the working folder."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Random seed; equal seeds give equal bytes on one machine."""
    device: str = "auto"
    """Device: "auto" (a GPU if there is one), "cpu", "cuda", "cuda:1", ..."""
    threads: Annotated[int, Field(ge=1)] | None = None
    """Number of CPU threads, each for one image; null takes all available processors."""
    memory: Annotated[float, Field(gt=0.0)] | None = None
    """Memory each process may use for cached features and sampled features, in GiB; null takes half
    of the available memory. The passes through the backbone need more."""
    engine: Literal["auto"] | Engine = "auto"
    """What runs the passes of frozen networks: "torch"; "onnxruntime" or "openvino", which are
    faster on a CPU; or "compile" (torch.compile). A run decides once: auto takes torch on a GPU and
    with a preset of the paper or its program, else onnxruntime where it is installed and agrees
    with torch to 1e-3."""
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
        if self.seed_method == "LPCAM-E" and self.lpcam.early is None:
            raise ValueError(
                "seeds.method LPCAM-E needs early layers: lpcam.preset adaptive, or lpcam.early {}"
            )
        ignore, threshold = self.seeds.ignore_threshold, self.fixed_threshold(self.seed_method)
        if ignore is not None and self.chooses_threshold(self.seed_method):
            raise ValueError(
                "seeds.ignore_threshold needs a fixed threshold of the seeds; set seeds.threshold"
            )
        if ignore is not None and ignore > threshold:
            raise ValueError(
                f"seeds.ignore_threshold {ignore} must not be above the threshold of the seeds, "
                f"{threshold} (seeds.threshold, or that of the lpcam preset)"
            )
        own = ("CAM", "LPCAM", *(("LPCAM-E",) if self.lpcam.early is not None else ()))
        made = (*own, *(() if self.host is None else (a.title for a in self.host.arms)))
        if unknown := [name for name in self.refined if name not in made]:
            raise ValueError(
                f"refine.maps has {unknown[0]}, which this run does not make; it makes "
                f"{', '.join(made)} (see host.method and host.maps)"
            )
        missing = {*self.segmented} - {"truth", *self.refined}
        if missing and self.refine is not None:
            raise ValueError(
                f"segment.masks has {min(missing)}, whose pseudo masks are not made; add it to "
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
        own_lpcam = [self.lpcam, *([] if self.host is None else [self.host.lpcam])]
        others = [one.similarity for one in own_lpcam if one and one.similarity != "cosine"]
        if others and (self.lpcam.early or self.host or self.report.images):
            raise ValueError(
                f"lpcam.similarity {others[0]} has maps and scores only, no report, LPCAM-E or "
                "host; set report.images to 0 and leave lpcam.early and host out, or take cosine"
            )
        return self

    @property
    def seed_method(self) -> Method:
        """Method whose maps are cut into seed masks."""
        return self.seeds.method or ("LPCAM" if self.lpcam.early is None else "LPCAM-E")

    @property
    def refined(self) -> tuple[str, ...]:
        """The maps that pseudo masks are made from."""
        if self.refine is None:
            return ()
        if self.refine.maps is not None:
            return self.refine.maps
        if self.host is not None:
            return tuple(a.title for a in self.host.arms)
        return self._usual_maps

    @property
    def segmented(self) -> tuple[str, ...]:
        """The masks that a segmenter is trained on each."""
        if self.segment is None:
            return ()
        return self.segment.masks or self.refined or self._usual_maps

    @property
    def _usual_maps(self) -> tuple[str, ...]:
        """Maps of the classifier that later stages work on where the recipe names none."""
        return ("CAM", "LPCAM") if self.lpcam.early is None else ("LPCAM-E",)

    @property
    def folder(self) -> Path:
        """Folder of the run."""
        return self.run.folder or Path("runs") / self.name

    def fixed_threshold(self, method: str) -> float:
        """The fixed threshold of a method's seeds: the recipe's for its own, or the preset's."""
        own = self.seeds.threshold
        if method == self.seed_method and isinstance(own, float):
            return own
        return self.lpcam.cam_threshold if method == "CAM" else self.lpcam.threshold

    def chooses_threshold(self, method: str) -> bool:
        """Whether the judge chooses the threshold of a method's maps: also of a host's."""
        own = self.seeds.threshold
        if own == "auto":
            return True
        if method == self.seed_method and own is not None:
            return False
        if method == "LPCAM-E":  # no preset states one
            return True
        return ("cam_threshold" if method == "CAM" else "threshold") in self.lpcam.automatic

    def changed(self, changes: Mapping[str, Any]) -> Recipe:
        """The recipe with some values replaced, by dotted key such as ``lpcam.tau``."""
        if not changes:
            return self
        values = _given(self)
        for key, value in changes.items():
            _set_value(values, key, value)
        return parse_recipe(values, where=self.name)


def _given(section: BaseModel) -> dict[str, Any]:
    """Values of a section as JSON; of presets only their names and what differs from them.

    A preset that is replaced would otherwise be overruled by all values of the one before.
    """
    values = section.model_dump(mode="json", by_alias=True)
    for key, name in _names(type(section)).items():
        own = getattr(section, name)
        if isinstance(own, PresetModel):
            values[key] = {k: values[key][k] for k in ("preset", *own.changes())}
        elif isinstance(own, BaseModel):
            values[key] = _given(own)
    return values


def bundled_recipes() -> list[str]:
    """Names of the recipes that ship with the package."""
    names = (file.name for file in _bundled().iterdir())
    return sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml"))


def bundled_text(name: str) -> str:
    """Text of a bundled recipe; RecipeError if there is none of that name."""
    if name not in bundled_recipes():
        raise RecipeError(f"no bundled recipe {name!r}; there are {', '.join(bundled_recipes())}")
    return _bundled().joinpath(f"{name}.yaml").read_text("utf-8")


def _bundled() -> Traversable:
    return resources.files("lpcam.pipeline").joinpath("recipes")


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
        _set_value(values, key, value)
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
        found[key] = value
        if isinstance(value, Mapping) and isinstance(inner, Mapping) and "preset" not in value:
            found[key] = _merged(inner, value)
    return found


def parse_recipe(values: Mapping[str, Any], *, base: Path | None = None, where: str) -> Recipe:
    """Validate a recipe given as nested mappings; ``base`` is the folder of its relative paths."""
    version = values.get("version", VERSION)
    if isinstance(version, int) and version > VERSION:
        raise RecipeError(
            f"the recipe {where} has version {version}, but this lpcam reads up to {VERSION}; "
            "upgrade lpcam, or write the recipe again with 'lpcam init'"
        )
    try:
        return Recipe.model_validate(values, context={"base": base})
    except ValidationError as error:
        problems = "".join(_explain(problem) for problem in error.errors())
        raise RecipeError(
            f"the recipe {where} has {error.error_count()} problem(s):{problems}"
        ) from None


def _explain(problem: ErrorDetails) -> str:
    field, given = ".".join(map(str, problem["loc"])) or "(recipe)", problem["input"]
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "missing":
        return f"\n  {field}: is required and missing"
    if problem["type"] == "extra_forbidden":
        allowed = _names(section_model(_annotation(problem["loc"][:-1])))
        message = f"unknown key; allowed here: {', '.join(allowed)}"
    shown = "" if isinstance(given, dict) else f" = {given!r:.80}"
    return f"\n  {field}{shown}: {message}"


def parse_value(key: str, text: str) -> Any:
    """The value of a dotted key from text: YAML, or the text itself for a path."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"the value of --{key}, {text!r}, is not valid YAML: {error}") from None
    is_path = Path in _kinds(_annotation(key.replace("-", "_").split(".")))
    return text if is_path and value is not None else value


def _set_value(values: dict[str, Any], key: str, value: Any) -> None:
    """Replace one of nested values; a relative path is taken from the working folder."""
    sections = key.replace("-", "_").split(".")
    place, last, text = values, sections[-1], str(value)
    for part in sections[:-1]:
        if place.get(part) is None:
            place[part] = {}
        place = place[part]
        if not isinstance(place, dict):
            raise RecipeError(f"--{key}: {part!r} is a value, not a section")
    kinds = list(_kinds(_annotation(sections)))
    is_path = Path in kinds and value is not None and text not in kinds  # else one of its words
    is_weights = last == "weights" and text.endswith(".safetensors") and ":" not in text
    place[last] = str(Path(text).expanduser().absolute()) if is_path or is_weights else value


def _annotation(location: Sequence[int | str]) -> Any:
    """Annotation of a field by its location; None if there is none."""
    kind: Any = Recipe
    for part in location:
        model = section_model(kind)
        name = _names(model).get(str(part))
        if model is None or name is None:
            return None
        kind = model.model_fields[name].annotation
    return kind


def _kinds(annotation: Any) -> Iterator[Any]:
    """All types and literal values in an annotation."""
    yield annotation
    for inner in get_args(annotation):
        yield from _kinds(inner)


def section_model(annotation: Any) -> type[BaseModel] | None:
    """The section that a field holds, if it holds one (or null)."""
    for kind in (annotation, *get_args(annotation)):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None


def _names(model: type[BaseModel] | None) -> dict[str, str]:
    """Names of a section's fields by their keys in a recipe."""
    fields = {} if model is None else model.model_fields
    return {field.alias or name: name for name, field in fields.items()}


def describe_fields(
    model: type[BaseModel] = Recipe, prefix: str = ""
) -> list[tuple[str, str, str]]:
    """Every key of a recipe as (dotted key, type, meaning)."""
    rows: list[tuple[str, str, str]] = []
    for key, name in _names(model).items():
        field = model.model_fields[name]
        section = section_model(field.annotation)
        if section is not None:
            rows += describe_fields(section, f"{prefix}{key}.")
            continue
        meaning = field.description or ""
        if name == "preset" and issubclass(model, PresetModel):
            allowed = ", ".join(model.preset_names())
            meaning = f"Named set of values for the keys that are not given:  {allowed}."
        rows.append((prefix + key, _kind(field.annotation), " ".join(meaning.split())))
    return rows


def _kind(annotation: Any) -> str:
    """A field's type in words that a YAML file knows."""
    inner, origin = get_args(annotation), get_origin(annotation)
    if origin is Annotated:
        return _kind(inner[0])
    if origin is Literal:
        return " or ".join(map(str, inner))
    if origin in (Union, UnionType):
        return " or ".join(map(_kind, inner))
    if origin is tuple:
        return f"list of {_kind(inner[0])}"
    words = {type(None): "null", Path: "path", dict: "mapping"}
    kind = origin or annotation
    return words.get(kind, str(getattr(kind, "__name__", kind)))
