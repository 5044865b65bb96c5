"""The command line: quick to answer, short in its errors, exact in what it passes on."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from faults.fault_test import environment
from tiny import draw_folder, recipe_values

from lpcam.cli.command import COMMANDS, GROUPS, PARENTS, parse_changes
from lpcam.cli.main import main
from lpcam.data.masks import write_mask
from lpcam.pipeline import run as pipeline
from lpcam.pipeline.recipe import bundled_recipes, load_recipe
from lpcam.pipeline.stages import STAGES
from lpcam.runtime.errors import LpcamError
from lpcam.runtime.versions import __version__


@pytest.fixture
def recipe(pictures: Path, weights: Path, tmp_path: Path) -> Path:
    """A recipe on the tiny data set, as a file."""
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(recipe_values(pictures, tmp_path / "run", weights)))
    return path


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, dict[str, Any]]]:
    """The recipes that were asked to run, with their options; nothing is run."""
    calls: list[tuple[Any, dict[str, Any]]] = []

    def record(given: Any, *arguments: Any, **options: Any) -> pipeline.RunResult:
        calls.append((given, {"arguments": arguments, **options}))
        return pipeline.RunResult(Path("r"), [], [])

    for name in ("run", "refine", "segment"):
        monkeypatch.setattr(pipeline, name, record)
    return calls


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["--version"]])
def test_help_imports_nothing_slow(arguments: list[str]) -> None:
    program = (
        "import sys\n"
        "from lpcam.cli.main import main\n"
        "try:\n"
        f"    main({arguments!r})\n"
        "except SystemExit as end:\n"
        "    assert end.code == 0\n"
        "slow = {'torch', 'timm', 'numpy', 'PIL', 'pydantic', 'rich', 'yaml'} & set(sys.modules)\n"
        "assert not slow, slow"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "lpcam" in done.stdout


def test_the_help_lists_the_commands_in_groups(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    groups = {
        "start": "demo init run",
        "look": "experiment status report prototypes explain serve",
        "use": "evaluate predict refine segment",
        "exchange": "convert data export import label-studio",
        "about": "recipe doctor",
    }
    found = re.findall(r"^(\w+):\n((?:  .*\n)+)", capsys.readouterr().out, re.MULTILINE)
    shown = {group: {line.split()[0] for line in lines.splitlines()} for group, lines in found}
    assert shown == {group: {*names.split()} for group, names in groups.items()}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = COMMANDS[name]
    assert command.group in GROUPS
    assert name.partition(" ")[0] in PARENTS or " " not in name
    with pytest.raises(SystemExit) as end:
        main([*name.split(), "--help"])
    assert end.value.code == 0
    out = " ".join(capsys.readouterr().out.split())
    assert command.help in out and command.help.endswith(".")
    for one in command.arguments:
        assert str(one.settings["help"]).endswith((".", ")", "...")), one


def test_module_and_version() -> None:
    command = [sys.executable, "-m", "lpcam", "--version"]
    assert subprocess.check_output(command, env=environment(), text=True) == (
        f"lpcam {__version__}\n"
    )


@pytest.mark.parametrize(
    ("words", "changes"),
    [
        ([], {}),
        (["--lpcam.tau", "0.25"], {"lpcam.tau": 0.25}),
        (["--lpcam.scales=[1, 0.5]", "--run.seed", "3"], {"lpcam.scales": [1, 0.5], "run.seed": 3}),
        (["--name=a=b"], {"name": "a=b"}),
        (["--x.y", "-1"], {"x.y": -1}),
        (["--x.y", "--z"], {"x.y": "--z"}),
        (["--x.y="], {"x.y": None}),
        (["--data.root", "7"], {"data.root": "7"}),  # a path stays text
    ],
)
def test_parse_changes(words: list[str], changes: dict[str, Any]) -> None:
    assert parse_changes(words) == changes


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lpcam.tau", "0.3", "tau"], "'tau'"),
        (["--run.seed", "1", "--lpcam.tau"], "--lpcam.tau has no value"),
        (["--lpcam.scales", "[1"], "--lpcam.scales"),
    ],
)
def test_changes_that_cannot_be_parsed(words: list[str], message: str) -> None:
    with pytest.raises(LpcamError, match=message):
        parse_changes(words)


def test_the_run_gets_recipe_stage_and_command(
    recipe: Path, asked: list[tuple[Any, dict[str, Any]]]
) -> None:
    words = ["--lpcam.scales", "[1.0, 0.25]", "--seeds.threshold=0.4", "--classifier.mean", "null"]
    assert main(["run", str(recipe), *words, "--version", "1"]) == 0
    assert main(["run", str(recipe), "--until", "cam"]) == 0
    (first, options), (_, second) = asked
    assert first.lpcam.scales == (1.0, 0.25)
    assert first.fixed_threshold("LPCAM") == 0.4
    assert options["until"] == "report"
    assert options["command"] == (
        f"lpcam run {recipe} --lpcam.scales '[1.0, 0.25]' --seeds.threshold=0.4 "
        "--classifier.mean null --version 1"
    )
    assert (second["until"], second["command"]) == ("cam", f"lpcam run {recipe} --until cam")


@pytest.mark.parametrize(
    ("words", "threads", "memory"),
    [
        (["--threads", "3", "--memory", "1.5"], 3, 1.5),
        (["--memory=0.25", "--run.seed", "4", "--threads=2"], 2, 0.25),
        (["--run.threads", "2", "--threads", "3"], 3, 4.0),  # the short one counts
        ([], 1, 4.0),
    ],
)
@pytest.mark.parametrize("command", [["run"], ["refine", "maps"], ["segment", "masks"]])
def test_threads_and_memory_reach_the_recipe(
    recipe: Path,
    asked: list[tuple[Any, dict[str, Any]]],
    command: list[str],
    words: list[str],
    threads: int,
    memory: float,
) -> None:
    values = yaml.safe_load(recipe.read_text())
    values["run"]["memory"] = 4.0
    recipe.write_text(yaml.safe_dump(values))
    line = [command[0], str(recipe), *command[1:], *words]
    assert main(line) == 0
    ((found, options),) = asked
    assert (found.run.threads, found.run.memory) == (threads, memory)
    assert options["arguments"] == tuple(Path(name) for name in command[1:])
    assert options["command"] == " ".join(["lpcam", *line])


def test_files_of_other_programs_have_a_run_folder_of_their_own(
    recipe: Path, asked: list[tuple[Any, dict[str, Any]]]
) -> None:
    assert main(["refine", str(recipe), "maps/"]) == 0
    assert main(["segment", str(recipe), "masks", "--run.folder", "mine"]) == 0
    folders = [found.folder for found, _ in asked]
    assert folders == [Path("runs/tiny-refined").absolute(), Path("mine").absolute()]


@pytest.mark.parametrize(
    "words",
    [
        *("demo", "run R", "serve R", "predict I --run R", "explain I --run R"),
        *("export masks R O --format coco", "data check P", "data train-aug V S"),
        *("data masks P O", "import maps S O"),
    ],
)
def test_threads_must_be_positive(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    for threads in ("0", "-1", "two", "1.5"):
        with pytest.raises(SystemExit) as end:
            main([*words.split(), f"--threads={threads}"])
        assert end.value.code == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.endswith(f"--threads: must be a positive integer, got {threads!r}")


@pytest.mark.parametrize("memory", ["0", "-1", "4GB", "nan", "inf"])
def test_memory_must_be_positive(memory: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["run", "R", f"--memory={memory}"])
    assert f"--memory: must be a positive number, got {memory!r}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "none.yaml"], "'none.yaml'"),
        (["run", "RECIPE", "--lpcam.tau"], "--lpcam.tau"),
        (["run", "RECIPE", "more"], "'more'"),
        (["run", "RECIPE", "--data.root", "none"], "none"),
        (["run", "--run.seed", "3", "none.yaml"], "'none.yaml'"),
        (["run", "RECIPE", "--until", "cams"], "'cams'.*classify, cam, "),
        (["run", "RECIPE", "--until", "host"], "'host'.*host.method"),
        (["run", "RECIPE", "--classifier.backbone", "x9"], "'x9'"),
        (["report", "none"], "none"),
        (["init", "none"], "none"),
        (["recipe", "none"], "'none'"),
    ],
)
def test_an_error_is_one_line_and_status_2(
    recipe: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    words = [str(recipe) if word == "RECIPE" else word for word in words]
    assert main(words) == 2
    captured = capsys.readouterr()
    assert re.match(f"lpcam: .*{message}", captured.err.splitlines()[-1])
    assert "Traceback" not in captured.err
    assert captured.err.count("lpcam: ") == 1


@pytest.mark.parametrize(
    "words", [[], ["paint"], ["init"], ["data"], ["recipe", "--wheels", "3"], ["cam", "R"]]
)
def test_wrong_usage(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 2
    assert "usage: lpcam" in capsys.readouterr().err


def test_an_interrupt_says_how_to_resume(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "run", stop)
    assert main(["run", str(recipe)]) == 130
    assert "resume" in capsys.readouterr().err


def test_recipe_lists_and_prints(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    def told(*words: str) -> str:
        assert main(["recipe", *words]) == 0
        return capsys.readouterr().out

    names = told().split()
    assert names == bundled_recipes()
    for name in names:
        path = tmp_path / f"{name}.yaml"
        path.write_text(told(name))
        assert load_recipe(path).name == name
    assert "\nlpcam.tau  (float)\n    " in told("--fields")
    stages = [line.split()[0] for line in told("--stages").splitlines()]
    assert stages == [stage.name for stage in STAGES]


def test_evaluate_scores_two_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found, truth, scores = tmp_path / "found", tmp_path / "truth", tmp_path / "scores.json"
    write_mask(truth / "a.png", np.array([[0, 0, 1, 1]], np.uint8))
    write_mask(found / "a.png", np.array([[0, 0, 0, 1]], np.uint8))
    (tmp_path / "classes.txt").write_text("cow\ndog\n")
    words = [str(found), str(truth), "--classes", str(tmp_path / "classes.txt")]
    assert main(["evaluate", *words, "--json", str(scores)]) == 0
    (cow,) = [line for line in capsys.readouterr().out.splitlines() if "cow" in line]
    assert re.findall(r"[\d.]+", cow)[0] == "50.0"
    written = json.loads(scores.read_text())
    assert written["per_class"]["cow"]["iou"] == 0.5
    assert written["left_out"] == ["dog"]
    assert written["command"].startswith("lpcam evaluate ")
    assert main(["evaluate", str(found), str(truth)]) == 0
    assert "mean" in capsys.readouterr().out


SMALL = {
    "run.threads": "1",
    "run.device": "cpu",
    "classifier.method": "probe",
    "classifier.probe.long_side": "64",
    "classifier.probe.weight_decay": "1e-5",
    "report.images": "0",
}
WORDS = [word for key, value in SMALL.items() for word in (f"--{key}", value)]


def test_init_then_run(
    weights: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two commands from a stranger's folder to seed masks, with the default recipe.

    The run's own pictures below the folder are not taken for images without labels.
    """
    root = draw_folder(tmp_path / "boxes")
    for path in (root / "images").iterdir():
        path.rename(root / path.name)
    (root / "images").rmdir()
    monkeypatch.chdir(root)
    assert main(["init", ".", "--backbone", "test_resnet", "--weights", str(weights)]) == 0
    out = capsys.readouterr().out
    assert "12 images with labels, 12 of them with masks" in out
    assert out.splitlines()[-1] == "next: lpcam run recipe.yaml"
    assert main(["init", "."]) == 2
    assert "exists" in capsys.readouterr().err
    for _ in range(2):
        assert main(["run", "recipe.yaml", *WORDS]) == 0
        out = capsys.readouterr().out
        assert "results in runs/boxes" in out and "skipped" not in out
    assert len(list((root / "runs" / "boxes" / "seeds").glob("*.png"))) == 12


def test_a_run_prints_rows_and_what_was_skipped(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = draw_folder(tmp_path / "boxes")
    (root / "images" / "i07.png").write_bytes(b"")
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(yaml.safe_dump(recipe_values(root, tmp_path / "run", weights)))
    assert main(["run", str(recipe), "--until", "cam"]) == 0
    assert "mIoU" not in capsys.readouterr().out
    assert (tmp_path / "run" / "cam" / "i00.npz").exists()
    assert not (tmp_path / "run" / "prototypes").exists()
    assert main(["run", str(recipe)]) == 0
    out = capsys.readouterr().out
    assert "boxes all, 11 images, percent" in out
    rows = [line for line in out.splitlines() if "ground truth" in line or "fixed" in line]
    assert ["LPCAM-F" in row for row in rows] == [False, False, True, True, False, False]
    assert "1 skipped:\n  i07: " in out
    assert out.endswith(f"results in {tmp_path / 'run'}\n")
