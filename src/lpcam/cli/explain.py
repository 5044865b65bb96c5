"""Commands for new images: explain, serve, predict."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
    names,
    resources,
)
from lpcam.runtime.errors import LpcamError

if TYPE_CHECKING:
    from lpcam.explain.explainer import Explainer

explanations = Lazy("lpcam.explain.folders")
page = Lazy("lpcam.explain.serve.app")
segmentation = Lazy("lpcam.segmentation.folders")
segmenters = Lazy("lpcam.segmentation.segmenter")

IMAGES = Argument(
    "images", type=Path, nargs="+", metavar="IMAGE", help="Image files or folders of them."
)


@command(
    "explain",
    IMAGES,
    Argument("--run", type=Path, help="Folder of a run whose classifier is used."),
    Argument("--model", help="A timm model or a classifier's safetensors file, instead of --run."),
    Argument("--prototypes", type=Path, help="Prototypes of --model, as LPCAM.save wrote them."),
    Argument("--weights", help="Safetensors file with the weights of a timm model."),
    Argument("--preset", help="Preset of --model: scales, flip and thresholds."),
    Argument(
        "--scoring",
        choices=("sigmoid", "softmax"),
        help="How --model scores classes (default: softmax for a timm model, sigmoid for a file).",
    ),
    Argument("--labels", type=names, help="Classes, e.g. cat,dog (default: the predicted ones)."),
    Argument("--score", type=fraction, help="Lowest score of a predicted class (default: 0.5)."),
    Argument(
        "--at-least-one", action="store_true", help="Map the top class if no class is predicted."
    ),
    Argument("--threshold", type=fraction, help="Threshold of the masks (default: the recipe's)."),
    Argument(
        "--fast", action="store_true", help="Map at scale 1 without the mirror image: coarser maps."
    ),
    Argument("--output", type=Path, default=Path("explained"), help="Folder to write."),
    THREADS,
    DEVICE,
    group="look",
)
def explain(
    call: Invocation,
    images: list[Path],
    labels: list[str] | None,
    score: float | None,
    at_least_one: bool,
    threshold: float | None,
    fast: bool,
    output: Path,
    **source: Any,
) -> int:
    """Map and mask new images."""
    if labels is not None and score is not None:
        raise LpcamError("--score chooses classes, and --labels names them; give one of the two")
    explainer = _explainer(**source)
    result = explanations.explain_files(
        explainer.fast() if fast else explainer,
        images,
        output,
        labels=labels,
        minimum_score=0.5 if score is None else score,
        at_least_one=at_least_one,
        threshold=threshold,
        workers=call.threads,
        command=call.line,
    )
    print(result.summary())
    return 1 if result.skipped else 0


def _explainer(
    run: Path | None, model: str | None, prototypes: Path | None, device: str, **of_model: Any
) -> Explainer:
    if (run is None) == (model is None):
        raise LpcamError("give either --run FOLDER or --model NAME")
    if run is not None:
        for name, value in {"prototypes": prototypes, **of_model}.items():
            if value is not None:
                raise LpcamError(f"--{name} belongs to --model; a run has its own")
        return lpcam.RunFolder(run).explainer(device=device)
    if prototypes is None:
        raise LpcamError("--model needs --prototypes FILE, as LPCAM.save wrote it")
    of_model["weights"] = of_model["weights"] or "pretrained"
    return lpcam.Explainer.from_files(str(model), prototypes, device=device, **of_model)


@command(
    "serve",
    RUN,
    Argument("--port", type=int, default=8765, help="Port on 127.0.0.1; 0 takes a free one."),
    THREADS,
    DEVICE,
    group="look",
)
def serve(call: Invocation, run: Path, port: int, device: str) -> int:
    """Serve a local page that explains uploaded images."""
    with contextlib.suppress(KeyboardInterrupt):  # Ctrl-C ends it
        folder = lpcam.RunFolder(run)
        explainer = folder.explainer(device=device)
        page.serve(explainer, port=port, threads=call.given_threads, patch=folder.patch)
    return 0


@command(
    "predict",
    IMAGES,
    Argument("--run", type=Path, required=True, help="Folder of the run."),
    Argument("--output", type=Path, default=Path("predicted"), help="Folder to write."),
    Argument("--probabilities", action="store_true", help="Keep the probabilities, as npz files."),
    Argument("--no-crf", action="store_true", help="Leave out the recipe's dense CRF."),
    TRAINED_ON,
    THREADS,
    DEVICE,
    group="use",
)
def predict(
    call: Invocation,
    images: list[Path],
    run: Path,
    output: Path,
    probabilities: bool,
    no_crf: bool,
    trained_on: str | None,
    device: str,
) -> int:
    """Segment new images with a run's segmenter."""
    found = lpcam.RunFolder(run).segmenters(trained_on)
    settings = found.section.test.model_copy(update={"crf": None} if no_crf else {})
    chosen = resources.choose_device(device)
    result = segmentation.segment_files(
        segmenters.Segmenter.load(found.path).to(chosen),
        images,
        output,
        settings,
        probabilities=probabilities,
        maximum_side=found.recipe.maps.maximum_side,
        workers=resources.threads_beside(chosen, call.threads),
        command=call.line,
        reading=found.recipe.data.reading_of_images,
        made_by=found.made_by,
    )
    print(result.summary())
    return 1 if result.skipped else 0
