"""Segmenting files and folders, probabilities on disk, and the archive for the VOC test server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import COLOURS, draw_image
from torch import Tensor, nn

from lpcam.classifiers.classifier import Preprocessing
from lpcam.data.dataset import ClassTable
from lpcam.data.drawing import overlay_mask
from lpcam.data.masks import read_index_mask
from lpcam.segmentation import folders as files
from lpcam.segmentation import inference as predict
from lpcam.segmentation.folders import INDEX, segment_files
from lpcam.segmentation.settings import SegmentTestSettings

SETTINGS = SegmentTestSettings.from_preset("deeplabv2.official", crf=None)
CLASSES = ClassTable(tuple(COLOURS), (1, 2, 9))
ANCHORS = torch.tensor([(128, 128, 128), *COLOURS.values()]) / 255.0


class Nearest(nn.Module):
    """The label is that of the nearest colour, grey being the background."""

    preprocessing = Preprocessing((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    classes = CLASSES
    device = torch.device("cpu")

    def __init__(self) -> None:
        super().__init__()
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        differences = images[:, None] - ANCHORS[:, :, None, None]
        return -20.0 * differences.square().sum(2)


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


def colours_of(path: Path) -> np.ndarray:
    return np.array(Image.open(path).convert("RGB"))


def expected_mask(image: np.ndarray) -> np.ndarray:
    """Of `Nearest`, without any of its code."""
    anchors = np.array([(128, 128, 128), *COLOURS.values()], np.float64)
    distances = ((image[None].astype(np.float64) - anchors[:, None, None]) ** 2).sum(-1)
    return np.array([0, 1, 2, 9], np.uint8)[distances.argmin(0)]


def test_a_folder(folder: Path, tmp_path: Path) -> None:
    inputs, output = tree(folder), tmp_path / "out"
    result = segment_files(
        Nearest(), [folder], output, SETTINGS, command="lpcam predict", made_by={"run": "tiny"}
    )
    assert tree(folder) == inputs
    assert [one["image"] for one in result.found] == ["a", "b", "barn/c"]
    for one in result.found:
        name = one["image"]
        assert json.loads((output / "found" / f"{name}.json").read_text()) == one
        image = colours_of(folder / f"{name}.png")
        mask = read_index_mask(output / one["files"]["mask"])
        np.testing.assert_array_equal(mask, expected_mask(image))
        np.testing.assert_array_equal(
            colours_of(output / one["files"]["overlay"]), overlay_mask(image, mask)
        )
        assert one["made_by"]["file"] == str(folder / f"{name}.png")
        areas = {c["mask_value"]: c["area"] for c in one["classes"]}
        assert areas == {v: round(float((mask == v).mean()), 6) for v in np.unique(mask) if v}
        assert list(areas.values()) == sorted(areas.values(), reverse=True)
    assert set(tree(output)) == {INDEX} | {
        path
        for name in ("a", "b", "barn/c")
        for path in (f"masks/{name}.png", f"overlays/{name}.png", f"found/{name}.json")
    }
    assert Image.open(output / "masks" / "b.png").mode == "P"


def test_the_index_says_what_made_the_masks(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    settings = SegmentTestSettings.from_preset("multi_scale", scales=[1.0], crf=None)
    result = segment_files(
        Nearest(), [folder], output, settings, command="lpcam predict in", made_by={"run": "tiny"}
    )
    index = json.loads((output / INDEX).read_text())
    assert (index["kind"], index["command"]) == ("lpcam predict", "lpcam predict in")
    assert index["images"] == {n: str(folder / f"{n}.png") for n in ("a", "b", "barn/c")}
    assert index["skipped"] == result.skipped
    made_by = index["made_by"]
    assert made_by["run"] == "tiny"
    assert made_by["settings"]["preset"] == "multi_scale"
    assert made_by["changed_from_preset"] == ["crf", "scales"]
    assert made_by["classes"] == dict(zip(CLASSES.names, CLASSES.mask_ids, strict=True))
    assert "lpcam" in made_by["versions"]


def test_what_cannot_be_read_is_left_out(folder: Path, tmp_path: Path) -> None:
    (folder / "empty.png").write_bytes(b"")
    result = segment_files(Nearest(), [folder], tmp_path / "out", SETTINGS)
    skipped = {Path(s["image"]).name: s["reason"] for s in result.skipped}
    assert set(skipped) == {"broken.jpg", "empty.png"}
    assert "damaged or not an image" in skipped["broken.jpg"]
    assert "the file is empty" in skipped["empty.png"]
    summary = result.summary()
    assert f"2 left out:\n  {folder / 'broken.jpg'}: cannot read image" in summary
    assert summary.startswith("a: blue (")
    assert f"results in {tmp_path / 'out'}\npictures in {tmp_path / 'out' / 'overlays'}" in summary


def test_a_large_image_is_segmented_smaller(tmp_path: Path) -> None:
    image = np.full((60, 201, 3), 128, np.uint8)
    image[:, :100] = COLOURS["red"]
    Image.fromarray(image).save(tmp_path / "wide.png")
    result = segment_files(
        Nearest(),
        [tmp_path / "wide.png"],
        tmp_path / "out",
        SETTINGS,
        maximum_side=67,
        probabilities=True,
    )
    (one,) = result.found
    assert (one["width"], one["height"]) == (201, 60)
    assert (one["segmented_width"], one["segmented_height"]) == (67, 20)
    mask = read_index_mask(tmp_path / "out" / "masks" / "wide.png")
    assert mask.shape == (60, 201)
    assert set(np.unique(mask)) == {0, 9}
    assert (mask == expected_mask(image)).mean() > 0.98
    assert Image.open(tmp_path / "out" / "overlays" / "wide.png").size == (67, 20)
    stored = np.load(tmp_path / "out" / "probabilities" / "wide.npz")
    assert stored["probabilities"].shape == (4, 20, 67)


def test_threads_give_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    settings = SegmentTestSettings.from_preset("multi_scale", scales=[0.75, 1.0])
    for workers in (1, 3):
        segment_files(
            Nearest(),
            [folder],
            tmp_path / f"out{workers}",
            settings,
            workers=workers,
            probabilities=True,
        )
    assert tree(tmp_path / "out1") == tree(tmp_path / "out3")


def test_the_crf_of_the_settings_is_used(folder: Path, tmp_path: Path) -> None:
    settings = SegmentTestSettings.from_preset("deeplabv2.official")
    segment_files(Nearest(), [folder / "b.png"], tmp_path / "out", settings)
    image, crf = colours_of(folder / "b.png"), predict.make_crf(settings)
    assert crf is not None
    scores = predict.refine(predict.probabilities(Nearest(), image, settings), image, settings, crf)
    expected = predict.label_mask(predict.labels(scores), CLASSES)
    mask = read_index_mask(tmp_path / "out" / "masks" / "b.png")
    np.testing.assert_array_equal(mask, expected)


def test_an_image_that_the_crf_refuses_is_left_out(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "memory_of_an_image", lambda *_: 1_900_000)
    settings = SegmentTestSettings.from_preset("deeplabv2.official")
    Image.new("RGB", (20, 20)).save(folder / "small.png")
    result = segment_files(Nearest(), [folder], tmp_path / "out", settings)
    assert [one["image"] for one in result.found] == ["small"]
    reason = {Path(s["image"]).name: s["reason"] for s in result.skipped}["a.png"]
    assert reason.startswith(f"cannot segment image {folder / 'a.png'}: a CRF of 4 labels on an")
    assert reason.endswith("or lower the longest side of images")


def test_a_second_call_replaces_its_own_files_only(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    segment_files(Nearest(), [folder], output, SETTINGS, probabilities=True)
    mine = {"masks/mine.png": b"1", "note.txt": b"2", "probabilities/mine.npz": b"3"}
    for name, data in mine.items():
        (output / name).write_bytes(data)
    before = tree(output)
    Image.new("RGB", (40, 40), COLOURS["green"]).save(folder / "a.png")
    segment_files(Nearest(), [folder / "a.png"], output, SETTINGS)
    after = tree(output)
    assert set(before) - set(after) == {"probabilities/a.npz"}  # not asked for this time
    changed = {name for name in after if after[name] != before.get(name)}
    assert changed == {INDEX, "masks/a.png", "overlays/a.png", "found/a.json"}
    index = json.loads(after[INDEX])
    assert set(index["images"]) == {"a", "b", "barn/c"}


def test_outputs_of_an_image_that_is_broken_now_go(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    segment_files(Nearest(), [folder], output, SETTINGS)
    (folder / "a.png").write_bytes(b"broken")
    result = segment_files(Nearest(), [folder / "a.png"], output, SETTINGS)
    assert result.found == []
    assert result.summary().endswith(f"results in {output}")
    assert not [name for name in tree(output) if name.split("/")[-1].startswith("a.")]
    assert set(json.loads((output / INDEX).read_text())["images"]) == {"b", "barn/c"}


def test_after_a_stop_the_same_call_finishes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = files.write_mask

    def stop(path: Path, mask: Any) -> None:
        if path.name == "b.png":
            path.write_bytes(b"half of a result")
            raise KeyboardInterrupt
        write(path, mask)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(files, "write_mask", stop)
        segment_files(Nearest(), [folder], tmp_path / "out", SETTINGS)
    segment_files(Nearest(), [folder], tmp_path / "out", SETTINGS)
    segment_files(Nearest(), [folder], tmp_path / "other", SETTINGS)
    assert tree(tmp_path / "out") == tree(tmp_path / "other")


def test_probabilities_are_stored_in_255_steps(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand((4, 7, 9), generator=generator).softmax(0)
    scores[:, 0, 0] = torch.tensor([0.0, 1.0, 0.0, 0.0])
    for name in ("1", "2"):
        files._write_probabilities(tmp_path / f"{name}.npz", scores, CLASSES, {"made": "here"})
    assert (tmp_path / "1.npz").read_bytes() == (tmp_path / "2.npz").read_bytes()
    stored = np.load(tmp_path / "1.npz", allow_pickle=False)
    assert stored["names"].tolist() == ["background", "blue", "green", "red"]
    assert stored["mask_ids"].tolist() == [0, 1, 2, 9]
    assert json.loads(stored["made_by"].tobytes()) == {"made": "here"}
    values = stored["probabilities"]
    assert values.dtype == np.uint8 and values[:, 0, 0].tolist() == [0, 255, 0, 0]
    assert np.abs(values / 255 - scores.numpy()).max() <= 1 / 510 + 1e-6
