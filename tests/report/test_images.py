"""The viewer's records: the IoU that the page shows is the one of the seeds at full size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from report.sample import unpacked

from lpcam.data.dataset import ClassTable, Dataset, Item
from lpcam.data.map_files import MapFile, map_path, read_maps, write_maps
from lpcam.data.resize import quarter_size
from lpcam.evaluation.segmentation import confusion, truth_labels
from lpcam.method.seeds import seeds
from lpcam.method.settings import Method
from lpcam.report.images import Sources, choose, highlights, image_records, small_planes
from lpcam.runtime.distributed import Sharing

METHODS: tuple[Method, ...] = ("CAM", "LPCAM")
Run = tuple[Dataset, list[Item], dict[Method, Path]]


def item(name: str, *labels: int) -> Item:
    return Item(name, Path(name), labels)


def test_highlights_by_hand() -> None:
    found = highlights(
        {
            "CAM": {"a": 0.5, "b": 0.2, "c": None, "d": 0.9, "e": 0.4},
            "LPCAM": {"a": 0.6, "b": 0.9, "c": 0.3, "d": 0.1, "e": 0.4},
        }
    )
    assert found == {
        "most improved": ["b", "a"],
        "most worsened": ["d"],
        "best": ["b", "a", "e", "c", "d"],
        "worst": ["d", "c", "e", "a", "b"],
    }


def test_highlights_compare_the_last_method() -> None:
    scores = {"CAM": {"a": 0.5, "b": 0.5}, "LPCAM": {"a": 0.9, "b": 0.1}}
    found = highlights({**scores, "LPCAM-E": {"a": 0.2, "b": 0.6}})
    assert (found["most improved"], found["most worsened"]) == (["b"], ["a"])


def test_a_choice_has_what_is_wanted_and_an_even_rest() -> None:
    items = [item(f"{number:02d}") for number in range(20)]
    assert choose(items, 30, ["05"]) == items
    found = [one.id for one in choose(items, 5, ["19", "03"])]
    assert found == ["00", "03", "07", "13", "19"]
    assert [one.id for one in choose(items, 1, ["19", "03"])] == ["19"]


def test_small_planes() -> None:
    planes = np.zeros((2, 100, 200), np.float32)
    planes[0, :, :100] = 1
    small = small_planes(planes)
    assert small.shape == (2, 32, 64) and small[0, 0, 0] == pytest.approx(1)
    assert small[0].mean() == pytest.approx(0.5, abs=0.01)
    assert small_planes(planes[:0]).shape[0] == 0


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Three images: with two labels, with one, and without truth."""
    rng = np.random.default_rng(0)
    folders: dict[Method, Path] = {method: tmp_path / method for method in METHODS}
    items = []
    for name, labels, size in (("a", (0, 1), (90, 300)), ("b", (1,), (40, 30)), ("c", (), (8, 8))):
        image, mask = tmp_path / f"{name}.png", tmp_path / f"{name} mask.png"
        Image.fromarray(rng.integers(0, 255, (*size, 3), np.uint8)).save(image)
        Image.fromarray(rng.choice([0, 3, 7, 9, 255], size).astype(np.uint8)).save(mask)
        items.append(Item(name, image, labels, None if name == "c" else mask))
        for folder in folders.values():
            shapes = [(len(labels), *found) for found in (quarter_size(size), size)]
            planes = [rng.random(shape, np.float32) for shape in shapes]
            maps = MapFile(np.array(labels, np.int64), *planes)
            write_maps(map_path(folder, name), maps, dtype="uint8")
    dataset = Dataset(
        "tiny",
        ClassTable(("cow", "dog"), (3, 7)),
        {one.id: one for one in items},
        {"all": tuple(one.id for one in items)},
        "by hand",
    )
    return dataset, items, folders


def test_records(run: Run) -> None:
    dataset, items, folders = run
    scores: dict[Method, dict[str, float | None]] = {m: {"a": 0.25, "b": 0.5} for m in METHODS}
    a, b, c = image_records(items, Sources(dataset, folders, scores), Sharing(workers=2))
    assert [one["id"] for one in (a, b, c)] == ["a", "b", "c"]
    assert (a["height"], a["width"], b["height"], b["width"]) == (77, 256, 40, 30)
    assert a["score"] == {"CAM": 0.25, "LPCAM": 0.25}
    assert unpacked(a["planes"]["CAM"]).shape == (2, 20, 64)
    assert unpacked(b["planes"]["LPCAM"]).shape == (1, 10, 8)
    assert (c["masks"], c["iou"], c["score"], c["labels"]) == ({}, {}, {}, [])
    truth = unpacked(b["masks"]["truth"])
    with Image.open(items[1].mask) as mask:
        assert np.array_equal(truth, truth_labels(np.array(mask), dataset.classes).numpy())

    # IoU of each label at each threshold, from the seeds themselves
    for record, one in ((a, items[0]), (b, items[1])):
        with Image.open(one.mask) as mask:
            labels = truth_labels(np.array(mask), dataset.classes)
        for method in METHODS:
            maps = read_maps(map_path(folders[method], one.id))
            found = unpacked(record["iou"][method])
            assert found.shape == (len(one.labels), 100)
            for step in (0, 17, 50, 99):
                seed = seeds(torch.from_numpy(maps.high_res), step / 100)
                named = torch.tensor([0, *(k + 1 for k in one.labels)])[seed]
                counts = confusion(labels, named, 3)
                for row, k in enumerate(one.labels):
                    hit = counts[k + 1, k + 1]
                    union = counts[k + 1].sum() + counts[:, k + 1].sum() - hit
                    assert found[row, step] == round(10_000 * float(hit / union))


def test_every_method_but_lpcam_f_is_drawn(run: Run) -> None:
    dataset, items, folders = run
    every = {**folders, "LPCAM-F": folders["CAM"], "LPCAM-E": folders["LPCAM"]}
    (record,) = image_records(
        items[:1], Sources(dataset, every, {key: {} for key in every}), Sharing()
    )
    for part in ("planes", "iou", "score"):
        assert list(record[part]) == ["CAM", "LPCAM", "LPCAM-E"]
    assert record["planes"]["LPCAM-E"] == record["planes"]["LPCAM"]


def test_an_absent_class_has_no_iou(run: Run) -> None:
    dataset, items, folders = run
    one = items[1]
    Image.fromarray(np.zeros((40, 30), np.uint8)).save(one.mask)
    planes = np.zeros((1, 10, 8), np.float32), np.zeros((1, 40, 30), np.float32)
    empty = MapFile(np.array([1], np.int64), *planes)
    for folder in folders.values():
        write_maps(map_path(folder, "b"), empty, dtype="uint8")
    (record,) = image_records([one], Sources(dataset, folders, {m: {} for m in METHODS}), Sharing())
    assert set(unpacked(record["iou"]["CAM"]).ravel().tolist()) == {65535}
    assert record["score"] == {"CAM": None, "LPCAM": None}
