"""The local page's server: what it refuses, and what it answers."""

from __future__ import annotations

import asyncio
import base64
import io
import socket
import threading
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile
from tiny import draw_image

from lpcam.explain.explainer import Explainer
from lpcam.explain.serve import app as server
from lpcam.runtime.errors import LpcamError

pytest.importorskip("starlette", reason="the extra 'serve' is not installed")
pytest.importorskip("httpx", reason="starlette's test client needs httpx")

from starlette.testclient import TestClient

PORT = 8765
HOME = f"http://127.0.0.1:{PORT}"


@pytest.fixture(scope="module")
def client(explainer: Explainer) -> Iterator[TestClient]:
    app = server.application(explainer, name="tiny", port=PORT, threads=1)
    with TestClient(app, base_url=HOME) as client:
        yield client


@pytest.fixture(scope="module")
def photograph() -> bytes:
    return encoded(draw_image(["blue", "red"], (70, 90), np.random.default_rng(1))[0])


def encoded(image: np.ndarray, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, kind, **options)
    return buffer.getvalue()


def send(client: TestClient, data: Any, path: str = "/maps", **headers: str) -> Any:
    own = {"Content-Type": "image/png", **{k.replace("_", "-"): v for k, v in headers.items()}}
    return client.post(path, content=data, headers=own)


def test_page_and_its_parts_come_with_closed_headers(client: TestClient) -> None:
    for path, kind in {
        "/": "text/html",
        "/page.css": "text/css",
        "/page.js": "text/javascript",
    }.items():
        answer = client.get(path)
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith(kind)
        for name, value in server.HEADERS.items():
            assert answer.headers[name] == value
        assert "access-control-allow-origin" not in answer.headers
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy
    assert "http" not in policy
    assert "://" not in client.get("/page.js").text.replace("http://www.w3.org", "")


@pytest.mark.parametrize("quality", ["", "?quality=fast", "?quality=full"])
def test_maps_are_those_of_python(
    client: TestClient, explainer: Explainer, photograph: bytes, quality: str
) -> None:
    answer = send(client, photograph, f"/maps{quality}").json()
    chosen = explainer if "full" in quality else explainer.fast()
    maps = chosen(read_pixels(photograph), labels=[c["name"] for c in answer["classes"]])
    scores = [c["score"] for c in answer["classes"]]
    assert scores == sorted(scores, reverse=True)
    assert scores == pytest.approx(maps.scores)
    assert [c["index"] for c in answer["classes"]] == explainer.indices(maps.classes)
    assert [c["predicted"] for c in answer["classes"]] == [s > 0.5 for s in scores]
    assert (answer["width"], answer["height"]) == (90, 70)
    assert answer["threshold"] == {"CAM": maps.cam_threshold, "LPCAM": maps.threshold}
    for method, planes in (("CAM", maps.cam), ("LPCAM", maps.lpcam)):
        sent = answer["planes"][method]
        values = np.frombuffer(zlib.decompress(base64.b64decode(sent["data"])), np.uint8)
        assert np.abs(values.reshape(sent["shape"]) / 255 - planes).max() <= 0.5 / 255 + 1e-6
    picture = Image.open(io.BytesIO(base64.b64decode(answer["picture"].split(",")[1])))
    assert picture.size == (90, 70)


def read_pixels(data: bytes) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(data)).convert("RGB"))


@pytest.mark.parametrize("quality", ["fast", "full"])
@pytest.mark.parametrize("method", ["LPCAM", "CAM"])
def test_mask_is_that_of_python_at_full_size(
    client: TestClient, explainer: Explainer, photograph: bytes, method: Any, quality: str
) -> None:
    path = f"/mask?threshold=0.37&method={method}&classes=2,0&quality={quality}"
    answer = send(client, photograph, path)
    assert answer.status_code == 200
    saved = Image.open(io.BytesIO(answer.content))
    assert (saved.format, saved.mode) == ("PNG", "P")
    chosen = explainer if quality == "full" else explainer.fast()
    expected = chosen(read_pixels(photograph), labels=["red", "blue"]).mask(0.37, method=method)
    assert set(np.unique(expected)) == {0, 1, 3}
    np.testing.assert_array_equal(np.array(saved), expected)
    nothing = send(client, photograph, "/mask?threshold=0.5&classes=")
    assert not np.array(Image.open(io.BytesIO(nothing.content))).any()


def test_a_large_photograph_is_drawn_small_and_masked_large(
    client: TestClient, explainer: Explainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "PLANE_SIDE", 40)
    monkeypatch.setattr(server, "PICTURE_SIDE", 60)
    image = np.random.default_rng(0).integers(0, 256, (150, 300, 3)).astype(np.uint8)
    answer = send(client, encoded(image)).json()
    assert answer["planes"]["CAM"]["shape"] == [3, 20, 40]
    assert (answer["width"], answer["height"]) == (300, 150)
    mask = send(client, encoded(image), "/mask?threshold=0.5&classes=1").content
    assert Image.open(io.BytesIO(mask)).size == (300, 150)
    assert explainer.maximum_side == 128


def test_many_classes_are_cut_to_the_highest(
    client: TestClient, photograph: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "MOST_CLASSES", 2)
    answer = send(client, photograph).json()
    assert len(answer["classes"]) == 1


def refused(answer: Any, status: int, reason: str) -> None:
    assert answer.status_code == status, answer.text
    assert reason in answer.json()["error"]
    assert answer.headers["content-security-policy"]
    assert answer.headers["cache-control"] == "no-store"


@pytest.mark.parametrize(
    "host", ["evil.example", f"evil.example:{PORT}", "127.0.0.1:80", f"127.0.0.1.evil:{PORT}", ""]
)
def test_other_hosts_are_refused(client: TestClient, photograph: bytes, host: str) -> None:
    """DNS rebinding: the browser sends the name that it believes it has reached."""
    refused(client.get("/about", headers={"Host": host}), 421, "answers only as")
    refused(send(client, photograph, Host=host), 421, "answers only as")
    assert client.get("/about", headers={"Host": f"LocalHost:{PORT}"}).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:9999"},
        {"Origin": f"https://127.0.0.1:{PORT}"},
        {"Sec_Fetch_Site": "same-site"},
    ],
)
def test_other_sites_are_refused(
    client: TestClient, photograph: bytes, headers: dict[str, str]
) -> None:
    refused(send(client, photograph, **headers), 403, "only the page itself may send")
    assert send(client, photograph, Origin=HOME, Sec_Fetch_Site="same-origin").status_code == 200


def test_there_is_no_preflight(client: TestClient) -> None:
    answer = client.options("/maps", headers={"Origin": "http://evil.example"})
    assert answer.status_code in (403, 405)
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_too_many_bytes_are_refused(explainer: Explainer) -> None:
    client = limited(explainer, size=1000)
    for data in (bytes(1001), (bytes(100) for _ in range(50))):  # the second has no length
        refused(send(client, data), 413, "the file is larger than")


def limited(explainer: Explainer, **limits: Any) -> TestClient:
    app = server.application(
        explainer, name="tiny", port=PORT, threads=1, limits=server.Limits(**limits)
    )
    return TestClient(app, base_url=HOME)


def test_a_side_bounds_what_one_image_costs(explainer: Explainer, photograph: bytes) -> None:
    client = limited(explainer, side=45)
    answer = send(client, photograph).json()
    assert (answer["width"], answer["height"]) == (45, 35)
    mask = send(client, photograph, "/mask?threshold=0.5&classes=0").content
    assert Image.open(io.BytesIO(mask)).size == (45, 35)


def test_a_slow_upload_ends(explainer: Explainer, monkeypatch: pytest.MonkeyPatch) -> None:
    async def slow(_request: Any, _most: int) -> bytes:
        await asyncio.sleep(600)
        return b""

    monkeypatch.setattr(server, "_body", slow)
    refused(send(limited(explainer, seconds=0.01), b""), 408, "in time")


def test_a_proxy_s_own_address_may_be_allowed(explainer: Explainer, photograph: bytes) -> None:
    own, frame = "https://demo.example", "https://frame.example"
    app = server.application(
        explainer, name="tiny", port=PORT, threads=1, origins=[own], framed_by=[frame]
    )
    with TestClient(app, base_url=own) as client:
        policy = client.get("/").headers["content-security-policy"]
        assert f"frame-ancestors {frame}; " in policy
        assert "'none'; frame-ancestors" in policy
        same = {"Origin": own, "Sec_Fetch_Site": "same-origin"}
        assert send(client, photograph, **same).status_code == 200
        refused(send(client, photograph, Origin=frame), 403, "only the page itself may send")
        refused(client.get("/", headers={"Host": "evil.example"}), 421, "answers only as")


def test_too_many_pixels_are_refused_undecoded(
    client: TestClient, photograph: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of a bomb: a few bytes that say they are 60,000 x 60,000 pixels."""
    monkeypatch.setattr("lpcam.data.images.MAXIMUM_PIXELS", 6299)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda *_: pytest.fail("was decoded"))
    refused(send(client, photograph), 415, "90 x 70 pixels")
    data = bytearray(encoded(np.zeros((1, 1, 3), np.uint8)))
    data[16:24] = (60000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
    refused(send(client, bytes(data)), 415, "pixels")


@pytest.mark.parametrize("data", [b"", b"hello", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"<svg/>"])
def test_what_is_no_photograph_is_refused(client: TestClient, data: bytes) -> None:
    for path in ("/maps", "/mask?threshold=0.5&classes=0"):
        refused(send(client, data, path), 415, "cannot read image")


def test_types_that_a_foreign_form_may_send_are_refused(
    client: TestClient, photograph: bytes
) -> None:
    for kind in ("text/plain", "multipart/form-data; boundary=x", ""):
        refused(send(client, photograph, Content_Type=kind), 415, "the upload has the type")


@pytest.mark.parametrize(
    ("query", "reason"),
    [
        ("classes=0", "threshold"),
        ("threshold=nan&classes=0", "from 0 to 1"),
        ("threshold=0.5&classes=cat", "classes"),
        ("threshold=0.5&classes=-1", "from 0 to 2"),
        ("threshold=0.5&classes=1,1", "different"),
        ("threshold=0.5&classes=0&method=GradCAM", "method"),
        ("threshold=0.5&classes=0&quality=best", "fast, full"),
    ],
)
def test_masks_that_cannot_be_are_refused(
    client: TestClient, photograph: bytes, query: str, reason: str
) -> None:
    refused(send(client, photograph, f"/mask?{query}"), 422, reason)


def test_uploads_are_processed_one_at_a_time(
    explainer: Explainer, photograph: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = limited(explainer, waiting=2)
    both_read, go_on = threading.Event(), threading.Event()
    taken: list[int] = []
    at_once: list[int] = []
    body, highest = server._body, explainer.highest

    async def counted(request: Any, most: int) -> bytes:
        taken.append(1)
        if len(taken) == 2:
            both_read.set()
        return await body(request, most)

    def slow(image: Any, count: int) -> Any:
        at_once.append(1)
        assert go_on.wait(30)
        assert len(at_once) == 1
        at_once.pop()
        return highest(image, count)

    monkeypatch.setattr(server, "_body", counted)
    monkeypatch.setattr(explainer, "highest", slow)
    with client, ThreadPoolExecutor(2) as pool:
        answers = [pool.submit(send, client, photograph, "/maps?quality=full") for _ in range(2)]
        assert both_read.wait(30)
        third = send(client, photograph)
        refused(third, 503, "too many photographs are waiting")
        assert third.headers["retry-after"] == "3"
        go_on.set()
        assert [answer.result(30).status_code for answer in answers] == [200, 200]
        assert send(client, photograph).status_code == 200


def test_errors_of_the_server_are_not_sent(
    explainer: Explainer, photograph: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("a secret path")

    monkeypatch.setattr(explainer, "highest", fail)
    app = server.application(explainer, name="tiny", port=PORT, threads=1)
    with TestClient(app, base_url=HOME, raise_server_exceptions=False) as client:
        answer = send(client, photograph, "/maps?quality=full")
    refused(answer, 500, "failed")
    assert "secret" not in answer.text


def test_nothing_is_written(
    client: TestClient, photograph: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(Path, "open", lambda *_: pytest.fail("opened a file"))
    send(client, photograph)
    send(client, photograph, "/mask?threshold=0.5&classes=0")
    assert not list(tmp_path.iterdir())


def test_a_taken_port_is_refused() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(LpcamError, match=rf"127\.0\.0\.1:{port}.*--port"):
            server._listen(port)
    with pytest.raises(LpcamError, match="70000"):
        server._listen(70000)
    with server._listen(0) as listener:
        assert listener.getsockname()[0] == "127.0.0.1"


@pytest.mark.parametrize("choices", ["{", "3", "[3]", '[{"class": "red"}]', "[" * 9999])
def test_choices_that_cannot_be_read_are_refused(
    client: TestClient, photograph: bytes, choices: str
) -> None:
    answer = client.post(
        "/maps",
        params={"choices": choices},
        content=photograph,
        headers={"Content-Type": "image/png"},
    )
    assert answer.status_code == 422
    unknown = '[{"class": "pink", "side": "foreground", "index": 0, "action": "drop"}]'
    answer = client.post(
        "/maps",
        params={"choices": unknown},
        content=photograph,
        headers={"Content-Type": "image/png"},
    )
    assert (answer.status_code, "pink" in answer.json()["error"]) == (422, True)


def test_prototypes_without_pictures_are_not_shown(
    client: TestClient, explainer: Explainer
) -> None:
    found = client.get("/prototypes").json()
    assert found == {"digest": explainer.prototypes.digest, "choices": [], "cards": []}
