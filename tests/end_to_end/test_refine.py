"""From maps to pseudo masks: IRN and CRF in a run, and maps of other programs."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import digests, recipe_values, times

from lpcam.cli.main import main
from lpcam.data.images import read_image
from lpcam.data.map_files import map_path, read_maps, write_maps
from lpcam.data.masks import read_index_mask
from lpcam.method.seeds import seeds
from lpcam.pipeline.recipe import parse_recipe
from lpcam.pipeline.run import refine, run
from lpcam.refine.base import REFINEMENTS, LearnedRefinement
from lpcam.refine.crf import CrfSettings, DenseCrf
from lpcam.refine.irn import Irn, IrnSettings, boundary_map, propagate, pseudo_maps
from lpcam.refine.ternary import crf_labels, ternary
from lpcam.runtime import files
from lpcam.runtime.errors import DataError, RecipeError
from lpcam.training import loop as engine

Values = dict[str, Any]
IRN = {"method": "irn", "irn": {"epochs": 1, "batch_size": 4, "crop": 64, "radius": 5}}
SMALL = {
    "irn": IRN["irn"],
    "psa": {"epochs": 1, "batch_size": 4, "crop": 48, "radius": 3, "freeze": ["conv1"]},
}
"""Settings of each refinement for a run in a second, where its own take longer."""
SEEDS = ("CAM", "LPCAM-F", "LPCAM")
STAGES = ("refine-labels", "refine-network", "pseudo")


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
    values = changed(in_folder(plain, folder), refine=IRN, report={"images": 2})
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
        for image in ids(finished):  # also i03, which has no label
            labels = read_index_mask(folder / "refine-labels" / name / f"{image}.png")
            boundary = read_index_mask(folder / "pseudo" / name / "boundaries" / f"{image}.png")
            walked = read_maps(map_path(folder / "pseudo" / name / "maps", image))
            assert labels.shape == walked.high_res.shape[1:]
            assert boundary.shape == walked.cam.shape[1:]
            assert {*np.unique(labels)} <= {0, 255, *(walked.keys + 1)}
            if len(walked.keys):
                assert walked.high_res.max() == pytest.approx(1, abs=1e-6)
        assert not read_index_mask(folder / "refine-labels" / name / "i03.png").any()
        with Image.open(folder / "pseudo" / name / "i00.png") as picture:
            assert picture.mode == "P"
        assert (folder / "refine-network" / name / "network.safetensors").is_file()
        assert not (folder / "refine-network" / name / "checkpoint.safetensors").exists()


def test_labels_are_those_of_the_crf_at_both_thresholds(finished: Values) -> None:
    folder, settings = Path(finished["run"]["folder"]), IrnSettings.from_preset("default")
    crf = DenseCrf(CrfSettings.from_preset("irn"))
    unsure = 0
    for name, high, low in (
        ("cam", settings.cam_foreground_threshold, settings.cam_background_threshold),
        ("lpcam", settings.foreground_threshold, settings.background_threshold),
    ):
        for image in ("i00", "i04", "i05"):  # two classes, two, one
            maps = read_maps(map_path(folder / name, image))
            picture = read_image(Path(finished["data"]["root"], "images", f"{image}.png"))
            planes = torch.from_numpy(maps.high_res)
            expected = ternary(*crf_labels(crf, torch.from_numpy(picture), planes, (high, low)))
            path = folder / "refine-labels" / name / f"{image}.png"
            found = torch.from_numpy(read_index_mask(path))
            ids = torch.tensor([0, *(k + 1 for k in maps.keys.tolist())])
            sure = expected != 255
            assert torch.equal(found.long()[sure], ids[expected[sure]])
            assert bool((found[~sure] == 255).all())
            unsure += int((~sure).sum())
    assert unsure > 0


def test_walked_maps_are_those_of_the_source_and_its_own_network(finished: Values) -> None:
    folder, settings = Path(finished["run"]["folder"]), IrnSettings.from_preset("default")
    for name in ("cam", "lpcam"):
        network = Irn.load(folder / "refine-network" / name / "network.safetensors").folded()
        maps = read_maps(map_path(folder / name, "i00"))
        picture = read_image(Path(finished["data"]["root"], "images", "i00.png"))
        boundary = boundary_map(network, picture)
        walked = propagate(torch.from_numpy(maps.cam), boundary, settings)
        expected = pseudo_maps(walked, (picture.shape[0], picture.shape[1])).numpy()
        found = read_maps(map_path(folder / "pseudo" / name / "maps", "i00"))
        assert np.abs(found.high_res - expected).max() < 1 / 500
        drawn = read_index_mask(folder / "pseudo" / name / "boundaries" / "i00.png") / 255
        assert np.abs(drawn - boundary.numpy()).max() < 1 / 500
    assert not np.array_equal(found.high_res, read_maps(map_path(folder / "lpcam", "i00")).high_res)


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
            assert "psa" not in row["protocol"]["refine"]
    fixed = {r["method"]: r for r in metrics["rows"] if r["threshold_source"] == "fixed"}
    settings = IrnSettings.from_preset("default")
    assert fixed["LPCAM + IRN"]["threshold"] == settings.threshold
    assert fixed["CAM + IRN"]["threshold"] == settings.cam_threshold
    assert {k: len(v) for k, v in metrics["refine_history"].items()} == {"cam": 1, "lpcam": 1}


def test_the_report_shows_pseudo_masks_and_boundaries(finished: Values) -> None:
    text = Path(finished["run"]["folder"], "report.html").read_text()
    for words in ("pseudo mask of LPCAM", "pseudo mask of CAM", "boundaries learned from LPCAM"):
        assert words in text


@pytest.mark.parametrize(
    ("key", "value", "remade"),
    [
        ("threshold", 0.77, {"pseudo/lpcam"}),
        ("cam_threshold", 0.77, {"pseudo/cam"}),
        ("beta", 7.5, {"pseudo/cam", "pseudo/lpcam"}),
        ("foreground_threshold", 0.77, {f"{k}/lpcam" for k in STAGES}),
        ("epochs", 2, {f"{k}/{n}" for k in STAGES[1:] for n in ("cam", "lpcam")}),
    ],
)
def test_a_change_remakes_what_depends_on_it(
    values: Values, tmp_path: Path, key: str, value: Any, remade: set[str]
) -> None:
    before = times(tmp_path / "run")
    go(changed(values, refine={**IRN, "irn": {**IRN["irn"], key: value}}), until="pseudo")
    after = times(tmp_path / "run")
    folders = {"/".join(n.split("/")[:2]) for n in after if after[n] != before.get(n)}
    folders = {f for f in folders if f.split("/")[0] in STAGES}
    assert folders == remade


def test_stopped_again_and_again(
    values: Values, plain: Values, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "CHECKPOINT_STEPS", 1)
    stopped = changed(in_folder(values, tmp_path / "stopped"), report={"images": 0})
    shutil.copytree(plain["run"]["folder"], tmp_path / "stopped")
    write, writes, stops = files.os.replace, 0, 0

    def replace(*arguments: Any) -> None:
        nonlocal writes
        write(*arguments)
        if Path(arguments[1]).name == "progress.json":
            return
        writes += 1
        if writes % 7 == 0:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", replace)
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


def test_without_training(plain: Values, tmp_path: Path) -> None:
    shutil.copytree(plain["run"]["folder"], tmp_path / "run")
    run_in = in_folder(plain, tmp_path / "run")
    go(changed(run_in, refine={"method": "crf", "maps": ["LPCAM"]}), until="pseudo")
    changed_pixels = 0
    for image in ("i00", "i04", "i05"):
        maps = read_maps(map_path(tmp_path / "run" / "lpcam", image))
        picture = torch.from_numpy(
            read_image(Path(plain["data"]["root"], "images", f"{image}.png"))
        )
        planes = torch.from_numpy(maps.high_res)
        hard = seeds(planes, 0.3)
        crf = DenseCrf(CrfSettings.from_preset("irn"))
        expected = crf.refine_labels(picture, hard, len(planes) + 1).argmax(0)
        numbers = torch.tensor([0, *(maps.keys + 1)])
        found = read_index_mask(tmp_path / "run" / "pseudo" / "lpcam" / f"{image}.png")
        wrong = (torch.from_numpy(found).long() != numbers[expected]).float().mean()
        assert float(wrong) < 1e-9
        changed_pixels += int((expected != hard).sum())
    assert changed_pixels > 0


def test_a_stage_that_the_recipe_does_not_have_is_refused(plain: Values, tmp_path: Path) -> None:
    values = in_folder(plain, tmp_path / "run")
    with pytest.raises(RecipeError, match=r"'pseudo'.*--refine\.method irn"):
        go(values, until="pseudo")
    assert not (tmp_path / "run").exists()


def test_a_crf_that_wants_probabilities_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"crf\.unary is 'probabilities' \(preset 'psa'\)"):
        parse_recipe(
            changed(
                recipe_values(Path("d"), Path("r"), Path("w")),
                refine={"method": "crf", "crf": {"preset": "psa"}},
            ),
            where="tiny.yaml",
        )


def test_an_image_that_cannot_be_refined_is_named(
    plain: Values, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(plain["run"]["folder"], tmp_path / "run")
    values = changed(in_folder(plain, tmp_path / "run"), refine={"method": "crf"})
    monkeypatch.setattr("lpcam.runtime.resources.IMAGE_SHARE", 1e-7)
    with pytest.raises(
        DataError, match=r"pseudo masks of CAM and LPCAM, image 'i0.'.*maps\.maximum_side"
    ):
        go(values)


@pytest.mark.parametrize("method", list(REFINEMENTS))
def test_every_refinement(plain: Values, tmp_path: Path, method: str) -> None:
    """Masks of all images, of their size although they are refined smaller; rows; nothing twice."""
    refinement = REFINEMENTS[method]
    values = changed(
        in_folder(plain, tmp_path / "run"),
        maps={**plain["maps"], "maximum_side": 40},
        refine={"method": method, "maps": ["LPCAM"]},
    )
    if refinement.settings is not None:
        values["refine"][method] = SMALL.get(method, {})
    if refinement.uses_saliency:
        values["data"]["saliency"] = "computed"
    rows = go(values).rows
    folder = tmp_path / "run" / "pseudo" / "lpcam"
    for image in ids(values):
        truth = read_index_mask(Path(values["data"]["root"], "masks", f"{image}.png"))
        mask = read_index_mask(folder / f"{image}.png")
        maps = read_maps(map_path(folder / "maps", image))
        assert mask.shape == truth.shape == maps.high_res.shape[1:]
        assert max(truth.shape) > 40
        assert {*np.unique(mask)} <= {0, *(maps.keys + 1)}
        assert np.isfinite(maps.high_res).all() and 0 <= maps.high_res.max(initial=0) <= 1.001
    assert not read_index_mask(folder / "i03.png").any()  # no label
    fixed = {r["method"]: r for r in rows if r["threshold_source"] == "fixed"}
    if method == "auto":
        found = json.loads((tmp_path / "run" / "metrics.json").read_text())["choices"]
        assert [one["key"] for one in found] == ["refinement of LPCAM"]
        refinement = REFINEMENTS[found[0]["value"]]
    row = fixed[f"LPCAM + {refinement.title}"]
    assert row["miou"] > fixed["LPCAM"]["miou"] - 0.25
    recipe = parse_recipe(values, where="tiny.yaml")
    assert recipe.refine is not None
    assert row["protocol"]["crf"] == refinement.crf_use(recipe.refine)
    if recipe.refine.settings is not None:
        assert row["protocol"]["refine"][method] == json.loads(
            json.dumps(recipe.refine.settings.model_dump())
        )
    histories = json.loads((tmp_path / "run" / "metrics.json").read_text())["refine_history"]
    assert set(histories) == ({"lpcam"} if isinstance(refinement, LearnedRefinement) else set())
    before = times(tmp_path / "run")
    go(values)
    assert times(tmp_path / "run") == before


def test_given_maps(
    plain: Values,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The same masks as a run makes of the same maps; what does not fit is left out and told."""
    maps = tmp_path / "maps"
    shutil.copytree(Path(plain["run"]["folder"], "lpcam"), maps)

    def change(image: str, **fields: Any) -> None:
        path = map_path(maps, image)
        write_maps(path, dataclasses.replace(read_maps(path), **fields), dtype="uint8")

    (maps / "i05.npz").unlink()
    (maps / "i06.npz").write_bytes(b"nothing")
    small = np.ones((1, 8, 8), np.float32)
    change("i07", keys=np.array([0], np.int64), cam=small[:, :2, :2], high_res=small)
    change("i08", keys=read_maps(map_path(maps, "i08")).keys + 9)
    change("i01", made_by={"imported": {}, "classes": ["blue", "green", "red"]})
    change("i02", made_by={"imported": {}, "classes": ["green", "blue", "red"]})
    change("i10", keys=np.array([0], np.int64))
    change("i09", high_res=255 * read_maps(map_path(maps, "i09")).high_res)
    recipe = changed(plain, refine={"method": "crf"})
    (tmp_path / "tiny.yaml").write_text(json.dumps(recipe))
    folder = tmp_path / "refined"
    command = ["refine", str(tmp_path / "tiny.yaml"), str(maps), "--run.folder", str(folder)]
    assert main(command) == 0
    printed = capsys.readouterr().out
    reasons = ("i05.npz", "i06.npz is damaged", "8 x 8 pixels", "class index", "up to 255")
    classes = ("i02.npz has the classes green, blue, red", "not labelled with: blue")
    for words in ("7 skipped", *reasons, *classes):
        assert words in printed
    rows = json.loads((folder / "metrics.json").read_text())["rows"]
    assert {r["stage"]: r["method"] for r in rows} == {"seed": "given", "pseudo": "given + CRF"}
    assert all(r["images"] == 5 and len(r["protocol"]["given_maps"]) == 32 for r in rows)
    shutil.copytree(plain["run"]["folder"], tmp_path / "run")
    go(changed(in_folder(recipe, tmp_path / "run"), refine={"method": "crf", "maps": ["LPCAM"]}))
    for image in ("i00", "i03", "i11"):
        own = (tmp_path / "run" / "pseudo" / "lpcam" / f"{image}.png").read_bytes()
        assert (folder / "pseudo" / "given" / f"{image}.png").read_bytes() == own
    before = times(folder)
    assert main(command) == 0
    assert times(folder) == before


def test_given_maps_are_refused(plain: Values, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"--refine\.method"):
        refine(parse_recipe(plain, where="tiny.yaml"), tmp_path)
    recipe = parse_recipe(
        changed(in_folder(plain, tmp_path / "run"), refine={"method": "crf"}), where="tiny.yaml"
    )
    with pytest.raises(DataError, match=r"no image of the list 'all' can be refined: cannot read"):
        refine(recipe, tmp_path)
    (tmp_path / "theirs" / "barn").mkdir(parents=True)
    np.save(tmp_path / "theirs" / "barn" / "i00.npy", np.ones((2, 2)))
    with pytest.raises(DataError, match=r"theirs holds \.npy files of another program"):
        refine(recipe, tmp_path / "theirs")
