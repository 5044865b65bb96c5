"""``lpcam label-studio``: Label Studio's machine-learning backend, with the masks of a run.

A program on this machine asks. Images are opened below one folder; addresses are never fetched.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
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
    Queue,
    RefusedError,
    closed_application,
    serve_application,
)
from lpcam.formats.masks.base import regions
from lpcam.formats.masks.label_studio import Tags, region_results
from lpcam.pipeline.datasets import read_dataset
from lpcam.pipeline.run_folder import RunFolder, mask_path
from lpcam.runtime.errors import DataError, LpcamError, import_extra
from lpcam.runtime.resources import available_threads

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.types import ASGIApp

logger = logging.getLogger(__name__)
_STORED = ("ANNOTATION_CREATED", "ANNOTATION_UPDATED")  # events that hold an annotation


def serve(
    folder: RunFolder,
    *,
    images: Path | None = None,
    fast: bool = False,
    device: str = "auto",
    port: int = 9090,
    threads: int | None = None,
) -> None:
    """Serve the backend of a run until interrupted.

    ``images`` is the folder of the images of the tasks, None: that of the run's data. Masks that
    people draw are stored in ``folder.corrected``.
    """
    recipe, explainer = folder.load_recipe(), folder.explainer(device=device)
    items = read_dataset(recipe, ("maps",)).items.values()
    app = partial(
        application,
        explainer.fast() if fast else explainer,
        images or Path(recipe.data.root),
        folder.corrected,
        {item.image.resolve(): item.id for item in items},
        name=recipe.name,
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
    """The web application. ``ids`` are those of the masks in ``corrected``, by image."""
    import_extra("starlette", "serve", NEEDED)
    from starlette.responses import JSONResponse  # noqa: PLC0415 - an extra
    from starlette.routing import Route  # noqa: PLC0415

    find, _ = image_finder(images)
    queue = Queue(threads or available_threads(), ("application/json",))
    classes, version = explainer.classes, f"lpcam {name}"
    values: dict[int | str, int] = dict(
        zip(classes, explainer.mask_ids or range(1, len(classes) + 1), strict=True)
    )

    def setup(asked: Any) -> Any:
        _tags(asked["schema"], classes)
        return {"model_version": version}

    def predict(asked: Any) -> Any:
        tags, names = _tags(asked["label_config"], classes)
        context = (asked.get("params") or {}).get("context") or {}
        results: list[Any] = []
        for task in asked["tasks"]:
            try:
                results.append(predicted(task, context.get("result"), tags, names))
            except LpcamError as error:
                if len(asked["tasks"]) == 1:
                    raise
                logger.warning("task %s: %s", task.get("id"), error)
                results.append([])  # no prediction
        return {"results": results}

    def predicted(task: Any, drawn: Any, tags: Tags, names: Sequence[str]) -> Any:
        given = drawn or next((one["result"] for one in task.get("annotations") or ()), ())
        labels = [one for one in dict.fromkeys(given_names(given)) if one in names]
        maps = explainer(find(task), labels=labels or None, at_least_one=True)
        mask, table = maps.mask(), ClassTable(maps.classes, maps.mask_ids)
        objects = [one for one in regions(mask, table) if table.names[one.label] in names]
        return {
            "model_version": version,
            "score": quality(maps.image, mask, maps.mask(method="CAM")),
            "result": region_results(objects, table, maps.size, tags),
        }

    def webhook(asked: Any) -> Any:
        annotation = asked.get("annotation") or {}
        if asked["action"] not in _STORED or annotation.get("was_cancelled"):
            return {"status": "ignored"}
        image = find(asked["task"])
        mask = painted(annotation["result"], upright_size(image, explainer.reading), values)
        own = image.relative_to(images).with_suffix("").as_posix()
        path = mask_path(corrected, ids.get(image.resolve(), own))
        write_mask(path, mask)
        return {"status": f"stored as {path.name}"}

    def answer(work: Callable[[Any], Any]) -> Callable[[Request], Any]:
        def parsed(data: bytes) -> Any:
            try:
                return work(json.loads(data))
            except LpcamError as error:
                logger.warning("refused: %s", error)  # Label Studio shows the status alone
                raise
            except (AttributeError, LookupError, TypeError, ValueError, RecursionError) as error:
                raise RefusedError(
                    422, f"the request is not one of Label Studio's: {error!r}; see its version"
                ) from error

        async def respond(request: Request) -> Response:
            return JSONResponse(await queue.work(request, parsed))

        return respond

    async def health(_request: Request) -> Response:
        return JSONResponse({"status": "UP", "model_class": "LPCAM"})

    posts = {"/setup": setup, "/predict": predict, "/webhook": webhook}
    routes = [Route(path, health) for path in ("/", "/health")]
    routes += [Route(path, answer(work), methods=["POST"]) for path, work in posts.items()]
    return closed_application(routes, port)


def _tags(config: str, classes: Sequence[str]) -> tuple[Tags, list[str]]:
    """The tags of a labelling configuration that take masks, and the classes that they have."""
    if "<!DOCTYPE" in config or "<!ENTITY" in config:
        raise DataError("the labelling configuration has a DOCTYPE or ENTITY; remove it")
    try:
        root = ElementTree.fromstring(config)
    except ElementTree.ParseError as error:
        raise DataError(f"the labelling configuration is no XML: {error}; correct it") from error
    for kind in ("BrushLabels", "PolygonLabels"):
        for tag in root.iter(kind):
            known = {label.get("value") for label in tag.iter("Label")}
            if names := [one for one in classes if one in known]:
                return Tags(tag.attrib["toName"], tag.attrib["name"], kind), names
    raise DataError(
        "the labelling configuration has no BrushLabels or PolygonLabels with a class of the run; "
        f"add one with labels such as {', '.join(classes[:3])}"
    )
