"""Annotation files laid out like COCO's ``instances_*.json``, in compact form.

Outlines become arrays while the file is parsed: as Python numbers, COCO's would take 2 GiB.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import (
    AliasChoices,
    BaseModel,
    BeforeValidator,
    Field,
    NonNegativeInt,
    ValidationError,
)

from lpcam.data.coco.files import name_parts
from lpcam.data.image_files import other_format
from lpcam.data.labels import normal_name, read_text
from lpcam.runtime.errors import DataError, shortened
from lpcam.runtime.files import digest_file

_HOW = (
    "an annotation file has 'images' with id, file_name, height and width, 'annotations' with id, "
    "image_id, category_id, iscrowd and segmentation, and 'categories' with id and name"
)
_OTHER = {
    "segments_info": "these are panoptic annotations; convert them to instances with panopticapi's "
    "panoptic2detection_coco_format.py",
    "caption": "these are captions, which name no class; give instances_*.json",
}
_FLAGS = {"0": False, "0.0": False, "false": False, "1": True, "1.0": True, "true": True}


def _as_id(value: Any) -> int | str:
    """An id as a number if it is one, also as 1.0 or "1", else as text."""
    if isinstance(value, str) and value.strip():
        text = value.strip()
        return int(text) if text.isdecimal() and str(int(text)) == text else text
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value // 1:
        raise ValueError("an id must be an integer or text")
    return int(value)


Id = Annotated[int | str, BeforeValidator(_as_id)]
_Text = Annotated[str, Field(pattern=r"\S")]


class CocoAnnotation(NamedTuple):
    """One annotation, without its box."""

    id: Any  #: As in the file, for messages.
    image_id: int | str
    category_id: int | str
    is_crowd: bool  #: Whether it is a group of objects.
    area: Any  #: Area in square pixels, as the file states it.
    segmentation: Any  #: As :func:`compact` makes it, or a function of the size: the pixels.


class CocoImage(NamedTuple):
    """An image of an annotation file, with its annotations in the order of the file."""

    file_name: str
    size: tuple[int, int] | None  #: Height and width in pixels; None: the upright image's.
    annotations: list[CocoAnnotation]

    @property
    def outlined(self) -> bool:
        """Whether every object has an outline, as a true mask needs; some files have only boxes."""
        return all(one.segmentation or one.is_crowd for one in self.annotations)


class _Image(BaseModel):
    id: Id
    # LVIS has addresses alone
    file_name: _Text = Field(validation_alias=AliasChoices("file_name", "path", "coco_url"))
    height: NonNegativeInt | None = None
    width: NonNegativeInt | None = None

    @property
    def size(self) -> tuple[int, int] | None:
        return (self.height, self.width) if self.height and self.width else None


class _Category(BaseModel, coerce_numbers_to_str=True):
    id: Id
    name: _Text
    supercategory: Any = None


class _Content(BaseModel):
    images: Annotated[list[_Image], Field(min_length=1)]
    annotations: list[Any]
    categories: Annotated[list[_Category], Field(min_length=1)]


@dataclass(frozen=True, eq=False)
class CocoFile:
    """The contents of an annotation file: images and categories in ascending order of their ids."""

    path: Path
    digest: str
    images: tuple[CocoImage, ...]
    categories: tuple[tuple[int | str, str], ...]  #: Ids and names.
    notices: tuple[str, ...] = ()  #: What was read in a way that the user should know.

    @classmethod
    def read(cls, path: Path, *, crowds_are_objects: bool = False) -> CocoFile:
        """Read an annotation file; DataError names what is missing, wrong, double or unknown."""
        try:
            found = _Content.model_validate(_parse(path))
        except ValidationError as error:
            raise DataError(f"{path}: {fault_of(error)}; {_HOW}") from error
        images, twice = _images(path, found.images)
        classes, several = _classes(path, found.categories)
        for place, one in enumerate(found.annotations):
            if type(one) is not CocoAnnotation:
                raise DataError(f"{path}: annotation {place} has no image_id: {one!r:.80}; {_HOW}")
            try:
                image, category = images[one.image_id], classes[one.category_id]
            except (KeyError, TypeError):
                where = f"{path}: annotation {one.id}"
                image = _find(images, one.image_id, f"{where}: image_id")
                category = _find(classes, one.category_id, f"{where}: category_id")
            if category == one.category_id and one.is_crowd is False:
                image.annotations.append(one)
                continue
            if (flag := _FLAGS.get(str(one.is_crowd).lower())) is None:
                raise DataError(
                    f"{path}: annotation {one.id}: iscrowd {one.is_crowd!r} is not 0 or 1"
                )
            crowd = flag and not crowds_are_objects
            image.annotations.append(one._replace(category_id=category, is_crowd=crowd))
        unique = [*{id(image): image for image in images.values()}.values()]
        names = {classes[one.id]: normal_name(one.name) for one in found.categories}
        # Roboflow's entry for the project is the parent of all others, and annotates nothing
        used = {one.category_id for image in unique for one in image.annotations}
        parents = {one.id: one.supercategory for one in found.categories}
        roots = [
            names.pop(n)
            for n in {*names} - used
            if {parent for m, parent in parents.items() if m != n} == {names[n]}
        ]
        notices = {
            "annotations of one file are united": twice,
            "categories with several ids, which are one class": several,
            "the category that is the parent of the others is no class": roots,
        }
        told = (f"{text}: {shortened(of)}" for text, of in notices.items() if of)
        known = tuple(sorted(names.items(), key=_ascending))
        return cls(path, digest_file(path), tuple(unique), known, tuple(told))


def fault_of(error: ValidationError) -> str:
    """The first fault that a model found in a file."""
    first = error.errors(include_url=False)[0]
    given = "" if first["type"] == "missing" else f", got {first['input']!r:.80}"
    return f"{' '.join(map(str, first['loc']))!r} is wrong: {first['msg']}{given}"


def parse_json(path: Path, how: str, hook: Callable[[dict[str, Any]], Any] | None = None) -> Any:
    """The JSON value of a file; DataError with ``how`` to write it if it is none."""
    try:
        return json.loads(read_text(path, how), object_hook=hook)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read as JSON: {error}; write it again; {how}") from error


def _parse(path: Path) -> Any:
    """The JSON value of a file; DataError if it is none, or of another format."""
    if path.suffix.lower() == ".gz":
        raise DataError(f"{path} is compressed; unpack it with gunzip")
    content = parse_json(path, _HOW, _compact_annotation)
    found = content if isinstance(content, dict) else {}
    first = next(iter(found.get("annotations") or ()), None)
    if isinstance(content, list) and content and isinstance(content[0], CocoAnnotation):
        what = "these are results, a list of detections; give the annotations"
    elif "images" not in found:
        what = other_format(path)
        if not what and isinstance(content, list):
            what = "it is a list, not a dictionary (lists of Label Studio: --kind label_studio)"
    elif "annotations" not in found:
        what = "it has no 'annotations', as image_info files; give one with annotations"
    else:
        kinds = (w for key, w in _OTHER.items() if isinstance(first, dict) and key in first)
        what = next(kinds, "")
    if what:
        raise DataError(f"{path}: {what}")
    return content


def _images(path: Path, entries: Iterable[_Image]) -> tuple[dict[Any, CocoImage], list[str]]:
    """Images by id, in ascending order, a file that is listed twice as one; and these files."""
    images: dict[Any, CocoImage] = {}
    first: dict[tuple[str, ...], tuple[int | str, CocoImage]] = {}
    twice = []
    for one in sorted(entries, key=lambda one: _ascending((one.id, one))):
        entry = (one.id, CocoImage(one.file_name, one.size, []))
        number, image = first.setdefault(name_parts(one.file_name), entry)
        text = f"{one.file_name!r} is listed twice (ids {number} and {one.id})"
        if images.setdefault(one.id, image) is not image:
            raise DataError(
                f"{path}: two images have the id {one.id!r}, {images[one.id].file_name!r} and "
                f"{one.file_name!r}, so that annotations of either are unknown; number them anew"
            )
        if image.size != one.size:
            raise DataError(f"{path}: {text}, as {image.size} and {one.size}; remove the wrong one")
        twice += [text] * (number != one.id)
    return images, twice


def _classes(path: Path, entries: Iterable[_Category]) -> tuple[dict[Any, int | str], list[str]]:
    """The class of each category, which is the first of its name; and names with several ids."""
    classes: dict[Any, int | str] = {}
    first: dict[str, _Category] = {}
    several = []
    for one in entries:
        other = first.setdefault(normal_name(one.name), one)
        if one.id in classes or other.supercategory != one.supercategory:
            both = ", ".join(f"{x.name} ({x.id}, {x.supercategory})" for x in (other, one))
            raise DataError(f"{path}: categories repeat: {both}; give each one name and one id")
        classes[one.id] = other.id
        if other is not one:
            several.append(f"{one.name!r} has the ids {other.id} and {one.id}")
    return classes, several


def _find(entries: Mapping[Any, Any], given: Any, where: str) -> Any:
    """The entry of an id that may be written in another way; DataError if there is none."""
    with suppress(ValueError, KeyError):
        return entries[_as_id(given)]
    known = shortened([*map(repr, entries)])
    raise DataError(
        f"{where} {given!r} is unknown (known are {known}); add it or leave the annotation out"
    )


def _ascending(item: tuple[int | str, Any]) -> tuple[bool, int | str]:
    return isinstance(item[0], str), item[0]


def compact(shape: Any) -> Any:
    """A segmentation with its polygons or counts as arrays; as it is where they are not numbers."""
    with suppress(TypeError, OverflowError):
        if isinstance(shape, list):
            first = shape[0] if shape else None
            if not isinstance(first, list) or len(first) < 3 or isinstance(first[0], list):
                shape = _polygons(shape)
        if isinstance(shape, list):
            return [array("d", polygon) for polygon in shape]
        if isinstance(shape, dict) and isinstance(shape.get("counts"), list):
            return {**shape, "counts": array("q", shape["counts"])}
    return shape


def _polygons(shape: list[Any]) -> Any:
    """The outline in lists that are nested more or less than COCO's; others as they are."""
    if len(shape) == 1 and isinstance(shape[0], dict):
        return shape[0]
    if all(isinstance(value, int | float) for value in shape):
        return [shape] if shape else []
    if not all(isinstance(part, list) for part in shape) or not any(shape):
        return shape if any(shape) else []
    if len(shape) > 2 and all(len(p) == 2 and not isinstance(p[0], list) for p in shape):
        return [[*chain.from_iterable(shape)]]  # points as pairs
    if all(part and isinstance(part[0], list) for part in shape):
        return [polygon for part in shape for polygon in _polygons(part)]
    return shape


def _compact_annotation(value: dict[str, Any]) -> Any:
    """An annotation without what is not used, not checked yet; other objects as they are."""
    if "image_id" not in value or "file_name" in value or "caption" in value:
        return value
    return CocoAnnotation(
        value.get("id"),
        value["image_id"],
        value.get("category_id", ""),
        value.get("iscrowd") or False,
        value.get("area"),
        compact(value.get("segmentation")),
    )
