"""Opening COCO: seconds and memory of reading an annotation file the size of train2014's.

The file is drawn: as many images, annotations and bytes as ``instances_train2014.json`` has, with
empty files for images. Each contender reads it in a process of its own, whose whole peak is shown;
an interpreter that imports this package alone is in the table too. pycocotools keeps every outline
as Python numbers, this package as arrays.
"""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from benchmarks.measure import (
    MISSING,
    Spread,
    in_process,
    parser,
    peak_memory,
    show_bytes,
    show_seconds,
    table,
    verdict,
)
from lpcam.data.coco.dataset import COCO_CATEGORIES, AnnotatedImages, read_coco

IMAGES, ANNOTATIONS = 82_783, 604_907
"""Of instances_train2014.json."""
MOST_SECONDS = 30.0
MOST_MEBIBYTES = 1536
PAINTED = 200
OUTLINES = 5000
"""Different ones; drawing each anew would take longer than all that is measured."""
HERE = "benchmarks.coco_index"
SIZE = (480, 640)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables."""
    options = parser("coco_index", __doc__).parse_args(argv)
    images, annotations = (60, 400) if options.quick else (IMAGES, ANNOTATIONS)
    repetitions = options.repetitions or (1 if options.quick else 3)
    contenders = {"import alone": "start", "lpcam": "ours"}
    if importlib.util.find_spec("pycocotools"):
        contenders["pycocotools"] = "theirs"
    with TemporaryDirectory() as folder:
        path = draw(Path(folder), images, annotations)
        size = path.stat().st_size
        results: dict[str, list[dict[str, Any]]] = {name: [] for name in contenders}
        for _ in range(repetitions):
            for name, function in contenders.items():
                results[name].append(
                    in_process(f"{HERE}:{function}", 1, here=options.quick, path=str(path))
                )
        painted = (
            in_process(f"{HERE}:paint_some", 1, here=options.quick, path=str(path))
            if "pycocotools" in contenders
            else None
        )
    print("## COCO index\n")
    print(
        f"A drawn annotation file of {images:,} images, {annotations:,} annotations and "
        f"{size / 1e6:.0f} MB, in the system's cache; one thread, {repetitions} fresh processes "
        "each, the contenders in turn.\n"
    )
    rows = []
    for name, found in results.items():
        seconds = Spread.of([one["seconds"] for one in found])
        memory = max(one["peak"] for one in found)
        goals = ["", ""]
        if name == "lpcam" and not options.quick:
            goals = [
                verdict(seconds.median, at_most=MOST_SECONDS),
                verdict(memory / 2**20, at_most=MOST_MEBIBYTES),
            ]
        counts = f"{found[0]['images']:,}, {found[0]['labels']:,}" if found[0]["images"] else ""
        took = show_seconds(seconds) if counts else ""
        rows.append([name, counts, took, show_bytes(memory), *goals])
    print(table(["", "images, labels", "time", "peak of the process", "seconds", "MiB"], rows))
    if painted is None:
        print(f"\n{MISSING}: pycocotools is not there: `pip install 'lpcam[coco]'`")
    else:
        print(
            f"\nPainting: {painted['count']} masks of {painted['size'][0]} × "
            f"{painted['size'][1]} pixels, written to disk, on one thread: "
            f"{painted['rate']:.0f} a second."
        )
    return 0


def draw(folder: Path, images: int, annotations: int) -> Path:
    """Write an annotation file in COCO's form, and empty image files; the same every time.

    Returns:
        The annotation file ``folder/annotations/instances_train2014.json``.
    """
    generator = np.random.default_rng(0)
    path = folder / "annotations" / "instances_train2014.json"
    path.parent.mkdir()
    (folder / "train2014").mkdir()
    numbers = generator.choice(581_930, images, replace=False).tolist()
    # the last hundredth of the images is left without annotation, as about so many of COCO's are
    shown = numbers[: images - max(1, images // 100)]
    height, width = SIZE
    with open(path, "w", encoding="utf-8") as file:
        file.write('{"info": {"year": 2014, "description": "drawn"}, "images": [')
        for place, number in enumerate(numbers):
            name = f"COCO_train2014_{number:012d}.jpg"
            (folder / "train2014" / name).touch()
            file.write(
                f'{", " if place else ""}{{"license": 5, "file_name": "{name}", "coco_url": '
                f'"http://images.example/train2014/{name}", "height": {height}, "width": {width}, '
                f'"date_captured": "2013-11-14 16:28:13", "id": {number}}}'
            )
        file.write('], "licenses": [], "annotations": [')
        owners = generator.integers(0, len(shown), annotations).tolist()
        kinds = generator.integers(0, len(COCO_CATEGORIES), annotations).tolist()
        outlines = [_outline(generator) for _ in range(min(annotations, OUTLINES))]
        runs = [1000] * (height * width // 1000) + [height * width % 1000]
        crowd_shape = f'{{"counts": {runs}, "size": [{height}, {width}]}}'
        for place in range(annotations):
            crowd = place % 80 == 0
            shape = crowd_shape if crowd else outlines[place % len(outlines)]
            file.write(
                f'{", " if place else ""}{{"segmentation": {shape}, "area": '
                f'{generator.random() * 9000}, "iscrowd": {int(crowd)}, "image_id": '
                f'{shown[owners[place]]}, "bbox": [199.84, 200.46, 77.71, 70.88], "category_id": '
                f'{COCO_CATEGORIES[kinds[place]][0]}, "id": {place + 1}}}'
            )
        categories = ", ".join(
            f'{{"supercategory": "drawn", "id": {number}, "name": "{name}"}}'
            for number, name in COCO_CATEGORIES
        )
        file.write(f'], "categories": [{categories}]}}')
    return path


def _outline(generator: np.random.Generator) -> str:
    """A polygon of 4 to 45 points, so that a file has as many bytes as COCO's."""
    height, width = SIZE
    count = int(generator.integers(4, 46))
    angles = np.linspace(0, 2 * np.pi, count, endpoint=False)
    radii = generator.random(count) * 60 + 20
    x = generator.random() * width + radii * np.cos(angles)
    y = generator.random() * height + radii * np.sin(angles)
    outline = np.stack([x.clip(0, width), y.clip(0, height)], axis=1)
    return f"[{outline.round(2).reshape(-1).tolist()}]"


def start(path: str) -> dict[str, Any]:
    """What the process takes without reading anything."""
    return {"seconds": 0.0, "peak": peak_memory(), "images": 0, "labels": 0}


def ours(path: str) -> dict[str, Any]:
    """Labels and lists of every image by this package."""
    started = time.perf_counter()
    dataset = read_coco(Path(path)).dataset
    seconds = time.perf_counter() - started
    labels = sum(len(item.labels) for item in dataset.items.values())
    return {
        "seconds": seconds,
        "peak": peak_memory(),
        "images": len(dataset.items),
        "labels": labels,
    }


def theirs(path: str) -> dict[str, Any]:
    """The same labels by pycocotools."""
    from pycocotools.coco import COCO  # noqa: PLC0415

    started = time.perf_counter()
    with redirect_stdout(sys.stderr):  # it tells what it does
        index = COCO(path)
    labels = [
        {one["category_id"] for one in index.imgToAnns.get(number, ())}
        for number in sorted(index.imgs)
    ]
    seconds = time.perf_counter() - started
    return {
        "seconds": seconds,
        "peak": peak_memory(),
        "images": len(labels),
        "labels": sum(map(len, labels)),
    }


def paint_some(path: str) -> dict[str, Any]:
    """Masks a second of the first images."""
    folder = read_coco(Path(path))
    chosen = folder.dataset.lists["all"][:PAINTED]
    with TemporaryDirectory() as masks:
        folder.with_masks(Path(masks), chosen[:1])  # digest and imports
        started = time.perf_counter()
        folder.with_masks(Path(masks), chosen)
        seconds = time.perf_counter() - started - _unchanged(folder, Path(masks), chosen)
    return {
        "count": len(chosen) - 1,
        "size": SIZE,
        "rate": (len(chosen) - 1) / seconds,
    }


def _unchanged(folder: AnnotatedImages, masks: Path, chosen: Sequence[str]) -> float:
    """Seconds of a call that finds every mask painted: the digest of the file, above all."""
    started = time.perf_counter()
    folder.with_masks(masks, chosen)
    return time.perf_counter() - started


if __name__ == "__main__":
    sys.exit(main())
