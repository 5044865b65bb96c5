"""The distributions: what they hold, and the wheel where every extra is missing."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from PIL import Image
from tiny import draw_folder, write_weights

pytest.importorskip("build", reason="building distributions needs the package build")

ROOT = Path(__file__).parents[2]
FOR_DEVELOPERS = {"benchmarks", "develop", "docs"}
ABSENT = {
    "onnx",
    "onnxruntime",
    "openvino",
    "scipy",
    "matplotlib",
    "starlette",
    "uvicorn",
    "sklearn",
    "transformers",
    "pycocotools",
    "pytorch_grad_cam",
    "accelerate",
    "pytest",
}
"""Modules of extras, which a bare installation must not have."""
NEEDS = {
    "serve": ["serve", "run", "--port", "0"],
    "onnx": ["export", "onnx", "run", "model.onnx"],
    "openvino": ["run", "boxes/recipe.yaml", "--run.folder", "other", "--run.engine", "openvino"],
    "objects": ["export", "masks", "run", "exported", "--format", "coco", "--instances"],
    "upernet": [
        *("segment", "boxes/recipe.yaml", "boxes/masks", "--run.folder", "other"),
        *("--segment.network", "upernet", "--segment.training.preset", "upernet.voc12.paper"),
        *("--segment.test.preset", "upernet.paper"),
    ],
    "coco": ["run", "polygons/recipe.yaml", "--run.folder", "other"],
    "sklearn": ["run", "boxes/recipe.yaml", "--run.folder", "more", "--lpcam.clustering", "kmeans"],
    "distributed": ["run", "boxes/recipe.yaml", "--run.folder", "other"],
    "plot": [],
}
"""A command that needs each extra; for ``plot`` there is none, only Python."""
SCRIPT = """
import contextlib, io, json, os, sys
from lpcam.cli.main import main

said = {}
for extra, words in json.loads(sys.stdin.read()).items():
    os.environ.update({"WORLD_SIZE": "2", "RANK": "0"} if extra == "distributed" else {})
    with contextlib.redirect_stderr(io.StringIO()) as heard, contextlib.suppress(SystemExit):
        code = main(words)
        heard.write(f" exit status {code}")
    said[extra] = heard.getvalue()
    os.environ.pop("WORLD_SIZE", None)

import lpcam
try:
    lpcam.RunFolder("run").explainer()("boxes/images/i00.png", labels=["blue"]).plot()
except lpcam.LpcamError as error:
    said["plot"] = f"{error} exit status 1"
print("SAID", json.dumps(said))
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an sdist of this checkout and of the wheel that is built from it."""
    folder = tmp_path_factory.mktemp("built")
    left = shutil.ignore_patterns(".*", "build", "dist", "runs", "__pycache__", "*.egg-info")
    shutil.copytree(ROOT, folder / "source", ignore=left)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", "out", "source"]
    made = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stdout + made.stderr
    return folder / "out"


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (path,) = built.glob("*.whl")
    return path


def requirements(distribution: metadata.Distribution, extras: set[str]) -> Iterator[Requirement]:
    """What a distribution needs here, with some of its extras."""
    for line in distribution.requires or []:
        one = Requirement(line)
        wanted = [{"extra": name} for name in ({""} | extras)]
        if one.marker is None or any(one.marker.evaluate(own) for own in wanted):
            yield one


def link_core(site: Path) -> None:
    """Link what the installed wheel needs, and nothing of its extras, from this environment."""
    (own,) = metadata.distributions(name="lpcam", path=[str(site)])
    waiting, seen = list(requirements(own, set())), set()
    while waiting:
        wanted = waiting.pop()
        name = re.sub(r"[-_.]+", "-", wanted.name).lower()
        if (name, *sorted(wanted.extras)) in seen:
            continue
        seen.add((name, *sorted(wanted.extras)))
        found = metadata.distribution(name)
        for top in {file.parts[0] for file in found.files or []} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(Path(str(found.locate_file(top))))
        waiting += requirements(found, wanted.extras)


@pytest.fixture(scope="module")
def bare(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of an environment that has the wheel and its core dependencies alone."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder / "env")
    python = folder / "env/bin/python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "-q", "--no-deps", "--no-index", str(wheel)], check=True)
    (site,) = (folder / "env/lib").glob("python*/site-packages")
    link_core(site)
    subprocess.run([*pip, "check"], check=True)  # nothing that the wheel needs is missing
    return python.parent


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny data set, as images and as COCO's polygons, and weights."""
    folder = tmp_path_factory.mktemp("work")
    draw_folder(folder / "boxes")
    write_weights(folder / "tiny.safetensors")
    polygons = folder / "polygons"
    shutil.copytree(folder / "boxes/images", polygons / "images")
    width, height = Image.open(polygons / "images/i00.png").size
    image = {"id": 1, "file_name": "i00.png", "width": width, "height": height}
    outline = {"id": 1, "image_id": 1, "category_id": 1, "iscrowd": 0, "area": 100}
    outline |= {"bbox": [4, 4, 10, 10], "segmentation": [[4, 4, 14, 4, 14, 14]]}
    listed = {"images": [image], "annotations": [outline]}
    listed |= {"categories": [{"id": 1, "name": "box"}]}
    (polygons / "boxes.json").write_text(json.dumps(listed), encoding="utf-8")
    return folder


def call(
    program: Path, *words: str, cwd: Path, given: str = ""
) -> subprocess.CompletedProcess[str]:
    """A program in the bare environment, without a network."""
    own = {"PATH": os.environ["PATH"], "HOME": str(cwd), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [program, *words],
        cwd=cwd,
        env={**own, "HF_HUB_OFFLINE": "1"},
        input=given,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def finished(bare: Path, work: Path) -> dict[str, str]:
    """What init, run, report and explain print in the bare environment."""
    cut = ("--threads", "1", "--run.folder", "run", "--lpcam.max_features", "60")
    backbone = ("--backbone", "test_resnet", "--weights", "tiny.safetensors")
    printed = {}
    commands = (
        ("init", "boxes", *backbone),
        ("init", "polygons/boxes.json", *backbone),
        ("run", "boxes/recipe.yaml", *cut, "--classifier.probe.long_side", "64"),
        ("report", "run"),
        ("explain", "boxes/images/i00.png", "--run", "run", "--at-least-one"),
    )
    for words in commands:
        made = call(bare / "lpcam", *words, cwd=work)
        assert made.returncode == 0, f"{words}: {made.stdout}{made.stderr}"
        printed[words[0]] = made.stdout + made.stderr
    return printed


def test_the_distributions_are_those_that_an_index_accepts(built: Path) -> None:
    pytest.importorskip("twine", reason="the check of distributions needs twine")
    files = [str(path) for path in built.iterdir()]
    assert len(files) == 2
    command = [sys.executable, "-m", "twine", "check", "--strict", *files]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stdout


def test_the_wheel_holds_every_file_of_the_package(wheel: Path) -> None:
    source = ROOT / "src"
    own = {
        path.relative_to(source).as_posix()
        for path in (source / "lpcam").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    held = set(zipfile.ZipFile(wheel).namelist())
    assert own <= held
    assert {name.partition("/")[0] for name in held - own} == {f"lpcam-{version(wheel)}.dist-info"}
    assert any(name.endswith("/licenses/LICENSE") for name in held)


def version(wheel: Path) -> str:
    return wheel.name.split("-")[1]


def test_the_sdist_can_be_tested_and_read(built: Path) -> None:
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    wanted = "CHANGELOG.md CITATION.cff LICENSE SECURITY.md Makefile constraints.txt conftest.py"
    wanted += " docs/index.md examples/tutorial.ipynb tests/tiny.py tests/install/test_wheel.py"
    assert set(wanted.split()) <= held


def test_the_bare_environment_has_no_extra(bare: Path, work: Path) -> None:
    text = "import importlib.util as i, sys; print([n for n in sys.argv[1:] if i.find_spec(n)])"
    assert call(bare / "python", "-c", text, *ABSENT, cwd=work).stdout.strip() == "[]"


def test_from_images_to_masks_without_an_extra(finished: dict[str, str], work: Path) -> None:
    assert "lpcam[onnx]" in finished["run"]  # what would make it faster is named
    assert len(list((work / "run/seeds").glob("*.png"))) == 12
    assert (work / "run/report.html").stat().st_size > 10_000
    assert (work / "explained/masks/i00.png").is_file()


def test_every_absent_extra_is_named_when_needed(
    finished: dict[str, str], bare: Path, work: Path, wheel: Path
) -> None:
    of_wheel = metadata.Distribution.at(next(bare.parent.glob("lib/*/site-packages/lpcam-*")))
    offered = set(of_wheel.metadata.get_all("Provides-Extra") or [])
    assert offered - FOR_DEVELOPERS - {"peers"} == set(NEEDS)
    commands = {extra: words for extra, words in NEEDS.items() if words}
    made = call(bare / "python", "-c", SCRIPT, cwd=work, given=json.dumps(commands))
    assert "SAID " in made.stdout, made.stderr
    said: dict[str, Any] = json.loads(made.stdout.partition("SAID ")[2])
    for extra in NEEDS:
        assert f"pip install 'lpcam[{extra}]'" in said[extra], f"{extra}: {said[extra]}"
        assert "exit status 0" not in said[extra], extra
