"""``lpcam serve``: a page on this machine where a photograph is dropped and its maps are seen.

It answers on the loopback address alone, and only to its own page: a request that names another
host (DNS rebinding) or comes from another site is refused. A photograph is held in memory while it
is worked on, and nothing of it is kept afterwards.
"""

from __future__ import annotations

import asyncio
import base64
import io
import socket
import zlib
from collections.abc import Awaitable, Callable, Mapping
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from lpcam.data.images import decode_image, resize_image, scaled_size
from lpcam.errors import ImageError, LpcamError
from lpcam.explain.explainer import MINIMUM_SCORE, Explainer
from lpcam.explain.maps import METHOD_NAMES, ImageMaps, resized
from lpcam.masks import HEAT, voc_palette
from lpcam.resources import available_threads

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

T = TypeVar("T")

ADDRESS = "127.0.0.1"
PORT = 8765
MAXIMUM_BYTES = 32 * 2**20
"""Of an upload."""
MAXIMUM_PIXELS = 50_000_000
"""Of an uploaded image."""
BODY_SECONDS = 60.0
"""In which a photograph must have arrived."""

MOST_WAITING = 4
"""Uploads that wait or are worked on; more are sent away."""
MOST_CLASSES = 24
"""Whose maps one answer holds: those of the highest scores."""
PLANE_SIDE = 512
"""Long side, in pixels, of the maps that the page draws."""
PICTURE_SIDE = 1024
"""Long side, in pixels, of the picture that the page shows."""
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
"""Of Pillow, as far as it has them: formats of photographs, whose readers start no program."""
PAGE = {
    "index.html": "text/html; charset=utf-8",
    "page.css": "text/css; charset=utf-8",
    "page.js": "text/javascript; charset=utf-8",
}
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


class RefusedError(LpcamError):
    """A request that is not answered, with its HTTP status."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


def serve(run: Path, *, port: int = PORT, threads: int | None = None, device: str = "auto") -> None:
    """Serve the page of a run until interrupted.

    Args:
        run: the folder of a run that has reached its prototypes.
        port: on the loopback address; 0 takes any that is free.
        threads: of the numerics; None: the processors that this process may use.

    Raises:
        LpcamError: if the extra ``serve`` is not installed, the run cannot be used, or the port is
            taken.
    """
    try:
        import uvicorn  # noqa: PLC0415 - an extra
    except ImportError:
        raise _missing() from None
    explainer = Explainer.from_run(run, device=device)
    listener = _listen(port)
    with listener:
        port = listener.getsockname()[1]
        app = application(explainer, name=_name(explainer, run), port=port, threads=threads)
        config = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            server_header=False,
            lifespan="off",
            ws="none",
        )
        print(f"LPCAM of {run} on http://{ADDRESS}:{port}/ (Ctrl+C ends it)", flush=True)
        uvicorn.Server(config).run(sockets=[listener])


def _name(explainer: Explainer, run: Path) -> str:
    return str(explainer.made_by.get("run", run.name))


def _missing() -> LpcamError:
    return LpcamError(
        "serve needs starlette and uvicorn; install them with pip install 'lpcam[serve]'"
    )


def _listen(port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((ADDRESS, port))
    except (OSError, OverflowError) as error:
        listener.close()
        raise LpcamError(
            f"cannot listen on {ADDRESS}:{port}: {error}; choose another --port, or 0 for any that "
            "is free"
        ) from None
    return listener


def application(
    explainer: Explainer, *, name: str, port: int, threads: int | None = None
) -> ASGIApp:
    """The web application.

    Args:
        name: of the run, for the page's title.
        port: at which it is reached; requests that name another host or port are refused.
        threads: of the numerics; None: the processors that this process may use.

    Raises:
        LpcamError: if the extra ``serve`` is not installed.
    """
    try:
        from starlette.applications import Starlette  # noqa: PLC0415 - an extra
        from starlette.responses import JSONResponse, Response  # noqa: PLC0415
        from starlette.routing import Route  # noqa: PLC0415
    except ImportError:
        raise _missing() from None
    desk = _Desk(threads or available_threads())
    about = {
        "name": name,
        "classes": list(explainer.classes),
        "minimum_score": MINIMUM_SCORE,
        "maximum_bytes": MAXIMUM_BYTES,
        "heat": HEAT.astype(int).tolist(),
    }

    def page(file: str) -> Callable[[Request], Awaitable[Response]]:
        content = resources.files("lpcam").joinpath("serve_page", file).read_bytes()

        async def answer(_request: Request) -> Response:
            return Response(content, media_type=PAGE[file])

        return answer

    async def describe(_request: Request) -> Response:
        return JSONResponse(about)

    async def maps(request: Request) -> Response:
        def work(data: bytes) -> bytes:
            image = _decoded(data)
            count = len(explainer.classes)
            count = count if count <= MOST_CLASSES else MOST_CLASSES // 2
            return bytes(JSONResponse(answer_of(explainer.highest(image, count), explainer)).body)

        return Response(await desk.work(request, work), media_type="application/json")

    async def mask(request: Request) -> Response:
        asked = _mask_request(request.query_params, explainer)

        def work(data: bytes) -> bytes:
            found = explainer(_decoded(data), labels=asked["labels"])
            return _mask_file(found.mask(asked["threshold"], method=asked["method"]))

        return Response(await desk.work(request, work), media_type="image/png")

    async def refuse(_request: Request, error: Exception) -> Response:
        status = error.status if isinstance(error, RefusedError) else 422
        retry = {"retry-after": "3"} if status == 503 else {}
        return JSONResponse({"error": str(error)}, status, headers=retry)

    async def fail(_request: Request, _error: Exception) -> Response:
        reason = "something went wrong here; the terminal says what"
        return JSONResponse({"error": reason}, 500)

    app = Starlette(
        routes=[
            Route("/", page("index.html")),
            Route("/page.css", page("page.css")),
            Route("/page.js", page("page.js")),
            Route("/about", describe),
            Route("/maps", maps, methods=["POST"]),
            Route("/mask", mask, methods=["POST"]),
        ],
        exception_handlers={LpcamError: refuse, Exception: fail},
    )
    return _OnlyOwnPage(app, port)


# -- Who may ask ---------------------------------------------------------------------------------


class _OnlyOwnPage:
    """Refuses other hosts and other sites, and adds the headers of a page that is closed."""

    def __init__(self, app: ASGIApp, port: int) -> None:
        self.app = app
        names = (ADDRESS, "localhost")
        self.hosts = {f"{name}:{port}" for name in names} | (set(names) if port == 80 else set())
        self.origins = {f"http://{host}" for host in self.hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        if scope["type"] != "http":
            return

        async def send_closed(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = [(key.encode(), value.encode()) for key, value in HEADERS.items()]
                message = {**message, "headers": [*message["headers"], *own]}
            await send(message)

        reason = self._refusal(scope)
        if reason is None:
            await self.app(scope, receive, send_closed)
            return
        from starlette.responses import JSONResponse  # noqa: PLC0415

        status, text = reason
        await JSONResponse({"error": text}, status)(scope, receive, send_closed)

    def _refusal(self, scope: Scope) -> tuple[int, str] | None:
        headers: dict[str, list[str]] = {}
        for key, value in scope["headers"]:
            headers.setdefault(key.decode("latin-1").lower(), []).append(value.decode("latin-1"))
        hosts = headers.get("host", [])
        if len(hosts) != 1 or hosts[0].lower() not in self.hosts:
            return 421, f"this page answers as {min(self.origins)} only"
        if scope["method"] in ("GET", "HEAD"):
            return None
        origins = headers.get("origin", [])
        sites = headers.get("sec-fetch-site", [])
        # A program on this machine sends neither; a browser sends what the page cannot change.
        if any(o not in self.origins for o in origins) or any(s != "same-origin" for s in sites):
            return 403, "only the page itself may send photographs"
        return None


# -- Uploads -------------------------------------------------------------------------------------


class _Desk:
    """Takes one upload after another, and few in waiting."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.inside = 0
        self.lock = asyncio.Lock()

    async def work(self, request: Request, work: Callable[[bytes], T]) -> T:
        """The result of ``work`` on the body of a request, in a thread."""
        from starlette.concurrency import run_in_threadpool  # noqa: PLC0415

        _check_type(request.headers)
        if self.inside >= MOST_WAITING:
            raise RefusedError(503, "too many photographs are waiting; try again in a moment")
        self.inside += 1
        try:
            try:
                data = await asyncio.wait_for(_body(request), BODY_SECONDS)
            except TimeoutError:
                raise RefusedError(408, "the photograph did not arrive in time") from None

            def numbered() -> T:
                torch.set_num_threads(self.threads)  # each thread has a number of its own
                return work(data)

            async with self.lock:
                return await run_in_threadpool(numbered)
        finally:
            self.inside -= 1


def _check_type(headers: Mapping[str, str]) -> None:
    # No type that a form of another site could send without asking first.
    kind = headers.get("content-type", "").split(";")[0].strip().lower()
    if not kind.startswith("image/") and kind != "application/octet-stream":
        raise RefusedError(
            415, f"the upload is {kind or 'of no type'}, not an image; send a photograph"
        )


async def _body(request: Request) -> bytes:
    from starlette.requests import ClientDisconnect  # noqa: PLC0415

    too_large = RefusedError(
        413, f"the file is larger than {MAXIMUM_BYTES // 2**20} MB; send a smaller one"
    )
    declared = request.headers.get("content-length", "0")
    if not declared.isdecimal():
        raise RefusedError(400, "the request does not say how long it is")
    if int(declared) > MAXIMUM_BYTES:
        raise too_large
    parts, total = [], 0
    try:
        async for part in request.stream():
            total += len(part)
            if total > MAXIMUM_BYTES:
                raise too_large
            parts.append(part)
    except ClientDisconnect:
        raise RefusedError(400, "the upload was broken off") from None
    return b"".join(parts)


def _decoded(data: bytes) -> NDArray[np.uint8]:
    """Pixels of an upload, whose format and size are looked at before it is decoded."""
    no_image = RefusedError(
        415, "the file is no image that can be read here; send a JPEG, PNG, WebP, TIFF, GIF or BMP"
    )
    too_many = f"the image has more than {MAXIMUM_PIXELS // 10**6} million pixels"
    Image.init()
    formats = tuple(name for name in FORMATS if name in Image.OPEN)
    try:
        with Image.open(io.BytesIO(data), formats=formats) as image:
            width, height = image.size
    except Image.DecompressionBombError:
        raise RefusedError(413, f"{too_many}; send a smaller one") from None
    except Exception:  # readers raise anything on damaged data
        raise no_image from None
    if width * height > MAXIMUM_PIXELS:
        raise RefusedError(413, f"{too_many} ({width} x {height}); send a smaller one")
    try:
        return decode_image(data, "the upload", maximum_pixels=MAXIMUM_PIXELS, formats=formats)
    except ImageError as error:
        raise RefusedError(415, str(error).removeprefix("cannot read image ")) from None


def _mask_request(query: Mapping[str, str], explainer: Explainer) -> dict[str, Any]:
    """Classes, threshold and method of a mask that is asked for."""
    try:
        threshold = float(query.get("threshold", ""))
        indices = [int(n) for n in query.get("classes", "").split(",") if n]
    except ValueError:
        raise RefusedError(422, "threshold must be a number and classes their numbers") from None
    if not 0 <= threshold <= 1:
        raise RefusedError(422, f"threshold must be from 0 to 1, got {threshold}")
    if len(indices) > MOST_CLASSES or len(set(indices)) < len(indices):
        raise RefusedError(422, f"classes must be at most {MOST_CLASSES} different numbers")
    if not all(0 <= n < len(explainer.classes) for n in indices):
        raise RefusedError(422, f"classes must be from 0 to {len(explainer.classes) - 1}")
    method = query.get("method", "LPCAM")
    if method not in METHOD_NAMES:
        raise RefusedError(422, f"method must be one of {', '.join(METHOD_NAMES)}")
    labels = [explainer.classes[n] for n in indices]
    return {"threshold": threshold, "labels": labels, "method": method}


# -- Answers -------------------------------------------------------------------------------------


def answer_of(maps: ImageMaps, explainer: Explainer) -> dict[str, Any]:
    """What the page draws: picture, classes with scores and colours, and planes of 8 bits."""
    height, width = maps.size
    mapped = maps.cam.shape[1], maps.cam.shape[2]
    small = scaled_size(*mapped, min(1.0, PLANE_SIDE / max(mapped)))
    palette = voc_palette()
    return {
        "width": width,
        "height": height,
        "picture": _picture(maps.image),
        "threshold": {"CAM": maps.cam_threshold, "LPCAM": maps.threshold},
        "notes": list(maps.notes),
        "classes": [
            {
                "name": name,
                "score": score,
                "index": explainer.classes.index(name),
                "predicted": score > MINIMUM_SCORE,
                "color": palette[value].tolist(),
            }
            for name, score, value in zip(maps.classes, maps.scores, maps.mask_ids, strict=True)
        ],
        "planes": {"CAM": _planes(maps.cam, small), "LPCAM": _planes(maps.lpcam, small)},
    }


def _planes(planes: NDArray[np.float32], size: tuple[int, int]) -> dict[str, Any]:
    values = np.stack([np.rint(255 * resized(p, size).clip(0, 1)).astype(np.uint8) for p in planes])
    return {
        "shape": list(values.shape),
        "type": "uint8",
        "data": base64.b64encode(zlib.compress(values.tobytes(), 1)).decode(),
    }


def _picture(image: NDArray[np.uint8]) -> str:
    size = image.shape[0], image.shape[1]
    if max(size) > PICTURE_SIDE:
        image = resize_image(image, scaled_size(*size, PICTURE_SIDE / max(size)))
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=88)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _mask_file(mask: NDArray[np.uint8]) -> bytes:
    image = Image.fromarray(mask)
    image.putpalette(voc_palette().tobytes())
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
