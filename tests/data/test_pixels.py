"""What `init`, `data check` and `run` measure of pixels before they use them, and the way on."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from numpy.typing import NDArray
from PIL import Image
from tiny import recipe_values, write_weights

from lpcam.cli.main import main
from lpcam.data import pixels
from lpcam.data.images import Reading, read_image
from lpcam.data.open_dataset import open_dataset
from lpcam.runtime.errors import ImageError

CLASSES = ("cow", "dog")
COLOURS = {0: (0, 0, 0), 1: (128, 0, 0), 2: (0, 128, 0), 255: (224, 224, 192)}
Change = Callable[[NDArray[np.uint8], NDArray[np.uint8], int], None]
Outcome = tuple[list[str], str | None]


def scene(number: int, side: int = 0) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Grey values of all levels and a mask with a box of cow (even numbers) or dog."""
    rng = np.random.default_rng(number)
    size = (24, 32) if side == 0 else (side, side)
    grey = rng.integers(0, 256, size, dtype=np.uint8)
    mask = np.zeros(size, np.uint8)
    mask[4:12, 3:13] = 1 + number % 2
    return grey, mask


class Folder:
    """Six images with labels; a case writes the files as it wants."""

    def __init__(self, root: Path, count: int = 6) -> None:
        self.root, self.count = root, count
        for name in ("images", "masks"):
            (root / name).mkdir(parents=True)
        rows = [f"{number}.x,{CLASSES[number % 2]}" for number in range(count)]
        (root / "labels.csv").write_text("\n".join(["image,labels", *rows]).replace(".x", ""))

    def image(self, number: int, values: NDArray[Any], suffix: str = ".png", **more: Any) -> None:
        Image.fromarray(values).save(self.root / "images" / f"{number}{suffix}", **more)

    def mask(self, number: int, values: NDArray[np.uint8] | Image.Image) -> None:
        values = values if isinstance(values, Image.Image) else Image.fromarray(values)
        values.save(self.root / "masks" / f"{number}.png")


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def deep(scale: Callable[[NDArray[np.float64], int], NDArray[Any]], suffix: str = ".png") -> Any:
    """Images of more than 8 bits: ``scale`` makes them of values from 0 to 1 and a number."""

    def build(folder: Folder) -> None:
        for number in range(folder.count):
            grey, mask = scene(number)
            folder.image(number, scale(grey / 255, number), suffix)
            folder.mask(number, mask)

    return build


def colour_16(folder: Folder) -> None:
    """10 bits in colour PNGs of 16 bits, which Pillow would read as 4 levels."""
    cv2 = pytest.importorskip("cv2")
    for number in range(folder.count):
        grey, mask = scene(number)
        values = np.repeat(grey[:, :, None].astype(np.uint16) * 4, 3, axis=2)
        cv2.imwrite(str(folder.root / "images" / f"{number}.png"), values)
        folder.mask(number, mask)


def flat(change: Callable[[NDArray[np.uint8]], NDArray[np.uint8]]) -> Any:
    """Images of 8 bits."""

    def build(folder: Folder) -> None:
        for number in range(folder.count):
            grey, mask = scene(number)
            folder.image(number, change(grey))
            folder.mask(number, mask)

    return build


def flagged(orientation: int, side: int = 0, suffix: str = ".png", fits: str = "stored") -> Any:
    """Images with an EXIF orientation; masks of the stored or of the upright image."""

    def build(folder: Folder) -> None:
        for number in range(folder.count):
            grey, mask = scene(number, side)
            folder.image(number, grey, suffix, exif=turned(orientation))
            folder.mask(number, mask if fits == "stored" else np.rot90(mask, -1))

    return build


def masks(change: Callable[[NDArray[np.uint8], int], Any]) -> Any:
    """Ordinary images, with masks that ``change`` makes of the right ones and a number."""

    def build(folder: Folder) -> None:
        for number in range(folder.count):
            grey, mask = scene(number)
            folder.image(number, grey)
            folder.mask(number, change(mask, number))

    return build


def indexed(mask: NDArray[np.uint8], table: dict[int, tuple[int, int, int]]) -> Image.Image:
    image = Image.fromarray(mask)
    image.putpalette([c for value in range(256) for c in table.get(value, (value, 9, value))])
    return image


def adaptive(mask: NDArray[np.uint8], number: int) -> Image.Image:
    """As Image.quantize or convert('P', palette=ADAPTIVE) of a coloured mask: its own indices."""
    rgb = np.array([COLOURS.get(value, (0, 0, 0)) for value in range(256)], np.uint8)[mask]
    return Image.fromarray(rgb).convert("P", palette=Image.Palette.ADAPTIVE, colors=4)


def coloured(mask: NDArray[np.uint8], number: int) -> NDArray[np.uint8]:
    return np.array([COLOURS.get(value, (0, 0, 0)) for value in range(256)], np.uint8)[mask]


def with_file(build: Any, name: str, text: str) -> Any:
    def both(folder: Folder) -> None:
        build(folder)
        (folder.root / name).write_text(text)

    return both


def enlarged(mask: NDArray[np.uint8], number: int) -> Image.Image:
    """A mask of larger values that was resized by a smooth filter."""
    small = Image.fromarray(mask * np.uint8(20)).resize((16, 12))
    return small.resize((32, 24), Image.Resampling.BICUBIC)


def coco(orientation: int) -> Any:
    """Annotations of the size of the stored image."""

    def build(folder: Folder) -> None:
        pytest.importorskip("pycocotools")
        (folder.root / "labels.csv").unlink()
        (folder.root / "masks").rmdir()
        images, annotations = [], []
        for number in range(folder.count):
            grey, _ = scene(number)
            folder.image(number, grey, ".jpg", exif=turned(orientation))
            name = f"{number}.jpg"
            images.append({"id": number + 1, "file_name": name, "height": 24, "width": 32})
            one = {"id": number + 1, "image_id": number + 1, "category_id": 1 + number % 2}
            outline = [[3, 4, 13, 4, 13, 12, 3, 12]]
            box = {"bbox": [3, 4, 10, 8], "area": 80, "iscrowd": 0}
            annotations.append({**one, **box, "segmentation": outline})
        kinds = [{"id": n + 1, "name": name} for n, name in enumerate(CLASSES)]
        whole = {"images": images, "annotations": annotations, "categories": kinds}
        (folder.root / "instances.json").write_text(json.dumps(whole))

    return build


LABELMAP = "# label:color_rgb:parts:actions\nbackground:0,0,0::\ncow:128,0,0::\ndog:0,128,0::\n"
JSON = json.dumps({name: COLOURS[n] for n, name in enumerate(("background", *CLASSES))})
CSV = "name,r,g,b\ncow,128,0,0\ndog,0,128,0\nvoid,0,0,0\n"
U16, I32, F32 = np.uint16, np.int32, np.float32
OTHER = {0: (9, 9, 9), 1: (1, 2, 3), 2: (4, 5, 6)}

# what is built; the refusal's phrase, or None; options that answer it; keys of the recipe
CASES: dict[str, tuple[Any, str | None, list[str], dict[str, Any]]] = {
    "12 of 16 bits": (deep(lambda v, n: (v * 4095).astype(U16)), None, [], {"range": [0, 4095]}),
    "all of 16 bits": (deep(lambda v, n: (v * 65535).astype(U16)), None, [], {"range": [0, 65535]}),
    "CT": (deep(lambda v, n: (v * 4000 - 1024).astype(I32), ".tif"), None, [], {"range": ...}),
    "float to 1": (deep(lambda v, n: v.astype(F32), ".tif"), None, [], {"range": [0, 1]}),
    "float below 0": (deep(lambda v, n: (v - 0.5).astype(F32), ".tif"), None, [], {"range": ...}),
    "colours of 16 bits": (colour_16, None, [], {"range": [0, 1023]}),
    "two ranges": (
        deep(lambda v, n: (v * (300 if n % 2 else 65535)).astype(U16)),
        "fewer than 32 grey levels",
        ["--anyway"],
        {"anyway": True},
    ),
    "nodata": (
        deep(lambda v, n: np.where(v < 0.02, -9999, v).astype(F32), ".tif"),
        "fewer than 32 grey levels",
        ["--range", "0,1"],
        {"range": [0, 1]},
    ),
    "squeezed when saved": (flat(lambda v: v // 16), "no value above 31", ["--anyway"], {}),
    "transparent": (
        flat(lambda v: np.dstack([v, v, v, 0 * v])),
        "one grey value",
        ["--anyway"],
        {},
    ),
    "empty planes": (deep(lambda v, n: (0 * v + n).astype(U16)), "one grey value", [], {}),
    "two tones": (flat(lambda v: (v > 128).astype(np.uint8) * np.uint8(255)), None, [], {}),
    "upside down": (flagged(3), "--orientation", ["--orientation", "stored"], {}),
    "mirrored TIFF": (
        flagged(2, suffix=".tif"),
        "--orientation",
        ["--orientation", "upright"],
        {"orientation": "upright"},
    ),
    "quarter turn of squares": (
        flagged(6, side=24, suffix=".jpg"),
        "--orientation",
        ["--orientation", "stored"],
        {"orientation": "stored"},
    ),
    "masks of the stored image": (flagged(8), "--orientation", ["--orientation", "stored"], {}),
    "stored TIFF": (flagged(6, 0, ".tif"), "--orientation", ["--orientation", "stored"], {}),
    "masks of the upright image": (flagged(6, fits="upright"), None, [], {}),
    "COCO of flipped images": (coco(4), "--orientation", ["--orientation", "stored"], {}),
    "COCO of turned images": (coco(6), "--orientation", ["--orientation", "stored"], {}),
    "adaptive palettes": (
        with_file(masks(adaptive), "colours.json", JSON),
        "--palette",
        ["--palette", "colours.json"],
        {"palette": "colours.json"},
    ),
    "colours and labelmap.txt": (
        with_file(masks(coloured), "labelmap.txt", LABELMAP),
        r"--palette \S*labelmap.txt",
        ["--palette", "labelmap.txt"],
        {"palette": "labelmap.txt"},
    ),
    "colours and class_dict.csv": (
        with_file(masks(coloured), "class_dict.csv", CSV),
        r"--palette \S*class_dict.csv",
        ["--palette", "class_dict.csv"],
        {"palette": "class_dict.csv"},
    ),
    "palettes of two tools": (
        masks(lambda m, n: indexed(m, COLOURS if n % 3 else OTHER)),
        None,
        [],
        {},
    ),
    "interpolated": (masks(enlarged), "resized with interpolation", ["--anyway"], {}),
    "one too high": (masks(lambda m, n: m + (m > 0)), r"100 % if all values are \+1 off", [], {}),
    "counted from 0": (
        masks(lambda m, n: np.where(m, m - 1, 255).astype(np.uint8)),
        "100 % if all values are -1 off",
        ["--anyway"],
        {},
    ),
    "swapped": (masks(lambda m, n: (3 - m) * (m > 0)), "1 is dog, 2 is cow|2 is cow", [], {}),
    "of another folder": (masks(lambda m, n: scene(n // 3)[1] * (n % 3)), "disagree", [], {}),
    "0 and 255": (masks(lambda m, n: (m > 0) * np.uint8(255)), "0 and 255 alone", [], {}),
    "some void objects": (
        masks(lambda m, n: m if n > 1 else np.uint8(255) * (m > 0)),
        None,
        [],
        {},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_pixels_are_measured_before_use(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    build, phrase, way_on, written = CASES[name]
    monkeypatch.chdir(tmp_path)
    build(Folder(tmp_path / "set"))
    way_on = [f"set/{word}" if "." in word else word for word in way_on]
    check = main(["data", "check", "set", "--no-estimate"])
    shown = " ".join(capsys.readouterr().out.split())
    if phrase is None:
        assert "A run would stop" not in shown
    else:
        assert check == 1 and re.search(phrase, shown)
        assert main(["init", "set"]) == 2
        assert re.search(phrase, capsys.readouterr().err)
        assert not (tmp_path / "set" / "recipe.yaml").exists()
        if not way_on:
            return
    assert main(["init", "set", *way_on]) == 0
    data = yaml.safe_load((tmp_path / "set" / "recipe.yaml").read_text())["data"]
    for key, value in written.items():
        assert data[key] == value or (value is ... and data[key])


@pytest.mark.parametrize(
    "name", [n for n, (_, _, way, _) in CASES.items() if "--anyway" not in way]
)
def test_what_is_read_is_what_was_drawn(name: str, tmp_path: Path) -> None:
    """The values of images and masks, as a run reads them after the way on."""
    build, phrase, way_on, _ = CASES[name]
    if (phrase and not way_on) or name.startswith(("two tones", "COCO", "some void")):
        return
    build(Folder(tmp_path))
    given: dict[str, Any] = {}
    if way_on:
        key, text = way_on[0].removeprefix("--"), way_on[1]
        given[key] = {"range": (0.0, 1.0), "palette": tmp_path / text}.get(key, text)
    dataset, findings = pixels.look_at_pixels(open_dataset(tmp_path, **given).dataset)
    assert not any(finding.ruins for finding in findings)
    for number, item in enumerate(dataset.items.values()):
        side = 24 if "squares" in name else 0
        grey, mask = scene(number, side)
        if name == "mirrored TIFF":
            grey = grey[:, ::-1]
        if name == "masks of the upright image":
            grey, mask = np.rot90(grey, -1), np.rot90(mask, -1)
        difference = np.abs(item.read()[:, :, 0].astype(int) - grey)
        assert np.median(difference) <= (20 if "squares" in name else 3), name
        expected = np.where(mask == 0, 255, mask) if "csv" in name else mask
        assert np.array_equal(item.read_mask(size=item.size()), expected)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cow:128,0,0::\ndog:0,128,0::\n", r"0\.png .* 0, 0, 0"),
        ("background:0,0,0::\ncows:128,0,0::\ndog:0,128,0::\n", "'cow' .*'cows'"),
        ("background:0,0,0::\ncow:0,0,0::\ndog:0,128,0::\n", "several"),
        ("background:0,0,0::\ncow:300,0,0::\ndog:0,128,0::\n", "labelmap.txt"),
    ],
)
def test_palettes_that_do_not_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    with_file(masks(coloured), "labelmap.txt", text)(Folder(tmp_path))
    assert main(["init", str(tmp_path), "--palette", str(tmp_path / "labelmap.txt")]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_without_a_range_squeezed_values_are_refused(tmp_path: Path) -> None:
    values = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    Image.fromarray(values).save(tmp_path / "a.png")
    with pytest.raises(ImageError, match="17 grey levels"):
        read_image(tmp_path / "a.png")
    read = read_image(tmp_path / "a.png", Reading(range=(0, 4095)))
    assert np.array_equal(read[:, :, 1], np.rint(values * (255 / 4095)))


def test_a_run_measures_once_and_stops_before_anything_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    masks(lambda m, n: (3 - m) * (m > 0))(Folder(tmp_path / "set"))
    values = recipe_values(
        tmp_path / "set", tmp_path / "run", write_weights(tmp_path / "w.safetensors")
    )
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    measured: list[int] = []
    whole = pixels.measure
    monkeypatch.setattr(pixels, "measure", lambda *a: measured.append(1) or whole(*a))
    monkeypatch.setattr("lpcam.pipeline.context.check_images", None)
    run = ["run", str(tmp_path / "recipe.yaml")]
    for _ in range(2):
        assert main(run) == 2
        assert "labels and masks disagree" in capsys.readouterr().err
    assert len(measured) == 1
    monkeypatch.undo()
    assert main([*run, "--anyway"]) == 0
    notices = json.loads((tmp_path / "run" / "index.json").read_text())["notices"]
    assert any("labels and masks disagree" in notice for notice in notices)
