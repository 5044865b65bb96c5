"""Commands on data sets and on files of other programs: data, import."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lpcam.cli.command import THREADS, Argument, Invocation, Lazy, command, names
from lpcam.runtime.errors import LpcamError

if TYPE_CHECKING:
    from lpcam.data.dataset import ClassTable

datasets = Lazy("lpcam.data.dataset")
opening = Lazy("lpcam.data.open_dataset")
estimate = Lazy("lpcam.pipeline.estimate")
sbd = Lazy("lpcam.data.sbd")
voc = Lazy("lpcam.data.voc")
coco = Lazy("lpcam.data.coco.dataset")
label_tables = Lazy("lpcam.data.labels")
label_files = Lazy("lpcam.formats.labels")
map_folders = Lazy("lpcam.formats.map_folders")

KNOWN_CLASSES = ("voc12", "coco14")


def _setting(name: str, help: str) -> Argument:
    """An option that is a setting of one reader."""
    word: dict[str, Any] = {"dest": "settings", "type": lambda text: {name: text}}
    return Argument(f"--{name}", metavar="MEANING", help=help, **word)


CROWDS = _setting("crowds", "COCO's objects with iscrowd 1: background, void or objects (CVAT's).")


def _range(text: str) -> tuple[float, float]:
    try:
        low, high = map(float, text.split(","))
    except ValueError:
        message = f"must be two numbers, such as 0,4095 (--range=-1000,3000), got {text!r}"
        raise argparse.ArgumentTypeError(message) from None
    return low, high


READING = (
    Argument("--kind", help="voc, folder, coco, ... (default: recognised by the files)."),
    Argument("--lists", type=names, help="Lists to read, e.g. train,val (default: all)."),
    Argument(
        "--labels",
        type=lambda text: text if text == "folders" else Path(text),
        help="A .csv or .jsonl instead of the usual labels; for a folder also 'folders'.",
    ),
    Argument("--separator", help="Text between labels: ',', or 'list' for lists (default: ';')."),
    Argument("--no-class", type=names, help="Labels that mean no class, e.g. none,good."),
    Argument("--masks", type=Path, help="Folder of true masks, ID.png."),
    Argument("--classes", type=names, help="Subset of the classes, e.g. cow,dog."),
    Argument("--range", type=_range, help="LOW,HIGH of deep images that become 0 and 255."),
    Argument("--orientation", choices=("upright", "stored"), help="Pixels that masks fit (EXIF)."),
    Argument("--palette", type=Path, help="Colours of the classes: labelmap.txt, class_dict.csv."),
    CROWDS,
    _setting("several", "Label Studio's annotations of an image that differ: last, or union."),
)
"""Arguments of :func:`lpcam.data.open_dataset.open_dataset`."""


@command(
    "data check",
    Argument("path", type=Path, help="As for lpcam init."),
    *READING,
    Argument("--json", type=Path, metavar="FILE", help="Write the findings to this file too."),
    Argument("--recipe", help="Recipe whose run is estimated (default: that of lpcam init)."),
    Argument("--no-estimate", action="store_true", help="Do not estimate time and disk."),
    THREADS,
)
def check(
    call: Invocation,
    path: Path,
    json: Path | None,
    recipe: str | None,
    no_estimate: bool,
    **reading: Any,
) -> int:
    """Show what a data set holds and what is wrong with it."""
    if no_estimate and recipe is not None:
        raise LpcamError("--recipe names the run to estimate; leave it or --no-estimate out")
    found = estimate.inspect_dataset(
        path, recipe=recipe, estimated=not no_estimate, workers=call.threads, **reading
    )
    print(found.summary())
    if json is not None:
        found.write_json(json, command=call.line)
        print(f"wrote {json}")
    return 1 if found.problems else 0


@command(
    "data train-aug",
    Argument("voc_folder", type=Path, metavar="voc", help="The VOC2012 folder."),
    Argument("sbd_folder", type=Path, metavar="sbd", help="The benchmark_RELEASE folder."),
    Argument("--output", type=Path, help="Folder to write (default: VOC2012 itself)."),
    THREADS,
)
def train_aug(call: Invocation, voc_folder: Path, sbd_folder: Path, output: Path | None) -> int:
    """Make the list train_aug and its masks from VOC 2012 and SBD."""
    print(sbd.make_train_aug(voc_folder, sbd_folder, output, workers=call.threads))
    return 0


@command(
    "data masks",
    Argument("path", type=Path, help="Folder or file with annotations."),
    Argument("output", type=Path, help="Folder to write."),
    Argument("--lists", type=names, help="E.g. train2014,val2014 (default: all)."),
    Argument("--order", choices=("file", "area"), help="Order of painting (default: file)."),
    CROWDS,
    THREADS,
)
def masks(
    call: Invocation,
    path: Path,
    output: Path,
    lists: list[str] | None,
    order: str | None,
    settings: dict[str, str] | None,
) -> int:
    """Paint masks from annotations of COCO, YOLO or Label Studio."""
    chosen = {**({"order": order} if order else {}), **(settings or {})}
    made = opening.paint_masks(path, output, lists=lists, settings=chosen, workers=call.threads)
    print("{} masks of {} images in {}".format(*made, output))
    return 0


@command(
    "import maps",
    Argument("source", type=Path, help="Folder of .npy files."),
    Argument("output", type=Path, help="Folder to write."),
    Argument("--style", default="auto", help="irn, amn, psa, psa-crf or auto (default)."),
    Argument("--data", type=Path, help="Data set of the images; the maps are checked against it."),
    Argument("--lists", type=names, help="Lists of the data set, e.g. train (default: all)."),
    Argument("--classes", help="voc12, coco14, a file of names, or classes of --data (cow,dog)."),
    Argument(
        "--no-file-no-class",
        action="store_true",
        help="Treat images of --data without a file as having no class (as MCTformer).",
    ),
    Argument("--normalise", action="store_true", help="Divide each map by its maximum."),
    THREADS,
)
def import_maps(
    call: Invocation,
    source: Path,
    output: Path,
    data: Path | None,
    lists: list[str] | None,
    classes: str | None,
    **options: Any,
) -> int:
    """Read .npy maps of IRN, AMN or PSA, for lpcam refine."""
    for option, value in {"no-file-no-class": options["no_file_no_class"], "lists": lists}.items():
        if value and data is None:
            raise LpcamError(f"--{option} needs the data set of the images: --data PATH")
    table = None
    if classes is not None and (data is None or classes in KNOWN_CLASSES or Path(classes).exists()):
        table = class_table(classes)
    elif classes is not None:
        options["chosen"] = names(classes)
    if data is not None:
        dataset = opening.open_dataset(data, lists=lists).dataset
        if table is not None:
            datasets.choose_classes(dataset.classes, table.names)
        options["sizes"] = {i.id: i.size() for i in dataset.items.values()}
        options["ids"] = list(dataset.items)
        table = table or dataset.classes
    result = map_folders.import_maps(source, output, classes=table, workers=call.threads, **options)
    print(result.summary())
    return 1 if result.skipped else 0


@command(
    "import labels",
    Argument("source", type=Path, help="A .npy file."),
    Argument("output", type=Path, help="The csv file to write."),
    Argument("--classes", default="voc12", help="voc12 (default), coco14, or a file of names."),
    Argument(
        "--coco-split", choices=("train2014", "val2014"), help="9 is COCO_SPLIT_000000000009."
    ),
    Argument("--ids", type=Path, help="File with one id per line, for an array without names."),
)
def import_labels(
    call: Invocation,
    source: Path,
    output: Path,
    classes: str,
    ids: Path | None,
    **split: str | None,
) -> int:
    """Convert cls_labels.npy and the like to labels.csv."""
    names = None if ids is None else [name for _, name in label_tables.read_lines(ids)]
    table = class_table(classes).names
    print(label_files.import_labels(source, output, classes=table, ids=names, **split))
    return 0


def class_table(text: str) -> ClassTable:
    """Classes of a known data set, or of a file, with their mask values."""
    table: ClassTable
    if text in KNOWN_CLASSES:
        known = voc.CLASSES if text == "voc12" else (n for _, n in coco.COCO_CATEGORIES)
        table = datasets.ClassTable.numbered(known, text)
    elif Path(text).is_file():
        table = label_files.read_classes(Path(text))
    else:
        raise LpcamError(f"no class names {text!r}; give voc12, coco14, or a file of names")
    return table
