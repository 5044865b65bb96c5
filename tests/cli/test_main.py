"""The command line: quick to answer, short in its errors, exact in what it passes on."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny import draw_folder, recipe_values

from lpcam.cli import main as cli
from lpcam.cli.main import main, parse_overrides
from lpcam.pipeline import run as pipeline
from lpcam.pipeline.recipe import bundled_recipes, load_recipe
from lpcam.runtime.errors import RecipeError
from lpcam.runtime.versions import __version__

SOURCE = str(Path(__file__).parents[1] / "src")


@pytest.fixture
def recipe(pictures: Path, weights: Path, tmp_path: Path) -> Path:
    """A recipe on the tiny data set, as a file."""
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(recipe_values(pictures, tmp_path / "run", weights)))
    return path


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["--version"]])
def test_help_does_not_import_what_is_slow(arguments: list[str]) -> None:
    program = (
        "import sys\n"
        "from lpcam.cli.main import main\n"
        "try:\n"
        f"    main({arguments!r})\n"
        "except SystemExit as end:\n"
        "    assert end.code == 0\n"
        "slow = {'torch', 'timm', 'numpy', 'PIL', 'pydantic', 'rich'} & set(sys.modules)\n"
        "assert not slow, slow"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": SOURCE},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "lpcam" in done.stdout


def test_module_and_version() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lpcam", "--version"],
        env={**os.environ, "PYTHONPATH": SOURCE},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == f"lpcam {__version__}\n"


# -- Overrides ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "pairs"),
    [
        ("", []),
        ("--lpcam.tau 0.25", [("lpcam.tau", "0.25")]),
        ("--lpcam.tau=0.25 --run.seed 3", [("lpcam.tau", "0.25"), ("run.seed", "3")]),
        ("--name=a=b", [("name", "a=b")]),
        ("--x.y -1", [("x.y", "-1")]),
        ("--x.y --z", [("x.y", "--z")]),
        ("--x.y=", [("x.y", "")]),
    ],
)
def test_parse_overrides(words: str, pairs: list[tuple[str, str]]) -> None:
    assert parse_overrides(words.split()) == pairs


def test_overrides_that_cannot_be_parsed() -> None:
    with pytest.raises(RecipeError, match=r"unexpected argument 'tau'; .*--section\.key value"):
        parse_overrides(["--lpcam.tau", "0.3", "tau"])
    with pytest.raises(RecipeError, match=r"--lpcam\.tau has no value; write --lpcam\.tau VALUE"):
        parse_overrides(["--run.seed", "1", "--lpcam.tau"])


def test_the_run_gets_recipe_stage_and_command(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[Any, dict[str, Any]]] = []

    def record(given: Any, **options: Any) -> pipeline.RunResult:
        calls.append((given, options))
        return pipeline.RunResult(Path("r"), [], [])

    monkeypatch.setattr(pipeline, "run", record)
    words = ["--lpcam.scales", "[1.0, 0.25]", "--seeds.threshold=0.4", "--classifier.mean", "null"]
    assert main(["run", str(recipe), *words, "--version", "1"]) == 0
    assert main(["cam", str(recipe)]) == 0
    (first, options), (_, second) = calls
    assert first.lpcam.scales == (1.0, 0.25)
    assert first.fixed_threshold("LPCAM") == 0.4
    assert options["until"] == "report"
    assert options["command"] == (
        f"lpcam run {recipe} --lpcam.scales '[1.0, 0.25]' --seeds.threshold=0.4 "
        "--classifier.mean null --version 1"
    )
    assert second == {"until": "cam", "command": f"lpcam cam {recipe}"}
    assert {*cli.STAGE_HELP, "report"} == set(pipeline.STAGES)


@pytest.mark.parametrize(
    ("words", "threads", "memory"),
    [
        (["--threads", "3", "--memory", "1.5"], 3, 1.5),
        (["--memory=0.25", "--run.seed", "4", "--threads=2"], 2, 0.25),
        (["--run.threads", "2", "--threads", "3"], 3, 4.0),  # the short one is the last word
        ([], 1, 4.0),
    ],
)
@pytest.mark.parametrize("command", ["run", "seeds"])
def test_threads_and_memory_reach_the_recipe(
    recipe: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    words: list[str],
    threads: int,
    memory: float,
) -> None:
    calls: list[Any] = []

    def record(given: Any, **options: Any) -> pipeline.RunResult:
        calls.append((given.run.threads, given.run.memory, options["command"]))
        return pipeline.RunResult(Path("r"), [], [])

    values = yaml.safe_load(recipe.read_text())
    values["run"]["memory"] = 4.0
    recipe.write_text(yaml.safe_dump(values))
    monkeypatch.setattr(pipeline, "run", record)
    assert main([command, str(recipe), *words]) == 0
    assert calls == [(threads, memory, " ".join(["lpcam", command, str(recipe), *words]))]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--threads", "0"], "run.threads = 0: .*greater than or equal to 1"),
        (["--threads", "many"], "run.threads = 'many': "),
        (["--memory", "0"], "run.memory = 0: .*greater than 0"),
        (["--memory", "4GB"], "run.memory = '4GB': "),
    ],
)
def test_threads_and_memory_that_cannot_be(
    recipe: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert main(["run", str(recipe), *words]) == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize(
    "words",
    [
        *("demo", "serve R", "predict I --run R", "explain I --run R", "pretrain O"),
        *("export masks R O --format coco", "data check P", "data train-aug V S"),
        *("data masks P O", "import maps S O"),
    ],
)
@pytest.mark.parametrize("threads", ["0", "-1", "two", "1.5"])
def test_threads_are_whole_numbers_from_1_on(
    words: str, threads: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main([*words.split(), f"--threads={threads}"])
    assert end.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.endswith(f"argument --threads: must be a positive integer, got {threads!r}")


# -- Errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "none.yaml"], "no recipe 'none.yaml': it is neither a file nor one of the bund"),
        (["run", "RECIPE", "--lpcam.tau"], "--lpcam.tau has no value; write --lpcam.tau VALUE"),
        (["run", "RECIPE", "more"], "unexpected argument 'more'; replace a recipe's value with"),
        (["run", "RECIPE", "--data.root", "none"], "there is no folder "),
        (["run", "--run.seed", "3", "RECIPE"], "the recipe comes first: lpcam run RECIPE --sec"),
        (["cam", "RECIPE", "--classifier.backbone", "x9"], "timm has no model 'x9'"),
        (["init", "none"], "there is no none; give a folder of images, or a COCO JSON file"),
        (["recipe", "none"], "no bundled recipe 'none'; there are "),
    ],
)
def test_an_error_is_one_line_and_status_2(
    recipe: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    words = [str(recipe) if word == "RECIPE" else word for word in words]
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.err.splitlines()[-1].startswith(f"lpcam: {message}")
    assert "Traceback" not in captured.err
    assert captured.err.count("lpcam: ") == 1


def test_problems_of_a_recipe_have_a_line_each(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", str(recipe), "--lpcam.tau", "2", "--wheels", "3"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == f"lpcam: the recipe {recipe} has 2 problem(s):"
    assert lines[1].startswith("  lpcam.tau = 2: ")
    assert lines[2].startswith("  wheels = 3: unknown key; allowed here: version, name,")


@pytest.mark.parametrize("words", [[], ["paint"], ["init"], ["recipe", "--wheels", "3"]])
def test_wrong_usage(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 2
    assert "usage: lpcam" in capsys.readouterr().err


def test_an_interrupt_says_how_to_go_on(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "run", stop)
    assert main(["run", str(recipe)]) == 130
    assert capsys.readouterr().err == "lpcam: stopped; the same command goes on from here\n"


# -- Commands -----------------------------------------------------------------------------------


def test_recipe_lists_and_prints(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["recipe"]) == 0
    names = capsys.readouterr().out.split()
    assert names == bundled_recipes()
    for name in names:
        assert main(["recipe", name]) == 0
        text = capsys.readouterr().out
        path = tmp_path / f"{name}.yaml"
        path.write_text(text)
        assert load_recipe(path).name == name


def test_recipe_fields_name_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe", "--fields"]) == 0
    lines = capsys.readouterr().out.splitlines()
    keys = [line.split()[0] for line in lines if not line.startswith(" ")]
    expected = {"lpcam.tau", "data.lists.validate", "classifier.probe.long_side", "run.seed"}
    assert expected <= set(keys)
    assert len(keys) == len(set(keys))


def test_init_then_run(
    weights: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two commands from a stranger's folder to seed masks, with the default recipe."""
    root = draw_folder(tmp_path / "boxes")
    monkeypatch.chdir(tmp_path)
    assert main(["init", "boxes", "--backbone", "test_resnet", "--weights", str(weights)]) == 0
    out = capsys.readouterr().out
    assert "12 images with labels, 12 of them with masks" in out
    assert out.splitlines()[-1] == "next: lpcam run boxes/recipe.yaml"
    assert main(["init", "boxes"]) == 2
    assert "exists already" in capsys.readouterr().err
    words = ["--run.threads", "1", "--classifier.probe.long_side", "64", "--run.device", "cpu"]
    words += ["--classifier.probe.weight_decay", "1e-5", "--classifier.method", "probe"]
    assert main(["run", "boxes/recipe.yaml", *words]) == 0
    out = capsys.readouterr().out
    assert "results in runs/boxes" in out
    assert len(list((tmp_path / "runs" / "boxes" / "seeds").glob("*.png"))) == 12
    left = sorted(path.name for path in root.iterdir())
    assert left == ["images", "labels.csv", "masks", "recipe.yaml"]


def test_init_and_run_inside_the_folder(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    """The run's own pictures below the folder are not taken for images without labels."""
    root = draw_folder(tmp_path / "boxes")
    for path in (root / "images").iterdir():
        path.rename(root / path.name)
    (root / "images").rmdir()
    monkeypatch.chdir(root)
    assert main(["init", ".", "--backbone", "test_resnet", "--weights", str(weights)]) == 0
    words = ["--run.threads", "1", "--classifier.probe.long_side", "64", "--run.device", "cpu"]
    words += ["--classifier.probe.weight_decay", "1e-5", "--classifier.method", "probe"]
    for _ in range(2):
        assert main(["run", "recipe.yaml", *words]) == 0
        assert "skipped" not in capsys.readouterr().out
    assert (root / "runs" / "boxes" / "seeds" / "i00.png").exists()


def test_a_run_prints_rows_and_what_was_skipped(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = draw_folder(tmp_path / "boxes")
    (root / "images" / "i07.png").write_bytes(b"")
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(yaml.safe_dump(recipe_values(root, tmp_path / "run", weights)))
    assert main(["cam", str(recipe)]) == 0
    out = capsys.readouterr().out
    assert "mIoU" not in out
    assert (tmp_path / "run" / "cam" / "i00.npz").exists()
    assert not (tmp_path / "run" / "prototypes").exists()
    assert main(["run", str(recipe)]) == 0
    out = capsys.readouterr().out
    assert "boxes all, 11 images, percent" in out
    rows = [line for line in out.splitlines() if "ground truth" in line or "fixed" in line]
    assert len(rows) == 6
    assert ["LPCAM-F" in row for row in rows] == [False, False, True, True, False, False]
    assert "1 skipped:\n  i07: cannot read image" in out
    assert out.endswith(f"results in {tmp_path / 'run'}\n")
