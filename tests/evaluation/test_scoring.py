"""Scores of maps on disk: by hand, and the same however the images are shared out."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import together

from lpcam.cli.main import main
from lpcam.data.dataset import ClassTable, Dataset, Item
from lpcam.data.map_files import MapFile, map_path, write_maps
from lpcam.data.masks import write_mask
from lpcam.evaluation.scoring import Evaluation, evaluate_masks, score_maps, why_not_scored
from lpcam.method.settings import Method
from lpcam.runtime.distributed import Processes, Sharing
from lpcam.runtime.errors import ArtefactError, DataError
from lpcam.runtime.files import read_json

FIXED: dict[Method, float] = {"CAM": 0.5, "LPCAM": 0.25}


def write(
    root: Path,
    name: str,
    truth: list[list[int]],
    maps: dict[Method, dict[int, list[list[float]]]],
    parts: list[list[int]] | None = None,
) -> Item:
    """An image's masks and its maps of each method, by class index."""
    mask = root / f"{name}.png"
    Image.fromarray(np.array(truth, np.uint8)).save(mask)
    part_mask = None
    if parts is not None:
        part_mask = root / f"{name} parts.png"
        Image.fromarray(np.array(parts, np.uint8)).save(part_mask)
    for method, planes in maps.items():
        keys = np.array(sorted(planes), dtype=np.int64)
        shape = (len(keys), *np.shape(truth))
        high = np.array([planes[k] for k in keys.tolist()], np.float32).reshape(shape)
        cam = np.zeros((len(keys), *(-(-side // 4) for side in shape[1:])), np.float32)
        write_maps(map_path(root / method, name), MapFile(keys, cam, high), dtype="float16")
    return Item(name, mask, tuple(sorted(maps["CAM"])), mask, part_mask)


def dataset_of(items: list[Item], parts: dict[str, int] | None = None) -> Dataset:
    return Dataset(
        "tiny",
        ClassTable(("cow", "dog"), (3, 7)),
        {item.id: item for item in items},
        {"all": tuple(item.id for item in items)},
        "by hand",
        part_names=parts or {},
    )


@pytest.fixture
def items(tmp_path: Path) -> list[Item]:
    """Two images of 1 x 4 pixels. Mask ids: 3 is cow, 7 is dog, 255 does not count."""
    first = write(
        tmp_path,
        "a",
        [[3, 3, 0, 255]],
        {
            "CAM": {0: [[1.0, 0.375, 0.375, 1.0]]},
            "LPCAM": {0: [[1.0, 0.5, 0.0, 0.0]]},
        },
        [[1, 2, 2, 1]],
    )
    second = write(
        tmp_path,
        "b",
        [[7, 3, 0, 0]],
        {
            "CAM": {0: [[0.0, 0.25, 0.0, 0.0]], 1: [[1.0, 0.5, 0.0, 0.75]]},
            "LPCAM": {0: [[0.0, 1.0, 0.0, 0.0]], 1: [[1.0, 0.0, 0.0, 0.0]]},
        },
        [[1, 2, 1, 2]],
    )
    return [first, second]


def score(items: list[Item], parts: dict[str, int] | None, sharing: Sharing) -> Evaluation:
    folder = items[0].image.parent
    folders: dict[Method, Path] = {method: folder / method for method in FIXED}
    return score_maps(items, dataset_of(items, parts), folders, FIXED, sharing)


def test_rows_by_hand(items: list[Item]) -> None:
    cam_best, cam_fixed, lpcam_best, lpcam_fixed = score(items, None, Sharing()).rows
    kinds = [(r["method"], r["threshold_source"]) for r in (cam_best, cam_fixed, lpcam_best)]
    assert kinds == [("CAM", "ground truth"), ("CAM", "fixed"), ("LPCAM", "ground truth")]
    assert all(r["images"] == 2 for r in (cam_best, cam_fixed, lpcam_best, lpcam_fixed))

    # CAM at 0.5 (a value must be above it), pixels that count:
    #   truth  cow cow bg | dog cow bg bg
    #   guess  cow bg  bg | dog bg  bg dog
    assert cam_fixed["threshold"] == 0.5
    assert {k: v["iou"] for k, v in cam_fixed["per_class"].items()} == pytest.approx(
        {"background": 2 / 5, "cow": 1 / 3, "dog": 1 / 2}
    )
    assert cam_fixed["miou"] == pytest.approx((2 / 5 + 1 / 3 + 1 / 2) / 3)
    assert cam_fixed["precision_with_background"] == pytest.approx((2 / 4 + 1 + 1 / 2) / 3)

    # CAM from 0.75 on loses the wrong dog and nothing else (till 1 is the lowest best):
    #   guess  cow bg  bg | dog bg  bg bg
    assert cam_best["threshold"] == 0.75
    assert cam_best["miou"] == pytest.approx((3 / 5 + 1 / 3 + 1) / 3)

    # LPCAM is right from the least value on, at the lowest threshold already
    assert (lpcam_best["threshold"], lpcam_best["miou"]) == (0.0, 1.0)
    assert (lpcam_fixed["threshold"], lpcam_fixed["miou"]) == (0.25, 1.0)
    assert "part_coverage" not in lpcam_fixed
    assert lpcam_fixed["left_out"] == []


def test_a_method_without_a_fixed_threshold_has_its_best_row_alone(items: list[Item]) -> None:
    folders = {method: items[0].image.parent / method for method in FIXED}
    found = score_maps(items, dataset_of(items), folders, {"LPCAM": 0.25}, Sharing())
    kinds = [(row["method"], row["threshold_source"]) for row in found.rows]
    assert kinds == [("CAM", "ground truth"), ("LPCAM", "ground truth"), ("LPCAM", "fixed")]
    assert found.image_scores["CAM"] == [None, None]


def test_parts_by_hand(items: list[Item]) -> None:
    """head (1) and legs (2), of pixels of a class alone."""
    parts = {"head": 1, "legs": 2, "tail": 9}
    cam_best, cam_fixed, lpcam_best, _ = score(items, parts, Sharing()).rows
    # head: a's first cow pixel and b's dog; legs: a's second cow pixel and b's cow
    assert cam_fixed["part_coverage"] == {"head": 1.0, "legs": 0.0}
    assert cam_best["part_coverage"] == {"head": 1.0, "legs": 0.0}
    assert lpcam_best["part_coverage"] == {"head": 1.0, "legs": 1.0}
    folders: dict[Method, Path] = {"CAM": items[0].image.parent / "CAM"}
    dataset = dataset_of(items, {"head": 1, "legs": 2})
    rows = score_maps(items, dataset, folders, {"CAM": 0.3}, Sharing()).rows
    # at 0.3 a's second cow pixel is found; b's cow pixel is called a dog
    assert rows[1]["part_coverage"] == {"head": 1.0, "legs": 0.5}


def test_curves_and_scores_of_images_by_hand(items: list[Item]) -> None:
    found = score(items, None, Sharing())
    for method, curve in found.curves.items():
        rows = [row for row in found.rows if row["method"] == method]
        assert set(curve) == {"thresholds", "miou", "precision", "recall"}
        assert curve["thresholds"] == [step / 100 for step in range(100)]
        for row in rows:
            at = curve["thresholds"].index(row["threshold"])
            for name in ("miou", "precision", "recall"):
                assert curve[name][at] == row[name]
    # at 0.5 CAM has one of a's two cow pixels; b's cow pixel is not found, of its two dog pixels
    # one is wrong
    assert found.image_scores["CAM"] == pytest.approx([1 / 2, (0 + 1 / 2) / 2])
    assert found.image_scores["LPCAM"] == [1.0, 1.0]


@pytest.fixture
def many(tmp_path: Path) -> list[Item]:
    """Eleven random images, every third without parts, one without a class."""
    rng = np.random.default_rng(0)
    found = []
    for number in range(11):
        shape = (int(rng.integers(5, 9)), int(rng.integers(5, 9)))
        keys = [] if number == 4 else [0, 1] if number % 2 else [number % 3 % 2]
        maps: dict[Method, dict[int, list[list[float]]]] = {
            method: {k: rng.random(shape).tolist() for k in keys} for method in FIXED
        }
        truth = rng.choice([0, 3, 7, 9, 255], shape).tolist()
        parts = rng.integers(0, 3, shape).tolist() if number % 3 else None
        found.append(write(tmp_path, f"m{number}", truth, maps, parts))
    return found


PARTS = {"head": 1, "legs": 2}


def test_threads_do_not_change_rows(many: list[Item]) -> None:
    one = score(many, PARTS, Sharing())
    assert [n for n, value in enumerate(one.image_scores["CAM"]) if value is None] == [4]
    assert 0.1 < one.rows[0]["miou"] < 0.9
    assert 0 < one.rows[0]["part_coverage"]["head"] < 1
    assert score(many, PARTS, Sharing(workers=3)) == one
    turned = score(many[::-1], PARTS, Sharing(workers=3))
    assert (turned.rows, turned.curves) == (one.rows, one.curves)
    assert turned.image_scores == {m: values[::-1] for m, values in one.image_scores.items()}


@pytest.mark.parametrize("count", [2, 3])
def test_every_process_has_the_rows_of_all(many: list[Item], count: int) -> None:
    owner = {item.id: number % count for number, item in enumerate(many)}

    def work(processes: Processes) -> Evaluation:
        return score(many, PARTS, Sharing(processes, owner=owner))

    one = score(many, PARTS, Sharing())
    assert together(count, work) == [one] * count


def test_no_truth_and_missing_maps(items: list[Item]) -> None:
    (items[0].image.parent / "CAM" / "a.npz").unlink()
    with pytest.raises(ArtefactError, match=r"cannot read .*CAM/a\.npz"):
        score(items, None, Sharing())
    for item in items:
        Image.fromarray(np.zeros((1, 4), np.uint8)).save(item.image)
    with pytest.raises(DataError, match="the truth has no pixel of any class"):
        folders: dict[Method, Path] = {"LPCAM": items[0].image.parent / "LPCAM"}
        score_maps(items, dataset_of(items), folders, {"LPCAM": 0.5}, Sharing())


def test_why_masks_are_not_scored(items: list[Item]) -> None:
    classes = dataset_of(items).classes
    assert why_not_scored(items, classes) is None
    Image.fromarray(np.zeros((1, 4), np.uint8)).save(items[0].image)
    assert why_not_scored(items, classes) is None  # the other one shows both
    for values, listed in (
        (np.array([[1, 0, 255, 9]], np.uint8), "1, 9;"),
        (np.arange(100, 120, dtype=np.uint8)[None], "100, .*, 107 and 12 more;"),
    ):
        Image.fromarray(values).save(items[1].image)
        text = str(why_not_scored(items, classes))
        assert re.search(f"Values of no class here: {listed}", text)


def masks(folder: Path, **values: list[list[int]]) -> Path:
    for name, mask in values.items():
        write_mask(folder / "sub" / f"{name}.png", np.array(mask, np.uint8))
    return folder


def test_two_folders_of_masks(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    truth = masks(tmp_path / "truth", a=[[3, 3, 0, 255]], b=[[7, 3, 0, 0]])
    found = masks(tmp_path / "found", a=[[3, 255, 0, 3]], b=[[7, 7, 0, 0]], unused=[[3]])
    result = evaluate_masks(found, str(truth))
    assert {name: one["iou"] for name, one in result.per_class.items()} == pytest.approx(
        {"background": 3 / 4, "3": 1 / 3, "7": 1 / 2}
    )
    assert "1 masks without a true mask are not scored: sub/unused.png" in caplog.text
    named = evaluate_masks(found, truth, ClassTable(("cow", "dog"), (3, 7)))
    assert named.per_class["cow"] == result.per_class["3"]
    assert evaluate_masks(truth, truth).miou == 1


def test_mask_folders_that_do_not_fit(tmp_path: Path) -> None:
    truth = masks(tmp_path / "truth", a=[[3, 0]], b=[[3, 0]])
    with pytest.raises(DataError, match="no PNG"):
        evaluate_masks(truth, tmp_path / "none")
    found = masks(tmp_path / "found", a=[[3, 0]])
    with pytest.raises(DataError, match=r"1 of 2 masks: sub.b\.png"):
        evaluate_masks(found, truth)
    masks(found, b=[[3, 0, 0]])
    with pytest.raises(DataError, match=r"b\.png: .*\(1, 3\)"):
        evaluate_masks(found, truth)
    masks(found, b=[[9, 0]])
    with pytest.raises(DataError, match=r"b\.png .* 9;"):
        evaluate_masks(found, truth)


def test_the_command_evaluate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_mask(tmp_path / "truth" / "a.png", np.array([[0, 3, 3, 7]], np.uint8))
    write_mask(tmp_path / "found" / "a.png", np.array([[0, 3, 0, 7]], np.uint8))
    (tmp_path / "classes.txt").write_text("cow\t3\ndog\t7\nsheep\t9\n")
    words = ["evaluate", str(tmp_path / "found"), str(tmp_path / "truth"), "--threads", "2"]
    words += ["--classes", str(tmp_path / "classes.txt"), "--json", str(tmp_path / "scores.json")]
    assert main(words) == 0
    lines = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()}
    assert lines["iou"] == ["fp", "fn", "precision", "recall"]
    assert lines["cow"] == ["50.0", "0.0", "50.0", "100.0", "50.0"]
    assert lines["mean"] == ["66.7", "0.0", "25.0", "100.0", "75.0"]
    found = read_json(tmp_path / "scores.json")
    assert found["miou"] == pytest.approx(2 / 3) and found["left_out"] == ["sheep"]
    assert found["per_class"]["dog"]["iou"] == 1.0 and found["command"].startswith("lpcam evaluate")
    (tmp_path / "found" / "a.png").unlink()
    assert main(words) == 2
    assert "a.png" in capsys.readouterr().err
