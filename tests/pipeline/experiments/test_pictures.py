"""Pictures of experiments: the worked example by hand, the rules of choice, and what is drawn."""

from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from tiny import draw_folder, recipe_values, write_weights

from lpcam.data.drawing import CELL, GAP, TITLE
from lpcam.data.map_files import map_path, read_maps
from lpcam.pipeline.experiments import pictures
from lpcam.pipeline.experiments.pictures import (
    PICTURES,
    choose_images,
    confusing,
    places,
    sheets,
    worked_example,
)
from lpcam.pipeline.experiments.writing import run_experiment
from lpcam.pipeline.recipe import parse_recipe
from lpcam.pipeline.run import run
from lpcam.pipeline.run_folder import RunFolder
from lpcam.runtime.errors import ArtefactError
from lpcam.runtime.files import read_json, write_json


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run on drawings, whose masks of parts split each image in an upper and a lower half."""
    root = tmp_path_factory.mktemp("pictures")
    data = draw_folder(root / "data")
    (data / "parts").mkdir()
    for path in sorted((data / "masks").iterdir()):
        own = np.array(Image.open(path))
        parts = np.full_like(own, 2)
        parts[: len(own) // 2] = 1
        Image.fromarray(parts * (own > 0)).save(data / "parts" / path.name)
    write_json(data / "parts.json", {"top": 1, "bottom": 2})
    weights = write_weights(root / "weights.safetensors")
    run(parse_recipe(recipe_values(data, root / "run", weights), where="test"), until="evaluate")
    return RunFolder(root / "run")


def picture_size(png: bytes) -> tuple[int, int]:
    return Image.open(io.BytesIO(png)).size


def size_of(columns: int, rows: int) -> tuple[int, int]:
    return columns * (CELL + GAP) + GAP, TITLE + rows * (CELL + GAP) + GAP


def test_the_worked_example_is_right_by_hand() -> None:
    # Features head (4, 0, 0), tail (0, 3, 1/4), sky (0, 1/4, 3) and the row (1, 2/5, -1/2) give
    # the products 4, 6/5 - 1/8 and 1/10 - 3/2. Both prototypes of the class and that of the context
    # are along an axis, so A = (f_1 / 2 + f_2 / 2 - f_3) / |f|; |tail|^2 = |sky|^2 = 145/16.
    found = worked_example()
    norm = 145**0.5 / 4
    by_hand = [
        [1, 0, 0],
        [0, 3 / norm, 1 / 4 / norm],
        [0, 1 / 4 / norm, 3 / norm],
        [4, 1.075, -1.4],
        [1 / 2, 1.25 / norm, -2.875 / norm],
        [1, 0.26875, 0],
        [1, 2.5 / norm, 0],
    ]
    assert [*found][-2:] == ["CAM", "LPCAM"]
    for values, expected in zip(found.values(), by_hand, strict=True):
        assert values == pytest.approx(expected)
    # both points of the figure: the tail is far below the head in CAM, and near it in LPCAM
    assert found["CAM"][1] == pytest.approx(0.27, abs=0.005)
    assert found["LPCAM"][1] == pytest.approx(0.83, abs=0.005)


def test_images_are_chosen_by_rank_and_at_random_by_seed() -> None:
    scores = {"e": 0.1, "b": 0.9, "d": 0.4, "c": 0.4, "a": 0.2, "f": 0.3, "g": 0.8, "h": 0.0}
    found = choose_images(scores, 3)  # b g c d f a e h
    assert found["best"] == [*"bgcd"]
    assert found["median"] == [*"cdfa"]
    assert found["worst"] == [*"heaf"]
    assert found["random"] == choose_images(dict(reversed(scores.items())), 3)["random"]
    drawn = {tuple(choose_images(scores, seed)["random"]) for seed in range(20)}
    assert len(drawn) > 5
    assert all(len({*names}) == 4 for names in drawn)
    few = choose_images({"b": 0.1, "a": 0.2}, 0)
    assert all(sorted(names) == ["a", "b"] for names in few.values())


def test_the_confused_image_has_the_highest_score_of_a_wrong_class(made: RunFolder) -> None:
    (drawn,) = confusing(made)
    assert picture_size(drawn["png"]) == size_of(4, 3)
    figures, names = drawn["figures"], ["blue", "green", "red"]
    labels = dict(
        line.split(".png,") for line in _lines(made.load_recipe().data.root / "labels.csv")
    )
    explain, wrong = made.explainer(device="cpu"), {}
    for name, label in labels.items():
        path = made.load_recipe().data.root / f"images/{name}.png"
        scores = dict(explain.highest(path, 1).ranking)
        if label in names and max(scores, key=scores.__getitem__) == label:
            wrong[name] = max(score for one, score in scores.items() if one != label)
    assert figures["image"] == max(wrong, key=wrong.__getitem__)
    assert max(figures["scores"], key=figures["scores"].__getitem__) == labels[figures["image"]]


def _lines(path: Path) -> list[str]:
    return path.read_text("utf-8").splitlines()[1:]


def test_parts_have_the_mean_of_the_maps_on_their_pixels(made: RunFolder) -> None:
    example, parts = places(made)
    assert (example["name"], parts["name"]) == ("example", "parts")
    root = made.load_recipe().data.root
    top: list[float] = []
    for path in sorted((root / "masks").iterdir()):
        truth, maps = np.array(Image.open(path)), read_maps(map_path(made / "cam", path.stem))
        for key, plane in zip(maps.keys, maps.high_res, strict=True):
            half = len(truth) // 2
            top += plane[:half][truth[:half] == key + 1].tolist()
    means = parts["figures"]["means"]["CAM"]
    assert means["top"] == pytest.approx(np.mean(top), abs=1e-5)
    assert f">{means['ground'] / max(means.values()):.2f}<" in parts["svg"]
    for drawn, count in ((example, 3), (parts, 3)):
        # a bar and its number for each method and place, and the key
        assert drawn["svg"].count("<rect") == 1 + 2 * count + 2
        assert len(re.findall(r">\d\.\d\d<", drawn["svg"])) == 2 * count


def test_sheets_follow_the_scores_of_the_run(made: RunFolder) -> None:
    drawn = {one["name"]: one for one in sheets(made)}
    assert [*drawn] == ["best", "median", "worst", "random"]
    assert all(picture_size(one["png"]) == size_of(5, 4) for one in drawn.values())
    by_image = read_json(made.image_scores)
    known = [value for value in by_image["LPCAM"] if value is not None]
    assert [*drawn["best"]["figures"]["images"].values()] == sorted(known)[::-1][:4]
    assert [*drawn["worst"]["figures"]["images"].values()] == sorted(known)[:4]


def test_refuses_runs_that_lack_what_is_drawn(made: RunFolder, tmp_path: Path) -> None:
    values = yaml.safe_load(made.recipe.read_text())
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))  # a run with nothing else
    with pytest.raises(ArtefactError, match="classifier"):
        next(confusing(RunFolder(tmp_path)))
    with pytest.raises(ArtefactError, match=f"(?s){tmp_path}.*LPCAM.*masks.*--until evaluate"):
        next(sheets(RunFolder(tmp_path)))
    example = list(places(RunFolder(tmp_path)))
    assert [one["name"] for one in example] == ["example"]


def test_no_image_is_confused_where_none_has_one_label(
    made: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, items = pictures._mapped(made)
    several = [item for item in items if len(item.labels) != 1]
    monkeypatch.setattr(pictures, "_mapped", lambda _: (dataset, several))
    with pytest.raises(ArtefactError, match=f"(?s){len(several)} images.*train"):
        next(confusing(made))


def test_each_picture_of_a_plot_has_a_file(made: RunFolder, tmp_path: Path) -> None:
    source = tmp_path / "own.yaml"
    plots = [{"kind": kind, "title": kind} for kind in PICTURES]
    arms = [{"name": "x"}]
    given = {"title": "t", "about": "a", "sizes": {"tiny": {}}, "arms": arms, "plots": plots}
    source.write_text(yaml.safe_dump(given))
    results = run_experiment(source, "tiny", tmp_path / "e", recipe=str(made.recipe))
    names = {one["file"] for one in results["plots"]}
    assert names == {
        "plots/1.png", "plots/2-example.svg", "plots/2-parts.svg", "plots/3-best.png",
        "plots/3-median.png", "plots/3-worst.png", "plots/3-random.png",
    }  # fmt: skip
    assert {
        path.relative_to(tmp_path / "e").as_posix() for path in (tmp_path / "e/plots").iterdir()
    } == names
    page = (tmp_path / "e/report.html").read_text("utf-8")
    assert all(one["title"] in page for one in results["plots"])
