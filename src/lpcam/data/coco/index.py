"""Annotation files laid out like COCO's ``instances_*.json``, in compact form.

Outlines become arrays while the file is parsed: as Python numbers, COCO's would take 2 GiB.
"""

from __future__ import annotations

import json
from array import array
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, Field, StrictInt, StringConstraints, ValidationError

from lpcam.data.dataset import check_unique
from lpcam.data.labels import normal_name, read_text
from lpcam.runtime.errors import DataError
from lpcam.runtime.files import digest_file

_HOW = (
    "an annotation file has 'images' with id, file_name, height and width, 'annotations' with id, "
    "image_id, category_id, iscrowd and segmentation, and 'categories' with id and name"
)


class CocoAnnotation(NamedTuple):
    """One annotation, without its box."""

    id: StrictInt
    image_id: StrictInt
    category_id: StrictInt
    is_crowd: bool  #: Whether it is a group of objects.
    area: Any  #: Area in square pixels, as the file states it.
    #: Outline in the form of :func:`compact`, or a function of the size that gives its pixels.
    segmentation: Any


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
    id: StrictInt
    file_name: str
    height: Annotated[StrictInt, Field(gt=0)]
    width: Annotated[StrictInt, Field(gt=0)]


class _Category(BaseModel):
    id: StrictInt
    name: Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]


class _Content(BaseModel):
    images: Annotated[list[_Image], Field(min_length=1)]
    annotations: list[CocoAnnotation]
    categories: Annotated[list[_Category], Field(min_length=1)]


@dataclass(frozen=True, eq=False)
class CocoFile:
    """The contents of an annotation file: images and categories in ascending order of their ids."""

    path: Path
    digest: str
    images: tuple[CocoImage, ...]
    categories: tuple[tuple[int, str], ...]  #: Ids and names.

    @classmethod
    def read(cls, path: Path) -> CocoFile:
        """Read an annotation file; DataError names what is missing, wrong, double or unknown."""
        try:
            content = json.loads(read_text(path, _HOW), object_hook=_compact_annotation)
            found = _Content.model_validate(content)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            given = "" if first["type"] == "missing" else f", got {first['input']!r:.80}"
            place = " ".join(map(str, first["loc"]))
            raise DataError(f"{path}: {place!r} is wrong: {first['msg']}{given}; {_HOW}") from error
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{path} cannot be read as JSON: {error}; download or write it again"
            ) from error
        for what, entries in found:
            check_unique((one.id for one in entries), f"{path}, ids of {what},")
        images = {
            one.id: CocoImage(one.file_name, (one.height, one.width), [])
            for one in sorted(found.images, key=lambda one: one.id)
        }
        categories = {one.id: normal_name(one.name) for one in found.categories}
        for one in found.annotations:
            if one.image_id not in images or one.category_id not in categories:
                raise DataError(
                    f"{path}: annotation {one.id} has the image_id {one.image_id} and the "
                    f"category_id {one.category_id}, one of which is unknown; add it or leave the "
                    "annotation out"
                )
            images[one.image_id].annotations.append(one)
        known = tuple(sorted(categories.items()))
        return cls(path, digest_file(path), tuple(images.values()), known)


def compact(shape: Any) -> Any:
    """A segmentation with its polygons or counts as arrays; as it is where they are not numbers."""
    with suppress(TypeError, OverflowError):
        if isinstance(shape, list):
            return [array("d", polygon) for polygon in shape]
        if isinstance(shape, dict) and isinstance(shape.get("counts"), list):
            return {**shape, "counts": array("q", shape["counts"])}
    return shape


def _compact_annotation(value: dict[str, Any]) -> dict[str, Any]:
    """An annotation without what is not used; other objects as they are."""
    if "image_id" not in value or "file_name" in value:
        return value
    return {
        "id": value.get("id"),
        "image_id": value["image_id"],
        "category_id": value.get("category_id"),
        "is_crowd": value.get("iscrowd") or False,
        "area": value.get("area"),
        "segmentation": compact(value.get("segmentation")),
    }
