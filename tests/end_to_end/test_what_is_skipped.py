"""Files that are not read, and labels that teach nothing, told by every command as it is typed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import BACKBONE, draw_image, write_weights

from lpcam.cli.main import main
from lpcam.data.masks import read_index_mask

SMALL = ["--lpcam.clusters", "2", "--lpcam.scales", "[1.0]", "--report.images", "2"]
SMALL += ["--classifier.probe.long_side", "64", "--lpcam.max_features", "40"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_weights(tmp_path_factory.mktemp("weights") / "tiny.safetensors")


def draw(path: Path, *labels: str, seed: int = 0) -> Path:
    """An image of coloured boxes in the format of the path's ending, or PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng([seed, *path.name.encode()])
    image = Image.fromarray(draw_image(list(labels), (64, 64), rng)[0])
    image.save(path, None if path.suffix.lower() in Image.registered_extensions() else "PNG")
    return path


def classes(root: Path, *names: str, count: int = 3) -> Path:
    """A folder with a folder for each class, of PNG files."""
    Image.init()
    for name in names:
        for number in range(count):
            draw(root / name / f"{name}{number}.png", name, seed=number)
    return root


def init(root: Path, weights: Path, *options: str) -> int:
    return main(["init", str(root), *options, "--backbone", BACKBONE, "--weights", str(weights)])


def check(root: Path, *options: str) -> tuple[int, dict[str, tuple[str, ...]]]:
    """The exit code of data check, and the names of each finding's text in its JSON."""
    file = root.parent / "check.json"
    code = main(["data", "check", str(root), *options, "--no-estimate", "--json", str(file)])
    found = json.loads(file.read_text())["findings"]
    return code, {one["text"]: tuple(one["names"]) for one in found}


def add(ending: str, count: int = 1, text: bytes = b"x") -> Callable[[Path], None]:
    def write(root: Path) -> None:
        for number in range(count):
            (root / "red" / f"more{number}{ending}").write_bytes(text)

    return write


def draw_more(*names: str) -> Callable[[Path], None]:
    def write(root: Path) -> None:
        for name in names:
            draw(root / "red" / name, "red")

    return write


def animated(root: Path) -> None:
    frames = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue", "red")]
    for name in ("a.gif", "b.tiff", "c.webp"):
        frames[0].save(root / "red" / name, save_all=True, append_images=frames[1:])


FILES: dict[str, tuple[Callable[[Path], None], int, int, tuple[str, ...]]] = {
    # what is added; images that are read more than six; exit code of data check; what is said
    "photographs of a telephone": (add(".HEIC", 8), 0, 1, ("8", ".heic", "JPEG")),
    "scans": (add(".dcm", 2), 0, 1, (".dcm", "16 bits")),
    "volumes": (add(".nii.gz"), 0, 1, (".nii.gz",)),
    "raw photographs": (add(".CR2"), 0, 1, (".cr2", "TIFF")),
    "drawings": (add(".svg"), 0, 1, (".svg", "PNG")),
    "films": (add(".MOV"), 0, 1, (".mov", "frames")),
    "arrays": (add(".npy"), 0, 1, (".npy",)),
    "an archive": (add(".zip"), 0, 1, (".zip", "unpack")),
    "documents": (add(".txt", 3), 0, 0, ("no images: 3", ".txt 3")),
    "files of systems": (add(".db"), 0, 0, (".db 1",)),
    "web pages": (add(".jpg", 1, b"<!DOCTYPE html>"), 0, 1, ("more0", "not an image")),
    "new formats": (draw_more("a.avif", "b.JP2", "c.j2k", "d.TGA", "e.pcx", "f.sgi"), 6, 0, ()),
    "icons": (draw_more("a.ico", "b.dds", "c.qoi"), 3, 0, ()),
    "names of crawlers": (draw_more("0a1b2c", "i.jpg_large", "i.7"), 3, 0, ("content alone: 3",)),
    "another ending": (draw_more("a.jpeg.png"), 1, 0, ()),
    "copies of a Mac": (draw_more("._a.png", "__MACOSX/a.png", ".git/b.png"), 0, 0, ("3 (red/.",)),
    "films and pages": (animated, 3, 0, ("3 (red/a, red/b, red/c)",)),
}


@pytest.mark.parametrize("case", FILES)
def test_files_of_a_class_folder(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    """init, data check as text and as JSON: the same files are read, the others are said."""
    write, more, code, said = FILES[case]
    root = classes(tmp_path / "data", "blue", "red")
    write(root)
    options = ("--labels", "folders")
    assert init(root, weights, *options) == 0
    summary = capsys.readouterr().out
    assert f"{6 + more} images with labels" in summary
    (root / "recipe.yaml").unlink()
    found_code, findings = check(root, *options)
    text = " ".join(capsys.readouterr().out.split())
    whole = " ".join(f"{one} {', '.join(names)}" for one, names in findings.items())
    for word in said:
        assert word in summary and word in text and word in whole, (case, word)
    assert found_code == code


def test_a_run_and_its_commands(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = classes(tmp_path / "data", "blue", "red")
    for write in (add(".heic", 6), add(".zip"), add(".md"), draw_more("z.avif"), animated):
        write(root)
    assert init(root, weights, "--labels", "folders") == 0
    folder = tmp_path / "run"
    recipe = [str(root / "recipe.yaml"), "--run.folder", str(folder)]
    capsys.readouterr()
    assert main(["run", *recipe, *SMALL]) == 0
    printed, page = capsys.readouterr().out, (folder / "report.html").read_text()
    assert "7 skipped" in printed and "warning" not in printed
    assert "6 (red/more0.heic" in printed and "red/more0.zip" in printed
    for text in ("red/more5.heic", "red/more0.zip", "unpack", ".md 1", "3 (red/a"):
        assert text in page
    assert (folder / "seeds" / "red" / "z.png").is_file()
    shutil.copy(root / "red" / "more0.heic", tmp_path / "one.heic")
    sources = [str(root / "red"), str(tmp_path / "one.heic")]
    assert main(["explain", *sources, "--run", str(folder), "--output", str(tmp_path / "e")]) == 1
    printed = capsys.readouterr().out
    assert "8 left out" in printed and "7 (" in printed and "more0.zip" in printed
    assert ".md 1" in printed and "of several pages or frames" in printed
    index = json.loads((tmp_path / "e" / "explained.json").read_text())
    assert len(index["images"]) == 7 and len(index["skipped"]) == 8
    assert any(".md 1" in notice for notice in index["notices"])
    for path in (root / "red").glob("*[!c]"):
        path.unlink()
    assert main(["explain", *sources, "--run", str(folder), "--output", str(tmp_path / "f")]) == 2
    assert "save them as JPEG" in capsys.readouterr().err


def test_images_that_no_label_names(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A row whose image was saved in another format, images without a row, and those outside."""
    root = tmp_path / "data"
    table(root / "images", ["red", "blue", "red"])
    (root / "images" / "labels.csv").rename(root / "labels.csv")
    (root / "images" / "2.png").rename(root / "images" / "2.heic")
    draw(root / "images" / "3.png", "red")
    draw(root / "more" / "4.jpg", "red")
    (root / "more" / "5.dcm").touch()
    assert init(root, weights) == 0
    out = capsys.readouterr().out
    assert "2 images with labels" in out and "2 skipped" in out
    assert "2.heic: labels.csv line 4: files that end in .heic" in out
    assert "3: it has no line in labels.csv" in out
    assert "which are not read: 2 (more/4.jpg, more/5.dcm)" in out


def test_images_that_cannot_be_read_at_all(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(9):
        (tmp_path / "data" / "cow").mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / "cow" / f"{number}.heic").touch()
    assert init(tmp_path / "data", weights, "--labels", "folders") == 2
    error = capsys.readouterr().err
    assert "9 (cow/0.heic" in error and "JPEG" in error


LABELS: dict[str, tuple[list[str], list[str], tuple[str, ...], bool]] = {
    # labels of the images, options, what is said with the class, whether it needs attention
    "one class in all images": (["red"] * 6, [], ("no negatives", "red"), True),
    "one class chosen, in all": (["red;blue"] * 6, ["--classes", "red"], ("no negatives",), True),
    "one class chosen of two": (["red"] * 3 + ["blue"] * 3, ["--classes", "red"], (), False),
    "one class, and images of none": (["red"] * 4 + [""] * 2, [], (), False),
    "one of two in all": (["red", "red;blue"] * 3, [], ("no negatives", "red"), True),
    "all of two in all": (["red;blue"] * 6, [], ("no negatives", "blue; red"), True),
    "always together": (["red;blue", "green"] * 3, [], ("tell them apart", "blue = red"), True),
    "three together": (["red;blue;green", ""] * 3, [], ("apart", "blue = green = red"), True),
    "nearly all": (["red"] * 59 + ["blue"], [], ("few images lack", "red (1)"), False),
    "nothing wrong": (["red", "blue"] * 3, [], (), False),
}


def table(root: Path, labels: list[str]) -> Path:
    lines = ["image,labels", *(f"{n}.png,{text}" for n, text in enumerate(labels))]
    for number, text in enumerate(labels):
        draw(root / f"{number}.png", *(name for name in text.split(";") if name), seed=number)
    (root / "labels.csv").write_text("\n".join(lines))
    return root


@pytest.mark.parametrize("case", LABELS)
def test_labels_that_teach_nothing(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    labels, options, said, attention = LABELS[case]
    root = table(tmp_path / "data", labels)
    assert init(root, weights, *options) == 0
    summary = capsys.readouterr().out
    assert ("warning: " in summary) is attention
    code, findings = check(root, *options)
    text = " ".join(capsys.readouterr().out.split())
    for word in said:
        assert word in summary and word in text, (case, word)
    kinds = [one for one in findings if "negatives" in one or "apart" in one]
    assert bool(kinds) is bool(said)
    assert (code == 1) is attention


def test_a_run_without_negatives_warns(
    weights: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Its seeds cover whole images, as the warning says; with negatives they do not."""
    root = table(tmp_path / "data", ["red"] * 12)
    assert init(root, weights) == 0
    recipe = ["run", str(root / "recipe.yaml"), *SMALL, "--run.folder"]
    capsys.readouterr()
    assert main([*recipe, str(tmp_path / "run")]) == 0
    assert "warning: there are no negatives" in capsys.readouterr().out
    assert "every image shows" in caplog.records[0].getMessage()  # before the first stage
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Warnings" in page and "no negatives" in page
    table(root, ["red"] * 8 + [""] * 4)
    assert main([*recipe, str(tmp_path / "run2"), "--until", "seeds"]) == 0
    assert "warning" not in capsys.readouterr().out
    covered = [
        np.mean([read_index_mask(tmp_path / run / "seeds" / f"{n}.png") > 0 for n in range(8)])
        for run in ("run", "run2")
    ]
    assert covered[1] < covered[0]


def test_no_label_at_all(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = table(tmp_path / "data", ["red", ""] * 3)
    assert init(root, weights) == 0
    (root / "labels.csv").write_text("image,labels\n0.png,\n2.png,\n")
    (root / "classes.txt").write_text("red\n")
    recipe = ["run", str(root / "recipe.yaml"), *SMALL, "--run.folder", str(tmp_path / "run")]
    assert main(recipe) == 2
    assert "'all' has a label" in capsys.readouterr().err
    assert not (tmp_path / "run" / "classifier.safetensors").exists()
