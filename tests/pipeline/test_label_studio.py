"""Label Studio's backend: what it answers, what it stores, and what it refuses."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from explaining import tiny_run

from lpcam.data.label_studio import painted
from lpcam.data.masks import read_index_mask
from lpcam.explain.explainer import Explainer
from lpcam.pipeline.label_studio import application
from lpcam.pipeline.run_folder import RunFolder

pytest.importorskip("starlette", reason="the extra 'serve' is not installed")
pytest.importorskip("httpx", reason="starlette's test client needs httpx")

from starlette.testclient import TestClient

HOME = "http://127.0.0.1:9090"
LABELS = '<Label value="red"/><Label value="blue"/>'
BRUSH = (
    '<View><Image name="photo"/><BrushLabels name="area" toName="photo">'
    f"{LABELS}</BrushLabels></View>"
)
POLYGONS = BRUSH.replace("BrushLabels", "PolygonLabels")
VALUES = {"blue": 1, "green": 2, "red": 3}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return RunFolder(tiny_run(tmp_path_factory.mktemp("boxes")))


@pytest.fixture(scope="module")
def explainer(finished: RunFolder) -> Explainer:
    return finished.explainer(device="cpu")


@pytest.fixture
def images(finished: RunFolder, tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    shutil.copytree(finished.path.parent / "boxes/images", folder)
    (tmp_path / "outside.png").write_bytes((folder / "i00.png").read_bytes())
    return folder


@pytest.fixture
def client(explainer: Explainer, images: Path, tmp_path: Path) -> Iterator[TestClient]:
    ids = {(images / "i05.png").resolve(): "own/id"}
    app = application(explainer, images, tmp_path / "drawn", ids, name="tiny", port=9090, threads=1)
    with TestClient(app, base_url=HOME) as client:
        yield client


def task(image: str, *results: Any, number: int = 1) -> dict[str, Any]:
    annotations = [{"result": [*results]}] if results else []
    return {"id": number, "data": {"image": image}, "annotations": annotations}


def choice(*names: str) -> dict[str, Any]:
    return {"from_name": "tag", "type": "choices", "value": {"choices": [*names]}}


def predict(client: TestClient, *tasks: Any, config: str = BRUSH, context: Any = None) -> Any:
    params = {"context": context, "login": None, "password": None}
    asked = {"tasks": [*tasks], "project": "1.7", "label_config": config, "params": params}
    return client.post("/predict", json=asked)


def test_it_is_up_and_takes_projects_with_its_classes(client: TestClient) -> None:
    assert client.get("/health").json()["status"] == "UP"
    answer = client.post("/setup", json={"project": "1.7", "schema": BRUSH, "access_token": "x"})
    assert answer.json() == {"model_version": "tiny"}
    for schema in ("<View/>", BRUSH.replace("red", "cow").replace("blue", "dog")):
        refused = client.post("/setup", json={"project": "1.7", "schema": schema})
        assert refused.status_code == 422 and "BrushLabels" in refused.json()["error"]


@pytest.mark.parametrize("config", [BRUSH, POLYGONS])
def test_masks_are_those_of_python(
    config: str, client: TestClient, explainer: Explainer, images: Path
) -> None:
    drawn = {"type": "keypointlabels", "value": {"x": 1, "y": 1, "keypointlabels": ["blue"]}}
    cases = [
        (["red"], task("i00.png", choice("red")), None),
        (["red", "blue"], task("i00.png", choice("red", "blue", "other")), None),
        (["blue"], task("i00.png", choice("red")), {"result": [drawn]}),  # what is drawn now
        (None, task("/data/upload/3/1a2b3c4d-i01.png"), None),
    ]
    for labels, one, context in cases:
        (found,) = predict(client, one, config=config, context=context).json()["results"]
        path = images / ("i00.png" if labels else "i01.png")
        maps = explainer(path, labels=labels, at_least_one=True)
        mask = painted(found["result"], maps.size, VALUES)
        expected = maps.mask()
        np.testing.assert_array_equal(mask, np.where(expected == VALUES["green"], 0, expected))
        assert {r["from_name"] for r in found["result"]} <= {"area"}
        assert 0 <= found["score"] <= 1 and found["model_version"] == "tiny"
        assert labels is None or mask.any()


@pytest.mark.parametrize(
    "address",
    ["../outside.png", "outside.png", "/etc/hosts.png", "http://127.0.0.1:1/none.png", "gone.png"],
)
def test_nothing_else_is_opened(client: TestClient, address: str, monkeypatch: Any) -> None:
    monkeypatch.setattr("socket.create_connection", lambda *_: pytest.fail("was fetched"))
    answer = predict(client, task(address), task("i00.png", choice("red"), number=2))
    none, found = answer.json()["results"]
    assert none == [] and found["result"]


def test_annotations_become_true_masks(client: TestClient, images: Path, tmp_path: Path) -> None:
    points = [[0, 0], [50, 0], [50, 100], [0, 100]]
    value = {"points": points, "closed": True, "polygonlabels": ["red"]}
    region = {"from_name": "area", "type": "polygonlabels", "value": value}

    def send(image: str, *results: Any, action: str = "ANNOTATION_CREATED", **more: Any) -> Any:
        annotation = {"result": [*results], **more}
        asked = {"action": action, "task": task(image), "annotation": annotation, "project": {}}
        return client.post("/webhook", json=asked)

    assert send("i05.png", region).status_code == 200
    mask = read_index_mask(tmp_path / "drawn/own/id.png")
    half = mask.shape[1] // 2
    assert (mask[:, :half] == 3).all() and not mask[:, half + 1 :].any()
    assert send("i05.png", action="ANNOTATION_UPDATED").status_code == 200
    assert not read_index_mask(tmp_path / "drawn/own/id.png").any()
    assert send("i06.png", region).status_code == 200
    assert (tmp_path / "drawn/i06.png").is_file()
    assert send("i07.png", region, was_cancelled=True).status_code == 200
    assert send("i07.png", region, action="TASKS_CREATED").status_code == 200
    tagged = send("i07.png", choice("red"))
    assert tagged.status_code == 422 and "red" in tagged.json()["error"]
    assert not (tmp_path / "drawn/i07.png").exists()


def test_what_is_refused(client: TestClient) -> None:
    for body in ({}, [], {"tasks": [{}], "label_config": BRUSH}, {"tasks": 3, "label_config": "<"}):
        answer = client.post("/predict", json=body)
        assert answer.status_code == 422 and answer.json()["error"]
    entity = '<!DOCTYPE View [<!ENTITY a "a">]>' + BRUSH
    assert "DOCTYPE" in predict(client, config=entity).json()["error"]
    headers = {"content-type": "text/plain"}
    assert client.post("/predict", content=b"{}", headers=headers).status_code == 415
    assert client.get("/health", headers={"Host": "evil.example"}).status_code == 421
    site = {"Origin": "http://evil.example"}
    assert client.post("/predict", json={}, headers=site).status_code == 403
    large, headers = b" " * (32 * 2**20 + 1), {"content-type": "application/json"}
    assert client.post("/predict", content=large, headers=headers).status_code == 413
