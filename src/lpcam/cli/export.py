"""Commands for other programs: export, label-studio, convert."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lpcam
from lpcam.cli.command import (
    DEVICE,
    RUN,
    THREADS,
    TRAINED_ON,
    Argument,
    Invocation,
    Lazy,
    command,
    fraction,
)
from lpcam.cli.data import class_table
from lpcam.formats.registry import FORMATS, MAP_FORMATS
from lpcam.runtime.errors import LpcamError

mask_files = Lazy("lpcam.formats.masks.export")
map_files = Lazy("lpcam.formats.map_folders")
models = Lazy("lpcam.formats.models.lpcam_model")
segmenters = Lazy("lpcam.segmentation.export")
networks = Lazy("lpcam.segmentation.networks.registry")
voc_server = Lazy("lpcam.formats.voc_server")
released = Lazy("lpcam.pipeline.released")
backend = Lazy("lpcam.pipeline.label_studio")
weights = Lazy("lpcam.formats.weights")

OUTPUT = Argument("output", type=Path, help="Folder to write.")
FILE = Argument("output", type=Path, help="File to write.")
FROM = Argument(
    "--from",
    dest="source",
    metavar="RESULT",
    help="Masks (seeds, pseudo/cam, test/lpcam, ...) or maps (lpcam, cam, ...) of the run.",
)
SIZE = Argument(
    "--size",
    type=int,
    nargs=2,
    metavar=("HEIGHT", "WIDTH"),
    help="Size of every image, in pixels (default: any size; UperNet needs one).",
)


@command(
    "export masks",
    RUN,
    OUTPUT,
    Argument("--format", required=True, choices=FORMATS, metavar="FORMAT", help="%(choices)s."),
    FROM,
    Argument("--instances", action="store_true", help="Make each connected component an object."),
    Argument(
        "--separate",
        action="store_true",
        help="As --instances, and separate objects that touch by the parts only their class has.",
    ),
    Argument(
        "--image-root",
        default="",
        metavar="PREFIX",
        help="For Label Studio: folder of the images below the folder that it serves.",
    ),
    THREADS,
)
def export_masks(
    call: Invocation, run: Path, output: Path, source: str | None, separate: bool, **options: Any
) -> int:
    """Write a run's masks in the format of another tool."""
    folder = lpcam.RunFolder(run)
    masks = folder.masks(source)
    if separate:
        options |= {"instances": True, "evidence": folder.explainer().discriminative}
    if folder.recipe.is_file():  # else the masks are those of lpcam predict
        options["judge"] = folder.judge()
    result = mask_files.export_masks(
        masks.entries,
        masks.classes,
        output,
        made_by={**masks.made_by, "command": call.line},
        workers=call.threads,
        **options,
    )
    print(result.summary())
    return 1 if result.left_out else 0


@command(
    "export maps",
    RUN,
    OUTPUT,
    Argument("--format", required=True, choices=MAP_FORMATS, metavar="FORMAT", help="%(choices)s."),
    FROM,
    Argument(
        "--background", type=fraction, help="For amn and psa-crf: background score of every pixel."
    ),
    Argument("--bare-digits", action="store_true", help="Name COCO's files 000000000009.npy."),
    THREADS,
)
def export_maps(
    call: Invocation, run: Path, output: Path, format: str, source: str | None, **options: Any
) -> int:
    """Write a run's maps for IRN, AMN or PSA."""
    maps = lpcam.RunFolder(run).maps(source)
    files = map_files.export_maps(
        maps.folder, output, format, maps.ids, classes=maps.classes, workers=call.threads, **options
    )
    print(f"{len(files)} map files of the style {format} in {output}")
    if maps.missing:
        print(
            f"{len(maps.missing)} of {len(maps.missing) + len(maps.ids)} images have no map in "
            f"{maps.folder}, such as {maps.missing[0]}; bring the run up to date first"
        )
    return 1 if maps.missing else 0


@command("export onnx", RUN, FILE, SIZE)
def export_onnx(call: Invocation, run: Path, output: Path, size: list[int] | None) -> int:
    """Write classifier and prototypes as one ONNX file."""
    return _write(models.export_onnx, lpcam.RunFolder(run).model(), output, size)


@command("export segmenter", RUN, FILE, SIZE, TRAINED_ON)
def export_segmenter(
    call: Invocation, run: Path, output: Path, size: list[int] | None, trained_on: str | None
) -> int:
    """Write a run's segmenter as an ONNX file."""
    found = lpcam.RunFolder(run).segmenters(trained_on)
    network = found.section.network
    if size is None and networks.NETWORKS[network].one_size_export:
        raise LpcamError(f"{network} is exported for images of one size; give it: --size 512 512")
    return _write(segmenters.export_onnx, found.load(), output, size, made_by=found.made_by)


def _write(
    export: Callable[..., Any], network: Any, path: Path, size: list[int] | None, **options: Any
) -> int:
    """Export a network, and print how the file compares with it where that was checked."""
    if size is not None:
        options |= {"size": tuple(size), "dynamic": False}
    parity = export(network, path, **options)
    print(f"wrote {parity.path}, for images of {'any' if parity.dynamic else 'one'} size")
    if parity.checked:
        errors = ", ".join(f"{name} {error:.2g}" for name, error in parity.errors.items())
        print(f"largest difference from the model: {errors}")
    else:
        print("not compared with the model: onnxruntime is not installed")
    return 0


@command(
    "export voc-server",
    RUN,
    OUTPUT,
    Argument("--no-crf", action="store_true", help="Take the masks before the dense CRF."),
    TRAINED_ON,
)
def export_voc_server(
    call: Invocation, run: Path, output: Path, no_crf: bool, trained_on: str | None
) -> int:
    """Pack the tested masks for VOC's evaluation server."""
    found = lpcam.RunFolder(run).segmenters(trained_on)
    masks = found.tested(crf=not no_crf)
    ids = sorted(path.stem for path in masks.glob("*.png"))
    if not ids:
        raise LpcamError(f"there is no mask in {masks}; bring the run up to date first")
    archive = voc_server.write_voc_server(masks, ids, found.load().classes, output)
    print(f"{len(ids)} masks in {archive}")
    return 0


@command("export fiftyone", RUN, OUTPUT, FROM, THREADS)
def export_fiftyone(call: Invocation, run: Path, output: Path, source: str | None) -> int:
    """Write a run's masks, boxes, heat maps and scores for FiftyOne."""
    return export_masks(call, run, output, source, False, format="fiftyone", instances=True)


@command(
    "label-studio",
    RUN,
    Argument("--images", type=Path, help="Folder of the images (default: that of the run's data)."),
    Argument("--fast", action="store_true", help="Map at scale 1 without the mirror image."),
    Argument("--port", type=int, default=9090, help="Port on 127.0.0.1; 0 takes a free one."),
    THREADS,
    DEVICE,
)
def label_studio(call: Invocation, run: Path, **options: Any) -> int:
    """Serve a run's masks to Label Studio, as its machine-learning backend."""
    with contextlib.suppress(KeyboardInterrupt):  # Ctrl-C ends it
        backend.serve(lpcam.RunFolder(run), threads=call.given_threads, **options)
    return 0


@command(
    "convert",
    Argument("source", type=Path, help="A .pth, .pt, .pkl or .safetensors file."),
    Argument("target", type=Path, help="Safetensors file to write."),
    Argument(
        "--prefix", default="", help="Take only tensors whose names begin with it; remove it."
    ),
    Argument(
        "--classes",
        help="Classes of a released network: voc12, coco14, or a file with one name per line "
        "(default: voc12 for 20 classes, coco14 for 80).",
    ),
    Argument(
        "--onto", type=Path, help="Converted classifier whose head is replaced by that of SOURCE."
    ),
)
def convert(
    call: Invocation, source: Path, target: Path, classes: str | None, **options: Any
) -> int:
    """Convert weights to safetensors, without executing code, and recognise released networks."""
    done = weights.convert_weights(
        source,
        target,
        kinds=released.released_kinds(),
        classes=None if classes is None else class_table(classes).names,
        **options,
    )
    print(done)
    return 0
