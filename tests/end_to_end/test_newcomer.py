"""A newcomer without a network: from a folder to masks by what the messages say."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lpcam.cli.main import main
from lpcam.data import creatures
from lpcam.pipeline import context
from lpcam.pipeline.recipe import load_recipe
from lpcam.pipeline.run import run, status
from lpcam.pipeline.run_folder import RunFolder
from lpcam.runtime.errors import ArtefactError

SMALL = ["--lpcam.preset", "small", "--report.images", "0", "--run.threads", "1"]
IMAGES = 24


@pytest.fixture(scope="module")
def drawings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawings of creatures without their masks, as a person has photographs."""
    folder = tmp_path_factory.mktemp("newcomer") / "creatures"
    creatures.write(folder, images=IMAGES, size=96, seed=0)
    shutil.rmtree(folder / "masks")
    return folder


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is cached, and nobody answers at the address of the hub."""
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    template = "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.mark.usefixtures("offline")
def test_from_a_folder_to_masks_by_what_the_messages_say(
    drawings: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(drawings, tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    assert main(["init", "mine"]) == 2
    told = capsys.readouterr().err
    assert not Path("mine", "recipe.yaml").exists()  # nothing is chosen for the user
    assert "/timm/mobilenetv2_100.ra_in1k/resolve/main/model.safetensors" in told
    assert "--weights FILE" in told
    (way,) = re.findall(r"lpcam init (--backbone \w+)", told)
    assert main(["init", "mine", *way.split()]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^warning: .*drawings", out, re.MULTILINE)
    following = shlex.split(out.splitlines()[-1].removeprefix("next: lpcam "))
    assert main([*following, *SMALL]) == 0
    (folder,) = re.findall(r"^results in (.*)$", capsys.readouterr().out, re.MULTILINE)
    masks = [np.asarray(Image.open(path)) for path in Path(folder, "seeds").glob("*.png")]
    assert len(masks) == IMAGES
    assert sum(len(np.unique(mask)) > 1 for mask in masks) > IMAGES // 2
    assert main(["status", folder]) == 0
    assert capsys.readouterr().out.startswith("finished")


def test_the_bundled_backbone_is_the_demo_s(drawings: Path, tmp_path: Path) -> None:
    shutil.copytree(drawings, tmp_path / "mine")
    assert main(["init", str(tmp_path / "mine"), "--backbone", "bundled"]) == 0
    made, demo = load_recipe(tmp_path / "mine" / "recipe.yaml"), load_recipe("demo")
    assert made.classifier.described() == demo.classifier.described()
    assert Path(made.classifier.weights).samefile(demo.classifier.weights)


@pytest.mark.usefixtures("offline")
def test_a_run_refuses_before_it_downloads(
    drawings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(drawings, tmp_path / "mine")
    recipe = tmp_path / "mine" / "recipe.yaml"
    assert main(["init", str(tmp_path / "mine"), "--weights", "random"]) == 0
    words = ["--classifier.weights", "pretrained", "--run.folder", str(tmp_path / "run"), *SMALL]
    assert main(["run", str(recipe), *words]) == 2
    assert "resolve/main/model.safetensors" in capsys.readouterr().err
    # and the folder tells so to a person who comes back later
    assert "cannot be downloaded" in status(tmp_path / "run").splitlines()[0]


def test_status_of_a_run_that_goes_on_that_was_stopped_and_that_has_ended(
    drawings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lpcam.runtime.progress.WRITE_EVERY_SECONDS", 0.0)
    shutil.copytree(drawings, tmp_path / "mine")
    folder = tmp_path / "run"
    assert main(["init", str(tmp_path / "mine"), "--backbone", "bundled"]) == 0
    changes = {"lpcam.preset": "small", "run.threads": 1}
    recipe = load_recipe(tmp_path / "mine" / "recipe.yaml", {**changes, "run.folder": folder})
    with pytest.raises(ArtefactError, match="holds no run"):
        status(folder)
    seen = []
    real = context.Context.execute

    def looked_at(self: context.Context, *arguments: object, **options: object) -> bool:
        seen.append(status(folder))
        if len(seen) == 3:
            raise KeyboardInterrupt
        return bool(real(self, *arguments, **options))  # type: ignore[arg-type]

    monkeypatch.setattr(context.Context, "execute", looked_at)
    with pytest.raises(KeyboardInterrupt):
        run(recipe, command="lpcam run mine/recipe.yaml", until="evaluate")
    assert all(text.startswith("running") for text in seen)
    second = seen[1].splitlines()
    assert [line.split()[0] for line in second[1:4]] == ["data", "classify", "cam"]
    assert "done in" in second[2]
    assert "running for" in second[3]
    assert "unknown" in next(line for line in second if line.startswith("time left"))
    stopped = status(folder).splitlines()
    assert stopped[0].startswith("stopped at prototypes")
    assert stopped[1].endswith("lpcam run mine/recipe.yaml")

    monkeypatch.setattr(context.Context, "execute", real)
    run(recipe, until="evaluate")
    assert not RunFolder(folder).progress.exists()
    assert status(folder).startswith("finished")
    # of the second run over all stages the time is known
    monkeypatch.setattr(context.Context, "execute", looked_at)
    with pytest.raises(KeyboardInterrupt):
        del seen[:]
        run(recipe.changed({"lpcam.tau": 0.3}), until="evaluate")
    assert re.search(r"^time left: about ", seen[0], re.MULTILINE)
    # a run from Python has no command line; its own recipe resumes it
    assert f"lpcam run {folder}/recipe.yaml --run.folder {folder}" in status(folder)
