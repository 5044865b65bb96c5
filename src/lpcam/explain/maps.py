"""The maps of one image: drawn, shown in a notebook, and saved."""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image

from lpcam.data.images import resize_image, scaled_size
from lpcam.data.items import ClassTable
from lpcam.errors import DataError, LpcamError
from lpcam.masks import overlay, overlay_mask, to_mask, write_mask
from lpcam.sheet import CELL, SheetRow, sheet
from lpcam.storage import write_bytes, write_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MethodName = Literal["CAM", "LPCAM"]
METHOD_NAMES: tuple[MethodName, MethodName] = ("CAM", "LPCAM")
KIND = "lpcam explain"
RANKING_LENGTH = 20
"""Classes whose scores a file of findings lists."""


@dataclass(frozen=True, eq=False, repr=False)
class ImageMaps:
    """The maps of K classes on one image, and what made them.

    In a notebook it shows itself. Maps are kept at the size at which the image was mapped, which is
    its own unless that is longer than ``maps.maximum_side``; whatever is drawn or saved is at full
    size.
    """

    image: NDArray[np.uint8]
    """(H, W, 3) upright RGB"""
    classes: tuple[str, ...]
    mask_ids: tuple[int, ...]
    """The value of each class in a mask, 1..254."""
    scores: tuple[float, ...]
    """The classifier's, in [0, 1]."""
    cam: NDArray[np.float32]
    """(K, h, w) in [0, 1]"""
    lpcam: NDArray[np.float32]
    """(K, h, w) in [0, 1]"""
    threshold: float
    """Of an LPCAM mask: foreground is above it."""
    cam_threshold: float
    """Of a CAM mask."""
    ranking: tuple[tuple[str, float], ...] = ()
    """Every class of the classifier and its score, the highest first."""
    notes: tuple[str, ...] = ()
    """What a reader of the maps should know, in words."""
    name: str = "image"
    made_by: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        height, width = self.size
        found = ", ".join(
            f"{name} {score:.2f}" for name, score in zip(self.classes, self.scores, strict=True)
        )
        return f"ImageMaps({self.name!r}, {width} x {height} pixels: {found or 'no class'})"

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of the image."""
        return self.image.shape[0], self.image.shape[1]

    def plane(self, name: str | None = None, method: MethodName = "LPCAM") -> NDArray[np.float32]:
        """The map of one class at full size, (H, W) in [0, 1].

        Args:
            name: of the class; None takes the one of the highest score.

        Raises:
            DataError: if the class has no map here.
        """
        return enlarged(self._maps(method)[self._place(name)], self.size)

    def overlay(
        self,
        image: NDArray[np.uint8] | None = None,
        name: str | None = None,
        *,
        method: MethodName = "LPCAM",
        opacity: float = 0.7,
    ) -> NDArray[np.uint8]:
        """A class's map in colours over the image, uint8 (H, W, 3).

        Args:
            image: to lay it over, of the same size; None: the image that was mapped.
            name: of the class; None takes the one of the highest score.

        Raises:
            DataError: if the class has no map here or the image has another size.
        """
        base = self.image if image is None else image
        return overlay(base, self.plane(name, method), opacity=opacity)

    def mask(
        self,
        threshold: float | None = None,
        *,
        method: MethodName = "LPCAM",
        classes: Sequence[str] | None = None,
    ) -> NDArray[np.uint8]:
        """Mask values, uint8 (H, W): the best class where its map is above the threshold, else 0.

        Args:
            threshold: None takes the method's own.
            classes: of which the mask is made; None: all that have maps.

        Raises:
            DataError: if a class has no map here.
        """
        if threshold is None:
            threshold = self.threshold if method == "LPCAM" else self.cam_threshold
        places = range(len(self.classes)) if classes is None else [self._place(n) for n in classes]
        ids = [self.mask_ids[place] for place in places]
        # As lpcam.masks.seeds, one class after another: a photograph of 20 megapixels has 80 MB of
        # each.
        best = torch.full(self.size, threshold)
        seed = torch.zeros(self.size, dtype=torch.uint8)  # at most 254 classes
        for number, place in enumerate(places, start=1):
            plane = torch.from_numpy(enlarged(self._maps(method)[place], self.size))
            seed[plane > best] = number
            best = torch.maximum(best, plane)
        if not ids:
            return np.zeros(self.size, np.uint8)
        table = ClassTable(tuple(self.classes[p] for p in places), tuple(ids))
        return to_mask(seed, np.arange(len(ids)), table)

    def found(self, threshold: float | None = None) -> dict[str, Any]:
        """What was found, as JSON: classes, scores, areas and boxes of the LPCAM mask, provenance.

        ``area`` is the share of the image's pixels, ``box`` the tightest one around them, in pixels
        from the upper left corner: left, top, right, bottom, the last two exclusive; or null.
        """
        return self._found(self.mask(threshold), threshold)

    def _found(self, mask: NDArray[np.uint8], threshold: float | None) -> dict[str, Any]:
        height, width = self.size
        mapped = self.cam.shape[1:]
        classes = []
        for name, value, score in zip(self.classes, self.mask_ids, self.scores, strict=True):
            where = mask == value
            classes.append(
                {
                    "name": name,
                    "score": round(score, 6),
                    "mask_value": value,
                    "area": round(float(where.mean()), 6),
                    "box": _box(where),
                }
            )
        return {
            "format": 1,
            "kind": KIND,
            "image": self.name,
            "width": width,
            "height": height,
            "mapped_width": mapped[1],
            "mapped_height": mapped[0],
            "threshold": self.threshold if threshold is None else threshold,
            "classes": classes,
            "highest_scores": [
                {"name": name, "score": round(score, 6)}
                for name, score in self.ranking[:RANKING_LENGTH]
            ],
            "notes": list(self.notes),
            "made_by": self.made_by,
        }

    def sheet_rows(self, *, long_side: int | None = None) -> list[SheetRow]:
        """Image, CAM, LPCAM and mask of each class as rows of a sheet; one row without a class.

        Args:
            long_side: shrinks them, to keep many in memory; None: full size.
        """
        mask = self.mask()
        size = self.size
        if long_side is not None and max(size) > long_side:
            size = scaled_size(*size, long_side / max(size))
            # of the nearest pixel: values of a mask have no mean
            shrunk = Image.fromarray(mask).resize(size[::-1], Image.Resampling.NEAREST)
            mask = np.array(shrunk)
        image = self.image if size == self.size else resize_image(self.image, size)
        nothing = np.zeros(size, np.float32)
        rows = [
            SheetRow(
                image,
                f"{name} {score:.2f}",
                resized(self.cam[place], size),
                resized(self.lpcam[place], size),
                mask,
                None,
            )
            for place, (name, score) in enumerate(zip(self.classes, self.scores, strict=True))
        ]
        return rows or [SheetRow(image, "no class", nothing, nothing, mask, None)]

    def plot(self) -> Figure:
        """Image, CAM, LPCAM and mask of each class as a matplotlib figure.

        Raises:
            LpcamError: if matplotlib, of the extra ``plot``, is not installed.
        """
        try:
            from matplotlib import pyplot as plt  # noqa: PLC0415 - an extra
        except ImportError:
            raise LpcamError(
                "plot needs matplotlib; install it with pip install 'lpcam[plot]'"
            ) from None
        rows = self.sheet_rows()
        figure, axes = plt.subplots(
            len(rows), 4, figsize=(12, 3.2 * len(rows)), squeeze=False, layout="constrained"
        )
        titles = ("image", "CAM", "LPCAM", "mask")
        for number, row in enumerate(rows):
            pictures = (
                row.image,
                overlay(row.image, row.cam),
                overlay(row.image, row.lpcam),
                overlay_mask(row.image, row.seed),
            )
            for axis, title, picture in zip(axes[number], titles, pictures, strict=True):
                axis.imshow(picture)
                axis.set_xticks([])
                axis.set_yticks([])
                if number == 0:
                    axis.set_title(title)
            # a dollar sign would begin a formula
            axes[number, 0].set_ylabel(row.name.replace("$", r"\$"))
        return figure

    def _repr_png_(self) -> bytes:
        return sheet(self.sheet_rows(long_side=2 * CELL), mask_title="mask")

    def _repr_html_(self) -> str:
        picture = base64.b64encode(self._repr_png_()).decode()
        text = html.escape(repr(self).removeprefix("ImageMaps(").removesuffix(")"))
        notes = "".join(f"<br>{html.escape(note)}" for note in self.notes)
        return (
            f'<div><img alt="image, CAM, LPCAM and mask: {text}" '
            f'src="data:image/png;base64,{picture}"><p>{text}{notes}</p></div>'
        )

    def save(self, folder: Path | str, name: str | None = None) -> dict[str, Any]:
        """Write heat maps, overlays, mask and findings below a folder, each whole or not at all.

        ``masks/NAME.png`` has the VOC palette, ``heatmaps/NAME.CLASS.cam.png`` and ``.lpcam.png``
        are 8-bit grey (a value is round(255 times the map)), ``overlays/`` has the same in colours
        over the image (at the size at which it was mapped) and ``NAME.mask.png``, and
        ``found/NAME.json`` what :meth:`found` tells and the names of these files.

        Args:
            name: relative path without extension; None: that of the image.

        Returns:
            the contents of the JSON file.

        Raises:
            ArtefactError: if a file cannot be written.
        """
        folder, name = Path(folder), self.name if name is None else name
        mask = self.mask()
        picture = resize_image(self.image, self.cam.shape[1:])
        files = {"mask": f"masks/{name}.png", "mask_overlay": f"overlays/{name}.mask.png"}
        write_mask(folder / files["mask"], mask)
        shown = overlay_mask(self.image, mask)
        write_bytes(folder / files["mask_overlay"], _png(resize_image(shown, picture.shape[:2])))
        found = self._found(mask, None)
        for place, part in enumerate(file_parts(self.classes)):
            own = {}
            for method in METHOD_NAMES:
                small = method.lower()
                plane = self._maps(method)[place]
                own[f"{small}_heatmap"] = f"heatmaps/{name}.{part}.{small}.png"
                own[f"{small}_overlay"] = f"overlays/{name}.{part}.{small}.png"
                values = np.rint(255 * enlarged(plane, self.size).clip(0, 1)).astype(np.uint8)
                write_bytes(folder / own[f"{small}_heatmap"], _png(values))
                write_bytes(folder / own[f"{small}_overlay"], _png(overlay(picture, plane)))
            found["classes"][place]["files"] = own
        found["files"] = files
        write_json(folder / "found" / f"{name}.json", found)  # last: it says that the rest is there
        return found

    def _maps(self, method: MethodName) -> NDArray[np.float32]:
        if method not in METHOD_NAMES:
            raise DataError(f"unknown method {method!r}; choose one of {', '.join(METHOD_NAMES)}")
        return self.cam if method == "CAM" else self.lpcam

    def _place(self, name: str | None) -> int:
        if not self.classes:
            raise DataError(
                f"no class was found in {self.name!r}, so there is no map to draw; lower the "
                "score, ask for at least one class or give labels"
            )
        if name is None:
            return int(np.argmax(self.scores))
        if name not in self.classes:
            raise DataError(
                f"{self.name!r} has no map of {name!r}; it has those of {', '.join(self.classes)}"
            )
        return self.classes.index(name)


def _box(where: NDArray[np.bool_]) -> list[int] | None:
    rows, columns = np.flatnonzero(where.any(1)), np.flatnonzero(where.any(0))
    if not len(rows):
        return None
    return [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1]


def _png(picture: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return buffer.getvalue()


def enlarged(plane: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.float32]:
    """A map at the size of its image (bilinear, as a run enlarges its maps)."""
    if plane.shape == size:
        return plane
    tensor = torch.from_numpy(plane)[None, None]
    enlarged: NDArray[np.float32] = F.interpolate(
        tensor, size=size, mode="bilinear", align_corners=False
    )[0, 0].numpy()
    return enlarged


def resized(plane: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.float32]:
    """A map at any size, for the eye: antialiased where it shrinks."""
    tensor = torch.from_numpy(plane)[None, None]
    resized: NDArray[np.float32] = F.interpolate(
        tensor, size=size, mode="bilinear", align_corners=False, antialias=True
    )[0, 0].numpy()
    return resized


def file_parts(classes: Sequence[str]) -> list[str]:
    """Class names as parts of file names, without dots and each another."""
    parts: list[str] = []
    for name in classes:
        part = re.sub(r"[^\w-]+", "-", name).strip("-")[:40] or "class"
        wanted, number = part, 1
        while part.casefold() in {other.casefold() for other in parts}:
            number += 1
            part = f"{wanted}-{number}"
        parts.append(part)
    return parts
