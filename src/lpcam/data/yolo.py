"""YOLO's labels: a text file for each image, a line for each object, as a box or an outline."""

from __future__ import annotations

import math
import re
from array import array
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Annotated

import numpy as np
import yaml
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from pydantic import AfterValidator, BaseModel, NonNegativeInt, ValidationError

from lpcam.data.coco.dataset import open_annotated
from lpcam.data.coco.files import ALL
from lpcam.data.coco.index import CocoAnnotation, CocoFile, fault_of
from lpcam.data.coco.painting import fill
from lpcam.data.dataset import Skip
from lpcam.data.image_files import list_images
from lpcam.data.images import IMAGE_SUFFIXES
from lpcam.data.labels import normal_name, read_names, read_text, relative_name
from lpcam.data.reader import Opened, Reader, Request
from lpcam.runtime.errors import DataError, shortened
from lpcam.runtime.files import digest_json

WITHIN_PIXEL = 0.45
"""Where in a pixel `lpcam.formats.masks.yolo` puts a point. The middle is 0.5; with a little less,
readers that round find the same pixel as those that cut the fraction off."""
_LISTS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
_USUAL = ("data.yaml", "dataset.yaml")
_NAMES = ("classes.txt", "labels/classes.txt", "*.names", "*/*.names", "*/_darknet.labels")
_LABELS = (
    *("labels/**/*.txt", "train/labels/*.txt", "obj*_data/**/*.txt", "*/obj*/*.txt"),
    *("*.txt", "train/*.txt"),  # beside images
)
_DOUBTFUL = {
    5: "objects with a sixth number, as predictions have; their classes are labels all the same",
    8: "outlines that have four corners each, painted as such; they may be oriented boxes",
}
_NUMBER = re.compile(r"-?\d*\.?\d+(e[+-]?\d+)?")


class _Contents(BaseModel, coerce_numbers_to_str=True):
    """What describes a data set: classes, and the folders and files of each list."""

    path: Path
    names: dict[NonNegativeInt, Annotated[str, AfterValidator(normal_name)]]
    lists: dict[str, list[str]] = {}
    places: tuple[Path, ...] = ()  #: Folders in which those of the lists are searched.
    kpt_shape: tuple[int, ...] | None = None


def _description(path: Path) -> _Contents | None:
    """The contents of Ultralytics' data.yaml; None for any other YAML file."""
    try:
        content = yaml.safe_load(read_text(path, "It names classes and folders."))
    except (DataError, yaml.YAMLError) as error:
        if path.name not in _USUAL:
            return None
        raise DataError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    keys = content.keys() if isinstance(content, dict) else set()
    if not keys & {"names", "nc"} or not keys & _LISTS.keys():
        return None
    names = content.get("names") or {}
    lists = {_LISTS[k]: content[k] for k in _LISTS if content.get(k)}
    try:
        found = _Contents(
            path=path,
            names=dict(enumerate(names)) if isinstance(names, list) else names,
            lists={k: v if isinstance(v, list) else [v] for k, v in lists.items()},
            places=(path.parent / str(content.get("path") or "."), path.parent),
            kpt_shape=content.get("kpt_shape"),
        )
    except ValidationError as error:
        raise DataError(
            f"{path}: {fault_of(error)} (a name is text, in quotes if it is yes, no or null)"
        ) from error
    if not names or str(content.get("nc", len(names))) != str(len(names)):
        raise DataError(f"{path} has {len(names)} names, and nc {content.get('nc')}; correct names")
    return found


def _describe(root: Path) -> _Contents:
    """Find what describes a data set; DataError if nothing does, or several files do."""
    files = [root] if root.is_file() else sorted(root.glob("*.y*ml"))
    found = {path.name: one for path in files if (one := _description(path))}
    if usual := [found[name] for name in _USUAL if name in found] or [*found.values()]:
        if len(usual) > 1:
            raise DataError(f"{root} has several descriptions ({', '.join(found)}); give one")
        return usual[0]
    if (above := root.parent / _USUAL[0]).is_file() and (one := _description(above)):
        return one.model_copy(update={"lists": {}})  # Roboflow's lists are folders
    for path in (path for pattern in _NAMES for path in sorted(root.glob(pattern))):
        places = (root, path.parent)
        lists = {v: [f"{k}.txt"] for k, v in _LISTS.items() if _find(f"{k}.txt", places)}
        names = dict(enumerate(read_names(path, way="name it in a data.yaml")))
        return _Contents(path=path, names=names, lists=lists, places=places)
    how = f"write {root / 'classes.txt'}, one name a line from class 0 on, or give the data.yaml"
    raise DataError(f"{root} has YOLO's labels, but nothing names the classes; {how}")


def _find(text: str, places: Sequence[Path]) -> Path | None:
    """The file or folder of a path that may have been written on another machine."""
    parts = PurePosixPath(relative_name(text)).parts
    inside = next((n for n, part in enumerate(parts) if part != ".."), 0)
    tries = (p.joinpath(*parts[n:]) for n in (inside, 0, *range(1, len(parts))) for p in places)
    return next((path for path in tries if path.exists()), None)


def _files(path: Path, places: Sequence[Path], skipped: list[Skip]) -> Iterator[Path]:
    if path.is_dir():
        found = list_images(path)
        skipped += found.unread
        yield from (image for _, image in found.images)
        return
    for line in filter(None, map(str.strip, read_text(path, "Write a path a line.").splitlines())):
        if image := _find(line, (path.parent, *places)):
            yield image
        else:
            skipped.append(Skip(line, f"{path.name} names it, and it is not there"))


def _images(
    contents: _Contents, root: Path, skipped: list[Skip], notes: Mapping[str, list[str]]
) -> dict[str, list[Path]]:
    lists: dict[str, list[Path]] = {}
    sources: dict[Path, str] = {}
    for name, text in ((name, text) for name, texts in contents.lists.items() for text in texts):
        path = _find(text, contents.places)
        if path is not None and sources.setdefault(path, text) == text:
            lists.setdefault(name, []).extend(_files(path, contents.places, skipped))
        elif path is None and name != "train":
            notes[f"lists of {contents.path.name} that are not there"].append(f"{name}: {text}")
        else:
            fault = f"as is {sources[path]!r}: {path}" if path else "which is not there"
            raise DataError(f"{contents.path}: {name} is {text!r}, {fault}; correct it, or 'path'")
    if not contents.lists:
        folder = root / "images" if (root / "images").is_dir() else root
        lists[ALL] = [*_files(folder, (), skipped)]
        for path in lists[ALL]:
            if (name := path.relative_to(folder).parts[0]) in _LISTS:
                lists.setdefault(_LISTS[name], []).append(path)
    return lists


def _label_file(image: Path) -> Path:
    """The labels of an image: in ``labels`` for the last ``images`` of its path, or beside it."""
    head, found, tail = image.absolute().as_posix().rpartition("/images/")
    other, beside = (Path(p).with_suffix(".txt") for p in (f"{head}/labels/{tail}", image))
    return other if found and (other.is_file() or not beside.is_file()) else beside


def _objects(
    path: Path, text: str, contents: _Contents, notes: Mapping[str, list[str]]
) -> Iterator[CocoAnnotation]:
    """The objects of a file of labels; DataError names the line that is wrong."""
    for number, line in enumerate(text.splitlines(), start=1):
        where = f"{path} line {number}"
        if not (cells := line.split()):
            continue
        try:
            label, *values = map(float, cells)
        except ValueError as error:
            raise DataError(f"{where}: {error}; expected numbers alone") from error
        is_box = len(values) in (4, 5, 4 + math.prod(contents.kpt_shape or (0,)))
        if not is_box and (len(values) < 6 or len(values) % 2):
            raise DataError(
                f"{where} has {len(cells)} numbers; expected the class with x, y, width and height "
                "of a box, or the points of an outline (key points need kpt_shape in data.yaml)"
            )
        if label not in contents.names:
            known = shortened([f"{n} {name}" for n, name in contents.names.items()])
            raise DataError(f"{where}: class {label:g} has no name; {contents.path} names {known}")
        if wrong := [v for v in values[: 4 if is_box else None] if not -0.01 <= v <= 1.01]:
            how = "divide pixels by the image's width (x) or height (y)"
            raise DataError(f"{where}: {wrong[0]:g} is outside 0 to 1; {how}")
        if len(values) in _DOUBTFUL:
            notes[_DOUBTFUL[len(values)]].append(where)
        shape = None if is_box else partial(_draw, np.reshape(values, (-1, 2)))
        yield CocoAnnotation(number, 0, int(label), False, None, shape)


def _draw(points: NDArray[np.float64], size: tuple[int, int]) -> NDArray[np.bool_]:
    """Fill an outline (K, 2) of points x, y in shares of the width and height: bool of ``size``.

    An outline is an area. Those of this package and of OpenCV (supervision, Ultralytics' converter)
    name their outermost pixels instead: all points are at one place in their pixels, OpenCV's at
    whole numbers, counter-clockwise.
    """
    corners = points * size[::-1]
    (x, y), (x2, y2) = corners.T, np.roll(corners, -1, axis=0).T
    tolerance = max(0.02, 1e-5 * max(size))  # tools write 5 digits or more
    off = [np.abs((corners - at + 0.5) % 1 - 0.5).max() for at in (WITHIN_PIXEL, 0)]
    if off[0] >= tolerance and (off[1] >= tolerance or (x * y2 - x2 * y).sum() > 0):
        return fill([array("d", corners.ravel())], size)
    pixels = [(x, y) for x, y in np.floor(corners + tolerance).astype(int).tolist()]
    image = Image.new("1", size[::-1])
    ImageDraw.Draw(image).polygon(pixels, fill=1)
    ImageDraw.Draw(image).line([*pixels, pixels[0]], fill=1)
    return np.array(image)


def _is_labels(path: Path) -> bool:
    """Tell if a text file holds labels: it begins with an object and stands where labels do."""
    with path.open("rb") as file:
        cells = file.readline(10_000).decode("utf-8-sig", "replace").split()
    if len(cells) < 5 or not all(map(_NUMBER.fullmatch, cells)):
        return False
    stems = (p.stem for p in path.parent.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
    return "labels" in path.parts[-3:] or path.stem in stems


class YoloReader(Reader):
    """YOLO's labels, of boxes or of outlines."""

    means = "YOLO's labels; masks are painted from outlines and serve scoring"

    def recognises(self, path: Path) -> bool:
        """Whether it is a data.yaml, or a folder with one or with labels of images."""
        if path.is_file():
            return path.suffix in (".yaml", ".yml") and _description(path) is not None
        if all((path / name).exists() for name in ("classes.txt", "images", "labels")):
            return True  # Label Studio's export, also of images without objects
        found = (one for pattern in _LABELS for one in islice(path.glob(pattern), 100))
        return any(map(_description, path.glob("*.y*ml"))) or any(map(_is_labels, found))

    def open(self, request: Request) -> Opened:
        """Read labels and outlines; masks can be painted from the outlines."""
        contents = _describe(request.root)
        skipped: list[Skip] = []
        notes = defaultdict[str, list[str]](list)
        lists = _images(contents, request.root, skipped, notes)
        files = {path: _label_file(path) for paths in lists.values() for path in paths}
        texts = {file: read_text(file, "") for file in files.values() if file.is_file()}
        missing = [str(file) for file in files.values() if file not in texts]
        if files and not texts:
            raise DataError(f"none of the {len(files)} images has labels: there is no {missing[0]}")
        images = {
            path: [*_objects(file, texts.get(file, ""), contents, notes)]
            for path, file in files.items()
        }
        outlines = sum(one.segmentation is not None for of in images.values() for one in of)
        if len(notes[_DOUBTFUL[8]]) < outlines:  # among others they are usual
            del notes[_DOUBTFUL[8]]
        folders = {file.parent for file in files.values() if "labels" in file.parts}
        unused = {one for folder in folders for one in folder.glob("*.txt")} - texts.keys()
        names = sorted(one.name for one in unused if one.name != "classes.txt")
        notes["images without a file of labels, which count as images of no class"] = missing
        notes["files of labels whose image is missing or in no list"] = names
        digest = digest_json([*texts.values()])
        return open_annotated(
            request,
            CocoFile(contents.path, digest, (), tuple(sorted(contents.names.items()))),
            images,
            lists,
            label_source=f"YOLO labels ({contents.path.name})",
            skipped=skipped,
            notes=notes,
        )


READER = YoloReader()
