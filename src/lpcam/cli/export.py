"""Commands that write files for other programs: export, convert."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import lpcam
from lpcam.cli.command import (
    RUN,
    SIZE,
    THREADS,
    TRAINED_ON,
    Invocation,
    argument,
    command,
    fraction,
    size_options,
)
from lpcam.formats.registry import FORMATS, MAP_FORMATS
from lpcam.runtime.errors import LpcamError

if TYPE_CHECKING:
    from lpcam.formats.models.onnx import ExportParity

OUTPUT = argument("output", type=Path, help="Folder to write.")
FILE = argument("output", type=Path, help="File to write.")
FROM = argument(
    "--from",
    dest="source",
    metavar="RESULT",
    help="Which of the run's, e.g. seeds, pseudo/cam, test/lpcam (masks); lpcam, cam (maps).",
)


@contextmanager
def _progress(label: str, total: int) -> Iterator[Callable[[int, int], None]]:
    from lpcam.runtime.progress import progress  # noqa: PLC0415

    with progress(label, total) as advance:
        yield lambda _done, _total: advance(1, "")


@command(
    "export masks",
    "exchange",
    RUN,
    OUTPUT,
    argument("--format", required=True, choices=FORMATS, metavar="FORMAT", help="%(choices)s."),
    FROM,
    argument("--instances", action="store_true", help="Make each connected component an object."),
    argument(
        "--image-root",
        metavar="PREFIX",
        help="label-studio: the images' folder below the one that it serves.",
    ),
    THREADS,
)
def export_masks(call: Invocation) -> int:
    """Write a run's masks in the format of another tool."""
    from lpcam.formats.masks.export import export_masks as write  # noqa: PLC0415

    options = call.options
    masks = lpcam.RunFolder(options.run).masks(options.source)
    with _progress(f"masks of {masks.name}", len(masks.entries)) as advance:
        result = write(
            masks.entries,
            masks.classes,
            options.output,
            options.format,
            instances=options.instances,
            image_root=options.image_root,
            made_by={**masks.made_by, "command": call.line},
            workers=call.threads,
            progress=advance,
        )
    print(result.summary())
    return 1 if result.left_out else 0


@command(
    "export maps",
    "exchange",
    RUN,
    OUTPUT,
    argument("--format", required=True, choices=MAP_FORMATS, metavar="FORMAT", help="%(choices)s."),
    FROM,
    argument(
        "--background", type=fraction, help="amn, psa-crf: the background's score of every pixel."
    ),
    argument("--bare-digits", action="store_true", help="Name COCO's files 000000000009.npy."),
    THREADS,
)
def export_maps(call: Invocation) -> int:
    """Write a run's maps for IRN, AMN or PSA."""
    from lpcam.formats.map_folders import export_maps as write  # noqa: PLC0415

    options = call.options
    maps = lpcam.RunFolder(options.run).maps(options.source)
    with _progress(f"maps of {maps.name}", len(maps.ids)) as advance:
        written = write(
            maps.folder,
            options.output,
            options.format,
            maps.ids,
            classes=maps.classes,
            background=options.background,
            bare_digits=options.bare_digits,
            workers=call.threads,
            progress=advance,
        )
    print(written.summary())
    if maps.missing:
        total = len(maps.missing) + len(maps.ids)
        print(
            f"{len(maps.missing)} of {total} images have no map in {maps.folder}, such as "
            f"{maps.missing[0]}; bring the run up to date first"
        )
    return 1 if maps.missing else 0


@command("export onnx", "exchange", RUN, FILE, SIZE)
def export_onnx(call: Invocation) -> int:
    """Write classifier and prototypes as one ONNX file."""
    from lpcam.formats.models.exporters import export_onnx as write  # noqa: PLC0415

    return _classifier(call, write)


@command("export torch-export", "exchange", RUN, FILE, SIZE)
def export_program(call: Invocation) -> int:
    """Write classifier and prototypes as a torch.export program."""
    from lpcam.formats.models.exporters import export_program as write  # noqa: PLC0415

    return _classifier(call, write)


def _classifier(call: Invocation, write: Callable[..., ExportParity]) -> int:
    options = call.options
    return _print(
        write(lpcam.RunFolder(options.run).model(), options.output, **size_options(options))
    )


@command("export segmenter", "exchange", RUN, FILE, SIZE, TRAINED_ON)
def export_segmenter(call: Invocation) -> int:
    """Write a run's segmenter as an ONNX file."""
    from lpcam.segmentation.export import export_onnx as write  # noqa: PLC0415
    from lpcam.segmentation.networks.registry import NETWORKS  # noqa: PLC0415

    options = call.options
    found = lpcam.RunFolder(options.run).segmenters(options.trained_on)
    network = found.section.network
    if options.size is None and NETWORKS[network].one_size_export:
        raise LpcamError(f"{network} is exported for images of one size; give it: --size 512 512")
    return _print(
        write(found.load(), options.output, made_by=found.made_by, **size_options(options))
    )


def _print(parity: ExportParity) -> int:
    """Print what was written, and how it compares with the model where that was checked."""
    print(f"wrote {parity.path}, for images of {'any' if parity.dynamic else 'one'} size")
    if parity.checked:
        errors = ", ".join(f"{name} {error:.2g}" for name, error in parity.errors.items())
        print(f"largest difference from the model: {errors}")
    else:
        print("not compared with the model: onnxruntime is not installed")
    return 0


@command(
    "export voc-server",
    "exchange",
    RUN,
    OUTPUT,
    argument("--no-crf", action="store_true", help="Take the masks before the dense CRF."),
    TRAINED_ON,
)
def export_voc_server(call: Invocation) -> int:
    """Pack the tested masks for VOC's evaluation server."""
    from lpcam.formats.voc_server import write_voc_server  # noqa: PLC0415

    options = call.options
    found = lpcam.RunFolder(options.run).segmenters(options.trained_on)
    masks = found.tested(crf=not options.no_crf)
    ids = sorted(path.stem for path in masks.glob("*.png"))
    if not ids:
        raise LpcamError(f"there is no mask in {masks}; bring the run up to date first")
    archive = write_voc_server(masks, ids, found.load().classes, options.output)
    print(f"{len(ids)} masks in {archive}")
    return 0


@command(
    "convert",
    "exchange",
    argument("source", type=Path, help="A .pth, .pt or .pkl file."),
    argument("target", type=Path, help="Safetensors file to write."),
    argument(
        "--prefix", default="", help="Take only the tensors whose names begin so, and drop it."
    ),
)
def convert(call: Invocation) -> int:
    """Convert pickled weights to safetensors, without executing code from them."""
    from lpcam.formats.weights import convert_weights  # noqa: PLC0415

    options = call.options
    found = convert_weights(options.source, options.target, prefix=options.prefix)
    print(found.summary())
    return 0
