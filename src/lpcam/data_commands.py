"""Commands for data sets and files of other programs: data, import, export of masks and maps."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lpcam.errors import LpcamError

if TYPE_CHECKING:
    from lpcam.data.items import ClassTable

MASK_FORMATS = ("voc", "coco", "coco-polygons", "yolo", "label-studio", "cvat", "overlays")
MAP_FORMATS = ("irn", "amn", "psa", "psa-crf")
KNOWN_CLASSES = ("voc12", "coco14")
KINDS = ("voc", "folder", "coco")


def add_parsers(commands: Any) -> None:
    """Add ``data`` and ``import`` to the commands."""
    data = commands.add_parser("data", help="Inspect a data set, or create parts of one.")
    works = data.add_subparsers(dest="work", required=True, metavar="WORK")
    check = works.add_parser("check", help="Report the contents and problems of a data set.")
    check.add_argument(
        "path", type=Path, help="Folder of images, VOC2012 or COCO, or a COCO JSON file."
    )
    add_reading(check)
    check.add_argument(
        "--json", type=Path, metavar="FILE", help="Also write the report to this file."
    )
    check.add_argument("--recipe", help="Recipe whose run is estimated (default: a small one).")
    check.add_argument(
        "--no-estimate", action="store_true", help="Skip the estimate of time and disk space."
    )
    train_aug = works.add_parser(
        "train-aug", help="Create the list train_aug and its masks from VOC 2012 and SBD."
    )
    train_aug.add_argument("voc", type=Path, help="VOC2012")
    train_aug.add_argument("sbd", type=Path, help="benchmark_RELEASE")
    train_aug.add_argument("--output", type=Path, help="Output folder (default: VOC2012 itself).")
    masks = works.add_parser("masks", help="Draw masks ID.png from COCO annotations.")
    masks.add_argument("path", type=Path, help="COCO folder or COCO JSON file.")
    masks.add_argument("output", type=Path, help="folder to write")
    masks.add_argument("--lists", type=names, help="Lists, e.g. train2014,val2014 (default: all).")
    masks.add_argument(
        "--order",
        choices=("file", "area"),
        default="file",
        help="Order in which objects are drawn.",
    )
    masks.add_argument("--crowds", choices=("background", "void"), default="background")
    for command in (check, train_aug, masks):
        command.add_argument("--threads", type=from_one, help="Number of files read at a time.")

    importer = commands.add_parser(
        "import", help="Import files of other programs without running their code."
    )
    works = importer.add_subparsers(dest="work", required=True, metavar="WORK")
    maps = works.add_parser("maps", help="Import .npy maps of IRN, AMN or PSA for lpcam refine.")
    maps.add_argument("source", type=Path, help="Folder of .npy files.")
    maps.add_argument("output", type=Path, help="folder to write")
    maps.add_argument("--style", choices=("auto", *MAP_FORMATS), default="auto")
    maps.add_argument(
        "--data", type=Path, help="Data set of the images, against which the maps are checked."
    )
    maps.add_argument(
        "--lists", type=names, help="Lists of the data set, e.g. train (default: all)."
    )
    maps.add_argument(
        "--classes",
        help="Classes of the maps: voc12, coco14, or a file such as the exported classes.txt; with "
        "--data also a selection of its classes, e.g. cow,dog.",
    )
    maps.add_argument(
        "--no-file-no-class",
        action="store_true",
        help="Treat images without a file as having no class (MCTformer's convention). Requires "
        "--data.",
    )
    maps.add_argument(
        "--normalise", action="store_true", help="Divide each map by its maximum, as IRN does."
    )
    maps.add_argument("--threads", type=from_one, help="Number of files read at a time.")
    labels = works.add_parser("labels", help="Convert cls_labels.npy to labels.csv.")
    labels.add_argument("source", type=Path, help=".npy file with label vectors.")
    labels.add_argument("output", type=Path, help="CSV file to write.")
    labels.add_argument(
        "--classes", default="voc12", help="voc12, coco14, or a file with one class name a line."
    )
    labels.add_argument(
        "--coco-split",
        choices=("train2014", "val2014"),
        help="COCO split of images that are named by a number.",
    )
    labels.add_argument(
        "--ids", type=Path, help="File of one id a line, for an array without names."
    )
    hub = works.add_parser(
        "huggingface", help="Convert a data set of the library datasets to a folder."
    )
    hub.add_argument("source", help="Folder written by save_to_disk, or a name on the hub.")
    hub.add_argument("output", type=Path, help="folder to write")
    hub.add_argument("--image", default="image", metavar="COLUMN", help="Column with the images.")
    hub.add_argument("--labels", default="label", metavar="COLUMN", help="Column with the labels.")
    hub.add_argument("--split", help="Split to convert, if there are several.")


def add_reading(command: Any) -> None:
    """Add the options that say how a data set is read (:func:`reading`)."""
    command.add_argument("--kind", choices=KINDS, help="Kind of data set (default: detected).")
    command.add_argument(
        "--lists", type=names, help="Lists of VOC or COCO, e.g. train,val (default: all)."
    )
    command.add_argument(
        "--labels",
        type=_label_source,
        help="Table of labels, .csv or .jsonl; for a folder of images also 'folders'.",
    )
    command.add_argument("--masks", type=Path, help="Folder of ground truth masks, ID.png.")
    command.add_argument("--classes", type=names, help="Selection of its classes, e.g. cow,dog.")


def reading(options: argparse.Namespace) -> dict[str, Any]:
    """The options of `add_reading` as arguments of :func:`lpcam.data.detect.open_dataset`."""
    return {
        name: getattr(options, name) for name in ("kind", "lists", "labels", "masks", "classes")
    }


def names(text: str) -> list[str]:
    """Parse names separated by commas."""
    found = [name.strip() for name in text.split(",")]
    if not all(found):
        raise argparse.ArgumentTypeError(
            f"{text!r} has an empty name; write names with commas between them, such as train,val"
        )
    return found


def from_one(text: str) -> int:
    """Parse a positive integer."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text!r}")
    return int(text)


def _label_source(text: str) -> Path | Literal["folders"]:
    return "folders" if text == "folders" else Path(text)


def run_command(options: argparse.Namespace, given: Sequence[str]) -> int:
    """Run a ``data`` or ``import`` command; returns the exit status."""
    works = {
        ("data", "check"): _check,
        ("data", "train-aug"): _train_aug,
        ("data", "masks"): _masks,
        ("import", "maps"): _import_maps,
        ("import", "labels"): _import_labels,
        ("import", "huggingface"): _import_huggingface,
    }
    return works[options.command, options.work](options, shlex.join(["lpcam", *given]))


def export(options: argparse.Namespace, given: Sequence[str]) -> int:
    """Export the masks or maps of a run; returns the exit status."""
    from lpcam.exporting import maps_of, masks_of  # noqa: PLC0415
    from lpcam.progress import progress  # noqa: PLC0415

    known = MASK_FORMATS if options.what == "masks" else MAP_FORMATS
    if options.format not in known:
        what = "no format was given" if options.format is None else f"not {options.format}"
        raise LpcamError(f"export {options.what}: {what}; choose one by --format {'|'.join(known)}")
    _refuse_unfit(options)
    command = shlex.join(["lpcam", *given])
    if options.what == "masks":
        from lpcam.formats.masks import export_masks  # noqa: PLC0415

        masks = masks_of(options.run, options.source)
        with progress(f"masks of {masks.name}", len(masks.entries)) as advance:
            result = export_masks(
                masks.entries,
                masks.classes,
                options.output,
                options.format,
                instances=options.instances,
                image_root=options.image_root or "",
                workers=_threads(options),
                progress=lambda _done, _total: advance(1, ""),
                made_by={**masks.made_by, "command": command},
            )
        print(result.summary())
        return 1 if result.left_out else 0
    from lpcam.formats.map_folders import export_maps  # noqa: PLC0415

    if (options.background is None) == (options.format in ("amn", "psa-crf")):
        raise LpcamError(
            f"maps of the format {options.format} "
            + ("have no background" if options.background is not None else "have one")
            + ": --background is its score, and belongs to amn and psa-crf"
        )
    maps = maps_of(options.run, options.source)
    with progress(f"maps of {maps.name}", len(maps.ids)) as advance:
        written = export_maps(
            maps.folder,
            options.output,
            options.format,
            maps.ids,
            classes=maps.classes,
            background=options.background,
            bare_digits=options.bare_digits,
            workers=_threads(options),
            progress=lambda _done, _total: advance(1, ""),
        )
    print(written.summary())
    if maps.missing:
        total = len(maps.missing) + len(maps.ids)
        print(
            f"{len(maps.missing)} of {total} images have no map in {maps.folder}, such as "
            f"{maps.missing[0]}; bring the run up to date first"
        )
    return 1 if maps.missing else 0


def _refuse_unfit(options: argparse.Namespace) -> None:
    """Refuse options of export that do not apply."""
    masks, maps = options.what == "masks", options.what == "maps"
    for name, fits, owner in (
        ("instances", masks, "masks"),
        ("image_root", masks, "masks"),
        ("background", maps, "maps"),
        ("bare_digits", maps, "maps"),
        ("size", False, "networks"),
        ("trained_on", False, "segmenters"),
    ):
        if not fits and getattr(options, name) not in (None, False):
            raise LpcamError(
                f"--{name.replace('_', '-')} belongs to {owner}; leave it out for {options.what}"
            )


def _threads(options: argparse.Namespace) -> int:
    from lpcam.resources import available_threads  # noqa: PLC0415

    threads: int | None = getattr(options, "threads", None)
    return threads or available_threads()


def _check(options: argparse.Namespace, command: str) -> int:
    from lpcam.data.detect import open_with_truth  # noqa: PLC0415
    from lpcam.data.estimate import usual_recipe  # noqa: PLC0415
    from lpcam.data.survey import survey  # noqa: PLC0415
    from lpcam.progress import progress  # noqa: PLC0415
    from lpcam.recipe import load_recipe  # noqa: PLC0415
    from lpcam.storage import write_json  # noqa: PLC0415
    from lpcam.version import versions  # noqa: PLC0415

    if options.no_estimate and options.recipe is not None:
        raise LpcamError("--recipe says whose run is estimated; leave it or --no-estimate out")
    recipe = None
    if not options.no_estimate:
        recipe = usual_recipe() if options.recipe is None else load_recipe(options.recipe)
    dataset, truth = open_with_truth(options.path, **reading(options))
    masks = sum(
        i.mask is not None or i.parts is not None or i.id in truth for i in dataset.items.values()
    )
    with progress("looking at the files", len(dataset.items) + masks) as advance:
        found = survey(
            dataset,
            truth=truth,
            recipe=recipe,
            workers=_threads(options),
            progress=lambda _done, _total: advance(1, ""),
        )
    print(found.summary())
    if options.json is not None:
        write_json(options.json, {**found.as_json(), "command": command, "versions": versions()})
        print(f"wrote {options.json}")
    return 1 if found.problems else 0


def _train_aug(options: argparse.Namespace, _: str) -> int:
    from lpcam.data.sbd import make_train_aug  # noqa: PLC0415

    made = make_train_aug(options.voc, options.sbd, options.output, workers=_threads(options))
    print(", ".join(f"{name}: {count:,}" for name, count in made.counts.items()))
    print(f"list {made.list_path}\nmasks in {made.masks_folder}")
    return 0


def _masks(options: argparse.Namespace, _: str) -> int:
    from lpcam.data.coco import CocoFolder  # noqa: PLC0415
    from lpcam.data.coco_files import annotation_files  # noqa: PLC0415
    from lpcam.progress import progress  # noqa: PLC0415

    if options.path.is_dir() and not annotation_files(options.path):
        raise LpcamError(
            f"{options.path} has no annotations of COCO, of which masks are painted; give a folder "
            "that holds some, or a COCO JSON file"
        )
    folder = CocoFolder(options.path, lists=options.lists)
    ids = list(folder.dataset.items)
    with progress("painting masks", len(ids)) as advance:
        painted = folder.with_masks(
            options.output,
            ids,
            order=options.order,
            crowds=options.crowds,
            workers=_threads(options),
            progress=lambda _done, _total: advance(1, ""),
        )
    count = sum(item.mask is not None for item in painted.items.values())
    print(f"{count} masks of {len(ids)} images in {options.output}")
    return 0


def _import_maps(options: argparse.Namespace, _: str) -> int:
    from lpcam.formats.map_folders import import_maps  # noqa: PLC0415

    if options.no_file_no_class and options.data is None:
        raise LpcamError("--no-file-no-class wants the data set of the images: --data PATH")
    if options.lists is not None and options.data is None:
        raise LpcamError("--lists names lists of a data set; give it by --data PATH")
    about: dict[str, Any] = {}
    given: str | None = options.classes
    chosen, table = None, None
    if given is not None and options.data is not None and not _is_table(given):
        chosen = [name.strip() for name in given.split(",")]
    elif given is not None:
        table = _class_table(given)
    if options.data is not None:
        from lpcam.data.classes import choose_classes  # noqa: PLC0415
        from lpcam.data.detect import open_dataset  # noqa: PLC0415
        from lpcam.data.images import upright_size  # noqa: PLC0415

        dataset = open_dataset(options.data, lists=options.lists)
        if table is not None:
            choose_classes(dataset.classes, table.names)
        about["sizes"] = {i.id: upright_size(i.image) for i in dataset.items.values()}
        about["ids"] = list(dataset.items)
        table = table or dataset.classes
    result = import_maps(
        options.source,
        options.output,
        style=options.style,
        classes=table,
        chosen=chosen,
        without_file="no class" if options.no_file_no_class else "skip",
        normalise=options.normalise,
        workers=_threads(options),
        **about,
    )
    print(result.summary())
    return 1 if result.skipped else 0


def _import_labels(options: argparse.Namespace, _: str) -> int:
    from lpcam.formats.labels import import_labels  # noqa: PLC0415

    result = import_labels(
        options.source,
        options.output,
        classes=_class_names(options.classes),
        ids=None if options.ids is None else _ids_in(options.ids),
        coco_split=options.coco_split,
    )
    print(result.summary())
    return 0


def _is_table(text: str) -> bool:
    return text in KNOWN_CLASSES or Path(text).is_file()


def _class_table(text: str) -> ClassTable:
    """Classes of a known data set, or of a file, with their mask values."""
    from lpcam.data.items import ClassTable  # noqa: PLC0415
    from lpcam.formats.labels import read_classes  # noqa: PLC0415

    if text not in KNOWN_CLASSES and Path(text).is_file():
        return read_classes(Path(text))
    known = _class_names(text)
    return ClassTable(known, tuple(range(1, len(known) + 1)))


def _class_names(text: str) -> tuple[str, ...]:
    """Names of a known data set, or of a file."""
    if text == "voc12":
        from lpcam.data.voc import CLASSES  # noqa: PLC0415

        return CLASSES
    if text == "coco14":
        from lpcam.data.coco import COCO_CATEGORIES  # noqa: PLC0415

        return tuple(name for _, name in COCO_CATEGORIES)
    path = Path(text)
    if not path.is_file():
        raise LpcamError(f"no class names {text!r}: give voc12, coco14, or a file of names")
    return _names_in(path)


def _names_in(path: Path) -> tuple[str, ...]:
    from lpcam.data.labels import read_text  # noqa: PLC0415

    lines = read_text(path, "Write one name a line.").splitlines()
    return tuple(line.strip() for line in lines if line.strip())


def _ids_in(path: Path) -> list[str]:
    from lpcam.data.labels import image_name, read_text  # noqa: PLC0415

    lines = read_text(path, "Write one id a line.").splitlines()
    return [
        image_name(line, f"{path} line {number} (one id a line, such as 2007_000032)")
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]


def _import_huggingface(options: argparse.Namespace, _: str) -> int:
    from lpcam.data.huggingface import RECORD, import_huggingface  # noqa: PLC0415
    from lpcam.storage import read_json  # noqa: PLC0415

    folder = import_huggingface(
        options.source,
        options.output,
        image=options.image,
        labels=options.labels,
        split=options.split,
    )
    record = read_json(folder / RECORD)
    if record["left_out"]:
        first = record["left_out"][0]
        print(
            f"{len(record['left_out'])} of {record['rows']} rows were left out, the first: row "
            f"{first['row']}, {first['reason']}"
        )
    print(f"wrote {folder}\nnext: lpcam init {shlex.quote(str(folder))}")
    return 0
