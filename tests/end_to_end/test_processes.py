"""Whole runs in two processes: equal to those of one, refused, and ended by an error in one rank.

Most of such a test's time is the start of two Pythons, so one command of torchrun makes all the
runs that are compared. Kills are in tests/faults.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from faults.fault_test import Command, environment
from tiny import digests, recipe_values

from lpcam.data.map_files import read_maps
from lpcam.data.masks import read_index_mask
from lpcam.pipeline.cache import locked
from lpcam.pipeline.recipe import parse_recipe
from lpcam.pipeline.run import run
from lpcam.runtime.files import read_tensors

pytest.importorskip("accelerate", reason="several processes need accelerate, an extra")

COMMAND = "lpcam run tiny.yaml"
PATIENCE = 600.0
"""Seconds that a command with an error in one of its processes may take, its start included."""
MAPS = ("cam", "lpcam", "lpcam_f")
PROGRAM = textwrap.dedent(
    """
    import json, os, sys
    from pathlib import Path
    import torch
    from lpcam.runtime import errors
    from lpcam.pipeline import run as pipeline
    from lpcam.pipeline.cache import locked
    from lpcam.pipeline.stages import maps
    from lpcam.pipeline.recipe import load_recipe

    torch.set_num_threads(1)
    rank = os.environ["RANK"]
    write_maps = maps.write_maps
    notes = {"refused": None, "written": {}}

    def noted(path, *arguments, **options):
        if notes["refused"] is None:  # the first process holds the folder at this very moment
            try:
                with locked(path.parents[1]):
                    notes["refused"] = ""
            except errors.ArtefactError as error:
                notes["refused"] = str(error)
        write_maps(path, *arguments, **options)
        notes["written"][name].append(str(path.relative_to(path.parents[1])))

    maps.write_maps = noted
    for name in sys.argv[1:]:
        notes["written"][name] = []
        recipe = load_recipe(f"{name}.yaml")
        rows = pipeline.run(recipe, command=COMMAND).rows
        notes[f"rows of {name}"] = rows
    Path(f"notes-{rank}.json").write_text(json.dumps(notes))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    """
).replace("COMMAND", repr(COMMAND))


def two(folder: Path, *arguments: str, patience: float = PATIENCE) -> tuple[int, str]:
    """Exit status and output of two processes, stopped with all that they started if they hang."""
    log = folder / "log.txt"
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    with log.open("wb") as file:
        command = Command(
            subprocess.Popen(
                [sys.executable, *start, *arguments],
                cwd=folder,
                env=environment(),
                stdout=file,
                stderr=file,
            )
        )
    try:
        status = command.launcher.wait(patience)
    except subprocess.TimeoutExpired:
        pytest.fail(f"no end after {patience:.0f} s: {log.read_text('utf-8', errors='replace')}")
    finally:
        command.stop()
    return status, log.read_text("utf-8", errors="replace")


@dataclass
class Runs:
    """The same recipes in one process (``NAME-alone``) and in two (``NAME``)."""

    folder: Path
    values: dict[str, dict[str, Any]]
    notes: list[dict[str, Any]]
    """Of each rank: the map files it has written, in order, and what it was told of the lock."""

    def alone(self, name: str) -> Path:
        return self.folder / f"{name}-alone"

    def both(self, name: str) -> Path:
        return self.folder / name


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, pictures: Path, weights: Path) -> Runs:
    """No test may change them."""
    folder = tmp_path_factory.mktemp("two")
    names = ("probe", "exact", "finetune", "irn", "adaptive")
    # The folder has the same path in both runs, and then another name, so that all bytes compare.
    values = {name: recipe_values(pictures, folder / name, weights) for name in names}
    values["exact"]["lpcam"]["max_features"] = None
    values["exact"]["refine"] = {"method": "crf"}
    values["exact"]["report"] = {"images": 4}
    values["adaptive"]["lpcam"] = {"preset": "adaptive", "max_features": 60}
    values["adaptive"]["refine"] = {"method": "auto"}
    values["adaptive"]["run"]["engine"] = "auto"  # a runtime where there is one
    values["irn"]["segment"] = {
        "backbone": "test_resnet",
        "weights": "random",
        "masks": ["LPCAM"],
        "training": {"preset": "light", "iterations": 3, "batch_size": 5, "crop": 49},
        "validations": 1,
    }
    values["irn"]["refine"] = {
        "maps": ["LPCAM"],
        "irn": {"epochs": 2, "batch_size": 5, "crop": 64, "radius": 5},
    }
    values["finetune"]["maps"]["dtype"] = "float16"
    values["finetune"]["classifier"] |= {
        "method": "finetune",
        "finetune": {"epochs": 2, "batch_size": 5, "long_side": [60, 64], "crop": 64},
    }
    for name in names:
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(values[name]), encoding="utf-8")
        run(parse_recipe(values[name], where=name), command=COMMAND)
        (folder / name).rename(folder / f"{name}-alone")
    (folder / "program.py").write_text(PROGRAM, encoding="utf-8")
    status, output = two(folder, "program.py", *names)
    assert status == 0, output
    notes = [json.loads((folder / f"notes-{rank}.json").read_text()) for rank in range(2)]
    return Runs(folder, values, notes)


@pytest.mark.parametrize("name", ["probe", "exact", "adaptive"])
def test_a_probe_gives_the_same_bytes(runs: Runs, name: str) -> None:
    """Every file, recipe, choices and figures too; prototypes of all features, and of a sample."""
    expected = digests(runs.alone(name))
    assert len(expected) > 40
    assert digests(runs.both(name)) == expected


def test_finetuning_gives_the_same_maps(runs: Runs) -> None:
    """Gradients are added up in another order, which is all that may differ."""
    alone, both = runs.alone("finetune"), runs.both("finetune")
    assert digests(both).keys() == digests(alone).keys()
    trained = Path("classifier", "classifier.safetensors")
    found, _ = read_tensors(both / trained)
    expected, _ = read_tensors(alone / trained)
    start, _ = read_tensors(runs.alone("probe") / trained)
    assert found.keys() == expected.keys() == start.keys()
    for key, values in expected.items():
        np.testing.assert_allclose(found[key], values, rtol=0, atol=1e-5, err_msg=key)
    moved = max(float((expected[key] - start[key]).abs().max()) for key in expected)
    assert moved > 1e-3  # it did train
    for path in sorted(path for stage in MAPS for path in (alone / stage).glob("*.npz")):
        one, other = read_maps(path), read_maps(both / path.relative_to(alone))
        assert other.keys.tolist() == one.keys.tolist()
        for a, b in ((one.cam, other.cam), (one.high_res, other.high_res)):
            np.testing.assert_allclose(b, a, rtol=0, atol=1e-3 * a.max(initial=0), err_msg=path)


def test_irn_learns_the_same_boundaries(runs: Runs) -> None:
    """Pairs are counted over both processes' shares of a batch; rounding alone differs."""
    alone, both = runs.alone("irn"), runs.both("irn")
    assert digests(both).keys() == digests(alone).keys()
    trained = Path("refine-network", "lpcam", "network.safetensors")
    found, _ = read_tensors(both / trained)
    expected, _ = read_tensors(alone / trained)
    assert found.keys() == expected.keys()
    for key, values in expected.items():
        np.testing.assert_allclose(found[key], values, rtol=0, atol=1e-4, err_msg=key)
    for path in sorted((alone / "refine-labels" / "lpcam").glob("*.png")):
        assert (both / path.relative_to(alone)).read_bytes() == path.read_bytes()


def test_a_segmenter_learns_the_same(runs: Runs) -> None:
    """The pixels that count are counted over both processes' shares; rounding alone differs."""
    alone, both = runs.alone("irn"), runs.both("irn")
    trained = Path("segment", "lpcam", "segmenter.safetensors")
    found, _ = read_tensors(both / trained)
    expected, _ = read_tensors(alone / trained)
    assert found.keys() == expected.keys()
    for key, values in expected.items():
        np.testing.assert_allclose(found[key], values, rtol=0, atol=2e-3, err_msg=key)
    masks = sorted((alone / "test" / "lpcam").glob("*.png"))
    assert len(masks) == 12
    for path in masks:
        one, other = read_index_mask(path), read_index_mask(both / path.relative_to(alone))
        assert (one == other).mean() > 0.95


def test_one_report_for_all(runs: Runs) -> None:
    for folder in (runs.alone("exact"), runs.both("exact")):
        assert "CAM + CRF" in (folder / "report.html").read_text("utf-8")


@pytest.mark.parametrize("name", ["probe", "exact", "finetune"])
def test_each_map_is_written_once(runs: Runs, name: str) -> None:
    ids = [f"i{number:02d}" for number in range(12)]
    shares = [note["written"][name] for note in runs.notes]
    assert Counter(shares[0] + shares[1]) == Counter(f"{s}/{i}.npz" for s in MAPS for i in ids)
    owned = [{Path(path).stem for path in share} for share in shares]
    assert not owned[0] & owned[1]  # an image belongs to the same process in every stage
    assert [len(ids) for ids in owned] == [6, 6]


def test_every_process_has_the_figures(runs: Runs) -> None:
    expected = json.loads((runs.alone("probe") / "metrics.json").read_text())["rows"]
    assert [note["rows of probe"] for note in runs.notes] == [expected, expected]


def test_another_command_is_refused_while_two_processes_work(runs: Runs) -> None:
    for note in runs.notes:  # each tried to take the folder at its first map
        assert f"another run uses {runs.both('probe')};" in note["refused"]


def test_two_processes_are_refused_while_another_command_works(runs: Runs, tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(runs.values["probe"]))
    before = digests(runs.both("probe"))
    with locked(runs.both("probe")):
        status, output = two(tmp_path, "-m", "lpcam", "run", "tiny.yaml")
    assert status != 0
    assert f"lpcam: another run uses {runs.both('probe')};" in output
    assert "Traceback (most recent call last):\n  File" not in output.partition("lpcam: ")[0]
    assert digests(runs.both("probe")) == before


def test_an_error_in_one_process_ends_the_command(runs: Runs, tmp_path: Path) -> None:
    """An image of the second process, which the first never opens, has gone bad unnoticed."""
    values = runs.values["probe"]
    root, folder = tmp_path / "boxes", tmp_path / "run"
    shutil.copytree(values["data"]["root"], root)
    shutil.copytree(runs.both("probe"), folder)
    values = values | {"data": {"kind": "folder", "root": str(root)}}
    values = values | {"run": values["run"] | {"folder": str(folder)}}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(values))
    broken = Path(runs.notes[1]["written"]["probe"][2]).stem
    image = root / "images" / f"{broken}.png"
    whole, stat = image.read_bytes(), image.stat()
    image.write_bytes(b"\0" * len(whole))  # of the same size and date: not looked at again
    os.utime(image, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    (folder / "cam" / f"{broken}.npz").unlink()
    status, output = two(tmp_path, "-m", "lpcam", "run", "tiny.yaml")
    assert status != 0
    assert f"lpcam: cannot read image {image}" in output
    assert not (folder / "cam" / f"{broken}.npz").exists()
    image.write_bytes(whole)
    os.utime(image, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    run(parse_recipe(values, where="tiny.yaml"), command=COMMAND)  # one process goes on
    found, expected = digests(folder), digests(runs.both("probe"))
    assert found | {"recipe.yaml": ""} == expected | {"recipe.yaml": ""}
