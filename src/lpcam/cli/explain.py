"""Commands for new images: explain, serve, predict."""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

import lpcam
from lpcam.cli.command import (
    DEVICE,
    RUN,
    THREADS,
    TRAINED_ON,
    Invocation,
    argument,
    command,
    fraction,
    names,
    positive,
)
from lpcam.runtime.errors import LpcamError

if TYPE_CHECKING:
    from lpcam.explain.explainer import Explainer

IMAGES = argument(
    "images", type=Path, nargs="+", metavar="IMAGE", help="Image files or folders of them."
)
OF_MODEL = ("prototypes", "weights", "preset", "scoring")
"""Options that describe a model that is not a run's."""


@command(
    "explain",
    "look",
    IMAGES,
    argument("--run", type=Path, help="Folder of a run whose classifier is used."),
    argument("--model", help="A timm model, or a classifier's safetensors file, instead."),
    argument("--prototypes", type=Path, help="Prototypes of --model, as LPCAM.save wrote them."),
    argument("--weights", help="Safetensors file with the weights of a timm model."),
    argument("--preset", help="Preset of --model: scales, flip and thresholds."),
    argument(
        "--scoring",
        choices=("sigmoid", "softmax"),
        help="How --model scores classes (default: softmax for a timm model, sigmoid for a file).",
    ),
    argument("--labels", type=names, help="Classes to map, e.g. cat,dog; else those predicted."),
    argument(
        "--score",
        type=fraction,
        help="Least score of a predicted class (default: 0.5).",
    ),
    argument(
        "--at-least-one", action="store_true", help="Map the best class where none is predicted."
    ),
    argument("--threshold", type=fraction, help="Threshold of the masks; else the recipe's."),
    argument("--output", type=Path, default=Path("explained"), help="Folder to write."),
    THREADS,
    DEVICE,
)
def explain(call: Invocation) -> int:
    """Map and mask new images."""
    from lpcam.explain.folders import explain_files  # noqa: PLC0415

    options = call.options
    if options.labels is not None and options.score is not None:
        raise LpcamError("--score chooses classes, and --labels names them; give one of the two")
    result = explain_files(
        _explainer(options),
        options.images,
        options.output,
        labels=options.labels,
        minimum_score=0.5 if options.score is None else options.score,
        at_least_one=options.at_least_one,
        threshold=options.threshold,
        workers=call.threads,
        command=call.line,
    )
    print(result.summary())
    return 1 if result.skipped else 0


def _explainer(options: argparse.Namespace) -> Explainer:
    if (options.run is None) == (options.model is None):
        raise LpcamError("give either --run FOLDER or --model NAME")
    if options.run is not None:
        unfit = [name for name in OF_MODEL if getattr(options, name) is not None]
        if unfit:
            raise LpcamError(f"--{unfit[0]} belongs to --model; a run has its own")
        return lpcam.RunFolder(options.run).explainer(device=options.device)
    if options.prototypes is None:
        raise LpcamError("--model needs --prototypes FILE, as LPCAM.save wrote it")
    return lpcam.Explainer.from_files(
        options.model,
        options.prototypes,
        weights=options.weights or "pretrained",
        preset=options.preset,
        scoring=options.scoring,
        device=options.device,
    )


@command(
    "serve",
    "look",
    RUN,
    argument("--port", type=int, default=8765, help="Port on 127.0.0.1; 0 takes a free one."),
    argument("--threads", type=positive, metavar="N", help="Number of CPU threads."),
    DEVICE,
)
def serve(call: Invocation) -> int:
    """Serve a local page that explains uploaded images."""
    from lpcam.explain.serve.app import serve as serve_page  # noqa: PLC0415

    options = call.options
    with contextlib.suppress(KeyboardInterrupt):  # Ctrl-C ends it
        explainer = lpcam.RunFolder(options.run).explainer(device=options.device)
        serve_page(explainer, port=options.port, threads=options.threads)
    return 0


@command(
    "predict",
    "use",
    IMAGES,
    argument("--run", type=Path, required=True, help="Folder of the run."),
    argument("--output", type=Path, default=Path("predicted"), help="Folder to write."),
    argument("--probabilities", action="store_true", help="Keep the probabilities, as npz files."),
    argument("--no-crf", action="store_true", help="Leave out the recipe's dense CRF."),
    TRAINED_ON,
    THREADS,
    DEVICE,
)
def predict(call: Invocation) -> int:
    """Segment new images with a run's segmenter."""
    from lpcam.runtime.resources import choose_device, threads_beside  # noqa: PLC0415
    from lpcam.segmentation.folders import segment_files  # noqa: PLC0415
    from lpcam.segmentation.segmenter import Segmenter  # noqa: PLC0415

    options = call.options
    found = lpcam.RunFolder(options.run).segmenters(options.trained_on)
    settings = found.section.test
    if options.no_crf:
        settings = settings.model_copy(update={"crf": None})
    device = choose_device(options.device)
    result = segment_files(
        Segmenter.load(found.path).to(device),
        options.images,
        options.output,
        settings,
        probabilities=options.probabilities,
        maximum_side=found.recipe.maps.maximum_side,
        workers=threads_beside(device, call.threads),
        command=call.line,
        made_by=found.made_by,
    )
    print(result.summary())
    return 1 if result.skipped else 0
