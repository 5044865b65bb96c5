"""Data sets of Hugging Face: what is written, what is left out, what is refused. No network."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value
from PIL import Image

from lpcam.cli.main import main
from lpcam.data import huggingface
from lpcam.data.folder import read_folder
from lpcam.runtime.errors import DataError, LpcamError

ANIMALS = ClassLabel(names=["hen", "cow", "dog"])


def import_huggingface(source: Any, output: Path, **options: Any) -> Path:
    huggingface.import_huggingface(source, output, **options)
    return output


def encoded(colour: int, kind: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (6, 4), (colour, 0, 0)).save(buffer, kind)
    return buffer.getvalue()


def make(labels: list[Any], kind: Any, images: list[Any] | None = None) -> Dataset:
    """With the image of row n of colour n, unless images are given."""
    images = images or [{"bytes": encoded(n), "path": None} for n in range(len(labels))]
    features = Features({"image": datasets.Image(), "label": kind})
    return Dataset.from_dict({"image": images, "label": labels}, features=features)


def record(output: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((output / "import.json").read_text())
    return value


def found(output: Path) -> dict[str, tuple[str, ...]]:
    """Class names by image, as read_folder has them."""
    dataset = read_folder(output)
    names = dataset.classes.names
    return {i: tuple(names[n] for n in item.labels) for i, item in dataset.items.items()}


@pytest.mark.parametrize(
    ("kind", "labels", "classes", "expected"),
    [
        (ANIMALS, [2, 0], "hen\ncow\ndog\n", [("dog",), ("hen",)]),
        (List(ANIMALS), [[2, 0, 2], []], "hen\ncow\ndog\n", [("hen", "dog"), ()]),
        (Value("string"), ["pig big", "ant"], "ant\npig big\n", [("pig big",), ("ant",)]),
        (List(Value("string")), [["b ", "a"], [""]], "a\nb\n", [("a", "b"), ()]),
    ],
)
def test_kinds_of_labels(
    tmp_path: Path, kind: Any, labels: list[Any], classes: str, expected: list[Any]
) -> None:
    output = import_huggingface(make(labels, kind), tmp_path / "out")
    assert (output / "classes.txt").read_text() == classes
    assert list(found(output).values()) == expected


def test_stored_bytes_are_kept(tmp_path: Path) -> None:
    (tmp_path / "disk.webp").write_bytes(encoded(7, "WEBP"))
    images = [
        {"bytes": encoded(1), "path": "../../x.exe"},
        {"bytes": encoded(2, "PNG"), "path": None},
        {"bytes": None, "path": str(tmp_path / "disk.webp")},
        np.full((4, 6), 9, np.uint8),
        {"bytes": encoded(200, "ICO"), "path": "a.ico"},
    ]
    output = import_huggingface(make([0] * 5, ANIMALS, images), tmp_path / "out")
    files = sorted((output / "images").iterdir())
    assert [f.suffix for f in files] == [".jpg", ".png", ".webp", ".png", ".png"]
    assert [f.stem for f in files] == [f"00000{n}" for n in range(5)]
    assert files[0].read_bytes() == encoded(1)
    assert files[2].read_bytes() == encoded(7, "WEBP")
    assert np.array(Image.open(files[3])).tolist() == [[9] * 6] * 4
    assert Image.open(files[4]).format == "PNG"
    assert Image.open(files[4]).getpixel((0, 0)) == (200, 0, 0)


def test_rows_left_out(tmp_path: Path) -> None:
    images = [
        {"bytes": encoded(1), "path": None},
        {"bytes": encoded(2), "path": None},
        None,
        {"bytes": b"no image", "path": "b.jpg"},
        {"bytes": None, "path": "https://nowhere.invalid/b.jpg"},
    ]
    output = import_huggingface(make([1, -1, 1, 1, 1], ANIMALS, images), tmp_path / "out")
    assert found(output) == {"000000": ("cow",)}
    reasons = {entry["row"]: entry["reason"] for entry in record(output)["left_out"]}
    assert reasons[1] == "it has no label in the column 'label'"
    assert reasons[2] == "it has no image"
    assert "damaged or of an unknown format" in reasons[3]
    assert "its file https://nowhere.invalid/b.jpg cannot be read" in reasons[4]
    with pytest.raises(DataError, match="no row"):
        import_huggingface(make([None, -1], ANIMALS), tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_folders_of_save_to_disk(tmp_path: Path) -> None:
    whole = make([0, 1], ANIMALS)
    whole.save_to_disk(tmp_path / "one")
    splits = DatasetDict({"train": whole, "test": whole.select([1])})
    splits.save_to_disk(tmp_path / "two")
    for n, source in enumerate((tmp_path / "one", str(tmp_path / "one"), whole)):
        output = import_huggingface(source, tmp_path / f"out {n}")
        assert found(output) == {"000000": ("hen",), "000001": ("cow",)}
    test = import_huggingface(tmp_path / "two", tmp_path / "test", split="test")
    assert found(test) == {"000000": ("cow",)}
    assert record(test)["source"] == str(tmp_path / "two")
    for source, split, message in (
        (splits, None, "test, train"),
        (tmp_path / "two", "val", "'val'.* test, train"),
        (whole, "val", "'val'"),
    ):
        with pytest.raises(DataError, match=message):
            import_huggingface(source, tmp_path / "x", split=split)
    only = DatasetDict({"train": whole})
    assert len(found(import_huggingface(only, tmp_path / "only"))) == 2


def test_names_on_the_hub_come_without_programs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def load(name: str, **options: Any) -> Dataset:
        asked.append((name, options))
        if name == "gone":
            raise ConnectionError("no such host\nand more")
        return make([0], ANIMALS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    import_huggingface("owner/name", tmp_path / "out", split="train[:10%]")
    assert asked == [("owner/name", {"split": "train[:10%]"})]
    with pytest.raises(DataError, match="'gone': no such host;"):
        import_huggingface("gone", tmp_path / "x")
    for name in ("../name", "a/b/c", "https://a/b", "-x/y"):
        with pytest.raises(DataError, match=name):
            import_huggingface(name, tmp_path / "x")
    assert len(asked) == 2
    with pytest.raises(DataError, match="nope"):
        import_huggingface(tmp_path / "nope", tmp_path / "x")


@pytest.mark.parametrize(
    ("kind", "labels", "message"),
    [
        (Value("int64"), [1], "int64"),
        (ClassLabel(names=["a;b"]), [0], "'a;b'"),
        (ClassLabel(names=["Background", "a"]), [0], "Background"),
        (ClassLabel(names=["a", "a "]), [0], "'a' twice"),
        (ClassLabel(num_classes=255), [0], "255"),
        (Value("string"), [""], "names no class"),
    ],
)
def test_wrong_labels(tmp_path: Path, kind: Any, labels: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        import_huggingface(make(labels, kind), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_wrong_columns_and_sources(tmp_path: Path) -> None:
    dataset = make([0], ANIMALS)
    for source, options, message in (
        (dataset, {"image": "img"}, "'img'.* image, label"),
        (dataset, {"labels": "labels"}, "'labels'.* image, label"),
        (dataset, {"image": "label"}, "'label'.* image"),
        ([1], {}, "list"),
        (dataset.to_iterable_dataset(), {}, "IterableDataset"),
    ):
        with pytest.raises(DataError, match=message):
            import_huggingface(source, tmp_path, **options)
    (tmp_path / "labels.csv").touch()
    with pytest.raises(DataError, match=r"labels\.csv"):
        import_huggingface(dataset, tmp_path)


def test_the_library_is_missing_or_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = make([0], ANIMALS)
    monkeypatch.setattr(datasets, "__version__", "3.6.0")
    with pytest.raises(LpcamError, match=r"3\.6\.0"):
        import_huggingface(dataset, tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(LpcamError, match=r"'lpcam\[huggingface\]'"):
        import_huggingface(dataset, tmp_path)


IMAGE = datasets.Image()
COW_DOG = ClassLabel(names=["cow", "dog"])
BOX = List(Value("float32"))
BOTH = [("cow",), ("cow", "dog"), ()]
PICTURES = [{"bytes": encoded(n), "path": None} for n in range(3)]
OBJECTS = [{"bbox": [[0.0] * 4] * len(n), "category": n} for n in ([0], [0, 1], [])]
READ: dict[str, tuple[dict[str, tuple[Any, list[Any]]], list[str], list[Any]]] = {
    "objects, a dict of lists": (
        {
            "image": (IMAGE, PICTURES),
            "objects": ({"bbox": List(BOX), "category": List(COW_DOG)}, OBJECTS),
        },
        [],
        BOTH,
    ),
    "objects, a list of dicts": (
        {
            "image": (IMAGE, PICTURES),
            "objects": (
                List({"bbox": BOX, "label": Value("string")}),
                [[{"bbox": [], "label": n} for n in of] for of in BOTH],
            ),
        },
        ["--labels", "objects"],
        BOTH,
    ),
    "numbers in objects": (
        {
            "image": (IMAGE, PICTURES),
            "objects": ({"bbox": List(BOX), "category": List(Value("int64"))}, OBJECTS),
        },
        ["--labels", "objects.category", "--names", "cow,dog"],
        BOTH,
    ),
    "lists of 0 and 1": (
        {"image": (IMAGE, PICTURES), "label": (List(Value("int8")), [[1, 0], [1, 1], [0, 0]])},
        ["--names", "cow,dog"],
        BOTH,
    ),
    "lists of bool": (
        {
            "image": (IMAGE, PICTURES[:2]),
            "label": (List(Value("bool")), [[True, False], [False, True]]),
        },
        ["--names", "cow,dog"],
        [("cow",), ("dog",)],
    ),
    "columns of 0 and 1": (
        {
            "image": (IMAGE, PICTURES),
            "cow": (Value("int64"), [1, 1, 0]),
            "dog": (Value("bool"), [False, True, False]),
        },
        ["--labels", "cow,dog"],
        BOTH,
    ),
    "numbers with a file of names": (
        {"image": (IMAGE, PICTURES), "label": (Value("int64"), [1, 0, 1])},
        ["--names", "FILE"],
        [("dog",), ("cow",), ("dog",)],
    ),
    "text with commas": (
        {"image": (IMAGE, PICTURES), "label": (Value("string"), ["cow", "cow,dog", ""])},
        ["--separator", ","],
        BOTH,
    ),
    "bytes that are no Image, other names": (
        {
            "pixel_values": ({"bytes": Value("binary"), "path": Value("string")}, PICTURES),
            "fine": (COW_DOG, [0, 1, 0]),
            "caption": (Value("string"), ["a", "b", "c"]),
        },
        [],
        [("cow",), ("dog",), ("cow",)],
    ),
    "a file in several rows": (
        {
            "image": (IMAGE, [{"bytes": encoded(n), "path": "a.jpg"} for n in (0, 0, 200)]),
            "label": (COW_DOG, [0, 1, 1]),
        },
        [],
        [("cow", "dog"), ("dog",)],
    ),
}
REFUSED: dict[str, tuple[dict[str, tuple[Any, list[Any]]], list[str], str]] = {
    "numbers without names": (
        {"image": (IMAGE, PICTURES), "label": (Value("int64"), [1, 0, 1])},
        [],
        "--names FILE",
    ),
    "a number without a name": (
        {"image": (IMAGE, PICTURES), "label": (Value("int64"), [1, 2, 1])},
        ["--names", "cow,dog"],
        "row 1 has 2",
    ),
    "two numbers, or 0 and 1": (
        {"image": (IMAGE, PICTURES[:2]), "label": (List(Value("int64")), [[0, 1], [1, 0]])},
        ["--names", "cow,dog"],
        "0 and 1 for each class",
    ),
    "several columns of classes": (
        {"image": (IMAGE, PICTURES), "fine": (COW_DOG, [0, 1, 0]), "coarse": (ANIMALS, [0, 1, 0])},
        [],
        "fine (ClassLabel",
    ),
    "several columns of images": (
        {"left": (IMAGE, PICTURES), "right": (IMAGE, PICTURES), "label": (COW_DOG, [0, 1, 0])},
        [],
        "right (Image",
    ),
    "columns of other numbers": (
        {
            "image": (IMAGE, PICTURES),
            "cow": (Value("int64"), [1, 7, 0]),
            "dog": (Value("int64"), [0, 1, 0]),
        },
        ["--labels", "cow,dog"],
        "cow,dog hold other values",
    ),
    "no label among the parts": (
        {"image": (IMAGE, PICTURES), "objects": ({"bbox": List(BOX)}, [{"bbox": []}] * 3)},
        ["--labels", "objects"],
        "bbox",
    ),
    "text with commas": (
        {"image": (IMAGE, PICTURES), "label": (Value("string"), ["cow", "cow,dog", ""])},
        [],
        "--separator",
    ),
}


def save(columns: dict[str, tuple[Any, list[Any]]], folder: Path, options: list[str]) -> list[str]:
    """Arguments of an import of columns that are saved in a folder."""
    features = Features({name: kind for name, (kind, _) in columns.items()})
    content = {name: values for name, (_, values) in columns.items()}
    Dataset.from_dict(content, features=features).save_to_disk(folder / "saved")
    (folder / "names.txt").write_text("cow\ndog\n")
    options = [str(folder / "names.txt") if text == "FILE" else text for text in options]
    return ["import", "huggingface", str(folder / "saved"), str(folder / "out"), *options]


@pytest.mark.parametrize("name", READ)
def test_columns_of_labels(name: str, tmp_path: Path) -> None:
    columns, options, expected = READ[name]
    assert main(save(columns, tmp_path, options)) == 0
    assert list(found(tmp_path / "out").values()) == expected
    if len(expected) == len(BOTH):
        assert main(["init", str(tmp_path / "out")]) == 0


@pytest.mark.parametrize("name", REFUSED)
def test_doubtful_columns(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    columns, options, phrase = REFUSED[name]
    assert main(save(columns, tmp_path, options)) == 2
    assert phrase in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_folders_as_the_hub_stores_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "farm"
    (folder / "train").mkdir(parents=True)
    for n, name in enumerate(("a.jpg", "b.jpg")):
        (folder / "train" / name).write_bytes(encoded(n))
    table = '{"file_name": "a.jpg", "kind": "cow"}\n{"file_name": "b.jpg", "kind": "dog"}\n'
    (folder / "train" / "metadata.jsonl").write_text(table)
    saved = make([0, 1], COW_DOG)
    saved.to_parquet(tmp_path / "farm.parquet")
    with pytest.raises(DataError, match=r"\.parquet or \.arrow"):
        import_huggingface(folder / "train" / "metadata.jsonl", tmp_path / "x")
    for source, options in ((folder, ["--labels", "kind"]), (tmp_path / "farm.parquet", [])):
        output = tmp_path / f"out {source.name}"
        assert main(["import", "huggingface", str(source), str(output), *options]) == 0
        assert list(found(output).values()) == [("cow",), ("dog",)]
