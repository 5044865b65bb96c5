"""Label Studio's JSON: labels of images, and masks from their regions."""

from __future__ import annotations

import base64
import re
from array import array
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from itertools import combinations
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lpcam.data.coco.dataset import open_annotated
from lpcam.data.coco.files import ALL, find_image, listing_of, name_parts
from lpcam.data.coco.index import CocoAnnotation, CocoFile, parse_json
from lpcam.data.coco.painting import fill, paint
from lpcam.data.dataset import Skip
from lpcam.data.image_files import FolderFiles, list_images
from lpcam.data.images import IMAGE_SUFFIXES, load_values
from lpcam.data.labels import normal_name
from lpcam.data.reader import Opened, Reader, Request
from lpcam.runtime.errors import DataError, shortened
from lpcam.runtime.files import digest_file, digest_json
from lpcam.runtime.settings import Section

_LIST = re.compile(rb"(\xef\xbb\xbf)?\s*\[\s*\{")
_MARKS = re.compile(rb'"(completions|annotation_id|was_cancelled|\w+labels)"\s*:|"data"\s*:\s*\{')
_HEAD = 1_000_000  # bytes of a file that are searched for these
_MASKS = "task-*-annotation-*-by-*"  # files of the export of brush strokes as PNG or NumPy
_KINDS = re.compile(r"choices|taxonomy|\w*labels")
_PREFIX = re.compile(r"[0-9a-f]{8}-")  # of a file that was uploaded
_NO_IMAGE = "its data names no image"
_HOW = "export the project as JSON from Label Studio"
_Shape = Callable[[tuple[int, int]], NDArray[np.bool_]]


class _Result(NamedTuple):
    """A label that an annotation gives: of a region, or of the image."""

    tag: str
    name: str
    shape: _Shape | None
    is_region: bool


_Found = tuple[list[_Result], tuple[int, int] | None]  # of an annotation, with the image's size


class LabelStudioSection(Section):
    """Which annotations of Label Studio count."""

    several: Literal["refuse", "last", "union"] = "refuse"
    """Annotations of an image that have different labels: refused; the last counts; or all."""


def _unpack(values: Sequence[int], size: tuple[int, int]) -> NDArray[np.bool_]:
    """The pixels of a brush, in the packing that `lpcam.formats.masks.label_studio` describes."""
    bits = np.unpackbits(np.asarray(values, np.uint8))
    text, at = (bits + ord("0")).tobytes().decode(), 0

    def take(count: int) -> int:
        nonlocal at
        at += count
        return int(text[at - count : at], 2)

    total, word, sizes = take(32), take(5) + 1, [take(4) + 1 for _ in range(4)]
    if (total, word) != (size[0] * size[1] * 4, 8):
        raise ValueError(f"its brush has {total:,} values of {word} bits, not 4 of 8 for a pixel")
    parts, found = [], 0
    while found < total:
        run, length = take(1), take(sizes[take(2)]) + 1
        parts.append(np.full(length, take(word) if run else 0, np.uint8))
        if not run:
            parts[-1] = np.packbits(bits[at : at + length * word])
            at += length * word
        found += length
    return np.asarray(np.concatenate(parts).reshape(*size, 4)[:, :, 3] > 0)


def _ellipse(value: Mapping[str, Any], size: tuple[int, int]) -> NDArray[np.bool_]:
    """The pixels of an ellipse: middle and radii in percent, turned clockwise by degrees."""
    x, y, a, b = (float(value[key]) / 100 for key in ("x", "y", "radiusX", "radiusY"))
    angle, turn = np.linspace(0, 2 * np.pi, 180), np.deg2rad(float(value.get("rotation") or 0))
    points = np.stack([a * size[1] * np.cos(angle), b * size[0] * np.sin(angle)], axis=1)
    points = points @ [[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]]
    return fill([array("d", np.add(points, [x * size[1], y * size[0]]).ravel())], size)


def _shape(value: Mapping[str, Any]) -> _Shape | None:
    """The function that fills a region; None for regions that outline no object."""
    if "rle" in value:
        return partial(_unpack, value["rle"])
    if "radiusX" in value:
        return partial(_ellipse, value)
    if "imageDataURL" in value:
        data = base64.b64decode(value["imageDataURL"].partition(",")[2])
        return lambda size: np.array(load_values(data, "bit mask")[0].convert("RGBA"))[:, :, 3] > 0
    if len(value.get("points") or ()) > 2 and value.get("closed", True):
        points = np.array(value["points"], float).reshape(-1, 2) / 100
        return lambda size: fill([array("d", (points * size[::-1]).ravel())], size)
    return None


def _results(results: Sequence[Any], where: str, notes: dict[str, list[str]]) -> _Found:
    """The labels that an annotation gives, and the size of its image, if it says so."""
    found: list[_Result] = []
    size = None
    bare, named = set[str](), set[str]()
    for one in results:
        value = one.get("value") or {}
        key = next(filter(_KINDS.fullmatch, value), None)
        is_region = not {"x", "points", "rle", "imageDataURL", "vertices"}.isdisjoint(value)
        (named if value.get(key) else bare if is_region else set()).add(str(one.get("id")))
        if key is None or (is_region and key in ("choices", "taxonomy")):
            continue  # a relation, a text, or a property of a region
        shape = _shape(value)
        if shape is not None and one.get("image_rotation"):
            raise ValueError(f"its image was turned by {one['image_rotation']} degrees")
        if shape is not None and one.get("original_width"):
            size = (int(one["original_height"]), int(one["original_width"]))
        names = [normal_name(n[-1] if isinstance(n, list) else n) for n in value[key]]
        shape = shape if len(names) == 1 else None  # of several labels none is that of its pixels
        found += [_Result(str(one.get("from_name")), n, shape, is_region) for n in names]
    if bare - named:
        notes["annotations with regions without a label, which give none"].append(where)
    filled = {one.name for one in found if one.shape}
    return [one for one in found if one.is_region or one.name not in filled], size


def _annotations(task: Mapping[str, Any], predictions: bool) -> list[Sequence[Any]]:
    """The results of each annotation of a task that counts; DataError says why none does."""
    given = task.get("predictions" if predictions else "annotations", task.get("completions")) or []
    kept = [one for one in given if not (one.get("was_cancelled") or one.get("skipped"))]
    kept = [one for one in kept if one.get("ground_truth")] or kept
    if not kept:
        raise DataError("its annotation was cancelled" if given else "it has no annotation yet")
    return [one.get("result") or [] for one in kept]


def _plain(name: str) -> str:
    """A file name as Label Studio stores it."""
    return re.sub(r"[^\w.-]", "", normal_name(name).replace(" ", "_"))


def _find(
    task: Mapping[str, Any], places: Sequence[Path], listing: Callable[[Path], Mapping[str, str]]
) -> Path:
    """The image of a task; DataError says why there is none."""
    texts = [v for v in task["data"].values() if isinstance(v, str) and not v.startswith("data:")]
    texts = [v for v in texts if Path(*name_parts(v)).suffix.lower() in IMAGE_SUFFIXES]
    found = set[Path]()
    for text in filter(None, [*texts, task.get("file_upload")]):
        *folders, name = name_parts(text)
        for stored in (name, _PREFIX.sub("", name, count=1)):
            # ``..``: below any of the places
            image, _ = find_image(places, "/".join(["..", *folders, _plain(stored)]), listing)
            if image is not None:
                found.add(image)
                break
    if len(found) > 1:
        raise DataError(f"its image may be any of {', '.join(map(str, sorted(found)))}")
    if not found:
        raise DataError(f"there is no file of its image {texts[0]!r}" if texts else _NO_IMAGE)
    return found.pop()


def image_finder(folder: Path) -> tuple[Callable[[Mapping[str, Any]], Path], FolderFiles]:
    """A function that finds the image of a task below a folder, and the files of the folder.

    It opens nothing, whatever a task names; DataError if there is no such image, or several.
    """
    files = list_images(folder)
    inside = {p for _, file in files.images for p in file.relative_to(folder).parents}
    places = [folder / one for one in sorted(inside)]

    @cache
    def listing(place: Path) -> dict[str, str]:
        return {_plain(name): stored for name, stored in listing_of(place).items()}

    return lambda task: _find(task, places, listing), files


def given_names(results: Sequence[Any]) -> set[str]:
    """The labels of an annotation, of regions and of the image."""
    return {one.name for one in _results(results, "", defaultdict(list))[0]}


def painted(
    results: Sequence[Any], size: tuple[int, int], values: Mapping[Any, int]
) -> NDArray[np.uint8]:
    """The mask (H, W) of an annotation; DataError if a label has no outline, or no value."""
    found, _ = _results(results, "", defaultdict(list))
    if others := {one.name for one in found if one.shape is None or one.name not in values}:
        raise DataError(
            f"{', '.join(sorted(others))}: no outline, or no class of the run; draw each object "
            f"with a brush or a polygon that has one of the labels {', '.join(values)}"
        )
    regions = [CocoAnnotation(0, 0, one.name, False, None, one.shape) for one in found]
    return paint(regions, size, values)


def _by_image(
    path: Path, tasks: Sequence[dict[str, Any]], skipped: list[Skip], notes: dict[str, list[str]]
) -> dict[Path, list[_Found]]:
    """What each annotation of an image says; tasks without one or without an image are skipped."""
    find, files = image_finder(path.parent)
    skipped += files.unread
    options = defaultdict[Path, list[_Found]](list)
    predicted = not any(task.get("annotations") or task.get("completions") for task in tasks)
    for number, task in enumerate(tasks, start=1):
        name = f"task {task.get('id', number)}"
        try:
            image, given = find(task), _annotations(task, predicted)
            options[image] += [_results(one, name, notes) for one in given]
        except DataError as error:
            skipped.append(Skip(name, str(error)))
            continue
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path}: {name} cannot be read: {error!r}; correct it") from error
        if predicted:
            notes["predictions, which nobody has corrected, are the labels of images"].append(name)
    return options


class LabelStudioReader(Reader):
    """Label Studio's JSON."""

    means = "annotations of Label Studio; masks are painted from regions and serve scoring"
    settings = LabelStudioSection

    def recognises(self, path: Path) -> bool:
        """Whether it is a list of tasks, or a folder with one or with exported brush masks."""
        if path.is_dir():
            return any(map(self.recognises, path.glob("*.json"))) or any(path.glob(_MASKS))
        if path.suffix.lower() != ".json" or not path.is_file():
            return False
        with path.open("rb") as file:
            start = file.read(100)
            return bool(_LIST.match(start) and _MARKS.search(start + file.read(_HEAD)))

    def open(self, request: Request) -> Opened:
        """Read labels and regions; masks can be painted from the regions."""
        root = request.root
        files = sorted(filter(self.recognises, root.glob("*.json"))) if root.is_dir() else [root]
        if len(files) != 1:
            names = shortened([path.name for path in files]) or "only masks, which name no images"
            raise DataError(f"{root} must have one export ({names}); give one file, or {_HOW}")
        (path,) = files
        tasks = parse_json(path, _HOW)
        if not isinstance(tasks, list) or not all("data" in task for task in tasks):
            raise DataError(f"{path} is not a list of tasks with data, as JSON-MIN; {_HOW}")
        several = (request.settings or LabelStudioSection()).several
        skipped: list[Skip] = []
        notes = defaultdict[str, list[str]](list)
        options = _by_image(path, tasks, skipped, notes)
        tags = defaultdict[str, set[str]](set)
        kept: dict[Path, list[_Result]] = {}
        for image, given in options.items():
            labels = {tuple(sorted({one.name for one in found})) for found, _ in given}
            if len(labels) > 1 and several == "refuse":
                texts = "; ".join(", ".join(one) or "none" for one in sorted(labels))
                how = "mark one as ground truth, or give --several last or --several union"
                raise DataError(f"{path}: annotations of {image.name} differ ({texts}); {how}")
            if len(given) > 1:
                notes["images with several annotations"].append(image.name)
            kept[image] = [r for of, _ in (given if several == "union" else given[-1:]) for r in of]
            for one in kept[image]:
                tags[one.tag].add(one.name)
        apart = any(a.isdisjoint(b) for a, b in combinations(tags.values(), 2))
        if request.classes is None and apart:
            texts = "; ".join(f"{tag}: {shortened(sorted(of))}" for tag, of in tags.items())
            raise DataError(f"{path}: several tags give labels ({texts}); choose with --classes")
        numbers = {name: n for n, name in enumerate(sorted(set().union(*tags.values())))}
        annotations = {
            image: [
                CocoAnnotation(number, 0, numbers[one.name], False, None, one.shape)
                for number, one in enumerate(found, start=1)
                if one.is_region or one.name in (request.classes or numbers)
            ]
            for image, found in kept.items()
        }
        digest = digest_json([digest_file(path), several])
        return open_annotated(
            request,
            CocoFile(path, digest, (), tuple((n, name) for name, n in numbers.items())),
            annotations,
            {ALL: list(annotations)},
            sizes={image: size for image, of in options.items() for _, size in of},
            label_source=f"Label Studio ({path.name})",
            skipped=skipped,
            notes=notes,
        )


READER = LabelStudioReader()
