"""A person's choices about prototypes: the run follows, and makes only what they change."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import COLOURS, digests, recipe_values, times

from lpcam.classifiers.classifier import Classifier
from lpcam.cli.main import main
from lpcam.data.map_files import read_maps
from lpcam.method.choices import Choice, format_choices
from lpcam.method.prototypes import Prototypes
from lpcam.pipeline.recipe import parse_recipe
from lpcam.pipeline.run import RunResult, run
from lpcam.pipeline.run_folder import RunFolder
from lpcam.pipeline.stages import maps
from lpcam.runtime.errors import ArtefactError, PrototypeError, RecipeError

Values = dict[str, Any]


def go(values: Values, choices: Path | None = None, **changes: Any) -> RunResult:
    changes |= {} if choices is None else {"lpcam.choices": str(choices)}
    return run(parse_recipe(values, where="tiny.yaml"), changes)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, pictures: Path, weights: Path) -> Values:
    values = recipe_values(pictures, tmp_path_factory.mktemp("choices") / "run", weights)
    go(values)
    return values


@pytest.fixture
def values(base: Values, tmp_path: Path) -> Values:
    shutil.copytree(base["run"]["folder"], tmp_path / "run")
    copied = copy.deepcopy(base)
    copied["run"]["folder"] = str(tmp_path / "run")
    return copied


def several(folder: RunFolder) -> tuple[str, list[int]]:
    """A class with several foreground prototypes, and their numbers."""
    found = Prototypes.load(folder.prototypes())
    for name, keep in zip(found.classes, found.foreground.keep, strict=True):
        if keep.sum() > 1:
            return name, torch.nonzero(keep).flatten().tolist()
    raise AssertionError("no class has two prototypes")


def labelled(values: Values) -> str:
    """The id of an image with a label."""
    lines = (Path(values["data"]["root"]) / "labels.csv").read_text().splitlines()[1:]
    return next(line.split(".")[0] for line in lines if line.partition(",")[2])


def write(folder: RunFolder, *choices: Choice) -> Path:
    path = folder.path.parent / "chosen.yaml"
    path.write_text(format_choices(choices, Prototypes.load(folder.prototypes()).digest))
    return path


def test_only_images_of_the_class_are_made_anew(values: Values, tmp_path: Path) -> None:
    folder = RunFolder(values["run"]["folder"])
    name, (number, *_) = several(folder)
    path = write(folder, Choice(name, "foreground", number, "drop", reason="rails"))
    before, old = times(folder.path), digests(folder.path)
    go(values, path)
    after = times(folder.path)
    changed = {one for one in before if before[one] != after[one]}
    labels = (Path(values["data"]["root"]) / "labels.csv").read_text().splitlines()[1:]
    own = {line.split(".")[0] for line in labels if name in line}
    assert 0 < len(own) < len(labels)
    for result, end in (("lpcam", "npz"), ("lpcam_f", "npz"), ("seeds", "png")):
        made = {one for one in changed if one.startswith(f"{result}/") and one.endswith(end)}
        assert made == {f"{result}/{one}.{end}" for one in own}
    assert not any(one.startswith(("classifier/", "cam/", "prototypes/")) for one in changed)
    # a run from nothing with these choices has the same bytes
    fresh = copy.deepcopy(values)
    fresh["run"]["folder"] = str(tmp_path / "fresh")
    go(fresh, path)
    again = digests(tmp_path / "fresh")
    here = digests(folder.path)
    del again["recipe.yaml"], here["recipe.yaml"]
    assert here == again
    # and back
    go(values)
    now = digests(folder.path)
    assert {one: now[one] for one in old if one != "recipe.yaml"} == {
        one: old[one] for one in old if one != "recipe.yaml"
    }


def test_the_maps_are_those_of_the_choices(values: Values) -> None:
    folder = RunFolder(values["run"]["folder"])
    name, (number, *_) = several(folder)
    go(values, write(folder, Choice(name, "foreground", number, "context")))
    explain = folder.explainer(device="cpu")
    moved = Prototypes.load(folder.prototypes()).move(name, [number])
    assert torch.equal(explain.vectors, moved.vectors())
    assert torch.equal(folder.model().head.vectors, moved.vectors())
    index = list(COLOURS).index(name)
    root = Path(values["data"]["root"])
    (image,) = [
        line.split(",")[0]
        for line in (root / "labels.csv").read_text().splitlines()
        if line.endswith(f",{name}")
    ][:1]
    made = explain(root / "images" / image, labels=[name])
    stored = read_maps(folder / "lpcam" / image.replace(".png", ".npz"))
    assert stored.keys.tolist() == [index]
    assert np.abs(stored.high_res - made.lpcam).max() < 0.01
    assert str(folder.path) not in json.dumps(made.found())


def test_the_protocol_says_which_choices_were_a_persons(values: Values) -> None:
    folder = RunFolder(values["run"]["folder"])
    name, (number, *_) = several(folder)
    path = write(
        folder,
        Choice(name, "foreground", number, "drop", reason="it is the rail"),
        Choice(name, "context", 0, "keep", by="negatives"),
    )
    rows = go(values, path).rows
    chosen = rows[0]["protocol"]["prototype_choices"]
    assert [(one["by"], one["reason"]) for one in chosen] == [
        ("negatives", ""),
        ("person", "it is the rail"),
    ]
    assert "choices" not in rows[0]["protocol"]["changed_from_preset"]


def test_names_alone_make_no_map_anew(values: Values) -> None:
    folder = RunFolder(values["run"]["folder"])
    name, (number, *_) = several(folder)
    before = times(folder.path)
    go(values, write(folder, Choice(name, "foreground", number, name="lid")))
    after = times(folder.path)
    changed = {one.split("/")[0] for one in before if before[one] != after[one] and "/" in one}
    assert changed == {"evaluation"}
    assert Prototypes.load(folder.prototypes("chosen")).names == {name: {number: "lid"}}


def test_an_interrupted_change_is_finished(
    values: Values, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(values["run"]["folder"])
    name, (number, *_) = several(folder)
    path = write(folder, Choice(name, "foreground", number, "drop"))
    real, written = maps.write_fused, []

    def stop(*arguments: Any) -> None:
        written.append(arguments)
        if len(written) == 3:
            raise KeyboardInterrupt
        real(*arguments)

    monkeypatch.setattr(maps, "write_fused", stop)
    with pytest.raises(KeyboardInterrupt):
        go(values, path)
    monkeypatch.setattr(maps, "write_fused", real)
    # another choice before the first was finished
    path = write(folder, Choice(name, "foreground", number, "context"))
    go(values, path)
    fresh = copy.deepcopy(values)
    fresh["run"]["folder"] = str(tmp_path / "fresh")
    go(fresh, path)
    for one, digest in digests(tmp_path / "fresh").items():
        assert one == "recipe.yaml" or digest == digests(folder.path)[one], one


@pytest.mark.parametrize("weights_of", ["size", "score", "top", "ridge"])
def test_weights_of_prototypes(values: Values, weights_of: str) -> None:
    folder = RunFolder(values["run"]["folder"])
    before = times(folder.path)
    go(values, **{"lpcam.weights": weights_of})
    after = times(folder.path)
    assert before["prototypes/prototypes.safetensors"] == after["prototypes/prototypes.safetensors"]
    found = folder.explainer(device="cpu").vectors
    plain, rows = Prototypes.load(folder.prototypes()), Classifier.load(folder.classifier).weight
    chosen = plain.chosen(None, weights_of, rows)  # type: ignore[arg-type]
    assert torch.equal(found, chosen.vectors())
    assert not torch.equal(found, plain.vectors())


def test_maps_of_another_similarity_and_what_refuses_it(values: Values) -> None:
    folder = RunFolder(values["run"]["folder"])
    before, name = times(folder.path), labelled(values)
    cosine = {one: read_maps(folder.path / one / f"{name}.npz") for one in ("lpcam", "lpcam_f")}
    with pytest.raises(RecipeError, match="similarity dot"):
        go(values, **{"lpcam.similarity": "dot", "report.images": 2})
    for similarity in ("dot", "euclidean"):
        changes = {"lpcam.similarity": similarity}
        go(values, **changes)
        for one, old in cosine.items():
            made = read_maps(folder.path / one / f"{name}.npz")
            assert made.high_res.max() > 0.99 and not np.allclose(made.high_res, old.high_res)
            cosine[one] = made  # the next must differ from it
        with pytest.raises(RecipeError, match=similarity):
            folder.explainer(device="cpu")
        with pytest.raises(RecipeError, match=similarity):
            folder.model()
    after = times(folder.path)
    assert all(
        before[one] == after[one] for one in before if one.startswith(("cam/", "prototypes/"))
    )


def test_choices_that_do_not_fit(values: Values, tmp_path: Path) -> None:
    folder = RunFolder(values["run"]["folder"])
    name, numbers = several(folder)
    before = times(folder.path)
    with pytest.raises(ArtefactError, match="nowhere"):
        go(values, tmp_path / "nowhere.yaml")
    path = write(folder, *(Choice(name, "foreground", one, "drop") for one in numbers))
    with pytest.raises(PrototypeError, match=name):
        go(values, path)
    go(values, **{"run.seed": 1})
    path = write(folder, Choice(name, "foreground", numbers[0], "drop"))
    with pytest.raises(PrototypeError, match="fitted anew"):
        go(values, path)  # seed 0 again
    assert before.keys() <= times(folder.path).keys()


def test_the_command(values: Values, capsys: pytest.CaptureFixture[str]) -> None:
    folder = RunFolder(values["run"]["folder"])
    name, (number, other, *_) = several(folder)
    assert main(["prototypes", str(folder.path)]) == 0
    listed = capsys.readouterr().out
    assert all(f"{one}, foreground" in listed for one in COLOURS)
    arguments = ["--drop", f"{name}:{number}", "--name", f"{name}:{other}=lid = top"]
    assert main(["prototypes", str(folder.path), *arguments, "--reason", "rails"]) == 0
    said = capsys.readouterr().out
    assert f"--lpcam.choices {folder.choices}" in said
    assert main(["prototypes", str(folder.path), "--keep", f"{name}:context:0"]) == 0
    capsys.readouterr()
    main(["prototypes", str(folder.path), "--all"])
    listed = capsys.readouterr().out
    assert "dropped by a person: rails" in listed
    assert "lid = top" in listed
    assert folder.choose().names == {name: {other: "lid = top"}}
    assert main(said.split("next: lpcam ")[1].split()) == 0
    assert folder.load_recipe().lpcam.choices == folder.choices
    assert len(Prototypes.load(folder.prototypes("chosen")).choices) == 3


@pytest.mark.parametrize("given", ["cow", "cow:", ":3", "cow:x", "cow:3;4", "cow:side:-1"])
def test_places_that_cannot_be_read(given: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["prototypes", "run", "--drop", given])
    assert given in capsys.readouterr().err


def test_a_class_or_centre_that_is_not_there(
    base: Values, capsys: pytest.CaptureFixture[str]
) -> None:
    for given in ("pink:0", "red:99"):
        assert main(["prototypes", base["run"]["folder"], "--drop", given]) == 2
        assert given.split(":")[0] in capsys.readouterr().err
    assert not RunFolder(base["run"]["folder"]).choices.exists()
