"""MS COCO and files laid out like its ``instances_*.json``: labels, lists and painted masks.

Image-level labels are the categories of all annotations of an image, crowds included; masks are
painted from those that are not crowds (specification of data sets, sections 2 and 3). The
annotation file is streamed once and only an index of it is kept. Polygons need pycocotools (extra
``coco``), labels do not.
"""

from __future__ import annotations

import logging
import re
import unicodedata
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lpcam.data.coco.files import (
    ALL,
    LABELLED,
    annotation_files,
    find_files,
    find_image,
    image_folders,
    listing_of,
)
from lpcam.data.coco.index import CocoAnnotations, file_state
from lpcam.data.coco.painting import CocoImage, Crowds, Order, paint_folder, true_mask
from lpcam.data.dataset import (
    IMAGE_SUFFIXES,
    ClassTable,
    Dataset,
    Item,
    Skip,
    choose_classes,
    safe_id,
    without_suffix,
)
from lpcam.data.labels import relative_name
from lpcam.data.masks import with_mask_folder
from lpcam.data.reader import Opened, Progress, Reader, Request
from lpcam.runtime.errors import DataError
from lpcam.runtime.settings import Section

logger = logging.getLogger(__name__)
_NAMES = """person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,
stop sign,parking meter,bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,
umbrella,handbag,tie,suitcase,frisbee,skis,snowboard,sports ball,kite,baseball bat,baseball glove,
skateboard,surfboard,tennis racket,bottle,wine glass,cup,fork,knife,spoon,bowl,banana,apple,
sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,potted plant,bed,dining table,
toilet,tv,laptop,mouse,remote,keyboard,cell phone,microwave,oven,toaster,sink,refrigerator,book,
clock,vase,scissors,teddy bear,hair drier,toothbrush"""
_UNUSED = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)
COCO_CATEGORIES = tuple(
    zip(
        (number for number in range(1, 91) if number not in _UNUSED),
        _NAMES.replace("\n", "").split(","),
        strict=True,
    )
)
"""Ids and names of the 80 categories of COCO 2014; class ``n`` has the value ``n + 1`` in masks."""
_COCO_LIST = re.compile(r"(train|val)2014")
_PLAIN = re.compile(r"(\w+)(\.\w+)", re.ASCII)


class CocoFolder:
    """The data set of one or several annotation files and their images.

    In a folder the annotation file of a list NAME is the first that exists of
    ``annotations/instances_NAME.json``, ``annotations/NAME.json``, ``NAME/_annotations.coco.json``
    and ``NAME.json``; a single ``annotations.json`` or ``_annotations.coco.json`` also works. Its
    images are searched in ``NAME``, ``images/NAME``, ``images``, the folder itself, and beside the
    annotation file. Each file gives the lists NAME and, of its images with a label,
    ``NAME.labelled``; ``all`` and ``all.labelled`` unite the files that were read. Classes are the
    categories in ascending order of their ids, with mask values from 1.

    An item's id is ``NAME/`` and the file name without extension. ``NAME/`` is left out for a file
    whose images all have COCO's own names (``COCO_NAME_000000000009``), for the only file of a
    folder, and for a file that is itself the root.

    Args:
        root: an annotation file or a folder.
        lists: names of the lists to read; None or ``all``: every file.
        classes: names of categories in label order; all if None. Masks keep all mask values.
        progress: called with the bytes read so far and the size of all annotation files.

    Raises:
        DataError: if a file, list or class is missing, files have different categories, two images
            have the same id or a file name leaves the folder; and as :meth:`CocoAnnotations.read`.

    Example:
        >>> import json
        >>> from tempfile import TemporaryDirectory
        >>> content = {
        ...     "images": [{"id": 9, "file_name": "a.jpg", "height": 2, "width": 3}],
        ...     "annotations": [{"id": 1, "image_id": 9, "category_id": 7}],
        ...     "categories": [{"id": 7, "name": "cow"}],
        ... }
        >>> with TemporaryDirectory() as folder:
        ...     _ = Path(folder, "cows.json").write_text(json.dumps(content))
        ...     Path(folder, "a.jpg").touch()
        ...     CocoFolder(Path(folder)).dataset.items["a"].labels
        (0,)
    """

    dataset: Dataset
    """Without masks. ``skipped`` has the images whose file is missing."""
    annotations: tuple[CocoAnnotations, ...]
    """The index of each file that was read."""

    def __init__(
        self,
        root: Path,
        *,
        lists: Sequence[str] | None = None,
        classes: Sequence[str] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        folder, files, found = find_files(root, lists)
        self.annotations = _read(files.values(), progress)
        categories = self.annotations[0].categories
        whole = _class_table(self.annotations)
        self._values = {n: m for (n, _), m in zip(categories, whole.mask_ids, strict=True)}
        table = choose_classes(whole, classes)
        chosen = {whole.names.index(name): n for n, name in enumerate(table.names)}

        @cache
        def labels_of(rows: tuple[int, ...]) -> tuple[int, ...]:
            return tuple(sorted(chosen[row] for row in rows if row in chosen))

        self._images: dict[str, CocoImage] = {}
        items: dict[str, Item] = {}
        skipped: list[Skip] = []
        members: dict[str, list[str]] = {}
        listing = cache(listing_of)
        for (name, path), index in zip(files.items(), self.annotations, strict=True):
            alone = [*found.values()] == [path] or _has_coco_names(name, index)
            begin = "" if alone else f"{name}/"
            # as the only file of its folder a file has other ids, so it has another record
            record = begin or name
            places = image_folders(folder, name, path)
            reason = f"its image is not in {' or '.join(map(str, places))}"
            members[name] = []
            rows = zip(index.file_names, index.labels(), index.paintable().tolist(), strict=True)
            for row, (file_name, category_rows, outlined) in enumerate(rows):
                image_id = begin + _item_id(path, file_name)
                if image_id in self._images:
                    other = self._images[image_id].annotations.path
                    raise DataError(
                        f"{other} and {path} have two images with the id {image_id!r}, the second "
                        f"is {file_name!r}; rename one of them"
                    )
                image = find_image(places, file_name, listing)
                self._images[image_id] = CocoImage(index, row, record, outlined, image)
                if image is None:
                    skipped.append(Skip(image_id, reason))
                    continue
                depth = relative_name(file_name).count("/") + 1
                on_disk = "/".join(image.parts[-depth:])
                labels = labels_of(category_rows)
                items[image_id] = Item(image_id, image, labels, file_name=on_disk)
                members[name].append(image_id)
            wanted = name in {given.removesuffix(LABELLED) for given in lists or ()}
            if not members[name] and (wanted or (not items and path == [*files.values()][-1])):
                raise DataError(
                    f"none of the {len(index.file_names)} images of {path} is there: "
                    f"{index.file_names[0]!r} is in none of {', '.join(map(str, places))}; put the "
                    "images there"
                )
        members[ALL] = list(items)
        is_coco = categories == COCO_CATEGORIES and all(map(_COCO_LIST.fullmatch, files))
        self.dataset = Dataset(
            name="coco14" if is_coco else folder.resolve().name,
            classes=table,
            items=items,
            lists={
                name + ending: tuple(i for i in ids if not ending or items[i].labels)
                for name, ids in members.items()
                for ending in ("", LABELLED)
            },
            label_source=f"annotations ({_file_names(files.values())}), crowds included",
            skipped=tuple(skipped),
            notices=_notices(self.annotations, chosen, items),
        )

    def with_masks(
        self,
        folder: Path,
        ids: Iterable[str],
        *,
        order: Order = "file",
        crowds: Crowds = "background",
        workers: int = 1,
        progress: Callable[[int, int], None] | None = None,
    ) -> Dataset:
        """Paint the masks of images as ``folder/ID.png``.

        Args:
            ids: ids of items.
            order, crowds, workers, progress: as in :func:`lpcam.data.coco.painting.paint_folder`.

        Returns:
            The data set with ``mask`` set for these items. A notice, which is logged as a warning,
            counts the images whose mask cannot be painted.

        Raises:
            DataError: for an unknown id; for other errors see there.
        """
        wanted = list(dict.fromkeys(ids))
        unknown = [name for name in wanted if name not in self.dataset.items]
        if unknown:
            raise DataError(f"{unknown[0]!r} is not an image of {self.dataset.name}")
        masks, faults = paint_folder(
            folder,
            self._images,
            wanted,
            self._values,
            order=order,
            crowds=crowds,
            workers=workers,
            progress=progress,
        )
        items = {
            name: replace(item, mask=masks.get(name)) for name, item in self.dataset.items.items()
        }
        notices = self.dataset.notices
        if faults:
            first = next(name for name in self._images if name in faults)
            index, row, *_ = self._images[first]
            notice = (
                f"images without a true mask, because it cannot be painted: {len(faults)}; the "
                f"first: {index.path}, image {index.file_names[row]}: {faults[first]}"
            )
            logger.warning("%s", notice)
            notices = (*notices, notice)
        return replace(self.dataset, items=items, notices=notices)

    def true_mask(self, name: str) -> tuple[NDArray[np.uint8] | None, tuple[str, ...]]:
        """The mask of an image in memory, and the errors in its annotations."""
        return true_mask(self._images[name], self._values)

    def outlined(self, name: str) -> bool:
        """Whether every object of an image has an outline, so that it can have a true mask."""
        return self._images[name].outlined


def _read(
    files: Collection[Path], progress: Callable[[int, int], None] | None
) -> tuple[CocoAnnotations, ...]:
    """Read annotation files; progress counts the bytes of all."""
    total = sum(file_state(path)[0] for path in files)
    indices: list[CocoAnnotations] = []

    def advance(read: int, _: int) -> None:
        if progress is not None:
            progress(sum(index.state[0] for index in indices) + read, total)

    for path in files:
        indices.append(CocoAnnotations.read(path, progress=advance))
    return tuple(indices)


def _class_table(indices: Sequence[CocoAnnotations]) -> ClassTable:
    first = indices[0]
    for other in indices[1:]:
        if other.categories != first.categories:
            different = sorted({*first.categories} ^ {*other.categories})
            raise DataError(
                f"{first.path} and {other.path} have different categories, first "
                f"{different[0][0]} ({different[0][1]}); read them one at a time"
            )
    return ClassTable.numbered((name for _, name in first.categories), f"{first.path}, categories,")


def _has_coco_names(name: str, index: CocoAnnotations) -> bool:
    """Whether all images of a list are named as in COCO."""
    pattern = re.compile(rf"COCO_{re.escape(name)}_\d{{12}}\.\w+", re.ASCII)
    return all(map(pattern.fullmatch, index.file_names))


def _item_id(path: Path, file_name: str) -> str:
    plain = _PLAIN.fullmatch(file_name)
    if plain and plain[2].lower() in IMAGE_SUFFIXES:  # all of COCO's; much faster
        return plain[1]
    try:
        name = unicodedata.normalize("NFC", relative_name(file_name))
        name.encode()
        return safe_id(without_suffix(safe_id(name)))
    except UnicodeEncodeError as error:
        raise DataError(f"{path}: file_name {file_name!r} is not Unicode; rename it") from error
    except DataError as error:
        raise DataError(f"{path}, file_name: {error}") from error


def _file_names(paths: Collection[Path]) -> str:
    """Names of the files, with their folders where names repeat."""
    names = [path.name for path in paths]
    if len(set(names)) < len(names):
        names = [f"{path.parent.name}/{path.name}" for path in paths]
    return ", ".join(names)


def _notices(
    indices: Sequence[CocoAnnotations], labelled: Mapping[int, int], items: Mapping[str, Item]
) -> tuple[str, ...]:
    """Notices for the user about labels and masks; ``labelled`` is by category row."""
    names = [name for _, name in indices[0].categories]
    rows = np.concatenate([index.category_rows for index in indices])
    of_crowd = np.concatenate([index.crowds for index in indices])
    crowds = np.bincount(rows[of_crowd], minlength=len(names)).tolist()
    objects = np.bincount(rows[~of_crowd], minlength=len(names)).tolist()
    from_crowds = sum(
        len({*whole} - {*seen})
        for index in indices
        for whole, seen in zip(index.labels(), index.labels(crowds=False), strict=True)
    )
    only_crowds = [names[row] for row in labelled if crowds[row] and not objects[row]]
    dropped = sorted(
        f"{name} {objects[row] + crowds[row]}"
        for row, name in enumerate(names)
        if row not in labelled and objects[row] + crowds[row]
    )
    boxes = sum(int((~index.outlined & ~index.crowds).sum()) for index in indices)
    unpainted = sum(int((~index.paintable()).sum()) for index in indices)
    unlabelled = sum(not item.labels for item in items.values())
    notices = {
        "annotations of crowds, which give labels but are not painted: "
        f"{sum(crowds)}; labels that only a crowd gives, without pixels in masks: "
        f"{from_crowds}": sum(crowds),
        f"classes with crowds only, so without pixels in masks: {', '.join(only_crowds)}": len(
            only_crowds
        ),
        f"annotations of classes that were not chosen give no label: {', '.join(dropped)}": len(
            dropped
        ),
        f"annotations without an outline, perhaps boxes only: {boxes}; images that have labels "
        f"but no true mask because of them: {unpainted}": boxes,
        f"{unlabelled} of {len(items)} images {'has' if unlabelled == 1 else 'have'} no "
        "label": unlabelled,
    }
    return tuple(text for text, count in notices.items() if count)


class CocoSection(Section):
    """How masks are painted from COCO annotations (specification of data sets, section 3)."""

    order: Literal["file", "area"] = "file"
    """Objects painted on top: ``file``, later annotations; ``area``, smaller objects."""
    crowds: Literal["background", "void"] = "background"
    """Value of crowd regions that no object covers; ``void`` is 255."""


class CocoReader(Reader):
    """COCO annotations: a folder, Roboflow's layout, or one JSON file."""

    means = "COCO annotations; masks are painted from them and serve scoring"
    settings = CocoSection

    def check_labels(self, labels: Path | str | None) -> None:
        """Refuse every other source of labels: the annotations have them."""
        if labels is not None:
            raise ValueError(
                "labels belongs to the kinds voc and folder; coco takes them from its annotations"
            )

    def recognises(self, path: Path) -> bool:
        """A JSON file, or a folder with annotation files."""
        if path.is_file():
            return path.suffix.lower() == ".json"
        return path.is_dir() and bool(annotation_files(path))

    def open(self, request: Request) -> Opened:
        """Read labels from the annotations; masks can be painted from them."""
        folder = CocoFolder(
            request.root, lists=request.lists, classes=request.classes, progress=request.progress
        )
        if request.masks is not None:
            return Opened(with_mask_folder(folder.dataset, request.masks))
        settings = request.settings or CocoSection()

        def paint(
            target: Path, ids: Iterable[str], workers: int, progress: Progress | None
        ) -> Dataset:
            options: dict[str, Any] = {**settings.model_dump(), "workers": workers}
            return folder.with_masks(target, ids, progress=progress, **options)

        outlined = filter(folder.outlined, folder.dataset.items)
        masks = {name: partial(folder.true_mask, name) for name in outlined}
        return Opened(folder.dataset, masks, paint)


READER = CocoReader()
