"""A user's folder: every way to name an image, what is skipped, and what the errors say."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest

from lpcam.data.dataset import ClassTable
from lpcam.data.folder import read_folder
from lpcam.runtime.errors import DataError


def make(root: Path, labels: str | bytes, *files: str, **texts: str) -> Path:
    """A folder with ``labels.csv``, empty files, and texts by file name with ``_`` for the dot."""
    root.mkdir(exist_ok=True)
    data = labels if isinstance(labels, bytes) else f"image,labels\n{labels}".encode()
    (root / "labels.csv").write_bytes(data)
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    for name, text in texts.items():
        (root / name.replace("_", ".")).write_text(text, "utf-8")
    return root


def test_images_folder(tmp_path: Path) -> None:
    root = make(
        tmp_path / "farm",
        "a.jpg,dog;cow\nimages/barn/b 2.PNG,cow\n牛,\nbarn/c.d,dog;\n",
        "images/a.jpg",
        "images/barn/b 2.PNG",
        "images/牛.webp",
        "images/barn/c.d.tiff",
        "images/.hidden.jpg",
        "images/readme.txt",
        "masks/a.png",
        "masks/barn/b 2.png",
    )
    dataset = read_folder(root)
    assert dataset.name == "farm"
    assert dataset.classes == ClassTable(("cow", "dog"), (1, 2))
    assert {i: item.labels for i, item in dataset.items.items()} == {
        "a": (0, 1),
        "barn/b 2": (0,),
        "barn/c.d": (1,),
        "牛": (),
    }
    assert dataset.lists == {"all": tuple(dataset.items)}
    assert dataset.items["barn/b 2"].image == root / "images" / "barn" / "b 2.PNG"
    assert dataset.items["barn/b 2"].mask == root / "masks" / "barn" / "b 2.png"
    assert dataset.items["牛"].mask is None
    assert dataset.label_source == "labels.csv"
    assert dataset.skipped == ()
    assert [notice.partition(": ")[2] for notice in dataset.notices] == [
        "1 (.txt 1)",
        "1 (.hidden.jpg)",
    ]


@pytest.mark.parametrize(("on_disk", "in_table"), [("NFD", "NFC"), ("NFC", "NFD")])
def test_unicode_forms_match(tmp_path: Path, on_disk: str, in_table: str) -> None:
    disk = unicodedata.normalize(on_disk, "kälbchen é")  # type: ignore[arg-type]
    table = unicodedata.normalize(in_table, "kälbchen é")  # type: ignore[arg-type]
    root = make(
        tmp_path,
        f"{table}.jpg,{table}\n",
        f"images/{disk}.jpg",
        f"masks/{disk}.png",
        classes_txt=f"{disk}\n",
    )
    dataset = read_folder(root, classes=[table])
    (item,) = dataset.items.values()
    assert item.id == unicodedata.normalize("NFC", disk)
    assert item.image == root / "images" / f"{disk}.jpg"
    assert item.mask is not None
    assert item.labels == (0,)
    assert dataset.skipped == ()


def test_classes_txt_gives_mask_ids_and_a_subset_keeps_them(tmp_path: Path) -> None:
    root = make(
        tmp_path, "a,cow;dog\nb,hen;dog\n", "a.jpg", "b.jpg", classes_txt="\ufeffhen\ndog\ncow\n"
    )
    assert read_folder(root).classes == ClassTable(("hen", "dog", "cow"), (1, 2, 3))
    dataset = read_folder(root, classes=["cow", "hen"])
    assert dataset.classes == ClassTable(("cow", "hen"), (3, 1))
    assert [item.labels for item in dataset.items.values()] == [(0,), (1,)]
    (notice,) = dataset.notices
    assert notice.endswith("dog 2")
    with pytest.raises(DataError, match=r"'Hens' .*'hen'"):
        read_folder(root, classes=["Hens"])


def test_left_out_with_reasons(tmp_path: Path) -> None:
    root = make(tmp_path, "a,cow\ngone.jpg,dog\n", "a.jpg", "extra.jpg", "bad .jpg")
    dataset = read_folder(root)
    assert list(dataset.items) == ["a"]
    reasons = {skip.id: skip.reason for skip in dataset.skipped}
    assert set(reasons) == {"gone.jpg", "extra", "bad "}
    assert "labels.csv line 3 has no image below" in reasons["gone.jpg"]
    assert "it has no line in labels.csv" in reasons["extra"]
    assert "blanks at its ends" in reasons["bad "]


def test_repeated_rows_are_united(tmp_path: Path) -> None:
    dataset = read_folder(make(tmp_path, "a,cow\nb,cow\na.jpg,dog\n", "a.jpg", "b.jpg"))
    assert dataset.items["a"].labels == (0, 1)
    (notice,) = dataset.notices
    assert "a (lines 2, 4)" in notice


def test_lists(tmp_path: Path) -> None:
    root = make(tmp_path, "a,cow\nb,cow\nc,cow\n", "a.jpg", "b.jpg", "c.jpg", "unlabelled.jpg")
    (root / "lists").mkdir()
    (root / "lists" / "train.txt").write_text("c.jpg\na\n\nunlabelled\ngone\n")
    dataset = read_folder(root)
    assert dataset.lists == {"train": ("c", "a"), "all": ("a", "b", "c")}
    reasons = {skip.id: skip.reason for skip in dataset.skipped}
    assert set(reasons) == {"gone", "unlabelled"}
    assert "lists/train.txt line 5" in reasons["gone"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("lists/train.txt", "a\na.jpg\n", r"train\.txt .*'a' twice \(lines 1 and 2\)"),
        ("lists/all.txt", "a\n", "'all'"),
        *(
            ("parts.json", text, r"parts\.json")
            for text in ("{", "[]", "{}", '{"a": 0}', '{"a": 255}', '{"a": true}')
        ),
        ("parts.json", '{"a": 1, "b": 1}', r"parts\.json"),
    ],
)
def test_wrong_lists_and_parts(tmp_path: Path, name: str, text: str, message: str) -> None:
    root = make(tmp_path, "a,cow\n", "a.jpg", "parts/a.png", name)
    (root / name).write_text(text)
    with pytest.raises(DataError, match=message):
        read_folder(root)


def test_parts(tmp_path: Path) -> None:
    root = make(tmp_path, "a,cow\n", "a.jpg", "parts/a.png", parts_json='{"head": 1, "torso": 2}')
    dataset = read_folder(root)
    assert dataset.part_names == {"head": 1, "torso": 2}
    assert dataset.items["a"].parts == root / "parts" / "a.png"
    (root / "parts.json").unlink()
    dataset = read_folder(root)
    assert dataset.part_names == {} and dataset.items["a"].parts is None
    assert "parts.json" in dataset.notices[0]


def test_missing_things(tmp_path: Path) -> None:
    for root, message in (
        (tmp_path / "none", r"none; .*data\.root"),
        (make_files(tmp_path / "empty"), r"labels\.csv"),
        (make(tmp_path / "a", "a,cow\n", "masks/a.png"), "no images"),
        (make_files(tmp_path / "b", "images/1.jpg"), r"labels\.csv"),
    ):
        with pytest.raises(DataError, match=message):
            read_folder(root)


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ("cow\nhorse\n", "line 3: .*'Horses' .*'horse'"),
        ("cow\n", "line 3: .*'Horses'; .* cow"),
        ("\n".join(["cow", "Horses", *(f"c{n}" for n in range(253))]), r"classes\.txt: .*255"),
    ],
)
def test_wrong_classes_txt(tmp_path: Path, classes: str, message: str) -> None:
    root = make(tmp_path, "a,cow\nb,Horses\n", "a.jpg", "b.jpg", classes_txt=classes)
    with pytest.raises(DataError, match=message):
        read_folder(root)


def test_a_file_name_that_is_no_unicode_is_spelt_out(tmp_path: Path) -> None:
    root = make(tmp_path, "a,cow\n", "a.jpg")
    try:
        (root / b"\xff.jpg".decode("utf-8", "surrogateescape")).touch()
    except OSError:
        pytest.skip("this file system refuses names that are no Unicode")
    (skip,) = read_folder(root).skipped
    assert skip.id.encode() == b"\\udcff"


def make_files(root: Path, *files: str, **texts: str) -> Path:
    """The same without labels.csv."""
    make(root, "", *files, **texts)
    (root / "labels.csv").unlink()
    return root


@pytest.mark.parametrize("images", ["images/", ""])
def test_folders_are_classes(tmp_path: Path, images: str) -> None:
    files = ("cow/1.jpg", "cow/barn/2.jpg", "dog /1.jpg", "stray.jpg")
    root = make_files(tmp_path, *(images + name for name in files), "masks/cow/1.png")
    dataset = read_folder(root, labels="folders")
    assert dataset.classes == ClassTable(("cow", "dog"), (1, 2))
    found = {i: item.labels for i, item in dataset.items.items()}
    assert found == {"cow/1": (0,), "cow/barn/2": (0,), "dog /1": (1,)}
    assert dataset.items["cow/1"].mask == root / "masks" / "cow" / "1.png"
    assert dataset.label_source == "folders of the images"
    (skip,) = dataset.skipped
    assert skip.id == "stray" and "in no folder of a class" in skip.reason
    assert dataset.notices == ()


@pytest.mark.parametrize("images", ["images/", ""])
def test_folders_of_a_train_and_a_val_set_are_no_classes(tmp_path: Path, images: str) -> None:
    names = ("train/cow/1.jpg", "train/hen/2.jpg", "Val/cow/3.jpg")
    root = make_files(tmp_path, *(images + name for name in names))
    for labels in (None, "folders"):
        with pytest.raises(DataError, match=r"Val .*, train .*train$"):
            read_folder(root, labels=labels)  # type: ignore[arg-type]
    assert read_folder(root / images / "train", labels="folders").classes.names == ("cow", "hen")
    # a class may be called so
    (root / images / "bus").mkdir()
    (root / images / "bus" / "4.jpg").touch()
    with pytest.raises(DataError, match=r"Val, train .*classes\.txt"):
        read_folder(root, labels="folders")
    (root / "classes.txt").write_text("train\nbus\nVal\n")
    assert read_folder(root, labels="folders").classes.names == ("train", "bus", "Val")


def test_links_to_folders_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    root = make_files(tmp_path / "set", "cow/1.jpg", "masks/cow/1.png")
    (tmp_path / "hens" / "barn").mkdir(parents=True)
    (tmp_path / "hens" / "barn" / "2.jpg").touch()
    for link, target in (
        ("hen", tmp_path / "hens"),
        ("up", tmp_path),
        ("here", root),
        ("cow/again", root / "cow"),
        ("truth", root / "masks"),
    ):
        (root / link).symlink_to(target, target_is_directory=True)
    (tmp_path / "hens" / "back").symlink_to(root / "cow", target_is_directory=True)
    (root / "cow" / "over").symlink_to(tmp_path / "hens", target_is_directory=True)
    dataset = read_folder(root, labels="folders")
    assert dataset.classes.names == ("cow", "hen")
    assert set(dataset.items) == {
        *("cow/1", "hen/barn/2"),
        # in either direction once
        *("cow/over/barn/2", "hen/back/1"),
    }
    assert dataset.items["hen/barn/2"].image == root / "hen" / "barn" / "2.jpg"


def test_jsonl_serves_where_there_is_no_csv(tmp_path: Path) -> None:
    text = '{"image": "1.jpg", "labels": ["cow"]}\n{"image": "2.jpg", "labels": ["hen"]}\n'
    root = make_files(tmp_path, "images/1.jpg", "images/3.jpg", labels_jsonl=text)
    dataset = read_folder(root)
    assert dataset.items["1"].labels == (0,) and dataset.classes.names == ("cow", "hen")
    assert dataset.label_source == "labels.jsonl"
    reasons = {skip.id: skip.reason for skip in dataset.skipped}
    assert "labels.jsonl line 2 has no image" in reasons["2.jpg"]
    assert reasons["3"] == "it has no line in labels.jsonl; add one"
    (root / "labels.csv").write_text("image,labels\n1.jpg,hen\n")
    assert read_folder(root).label_source == "labels.csv"


def test_columns_give_the_classes_and_classes_txt_their_numbers(tmp_path: Path) -> None:
    root = make_files(tmp_path / "farm", "1.jpg", "2.jpg")
    path = tmp_path / "hot.csv"
    path.write_text("image,hen,cow,ant\n1,1,1,0\n2,0,1,0\n")
    dataset = read_folder(root, labels=path)
    assert dataset.classes == ClassTable(("hen", "cow", "ant"), (1, 2, 3))
    assert [item.labels for item in dataset.items.values()] == [(0, 1), (1,)]
    assert dataset.label_source == "hot.csv"
    (root / "classes.txt").write_text("cow\nhen\nant\n")
    assert read_folder(root, labels=path).items["1"].labels == (0, 1)
    assert read_folder(root, labels=path).classes.names == ("cow", "hen", "ant")
    (root / "classes.txt").write_text("cow\nhen\n")
    with pytest.raises(DataError, match=r"hot\.csv: .*'ant'"):
        read_folder(root, labels=path)


def test_masks_of_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it lies among the images, whatever way it is named."""
    files = ("1.jpg", "masks/1.png", "truth/1.png")
    root = make(tmp_path / "farm", "1,cow\n", *files)
    monkeypatch.chdir(root)
    for masks in (root / "truth", Path("truth")):
        dataset = read_folder(root, masks=masks)
        assert dataset.items["1"].mask == masks / "1.png"
        assert dataset.skipped == ()
    with pytest.raises(DataError, match="gone"):
        read_folder(root, masks=root / "gone")
    (root / "empty").mkdir()
    for wrong in ("empty", "lists"):
        make(tmp_path / "farm", "1,cow\n", "lists/strange.png")
        with pytest.raises(DataError, match=rf"{wrong} has no mask .*1\.png"):
            read_folder(root, masks=root / wrong)


def test_an_image_of_an_extension_that_is_not_read_is_told(tmp_path: Path) -> None:
    rows = "a,cow\nb.HEIC,cow\nimages/c,cow\nd.heic,cow\ngone.heic,cow\n"
    files = ("images/a.jpg", "images/b.HEIC", "images/c.heic", "images/x/d.heic")
    dataset = read_folder(make(tmp_path, rows, *files))
    reasons = {skip.id: skip.reason for skip in dataset.skipped}
    assert set(reasons) == {"b.HEIC", "c.heic", "x/d.heic", "d.heic", "gone.heic"}
    assert "labels.csv line 3: files that end in .heic" in reasons["b.HEIC"]
    assert "line 4: files that end in .heic" in reasons["c.heic"]
    assert "line" not in reasons["x/d.heic"] and "JPEG" in reasons["x/d.heic"]
    assert "labels.csv line 5 has no image below" in reasons["d.heic"]
    assert "labels.csv line 6 has no image below" in reasons["gone.heic"]
