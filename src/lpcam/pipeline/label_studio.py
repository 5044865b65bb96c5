"""``lpcam label-studio``: Label Studio's machine-learning backend, with the masks of a run.

A program on this machine asks. Images are opened below one folder; addresses are never fetched.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from lpcam.data.dataset import ClassTable
from lpcam.data.images import upright_size
from lpcam.data.label_studio import given_names, image_finder, painted
from lpcam.data.masks import write_mask
from lpcam.evaluation.judge import quality
from lpcam.explain.explainer import Explainer
from lpcam.explain.serve.app import (
    NEEDED,
    USUAL_LIMITS,
    Queue,
    closed_application,
    serve_application,
)
from lpcam.formats.masks.base import regions
from lpcam.formats.masks.label_studio import KINDS, Tags, region_results
from lpcam.pipeline.datasets import read_dataset
from lpcam.pipeline.run_folder import RunFolder, mask_path
from lpcam.runtime.errors import DataError, LpcamError, import_extra
from lpcam.runtime.resources import available_threads

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.types import ASGIApp

logger = logging.getLogger(__name__)
STORED = ("ANNOTATION_CREATED", "ANNOTATION_UPDATED")  #: Events that hold an annotation.


def serve(
    folder: RunFolder,
    *,
    images: Path | None = None,
    fast: bool = False,
    device: str = "auto",
    port: int = 9090,
    threads: int | None = None,
) -> None:
    """Serve the backend of a run until interrupted; ``images`` None: those of the run's data."""
    recipe, explainer = folder.load_recipe(), folder.explainer(device=device)
    items = read_dataset(recipe, ("maps",)).items.values()
    app = partial(
        application,
        explainer.fast() if fast else explainer,
        images or Path(recipe.data.root),
        folder.corrected,
        {item.image.resolve(): item.id for item in items},
        name=f"lpcam {recipe.name}",
        threads=threads,
    )
    serve_application(app, port, f"Label Studio backend of {recipe.name}")


def application(
    explainer: Explainer,
    images: Path,
    corrected: Path,
    ids: Mapping[Path, str],
    *,
    name: str,
    port: int,
    threads: int | None = None,
) -> ASGIApp:
    """The web application of a model ``name``.

    Masks that people draw become ``corrected/ID.png``, with the ``ids`` of the run's images; an id
    of another image is its path below ``images``.
    """
    import_extra("starlette", "serve", NEEDED)
    from starlette.responses import JSONResponse  # noqa: PLC0415 - an extra
    from starlette.routing import Route  # noqa: PLC0415

    find, _ = image_finder(images)
    queue = Queue(threads or available_threads(), USUAL_LIMITS)
    queue.kinds = ("application/json",)
    classes = explainer.classes
    values = dict(zip(classes, explainer.mask_ids or range(1, len(classes) + 1), strict=True))

    def setup(asked: Any) -> Any:
        return _tags(asked["schema"], classes) and {"model_version": name}

    def predict(asked: Any) -> Any:
        tags, names = _tags(asked["label_config"], classes)
        context = (asked.get("params") or {}).get("context") or {}
        results: list[Any] = []
        for task in asked["tasks"]:
            given = context.get("result") or [
                r for a in task["annotations"][-1:] for r in a["result"]
            ]
            labels = [one for one in names if one in given_names(given)] or None
            try:
                maps = explainer(find(task), labels=labels, at_least_one=True)
            except LpcamError as error:
                logger.warning("task %s has no prediction: %s", task.get("id"), error)
                results.append([])
                continue
            mask, table = maps.mask(), ClassTable(maps.classes, maps.mask_ids)
            shown = [one for one in regions(mask, table) if table.names[one.label] in names]
            found = region_results(shown, table, maps.size, tags)
            score = quality(maps.image, mask, maps.mask(method="CAM"))
            results.append({"model_version": name, "score": score, "result": found})
        return {"results": results}

    def webhook(asked: Any) -> Any:
        if asked["action"] in STORED and not asked["annotation"].get("was_cancelled"):
            image, drawn = find(asked["task"]), asked["annotation"]["result"]
            mask = painted(drawn, upright_size(image, explainer.reading), values)
            own = image.relative_to(images).with_suffix("").as_posix()
            write_mask(mask_path(corrected, ids.get(image.resolve(), own)), mask)
        return {"status": "ok"}

    def answer(work: Callable[[Any], Any]) -> Callable[[Request], Any]:
        async def respond(request: Request) -> Response:
            try:
                return JSONResponse(await queue.work(request, lambda data: work(json.loads(data))))
            except LpcamError as error:
                logger.warning("refused: %s", error)  # Label Studio shows the status alone
                raise
            except (AttributeError, LookupError, SyntaxError, TypeError, ValueError) as error:
                raise DataError(f"no request of Label Studio: {error!r}; update lpcam") from error

        return respond

    async def health(_request: Request) -> Response:
        return JSONResponse({"status": "UP", "model_class": "LPCAM"})

    works = {"/setup": setup, "/predict": predict, "/webhook": webhook}
    routes = [Route(path, answer(work), methods=["POST"]) for path, work in works.items()]
    return closed_application([Route("/health", health), *routes], port)


def _tags(config: str, classes: Sequence[str]) -> tuple[Tags, Collection[str]]:
    """The tags of a labelling configuration that take masks, and the classes that they name."""
    if "<!DOCTYPE" in config or "<!ENTITY" in config:
        raise DataError("the labelling configuration has a DOCTYPE or ENTITY; remove it")
    for kind in KINDS:
        for tag in ElementTree.fromstring(config).iter(kind):
            known = {label.get("value") for label in tag.iter("Label")}
            if names := [one for one in classes if one in known]:
                return Tags(tag.attrib["toName"], tag.attrib["name"], kind), names
    raise DataError(
        f"the labelling configuration has no {' or '.join(KINDS)} with a class of the run; add "
        f"one with labels such as {', '.join(classes[:3])}"
    )
