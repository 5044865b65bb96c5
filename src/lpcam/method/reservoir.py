"""Bounded samples of local features for each class, foreground and context apart (eq. 2)."""

from __future__ import annotations

import hashlib
import operator
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lpcam.data.map_files import read_maps
from lpcam.method.functional import split
from lpcam.method.multi_scale import single_scale_cam
from lpcam.method.settings import LpcamSettings
from lpcam.runtime.errors import DataError, PrototypeError
from lpcam.runtime.files import read_tensors, write_tensors

SideName = Literal["foreground", "context"]
SIDES: tuple[SideName, SideName] = ("foreground", "context")


RandomState = int | np.random.RandomState | np.random.Generator | None


def drawn_seed(given: RandomState) -> int:
    """The integer that a ``random_state`` is, or one drawn from it."""
    state: Any = np.random.default_rng() if given is None else given
    if hasattr(state, "__index__"):
        return operator.index(state)
    if draw := getattr(state, "integers", getattr(state, "randint", None)):
        return int(draw(2**31 - 1))
    raise ValueError(
        f"random_state is an integer, None, a RandomState or a Generator, not {given!r:.60}"
    )


def collect(
    reservoir: Reservoir,
    features: Tensor,
    classes: Sequence[int],
    split_map: Tensor,
    settings: LpcamSettings,
    name: str,
    times: Mapping[int, int] | None = None,
) -> None:
    """Split one image's features by its CAM (equation 2) and offer them to the reservoir.

    Features are (C, h, w) at scale 1, the split map is (K, H', W'), the CAM of the K classes.
    ``times`` says how often the image was drawn for each class; None: once.
    """
    if not classes:
        return
    rows = features.flatten(1).T
    for plane, index in zip(on_grid(split_map, features, settings), classes, strict=True):
        sides = split(plane.flatten(), settings.tau, inclusive=settings.tau_inclusive)
        for turn in range(1 if times is None else times.get(index, 0)):
            for side, where in zip(SIDES, sides, strict=True):
                reservoir.add(index, side, rows, f"{name}#{turn}" if turn else name, where)


def split_maps(
    features: Tensor, classes: Sequence[int], weight: Tensor, cams: Path, settings: LpcamSettings
) -> Tensor:
    """CAM (K, H, W) of classes, read from a map file or of features (C, h, w), to split these."""
    if settings.split_maps == "single_scale":
        return single_scale_cam(features, weight[list(classes)], epsilon=settings.cam_epsilon)
    stored = read_maps(cams)
    keys = stored.keys.tolist()
    return torch.from_numpy(stored.high_res[[keys.index(index) for index in classes]])


def on_grid(split_map: Tensor, features: Tensor, settings: LpcamSettings) -> Tensor:
    """Resize maps (K, H, W) to the grid of features (C, h, w) by ``settings.split_resize``."""
    grid = features.shape[-2:]
    if split_map.shape[-2:] == grid:
        return split_map
    options = {} if settings.split_resize == "nearest" else {"align_corners": False}
    return F.interpolate(split_map[None], size=grid, mode=settings.split_resize, **options)[0]


def drawn(key: str) -> torch.Generator:
    """A generator whose numbers depend on a key alone."""
    digest = hashlib.blake2b(key.encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))


class Reservoir:
    """Uniform random sample of the local features of each class and side, in main memory.

    Every feature gets a random key from a generator that is seeded with the seed, the image, the
    class and the side. The features of the ``max_features`` smallest keys are kept (None: all), so
    the sample depends neither on the order of the images nor on how processes share them.
    """

    def __init__(
        self, max_features: int | None, seed: int, dtype: torch.dtype = torch.float16
    ) -> None:
        if not getattr(dtype, "is_floating_point", False):
            raise ValueError(f"dtype is a floating point type, as torch.float32, not {dtype!r:.60}")
        self.max_features, self.seed, self.dtype = max_features, seed, dtype
        self.seen: dict[tuple[int, SideName], int] = {}
        """Number of features offered, by class and side."""
        self._samples: dict[tuple[int, SideName], _Sample] = {}

    def add(
        self, index: int, side: SideName, rows: Tensor, name: str, where: Tensor | None = None
    ) -> None:
        """Offer local features (M, C) of one image for a class, those ``where`` (M,) is True.

        Raises PrototypeError if a row that is kept has NaN, Inf or a value too large for ``dtype``.
        """
        # Keys are drawn first, so that a full sample copies only the few rows that it takes.
        place, rows = (index, side), rows.detach()
        offered = torch.arange(len(rows)) if where is None else torch.nonzero(where).flatten()
        self.seen[place] = self.seen.get(place, 0) + len(offered)
        generator = drawn(f"{self.seed}/{index}/{side}/{name}")
        keys = torch.rand(len(offered), generator=generator, dtype=torch.float64)
        sample = self._samples.get(place) or _Sample(self.max_features)
        chosen = sample.candidates(keys)
        if not len(chosen):
            return
        taken = rows[offered[chosen.to(offered.device)].to(rows.device)]
        kept = taken.to(self.dtype)
        if not bool(torch.isfinite(kept).all()):
            reason = (
                f"reach {float(taken.abs().max()):.3g}, more than "
                f"{str(self.dtype).removeprefix('torch.')} can represent; keep features as float32"
                if bool(torch.isfinite(taken).all())
                else "contain NaN or Inf; check the weights and the preprocessing of the classifier"
            )
            raise PrototypeError(f"the features of image {name!r} {reason}")
        self._samples[place] = sample
        sample.take(keys[chosen], kept.cpu())

    def merge(self, other: Reservoir) -> None:
        """Add the sample of other images, made with the same arguments."""
        for place, count in other.seen.items():
            self.seen[place] = self.seen.get(place, 0) + count
        for place, offered in other._samples.items():
            sample = self._samples.setdefault(place, _Sample(self.max_features))
            for keys, rows in zip(offered.keys, offered.rows, strict=True):
                chosen = sample.candidates(keys)
                if len(chosen):
                    sample.take(keys[chosen], rows[chosen])

    def checkpoint(self, path: Path, images: int) -> None:
        """Write the sample and the number of images it has seen, to resume from."""
        tensors, seen = self.contents()
        write_tensors(path, tensors, {"kind": "reservoir", "images": images, "seen": seen})

    def restore(self, path: Path) -> int:
        """Read a checkpoint; the number of images it has seen."""
        tensors, metadata = read_tensors(path)
        self.fill(tensors, metadata["seen"])
        return int(metadata["images"])

    def contents(self) -> tuple[dict[str, Tensor], list[tuple[int, SideName, int]]]:
        """Rows and keys as named tensors, and the number of features offered, as JSON."""
        tensors = {}
        for (index, side), sample in self._samples.items():
            keys, rows = sample.whole()
            tensors[f"{index}.{side}.rows"], tensors[f"{index}.{side}.keys"] = rows, keys
        return tensors, [(*place, count) for place, count in self.seen.items()]

    def fill(
        self, tensors: Mapping[str, Tensor], seen: Sequence[tuple[int, SideName, int]]
    ) -> None:
        """Take what :meth:`contents` gave into an empty reservoir of the same arguments."""
        for index, side, count in seen:
            self.seen[index, side] = count
            if f"{index}.{side}.rows" in tensors:
                sample = self._samples[index, side] = _Sample(self.max_features)
                sample.take(tensors[f"{index}.{side}.keys"], tensors[f"{index}.{side}.rows"])

    def features(self, index: int, side: SideName) -> Tensor | None:
        """Sample (M, C) of a class and side, ordered by the keys; None if there is none."""
        sample = self._samples.get((index, side))
        return None if sample is None else sample.whole()[1]


class _Sample:
    """Rows of the ``bound`` smallest keys: parts until there are ``bound``, then one block."""

    def __init__(self, bound: int | None) -> None:
        self.bound, self.count = bound, 0
        self.keys: list[Tensor] = []
        self.rows: list[Tensor] = []
        self._largest = float("inf")  # of the keys once the sample is full
        self._sorted = False

    def candidates(self, keys: Tensor) -> Tensor:
        """Indices (int64) of the keys that can still be kept."""
        chosen = torch.nonzero(keys < self._largest).flatten()
        if self.bound is not None and len(chosen) > self.bound:
            chosen = chosen[keys[chosen].argsort()[: self.bound]]
        return chosen

    def take(self, keys: Tensor, rows: Tensor) -> None:
        """Keep rows in main memory that :meth:`candidates` chose."""
        self._sorted = False
        if self._largest == float("inf"):
            self.keys.append(keys)
            self.rows.append(rows)
            self.count += len(rows)
            if self.bound is None or self.count < self.bound:
                return
            self.whole()
        else:
            # New rows replace those whose keys are now too large.
            (held,), (block,), bound = self.keys, self.rows, self.count
            stays = torch.zeros(bound + len(keys), dtype=torch.bool)
            stays[torch.cat([held, keys]).argsort()[:bound]] = True
            leaving, coming = ~stays[:bound], stays[bound:]
            held[leaving], block[leaving] = keys[coming], rows[coming]
        self._largest = float(self.keys[0].max())

    @torch.inference_mode(False)  # so that rows can be replaced in any mode
    def whole(self) -> tuple[Tensor, Tensor]:
        """Keys in increasing order and their rows, at most ``bound``, as one block."""
        if not self._sorted:
            keys = torch.cat(self.keys)
            order = keys.argsort()[: self.bound]
            places = torch.full((len(keys),), -1)
            places[order] = torch.arange(len(order))
            block = self.rows[0].new_empty(len(order), self.rows[0].shape[1])
            # One part at a time, so that there are never three copies.
            targets = torch.split(places, [len(part) for part in self.rows])
            for part, to in zip(self.rows, targets, strict=True):
                block[to[to >= 0]] = part[to >= 0]
            self.keys, self.rows, self._sorted = [keys[order]], [block], True
            self.count = len(block)
        return self.keys[0], self.rows[0]


def read_selected(
    path: Path, labels: Sequence[tuple[str, Sequence[int]]], classes: int
) -> Mapping[str, Mapping[int, int]]:
    """The images of a table (classes, n) of indices into ``labels``, as :func:`draw_images`."""
    try:
        table = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"the table data.selected, {path}, cannot be read: {error}") from None
    if table.ndim != 2 or len(table) != classes or table.dtype.kind not in "iu":
        raise DataError(
            f"the table data.selected, {path}, must have integers of the shape ({classes}, n), got "
            f"{table.dtype} {table.shape}"
        )
    drawn: dict[str, Counter[int]] = {}
    for index, row in enumerate(table.tolist()):
        for place in row:
            if not 0 <= place < len(labels) or index not in labels[place][1]:
                raise DataError(
                    f"the table data.selected, {path}, has {place} for class {index}, which is not "
                    "an image of that class; its indices must count the images of the list "
                    "'prototypes' in order, none left out"
                )
            drawn.setdefault(labels[place][0], Counter())[index] += 1
    return drawn


def draw_images(
    labels: Sequence[tuple[str, Sequence[int]]], classes: int, settings: LpcamSettings, *, seed: int
) -> dict[str, dict[int, int]]:
    """How often each image is drawn to be clustered for each class (spec. of LPCAM, section 4)."""
    drawn: dict[str, dict[int, int]] = {}
    wanted, replace = settings.images_per_class, settings.images_with_replacement
    for index in range(classes):
        names = [name for name, present in labels if index in present]
        if wanted is not None and names:
            generator = np.random.default_rng([seed, index])
            count = wanted if replace else min(wanted, len(names))
            names = generator.choice(np.array(names, dtype=object), count, replace).tolist()
        for name, times in Counter(names).items():
            drawn.setdefault(name, {})[index] = times
    return drawn
