"""Whole runs on a tiny folder: resumable, content-addressed, right by an independent count."""

from __future__ import annotations

import copy
import errno
import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from tiny import COLOURS, digests, draw_folder, draw_image, recipe_values, times

from lpcam.classifiers.classifier import Classifier
from lpcam.data.map_files import read_maps
from lpcam.pipeline import context
from lpcam.pipeline.context import Context
from lpcam.pipeline.datasets import read_dataset
from lpcam.pipeline.recipe import parse_recipe
from lpcam.pipeline.run import RunResult, run
from lpcam.pipeline.stages import prototypes
from lpcam.runtime.distributed import Processes
from lpcam.runtime.errors import (
    ArtefactError,
    DataError,
    LpcamError,
    PrototypeError,
    RecipeError,
)
from lpcam.runtime.versions import versions
from lpcam.training import loop as engine

Values = dict[str, Any]
STAGES = ("classifier", "cam", "prototypes", "lpcam", "lpcam_f", "seeds", "evaluation")
METHODS = {"CAM": "cam", "LPCAM-F": "lpcam_f", "LPCAM": "lpcam"}
COMMAND = "lpcam run tiny.yaml"


def with_change(values: Values, path: str, value: Any) -> Values:
    changed = place = copy.deepcopy(values)
    *sections, last = path.split(".")
    for section in sections:
        place = place.setdefault(section, {})
    place[last] = value
    return changed


def go(values: Values, **options: Any) -> RunResult:
    return run(parse_recipe(values, where="tiny.yaml"), **{"command": COMMAND, **options})


def metrics(values: Values) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path(values["run"]["folder"], "metrics.json").read_text())
    return found


def elsewhere(values: Values, folder: Path) -> Values:
    return with_change(values, "run.folder", str(folder))


def results(values: Values) -> dict[str, str]:
    """Digest of every file of a run but its recipe, which names the folder."""
    found = digests(Path(values["run"]["folder"]))
    del found["recipe.yaml"]
    return found


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, pictures: Path, weights: Path) -> Values:
    """Values of a finished run, which no test may change."""
    values = recipe_values(pictures, tmp_path_factory.mktemp("base") / "run", weights)
    go(values)
    return values


@pytest.fixture
def values(base: Values, tmp_path: Path) -> Values:
    """The finished run, copied."""
    shutil.copytree(base["run"]["folder"], tmp_path / "run")
    return with_change(base, "run.folder", str(tmp_path / "run"))


@pytest.fixture
def own(values: Values, tmp_path: Path) -> Values:
    """The finished run and its data, both copied."""
    shutil.copytree(values["data"]["root"], tmp_path / "boxes")
    return with_change(values, "data.root", str(tmp_path / "boxes"))


def must_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that loads, builds or decodes anything from here on fails."""

    def fail(*arguments: Any, **options: Any) -> None:
        raise AssertionError(f"work was done: {arguments}, {options}")

    monkeypatch.setattr("lpcam.classifiers.classifier.Classifier.load", fail)
    monkeypatch.setattr("lpcam.classifiers.classifier.build", fail)
    monkeypatch.setattr("lpcam.data.dataset.Item.read", fail)
    monkeypatch.setattr("lpcam.data.pixels.read_header", fail)
    monkeypatch.setattr("lpcam.data.validation.digest_file", fail)


def test_files_of_a_run(base: Values) -> None:
    folder = Path(base["run"]["folder"])
    found = set(digests(folder))
    ids = [f"i{number:02d}" for number in range(12)]
    expected = {f"{stage}/stage.json" for stage in STAGES}
    expected |= {f"{stage}/{i}.npz" for stage in METHODS.values() for i in ids}
    expected |= {f"seeds/{i}.png" for i in ids}
    expected |= {
        "classifier/classifier.safetensors",
        "prototypes/prototypes.safetensors",
        "evaluation/images.json",
        "index.json",
        "metrics.json",
        "recipe.yaml",
        "sheet.png",
    }
    assert found == expected
    assert json.loads((folder / "use.json").read_text()).keys() == {
        *("classify", "cam", "prototypes", "lpcam", "seeds", "evaluate"),
    }
    resolved = yaml.safe_load((folder / "recipe.yaml").read_text())
    assert parse_recipe(resolved, where="r") == parse_recipe(base, where="tiny.yaml")


def test_rows_have_every_field(base: Values) -> None:
    found = metrics(base)
    assert set(found) == {
        *("rows", "curves", "skipped", "prototype_events", "classifier_history", "command"),
        *("host_history", "refine_history", "segmenter_history", "protocol"),
        *("choices", "verdicts"),
    }
    assert (found["choices"], found["verdicts"]) == ([], {})  # the preset fixes everything
    kinds = [(row["method"], row["threshold_source"]) for row in found["rows"]]
    assert kinds == [(m, s) for m in METHODS for s in ("ground truth", "fixed")]
    loaded = Classifier.load(Path(base["run"]["folder"], "classifier/classifier.safetensors"))
    for row in found["rows"]:
        expected = {"stage": "seed", "dataset": "boxes", "split": "all", "images": 12}
        assert expected.items() <= row.items()
        assert set(row["per_class"]) == {"background", "blue", "green", "red"}
        assert set(row["per_class"]["red"]) == {"iou", "fp", "fn", "precision", "recall"}
        fixed = 0.15 if row["method"] == "CAM" else 0.3
        assert row["threshold_source"] == "ground truth" or row["threshold"] == fixed
        protocol = row["protocol"]
        assert protocol["threshold"] == row["threshold"]
        assert ("sweep" in protocol["threshold_source"]) == (row["threshold_source"] != "fixed")
        expected = {
            "dataset": "boxes",
            "split": "all",
            "labels": "labels.csv",
            "classes": ["blue", "green", "red"],
            "prototypes_list": "all",
            "preset": "voc12.official",
            "changed_from_preset": {
                "clusters": 3,
                "scales": [1.0, 0.5],
                "max_features": 60,
                "mu_f": 0.5,
                "context_lower": 0.0,
            },
            "scales": [1.0, 0.5],
            "flip": True,
            "crf": False,
            "seed": 0,
            "command": COMMAND,
            "versions": versions(),
        }
        assert expected.items() <= protocol.items()
        assert protocol["classifier"]["backbone"] == "test_resnet"
        assert protocol["classifier"]["trained_by"] == "probe"
        assert protocol["classifier"]["fingerprint"] == loaded.fingerprint()
    assert found["classifier_history"][0]["validation_map"] is not None


def counted(values: Values, method: str, threshold: float, ids: dict[str, int]) -> np.ndarray:
    """Confusion matrix by looping over images and pixels' classes, from the stored maps."""
    folder, root = Path(values["run"]["folder"]), Path(values["data"]["root"])
    labels = list(ids.values())
    matrix = np.zeros((len(labels) + 1, len(labels) + 1), np.int64)
    for path in sorted((folder / METHODS[method]).glob("*.npz")):
        maps = read_maps(path)
        truth = np.array(Image.open(root / "masks" / f"{path.stem}.png"))
        # the background plane stands in front, so it wins where values are equal
        # in the maps' own type: 0.2 is a value that uint8 maps have
        ground = np.full((1, *truth.shape), threshold, np.float32)
        planes = np.concatenate([ground, maps.high_res])
        guess = np.array([0, *(maps.keys + 1)])[planes.argmax(0)]
        for row, value in enumerate([0, *labels]):
            for column in range(len(labels) + 1):
                matrix[row, column] += ((truth == value) & (guess == column)).sum()
    return matrix


def check_rows(values: Values, ids: dict[str, int]) -> None:
    """Every figure of metrics.json against quotients written out here."""
    for row in metrics(values)["rows"]:
        matrix = counted(values, row["method"], row["threshold"], ids)
        truth, guess, both = matrix.sum(1), matrix.sum(0), np.diag(matrix)
        union = truth + guess - both
        assert row["miou"] == pytest.approx(np.mean(both / union))
        assert row["fp"] == pytest.approx(np.mean(((guess - both) / union)[1:]))
        assert row["fn"] == pytest.approx(np.mean(((truth - both) / union)[1:]))
        precision = both / np.maximum(guess, 1)
        assert row["precision"] == pytest.approx(np.mean(precision[1:]))
        assert row["recall"] == pytest.approx(np.mean((both / truth)[1:]))
        assert row["precision_with_background"] == pytest.approx(np.mean(precision))
        assert row["recall_with_background"] == pytest.approx(np.mean(both / truth))
        for number, name in enumerate(["background", *ids]):
            assert row["per_class"][name]["iou"] == pytest.approx(both[number] / union[number])
        if row["threshold_source"] == "ground truth":
            for other in (0.0, row["threshold"] - 0.07, row["threshold"] + 0.04, 0.99):
                if 0 <= other <= 0.99:
                    rival = counted(values, row["method"], round(other, 2), ids)
                    top = np.diag(rival) / (rival.sum(0) + rival.sum(1) - np.diag(rival))
                    assert np.mean(top) <= row["miou"] + 1e-9


def test_figures_are_those_of_an_independent_count(base: Values) -> None:
    check_rows(base, {name: number for number, name in enumerate(COLOURS, start=1)})
    recalls = {row["method"]: row["recall"] for row in metrics(base)["rows"]}
    assert min(recalls.values()) > 0.5  # the maps do find the boxes


def test_each_method_has_its_fixed_threshold(values: Values) -> None:
    values = with_change(values, "lpcam.cam_threshold", 0.4)
    values = with_change(values, "seeds.threshold", 0.2)  # for the method of the seeds, LPCAM
    rows = [row for row in go(values).rows if row["threshold_source"] == "fixed"]
    assert {row["method"]: row["threshold"] for row in rows} == {
        "CAM": 0.4,
        "LPCAM-F": 0.3,
        "LPCAM": 0.2,
    }
    check_rows(values, {name: number for number, name in enumerate(COLOURS, start=1)})


def test_a_subset_of_the_classes_ignores_the_masks_of_others(
    pictures: Path, weights: Path, tmp_path: Path
) -> None:
    values = with_change(
        recipe_values(pictures, tmp_path / "run", weights), "data.classes", ["red", "blue"]
    )
    result = go(values)
    assert result.rows[0]["protocol"]["classes"] == ["red", "blue"]
    check_rows(values, {"red": 3, "blue": 1})
    seed = np.array(Image.open(tmp_path / "run" / "seeds" / "i00.png"))
    assert set(np.unique(seed)) <= {0, 1}  # i00 shows blue (1) and green, which is left out
    with Image.open(tmp_path / "run" / "seeds" / "i02.png") as red:
        assert set(np.unique(np.array(red))) == {0, 3}


def test_seeds_are_palette_pngs_of_the_map_at_the_threshold(base: Values) -> None:
    folder = Path(base["run"]["folder"])
    for path in sorted((folder / "seeds").glob("*.png")):
        with Image.open(path) as picture:
            assert picture.mode == "P"
            palette = picture.getpalette()
            assert palette is not None
            assert palette[:9] == [0, 0, 0, 128, 0, 0, 0, 128, 0]
            seed = np.array(picture)
        maps = read_maps(folder / "lpcam" / f"{path.stem}.npz")
        expected = np.zeros_like(seed)
        if len(maps.keys):
            best = maps.high_res.argmax(0)
            expected = np.where(maps.high_res.max(0) > 0.3, maps.keys[best] + 1, 0)
        assert np.array_equal(seed, expected), path


def test_an_unchanged_run_does_nothing(base: Values, monkeypatch: pytest.MonkeyPatch) -> None:
    before = times(Path(base["run"]["folder"]))
    rows = metrics(base)["rows"]
    must_not_load(monkeypatch)
    result = go(base, command="asked for in other words")
    assert times(Path(base["run"]["folder"])) == before
    assert result.rows == rows


EVERYTHING = set(STAGES)
AFTER_CLASSIFIER = EVERYTHING - {"classifier"}
AFTER_PROTOTYPES = AFTER_CLASSIFIER - {"cam"}


@pytest.mark.parametrize(
    ("path", "value", "remade"),
    [
        ("seeds.threshold", 0.5, {"seeds", "evaluation"}),
        ("lpcam.threshold", 0.5, {"seeds", "evaluation"}),
        ("seeds.method", "CAM", {"seeds", "evaluation"}),
        ("lpcam.cam_threshold", 0.5, {"evaluation"}),
        ("lpcam.tau", 0.3, AFTER_PROTOTYPES),
        ("lpcam.mu_b", 0.3, AFTER_PROTOTYPES),
        ("lpcam.max_features", 50, AFTER_PROTOTYPES),
        ("lpcam.flip", False, AFTER_CLASSIFIER),
        ("lpcam.cam_epsilon", 0.1, {"cam", "prototypes", "evaluation"}),  # the same vectors
        ("maps.dtype", "float16", AFTER_CLASSIFIER),
        ("lpcam.split_maps", "single_scale", AFTER_PROTOTYPES),
        ("classifier.probe.weight_decay", 1e-4, EVERYTHING),
        ("run.seed", 1, EVERYTHING),
        ("sheet.images", 1, {"evaluation"}),
        ("data.name", "crates", {"evaluation"}),
        ("maps.precision", "bfloat16", EVERYTHING),
        ("run.threads", 2, set()),
        ("run.memory", 0.01, set()),
        ("run.batch", 3, set()),
    ],
)
def test_a_change_remakes_what_depends_on_it(
    values: Values, path: str, value: Any, remade: set[str]
) -> None:
    folder = Path(values["run"]["folder"])
    before, old = times(folder), digests(folder)
    go(with_change(values, path, value))
    after = times(folder)
    changed = {name.split("/")[0] for name in after if "/" in name and after[name] != before[name]}
    assert changed == remade
    assert before.keys() == after.keys()
    if remade:
        assert after["metrics.json"] != before["metrics.json"]
    if "lpcam" in remade:
        assert digests(folder)["lpcam/i00.npz"] != old["lpcam/i00.npz"]


def test_a_changed_run_equals_a_fresh_one(values: Values, base: Values, tmp_path: Path) -> None:
    changed = with_change(with_change(values, "lpcam.tau", 0.3), "maps.dtype", "float16")
    fresh = elsewhere(changed, tmp_path / "fresh")
    go(changed)
    go(fresh)
    assert results(changed) == results(fresh) != results(base)
    go(values)  # and back
    assert results(values) == results(base)


def test_a_touched_image_is_the_same_image(own: Values, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, root = Path(own["run"]["folder"]), Path(own["data"]["root"])
    before = times(folder)
    for path in (root / "images" / "i01.png", root / "masks" / "i02.png", root / "labels.csv"):
        os.utime(path)
    monkeypatch.setattr("lpcam.classifiers.classifier.Classifier.load", None)
    monkeypatch.setattr("lpcam.classifiers.classifier.build", None)
    go(own)
    after = times(folder)
    assert {name for name in after if after[name] != before[name]} == {"index.json", "recipe.yaml"}


def test_an_image_with_other_contents_remakes_the_run(own: Values, tmp_path: Path) -> None:
    root = Path(own["data"]["root"])
    path = root / "images" / "i01.png"
    height, width = np.array(Image.open(path)).shape[:2]
    image, _ = draw_image(["green"], (height, width), np.random.default_rng(9))
    Image.fromarray(image).save(path)
    fresh = elsewhere(own, tmp_path / "fresh")
    go(own)
    go(fresh)
    assert results(own) == results(fresh)


def test_a_file_that_was_deleted_is_made_again_and_no_other(values: Values, base: Values) -> None:
    folder = Path(values["run"]["folder"])
    before = times(folder)
    for name in ("lpcam/i04.npz", "seeds/i05.png", "metrics.json"):
        (folder / name).unlink()
    go(values)
    after = times(folder)
    changed = {name for name in after if after[name] != before[name]}
    assert changed - {"use.json", "recipe.yaml"} == {
        "lpcam/i04.npz",
        *("seeds/i05.png", "metrics.json", "sheet.png", "evaluation/images.json"),
        *(f"{stage}/stage.json" for stage in ("lpcam", "lpcam_f", "seeds", "evaluation")),
    }
    assert results(values) == results(base)


def test_a_changed_mask_remakes_the_evaluation_alone(own: Values) -> None:
    folder, root = Path(own["run"]["folder"]), Path(own["data"]["root"])
    before, rows = times(folder), metrics(own)["rows"]
    mask = np.array(Image.open(root / "masks" / "i01.png"))
    mask[:20] = 255
    Image.fromarray(mask).save(root / "masks" / "i01.png")
    assert go(own).rows != rows
    changed = {name for name, written in times(folder).items() if written != before[name]}
    assert changed - {"recipe.yaml", "use.json", "index.json", "metrics.json", "sheet.png"} == {
        "evaluation/stage.json",
        "evaluation/images.json",
    }
    check_rows(own, {name: number for number, name in enumerate(COLOURS, start=1)})


@pytest.mark.parametrize(("memory", "share", "threads"), [(0.001, 0.5, 3), (0.0005, 0.0, 1)])
def test_a_seed_gives_the_same_bytes(
    base: Values,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    memory: float | None,
    share: float,
    threads: int,
) -> None:
    """In another folder, after other random numbers, with some and no features kept."""
    torch.rand(3)
    monkeypatch.setattr(context, "FEATURES_SHARE", share)
    again = elsewhere(base, tmp_path / "again")
    go(with_change(with_change(again, "run.memory", memory), "run.threads", threads))
    assert results(again) == results(base)


def test_batches_give_the_maps_of_single_images(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = draw_folder(tmp_path / "boxes")
    for path in sorted((root / "images").iterdir()):
        size = (72, 64) if int(path.stem[1:]) % 3 else (64, 72)
        for folder in ("images", "masks"):
            place = root / folder / path.name
            with Image.open(place) as picture:
                picture.resize(size, Image.Resampling.NEAREST).save(place)
    single = recipe_values(root, tmp_path / "single", weights)
    batched = with_change(elsewhere(single, tmp_path / "batched"), "run.batch", 4)
    batched = with_change(batched, "run.threads", 2)
    expected = go(single).rows
    passes: list[int] = []
    features = Classifier.features

    def counted(self: Classifier, images: torch.Tensor) -> torch.Tensor:
        passes.append(images.shape[0])
        return features(self, images)

    monkeypatch.setattr(Classifier, "features", counted)
    rows = go(batched).rows
    assert max(passes) == 8  # four images and their mirrors
    for row, one in zip(rows, expected, strict=True):
        assert row["miou"] == pytest.approx(one["miou"], abs=0.01)
    for name in METHODS.values():
        for path in (tmp_path / "single" / name).glob("*.npz"):
            first, second = read_maps(path), read_maps(tmp_path / "batched" / name / path.name)
            for a, b in ((first.cam, second.cam), (first.high_res, second.high_res)):
                assert np.abs(a - b).max(initial=0) < 1.5 / 255  # one step of a map


def test_a_sample_that_cannot_fit_is_refused_before_any_work(base: Values, tmp_path: Path) -> None:
    values = elsewhere(base, tmp_path / "run")
    large = with_change(with_change(values, "lpcam.max_features", 10_000_000), "run.memory", 1.0)
    # both sides of 3 classes, 96 channels of 2 bytes, twice the bound
    match = r"max_features 10000000 .* 21\.5 GiB, but 0\.5 GiB .*run\.memory"
    with pytest.raises(RecipeError, match=match):
        go(large)
    assert [path for path in digests(tmp_path / "run") if "/" in path] == []
    go(large, until="cam")  # which needs no sample
    everything = with_change(values, "lpcam.max_features", None)
    everything = with_change(everything, "maps.features", "float32")
    items = read_dataset(parse_recipe(values, where="tiny.yaml")).select("all")
    rows = sum(  # an image of two classes counts twice
        len(item.labels) * math.prod(math.ceil(s / 16) for s in Image.open(item.image).size)
        for item in items
    )
    with pytest.raises(RecipeError, match=rf"all {rows} features .* maps\.features .*run\.memory"):
        go(with_change(everything, "run.memory", 1e-5))


def test_what_processes_share(
    base: Values, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the memory there is, or what the recipe says for each; and every list evenly."""
    monkeypatch.setattr(context, "available_memory", lambda: 1000)
    monkeypatch.setattr(Processes, "wait", lambda self: None)
    values = elsewhere(base, tmp_path / "run")
    for given, here, expected in ((None, 1, 500), (None, 4, 125), (2.0, 4, 2 * 2**30)):
        recipe = parse_recipe(with_change(values, "run.memory", given), where="tiny.yaml")
        one = Context(recipe, "", Processes(0, 1, here), None, stages=["evaluate"])
        assert one.memory() == expected
    sharing = Context(recipe, "", Processes(0, 5, 1), None, stages=["evaluate"]).sharing
    assert sorted(Counter(sharing.owner.values()).values()) == [2, 2, 2, 3, 3]
    assert len(sharing.owner) == len(sharing.sizes) == 12


class Stop:
    """Stops the process, as far as a test can, at every ``every``-th file that is written."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, every: int, *, after: bool) -> None:
        self.count = 0
        replace = os.replace

        def stopping(source: Any, target: Any) -> None:
            # how often the state of the run is written depends on how fast the machine is
            self.count += Path(target).name != "progress.json"
            stop = self.count % every == 0 and Path(target).name != "progress.json"
            if stop and not after:
                raise KeyboardInterrupt
            replace(source, target)
            if stop:
                raise KeyboardInterrupt

        monkeypatch.setattr(os, "replace", stopping)


@pytest.mark.parametrize(
    ("method", "every", "after"),
    [("probe", 11, False), ("finetune", 5, True)],
)
def test_a_run_that_is_stopped_again_and_again(
    base: Values,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    every: int,
    *,
    after: bool,
) -> None:
    monkeypatch.setattr(engine, "CHECKPOINT_STEPS", 1)
    monkeypatch.setattr(prototypes, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(prototypes, "CHECKPOINT_SHARE", 0)
    values = elsewhere(base, tmp_path / "run")
    values = with_change(values, "classifier.method", method)
    values = with_change(
        values,
        "classifier.finetune",
        {"epochs": 2, "batch_size": 4, "long_side": [60, 64], "crop": 64, "learning_rate": 0.05},
    )
    go(values)
    expected = digests(tmp_path / "run")
    assert len(expected) > 40
    shutil.rmtree(tmp_path / "run")
    stops = 0
    with monkeypatch.context() as patch:
        Stop(patch, every, after=after)
        for _ in range(100):
            try:
                go(values)
                break
            except KeyboardInterrupt:
                stops += 1
    assert stops >= len(expected) // (2 * every)
    assert digests(tmp_path / "run") == expected


def test_a_full_disk_is_told_and_nothing_is_lost(
    base: Values, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = elsewhere(base, tmp_path / "run")
    written = 0

    def full(descriptor: int) -> None:
        nonlocal written
        written += 1
        if written > 20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(ArtefactError, match=r"cannot write .*: No space left.*; free some"):
            go(values)
    go(values)
    assert results(values) == results(base)


def test_stages_one_by_one(base: Values, tmp_path: Path) -> None:
    values = elsewhere(base, tmp_path / "run")
    folders = {
        "classify": {"classifier"},
        "cam": {"classifier", "cam"},
        "prototypes": {"classifier", "cam", "prototypes"},
        "lpcam": {"classifier", "cam", "prototypes", "lpcam", "lpcam_f"},
        "seeds": set(STAGES) - {"evaluation"},
        "evaluate": set(STAGES),
    }
    for stage, expected in folders.items():
        result = go(values, until=stage)
        assert {p.name for p in (tmp_path / "run").iterdir() if p.is_dir()} == expected
        assert bool(result.rows) == (stage == "evaluate")
    assert results(values) == results(base)


def test_each_stage_works_on_its_own_list(base: Values, tmp_path: Path, weights: Path) -> None:
    root = draw_folder(tmp_path / "boxes")
    (root / "lists").mkdir()
    lists = {
        "train": [0, 1, 2, 3, 4, 5, 6, 7],
        "cluster": [4, 5, 6, 8],
        "map": [8, 9, 10],
        "score": [9, 10],
        "check": [11],
    }
    for name, numbers in lists.items():
        text = "".join(f"i{number:02d}\n" for number in numbers)
        (root / "lists" / f"{name}.txt").write_text(text)
    values = recipe_values(root, tmp_path / "run", weights)
    values["data"]["lists"] = {
        "classify": "train",
        "prototypes": "cluster",
        "maps": "map",
        "evaluate": "score",
        "validate": "check",
    }
    result = go(values)
    assert [row["images"] for row in result.rows] == [2] * 6
    assert result.rows[0]["split"] == "score"
    names = {stage: {p.stem for p in (tmp_path / "run" / stage).glob("i*")} for stage in STAGES}
    assert names["lpcam"] == names["lpcam_f"] == names["seeds"] == {"i08", "i09", "i10"}
    assert names["cam"] == {"i04", "i05", "i06", "i08", "i09", "i10"}  # the split needs its CAM
    values["data"]["lists"]["evaluate"] = "train"
    with pytest.raises(DataError, match="list 'train'"):
        go(values)
    values["data"]["lists"]["evaluate"] = "trian"
    with pytest.raises(DataError, match="'trian'"):
        go(values)


def test_a_folder_without_masks_gives_seeds_and_no_rows(weights: Path, tmp_path: Path) -> None:
    root = draw_folder(tmp_path / "boxes", masks=False)
    values = recipe_values(root, tmp_path / "run", weights)
    result = go(values)
    assert result.rows == []
    assert metrics(values)["rows"] == []
    assert len(list((tmp_path / "run" / "seeds").glob("*.png"))) == 12
    with Image.open(tmp_path / "run" / "sheet.png") as picture:
        assert picture.width == 4 * 208 + 8  # no column of truth


def label(root: Path, *lines: str) -> None:
    with (root / "labels.csv").open("a", encoding="utf-8") as file:
        file.write("".join(f"{line}\n" for line in lines))


def test_images_of_odd_sizes_and_names(weights: Path, tmp_path: Path) -> None:
    root = draw_folder(tmp_path / "boxes")
    sizes = {"dot": (1, 1), "wide": (8000, 24), "barn/rote Kühe 牛": (72, 60)}
    (root / "images" / "barn").mkdir()
    for name, size in sizes.items():
        Image.new("RGB", size, "red").save(root / "images" / f"{name}.png")
    label(root, *(f"{name},red" for name in sizes))
    result = go(recipe_values(root, tmp_path / "run", weights))
    assert result.skipped == []
    assert result.rows[0]["images"] == 12  # those with masks
    for name, (width, height) in sizes.items():
        maps = read_maps(tmp_path / "run" / "lpcam" / f"{name}.npz")
        assert maps.high_res.shape == (1, height, width)
        assert np.isfinite(maps.high_res).all()
        seed = np.array(Image.open(tmp_path / "run" / "seeds" / f"{name}.png"))
        assert seed.shape == (height, width)
        assert set(np.unique(seed)) <= {0, 3}


def test_files_that_cannot_be_used_are_skipped_and_listed(own: Values) -> None:
    root, folder = Path(own["data"]["root"]), Path(own["run"]["folder"])
    whole = (root / "images" / "i05.png").read_bytes()
    (root / "images" / "i05.png").write_bytes(whole[:200])
    (root / "images" / "empty.png").touch()
    (root / "images" / "text.png").write_text("not a picture")
    shutil.copy(root / "images" / "i01.png", root / "images" / "unlabelled.png")
    label(root, "empty.png,red", "text.png,red", "gone.png,red", "i01.png,green")
    result = go(own)
    reasons = {skip["id"]: skip["reason"] for skip in result.skipped}
    assert set(reasons) == {"i05", "empty", "text", "gone.png", "unlabelled"}
    assert "empty" in reasons["empty"]
    assert all("labels.csv" in reasons[name] for name in ("gone.png", "unlabelled"))
    assert metrics(own)["skipped"] == result.skipped
    assert [row["images"] for row in result.rows] == [11] * 6
    assert not (folder / "seeds" / "i05.png").exists()
    notices = json.loads((folder / "index.json").read_text())["notices"]
    assert any("i01 (lines 3, 17)" in notice for notice in notices)
    before = times(folder)
    (root / "images" / "unlabelled.png").unlink()
    go(own)  # the list is in the results, though nothing else is made again
    assert len(metrics(own)["skipped"]) == 4
    assert times(folder)["lpcam/i00.npz"] == before["lpcam/i00.npz"]
    (root / "images" / "i05.png").write_bytes(whole)
    assert len(go(own).skipped) == 3
    assert (folder / "seeds" / "i05.png").exists()


def test_masks_that_show_no_class_are_no_truth(
    own: Values, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The run ends as one without masks, report included, and says why; figures come back."""
    masks = Path(own["data"]["root"], "masks")
    own = with_change(with_change(own, "report.images", 4), "data.anyway", True)
    shutil.copytree(masks, tmp_path / "right")
    for path in masks.iterdir():
        Image.fromarray(np.array(Image.open(path)) * np.uint8(50)).save(path)
    for _ in range(2):  # made, and up to date
        caplog.clear()
        result = go(own)
        assert (result.rows, result.skipped) == ([], [])
        (warning,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
        assert "'all'" in warning and "50, 100, 150" in warning
    assert (metrics(own)["rows"], metrics(own)["curves"]) == ([], {})
    assert not Path(own["run"]["folder"], "evaluation", "images.json").exists()
    assert result.report is not None and "not scored" in result.report.read_text("utf-8")
    shutil.copytree(tmp_path / "right", masks, dirs_exist_ok=True)
    assert [row["images"] for row in go(own).rows] == [12] * 6


Spoil = Callable[[Path], None]


def wrong_mask(root: Path) -> None:
    Image.fromarray(np.zeros((5, 5), np.uint8)).save(root / "masks" / "i02.png")


def unused_class(root: Path) -> None:
    (root / "classes.txt").write_text("blue\ngreen\nred\nyellow\n")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda root: label(root, "../i01.png,red"), r"line 14: .*'\.\./i01\.png'"),
        (wrong_mask, "'i02'.* 5 x 5 "),
        (unused_class, "yellow"),
    ],
    ids=["dots", "mask size", "no image of a class"],
)
def test_data_that_stop_a_run(weights: Path, tmp_path: Path, spoil: Spoil, message: str) -> None:
    root = draw_folder(tmp_path / "boxes")
    spoil(root)
    with pytest.raises(LpcamError, match=message):
        go(recipe_values(root, tmp_path / "run", weights))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("run.device", "gpu", "'gpu'"),
        ("classifier.backbone", "resnet5O", "'resnet5O'.*resnet50"),
        ("classifier.weights", "none.safetensors", r"'none\.safetensors'"),
        ("classifier.backbone", "test_convnext", "'test_convnext'"),
        ("data.classes", ["red", "bleu"], "'bleu'.*'blue'"),
        ("data.root", "nowhere", "nowhere"),
        ("classifier.std", [0.0, 0.0, 0.0], r"'i\d\d'.*NaN"),
    ],
)
def test_settings_that_stop_a_run(
    base: Values, tmp_path: Path, path: str, value: Any, message: str
) -> None:
    values = elsewhere(base, tmp_path / "run")
    with pytest.raises(LpcamError, match=message):
        go(with_change(values, path, value))


def test_damaged_artefacts_are_named(values: Values, tmp_path: Path) -> None:
    path = tmp_path / "run" / "lpcam" / "i00.npz"
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(ArtefactError, match=r"lpcam/i00\.npz"):
        go(with_change(values, "seeds.threshold", 0.5))
    path.unlink()
    other = with_change(
        elsewhere(values, tmp_path / "other"), "classifier.probe.weight_decay", 1e-4
    )
    go(other, until="prototypes")
    name = "prototypes/prototypes.safetensors"
    shutil.copy(tmp_path / "other" / name, tmp_path / "run" / name)
    with pytest.raises(PrototypeError, match=r"classifier \w{32}"):
        go(values)


@pytest.mark.parametrize("name", ["recipe.yaml", "index.json", "seeds/mine.png"])
def test_the_users_own_files_are_not_overwritten(base: Values, tmp_path: Path, name: str) -> None:
    path = tmp_path / "run" / name
    path.parent.mkdir(parents=True)
    path.write_text("[]")
    with pytest.raises(ArtefactError, match=r"so (it|they) may be yours; .*--run\.folder"):
        go(with_change(base, "run.folder", str(tmp_path / "run")))
    assert path.read_text() == "[]"
