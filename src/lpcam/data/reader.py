"""Interface of readers, which turn one kind of data set on disk into images with labels."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import (
    BaseModel,
    BeforeValidator,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from lpcam.data.dataset import Dataset
from lpcam.data.images import Reading
from lpcam.runtime.registry import Registry
from lpcam.runtime.settings import RecipePath, Section, against_base

ListName = Literal["classify", "prototypes", "maps", "evaluate", "segment", "test"]
"""Purpose of a list of a data set."""
TrueMask = Callable[[], tuple[NDArray[np.uint8] | None, tuple[str, ...]]]
"""Makes a true mask (H, W) that is no file, if it can, and says what is wrong with annotations."""


def _word_or_path(value: Any, info: ValidationInfo) -> Any:
    return value if value in ("folders", "computed") else against_base(value, info)


LabelSource = Annotated[Literal["folders"] | Path, BeforeValidator(_word_or_path)]
Saliency = Annotated[Literal["computed"] | Path, BeforeValidator(_word_or_path)]


class Lists(Section):
    """The list of the data set that each stage works on; null takes the reader's usual one."""

    classify: str | None = None
    """List that trains the classifier (voc: train_aug; folder, coco: all)."""
    validate_: str | None = Field(default=None, alias="validate")
    """List for the classifier's mAP; null holds out a random tenth of ``classify``."""
    prototypes: str | None = None
    """List whose features are clustered (voc: train; folder, coco: all)."""
    maps: str | None = None
    """List that gets maps and seed masks (voc: train; folder, coco: all)."""
    evaluate: str | None = None
    """List that is scored where masks exist; within ``maps`` (voc: train; folder, coco: all)."""
    segment: str | None = None
    """List that trains the segmenter; within ``maps`` (default: the list ``maps``)."""
    test: str | None = None
    """List that is segmented, and scored where masks exist (voc: val; folder, coco: all)."""


class DataSection(Section):
    """Where the images and labels are."""

    kind: str
    """Name of a reader. ``voc``: the PASCAL VOC layout. ``folder``: images with labels.csv,
    labels.jsonl, or a folder for each class. ``coco``: COCO annotations, a folder or a file.
    ``yolo``: YOLO's labels. ``label_studio``: Label Studio's JSON."""
    root: RecipePath
    """Folder (or JSON file) of the data set."""
    labels: LabelSource | None = None
    """File of image-level labels (.csv, .jsonl) instead of the usual source. ``folders`` (kind
    folder): each class has a folder."""
    separator: Annotated[str, Field(min_length=1)] | None = None
    """Text between the labels of an image; ``list``: a cell is a list of JSON or Python. Null:
    ``;``, and labels that may be several are refused."""
    no_class: tuple[str, ...] = ()
    """Labels that mean that an image shows no class, such as ``none`` or ``good``."""
    masks: RecipePath | None = None
    """Folder of true masks, ID.png, instead of the usual ones."""
    saliency: Saliency | None = None
    """Saliency maps for refine.method saliency: a folder of ID.png, 0 to 255; or ``computed``, by a
    method without a network (docs/hosts.md)."""
    selected: RecipePath | None = None
    """Table of the images that are clustered for each class (the released program's
    ``selected_100``), .npy (classes, n): indices into the list ``prototypes``. Null draws them."""
    negatives: RecipePath | None = None
    """Folder of images that show none of the classes, such as rails without a train. They train the
    classifier, measure prototypes and may reject them (lpcam.negatives). Null: none."""
    name: str | None = None
    """Name of the data set in the protocol of all scores; null takes the folder's name."""
    classes: tuple[str, ...] | None = None
    """Subset of the classes; mask ids of others are ignored. Null takes all."""
    range: tuple[float, float] | None = None
    """Values of images with more than 8 bits that become 0 and 255, the same for all images. Null
    measures them on a sample; the run's own recipe then has them."""
    orientation: Literal["upright", "stored"] | None = None
    """Which pixels masks fit where images have an EXIF orientation: the ``upright`` image, or the
    ``stored`` one, whose orientation is then ignored everywhere. Null: upright, unless doubtful."""
    palette: RecipePath | None = None
    """File with the colours of the classes, by which true masks are read (CVAT's labelmap.txt,
    class_dict.csv, or JSON {name: [red, green, blue]}). Null: masks hold the classes' numbers."""
    anyway: bool = False
    """Whether to run although the pixels looked at would ruin the run or its scores."""
    lists: Lists = Lists()

    @property
    def reader(self) -> Reader:
        return READERS[self.kind]

    @property
    def settings(self) -> Any:
        """Settings of the chosen reader; None if it has none."""
        return getattr(self, self.kind, None)

    @property
    def reading_of_images(self) -> Reading:
        """How the data set's images are read, and new ones of the same source."""
        return Reading(self.range, self.orientation)

    @field_validator("range")
    @classmethod
    def _ascending(cls, range: tuple[float, float] | None) -> tuple[float, float] | None:
        if range is not None and not -math.inf < range[0] < range[1] < math.inf:
            raise ValueError("must be two finite numbers, the lower one first")
        return range

    @field_validator("kind")
    @classmethod
    def _known(cls, kind: str) -> str:
        if kind not in READERS:
            raise ValueError(f"there is no such reader; there are {', '.join(READERS)}")
        return kind

    @model_validator(mode="after")
    def _check(self) -> DataSection:
        self.reader.check_options(self.kind, self.labels, self.separator, self.no_class)
        return self

    def list_of(self, stage: ListName) -> str:
        """Name of the list that a stage works on."""
        usual = self.list_of("maps") if stage == "segment" else self.reader.usual_lists[stage]
        return getattr(self.lists, stage) or usual


OPTIONS = ("labels", "separator", "no_class", "masks", "classes")
"""Values of a `DataSection` that a reader gets as they are."""


@dataclass(frozen=True)
class Request:
    """Arguments of a reader."""

    root: Path
    lists: Sequence[str] | None = None  #: Lists that are read; None: all.
    unlabelled: frozenset[str] = frozenset()  #: Lists whose images need no labels.
    labels: Path | Literal["folders"] | None = None  #: A source of labels instead of the usual one.
    separator: str | None = None  #: What separates labels; None: ``;``.
    no_class: Sequence[str] = ()  #: Labels that mean that an image shows no class.
    masks: Path | None = None  #: A folder of true masks, ID.png, instead of the usual ones.
    classes: Sequence[str] | None = None  #: The classes to choose; None: all.
    settings: Any = None  #: An instance of the reader's settings; None: the usual ones.


@dataclass(frozen=True)
class Opened:
    """A data set, and the true masks that are not files yet."""

    dataset: Dataset
    true_masks: Mapping[str, TrueMask] = field(default_factory=dict)  #: By image id.
    paint: Callable[[Path, Iterable[str], int], Dataset] | None = None
    """Writes true masks of images into a folder with some threads; None: nothing to paint."""


class Reader(ABC):
    """Reads one kind of data set; :data:`READERS` are asked in order if they recognise a path."""

    means: ClassVar[str]  #: Description of the kind, for the comments of a new recipe.
    usual_lists: ClassVar[Mapping[ListName, str]] = dict.fromkeys(
        ("classify", "prototypes", "maps", "evaluate", "test"), "all"
    )
    """The lists of stages for which a recipe names none."""
    chooses_lists: ClassVar[bool] = True  #: Whether a caller may choose the lists to read.
    settings: ClassVar[type[BaseModel] | None] = None  #: Class of its settings, if it has any.

    takes: ClassVar[Collection[str]] = ("no_class",)
    """Options that it uses: ``labels`` (a table), ``folders``, ``separator``, ``no_class``."""
    how_to_label: ClassVar[str] = "label some"  #: Advice where no image has a label.

    def check_options(
        self, kind: str, labels: Path | str | None, separator: str | None, no_class: Sequence[str]
    ) -> None:
        """Refuse options that the reader does not use; ValueError names the kinds that do."""
        given: dict[str, object] = {"separator": separator, "no_class": [*no_class]}
        given["folders" if isinstance(labels, str) else "labels"] = labels
        for option in (option for option, value in given.items() if value):
            if option not in self.takes:
                kinds = ", ".join(name for name, one in READERS.items() if option in one.takes)
                what = f"{option.replace('folders', 'labels')} {str(given[option])!r}"
                text = f"does not belong to the kind {kind}, but to {kinds}; leave it out"
                raise ValueError(f"{what} {text}")

    @abstractmethod
    def recognises(self, path: Path) -> bool:
        """Tell whether a path looks like this kind."""

    @abstractmethod
    def open(self, request: Request) -> Opened:
        """Read labels and lists, not images; DataError if they do not fit together."""


READERS: Registry[Reader] = Registry(
    "reader",
    "lpcam.readers",
    {
        "folder": "lpcam.data.folder:READER",
        "voc": "lpcam.data.voc:READER",
        "label_studio": "lpcam.data.label_studio:READER",
        "coco": "lpcam.data.coco.dataset:READER",
        "yolo": "lpcam.data.yolo:READER",
    },
)
