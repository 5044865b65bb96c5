"""The real Label Studio: our masks in its editor, corrected, exported and read; and as its backend.

It is started where LPCAM_LABEL_STUDIO names its executable, or where it is on the path.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browsing import chromium, watched  # noqa: F401 - the fixture "browser"
from explaining import tiny_run

from lpcam.cli.main import main
from lpcam.data.masks import read_index_mask
from lpcam.data.open_dataset import open_dataset
from lpcam.pipeline.label_studio import application
from lpcam.pipeline.recipe import load_recipe
from lpcam.pipeline.run import run
from lpcam.pipeline.run_folder import RunFolder

httpx = pytest.importorskip("httpx", reason="httpx is not installed")
uvicorn = pytest.importorskip("uvicorn", reason="the extra 'serve' is not installed")
PROGRAM = os.environ.get("LPCAM_LABEL_STUDIO") or shutil.which("label-studio")
if PROGRAM is None:
    pytest.skip("LPCAM_LABEL_STUDIO names no Label Studio", allow_module_level=True)

TOKEN = "0123456789abcdef" * 2 + "01234567"
USER, PASSWORD = "person@example.org", "a-long-password"
QUIET = {
    "COLLECT_ANALYTICS": "false",
    "LATEST_VERSION_CHECK": "false",
    "SENTRY_DSN": "",
    "FRONTEND_SENTRY_DSN": "",
    # else it refuses a backend on this machine
    "ML_BLOCK_LOCAL_IP": "false",
    "SSRF_PROTECTION_ENABLED": "false",
    "LOCAL_FILES_SERVING_ENABLED": "true",
}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class Studio:
    """A Label Studio on this machine; its user is asked for by a token."""

    def __init__(self, home: str, images: Path) -> None:
        self.home, self.images = home, images
        self.client = httpx.Client(
            base_url=home,
            headers={"Authorization": f"Token {TOKEN}"},
            trust_env=False,
            timeout=300,
        )

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        answer = self.client.request(method, f"/api/{path}", json=body)
        assert answer.is_success, answer.text
        return answer.json() if answer.content else None

    def project(self, config: str, tasks: list[Any]) -> tuple[int, list[int]]:
        """A new project with tasks; its number and theirs."""
        project = self.ask("POST", "projects/", {"title": "boxes", "label_config": config})["id"]
        storage = {"project": project, "path": str(self.images), "use_blob_urls": True}
        self.ask("POST", "storages/localfiles", storage)
        self.ask("POST", f"projects/{project}/import", tasks)
        found = self.ask("GET", f"tasks?project={project}&page_size=100")["tasks"]
        return project, sorted(task["id"] for task in found)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    folder = tmp_path_factory.mktemp("boxes")
    made = RunFolder(tiny_run(folder))
    run(load_recipe(made.recipe), until="seeds")
    return made


@pytest.fixture(scope="module")
def studio(finished: RunFolder, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Studio]:
    own, port = tmp_path_factory.mktemp("studio"), free_port()
    data = finished.path.parent / "boxes"
    environment = {**os.environ, **QUIET, "HOME": str(own)}
    environment["LOCAL_FILES_DOCUMENT_ROOT"] = str(data)
    words = [PROGRAM, "start", "--no-browser", "--internal-host", "127.0.0.1", "--port", str(port)]
    words += ["--data-dir", str(own), "--username", USER, "--password", PASSWORD]
    words += ["--user-token", TOKEN, "--enable-legacy-api-token"]
    with (own / "log.txt").open("w") as log:
        process = subprocess.Popen(words, env=environment, stdout=log, stderr=log)
    try:
        made = Studio(f"http://127.0.0.1:{port}", data / "images")
        deadline = time.monotonic() + 900
        while True:
            try:
                made.client.get("/health").raise_for_status()
                break
            except httpx.HTTPError:
                assert process.poll() is None and time.monotonic() < deadline, (
                    own / "log.txt"
                ).read_text()[-3000:]
                time.sleep(0.5)
        yield made
    finally:
        process.terminate()
        process.wait(60)


def images_of(tasks: list[Any]) -> list[str]:
    return [Path(task["data"]["image"]).stem for task in tasks]


def iou(mask: np.ndarray, truth: np.ndarray) -> float:
    both = ((mask == truth) & (truth > 0)).sum()
    return float(both / ((mask > 0) | (truth > 0)).sum())


def draw_stroke(page: Any) -> None:
    """Paint a horizontal stroke of the first label over the middle of the image."""
    page.keyboard.press("1")
    page.locator('[aria-label="brush-tool"]').click()
    box = page.locator(".konvajs-content canvas").last.bounding_box()
    middle = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + box["width"] * 0.2, middle)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.8, middle, steps=20)
    page.mouse.up()


def delete_region(page: Any) -> None:
    page.locator(".lsf-outliner-item, [class*=outliner-item]").first.click()
    page.keyboard.press("Backspace")


def stored(answer: Any) -> bool:
    return "/annotations" in answer.url and answer.request.method == "POST"


@pytest.mark.parametrize(
    ("format", "correct"),
    [("label-studio", draw_stroke), ("label-studio-polygons", delete_region)],
)
def test_masks_in_the_editor_come_back(
    format: str,
    correct: Any,
    studio: Studio,
    finished: RunFolder,
    browser: Any,
    tmp_path: Path,
) -> None:
    words = ["--format", format, "--image-root", "images", "--from", "seeds"]
    assert main(["export", "masks", str(finished.path), str(tmp_path), *words]) == 0
    tasks = json.loads((tmp_path / "tasks.json").read_text())
    tasks = [one for one in tasks if one["predictions"][0]["result"]][:3]
    assert all(0 <= one["predictions"][0]["score"] <= 1 for one in tasks)
    project, numbers = studio.project((tmp_path / "label_config.xml").read_text(), tasks)
    complaints: list[str] = []
    page = watched(browser, (studio.home, "data:", "blob:"), complaints)
    page.goto(f"{studio.home}/user/login/")
    page.fill("input[name=email]", USER)
    page.fill("input[name=password]", PASSWORD)
    page.click("button[type=submit]")
    page.wait_for_load_state()
    for number in numbers:
        page.goto(f"{studio.home}/projects/{project}/data?task={number}")
        # the prediction is copied into the person's annotation
        page.get_by_test_id("bottombar-submit-button").wait_for()
        page.locator("[class*=outliner-item]").first.wait_for()
        page.wait_for_timeout(2000)
        if number == numbers[0]:
            correct(page)
        with page.expect_response(stored):
            page.get_by_test_id("bottombar-submit-button").click()
    page.context.close()
    assert not [text for text in complaints if text.startswith("request")]  # of nobody else
    exported = studio.ask("GET", f"projects/{project}/export?exportType=JSON")
    path = studio.images / f"{format}.json"
    path.write_text(json.dumps(exported))
    try:
        opened = open_dataset(path)
        assert main(["data", "masks", str(path), str(tmp_path / "back")]) == 0
    finally:
        path.unlink()
    classes = finished.masks("seeds").classes
    values = {0: 0}
    for name, value in zip(
        opened.dataset.classes.names, opened.dataset.classes.mask_ids, strict=True
    ):
        values[value] = classes.mask_ids[classes.names.index(name)]
    names = images_of(tasks)
    for number, name in enumerate(names):
        back = np.vectorize(values.get)(read_index_mask(tmp_path / f"back/{name}.png"))
        made = read_index_mask(finished / "seeds" / f"{name}.png")
        shown = {classes.mask_ids.index(v) for v in np.unique(made) if v}
        labels = opened.dataset.items[name].labels
        found = {classes.names.index(opened.dataset.classes.names[n]) for n in labels}
        if number:
            assert iou(back, made) >= 0.99
            assert found == shown
        else:
            assert iou(back, made) < 0.99
    first = np.vectorize(values.get)(read_index_mask(tmp_path / f"back/{names[0]}.png"))
    if correct is draw_stroke:
        row = first[first.shape[0] // 2]
        assert (row[len(row) // 4 : 3 * len(row) // 4] == 1).all()


@contextmanager
def backend(finished: RunFolder, images: Path) -> Iterator[str]:
    port = free_port()
    items = finished.masks("seeds").entries
    app = application(
        finished.explainer(device="cpu"),
        images,
        finished.corrected,
        {one.image.resolve(): one.id for one in items if getattr(one, "image", None)},
        name="tiny",
        port=port,
        threads=1,
    )
    config = uvicorn.Config(app, port=port, log_level="warning", lifespan="off", ws="none")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join(60)


CONFIG = """<View><Image name="photo" value="$image"/>
<Choices name="shows" toName="photo" choice="multiple">
<Choice value="blue"/><Choice value="green"/><Choice value="red"/></Choices>
<KeyPointLabels name="point" toName="photo" smart="true"><Label value="red"/></KeyPointLabels>
<BrushLabels name="area" toName="photo"><Label value="blue"/><Label value="red"/></BrushLabels>
</View>"""


def test_the_backend_answers_label_studio(studio: Studio, finished: RunFolder) -> None:
    address = "/data/local-files/?d=images/i{:02d}.png"
    tagged = {"from_name": "shows", "to_name": "photo", "type": "choices"}
    tasks = [{"data": {"image": address.format(n)}} for n in (0, 1, 4, 5)]
    tasks[0]["annotations"] = [{"result": [{**tagged, "value": {"choices": ["red"]}}]}]
    project, numbers = studio.project(CONFIG, tasks)
    studio.ask("PATCH", f"projects/{project}", {"sampling": "Uncertainty sampling"})
    with backend(finished, studio.images) as url:
        model = {"url": url, "project": project, "title": "lpcam", "is_interactive": True}
        model = studio.ask("POST", "ml", model)
        assert model["state"] == "CO", model
        action = f"dm/actions?id=retrieve_tasks_predictions&project={project}"
        studio.ask("POST", action, {"selectedItems": {"all": True, "excluded": []}})
        made = {n: studio.ask("GET", f"tasks/{n}")["predictions"] for n in numbers}
        assert all(len(one) == 1 for one in made.values())
        names = {
            number: {v["value"]["brushlabels"][0] for v in one[0]["result"]}
            for number, one in made.items()
        }
        assert names[numbers[0]] == {"red"}  # as it was tagged
        point = {"x": 50, "y": 50, "width": 1, "keypointlabels": ["red"]}
        drawn = {"from_name": "point", "to_name": "photo", "type": "keypointlabels", "value": point}
        asked = {"task": numbers[1], "context": {"result": [drawn]}}
        answer = studio.ask("POST", f"ml/{model['id']}/interactive-annotating", asked)
        assert {v["value"]["brushlabels"][0] for v in answer["data"]["result"]} == {"red"}
        # the least certain comes first
        version = made[numbers[0]][0]["model_version"]
        studio.ask("PATCH", f"projects/{project}", {"model_version": version})
        left = {n: made[n][0]["score"] for n in numbers[1:]}
        assert studio.ask("GET", f"projects/{project}/next")["id"] == min(
            left, key=left.__getitem__
        )
        # an annotation of a person becomes a true mask
        corrected = made[numbers[3]][0]["result"]
        studio.ask("POST", f"tasks/{numbers[3]}/annotations/", {"result": corrected})
        path = finished.corrected / "i05.png"
        deadline = time.monotonic() + 60
        while not path.is_file() and time.monotonic() < deadline:
            time.sleep(0.1)
    maps = finished.explainer(device="cpu")(studio.images / "i05.png", at_least_one=True)
    np.testing.assert_array_equal(read_index_mask(path), maps.mask())
