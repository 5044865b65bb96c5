"""The door: parses, calls, prints."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lpcam.data_commands import (
    MAP_FORMATS,
    MASK_FORMATS,
    add_parsers,
    add_reading,
    export,
    from_one,
    reading,
    run_command,
)
from lpcam.errors import LpcamError, RecipeError
from lpcam.version import __version__

if TYPE_CHECKING:
    from lpcam.onnx_files import ExportParity
    from lpcam.pipeline import RunResult

STAGE_HELP = {
    "classify": "train the classifier (linear probe or fine-tuning)",
    "cam": "... and compute class activation maps",
    "prototypes": "... and cluster, score and select prototypes",
    "lpcam": "... and compute LPCAM-F and LPCAM maps",
    "seeds": "... and write seed masks",
    "host-labels": "... and clean them by a CRF into labels for AMN, where the recipe wants it",
    "host": "... and train the host's networks (AMN, MCTformer, EDAM), where the recipe has one",
    "host-prototypes": "... and cluster the host's own features",
    "host-maps": "... and compute the host's maps and their seeds",
    "ir-labels": "... and clean them by a CRF into labels for IRN, where the recipe wants it",
    "irn": "... and train IRN's boundaries on them",
    "psa-labels": "... or score them by two CRFs for PSA, where the recipe wants it",
    "psa": "... and train PSA's affinities on them",
    "pseudo": "... and write pseudo masks",
    "segment": "... and train a segmenter on them, where the recipe wants it",
    "test": "... and segment the list to test",
    "evaluate": "... and score them where masks exist",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the ``lpcam`` command; returns the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = _parser()
    options, rest = parser.parse_known_args(given)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        if options.command in ("run", *STAGE_HELP):
            until = "report" if options.command == "run" else options.command
            for name in ("threads", "memory"):
                if getattr(options, name) is not None:
                    rest += [f"--run.{name}", getattr(options, name)]
            if getattr(options, "masks", None) is not None:
                return _segment(options, rest, given)
            return _run(options.recipe, rest, until, given)
        if options.command == "refine":
            return _refine(options, rest, given)
        if rest:
            parser.error(f"unknown arguments: {' '.join(rest)}")
        if options.command == "demo":
            return _demo(options, given)
        if options.command == "report":
            return _write_report(options)
        if options.command == "explain":
            return _explain(options, given)
        if options.command == "serve":
            return _serve(options)
        if options.command == "predict":
            return _predict(options, given)
        if options.command == "export":
            return _export(options, given)
        if options.command in ("data", "import"):
            return run_command(options, given)
        if options.command == "voc-server":
            return _voc_server(options)
        if options.command == "convert":
            return _convert(options)
        if options.command == "init":
            return _init(options)
        if options.command == "pretrain":
            return _pretrain(options)
        return _show_recipe(options)
    except LpcamError as error:
        print(f"lpcam: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # of "| head": whoever reads has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        goes_on = options.command in ("run", "demo", "refine", *STAGE_HELP)
        told = "lpcam: stopped; the same command goes on from here" if goes_on else "lpcam: stopped"
        print(told, file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lpcam",
        description="Object masks from image-level labels, with class activation maps that show "
        "the whole object (LPCAM).",
    )
    parser.add_argument("--version", action="version", version=f"lpcam {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    overrides = (
        "Any value of the recipe can be replaced: --section.key value, e.g. --lpcam.tau 0.25 "
        "--run.folder runs/try. Values are YAML."
    )
    for name, text in {
        "run": "everything, from labels to scored seed masks and their report",
        **STAGE_HELP,
    }.items():
        command = commands.add_parser(name, help=text, epilog=overrides, allow_abbrev=False)
        command.add_argument("recipe", help="a recipe file, or the name of a bundled recipe")
        command.add_argument(
            "--threads", metavar="N", help="images worked on at a time (run.threads)"
        )
        command.add_argument(
            "--memory", metavar="GIB", help="that each process may keep (run.memory)"
        )
        if name == "segment":
            command.add_argument(
                "--masks", type=Path, help="folder of masks that another program made, ID.png"
            )
    demo = commands.add_parser("demo", help="draw the bundled data set and run LPCAM on it")
    demo.add_argument("--folder", type=Path, default=Path("runs/demo"), help="of the run")
    demo.add_argument("--threads", type=from_one, help="of the numerics")
    refine = commands.add_parser(
        "refine",
        help="make pseudo masks of maps that another program made",
        epilog=overrides,
        allow_abbrev=False,
    )
    refine.add_argument("recipe", help="a recipe file, or the name of a bundled recipe")
    refine.add_argument("maps", type=Path, help="folder of npz map files, one an image")
    report = commands.add_parser("report", help="make the report of a finished run again")
    report.add_argument("run", type=Path, metavar="RUN", help="the folder of the run")
    report.add_argument("--device", help="that looks for the nearest patches (run.device)")
    _explain_parser(commands.add_parser("explain", help="map and mask new images"))
    serve = commands.add_parser("serve", help="a page on this machine to drop photographs on")
    serve.add_argument("run", type=Path, metavar="RUN", help="the folder of a run")
    serve.add_argument("--port", type=int, default=8765, help="on 127.0.0.1; 0 takes a free one")
    serve.add_argument("--threads", type=from_one, help="of the numerics")
    serve.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    _segmenter_parsers(commands)
    add_parsers(commands)
    init = commands.add_parser("init", help="check a folder of images and write a recipe for it")
    init.add_argument(
        "folder",
        type=Path,
        help="images with labels.csv (image,labels), labels.jsonl or a folder a class; VOC2012; "
        "COCO's annotations, or one JSON file of them",
    )
    add_reading(init)
    init.add_argument("--backbone", default="mobilenetv2_100", help="a timm model")
    init.add_argument("--weights", default="pretrained", help="'pretrained' or a safetensors file")
    show = commands.add_parser("recipe", help="print a bundled recipe, or list them")
    show.add_argument("name", nargs="?")
    show.add_argument("--fields", action="store_true", help="list every key and what it means")
    pretrain = commands.add_parser("pretrain", help="make the demo's small backbone again")
    pretrain.add_argument("output", type=Path, help="safetensors file to write")
    pretrain.add_argument("--seed", type=int, default=0)
    pretrain.add_argument("--steps", type=int, default=None)
    pretrain.add_argument("--threads", type=from_one, default=1)
    return parser


def _explain_parser(command: argparse.ArgumentParser) -> None:
    command.add_argument("images", type=Path, nargs="+", metavar="IMAGE", help="file or folder")
    model = command.add_mutually_exclusive_group(required=True)
    model.add_argument("--run", type=Path, help="folder of a run whose classifier is used")
    model.add_argument("--model", help="a timm model, or a classifier's safetensors file")
    command.add_argument("--prototypes", type=Path, help="of --model, as LPCAM.save wrote them")
    command.add_argument("--weights", help="of a timm model: a safetensors file, not timm's own")
    command.add_argument("--preset", help="of --model: scales, flip and thresholds")
    command.add_argument(
        "--scoring",
        choices=("sigmoid", "softmax"),
        help="of --model (default: softmax of a timm model, sigmoid of a file)",
    )
    labels = command.add_mutually_exclusive_group()
    labels.add_argument("--labels", help="classes to map, e.g. cat,dog; else those it predicts")
    labels.add_argument(
        "--score", type=_fraction, default=0.5, help="predicted are classes above it (default 0.5)"
    )
    command.add_argument(
        "--at-least-one", action="store_true", help="take the highest where no class is above"
    )
    command.add_argument("--threshold", type=_fraction, help="of the masks; else the recipe's")
    command.add_argument("--output", type=Path, default=Path("explained"), help="folder")
    command.add_argument("--threads", type=from_one, help="images worked on at a time")
    command.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")


def _segmenter_parsers(commands: Any) -> None:
    predict = commands.add_parser("predict", help="segment new images with a run's segmenter")
    predict.add_argument("images", type=Path, nargs="+", metavar="IMAGE", help="file or folder")
    predict.add_argument("--run", type=Path, required=True, help="the folder of the run")
    predict.add_argument("--output", type=Path, default=Path("predicted"), help="folder")
    predict.add_argument("--probabilities", action="store_true", help="keep them, as npz files")
    predict.add_argument("--no-crf", action="store_true", help="without the recipe's dense CRF")
    predict.add_argument("--threads", type=from_one, help="images worked on at a time")
    predict.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    export = commands.add_parser(
        "export",
        help="write a run's masks or maps for other tools, its segmenter, or its classifier",
    )
    export.add_argument(
        "what",
        choices=("masks", "maps", "segmenter", "onnx", "torch-export"),
        help="masks or maps in the format of --format, the segmenter as ONNX, or classifier and "
        "prototypes as ONNX or a torch.export program",
    )
    export.add_argument("run", type=Path, metavar="RUN", help="the folder of the run")
    export.add_argument("output", type=Path, help="file to write; of masks and maps a folder")
    export.add_argument(
        "--format",
        choices=(*MASK_FORMATS, *MAP_FORMATS),
        help="of masks: " + ", ".join(MASK_FORMATS) + "; of maps: " + ", ".join(MAP_FORMATS),
    )
    export.add_argument(
        "--from",
        dest="source",
        metavar="FOLDER",
        help="which of the run's, e.g. seeds, pseudo/cam, test/lpcam; of maps lpcam, cam, ...",
    )
    export.add_argument(
        "--instances", action="store_true", help="of masks: an object is a connected component"
    )
    export.add_argument(
        "--background", type=_fraction, help="of maps as amn or psa-crf: the score of every pixel"
    )
    export.add_argument(
        "--bare-digits", action="store_true", help="of maps: COCO's files are 000000000009.npy"
    )
    export.add_argument(
        "--image-root",
        metavar="PREFIX",
        help="of masks as label-studio: the images' folder below the one that it serves",
    )
    export.add_argument(
        "--threads", type=from_one, help="of masks and maps: images worked on at a time"
    )
    export.add_argument(
        "--size",
        type=int,
        nargs=2,
        metavar=("HEIGHT", "WIDTH"),
        help="of every image, in pixels (default: any; UperNet needs one)",
    )
    server = commands.add_parser("voc-server", help="pack the tested masks for VOC's test server")
    server.add_argument("run", type=Path, metavar="RUN", help="the folder of the run")
    server.add_argument("output", type=Path, help="folder to write")
    server.add_argument("--no-crf", action="store_true", help="the masks before the dense CRF")
    for command in (predict, export, server):
        command.add_argument(
            "--trained-on",
            choices=("lpcam", "cam", "given", "truth"),
            help="which of the run's segmenters, by its masks (default: the first there is)",
        )
    convert = commands.add_parser(
        "convert", help="convert pickled weights to safetensors, without running code from them"
    )
    convert.add_argument("source", type=Path, help=".pth, .pt or .pkl file")
    convert.add_argument("target", type=Path, help="safetensors file to write")
    convert.add_argument("--prefix", default="", help="take only names that begin so, and drop it")


def _fraction(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not from 0 to 1")
    return value


def parse_overrides(rest: Sequence[str]) -> list[tuple[str, str]]:
    """Turn ``--section.key value`` and ``--section.key=value`` into pairs.

    Raises:
        RecipeError: naming the argument that is neither.
    """
    pairs: list[tuple[str, str]] = []
    waiting: str | None = None
    for word in rest:
        if waiting is not None:
            pairs.append((waiting, word))
            waiting = None
        elif word.startswith("--") and "=" in word:
            key, _, value = word[2:].partition("=")
            pairs.append((key, value))
        elif word.startswith("--"):
            waiting = word[2:]
        else:
            raise RecipeError(
                f"unexpected argument {word!r}; replace a recipe's value with --section.key value"
            )
    if waiting is not None:
        raise RecipeError(f"--{waiting} has no value; write --{waiting} VALUE")
    return pairs


def _recipe_comes_first(given: Sequence[str], source: str) -> None:
    if given[1] != source:  # of a value before the recipe argparse thinks it is the recipe
        raise RecipeError(
            f"the recipe comes first: lpcam {given[0]} RECIPE --section.key value; got "
            f"{given[1]!r} in its place"
        )


def _run(source: str, rest: Sequence[str], until: Any, given: Sequence[str]) -> int:
    _recipe_comes_first(given, source)
    from lpcam.recipe import load_recipe  # noqa: PLC0415 - after the arguments are known good

    recipe = load_recipe(source, parse_overrides(rest))
    from lpcam.pipeline import run  # noqa: PLC0415
    from lpcam.processes import is_first, leave  # noqa: PLC0415

    if not is_first():  # one process speaks for all of them
        logging.getLogger().setLevel(logging.WARNING)
    result = run(recipe, until=until, command=shlex.join(["lpcam", *given]))
    if is_first():
        _report(result)
    leave()
    return 0


def _demo(options: argparse.Namespace, given: Sequence[str]) -> int:
    from lpcam.demo import demo  # noqa: PLC0415

    _report(demo(options.folder, options.threads, shlex.join(["lpcam", *given])))
    return 0


def _refine(options: argparse.Namespace, rest: Sequence[str], given: Sequence[str]) -> int:
    from lpcam.pipeline import refine  # noqa: PLC0415

    return _on_files(refine, options.maps, "refined", options, rest, given)


def _segment(options: argparse.Namespace, rest: Sequence[str], given: Sequence[str]) -> int:
    from lpcam.pipeline import segment  # noqa: PLC0415

    return _on_files(segment, options.masks, "segmented", options, rest, given)


def _on_files(
    work: Callable[..., RunResult],
    folder: Path,
    suffix: str,
    options: argparse.Namespace,
    rest: Sequence[str],
    given: Sequence[str],
) -> int:
    """Work on the maps or masks of another program, in a run folder of its own."""
    _recipe_comes_first(given, options.recipe)
    from lpcam.recipe import load_recipe  # noqa: PLC0415

    pairs = parse_overrides(rest)
    if "run.folder" not in dict(pairs):  # not that of the recipe's own maps
        name = load_recipe(options.recipe, pairs).name
        pairs.append(("run.folder", f"runs/{name}-{suffix}"))
    recipe = load_recipe(options.recipe, pairs)
    from lpcam.processes import is_first, leave  # noqa: PLC0415

    result = work(recipe, folder, command=shlex.join(["lpcam", *given]))
    if is_first():
        _report(result)
    leave()
    return 0


def _write_report(options: argparse.Namespace) -> int:
    from lpcam.pipeline import report  # noqa: PLC0415

    print(f"report in {report(options.run, device=options.device)}")
    return 0


def _explain(options: argparse.Namespace, given: Sequence[str]) -> int:
    of_model = ("prototypes", "weights", "preset", "scoring")
    if options.run is not None:
        unfit = [f"--{name}" for name in of_model if getattr(options, name) is not None]
        if unfit:
            raise LpcamError(f"{unfit[0]} belongs to --model; a run has its own")
    elif options.prototypes is None:
        raise LpcamError("--model needs --prototypes FILE, as LPCAM.save wrote it")
    from lpcam.explain.explainer import Explainer  # noqa: PLC0415
    from lpcam.explain.files import explain_files  # noqa: PLC0415
    from lpcam.resources import available_threads  # noqa: PLC0415

    explainer = (
        Explainer.from_run(options.run, device=options.device)
        if options.run is not None
        else Explainer.from_files(
            options.model,
            options.prototypes,
            weights=options.weights or "pretrained",
            preset=options.preset,
            scoring=options.scoring,
            device=options.device,
        )
    )
    result = explain_files(
        explainer,
        options.images,
        options.output,
        labels=None if options.labels is None else [n.strip() for n in options.labels.split(",")],
        minimum_score=options.score,
        at_least_one=options.at_least_one,
        threshold=options.threshold,
        workers=options.threads or available_threads(),
        command=shlex.join(["lpcam", *given]),
    )
    print(result.summary())
    return 1 if result.skipped else 0


def _serve(options: argparse.Namespace) -> int:
    from lpcam.explain.explainer import Explainer  # noqa: PLC0415
    from lpcam.serve import serve  # noqa: PLC0415

    explainer = Explainer.from_run(options.run, device=options.device)
    with contextlib.suppress(KeyboardInterrupt):  # Ctrl-C stops the server
        serve(explainer, port=options.port, threads=options.threads)
    return 0


def _predict(options: argparse.Namespace, given: Sequence[str]) -> int:
    from lpcam.resources import available_threads, choose_device  # noqa: PLC0415
    from lpcam.segmentation.files import segment_files  # noqa: PLC0415
    from lpcam.segmentation.segmenter import Segmenter  # noqa: PLC0415
    from lpcam.stages.context import GPU_THREADS  # noqa: PLC0415
    from lpcam.stages.segment import find_segmenter  # noqa: PLC0415
    from lpcam.storage import digest_file  # noqa: PLC0415

    found = find_segmenter(options.run, options.trained_on)
    settings = found.section.test
    device = choose_device(options.device)
    threads = options.threads or available_threads()
    if options.no_crf:
        settings = settings.model_copy(update={"crf": None})
    result = segment_files(
        Segmenter.load(found.path).to(device),
        options.images,
        options.output,
        settings,
        probabilities=options.probabilities,
        maximum_side=found.recipe.maps.maximum_side,
        workers=threads if device.type == "cpu" else min(threads, GPU_THREADS),
        command=shlex.join(["lpcam", *given]),
        made_by={
            "run": found.recipe.name,
            "trained_on": found.name,
            "segmenter": digest_file(found.path),
        },
    )
    print(result.summary())
    return 1 if result.skipped else 0


def _export_classifier(options: argparse.Namespace) -> int:
    from lpcam import head  # noqa: PLC0415

    if options.trained_on is not None:
        raise LpcamError("--trained-on chooses among segmenters; leave it out for a classifier")
    write = head.export_onnx if options.what == "onnx" else head.export_program
    return _exported(write(head.LPCAMModel.from_run(options.run), options.output, **_size(options)))


def _exported(parity: ExportParity) -> int:
    """Print what was written, and how far it differs from the model."""
    print(f"wrote {parity.path}, {'of any size' if parity.dynamic else 'of one size'}")
    if parity.checked:
        errors = (f"{output} by {error:.1e}" for output, error in parity.errors.items())
        print(f"largest differences from the model: {', '.join(errors)}")
    else:
        print("not checked: onnxruntime is not installed")
    return 0


def _size(options: argparse.Namespace) -> dict[str, Any]:
    """The one size of an exported file, where one is wanted."""
    return {} if options.size is None else {"size": tuple(options.size), "dynamic": False}


def _export(options: argparse.Namespace, given: Sequence[str]) -> int:
    if options.what in ("masks", "maps"):
        return export(options, given)
    unfit = [
        name
        for name, value in (
            ("format", options.format),
            ("from", options.source),
            ("instances", options.instances),
            ("background", options.background is not None),
            ("bare-digits", options.bare_digits),
            ("image-root", options.image_root is not None),
            ("threads", options.threads is not None),
        )
        if value
    ]
    if unfit:
        raise LpcamError(f"--{unfit[0]} belongs to masks and maps; leave it out")
    if options.what != "segmenter":
        return _export_classifier(options)
    from lpcam.networks.registry import NETWORKS  # noqa: PLC0415
    from lpcam.segmentation.export import export_onnx  # noqa: PLC0415
    from lpcam.segmentation.segmenter import Segmenter  # noqa: PLC0415
    from lpcam.stages.segment import find_segmenter  # noqa: PLC0415

    found = find_segmenter(options.run, options.trained_on)
    network = NETWORKS[found.section.network]
    if options.size is None and network.one_size_export:
        raise LpcamError(
            f"{network.title} can only be exported for one image size; give it: --size 512 512"
        )
    made_by = {"run": found.recipe.name, "trained_on": found.name}
    return _exported(
        export_onnx(Segmenter.load(found.path), options.output, made_by=made_by, **_size(options))
    )


def _voc_server(options: argparse.Namespace) -> int:
    from lpcam.segmentation.files import write_voc_server  # noqa: PLC0415
    from lpcam.segmentation.segmenter import Segmenter  # noqa: PLC0415
    from lpcam.stages.segment import CRF, find_segmenter  # noqa: PLC0415

    found = find_segmenter(options.run, options.trained_on)
    with_crf = found.section.test.crf is not None and not options.no_crf
    masks = found.tested / CRF if with_crf else found.tested
    ids = sorted(path.stem for path in masks.glob("*.png"))
    if not ids:
        raise LpcamError(f"there is no mask in {masks}; bring the run up to date first")
    archive = write_voc_server(masks, ids, Segmenter.load(found.path).classes, options.output)
    print(f"{len(ids)} masks in {archive}")
    return 0


def _convert(options: argparse.Namespace) -> int:
    from lpcam.pickles import convert_weights  # noqa: PLC0415

    print(convert_weights(options.source, options.target, prefix=options.prefix).summary())
    return 0


def _init(options: argparse.Namespace) -> int:
    from lpcam.starting import write_recipe  # noqa: PLC0415

    path, summary = write_recipe(
        options.folder, options.backbone, options.weights, **reading(options)
    )
    print(summary)
    print(f"\nwrote {path}\nnext: lpcam run {shlex.quote(str(path))}")
    return 0


def _pretrain(options: argparse.Namespace) -> int:
    from lpcam.pretraining import STEPS, pretrain  # noqa: PLC0415

    pretrain(
        options.output,
        seed=options.seed,
        steps=options.steps or STEPS,
        threads=options.threads,
        report=print,
    )
    return 0


def _show_recipe(options: argparse.Namespace) -> int:
    from importlib import resources  # noqa: PLC0415

    from lpcam.recipe import bundled_recipes, describe_fields  # noqa: PLC0415

    if options.fields:
        for key, kind, meaning in describe_fields():
            print(f"{key}  ({kind})\n    {meaning}" if meaning else f"{key}  ({kind})")
        return 0
    names = bundled_recipes()
    if options.name is None:
        print("\n".join(names))
        return 0
    if options.name not in names:
        raise RecipeError(f"no bundled recipe {options.name!r}; there are {', '.join(names)}")
    print(resources.files("lpcam").joinpath("recipes", f"{options.name}.yaml").read_text("utf-8"))
    return 0


def _report(result: RunResult) -> None:
    """Print the rows, what was skipped, and where things are."""
    if result.rows:
        from rich.console import Console  # noqa: PLC0415
        from rich.table import Table  # noqa: PLC0415

        maps = [row for row in result.rows if row["stage"] != "segmentation"]
        networks = [row for row in result.rows if row["stage"] == "segmentation"]
        console = Console(width=None if sys.stdout.isatty() else 120)
        for rows, has_threshold in ((maps, True), (networks, False)):
            if not rows:
                continue
            first = rows[0]
            table = Table(
                title=f"{first['dataset']} {first['split']}, {first['images']} images, percent"
            )
            table.add_column("method")
            for name in ("threshold", "chosen by") if has_threshold else ():
                table.add_column(name, justify="right" if name == "threshold" else "left")
            parts = sorted(first.get("part_coverage", {}))
            for name in ("mIoU", "FP", "FN", "precision", "recall", *parts):
                table.add_column(name, justify="right")
            for row in rows:
                numbers = [row[k] for k in ("miou", "fp", "fn", "precision", "recall")]
                numbers += [row["part_coverage"].get(name, float("nan")) for name in parts]
                chosen = (
                    [f"{row['threshold']:.2f}", row["threshold_source"]] if has_threshold else []
                )
                table.add_row(
                    row["method"],
                    *chosen,
                    *(f"{100 * n:.1f}" for n in numbers),
                )
            console.print(table)
    if result.skipped:
        print(f"{len(result.skipped)} skipped:")
        for skip in result.skipped:
            print(f"  {skip['id']}: {skip['reason']}")
    print(f"results in {result.folder}")
    if result.report is not None:
        print(f"report in {result.report}")
