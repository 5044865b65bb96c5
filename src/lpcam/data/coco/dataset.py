"""MS COCO and files laid out like its ``instances_*.json``: labels, lists and painted masks."""

from __future__ import annotations

import logging
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

from lpcam.data.coco.files import (
    ALL,
    LABELLED,
    annotation_files,
    find_files,
    find_image,
    image_folders,
    listing_of,
    name_parts,
)
from lpcam.data.coco.index import CocoAnnotation, CocoFile, CocoImage
from lpcam.data.coco.painting import Crowds, PlacedImage, paint_folder, true_mask
from lpcam.data.dataset import (
    BACKGROUND,
    IGNORE,
    NAMES,
    ClassTable,
    Dataset,
    Item,
    Skip,
    class_values,
    safe_id,
    shows_nothing,
    with_mask_folder,
    without_suffix,
)
from lpcam.data.image_files import unnamed
from lpcam.data.labels import relative_name
from lpcam.data.reader import Opened, Reader, Request, TrueMask
from lpcam.runtime.errors import DataError, shortened
from lpcam.runtime.settings import Section

logger = logging.getLogger(__name__)
COCO_CATEGORIES: tuple[tuple[int, str], ...] = tuple(NAMES["coco"].items())
"""Ids and names of the 80 categories of COCO 2014; class ``n`` has the value ``n + 1`` in masks."""
_COCO_LIST = re.compile(r"(train|val)2014")


class AnnotatedImages:
    """A data set with masks painted from annotations; images without a file are no items."""

    def __init__(
        self,
        request: Request,
        files: Sequence[CocoFile],
        images: Mapping[str, PlacedImage],
        *,
        source: str,
        notices: Sequence[str],
        **described: Any,
    ) -> None:
        categories, chosen = files[0].categories, request.classes
        names = [name for _, name in categories]
        rules: dict[str, Any] = {"no_class": request.no_class, "masked": request.masks is not None}
        table = ClassTable.numbered(names, source, chosen, **rules)
        values = class_values(names, source, chosen, **rules)
        # of categories that are no class, those that mean so are void, and those beyond 254
        nothing = {n: shows_nothing(name) for n, name in categories}
        self._values = {
            n: min(values.get(name, IGNORE if nothing[n] == "ignore" else BACKGROUND), IGNORE)
            for n, name in categories
        }
        labels = {n: table.names.index(name) for n, name in categories if name in table.names}
        self.images, self.masks = images, request.masks
        items: dict[str, Item] = {}
        for image_id, (_, entry, path) in images.items():
            if path is not None:
                shown = {labels.get(one.category_id, -1) for one in entry.annotations} - {-1}
                depth = relative_name(entry.file_name).count("/") + 1
                on_disk = "/".join(path.parts[-depth:])
                items[image_id] = Item(image_id, path, tuple(sorted(shown)), file_name=on_disk)
        self.dataset = Dataset(
            classes=table,
            items=items,
            **described,
            notices=(
                *notices,
                *unnamed((i.image for i in items.values()), "no annotation that was read"),
                *_notices(files, table.names, items),
            ),
        )

    def with_masks(
        self, folder: Path, ids: Iterable[str], workers: int = 1, **options: Any
    ) -> Dataset:
        """Paint masks of items as ``folder/ID.png``; the data set with them and their faults."""
        ids = list(dict.fromkeys(ids))
        masks, faults = paint_folder(folder, self.images, ids, self._values, workers, **options)
        items = {n: replace(item, mask=masks.get(n)) for n, item in self.dataset.items.items()}
        notices = self.dataset.notices
        if faults:
            first, fault = next(iter(faults.items()))
            source, entry, _ = self.images[first]
            notice = f"images without a true mask, because it cannot be painted: {len(faults)}; "
            notice += f"the first: {source.path}, image {entry.file_name}: {fault}"
            logger.warning("%s", notice)
            notices = (*notices, notice)
        return replace(self.dataset, items=items, notices=notices)

    def true_masks(self) -> dict[str, TrueMask]:
        """The true masks of the items in which every object has an outline."""
        return {
            name: partial(true_mask, self.images[name], self._values)
            for name in self.dataset.items
            if self.images[name].entry.outlined
        }

    def opened(self, **settings: Any) -> Opened:
        """The data set with the masks of the request, or with those that can be painted."""
        if self.masks is not None:
            return Opened(with_mask_folder(self.dataset, self.masks))
        every = (one for image in self.images.values() for one in image.entry.annotations)
        if not any(one.segmentation for one in every):
            return Opened(self.dataset)
        return Opened(self.dataset, self.true_masks(), partial(self.with_masks, **settings))


def open_annotated(
    request: Request,
    file: CocoFile,
    annotations: Mapping[Path, list[CocoAnnotation]],
    lists: Mapping[str, Iterable[Path]],
    *,
    sizes: Mapping[Path, tuple[int, int] | None] | None = None,
    label_source: str,
    skipped: list[Skip],
    notes: Mapping[str, Sequence[str]],
) -> Opened:
    """A data set of images with annotations from other files than COCO's."""
    if not annotations:
        reasons = shortened([f"{skip.id}: {skip.reason}" for skip in skipped], 2)
        reasons = reasons or f"put the images into {file.path.parent / 'images'}"
        raise DataError(f"{file.path}: no image was found; {reasons}")
    folder = Path(os.path.commonpath([path.parent for path in annotations]))
    images: dict[str, PlacedImage] = {}
    ids: dict[Path, str] = {}
    for path, found in annotations.items():
        name = path.relative_to(folder).as_posix()
        try:
            image_id = _item_id(file.path, "/".join(p for p in name.split("/") if p != "images"))
        except DataError as error:
            skipped.append(Skip(name, str(error)))
            continue
        if image_id in images:
            both = f"{images[image_id].path} and {path}"
            raise DataError(f"{both} have the same id {image_id!r}; rename one of them")
        ids[path] = image_id
        images[image_id] = PlacedImage(file, CocoImage(name, (sizes or {}).get(path), found), path)
    members = {name: [ids[p] for p in paths if p in ids] for name, paths in lists.items()}
    members[ALL] = list(images)
    if unknown := {*(request.lists or ())} - members.keys():
        raise DataError(f"unknown list {min(unknown)!r}; {file.path} has {', '.join(members)}")
    read = request.lists or members
    wanted = {i for name in read for i in members[name]}
    file = replace(file, images=tuple(image.entry for image in images.values()))
    place = folder.resolve()
    return AnnotatedImages(
        request,
        [file],
        {i: one if i in wanted else one._replace(path=None) for i, one in images.items()},
        name=place.parent.name if folder.name == "images" else place.name,
        lists={name: tuple(dict.fromkeys(members[name])) for name in read},
        source=f"{file.path}",
        label_source=label_source,
        skipped=tuple(skipped),
        notices=[f"{text}: {len(of)} ({shortened(of)})" for text, of in notes.items() if of],
    ).opened()


def read_coco(root: Path, *, crowds: Crowds = "background", **options: Any) -> AnnotatedImages:
    """The data set of one or several annotation files and their images.

    An item's id is ``NAME/`` (of the list) and the file name without extension; ``NAME/`` is left
    out for the only file and for one whose images all have COCO's own names. ``options`` are values
    of :class:`lpcam.data.reader.Request`; DataError if files are missing, wrong or disagree.
    """
    request = Request(root, **options)
    folder, paths, found = find_files(root, request.lists)
    read = partial(CocoFile.read, crowds_are_objects=crowds == "objects")
    files = {name: read(path) for name, path in paths.items()}
    first, *others = files.values()
    for file in others:
        if file.categories != first.categories:
            number, category = min({*first.categories} ^ {*file.categories}, key=str)
            raise DataError(
                f"{first.path} and {file.path} have different categories, first {number} "
                f"({category}); read them one at a time"
            )
    images: dict[str, PlacedImage] = {}
    skipped: list[Skip] = []
    members: dict[str, list[str]] = {}
    listing, moved = cache(listing_of), list[str]()
    for name, file in files.items():
        own = re.compile(rf"COCO_{re.escape(name)}_\d{{12}}\.\w+", re.ASCII)
        alone = [*found.values()] == [file.path]
        alone = alone or all(own.fullmatch(image.file_name) for image in file.images)
        places = image_folders(folder, name, file.path)
        reason = f"its image is not in {' or '.join(map(str, places))}"
        members[name] = []
        for entry in file.images:
            image, below = find_image(places, entry.file_name, listing)
            image_id = ("" if alone else f"{name}/") + _item_id(file.path, below)
            if image_id in images:
                other = images[image_id].source.path
                both = f"{other} and {file.path} have two images with the id {image_id!r}"
                raise DataError(f"{both}, the second is {entry.file_name!r}; rename one")
            images[image_id] = PlacedImage(file, entry._replace(file_name=below), image)
            if image is None:
                skipped.append(Skip(image_id, reason))
            else:
                if len(name_parts(entry.file_name)) > len(name_parts(below)):
                    moved.append(f"{entry.file_name!r} is {image}")
                members[name].append(image_id)
    members[ALL] = [image_id for ids in members.values() for image_id in ids]
    wanted = {given.removesuffix(LABELLED) for given in request.lists or ()}
    for name, file in files.items():
        if not members[name] and (name in wanted or not members[ALL]):
            given = file.images[0].file_name
            last = name_parts(given)[-1:]
            there = shortened([str(p) for p in folder.rglob("*") if p.name in last])
            raise DataError(
                f"none of the {len(file.images)} images of {file.path} is there: {given!r} is "
                f"in none of {', '.join(map(str, image_folders(folder, name, file.path)))}; "
                f"{f'there is {there}; ' * bool(there)}put the images into one of the folders"
            )
    notices = [f"{file.path.name}: {one}" for file in files.values() for one in file.notices]
    if moved:
        notices.append(f"images found by the end of their file_name: {len(moved)}; {moved[0]}")
    short = [path.name for path in paths.values()]
    if len({*short}) < len(short):
        short = [f"{path.parent.name}/{path.name}" for path in paths.values()]
    is_coco = first.categories == COCO_CATEGORIES and all(map(_COCO_LIST.fullmatch, files))
    made = AnnotatedImages(
        request,
        [*files.values()],
        images,
        name="coco14" if is_coco else folder.resolve().name,
        lists={},
        source=f"{next(iter(paths.values()))}, categories,",
        label_source=f"annotations ({', '.join(short)}), crowds included",
        skipped=tuple(skipped),
        notices=notices,
    )
    lists = {
        name + ending: tuple(i for i in ids if not ending or made.dataset.items[i].labels)
        for name, ids in members.items()
        for ending in ("", LABELLED)
    }
    made.dataset = replace(made.dataset, lists=lists)
    return made


def _item_id(path: Path, file_name: str) -> str:
    try:
        name = unicodedata.normalize("NFC", relative_name(file_name))
        name.encode()
        return safe_id(without_suffix(safe_id(name)))
    except (UnicodeEncodeError, DataError) as error:
        raise DataError(f"{path}, file_name {file_name!r}: {error}") from error


def _notices(
    files: Sequence[CocoFile], chosen: Sequence[str], items: Mapping[str, Item]
) -> tuple[str, ...]:
    images = [image for file in files for image in file.images]
    every = [one for image in images for one in image.annotations]
    both = Counter(one.category_id for one in every)
    crowds = Counter(one.category_id for one in every if one.is_crowd)
    from_crowds = 0
    for image in images:
        seen = {one.category_id for one in image.annotations if not one.is_crowd}
        from_crowds += len({one.category_id for one in image.annotations} - seen)
    used = [(n, name) for n, name in files[0].categories if both[n]]
    names = [name for n, name in used if name in chosen and both[n] == crowds[n]]
    dropped = sorted(f"{name} {both[n]}" for n, name in used if name not in chosen)
    boxes = sum(not (one.segmentation or one.is_crowd) for one in every)
    unpainted = sum(not image.outlined for image in images)
    unlabelled = sum(not item.labels for item in items.values())
    has = "has" if unlabelled == 1 else "have"
    notices = (
        crowds
        and f"annotations of crowds, which give labels but are not painted: {crowds.total()}; "
        f"labels that only a crowd gives, without pixels in masks: {from_crowds}",
        names and f"classes with crowds only, so without pixels in masks: {', '.join(names)}",
        dropped
        and f"annotations of classes that were not chosen give no label: {', '.join(dropped)}",
        boxes
        and f"annotations without an outline, perhaps boxes only: {boxes}; images that have labels "
        f"but no true mask because of them: {unpainted}",
        unlabelled and f"{unlabelled} of {len(items)} images {has} no label",
    )
    return tuple(str(text) for text in notices if text)


class CocoSection(Section):
    """How masks are painted from COCO annotations (specification of data sets, section 3)."""

    order: Literal["file", "area"] = "file"
    """Objects painted on top: ``file``, later annotations; ``area``, smaller objects."""
    crowds: Crowds = "background"
    """Value of crowd regions that no object covers; ``void`` is 255. ``objects`` paints crowds as
    objects: CVAT writes brush masks as crowds, supervision masks with holes or several parts."""


class CocoReader(Reader):
    """COCO annotations: a folder, Roboflow's layout, or one JSON file."""

    means = "COCO annotations; masks are painted from them and serve scoring"
    settings = CocoSection
    how_to_label = "annotate objects of the categories"

    def recognises(self, path: Path) -> bool:
        """Whether it is a JSON file, or a folder with annotation files."""
        if path.is_file():
            return path.name.lower().endswith((".json", ".json.gz"))
        return path.is_dir() and bool(annotation_files(path))

    def open(self, request: Request) -> Opened:
        """Read labels from the annotations; masks can be painted from them."""
        settings = request.settings or CocoSection()
        folder = read_coco(crowds=settings.crowds, **vars(request))
        if request.masks is None and "crowds" not in settings.model_fields_set:
            every = [(i.source, one) for i in folder.images.values() for one in i.entry.annotations]
            crowds = [file for file, one in every if one.is_crowd and one.segmentation]
            if crowds and crowds[0].categories != COCO_CATEGORIES:
                raise DataError(
                    f"{crowds[0].path}: {len(crowds)} of {len(every)} annotations have iscrowd 1, "
                    "a group of objects in COCO, a brush mask in CVAT, and a mask with holes or "
                    "several parts in supervision; say which: --crowds objects (data.coco.crowds) "
                    "paints them, --crowds background does not"
                )
        return folder.opened(**settings.model_dump())


READER = CocoReader()
