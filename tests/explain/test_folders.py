"""Explaining files and folders: names, what is replaced, what is left out, what is refused."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny import draw_image

from lpcam.cli.main import main
from lpcam.data.masks import read_index_mask
from lpcam.data.output_folders import find_images
from lpcam.explain.explainer import Explainer
from lpcam.explain.folders import INDEX, explain_files
from lpcam.runtime.errors import ArtefactError, DataError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three photographs, one of them in a subfolder, a broken one and a text."""
    root = tmp_path / "in"
    (root / "barn").mkdir(parents=True)
    rng = np.random.default_rng(3)
    for name, labels in {"a": ["blue"], "b": ["red", "green"], "barn/c": ["green"]}.items():
        Image.fromarray(draw_image(labels, (64, 72), rng)[0]).save(root / f"{name}.png")
    (root / "broken.jpg").write_bytes(b"no image")
    (root / "read.me").write_text("text")
    return root


def tree(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def touch(root: Path, names: Iterable[str]) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")


def test_names_are_paths_below_the_folder(folder: Path, tmp_path: Path) -> None:
    touch(folder, [".hidden/x.png", ".y.png", "out/masks/a.png", "Z.JPEG"])
    images = dict(find_images([folder], folder / "out").images)
    assert list(images) == ["Z", "a", "b", "barn/c", "broken"]
    assert images["barn/c"] == folder / "barn" / "c.png"
    both = dict(find_images([folder / "barn" / "c.png", folder], folder / "out").images)
    assert list(both) == ["c", "Z", "a", "b", "broken"]  # each image once


def test_equal_names_keep_their_endings_or_are_numbered(tmp_path: Path) -> None:
    touch(tmp_path, ["1/a.png", "1/a.jpg", "1/A.gif", "2/a.png", "2/b.png", "3/a.png-2.bmp"])
    sources = [tmp_path / "1", tmp_path / "2", tmp_path / "3"]
    found = dict(find_images(sources, tmp_path / "out").images)
    names = {name: path.relative_to(tmp_path).as_posix() for name, path in found.items()}
    assert names == {
        "A.gif": "1/A.gif",
        "a.jpg": "1/a.jpg",
        "a.png": "1/a.png",
        "a.png-3": "2/a.png",
        "b": "2/b.png",
        "a.png-2": "3/a.png-2.bmp",
    }


def test_names_that_no_file_system_takes_and_sources_that_are_none(tmp_path: Path) -> None:
    touch(tmp_path, ['we"ird\n\\?.png', f"{'ü' * 120}.png", "out/masks/a.png"])
    (tmp_path / os.fsdecode(b"latin\xe9.png")).write_bytes(b"")
    names = list(dict(find_images([tmp_path], tmp_path / "out").images))
    assert {"we_ird___", "latin\ufffd"} <= set(names)
    assert all(len(name.encode()) <= 160 for name in names)
    (tmp_path / "empty").mkdir()
    for source, words in (("no.png", "no.png"), ("empty", "empty"), ("out/masks/a.png", "output")):
        with pytest.raises(DataError, match=words):
            find_images([tmp_path / source], tmp_path / "out")


def test_a_folder(explainer: Explainer, folder: Path, tmp_path: Path) -> None:
    inputs, output = tree(folder), tmp_path / "out"
    result = explain_files(explainer, [folder], output, at_least_one=True, command="lpcam explain")
    assert tree(folder) == inputs
    assert [one["image"] for one in result.found] == ["a", "b", "barn/c"]
    assert [skip["image"] for skip in result.skipped] == [str(folder / "broken.jpg")]
    assert "damaged or not an image" in result.skipped[0]["reason"]
    for one in result.found:
        assert json.loads((output / "found" / f"{one['image']}.json").read_text()) == one
        mask = read_index_mask(output / one["files"]["mask"])
        expected = explainer(folder / f"{one['image']}.png", at_least_one=True).mask()
        np.testing.assert_array_equal(mask, expected)
        assert one["made_by"]["file"] == str(folder / f"{one['image']}.png")
    index = json.loads((output / INDEX).read_text())
    assert set(index["images"]) == {"a", "b", "barn/c"}
    assert index["skipped"] == result.skipped
    assert index["command"] == "lpcam explain"
    rows = sum(len(one["classes"]) for one in result.found)
    assert Image.open(output / "sheet.png").size[1] == 30 + rows * 208 + 8
    summary = result.summary()
    assert f"1 left out:\n  {folder / 'broken.jpg'}: cannot read image" in summary
    assert f"results in {output}" in summary


def test_the_command_maps_fast_on_request(
    run: Path, explainer: Explainer, folder: Path, tmp_path: Path
) -> None:
    image = folder / "a.png"
    for option in ([], ["--fast"]):
        output = tmp_path / f"out{len(option)}"
        given = ["--run", str(run), "--labels", "blue", "--output", str(output), "--device", "cpu"]
        assert main(["explain", str(image), *given, *option]) == 0
        chosen = explainer.fast() if option else explainer
        expected = chosen(image, labels=["blue"])
        np.testing.assert_array_equal(read_index_mask(output / "masks/a.png"), expected.mask())
        made_by = json.loads((output / INDEX).read_text())["made_by"]
        assert (made_by["scales"], made_by["flip"]) == (
            ([1.0], False) if option else (list(explainer.settings.scales), True)
        )


def test_threads_give_the_same_bytes(explainer: Explainer, folder: Path, tmp_path: Path) -> None:
    for workers in (1, 2):
        explain_files(explainer, [folder], tmp_path / f"out{workers}", workers=workers)
    assert tree(tmp_path / "out1") == tree(tmp_path / "out2")


def test_a_second_call_replaces_its_own_files_only(
    explainer: Explainer, folder: Path, tmp_path: Path
) -> None:
    """Other files with names of outputs stay, also where the image is broken now."""
    output = tmp_path / "out"
    explain_files(explainer, [folder], output, labels=["blue", "red"])
    mine = {"masks/mine.png": b"1", "note.txt": b"2", "heatmaps/mine.blue.cam.png": b"3"}
    for name, data in mine.items():
        (output / name).write_bytes(data)
    before = tree(output)
    explain_files(explainer, [folder / "a.png"], output, labels=["green"])
    after = tree(output)
    assert "heatmaps/a.green.cam.png" in after
    assert not [name for name in after if "/a.blue." in name]
    (folder / "a.png").write_bytes(b"broken")
    explain_files(explainer, [folder / "a.png"], output)
    left = tree(output)
    assert not [name for name in left if "/a." in name or name == "sheet.png"]
    assert set(json.loads(left[INDEX])["images"]) == {"b", "barn/c"}
    for name, data in before.items():
        if "/a." not in name and name not in (INDEX, "sheet.png"):
            assert left[name] == data


@pytest.mark.parametrize("name", ["overlays/a.red.lpcam.png", "sheet.png", INDEX])
def test_foreign_files_are_never_replaced(
    explainer: Explainer, folder: Path, tmp_path: Path, name: str
) -> None:
    touch(tmp_path / "out", [name])
    (tmp_path / "out" / name).write_text('{"mine": 1}')
    with pytest.raises(ArtefactError, match="lpcam explain"):
        explain_files(explainer, [folder], tmp_path / "out")
    assert tree(tmp_path / "out") == {name: b'{"mine": 1}'}


@pytest.mark.usefixtures("folder")
def test_the_command(run: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["explain", "in", "--run", str(run), "--threads", "1", "--device", "cpu"]
    assert main(words) == 1  # a broken image, the rest is done
    out = capsys.readouterr().out
    assert "1 left out:" in out
    assert "results in explained\npictures in explained/sheet.png" in out
    assert (tmp_path / "explained" / "masks" / "barn" / "c.png").is_file()
    more = ["--labels", "red, blue", "--threshold", "0.6", "--output", "other"]
    assert main([*words[:1], "in/a.png", *words[2:], *more]) == 0
    found = json.loads((tmp_path / "other" / "found" / "a.json").read_text())
    assert [c["name"] for c in found["classes"]] == ["red", "blue"]
    assert found["threshold"] == 0.6
    index = json.loads((tmp_path / "other" / INDEX).read_text())
    assert index["command"].startswith("lpcam explain in/a.png --run ")
    model = str(run / "classifier" / "classifier.safetensors")
    prototypes = str(run / "prototypes" / "prototypes.safetensors")
    words = ["explain", "in/a.png", "--model", model, "--prototypes", prototypes]
    assert main([*words, "--output", "model", "--preset", "small", "--at-least-one"]) == 0
    assert (tmp_path / "model" / "sheet.png").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--run", "RUN", "--preset", "small"], "--preset"),
        (["--model", "resnet18"], "--prototypes"),
        (["--run", "nowhere"], "nowhere"),
        (["--run", "RUN", "--labels", "cow"], "'cow'"),
        (["--run", "RUN", "--labels", "red", "--score", "0.3"], "--score"),
        (["--run", "RUN", "--model", "resnet18"], "--model"),
        ([], "--run"),
        (["--run", "RUN", "--labels", ""], "--labels"),
        (["--run", "RUN", "--score", "1.5"], "--score"),
    ],
)
@pytest.mark.usefixtures("folder")
def test_the_commands_errors(
    run: Path, tmp_path: Path, monkeypatch: Any, capsys: Any, words: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [str(run) if word == "RUN" else word for word in words]
    try:
        assert main(["explain", "in", *words]) == 2
    except SystemExit as end:  # argparse
        assert end.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "explained").exists()
