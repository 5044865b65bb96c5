"""The maps of one image: masks, pictures, findings, and what is saved."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lpcam.classifiers.features import FeaturePair
from lpcam.data.drawing import overlay, overlay_mask
from lpcam.data.images import read_image
from lpcam.data.masks import read_index_mask
from lpcam.method.image_maps import METHOD_NAMES, ImageMaps, file_parts
from lpcam.method.seeds import seeds
from lpcam.method.settings import LpcamSettings
from lpcam.runtime.errors import DataError

HOSTILE = '<img src=x onerror="alert(1)">'


@pytest.fixture
def maps() -> ImageMaps:
    """Two classes with mask values 3 and 7 on an image of 24 x 40 pixels."""
    rng = np.random.default_rng(0)
    return ImageMaps(
        image=rng.integers(0, 256, (24, 40, 3)).astype(np.uint8),
        classes=("cow", "dog"),
        mask_ids=(3, 7),
        scores=(0.6, 0.9),
        cam=rng.random((2, 24, 40)).astype(np.float32),
        lpcam=rng.random((2, 24, 40)).astype(np.float32),
        threshold=0.5,
        cam_threshold=0.25,
        ranking=(("dog", 0.9), ("cow", 0.6), ("cat", 0.1)),
        name="barn/cow 7",
        made_by={"preset": "frozen"},
    )


def test_mask_is_the_seed_of_the_maps(maps: ImageMaps) -> None:
    values = np.array([0, 3, 7], np.uint8)
    for method, planes, own in (("LPCAM", maps.lpcam, 0.5), ("CAM", maps.cam, 0.25)):
        for threshold in (None, 0.8):
            seed = seeds(torch.from_numpy(planes), own if threshold is None else threshold)
            mask = maps.mask(threshold, method=method)  # type: ignore[arg-type]
            np.testing.assert_array_equal(mask, values[seed.numpy()])
    assert maps.mask().dtype == np.uint8


def test_mask_of_some_classes(maps: ImageMaps) -> None:
    expected = np.where(maps.lpcam[1] > 0.5, 7, 0)
    np.testing.assert_array_equal(maps.mask(classes=["dog"]), expected)
    assert not maps.mask(classes=[]).any()
    with pytest.raises(DataError, match="'cat'"):
        maps.mask(classes=["cat"])


def test_the_first_of_equal_maps_wins_and_the_threshold_itself_is_background(
    maps: ImageMaps,
) -> None:
    same = replace(maps, lpcam=np.full((2, 24, 40), 0.75, np.float32))
    assert set(same.mask(0.5).ravel()) == {3}
    assert set(same.mask(0.5, classes=["dog", "cow"]).ravel()) == {7}
    assert not same.mask(0.75).any()


def test_maps_smaller_than_the_image(maps: ImageMaps, tmp_path: Path) -> None:
    large = replace(maps, image=np.zeros((60, 100, 3), np.uint8))
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(maps.lpcam)[None], size=(60, 100), mode="bilinear", align_corners=False
    )[0]
    np.testing.assert_allclose(large._plane(0, "LPCAM"), expected[0], atol=1e-6)
    np.testing.assert_array_equal(
        large.mask(), np.array([0, 3, 7], np.uint8)[seeds(expected, 0.5).numpy()]
    )
    assert large.overlay().shape == (60, 100, 3)
    files = large.save(tmp_path)["classes"][0]["files"]
    assert Image.open(tmp_path / files["cam_overlay"]).size == (40, 24)  # of the maps
    assert Image.open(tmp_path / files["cam_heatmap"]).size == (100, 60)
    row = large.sheet_rows(long_side=20)[0]
    assert row.image.shape == (12, 20, 3)
    assert row.lpcam.shape == row.seed.shape == (12, 20)
    assert set(np.unique(row.seed)) <= {0, 3, 7}


def test_overlay_takes_the_highest_class_by_default(maps: ImageMaps) -> None:
    np.testing.assert_array_equal(maps.overlay(), overlay(maps.image, maps.lpcam[1]))
    np.testing.assert_array_equal(
        maps.overlay(name="cow", method="CAM", opacity=0.3),
        overlay(maps.image, maps.cam[0], opacity=0.3),
    )
    with pytest.raises(DataError, match="'cat'"):
        maps.overlay(name="cat")
    with pytest.raises(DataError, match="GradCAM"):
        maps.overlay(method="GradCAM")  # type: ignore[arg-type]


def test_more_classes_than_a_mask_can_hold() -> None:
    def ids(chosen: Sequence[int], mask_ids: Sequence[int] | None = None) -> tuple[int, ...]:
        names, scores = [f"class {n}" for n in range(300)], np.zeros(300)
        pairs, rows = [FeaturePair(torch.ones(1, 1, 1), None)], torch.ones(300, 1)
        settings = LpcamSettings.from_preset("small")
        made = (pairs, (2, 2), chosen, rows, rows, names, scores, settings, mask_ids)
        return ImageMaps.of_features(*made, image=np.zeros((2, 2, 3), np.uint8)).mask_ids

    assert ids([7, 299]) == (1, 2)
    assert ids([7, 299], range(300, 0, -1)) == (293, 1)
    with pytest.raises(DataError, match="255 classes"):
        ids(range(255))


def test_found_has_areas_and_boxes(maps: ImageMaps) -> None:
    lpcam = np.zeros((2, 24, 40), np.float32)
    lpcam[0, 2:12, 5:25] = 1
    found = replace(maps, lpcam=lpcam).found()
    assert found["classes"] == [
        {
            "name": "cow",
            "score": 0.6,
            "mask_value": 3,
            "area": round(200 / 960, 6),
            "box": [5, 2, 25, 12],
        },
        {"name": "dog", "score": 0.9, "mask_value": 7, "area": 0.0, "box": None},
    ]
    assert (found["width"], found["height"], found["threshold"]) == (40, 24, 0.5)
    assert found["highest_scores"][0] == {"name": "dog", "score": 0.9}
    assert found["made_by"] == {"preset": "frozen"}
    assert replace(maps, lpcam=lpcam, threshold=1.0).found()["classes"][0]["area"] == 0


def nothing(maps: ImageMaps) -> ImageMaps:
    empty = np.zeros((0, 24, 40), np.float32)
    return replace(maps, classes=(), mask_ids=(), scores=(), cam=empty, lpcam=empty)


def test_no_class(maps: ImageMaps, tmp_path: Path) -> None:
    none = nothing(maps)
    assert not none.mask().any()
    assert [row.name for row in none.sheet_rows()] == ["no class"]
    assert repr(none) == "ImageMaps('barn/cow 7', 40 x 24 pixels: no class)"
    with pytest.raises(DataError, match="barn/cow 7"):
        none.overlay()
    assert none.save(tmp_path)["classes"] == []
    assert len(list(tmp_path.rglob("*.png"))) == 2


def test_save_writes_what_it_says(maps: ImageMaps, tmp_path: Path) -> None:
    found = maps.save(tmp_path)
    assert json.loads((tmp_path / "found/barn/cow 7.json").read_text()) == found
    named = {*found["files"].values()}.union(*(c["files"].values() for c in found["classes"]))
    there = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.png")}
    assert named == there
    assert len(named) == 2 + 2 * 4
    mask = tmp_path / found["files"]["mask"]
    np.testing.assert_array_equal(read_index_mask(mask), maps.mask())
    assert Image.open(mask).getpalette()[9:12] == [128, 128, 0]  # type: ignore[index]
    for place, planes in enumerate(zip(maps.cam, maps.lpcam, strict=True)):
        files = found["classes"][place]["files"]
        for method, plane in zip(METHOD_NAMES, planes, strict=True):
            heat = np.array(Image.open(tmp_path / files[f"{method.lower()}_heatmap"]))
            np.testing.assert_array_equal(heat, np.rint(255 * plane))
            drawn = read_image(tmp_path / files[f"{method.lower()}_overlay"])
            np.testing.assert_array_equal(drawn, overlay(maps.image, plane))
    shown = read_image(tmp_path / found["files"]["mask_overlay"])
    np.testing.assert_array_equal(shown, overlay_mask(maps.image, maps.mask()))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    maps.save(tmp_path)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*.*")}


def test_names_of_classes_become_parts_of_file_names() -> None:
    names = ["cow", "a/b", "a.b", "..", HOSTILE, "Kuh (braun)", "COW", "牛", "x" * 90]
    parts = file_parts(names)
    assert parts[:4] == ["cow", "a-b", "a-b-2", "class"]
    assert parts[6] == "COW-2"
    assert len({part.casefold() for part in parts}) == len(names)
    assert not [part for part in parts if set(part) & set('./<>"') or len(part) > 42]


def test_notebooks_see_a_picture(maps: ImageMaps) -> None:
    hostile = replace(maps, classes=(HOSTILE, "dog"), name=HOSTILE, notes=(HOSTILE,))
    assert Image.open(io.BytesIO(hostile._repr_png_())).size[0] > 400
    assert repr(maps) == "ImageMaps('barn/cow 7', 40 x 24 pixels: cow 0.60, dog 0.90)"


def test_plot_has_a_row_for_each_class(maps: ImageMaps, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="the extra 'plot' is not installed")
    monkeypatch.setenv("MPLBACKEND", "agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    figure = replace(maps, classes=("cow", "a$b$")).plot()
    figure.savefig(io.BytesIO())
    titles = [axis.get_title() for axis in figure.axes]
    assert titles == ["image", "CAM", "LPCAM", "mask", "", "", "", ""]
    np.testing.assert_array_equal(
        figure.axes[6].images[0].get_array(), overlay(maps.image, maps.lpcam[1])
    )
    plt.close(figure)


def test_named_parts_share_the_map_of_a_class(tmp_path: Path) -> None:
    """Features are the head's on the left, the leg's in the middle and the sky's on the right."""
    head, leg, sky = torch.eye(3)
    columns = torch.stack([head, head, leg, sky], dim=1)  # (C, 4)
    pairs = [FeaturePair(columns[:, None].repeat(1, 2, 1), None)] * 2
    vectors = torch.stack([(head + leg) / 2, sky])
    parts = {0: {"head": head[None], "leg": torch.stack([leg, -sky])}}
    made = ImageMaps.of_features(
        pairs,
        (32, 64),
        [1, 0],
        torch.eye(2, 3),
        vectors,
        ("cow", "sky"),
        np.array([0.9, 0.2]),
        LpcamSettings.from_preset("voc12.official"),
        parts=parts,
        image=np.zeros((64, 128, 3), np.uint8),
        threshold=0.5,
    )
    # the map is 1 in the first 40 columns, and falls to the threshold in the next 8
    assert made.shares("cow") == pytest.approx({"head": 32 / 46, "leg": 14 / 46}, abs=0.01)
    assert made.shares("sky") == {}
    assert made.part_mask("cow").tolist() == [[1] * 64 + [2] * 32 + [0] * 32] * 64
    found = made.save(tmp_path)
    first, second = found["classes"]
    assert "parts" not in first
    assert second["parts"] == pytest.approx(made.shares("cow"), abs=1e-4)
    mask = read_index_mask(tmp_path / second["files"]["part_mask"])
    assert np.array_equal(mask, made.part_mask("cow"))
    nowhere = replace(made, threshold=1.0)
    assert nowhere.shares("cow") == {}
    assert not nowhere.part_mask("cow").any()
