"""Range and orientation of a data set reach every reader of its images, and of new ones."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from tiny import draw_folder, recipe_values

from lpcam.cli.main import main
from lpcam.data.images import Reading, decode_image, read_image
from lpcam.explain.serve import app as server
from lpcam.pipeline.run_folder import RunFolder
from lpcam.runtime.files import read_json

TURN = 3  # which no size tells
SCALE, OFFSET = 9, 700
RANGE = (OFFSET, OFFSET + 255 * SCALE)
SEGMENT: dict[str, Any] = {
    "network": "deeplabv2",
    "backbone": "test_resnet",
    "weights": "random",
    "masks": ["truth"],
    "training": {"preset": "light", "iterations": 2, "batch_size": 2, "crop": 49},
    "test": {"crf": None},
}


def write_twins(root: Path) -> tuple[Path, Path]:
    """The same pixels twice: grey of 8 bits; of 12 bits, in files whose EXIF turns them."""
    plain, deep = draw_folder(root / "plain", count=8), draw_folder(root / "deep", count=8)
    exif = Image.Exif()
    exif[0x0112] = TURN
    for path in sorted((plain / "images").iterdir()):
        # the boxes of each class have a grey of their own
        rgb = np.array(Image.open(path)).astype(int)
        grey = (rgb @ [1, 2, 3] // 6).astype(np.uint8)
        Image.fromarray(grey).save(path)
        values = grey.astype(np.uint16) * SCALE + OFFSET
        Image.fromarray(values).save(deep / "images" / path.name, exif=exif)
    return plain, deep


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, weights: Path) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("reading")
    found = {}
    for data in write_twins(root):
        values = recipe_values(data, root / f"run-{data.name}", weights) | {"segment": SEGMENT}
        if data.name == "deep":
            values["data"] |= {"range": list(RANGE), "orientation": "stored"}
        recipe = root / f"{data.name}.yaml"
        recipe.write_text(yaml.safe_dump(values))
        assert main(["run", str(recipe)]) == 0
        found[data.name] = root / f"run-{data.name}"
    return found


def images_of(runs: dict[str, Path], name: str) -> Path:
    return runs[name].parent / name / "images"


def masks_below(folder: Path) -> dict[str, bytes]:
    found = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.png")}
    assert found
    return found


def test_the_run_is_that_of_the_same_pixels(runs: dict[str, Path]) -> None:
    rows = {name: read_json(folder / "metrics.json")["rows"] for name, folder in runs.items()}
    for plain, deep in zip(rows["plain"], rows["deep"], strict=True):
        own, read = plain.pop("protocol"), deep.pop("protocol")
        assert "reading" not in own and read["reading"] == {
            "range": [*RANGE],
            "orientation": "stored",
        }
        assert {**plain, "dataset": ""} == {**deep, "dataset": ""}
    for name in ("seeds", "test/truth"):
        assert masks_below(runs["plain"] / name) == masks_below(runs["deep"] / name)


@pytest.mark.parametrize("command", ["explain", "predict"])
def test_new_images_are_read_as_those_of_the_run(
    command: str, runs: dict[str, Path], tmp_path: Path
) -> None:
    for name, run in runs.items():
        more = ["--at-least-one"] if command == "explain" else []
        arguments = [str(images_of(runs, name)), "--run", str(run), "--threads", "1", *more]
        assert main([command, *arguments, "--output", str(tmp_path / name)]) == 0
    for name, data in masks_below(tmp_path / "plain" / "masks").items():
        assert data == (tmp_path / "deep" / "masks" / name).read_bytes(), name
    made_by = read_json(next((tmp_path / "deep" / "found").glob("*.json")))["made_by"]
    assert (made_by["range"], made_by["orientation"]) == (list(RANGE), "stored")
    # and their masks are exported over the same pixels
    if command == "predict":
        export = ["--format", "overlays", "--threads", "1"]
        for name in runs:
            assert (
                main(
                    ["export", "masks", str(tmp_path / name), str(tmp_path / f"{name}-x"), *export]
                )
                == 0
            )
        for path in (tmp_path / "plain-x").rglob("*.jpg"):
            other = tmp_path / "deep-x" / path.relative_to(tmp_path / "plain-x")
            assert path.read_bytes() == other.read_bytes()


def test_the_page_reads_uploads_as_the_run(runs: dict[str, Path]) -> None:
    pytest.importorskip("starlette", reason="the extra 'serve' is not installed")
    pytest.importorskip("httpx", reason="starlette's test client needs httpx")
    client_of = import_module("starlette.testclient").TestClient
    answers = []
    for name, run in runs.items():
        app = server.application(
            RunFolder(run).explainer(device="cpu"), name="x", port=1, threads=1
        )
        with client_of(app, base_url="http://127.0.0.1:1") as client:
            data = (images_of(runs, name) / "i00.png").read_bytes()
            answers.append(
                client.post("/maps", content=data, headers={"Content-Type": "image/png"})
            )
    plain, deep = (answer.json() for answer in answers)
    assert (plain["picture"], plain["planes"]) == (deep["picture"], deep["planes"])


@pytest.mark.parametrize("format", ["overlays", "coco"])
def test_exports_read_images_as_the_run(format: str, runs: dict[str, Path], tmp_path: Path) -> None:
    for name, run in runs.items():
        out = str(tmp_path / name)
        assert main(["export", "masks", str(run), out, "--format", format, "--threads", "1"]) == 0
    for path in (tmp_path / "plain").rglob("*"):
        other = tmp_path / "deep" / path.relative_to(tmp_path / "plain")
        if path.is_file() and path.name != "exported.json":
            assert path.read_bytes() == other.read_bytes()


def test_a_measured_range_is_kept_with_the_run(runs: dict[str, Path], tmp_path: Path) -> None:
    values = yaml.safe_load((runs["deep"] / "recipe.yaml").read_text())
    values["data"] |= {"range": None, "orientation": "upright"}
    values["run"]["folder"] = str(tmp_path / "run")
    del values["segment"]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    assert main(["run", str(tmp_path / "recipe.yaml"), "--until", "prototypes"]) == 0
    explainer = RunFolder(tmp_path / "run").explainer(device="cpu")
    low, high = explainer.reading.range or (0, 0)
    path = images_of(runs, "deep") / "i00.png"
    pixels = np.array(Image.open(path))
    assert OFFSET <= low < pixels.max() <= high + SCALE * 40
    shown = explainer(path, labels=["red"]).image
    assert np.array_equal(shown, read_image(path, Reading(range=(low, high))))
    turned = np.rot90(
        decode_image(path.read_bytes(), "x", reading=Reading((low, high), "stored")), 2
    )
    assert np.array_equal(shown, turned)
