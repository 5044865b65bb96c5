"""Recipes: everything a run needs to know, as strict typed records (floor 0).

A recipe is a YAML file; values on the command line (``--classifier.method probe``) replace those of
the file. An unknown key or a wrong value is refused with the field, the value and what is allowed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    model_validator,
)

from lpcam.errors import RecipeError
from lpcam.presets import (
    AmnSettings,
    CrfSettings,
    EdamSettings,
    FinetuneSettings,
    Fraction,
    IrnSettings,
    LpcamSettings,
    MctformerSettings,
    PamrSettings,
    ProbeSettings,
    PsaSettings,
    SaliencySettings,
    SegmenterSettings,
    SegmentTestSettings,
)

VERSION = 1
"""The recipe version that this package reads and writes."""

Method = Literal["CAM", "LPCAM-F", "LPCAM"]
MapName = Literal["CAM", "LPCAM", "AMN", "AMN+LPCAM", "MCTformer", "MCTformer+LPCAM", "EDAM"]
"""Maps that pseudo masks can be made of: the run's own, and those of a host."""


def _against_base(value: Any, info: ValidationInfo) -> Any:
    """Resolve a relative path against the folder of the recipe that names it."""
    base = (info.context or {}).get("base")
    if isinstance(value, str) and base is not None:
        # Absolute, for the recipe that a run keeps lies in another folder.
        return (Path(base) / Path(value).expanduser()).absolute()
    return value


RecipePath = Annotated[Path, BeforeValidator(_against_base)]


def _word_or_path(value: Any, info: ValidationInfo) -> Any:
    return value if value in ("folders", "computed") else _against_base(value, info)


LabelSource = Annotated[Literal["folders"] | Path, BeforeValidator(_word_or_path)]
Saliency = Annotated[Literal["computed"] | Path, BeforeValidator(_word_or_path)]


class Section(BaseModel):
    """A part of a recipe: unknown keys are errors, values do not change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Lists(Section):
    """Which list of the data set each stage works on; null takes the kind's usual one."""

    classify: str | None = None
    """Trains the classifier (voc: train_aug; folder, coco: all)."""
    validate_: str | None = Field(default=None, alias="validate")
    """Measures its mAP; null holds out a seeded tenth of the list above."""
    prototypes: str | None = None
    """Is clustered (voc: train; folder, coco: all)."""
    maps: str | None = None
    """Gets maps and seeds (voc: train; folder, coco: all)."""
    evaluate: str | None = None
    """Is scored where masks exist; must lie within ``maps`` (voc: train; folder, coco: all)."""
    segment: str | None = None
    """Trains the segmenter; must lie within ``maps`` (that of ``maps``)."""
    test: str | None = None
    """Is segmented, and scored where masks exist (voc: val; folder, coco: all)."""


USUAL_LISTS: Mapping[str, Mapping[str, str]] = {
    "voc": {
        "classify": "train_aug",
        "prototypes": "train",
        "maps": "train",
        "evaluate": "train",
        "test": "val",
    },
    **dict.fromkeys(
        ("folder", "coco"),
        dict.fromkeys(("classify", "prototypes", "maps", "evaluate", "test"), "all"),
    ),
}
ListName = Literal["classify", "prototypes", "maps", "evaluate", "segment", "test"]


class CocoSection(Section):
    """How masks are painted from COCO's annotations (specification of data sets, section 3)."""

    order: Literal["file", "area"] = "file"
    """Which object covers which: ``file``: a later annotation an earlier one. ``area``: a smaller
    one a larger one."""
    crowds: Literal["background", "void"] = "background"
    """What the region of a crowd is; ``void``: 255, where no object covers it."""


class DataSection(Section):
    """Where the images and labels are."""

    kind: Literal["voc", "folder", "coco"]
    """``voc``: the PASCAL VOC layout. ``folder``: images with labels.csv, labels.jsonl, or a folder
    a class. ``coco``: COCO's annotations, of a folder or one JSON file."""
    root: RecipePath
    labels: LabelSource | None = None
    """A file of image-level labels (.csv, .jsonl) instead of the usual source; folder: or the word
    ``folders``, where each class has one."""
    masks: RecipePath | None = None
    """A folder of true masks, ID.png, instead of the usual ones."""
    coco: CocoSection = CocoSection()
    """Of the kind coco, where ``masks`` names no folder."""
    saliency: Saliency | None = None
    """For refine.method saliency: a folder of ID.png, 0 to 255; or ``computed``, by a method that
    needs no network (docs/hosts.md)."""
    name: str | None = None
    """What the data set is called in every figure's protocol; null takes the folder's name."""
    classes: tuple[str, ...] | None = None
    """A subset of the classes; mask ids of others are ignored. Null takes all."""
    lists: Lists = Lists()

    @model_validator(mode="after")
    def _check(self) -> DataSection:
        if self.kind != "folder" and self.labels == "folders":
            raise ValueError("labels 'folders' belongs to the kind folder; name a .csv or .jsonl")
        if self.kind == "coco" and self.labels is not None:
            raise ValueError("labels belongs to the kinds voc and folder; coco has its annotations")
        return self

    def list_of(self, stage: ListName) -> str:
        """Name of the list that a stage works on."""
        own: str | None = getattr(self.lists, stage)
        if own is None and stage == "segment":
            return self.list_of("maps")
        return own or USUAL_LISTS[self.kind][stage]


class WeightsSection(Section):
    """A section with ``weights``, a word or the path of a file."""

    @model_validator(mode="before")
    @classmethod
    def _weights_path(cls, given: Any, info: ValidationInfo) -> Any:
        if not isinstance(given, Mapping):
            return given
        weights = given.get("weights")
        if isinstance(weights, str) and weights.endswith(".safetensors"):
            if weights.startswith(BUNDLED):
                path = resources.files("lpcam").joinpath("assets", weights.removeprefix(BUNDLED))
                return {**given, "weights": str(path)}
            return {**given, "weights": str(_against_base(weights, info))}
        return given


class ClassifierSection(WeightsSection):
    """The backbone, its weights, and how the head (and the backbone) are trained."""

    backbone: str
    """A timm model's name."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of timm.create_model."""
    output_stride: Literal[8, 16, 32] | None = None
    """Null leaves the model's own; not every model has another."""
    dilated: bool = True
    """False sets dilations back to 1 where output_stride is given and removed a stride."""
    weights: str
    """"pretrained" (timm's), "random", or the path of a safetensors file."""
    mean: tuple[float, float, float] | None = None
    """Of RGB in [0, 1]; null takes timm's pretrained cfg."""
    std: tuple[float, float, float] | None = None
    """Of RGB in [0, 1]; null takes timm's pretrained cfg."""
    method: Literal["auto", "probe", "finetune"] = "auto"
    """``auto``: fine-tune where there is a GPU, else a linear probe on the frozen backbone."""
    probe: ProbeSettings = ProbeSettings.from_preset("default")
    finetune: FinetuneSettings = FinetuneSettings.from_preset("momentum")


BUNDLED = "bundled:"
"""Prefix of weights that ship with the package."""


class MapsSection(Section):
    """How maps are computed and kept, apart from the method's own settings."""

    dtype: Literal["uint8", "float16"] = "uint8"
    """uint8 stores 255 steps of each map's maximum, float16 takes three to four times the room."""
    features: Literal["float16", "float32"] = "float16"
    """To which every feature is rounded; float16 halves what must be kept in memory."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the backbone's passes; the others are faster where the hardware has them, and change maps
    by more than rounding (docs/performance.md)."""
    maximum_side: Annotated[int, Field(ge=16)] = 1024
    """A longer image is mapped at this long side, in pixels, and its maps are enlarged."""


class SeedsSection(Section):
    """How maps become seed masks."""

    method: Method = "LPCAM"
    threshold: Fraction | None = None
    """Foreground needs a value above it; null takes the lpcam preset's."""
    ignore_threshold: Fraction | None = None
    """Pixels between this and the threshold become 255 (ignored in training); null: none do."""


class HostSection(WeightsSection):
    """A method with a network of its own that makes better maps: see hosts/."""

    method: Literal["amn", "mctformer", "edam"]
    """``amn``: a per-pixel classifier taught by the run's maps. ``mctformer``: a transformer with
    class tokens. ``edam``: class masks learnt with attention over pairs of images."""
    maps: Annotated[tuple[Literal["CAM", "LPCAM"], ...], Field(min_length=1)] | None = None
    """What the host builds on: CAM (of MCTformer its own PatchCAM), or LPCAM in its place; each
    makes maps of its own. Null: both. edam has neither: its refinement is refine.method
    saliency."""
    backbone: str | None = None
    """Null: that of the classifier; mctformer: a timm vision transformer."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of timm.create_model, where ``backbone`` is given."""
    output_stride: Literal[8, 16, 32] | None = None
    """Of ``backbone``, where it is given; null leaves the model's own."""
    dilated: bool = True
    """Of ``backbone``, where it is given: false sets dilations back to 1."""
    weights: str = "pretrained"
    """Of ``backbone``, where it is given: "pretrained", "random", or a safetensors file."""
    mean: tuple[float, float, float] | None = None
    """Of RGB in [0, 1], where ``backbone`` is given; null takes timm's pretrained cfg."""
    std: tuple[float, float, float] | None = None
    """Of RGB in [0, 1], where ``backbone`` is given; null takes timm's pretrained cfg."""
    amn: AmnSettings = AmnSettings.from_preset("default")
    mctformer: MctformerSettings = MctformerSettings.from_preset("default")
    edam: EdamSettings = EdamSettings.from_preset("default")
    lpcam: LpcamSettings | None = None
    """How the host's own features are clustered (mctformer; amn with reading features), for which
    it must be given: presets mctformer.voc12, mctformer.coco14, amn.voc12, amn.coco14."""

    @model_validator(mode="after")
    def _check(self) -> HostSection:
        if self.method == "edam" and self.maps is not None:
            raise ValueError(
                "edam builds on neither CAM nor LPCAM: leave host.maps out; LPCAM takes CAM's "
                "place in its refinement: refine.method saliency, refine.maps [LPCAM]"
            )
        if self.method == "mctformer" and self.backbone is None:
            raise ValueError("mctformer needs host.backbone, such as deit_small_patch16_224")
        if self.maps is not None and len(set(self.maps)) != len(self.maps):
            raise ValueError(f"host.maps {list(self.maps)} repeats")
        if self.backbone is None:
            own = ("arguments", "output_stride", "dilated", "weights", "mean", "std")
            usual = {"arguments": {}, "dilated": True, "weights": "pretrained"}
            given = [name for name in own if getattr(self, name) != usual.get(name)]
            if given:
                raise ValueError(
                    f"host.{given[0]} belongs to host.backbone, which is not given; without one "
                    "the host has the classifier's backbone, weights and preprocessing"
                )
        if self.method == "mctformer" and self.mctformer.version == "v1":
            if "LPCAM" in self.arms.values():
                raise ValueError(
                    "mctformer.version v1 has no PatchCAM whose place LPCAM could take; set "
                    "host.maps to [CAM]"
                )
            if self.mctformer.split_maps == "patch":
                raise ValueError("mctformer.split_maps patch needs version v2")
        if self.clusters and self.lpcam is None:
            raise ValueError(
                "host.lpcam must say how the host's own features are clustered: give it a preset "
                "(mctformer.voc12, mctformer.coco14, amn.voc12, amn.coco14)"
            )
        return self

    @property
    def settings(self) -> AmnSettings | MctformerSettings | EdamSettings:
        """Those of the method."""
        own: dict[str, AmnSettings | MctformerSettings | EdamSettings] = {
            "amn": self.amn,
            "mctformer": self.mctformer,
            "edam": self.edam,
        }
        return own[self.method]

    @property
    def clusters(self) -> bool:
        """Whether prototypes are made of the host's own features."""
        by_features = self.method == "mctformer" or (
            self.method == "amn" and self.amn.reading == "features"
        )
        return by_features and "LPCAM" in self.arms.values()

    @property
    def arms(self) -> dict[MapName, Literal["CAM", "LPCAM"]]:
        """The maps that the host makes, and what each builds on."""
        if self.method == "edam":
            return {"EDAM": "CAM"}
        titles: dict[str, dict[str, MapName]] = {
            "amn": {"CAM": "AMN", "LPCAM": "AMN+LPCAM"},
            "mctformer": {"CAM": "MCTformer", "LPCAM": "MCTformer+LPCAM"},
        }
        return {titles[self.method][base]: base for base in self.maps or ("CAM", "LPCAM")}


class RefineSection(Section):
    """Pseudo masks: what becomes of the maps before a segmenter is trained on them."""

    method: Literal["irn", "crf", "pamr", "psa", "saliency"] = "irn"
    """``irn``: class boundaries learnt from the maps, and a random walk within them. ``psa``:
    affinities learnt from the maps, and a walk. ``saliency``: fused with a saliency map (EDAM).
    ``crf``: a dense CRF on the seeds. ``pamr``: the maps averaged over like-coloured neighbours."""
    maps: Annotated[tuple[MapName, ...], Field(min_length=1)] | None = None
    """Which maps are refined; every image that has maps gets a pseudo mask. Null: the host's, or
    CAM and LPCAM where there is no host."""
    irn: IrnSettings = IrnSettings.from_preset("default")
    crf: CrfSettings = CrfSettings.from_preset("irn")
    """Of IRN's labels, and of the method ``crf``; psa and saliency have their own."""
    pamr: PamrSettings = PamrSettings.from_preset("default")
    psa: PsaSettings = PsaSettings.from_preset("default")
    saliency: SaliencySettings = SaliencySettings.from_preset("edam")

    @model_validator(mode="after")
    def _check(self) -> RefineSection:
        if self.crf.unary != "labels":
            raise ValueError(
                f"crf.unary is {self.crf.unary!r} (preset {self.crf.preset!r}), but the CRF gets "
                "the hard labels of seeds here; use the preset 'irn', or set crf.unary to labels"
            )
        return self


class SegmentSection(WeightsSection):
    """A network that is trained on the pseudo masks and segments images without any label."""

    network: str = "deeplabv2"
    """``deeplabv2``, ``wideresnet38`` or ``upernet``."""
    backbone: str | None = None
    """deeplabv2: ``resnet101_caffe`` or a timm model (null: the former). upernet: the Swin's size,
    ``tiny``, ``small`` or ``base`` (null: tiny). wideresnet38: null."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Further ones of the backbone."""
    output_stride: Literal[8, 16, 32] | None = None
    """Of a timm backbone; null leaves the model's own."""
    weights: str = "pretrained"
    """Of the backbone: "pretrained", "random", or the path of a safetensors file."""
    mean: tuple[float, float, float] | None = None
    """Of RGB in [0, 1]; null takes the network's own."""
    std: tuple[float, float, float] | None = None
    """Of RGB in [0, 1]; null takes the network's own."""
    masks: Annotated[tuple[MapName | Literal["truth"], ...], Field(min_length=1)] | None = None
    """A segmenter is trained on the pseudo masks of each of these maps; ``truth``: on the true
    masks, which bounds from above what masks can give. Null: of all that are refined."""
    training: SegmenterSettings = SegmenterSettings.from_preset("deeplabv2.voc12.official")
    test: SegmentTestSettings = SegmentTestSettings.from_preset("deeplabv2.official")
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the network's passes in training; weights and loss are in float32."""
    validations: Annotated[int, Field(ge=0)] = 5
    """How often in a training the mIoU is measured on the list to test, where it has masks: at
    scale 1, without a CRF."""
    checkpoint: Literal["last", "best"] = "last"
    """Which weights are tested and used; ``best`` is chosen on the truth of the list to test."""

    @model_validator(mode="after")
    def _check(self) -> SegmentSection:
        from lpcam.networks.registry import NETWORKS  # noqa: PLC0415 - torch is slow to import

        if self.network not in NETWORKS:
            raise ValueError(f"network must be one of {', '.join(NETWORKS)}, got {self.network!r}")
        given = {
            "backbone": self.backbone,
            "output_stride": self.output_stride,
            "pyramid": self.training.pyramid,
        }
        for name, value in given.items():
            if value and name not in NETWORKS[self.network].options:
                field = "training.pyramid" if name == "pyramid" else name
                raise ValueError(f"{field} does not apply to {self.network}, got {value!r}")
        if self.checkpoint == "best" and not self.validations:
            raise ValueError("checkpoint 'best' needs validations above 0")
        return self

    @property
    def backbone_name(self) -> str:
        """The backbone, where none is given the network's usual one."""
        from lpcam.networks.registry import NETWORKS  # noqa: PLC0415 - torch is slow to import

        return self.backbone or NETWORKS[self.network].default_backbone


class SheetSection(Section):
    """The sheet of pictures at the end of a run."""

    images: Annotated[int, Field(ge=0, le=64)] = 8
    """Rows of the sheet; 0 makes none."""


class ReportSection(Section):
    """The report at the end of a run: one HTML file, report.html."""

    images: Annotated[int, Field(ge=0, le=2000)] = 500
    """In the viewer, at most; 500 take about 10 MB. 0 makes no report."""
    searched: Annotated[int, Field(ge=1)] = 160
    """Images, of those in the viewer, that are searched for the nearest patches of prototypes and
    for confusing classes."""
    prototypes: Annotated[int, Field(ge=1)] = 12
    """Of each class and side that are shown, at most; fewer where there are many classes."""
    patches: Annotated[int, Field(ge=1, le=12)] = 4
    """Nearest patches of each prototype."""
    confusions: Annotated[int, Field(ge=0, le=50)] = 6
    """Pairs of classes that the classifier takes for each other."""


class RunSection(Section):
    """Where a run writes and what it may use; none of this changes a result's meaning."""

    folder: RecipePath | None = None
    """Null: runs/NAME below the working folder."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Of everything random; a seed gives the same bytes on one machine."""
    device: str = "auto"
    """"auto" (a GPU where there is one), "cpu", "cuda", "cuda:1", ..."""
    threads: Annotated[int, Field(ge=1)] | None = None
    """Images worked on at a time; null takes the number of processors this process may use."""
    memory: Annotated[float, Field(gt=0.0)] | None = None
    """GiB that each process may keep: features that several stages need, and the sample to be
    clustered. What an image needs while it passes the backbone comes on top, for each thread. Null
    takes half of the memory that the run's processes may use."""
    batch: Annotated[int, Field(ge=1)] | None = None
    """Most images of equal size that pass the backbone together; null: 1 on a CPU, 8 on a GPU.
    More than 1 changes results by rounding."""


class Recipe(Section):
    """A whole recipe."""

    version: Literal[1] = 1
    """Of the recipe's own format."""
    name: Annotated[str, Field(pattern=r"^[\w][\w .-]*$", max_length=100)]
    """Of the run; its folder is runs/NAME unless run.folder says otherwise."""
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
        return self

    @model_validator(mode="after")
    def _check_masks(self) -> Recipe:
        made: tuple[str, ...] = ("CAM", "LPCAM", *(() if self.host is None else self.host.arms))
        for name in self.refined:
            if name not in made:
                raise ValueError(
                    f"refine.maps has {name}, which this run does not make: it makes "
                    f"{', '.join(made)}; see host.method and host.maps"
                )
        if self.segment is not None and self.refine is not None:
            missing = [m for m in self.segmented if m != "truth" and m not in self.refined]
            if missing:
                raise ValueError(
                    f"segment.masks has {missing[0]}, whose pseudo masks are not made; add it to "
                    "refine.maps"
                )
        if self.refine is not None and self.refine.method == "saliency":
            if self.data.saliency is None:
                raise ValueError(
                    "refine.method saliency needs data.saliency: a folder of ID.png, or the word "
                    "'computed'"
                )
        elif self.data.saliency is not None:
            raise ValueError(
                "data.saliency serves refine.method saliency alone; leave it out, or choose that"
            )
        return self

    @property
    def refined(self) -> tuple[MapName, ...]:
        """The maps that pseudo masks are made of."""
        if self.refine is None:
            return ()
        if self.refine.maps is not None:
            return self.refine.maps
        return ("CAM", "LPCAM") if self.host is None else tuple(self.host.arms)

    @property
    def segmented(self) -> tuple[str, ...]:
        """The masks that a segmenter is trained on each."""
        if self.segment is None:
            return ()
        if self.segment.masks is not None:
            return self.segment.masks
        return self.refined or ("CAM", "LPCAM")

    @property
    def folder(self) -> Path:
        """Where the run writes."""
        return self.run.folder or Path("runs") / self.name

    def fixed_threshold(self, method: Method) -> float:
        """The threshold of a method's seeds and of its ``fixed`` row.

        The preset's, unless ``seeds.threshold`` replaces it for the method of the seeds.
        """
        if method == self.seeds.method and self.seeds.threshold is not None:
            return self.seeds.threshold
        return self.lpcam.cam_threshold if method == "CAM" else self.lpcam.threshold


def bundled_recipes() -> list[str]:
    """Names of the recipes that ship with the package."""
    folder = resources.files("lpcam").joinpath("recipes")
    return sorted(
        f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml")
    )


def load_recipe(source: str | Path, overrides: Sequence[tuple[str, str]] = ()) -> Recipe:
    """Read a recipe file, or a bundled one by name, and replace values.

    A file with ``base: NAME`` has the values of that bundled recipe where it has none of its own.
    Relative paths in the file are taken from the file's own folder, those of the overrides from
    the working folder.

    Args:
        overrides: (dotted key, value as YAML text) pairs, e.g. ``("lpcam.tau", "0.25")``.

    Raises:
        RecipeError: naming the field, the value and what is allowed.
    """
    values, base = _read_values(source)
    for key, value in overrides:
        _replace(values, key, value)
    return parse_recipe(values, base=base, where=str(source))


def _read_values(source: str | Path) -> tuple[dict[str, Any], Path]:
    """Nested values of a recipe and those it is based on; the folder that paths are taken from."""
    path = Path(source)
    if path.is_file():
        try:
            text, base = path.read_text(encoding="utf-8"), path.parent
        except (UnicodeDecodeError, OSError) as error:
            raise RecipeError(f"the recipe {source} cannot be read as UTF-8: {error}") from None
    elif str(source) in bundled_recipes():
        resource = resources.files("lpcam").joinpath("recipes", f"{source}.yaml")
        text, base = resource.read_text(encoding="utf-8"), Path()
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
                f"the recipe {source} is based on {bundled!r}; a base is one of the bundled "
                f"recipes {', '.join(bundled_recipes())}"
            )
        values = _merged(_read_values(bundled)[0], values)
    return values, base


def _merged(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Nested values with some replaced; of a section that names a preset none are kept."""
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

    Raises:
        RecipeError: as :func:`load_recipe`.
    """
    version = values.get("version", VERSION)
    if isinstance(version, int) and version > VERSION:
        raise RecipeError(
            f"the recipe {where} has version {version}, this lpcam reads up to {VERSION}; "
            "upgrade lpcam, or write the recipe anew with 'lpcam init'"
        )
    try:
        return Recipe.model_validate(values, context={"base": base})
    except ValidationError as error:
        raise RecipeError(_explain(error, where)) from None


def _replace(values: dict[str, Any], key: str, text: str) -> None:
    parts = key.replace("-", "_").split(".")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"the value of --{key}, {text!r}, is not valid YAML: {error}") from None
    place = values
    for part in parts[:-1]:
        inner = place.get(part)
        if inner is None:
            inner = place[part] = {}
        if not isinstance(inner, dict):
            raise RecipeError(f"--{key}: {part!r} is a value, not a section")
        place = inner
    last = parts[-1]
    is_path = (
        key in ("data.root", "data.labels", "data.masks", "data.saliency", "run.folder")
        and value not in (None, "folders", "computed")
    ) or (
        key in ("classifier.weights", "host.weights", "segment.weights")
        and text.endswith(".safetensors")
        and ":" not in text
    )
    place[last] = str(Path(text).expanduser().absolute()) if is_path else value


def _explain(error: ValidationError, where: str) -> str:
    lines = [f"the recipe {where} has {error.error_count()} problem(s):"]
    for problem in error.errors():
        field = ".".join(str(part) for part in problem["loc"]) or "(recipe)"
        message = problem["msg"].removeprefix("Value error, ")
        given = problem.get("input")
        if problem["type"] == "extra_forbidden":
            message = f"unknown key; allowed here: {', '.join(_known_keys(problem['loc'][:-1]))}"
        elif problem["type"] == "missing":
            lines.append(f"  {field}: is required and missing")
            continue
        shown = "" if isinstance(given, dict) else f" = {given!r:.80}"
        lines.append(f"  {field}{shown}: {message}")
    return "\n".join(lines)


def describe_fields(
    model: type[BaseModel] = Recipe, prefix: str = ""
) -> list[tuple[str, str, str]]:
    """Every key of a recipe as (dotted key, type, what it means)."""
    rows: list[tuple[str, str, str]] = []
    for name, field in model.model_fields.items():
        key = f"{prefix}{field.alias or name}"
        kind = field.annotation
        section = _section(kind)
        if section is not None:
            rows += describe_fields(section, f"{key}.")
        else:
            rows.append((key, _kind(kind), " ".join((field.description or "").split())))
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


def _known_keys(location: tuple[int | str, ...]) -> list[str]:
    model: Any = Recipe
    for part in location:
        fields = {f.alias or name: f for name, f in model.model_fields.items()}
        model = _section(fields[str(part)].annotation)
    return [f.alias or name for name, f in model.model_fields.items()]
