"""Methods that another distribution registers through entry points run to the end.

All are installed in one folder, and all commands run in one process that finds them there.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch.nn.functional as F
import yaml
from PIL import Image
from tiny import recipe_values
from torch import from_numpy

from lpcam.data.map_files import map_path, read_maps
from lpcam.data.masks import read_index_mask, write_mask
from lpcam.method.prototypes import Prototypes
from lpcam.runtime.files import read_json

HERE = Path(__file__).parent
ENTRY_POINTS = """
[lpcam.clusterings]
farthest = toy_clustering:make
[lpcam.formats]
areas = toy_format:AREAS
[lpcam.hosts]
colours = toy_host:HOST
[lpcam.networks]
cells = toy_network:NETWORK
[lpcam.readers]
named = toy_reader:READER
[lpcam.refinements]
toy = toy_refinement:TOY
"""
RUN_ALL = """
import contextlib, io, json, logging, sys
from lpcam.cli.main import main
done = {}
for name, words in json.load(sys.stdin).items():
    logging.getLogger().handlers.clear()  # main writes to the present stderr
    with contextlib.redirect_stdout(io.StringIO()) as out:
        with contextlib.redirect_stderr(io.StringIO()) as err:
            try:
                status = main(words)
            except SystemExit as refused:
                status = refused.code
    done[name] = status, out.getvalue(), err.getvalue()
print(json.dumps(done))
"""


class Done(NamedTuple):
    """A command that has run."""

    status: int
    output: str
    errors: str


def install(folder: Path) -> None:
    """Install the toys beside this file as a distribution of their own."""
    info = folder / "toys-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toys\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
    for path in HERE.glob("toy_*.py"):
        shutil.copy(path, folder)


def run_all(site: Path, commands: Mapping[str, Sequence[object]]) -> dict[str, Done]:
    """Run commands of lpcam one after another in a process where the toys are installed."""
    paths = (str(site), str(HERE.parents[1] / "src"), os.environ.get("PYTHONPATH", ""))
    found = subprocess.run(
        [sys.executable, "-c", RUN_ALL],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        input=json.dumps({name: [str(word) for word in c] for name, c in commands.items()}),
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    return {name: Done(*one) for name, one in json.loads(found.stdout.splitlines()[-1]).items()}


def predicted(folder: Path) -> Path:
    """What ``lpcam predict`` writes for one image."""
    write_mask(folder / "masks" / "barn.png", np.repeat(np.uint8([[0, 2, 2, 1]]), 3, axis=0))
    Image.new("RGB", (4, 3)).save(folder / "barn.png")
    made_by = {"classes": {"cow": 1, "old, red barn": 2}, "run": "farm"}
    index = {"made_by": made_by, "images": {"barn": str(folder / "barn.png")}, "skipped": []}
    (folder / "predicted.json").write_text(json.dumps(index))
    return folder


def named(pictures: Path, folder: Path) -> Path:
    """Images of one label each, named by it."""
    folder.mkdir()
    for row in (pictures / "labels.csv").read_text().splitlines()[1:]:
        image, _, labels = row.partition(",")
        if labels and ";" not in labels:
            shutil.copy(pictures / "images" / image, folder / f"{labels}+{image}")
    (folder / "named.txt").touch()
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of everything that is made here."""
    return tmp_path_factory.mktemp("extensions")


@pytest.fixture(scope="module")
def done(folder: Path, pictures: Path, weights: Path) -> dict[str, Done]:
    """All commands, run."""
    install(folder / "site")
    recipe, of_reader = folder / "tiny.yaml", folder / "named.yaml"
    values = recipe_values(pictures, folder / "run", weights)
    values["lpcam"]["clustering"] = "farthest"
    training = {"preset": "light", "iterations": 4, "batch_size": 4, "crop": 48}
    values["segment"] = {"network": "cells", "weights": "random", "training": training}
    recipe.write_text(yaml.safe_dump(values))
    root, report = named(pictures, folder / "images"), {"images": 2}
    values = {**recipe_values(root, folder / "named", weights), "report": report}
    values["data"]["kind"] = "named"
    of_reader.write_text(yaml.safe_dump(values))
    run, segmented = ("run", recipe, "--segment", "null"), folder / "segmented"
    refine = (*run, "--refine.method", "toy", "--refine.toy.radius", 1)
    export = ("export", "masks", predicted(folder), folder / "areas", "--format")
    image = pictures / "images" / "i00.png"
    commands: dict[str, Sequence[object]] = {
        "clustering": (*run, "--until", "prototypes"),
        "no clustering": (*run, "--lpcam.clustering", "nearest"),
        "format": (*export, "areas"),
        "no format": (*export, "area"),
        "host": (*run, "--host.method", "colours", "--until", "host-maps"),
        "host again": (
            *(*run, "--host.method", "colours", "--host.colours.decay", 8),
            *("--until", "host-maps"),
        ),
        "no host": (*run, "--host.method", "colour"),
        "refinement": (*refine, "--until", "evaluate"),
        "no refinement": (*run, "--refine.method", "toys"),
        "network": ("segment", recipe, pictures / "masks", "--run.folder", segmented),
        "predict": ("predict", image, "--run", segmented, "--output", folder / "out"),
        "no network": ("run", recipe, "--segment.network", "cell"),
        "reader": ("run", of_reader, "--data.named.separator", "+"),
        "fields": ("recipe", "--fields"),
        "check": ("data", "check", root, "--no-estimate"),
        "no reader": ("run", of_reader, "--data.kind", "nameless"),
    }
    return run_all(folder / "site", commands)


@pytest.mark.parametrize(
    ("kind", "known"),
    [
        ("clustering", "spherical_mixture, farthest"),
        ("format", "overlays, areas"),
        ("host", "edam, colours"),
        ("refinement", "none, toy"),
        ("network", "upernet, cells"),
        ("reader", ", named"),
    ],
)
def test_every_kind_runs_and_is_named_where_another_is_asked_for(
    kind: str, known: str, done: dict[str, Done]
) -> None:
    assert done[kind].status == 0, done[kind].errors
    refused = done[f"no {kind}"]
    assert refused.status == 2
    assert known in refused.errors.replace("'", "")


def test_a_clustering(folder: Path, done: dict[str, Done]) -> None:
    parts = read_json(folder / "run" / "prototypes" / "stage.json")["parts"]
    assert parts["settings"]["clustering"] == "farthest"
    found = Prototypes.load(folder / "run" / "prototypes" / "prototypes.safetensors")
    assert found.foreground.keep.any()


def test_a_format(folder: Path, done: dict[str, Done]) -> None:
    table = (folder / "areas" / "areas.csv").read_text()
    assert table == 'image,class,area\nbarn.png,cow,3\nbarn.png,"old, red barn",6\n'


def test_a_host(folder: Path, done: dict[str, Done]) -> None:
    for number in range(12):
        found = read_maps(folder / "run" / "host-maps" / "colours" / f"i{number:02d}.npz")
        shown = (number != 3) + (number % 4 == 0)
        assert len(found.cam) == len(found.high_res) == len(found.keys) == shown
        assert (folder / "run" / "host-seeds" / "colours" / f"i{number:02d}.png").is_file()
    again = done["host again"].errors
    assert "host: up to date" in again and "decay 4.0 -> 8" in again


def test_a_refinement(folder: Path, done: dict[str, Done]) -> None:
    run = folder / "run"
    for name in ("cam", "lpcam"):
        maps = read_maps(map_path(run / name, "i00")).high_res
        blurred = F.avg_pool2d(from_numpy(maps), 3, 1, 1, count_include_pad=False).numpy()
        found = read_maps(map_path(run / "pseudo" / name / "maps", "i00")).high_res
        assert np.abs(found - blurred).max() < 1 / 250
        assert read_index_mask(run / "pseudo" / name / "i00.png").any()
    assert "LPCAM + blur" in (run / "metrics.json").read_text()


def test_a_network(folder: Path, done: dict[str, Done]) -> None:
    rows = read_json(folder / "segmented" / "metrics.json")["rows"]
    assert [row["method"] for row in rows] == ["Cells on given masks", "Cells on given masks, CRF"]
    assert done["predict"].status == 0, done["predict"].errors
    assert read_index_mask(folder / "out" / "masks" / "i00.png").max() <= 3


def test_a_reader(folder: Path, done: dict[str, Done]) -> None:
    parts = read_json(folder / "named" / "classifier" / "stage.json")["parts"]
    assert parts["classes"] == ["blue", "green", "red"]
    assert len(list((folder / "named" / "seeds").glob("*.png"))) > 3
    assert (folder / "named" / "report.html").is_file()
    assert "data.named.separator" in done["fields"].output
    assert "names of the files" in done["check"].output, done["check"].errors
