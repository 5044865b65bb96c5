"""From maps to pseudo masks: IRN, CRF and PAMR in a run, and maps of other programs."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny import digests, recipe_values, times

from lpcam import engine
from lpcam.cli import main
from lpcam.data.images import read_index_mask
from lpcam.errors import DataError, RecipeError
from lpcam.pipeline import refine, run
from lpcam.presets import IrnSettings
from lpcam.recipe import parse_recipe
from lpcam.storage import MapFile, map_path, read_maps, write_maps

Values = dict[str, Any]
IRN = {"method": "irn", "irn": {"epochs": 1, "batch_size": 4, "crop": 64, "radius": 5}}
SEEDS = ("CAM", "LPCAM-F", "LPCAM")


def go(values: Values, **options: Any) -> Any:
    return run(parse_recipe(values, where="tiny.yaml"), command="lpcam run tiny.yaml", **options)


def changed(values: Values, **sections: Any) -> Values:
    return {**copy.deepcopy(values), **sections}


def in_folder(values: Values, folder: Path) -> Values:
    return changed(values, run={**values["run"], "folder": str(folder)})


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, pictures: Path, weights: Path) -> Values:
    """A run up to its seeds."""
    values = recipe_values(pictures, tmp_path_factory.mktemp("plain") / "run", weights)
    go(values, until="seeds")
    return values


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, plain: Values) -> Values:
    """The same with IRN's pseudo masks and a report."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    shutil.copytree(plain["run"]["folder"], folder)
    values = changed(in_folder(plain, folder), refine=IRN, report={"images": 12})
    go(values)
    return values


@pytest.fixture
def values(finished: Values, tmp_path: Path) -> Values:
    shutil.copytree(finished["run"]["folder"], tmp_path / "run")
    return in_folder(finished, tmp_path / "run")


def ids(values: Values) -> list[str]:
    return sorted(p.stem for p in Path(values["data"]["root"], "images").iterdir())


def test_what_irn_leaves(finished: Values) -> None:
    folder = Path(finished["run"]["folder"])
    for name in ("cam", "lpcam"):
        for image in ids(finished):
            size = read_maps(map_path(folder / "cam", image)).high_res.shape[1:]
            labels = read_index_mask(folder / "ir-labels" / name / f"{image}.png")
            mask = read_index_mask(folder / "pseudo" / name / f"{image}.png")
            boundary = read_index_mask(folder / "pseudo" / name / "boundaries" / f"{image}.png")
            walked = read_maps(map_path(folder / "pseudo" / name / "maps", image))
            assert labels.shape == mask.shape == size
            assert boundary.shape == walked.cam.shape[1:]
            own = {0, *(k + 1 for k in walked.keys.tolist())}
            assert set(np.unique(labels).tolist()) <= own | {255}
            assert set(np.unique(mask).tolist()) <= own
            if len(walked.keys):
                assert walked.high_res.max() == pytest.approx(1, abs=1e-6)
        with Image.open(folder / "pseudo" / name / "i00.png") as picture:
            assert picture.mode == "P"
        assert not (read_index_mask(folder / "pseudo" / name / "i03.png")).any()  # no label
        assert not (read_index_mask(folder / "ir-labels" / name / "i03.png")).any()
        assert (folder / "irn" / name / "irn.safetensors").is_file()
        assert not (folder / "irn" / name / "checkpoint.safetensors").exists()


def test_rows_of_both_stages(finished: Values) -> None:
    metrics = json.loads(Path(finished["run"]["folder"], "metrics.json").read_text())
    kinds = [(r["stage"], r["method"], r["threshold_source"]) for r in metrics["rows"]]
    sources = ("ground truth", "fixed")
    expected = [("seed", method, source) for method in SEEDS for source in sources]
    expected += [("pseudo", f"{m} + IRN", s) for m in ("CAM", "LPCAM") for s in sources]
    assert kinds == expected
    for row in metrics["rows"]:
        if row["stage"] == "seed":
            assert row["protocol"]["refine"] is None
        else:
            assert row["protocol"]["refine"]["irn"]["epochs"] == 1
            assert "pamr" not in row["protocol"]["refine"]
    fixed = {r["method"]: r for r in metrics["rows"] if r["threshold_source"] == "fixed"}
    settings = IrnSettings.from_preset("default")
    assert fixed["LPCAM + IRN"]["threshold"] == settings.threshold
    assert fixed["CAM + IRN"]["threshold"] == settings.cam_threshold
    assert {k: len(v) for k, v in metrics["irn_history"].items()} == {"cam": 1, "lpcam": 1}

    # the row is that of the masks on disk
    import torch  # noqa: PLC0415

    from lpcam.metrics import confusion, scores  # noqa: PLC0415

    total = torch.zeros(4, 4, dtype=torch.int64)
    names = fixed["LPCAM"]["protocol"]["classes"]
    for image in ids(finished):
        truth = read_index_mask(Path(finished["data"]["root"], "masks", f"{image}.png"))
        mask = read_index_mask(Path(finished["run"]["folder"], "pseudo", "lpcam", f"{image}.png"))
        total += confusion(torch.from_numpy(truth), torch.from_numpy(mask), 4)
    assert scores(total, names).miou == pytest.approx(fixed["LPCAM + IRN"]["miou"], abs=1e-9)


def test_the_report_shows_pseudo_masks_and_boundaries(finished: Values) -> None:
    text = Path(finished["run"]["folder"], "report.html").read_text()
    for words in ("pseudo mask of LPCAM", "pseudo mask of CAM", "boundaries learnt from LPCAM"):
        assert words in text


def test_a_second_run_makes_nothing(values: Values, tmp_path: Path) -> None:
    go(values)
    before = times(tmp_path / "run")
    go(values)
    assert times(tmp_path / "run") == before


@pytest.mark.parametrize(
    ("key", "value", "remade"),
    [
        ("threshold", 0.77, {"pseudo/lpcam"}),
        ("cam_threshold", 0.77, {"pseudo/cam"}),
        ("beta", 7.5, {"pseudo/cam", "pseudo/lpcam"}),
        ("foreground_threshold", 0.77, {"ir-labels/lpcam", "irn/lpcam", "pseudo/lpcam"}),
        ("epochs", 2, {"irn/cam", "irn/lpcam", "pseudo/cam", "pseudo/lpcam"}),
    ],
)
def test_a_change_remakes_what_depends_on_it(
    values: Values, tmp_path: Path, key: str, value: Any, remade: set[str]
) -> None:
    before = times(tmp_path / "run")
    go(changed(values, refine={**IRN, "irn": {**IRN["irn"], key: value}}))
    after = times(tmp_path / "run")
    folders = {"/".join(n.split("/")[:2]) for n in after if after[n] != before.get(n)}
    folders = {f for f in folders if f.split("/")[0] in ("ir-labels", "irn", "pseudo")}
    assert folders == remade


def test_stopped_again_and_again(
    values: Values, plain: Values, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "CHECKPOINT_STEPS", 1)
    stopped = changed(in_folder(values, tmp_path / "stopped"), report={"images": 0})
    shutil.copytree(plain["run"]["folder"], tmp_path / "stopped")
    import lpcam.storage  # noqa: PLC0415

    write, writes, stops = lpcam.storage.os.replace, 0, 0

    def replace(*arguments: Any) -> None:
        nonlocal writes
        write(*arguments)
        writes += 1
        if writes % 7 == 0:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(lpcam.storage.os, "replace", replace)
        for _ in range(60):
            try:
                go(stopped)
                break
            except KeyboardInterrupt:
                stops += 1
    assert stops > 5
    whole = changed(in_folder(values, tmp_path / "run"), report={"images": 0})
    go(whole)
    shutil.rmtree(tmp_path / "run" / "report")
    found, expected = digests(tmp_path / "stopped"), digests(tmp_path / "run")
    assert found | {"recipe.yaml": ""} == expected | {"recipe.yaml": ""}


@pytest.mark.parametrize("method", ["crf", "pamr"])
def test_without_training(plain: Values, tmp_path: Path, method: str) -> None:
    shutil.copytree(plain["run"]["folder"], tmp_path / "run")
    values = changed(
        in_folder(plain, tmp_path / "run"), refine={"method": method, "maps": ["LPCAM"]}
    )
    rows = go(values).rows
    name = f"LPCAM + {method.upper()}"
    assert [r["method"] for r in rows if r["stage"] == "pseudo"] == [name, name]
    assert not (tmp_path / "run" / "irn").exists()
    assert not (tmp_path / "run" / "ir-labels").exists()
    fixed = {r["method"]: r for r in rows if r["threshold_source"] == "fixed"}
    assert abs(fixed[name]["miou"] - fixed["LPCAM"]["miou"]) < 0.3
    assert read_index_mask(tmp_path / "run" / "pseudo" / "lpcam" / "i00.png").any()


@pytest.mark.parametrize("method", ["irn", "crf", "pamr"])
def test_large_images_are_refined_smaller(plain: Values, tmp_path: Path, method: str) -> None:
    """As they are mapped; what comes out has the size of the image all the same."""
    values = changed(
        in_folder(plain, tmp_path / "run"),
        maps={**plain["maps"], "maximum_side": 40},
        refine={**IRN, "method": method, "maps": ["LPCAM"]},
    )
    go(values)
    folder = tmp_path / "run"
    for image in ids(values):
        size = read_index_mask(Path(values["data"]["root"], "masks", f"{image}.png")).shape
        assert max(size) > 40
        assert read_index_mask(folder / "pseudo" / "lpcam" / f"{image}.png").shape == size
        if method == "irn":
            assert read_index_mask(folder / "ir-labels" / "lpcam" / f"{image}.png").shape == size
    fixed = {r["method"]: r for r in go(values).rows if r["threshold_source"] == "fixed"}
    assert abs(fixed[f"LPCAM + {method.upper()}"]["miou"] - fixed["LPCAM"]["miou"]) < 0.2


# -- Maps of other programs ---------------------------------------------------------------------


def test_given_maps(plain: Values, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same masks as a run makes of the same maps; what does not fit is left out and told."""
    maps = tmp_path / "maps"
    shutil.copytree(Path(plain["run"]["folder"], "lpcam"), maps)
    (maps / "i05.npz").unlink()
    (maps / "i06.npz").write_bytes(b"nothing")
    small = np.ones((1, 8, 8), np.float32)
    write_maps(
        map_path(maps, "i07"),
        MapFile(np.array([0], np.int64), small[:, :2, :2], small),
        dtype="uint8",
    )
    one = read_maps(map_path(maps, "i08"))
    write_maps(map_path(maps, "i08"), MapFile(one.keys + 9, one.cam, one.high_res), dtype="uint8")
    recipe = changed(plain, refine={"method": "crf"})
    (tmp_path / "tiny.yaml").write_text(json.dumps(recipe))
    folder = tmp_path / "refined"
    command = ["refine", str(tmp_path / "tiny.yaml"), str(maps), "--run.folder", str(folder)]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "4 skipped" in printed
    for words in ("i05.npz", "i06.npz is damaged", "8 x 8 pixels, but", "class index"):
        assert words in printed
    rows = json.loads((folder / "metrics.json").read_text())["rows"]
    assert {(r["stage"], r["method"]) for r in rows} == {
        ("seed", "given"),
        ("pseudo", "given + CRF"),
    }
    assert all(r["images"] == 8 and len(r["protocol"]["given_maps"]) == 32 for r in rows)
    shutil.copytree(plain["run"]["folder"], tmp_path / "run")
    go(changed(in_folder(recipe, tmp_path / "run"), refine={"method": "crf", "maps": ["LPCAM"]}))
    for image in ("i00", "i03", "i11"):
        own = (tmp_path / "run" / "pseudo" / "lpcam" / f"{image}.png").read_bytes()
        assert (folder / "pseudo" / "given" / f"{image}.png").read_bytes() == own
    before = times(folder)
    assert main(command) == 0
    assert times(folder) == before


def test_given_maps_are_refused(plain: Values, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"does not say how to refine maps.*--refine\.method"):
        refine(parse_recipe(plain, where="tiny.yaml"), tmp_path)
    recipe = parse_recipe(
        changed(in_folder(plain, tmp_path / "run"), refine={"method": "crf"}), where="tiny.yaml"
    )
    with pytest.raises(DataError, match=r"no image of the list 'all' can be refined: cannot read"):
        refine(recipe, tmp_path)
