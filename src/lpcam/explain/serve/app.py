"""``lpcam serve``: a page on this machine that shows the maps of an uploaded photograph.

Requests that name another host (DNS rebinding) or come from another site are refused. Nothing of a
photograph is kept.
"""

from __future__ import annotations

import asyncio
import base64
import json
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from lpcam.data.drawing import HEAT
from lpcam.data.images import Reading, decode_image, limit_long_side, png_bytes
from lpcam.data.masks import voc_palette
from lpcam.data.resize import scaled_size
from lpcam.explain.explainer import MINIMUM_SCORE, Explainer
from lpcam.explain.web import encode_picture, encode_unit, page_environment, page_file
from lpcam.method.choices import Choice
from lpcam.method.image_maps import METHOD_NAMES, ImageMaps, resize_maps
from lpcam.method.prototypes import Prototypes
from lpcam.method.reservoir import SIDES
from lpcam.runtime.errors import ImageError, LpcamError, import_extra
from lpcam.runtime.files import read_bytes
from lpcam.runtime.resources import available_threads

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import BaseRoute
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

T = TypeVar("T")
ADDRESS = "127.0.0.1"
MOST_CLASSES = 24  #: Classes whose maps one answer holds: those of the highest scores.
PLANE_SIDE = 512  #: Long side in pixels of the maps that the page draws.
PICTURE_SIDE = 1024  #: Long side in pixels of the picture that the page shows.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
"""Pillow's readers that are used: formats of photographs that start no other program."""
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; require-trusted-types-for 'script'",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "cache-control": "no-store",
}
NEEDED = "serve needs starlette and uvicorn"


@dataclass(frozen=True)
class Limits:
    """What one upload may cost; larger and later ones are refused."""

    size: int = 32 * 2**20
    """Largest upload in bytes."""
    seconds: float = 60.0
    """Time in which an upload must arrive."""
    waiting: int = 4
    """Uploads in work or waiting; further ones are refused."""
    side: int | None = None
    """Long side in pixels to which images are shrunk, their masks too; None: as they are."""


USUAL_LIMITS = Limits()


class RefusedError(LpcamError):
    """A request that is refused, with its HTTP status."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


def serve(
    explainer: Explainer,
    *,
    port: int = 8765,
    threads: int | None = None,
    patch: Callable[[int, str, int], Path] | None = None,
) -> None:
    """Serve the page of an explainer until interrupted; port 0 is any free one.

    ``patch`` gives the picture of a prototype by class, side and number; those that have one are
    shown, to be corrected.

    LpcamError if the port is taken. Without ``threads``, all that this process may use are used.
    """
    name = str(explainer.made_by.get("run", "a model"))
    app = partial(application, explainer, name=name, threads=threads, patch=patch)
    serve_application(app, port, f"LPCAM of {name}")


def serve_application(application: Callable[..., ASGIApp], port: int, name: str) -> None:
    """Serve the application for a ``port`` of this machine until interrupted."""
    uvicorn = import_extra("uvicorn", "serve", NEEDED)
    with _listen(port) as listener:
        port = listener.getsockname()[1]
        quiet: dict[str, Any] = {"access_log": False, "server_header": False}
        config = uvicorn.Config(
            application(port=port), log_level="warning", lifespan="off", ws="none", **quiet
        )
        print(f"{name} on http://{ADDRESS}:{port}/ (stop with Ctrl+C)", flush=True)
        uvicorn.Server(config).run(sockets=[listener])


def _listen(port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((ADDRESS, port))
    except (OSError, OverflowError) as error:
        listener.close()
        raise LpcamError(
            f"cannot listen on {ADDRESS}:{port}: {error}; choose another --port, or 0 for any"
        ) from None
    return listener


def application(
    explainer: Explainer,
    *,
    name: str,
    port: int,
    threads: int | None = None,
    patch: Callable[[int, str, int], Path] | None = None,
    limits: Limits = USUAL_LIMITS,
    origins: Sequence[str] = (),
    framed_by: Sequence[str] = (),
) -> ASGIApp:
    """The web application; arguments as of :func:`serve`.

    ``origins`` are addresses besides this machine's under which a proxy shows the page, such as
    ``https://demo.example``; ``framed_by`` are those of pages that may show it in a frame.
    """
    import_extra("starlette", "serve", NEEDED)
    from starlette.responses import JSONResponse, Response  # noqa: PLC0415 - an extra
    from starlette.routing import Route  # noqa: PLC0415

    queue = Queue(threads or available_threads(), limits)
    explainers = {"fast": explainer.fast(), "full": explainer}
    about = {
        "name": name,
        "classes": list(explainer.classes),
        "minimum_score": MINIMUM_SCORE,
        "maximum_bytes": limits.size,
        "scales": list(explainer.settings.scales),
        "flip": explainer.settings.flip,
        "heat": HEAT.astype(int).tolist(),
    }

    def static(content: str, kind: str) -> Callable[[Request], Response]:
        return lambda _request: Response(content, media_type=kind)

    def asked(request: Request) -> Explainer:
        quality = request.query_params.get("quality", "fast")
        if quality not in explainers:
            raise RefusedError(422, f"quality must be one of {', '.join(explainers)}")
        return _corrected(explainers[quality], request.query_params.get("choices", "[]"))

    async def maps(request: Request) -> Response:
        chosen = asked(request)

        def work(data: bytes) -> bytes:
            count = len(explainer.classes)
            count = count if count <= MOST_CLASSES else MOST_CLASSES // 2
            found = chosen.highest(_decoded(data, explainer.reading, limits.side), count)
            return bytes(JSONResponse(answer_of(found, explainer)).body)

        return Response(await queue.work(request, work), media_type="application/json")

    async def mask(request: Request) -> Response:
        labels, threshold, method = _mask_request(request.query_params, explainer)
        chosen = asked(request)

        def work(data: bytes) -> bytes:
            found = chosen(_decoded(data, explainer.reading, limits.side), labels=labels)
            return png_bytes(found.mask(threshold, method=method), voc_palette().tobytes())

        return Response(await queue.work(request, work), media_type="image/png")

    async def prototypes(_request: Request) -> Response:
        return JSONResponse(_cards(explainer.prototypes, patch))

    page = page_environment().get_template("serve.html.jinja").render()
    script = page_file("shared.js") + page_file("serve.js")
    routes = [
        Route("/", static(page, "text/html")),
        Route("/page.css", static(page_file("page.css"), "text/css")),
        Route("/page.js", static(script, "text/javascript")),
        Route("/about", static(json.dumps(about), "application/json")),
        Route("/prototypes", prototypes),
        Route("/maps", maps, methods=["POST"]),
        Route("/mask", mask, methods=["POST"]),
    ]
    return closed_application(routes, port, origins, framed_by)


def closed_application(
    routes: Sequence[BaseRoute],
    port: int,
    origins: Sequence[str] = (),
    framed_by: Sequence[str] = (),
) -> ASGIApp:
    """An application that answers this machine's programs and its own page, and tells errors."""
    from starlette.applications import Starlette  # noqa: PLC0415 - an extra
    from starlette.responses import JSONResponse  # noqa: PLC0415

    async def refuse(_request: Request, error: Exception) -> Response:
        if not isinstance(error, LpcamError):
            return JSONResponse({"error": "the server failed; see its terminal"}, 500)
        status = error.status if isinstance(error, RefusedError) else 422
        retry = {"retry-after": "3"} if status == 503 else {}
        return JSONResponse({"error": str(error)}, status, headers=retry)

    app = Starlette(routes=routes, exception_handlers={LpcamError: refuse, Exception: refuse})
    return _only_own_page(app, port, origins, " ".join(framed_by) or "'none'")


def _only_own_page(app: ASGIApp, port: int, origins: Sequence[str], framed_by: str) -> ASGIApp:
    """An application that refuses other hosts and other sites, and adds the security headers."""
    from starlette.datastructures import Headers  # noqa: PLC0415 - an extra
    from starlette.responses import JSONResponse  # noqa: PLC0415

    names = {ADDRESS, "localhost"}
    own_hosts = {f"{name}:{port}" for name in names} | (names if port == 80 else set())
    own_origins = {f"http://{host}" for host in own_hosts} | set(origins)
    own_hosts |= {origin.partition("://")[2] for origin in origins}
    policy = HEADERS["content-security-policy"].replace(
        "frame-ancestors 'none'", f"frame-ancestors {framed_by}"
    )
    closed = {**HEADERS, "content-security-policy": policy}

    def refusal(scope: Scope) -> Response | None:
        headers = Headers(scope=scope)
        hosts = headers.getlist("host")
        if len(hosts) != 1 or hosts[0].lower() not in own_hosts:
            return JSONResponse({"error": f"this page answers only as {min(own_origins)}"}, 421)
        # Programs on this machine send neither; browsers send what a page cannot change.
        origins, sites = set(headers.getlist("origin")), set(headers.getlist("sec-fetch-site"))
        own = origins <= own_origins and sites <= {"same-origin"}
        if own or scope["method"] in ("GET", "HEAD"):
            return None
        return JSONResponse({"error": "only the page itself may send photographs"}, 403)

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_closed(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = [(key.encode(), value.encode()) for key, value in closed.items()]
                message = {**message, "headers": [*message["headers"], *own]}
            await send(message)

        refused = refusal(scope) if scope["type"] == "http" else None
        await (refused or app)(scope, receive, send_closed)

    return answer


class Queue:
    """Processes uploads one at a time; rejects them when too many wait, or of other types."""

    # Forms of other sites cannot send these types without asking first.
    kinds: tuple[str, ...] = ("image/", "application/octet-stream")

    def __init__(self, threads: int, limits: Limits) -> None:
        self.threads, self.limits = threads, limits
        self.waiting = 0
        self.lock = asyncio.Lock()

    async def work(self, request: Request, work: Callable[[bytes], T]) -> T:
        """The result of ``work`` on the body of a request, computed in a thread."""
        from starlette.concurrency import run_in_threadpool  # noqa: PLC0415 - an extra

        kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
        if not kind.startswith(self.kinds):
            expected = " or ".join(self.kinds)
            raise RefusedError(415, f"the upload has the type {kind or 'none'}; send {expected}")
        if self.waiting >= self.limits.waiting:
            raise RefusedError(503, "too many photographs are waiting; try again in a moment")
        self.waiting += 1

        def with_threads(data: bytes) -> T:
            torch.set_num_threads(self.threads)  # holds for the calling thread only
            return work(data)

        try:
            data = await asyncio.wait_for(_body(request, self.limits.size), self.limits.seconds)
            async with self.lock:
                return await run_in_threadpool(with_threads, data)
        except TimeoutError:
            raise RefusedError(408, "the photograph did not arrive in time") from None
        finally:
            self.waiting -= 1


async def _body(request: Request, most: int) -> bytes:
    from starlette.requests import ClientDisconnect  # noqa: PLC0415 - an extra

    parts, total = [], 0
    try:
        async for part in request.stream():
            total += len(part)
            if total > most:
                raise RefusedError(413, f"the file is larger than {most / 2**20:g} MB")
            parts.append(part)
    except ClientDisconnect:
        raise RefusedError(400, "the upload was interrupted") from None
    return b"".join(parts)


def _decoded(data: bytes, reading: Reading, side: int | None) -> NDArray[np.uint8]:
    """Pixels of an upload; its format and size are checked before it is decoded."""
    Image.init()
    formats = tuple(name for name in FORMATS if name in Image.OPEN)
    try:
        image = decode_image(data, "upload", formats=formats, reading=reading)
    except ImageError as error:
        reason = str(error).partition(";")[0]
        raise RefusedError(415, f"{reason}; send a JPEG, PNG, WebP, TIFF, GIF or BMP") from None
    return image if side is None else limit_long_side(image, side)


def _corrected(explainer: Explainer, text: str) -> Explainer:
    """The explainer with choices of the page, given as JSON."""
    try:
        choices = [Choice.of_json(one) for one in json.loads(text)]
    except (ValueError, TypeError, RecursionError) as error:
        raise RefusedError(422, f"the choices cannot be read: {error}") from None
    return explainer.with_choices(choices) if choices else explainer


def _cards(prototypes: Prototypes, patch: Callable[[int, str, int], Path] | None) -> dict[str, Any]:
    """The prototypes that have a picture, and the choices about them."""
    cards = []
    for index, name in enumerate(prototypes.classes if patch else ()):
        for side in SIDES:
            centers = getattr(prototypes, side)
            for number in torch.nonzero(centers.sizes[index]).flatten().tolist():
                assert patch is not None
                if (path := patch(index, side, number)).is_file():
                    own = {"class": name, "side": side, "index": number}
                    own["score"] = round(float(centers.scores[index, number]), 3)
                    own["kept"] = bool(centers.keep[index, number])
                    data = base64.b64encode(read_bytes(path)).decode()
                    cards.append({**own, "picture": f"data:image/webp;base64,{data}"})
    choices = [one.as_json() for one in prototypes.choices]
    return {"digest": prototypes.digest, "choices": choices, "cards": cards}


def _mask_request(query: Mapping[str, str], explainer: Explainer) -> tuple[list[str], float, Any]:
    """Classes, threshold and method of a requested mask."""
    count, method = len(explainer.classes), query.get("method", "LPCAM")
    try:
        threshold = float(query.get("threshold", ""))
        indices = [int(n) for n in query.get("classes", "").split(",") if n]
    except ValueError:
        raise RefusedError(422, "threshold and classes must be numbers") from None
    if not 0 <= threshold <= 1:
        raise RefusedError(422, f"threshold must be from 0 to 1, got {threshold}")
    distinct = len(set(indices)) == len(indices) <= MOST_CLASSES
    if not distinct or not all(0 <= n < count for n in indices):
        raise RefusedError(
            422, f"classes must be at most {MOST_CLASSES} different numbers from 0 to {count - 1}"
        )
    if method not in METHOD_NAMES:
        raise RefusedError(422, f"method must be one of {', '.join(METHOD_NAMES)}")
    return [explainer.classes[n] for n in indices], threshold, method


def answer_of(maps: ImageMaps, explainer: Explainer) -> dict[str, Any]:
    """Data of the page: picture, classes with scores and colours, and maps as uint8."""
    height, width = maps.size
    mapped = maps.cam.shape[1], maps.cam.shape[2]
    small = scaled_size(*mapped, min(1.0, PLANE_SIDE / max(mapped)))
    palette = voc_palette()
    return {
        "width": width,
        "height": height,
        "picture": encode_picture(limit_long_side(maps.image, PICTURE_SIDE), quality=88),
        "threshold": {"CAM": maps.cam_threshold, "LPCAM": maps.threshold},
        "notes": list(maps.notes),
        "classes": [
            {
                "name": name,
                "score": score,
                "index": explainer.classes.index(name),
                "predicted": score > MINIMUM_SCORE,
                "color": palette[value].tolist(),
                "parts": maps.shares(name),
            }
            for name, score, value in zip(maps.classes, maps.scores, maps.mask_ids, strict=True)
        ],
        "planes": {
            method: encode_unit(resize_maps(planes, small, antialias=True), level=1)
            for method, planes in (("CAM", maps.cam), ("LPCAM", maps.lpcam))
        },
    }
