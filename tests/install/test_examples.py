"""The notebook and the hosted demo page do what they say, on the bundled drawings."""

from __future__ import annotations

import io
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from lpcam.data import creatures
from lpcam.pipeline.recipe import load_recipe
from lpcam.pipeline.run import run

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
NOTEBOOK = EXAMPLES / "tutorial.ipynb"
DEMO = EXAMPLES / "hosted-demo"


# -- The notebook ------------------------------------------------------------------------------


def cells(kind: str = "code") -> list[dict[str, Any]]:
    found = json.loads(NOTEBOOK.read_text("utf-8"))["cells"]
    return [cell for cell in found if cell["cell_type"] == kind]


def test_the_notebook_is_committed_without_results() -> None:
    assert not [cell["id"] for cell in cells() if cell["outputs"] or cell["execution_count"]]
    assert NOTEBOOK.stat().st_size < 50_000
    first = "".join(cells()[0]["source"])
    assert 'find_spec("lpcam") is None' in first
    assert "%pip install" in first


def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbclient = pytest.importorskip("nbclient", reason="notebooks are run by nbclient")
    pytest.importorskip("ipykernel", reason="the notebook's kernel is ipykernel")
    import nbformat  # noqa: PLC0415 - comes with nbclient

    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_DATA_DIR", "JUPYTER_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "src"), *sys.path]))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (values,) = (c for c in notebook.cells if "parameters" in c.metadata.get("tags", []))
    values.source = "IMAGES, SIZE, PRETRAINED = 24, 64, False"
    nbclient.NotebookClient(
        notebook, timeout=900, resources={"metadata": {"path": str(tmp_path)}}
    ).execute()

    outputs = {cell["id"]: cell.get("outputs", []) for cell in notebook.cells}
    assert not outputs["install"]
    for name, count in (("sheet", 1), ("maps", 1), ("drop", 2)):
        assert sum("image/png" in one.get("data", {}) for one in outputs[name]) == count, name
    assert "LPCAM" in outputs["scores"][0]["data"]["text/markdown"]
    printed = "".join(one.get("text", "") for one in outputs["drop"])
    assert float(printed.rpartition("at most ")[2]) > 0
    assert len(list((tmp_path / "runs/my-images/seeds").glob("*.png"))) == 24
    assert (tmp_path / "runs/my-images/prototypes.yaml").is_file()
    again = "".join(one.get("text", "") for one in outputs["rerun"])
    assert "lpcam: recomputing" in again


# -- The page ----------------------------------------------------------------------------------


def test_the_settings_of_the_page_are_those_of_the_program() -> None:
    front, _, text = (DEMO / "README.md").read_text("utf-8").removeprefix("---\n").partition("---")
    docker = (DEMO / "Dockerfile").read_text("utf-8")
    program = (DEMO / "app.py").read_text("utf-8")
    settings = yaml.safe_load(front)
    assert settings["sdk"] == "docker"
    assert f"EXPOSE {settings['app_port']}\n" in docker
    assert f'"PORT", "{settings["app_port"]}"' in program
    order = r"Limits\(size=(\d+) \* 2\*\*20, seconds=(\d+), waiting=(\d+), side=(\d+)\)"
    limits = re.search(order, program)
    assert limits is not None
    size, seconds, waiting, side = limits.groups()
    for told in (f"{size} MiB", f"within {seconds} s", f"{waiting} uploads", f"side of {side}"):
        assert told in text, told
    for name in re.findall(r"^COPY --chown=user (\S+)", docker, re.MULTILINE):
        assert (DEMO / name).is_file() or name == "lpcam-*.whl", name


def test_the_page_needs_what_is_tested() -> None:
    pinned = set((ROOT / "constraints.txt").read_text("utf-8").splitlines())
    lines = (DEMO / "requirements.txt").read_text("utf-8").splitlines()
    assert {line for line in lines if not line.startswith("#")} <= pinned


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, subprocess.Popen[str]]]:
    """A client of the page, started by the Dockerfile's command on the bundled drawings."""
    httpx = pytest.importorskip("httpx", reason="the page is asked by httpx")
    pytest.importorskip("uvicorn", reason="the page needs the extra 'serve'")
    folder = tmp_path_factory.mktemp("page")
    creatures.write(folder / "data", images=24, size=64, seed=0)
    own = {"data.root": str(folder / "data"), "run.folder": str(folder / "run")}
    own |= {"lpcam.preset": "small", "run.engine": "torch"}
    run(load_recipe("demo", own), until="prototypes")
    docker = (DEMO / "Dockerfile").read_text("utf-8")
    program, *words = json.loads(docker.rpartition("CMD ")[2])
    assert program == "python"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), *sys.path])}
    environment |= {"PORT": str(port), "RUN": str(folder / "run"), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, *words], cwd=DEMO, env=environment, stderr=subprocess.PIPE, text=True
    )
    home = f"http://127.0.0.1:{port}"
    with httpx.Client(base_url=home, timeout=120, trust_env=False) as client:
        until = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < until:
            try:
                client.get("/about")
                break
            except httpx.TransportError:
                time.sleep(0.2)
        yield client, process
    process.kill()
    process.communicate()


def test_the_page_maps_one_upload_within_its_limits(page: Any) -> None:
    client, process = page
    assert process.poll() is None, process.communicate()
    assert len(client.get("/about").json()["classes"]) == 8
    picture = Image.new("RGB", (2000, 1000), (90, 140, 60))
    answer = client.post("/maps", content=encoded(picture), headers={"Content-Type": "image/png"})
    assert answer.status_code == 200, answer.text
    found = answer.json()
    assert (found["width"], found["height"]) == (1024, 512)
    assert found["planes"]["LPCAM"]["shape"][1:] == [256, 512]
    large = client.post("/maps", content=bytes(9 * 2**20), headers={"Content-Type": "image/png"})
    assert large.status_code == 413
    foreign = client.get("/", headers={"Host": "evil.example"})
    assert foreign.status_code == 421
    process.terminate()
    process.wait(60)


def encoded(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()
