"""Whole runs that choose their thresholds and more themselves, without a true mask."""

from __future__ import annotations

import copy
import html
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import digests, draw_folder, recipe_values, times

from lpcam.data.map_files import read_maps
from lpcam.data.masks import read_index_mask
from lpcam.evaluation.judge import RULE, THRESHOLDS, colour_bins, colour_information, step_of
from lpcam.pipeline import context
from lpcam.pipeline.recipe import parse_recipe
from lpcam.pipeline.run import RunResult, run
from lpcam.runtime.errors import ClassifierError, RecipeError
from lpcam.runtime.files import read_json

Values = dict[str, Any]
METHODS = {"CAM": "cam", "LPCAM-F": "lpcam_f", "LPCAM": "lpcam", "LPCAM-E": "lpcam_e"}
IDS = [f"i{number:02d}" for number in range(12)]
LPCAM = {"preset": "adaptive", "max_features": 60, "early": {"clusters": 4}}
JUDGED = [f"threshold of {method}" for method in METHODS]
CHOSEN = {
    *(f"lpcam.{name}" for name in ("scales", "tau", "clusters", "mu_f", "mu_b", "early")),
    *JUDGED,
}


def go(values: Values, **options: Any) -> RunResult:
    return run(parse_recipe(values, where="tiny.yaml"), command="lpcam run tiny.yaml", **options)


def changed(values: Values, changes: Values) -> Values:
    """Values with some replaced, by dotted key."""
    found = copy.deepcopy(values)
    for path, value in changes.items():
        *sections, last = path.split(".")
        place = found
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
    return found


def copied(values: Values, folder: Path, changes: Values | None = None) -> Values:
    """A finished run in another folder, with values to change there."""
    shutil.copytree(values["run"]["folder"], folder)
    return changed(values, {"run.folder": str(folder), **(changes or {})})


def metrics(values: Values) -> dict[str, Any]:
    found: dict[str, Any] = read_json(Path(values["run"]["folder"], "metrics.json"))
    return found


def choices(values: Values) -> dict[str, tuple[str, str]]:
    return {one["key"]: (one["value"], one["reason"]) for one in metrics(values)["choices"]}


def results(folder: Path) -> dict[str, str]:
    """Digest of every file of a run but its recipe, which names the folder, and its report."""
    found = digests(folder).items()
    return {n: v for n, v in found if n != "recipe.yaml" and not n.startswith("report/")}


def cut(folder: Path, name: str, threshold: float) -> np.ndarray:
    """The seed of an image, from its stored maps."""
    maps = read_maps(folder / f"{name}.npz")
    if not len(maps.keys):
        return np.zeros(maps.high_res.shape[1:], np.uint8)
    best = maps.keys[maps.high_res.argmax(0)] + 1
    return np.where(maps.high_res.max(0) > np.float32(threshold), best, 0).astype(np.uint8)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, pictures: Path, weights: Path) -> Values:
    """Values of a finished run, which no test may change."""
    values = recipe_values(pictures, tmp_path_factory.mktemp("adaptive") / "run", weights)
    values |= {"lpcam": LPCAM, "report": {"images": 2}}
    go(values)
    return values


@pytest.fixture(scope="module")
def curved(tmp_path_factory: pytest.TempPathFactory, pictures: Path, weights: Path) -> Values:
    """Values of a run without early layers' maps whose thresholds are automatic."""
    values = recipe_values(pictures, tmp_path_factory.mktemp("curved") / "run", weights)
    values |= {"seeds": {"threshold": "auto"}}
    values["lpcam"] = {"preset": "frozen", "clusters": 3, "max_features": 60, "scales": [1.0]}
    go(values)
    return values


def test_every_result_is_made(base: Values) -> None:
    folder, found = Path(base["run"]["folder"]), metrics(base)
    made = set(digests(folder))
    assert {f"{name}/{i}.npz" for name in METHODS.values() for i in IDS} <= made
    assert {f"seeds/{i}.png" for i in IDS} <= made
    assert {"early/early.safetensors", "judge/cam/stage.json"} <= made
    assert {f"agreement/{name}/stage.json" for name in ("cam", "lpcam", "lpcam_f")} <= made
    kinds = [(row["method"], row["threshold_source"]) for row in found["rows"]]
    assert kinds == [(m, source) for m in METHODS for source in ("ground truth", "automatic")]
    assert found["verdicts"].keys() == METHODS.keys()
    for row in found["rows"]:
        if row["threshold_source"] == "automatic":
            verdict = found["verdicts"][row["method"]]
            assert row["threshold"] == row["protocol"]["threshold"] == verdict["threshold"]
            assert row["protocol"]["threshold_source"] == verdict["rule"]
            assert row["protocol"]["chosen"] == found["choices"]
    rows = {
        row["method"]: row["miou"] for row in found["rows"] if "auto" in row["threshold_source"]
    }
    assert rows["LPCAM-E"] > 0.5  # the boxes are found without a true mask


def test_seeds_are_cut_at_the_chosen_threshold(base: Values) -> None:
    folder = Path(base["run"]["folder"])
    threshold = metrics(base)["verdicts"]["LPCAM-E"]["threshold"]
    for name in IDS:
        seed = read_index_mask(folder / "seeds" / f"{name}.png")
        assert np.array_equal(seed, cut(folder / "lpcam_e", name, threshold))
    assert len(read_maps(folder / "lpcam_e" / "i03.npz").keys) == 0  # it has no label


def test_a_second_call_does_nothing_and_tells_the_same(
    base: Values, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is told, recorded and shown in the report is one list, with reasons."""
    folder, found = Path(base["run"]["folder"]), choices(base)
    before = times(folder)

    def fail(*_: Any) -> None:
        raise AssertionError("a network was loaded")

    monkeypatch.setattr("lpcam.classifiers.classifier.Classifier.load", fail)
    with caplog.at_level(logging.INFO, "lpcam"):
        result = go(base)
    assert times(folder) == before
    assert result.rows == metrics(base)["rows"]
    assert found.keys() == CHOSEN
    assert all(value and reason for value, reason in found.values())
    told: dict[str, tuple[str, str]] = {}
    for record in caplog.records:
        if line := re.fullmatch(r"chosen: (.+?) = (.+?) \((.+)\)", record.getMessage()):
            told[line[1]] = (line[2], line[3])
    assert told == found
    page = html.unescape((folder / "report.html").read_text("utf-8"))
    assert all(part in page for one in found.items() for part in (one[0], *one[1]))


def test_the_choices_follow_their_rules(base: Values) -> None:
    folder, found = Path(base["run"]["folder"]), choices(base)
    sizes = [Image.open(path).size for path in Path(base["data"]["root"], "images").iterdir()]
    cells = np.median([min(size) for size in sizes]) / 16
    assert cells < 6  # so the largest factor holds
    assert found["lpcam.scales"][0] == "3, 1.5, 4.5"
    assert read_json(folder / "lpcam" / "stage.json")["parts"]["scales"] == [3, 1.5, 4.5]
    judged = read_json(folder / "judge" / "cam" / "stage.json")["output"]["threshold"]
    fitting = read_json(folder / "prototypes" / "stage.json")["parts"]["settings"]
    assert fitting["tau"] == min(judged, 0.25)
    early = read_json(folder / "early" / "stage.json")["output"]
    ways = [(way["base"], way["fusion"]) for way in early["ways"]]
    assert ways == [
        *(("LPCAM", "none"), ("CAM", "none")),
        *((b, how) for b in ("LPCAM", "CAM") for how in ("fused", "alone")),
    ]
    best = max(way["information"] for way in early["ways"])
    near = [way["information"] >= 0.95 * best for way in early["ways"]]
    assert [way["chosen"] for way in early["ways"]].index(True) == near.index(True)


def test_other_maps_are_cut_where_they_agree_best(base: Values) -> None:
    """With masks of LPCAM-E as the truth, no other threshold has a higher mIoU."""
    folder, verdicts = Path(base["run"]["folder"]), metrics(base)["verdicts"]

    def agreement(method: str, threshold: float) -> float:
        matrix = np.zeros((4, 4), np.int64)
        for name in IDS:
            preferred = cut(folder / "lpcam_e", name, verdicts["LPCAM-E"]["threshold"])
            step = step_of(preferred.shape)
            mask = cut(folder / METHODS[method], name, threshold)
            if name != "i03":
                places = (preferred[::step, ::step].ravel(), mask[::step, ::step].ravel())
                np.add.at(matrix, places, 1)
        both = np.diag(matrix)
        union = matrix.sum(0) + matrix.sum(1) - both
        return float(np.mean(both[union > 0] / union[union > 0]))

    for method in ("CAM", "LPCAM-F", "LPCAM"):
        own = verdicts[method]
        assert agreement(method, own["threshold"]) == pytest.approx(own["agreement"])
        for other in (0.02, 0.3, own["threshold"] - 0.05, min(0.99, own["threshold"] + 0.05)):
            assert agreement(method, round(other, 2)) <= own["agreement"] + 1e-9


FIXED: list[tuple[Values, set[str]]] = [
    ({"lpcam.tau": 0.3}, {"lpcam.tau"}),
    ({"seeds.threshold": 0.4}, {"threshold of LPCAM-E"}),
    ({"lpcam.scales": [1.0]}, {"lpcam.scales"}),
    ({"lpcam.early": {"fusion": "alone", "base": "CAM", "clusters": 4}}, {"lpcam.early"}),
    ({"lpcam.cam_threshold": 0.2, "lpcam.clusters": 3}, {"threshold of CAM", "lpcam.clusters"}),
]


@pytest.mark.parametrize(("changes", "fixed"), FIXED, ids=range(len(FIXED)))
def test_a_value_given_by_hand_is_used_and_not_chosen(
    base: Values, tmp_path: Path, changes: Values, fixed: set[str]
) -> None:
    folder = tmp_path / "run"
    values = copied(base, folder, {**changes, "report.images": 0})
    rows = {(row["method"], row["threshold_source"]): row for row in go(values).rows}
    assert choices(values).keys() == CHOSEN - fixed
    parts = {name: read_json(folder / name / "stage.json")["parts"] for name in ("lpcam", "seeds")}
    fitting = read_json(folder / "prototypes" / "stage.json")["parts"]["settings"]
    if "lpcam.tau" in fixed:
        assert fitting["tau"] == 0.3
    if "threshold of LPCAM-E" in fixed:
        assert parts["seeds"]["threshold"] == rows["LPCAM-E", "fixed"]["threshold"] == 0.4
        for name in IDS:
            seed = read_index_mask(folder / "seeds" / f"{name}.png")
            assert np.array_equal(seed, cut(folder / "lpcam_e", name, 0.4))
        agreed = read_json(folder / "agreement" / "lpcam" / "stage.json")
        assert agreed["parts"]["threshold"] == 0.4
    if "lpcam.scales" in fixed:
        assert parts["lpcam"]["scales"] == [1.0]
        assert rows["CAM", "automatic"]["protocol"]["scales"] == [1.0]
    if "lpcam.early" in fixed:
        ways = read_json(folder / "early" / "stage.json")["output"]["ways"]
        assert [(way["base"], way["fusion"]) for way in ways] == [("CAM", "alone")]
    if "threshold of CAM" in fixed:
        assert rows["CAM", "fixed"]["threshold"] == 0.2
        assert fitting["tau"] == 0.2  # of CAM's threshold, whoever chose it
        assert fitting["clusters"] == 3


def test_one_part_of_a_choice_given_by_hand(base: Values, tmp_path: Path) -> None:
    values = copied(base, tmp_path / "run", {"lpcam.early.fusion": "alone", "report.images": 0})
    go(values)
    ways = read_json(tmp_path / "run" / "early" / "stage.json")["output"]["ways"]
    assert [(way["base"], way["fusion"]) for way in ways] == [("LPCAM", "alone"), ("CAM", "alone")]
    chosen = next(way for way in ways if way["chosen"])
    assert choices(values)["lpcam.early"][0] == f"{chosen['base']}, alone after round 2"
    maps = read_maps(tmp_path / "run" / "lpcam_e" / "i00.npz").high_res
    other = read_maps(tmp_path / "run" / METHODS[chosen["base"]] / "i00.npz").high_res
    assert maps.shape == other.shape and not np.array_equal(maps, other)
    assert maps.max((1, 2)).tolist() == [1.0] * len(maps) and maps.min() == 0


def test_maps_without_early_layers_are_judged_by_their_curves(curved: Values) -> None:
    folder, found = Path(curved["run"]["folder"]), metrics(curved)
    assert choices(curved).keys() == {
        "threshold of CAM",
        "threshold of LPCAM-F",
        "threshold of LPCAM",
    }
    assert {one["rule"] for one in found["verdicts"].values()} == {RULE}
    assert not (folder / "early").exists() and not (folder / "lpcam_e").exists()
    for method, verdict in found["verdicts"].items():
        assert verdict["by_features"] is not None
        told = []
        for name in IDS:
            maps = read_maps(folder / METHODS[method] / f"{name}.npz").high_res
            if len(maps):
                image = np.array(Image.open(Path(curved["data"]["root"], "images", f"{name}.png")))
                step = step_of(image.shape[:2])
                best = torch.from_numpy(maps.max(0)[::step, ::step].copy())
                told.append(colour_information(colour_bins(image[::step, ::step]), best))
        curve = torch.stack(told).mean(0)
        assert verdict["images"] == len(told) == 11
        assert 0 < verdict["information"] < float(curve.max())  # less by the features' share
        last = max(np.flatnonzero(curve >= 0.95 * curve.max()))
        assert verdict["by_colours"] == THRESHOLDS[last]


def test_two_threads_give_the_same_bytes(base: Values, tmp_path: Path) -> None:
    values = changed(base, {"run.folder": str(tmp_path / "run"), "report.images": 0})
    go(changed(values, {"run.threads": 2}))
    expected, found = results(Path(base["run"]["folder"])), results(tmp_path / "run")
    assert found == expected


def test_what_is_missing_is_made_again(base: Values, tmp_path: Path) -> None:
    values = copied(base, tmp_path / "run")
    expected = results(tmp_path / "run")
    for name in ("lpcam_e/i00.npz", "lpcam_e/i05.npz", "early/early.safetensors"):
        (tmp_path / "run" / name).unlink()
    kept = times(tmp_path / "run")["lpcam_e/i01.npz"]
    go(values)
    assert results(tmp_path / "run") == expected
    assert times(tmp_path / "run")["lpcam_e/i01.npz"] == kept
    shutil.rmtree(tmp_path / "run" / "early")
    shutil.rmtree(tmp_path / "run" / "judge")
    go(values)
    assert results(tmp_path / "run") == expected


@pytest.mark.parametrize("given", ["auto", "none"])
def test_the_refinement_that_a_run_chooses(base: Values, tmp_path: Path, given: str) -> None:
    folder = tmp_path / "run"
    values = copied(base, folder, {"refine.method": given, "report.images": 0})
    rows = go(values).rows
    method = choices(values)["refinement of LPCAM-E"][0] if given == "auto" else "none"
    title = {"crf": "LPCAM-E + CRF", "none": "LPCAM-E + nothing"}[method]
    assert [row["method"] for row in rows if row["stage"] == "pseudo"] == [title] * 2
    if given == "auto":
        told = read_json(folder / "refine-choice" / "lpcam_e" / "stage.json")["output"]
        smaller = told["share"][1] <= told["share"][0]
        assert (told["method"] == "crf") == (told["gain"] >= 1.05 and smaller)
    for name in IDS:
        mask = read_index_mask(folder / "pseudo" / "lpcam_e" / f"{name}.png")
        if method == "none":  # the pseudo masks are the seeds
            assert np.array_equal(mask, read_index_mask(folder / "seeds" / f"{name}.png"))
    before = times(folder)
    go(values)
    assert times(folder) == before


def test_irn_learns_from_both_sides_of_the_threshold(base: Values, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    irn = {"preset": "adaptive", "epochs": 1, "batch_size": 4, "crop": 64, "radius": 5}
    changes = {"refine.method": "irn", "refine.irn": irn, "report.images": 0}
    values = copied(base, folder, changes)
    rows = {(row["method"], row["threshold_source"]): row for row in go(values).rows}
    threshold = metrics(values)["verdicts"]["LPCAM-E"]["threshold"]
    labels = read_json(folder / "refine-labels" / "lpcam_e" / "stage.json")["parts"]
    # 0.6 and 0.4 suppose 0.45
    expected = [round(one + threshold - 0.45, 6) for one in (0.6, 0.4)]
    assert labels["thresholds"] == pytest.approx(expected)
    verdict = metrics(values)["verdicts"]["LPCAM-E + IRN"]
    row = rows["LPCAM-E + IRN", "automatic"]
    assert row["threshold"] == verdict["threshold"]
    assert choices(values)["threshold of LPCAM-E + IRN"][0] == f"{verdict['threshold']:.2f}"
    own = {
        path.relative_to(folder / "pseudo/lpcam_e").as_posix()
        for path in folder.rglob("*.png")
        if path.is_relative_to(folder / "pseudo/lpcam_e")
    }
    assert own == {f"{kind}{i}.png" for kind in ("", "boundaries/") for i in IDS}


def test_a_host_follows_the_threshold_of_its_teacher(curved: Values, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    amn = {"preset": "official", "epochs": 1, "batch_size": 4, "crop": 64}
    values = copied(curved, folder, {"host": {"method": "amn", "maps": ["LPCAM"], "amn": amn}})
    rows = {(row["method"], row["threshold_source"]): row for row in go(values).rows}
    verdicts = metrics(values)["verdicts"]
    assert verdicts["AMN+LPCAM"]["rule"] == RULE
    assert rows["AMN+LPCAM", "automatic"]["threshold"] == verdicts["AMN+LPCAM"]["threshold"]
    (path,) = folder.glob("host-labels/*/stage.json")
    shift = verdicts["LPCAM"]["threshold"] - 0.45
    expected = [min(0.99, max(0.01, one + shift)) for one in (0.45, 0.25)]
    assert read_json(path)["parts"]["thresholds"] == pytest.approx(expected)
    seeds = read_json(folder / "host-seeds" / "amn_lpcam" / "stage.json")["parts"]
    assert seeds["threshold"] == verdicts["AMN+LPCAM"]["threshold"]


def test_lists_grey_images_and_no_masks(weights: Path, tmp_path: Path) -> None:
    """No truth, other images to cluster than to map, and colours that tell nothing."""
    root = draw_folder(tmp_path / "boxes", masks=False)
    for name in ("i01", "i02", "i07"):
        with Image.open(root / "images" / f"{name}.png") as picture:
            grey = picture.convert("L")
        grey.save(root / "images" / f"{name}.png")
    (root / "lists").mkdir()
    for name, numbers in {"cluster": range(6), "map": (1, 2, 3, 6, 7, 8)}.items():
        text = "".join(f"i{number:02d}\n" for number in numbers)
        (root / "lists" / f"{name}.txt").write_text(text)
    values = recipe_values(root, tmp_path / "run", weights)
    values |= {"lpcam": LPCAM, "refine": {"method": "auto"}}
    values["data"]["lists"] = {"prototypes": "cluster", "maps": "map", "evaluate": "map"}
    assert go(values).rows == []
    assert choices(values).keys() == CHOSEN | {"refinement of LPCAM-E"}
    made = {path.stem for path in (tmp_path / "run" / "lpcam_e").glob("*.npz")}
    assert made == {"i01", "i02", "i03", "i06", "i07", "i08"}
    assert metrics(values)["verdicts"]["LPCAM-E"]["images"] == 5  # one has no label
    maps = read_maps(tmp_path / "run" / "lpcam_e" / "i01.npz").high_res
    assert maps.max() == pytest.approx(1) and maps.min() < 0.5


def test_a_backbone_without_early_layers(
    base: Values, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base maps are what there is, and colours alone judge; the run says so."""

    def none(*_: Any) -> None:
        raise ClassifierError("the model Blocks has no two early layers")

    monkeypatch.setattr(context, "early_layers", none)
    folder = tmp_path / "run"
    values = copied(base, folder, {"report.images": 2})
    for name in ("judge", "early"):
        shutil.rmtree(folder / name)
    go(values)
    found = choices(values)
    assert found.keys() == CHOSEN | {"early layers"}
    assert found["early layers"][0] == "none"
    chosen = found["lpcam.early"][0]
    assert chosen in ("LPCAM, none", "CAM, none")
    for name in IDS:
        used = read_maps(folder / METHODS[chosen.removesuffix(", none")] / f"{name}.npz")
        assert np.array_equal(read_maps(folder / "lpcam_e" / f"{name}.npz").high_res, used.high_res)
    assert metrics(values)["verdicts"]["LPCAM-E"]["by_features"] is None
    before = times(folder)
    go(values)
    assert times(folder) == before
    (folder / "lpcam_e" / "i00.npz").unlink()  # the run goes on with what it chose
    go(values)
    assert times(folder)["metrics.json"] == before["metrics.json"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": {"threshold": "auto", "ignore_threshold": 0.2}}, "ignore_threshold"),
        ({"seeds.ignore_threshold": 0.2}, "ignore_threshold"),
        ({"lpcam": {"preset": "frozen"}, "seeds.method": "LPCAM-E"}, "LPCAM-E.*lpcam.early"),
        ({"lpcam": {"preset": "frozen"}, "refine": {"maps": ["LPCAM-E"]}}, "LPCAM-E"),
    ],
)
def test_settings_that_do_not_go_together(base: Values, changes: Values, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_recipe(changed(base, changes), where="tiny.yaml")
