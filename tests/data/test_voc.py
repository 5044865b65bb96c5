"""The VOC layout: lists in all dialects, labels from the annotations, what is left out and why."""

from __future__ import annotations

from pathlib import Path

import pytest

from lpcam.data.voc import CLASSES, read_voc
from lpcam.runtime.errors import DataError


def annotation(*names: str) -> str:
    """Difficult objects with a part, whose name is a class's so that it would show as a label."""
    objects = "".join(
        f"<object><name>{name}</name><difficult>1</difficult>"
        "<part><name>bird</name></part></object>"
        for name in names
    )
    return f"<annotation><filename>x.jpg</filename>{objects}</annotation>"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "VOCdevkit" / "VOC2012"
    for folder in ("JPEGImages", "Annotations", "SegmentationClass", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    for image_id, names in (
        ("2007_000001", ("dog", "dog", "person")),
        ("2007_000002", ("cow", "head")),
        ("2008_000003", ("aeroplane",)),
    ):
        (root / "JPEGImages" / f"{image_id}.jpg").touch()
        (root / "Annotations" / f"{image_id}.xml").write_text(annotation(*names))
    (root / "SegmentationClass" / "2007_000001.png").touch()
    write_list(root, "train", "2007_000001\n2007_000002\n2008_000003\n")
    return root


def write_list(root: Path, name: str, text: str) -> None:
    (root / "ImageSets" / "Segmentation" / f"{name}.txt").write_text(text)


@pytest.mark.parametrize("up", [0, 1, 2])
def test_root_may_be_the_folder_or_one_above(root: Path, up: int) -> None:
    dataset = read_voc([root, *root.parents][up], lists=["train"])
    assert dataset.lists == {"train": ("2007_000001", "2007_000002", "2008_000003")}
    assert (dataset.classes.names, dataset.classes.mask_ids) == (CLASSES, tuple(range(1, 21)))
    assert dataset.label_source == "Annotations (XML)"
    assert dataset.skipped == ()
    first = dataset.items["2007_000001"]
    assert first.image == root / "JPEGImages" / "2007_000001.jpg"
    assert first.mask == root / "SegmentationClass" / "2007_000001.png"
    assert [CLASSES[n] for n in first.labels] == ["dog", "person"]
    assert [CLASSES[n] for n in dataset.items["2007_000002"].labels] == ["cow"]
    assert dataset.items["2007_000002"].mask is None


@pytest.mark.parametrize(
    "text",
    [
        "2007000001\r\n\r\n2008000003\r\n",
        "/JPEGImages/2007_000001.jpg /SegmentationClassAug/2007_000001.png\n"
        "/JPEGImages/2008_000003.jpg /SegmentationClassAug/2008_000003.png\n",
        "\ufeff2007_000001\n 2008_000003 ",
        "/JPEGImages/2007_000001.jpg /JPEGImages/2008_000003.jpg 3\n"
        "/JPEGImages/2008_000003.jpg /JPEGImages/2007_000001.jpg 3\n",
    ],
)
def test_dialects_of_lists(root: Path, text: str) -> None:
    write_list(root, "some", text)
    dataset = read_voc(root, lists=["some", "train"])
    assert dataset.lists["some"] == ("2007_000001", "2008_000003")
    assert len(dataset.items) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("2007_000001\n2007_000001\n", "'2007_000001' twice"),
        ("2007_000001\n../../secret\n", "line 2: .*'../../secret'"),
        ("\n\n", "is empty"),
    ],
)
def test_wrong_lists(root: Path, text: str, message: str) -> None:
    write_list(root, "some", text)
    with pytest.raises(DataError, match=message):
        read_voc(root, lists=["some"])


def test_an_id_with_blanks_is_one_whose_image_is_there(root: Path) -> None:
    for name in ("cow 7", "barn/cow  8", "my.jpg copy"):
        path = root / "JPEGImages" / f"{name}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.touch()
        annotated = root / "Annotations" / f"{name}.xml"
        annotated.parent.mkdir(exist_ok=True)
        annotated.write_text(annotation("cow"))
    write_list(root, "some", " cow 7\r\nbarn/cow  8\nmy.jpg copy\n2007_000001\n")
    dataset = read_voc(root, lists=["some"])
    assert dataset.lists["some"] == ("cow 7", "barn/cow  8", "my.jpg copy", "2007_000001")
    assert dataset.items["cow 7"].image == root / "JPEGImages/cow 7.jpg"
    for line, message in (
        ("cow 9", "'cow 9'.*JPEGImages/cow 9"),
        ("a " * 300, "line 1"),
        ("../JPEGImages/cow 7", "'../JPEGImages/cow 7'"),
    ):
        write_list(root, "some", line)
        with pytest.raises(DataError, match=message):
            read_voc(root, lists=["some"])


BILLION_LAUGHS = '<!DOCTYPE a [<!ENTITY b "x"><!ENTITY c "&b;&b;">]><annotation>&c;</annotation>'


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "there is no annotation"),
        ("<annotation><object>", "cannot be read"),
        (BILLION_LAUGHS, "has a DOCTYPE or ENTITY"),
        (BILLION_LAUGHS.encode("utf-16"), "cannot be read"),
    ],
)
def test_wrong_annotation_is_skipped(root: Path, text: str | bytes | None, reason: str) -> None:
    path = root / "Annotations" / "2007_000002.xml"
    path.unlink()
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    dataset = read_voc(root, lists=["train"])
    assert dataset.lists["train"] == ("2007_000001", "2008_000003")
    (skip,) = dataset.skipped
    assert skip.id == "2007_000002"
    assert reason in skip.reason


def test_missing_image_is_skipped_and_none_left_is_an_error(root: Path) -> None:
    (root / "JPEGImages" / "2007_000001.jpg").unlink()
    dataset = read_voc(root, lists=["train"])
    assert [skip.id for skip in dataset.skipped] == ["2007_000001"]
    assert "there is no image" in dataset.skipped[0].reason
    write_list(root, "some", "2007_000001")
    with pytest.raises(DataError, match="lists some"):
        read_voc(root, lists=["some"])


def test_images_to_test_need_no_annotation(root: Path) -> None:
    """But those of a list that does need them do, in whatever other list they are too."""
    for name in ("2007_000002", "2008_000003"):
        (root / "Annotations" / f"{name}.xml").unlink()
    write_list(root, "train", "2007_000001\n2007_000002\n")
    write_list(root, "test", "2007_000002\n2008_000003\n")
    dataset = read_voc(root, lists=["train", "test"], unlabelled=["test"])
    assert dataset.lists == {"train": ("2007_000001",), "test": ("2008_000003",)}
    assert dataset.items["2008_000003"].labels == ()
    assert [skip.id for skip in dataset.skipped] == ["2007_000002"]


def test_objects_of_no_class_are_counted(root: Path) -> None:
    for image_id, names in (
        ("2007_000001", ("dog", "motorcycle", "zebra", "head")),
        ("2007_000002", ("zebra", "hand", "foot")),
    ):
        (root / "Annotations" / f"{image_id}.xml").write_text(annotation(*names))
    dataset = read_voc(root, lists=["train"], classes=["dog"])
    (notice,) = dataset.notices
    with pytest.raises(DataError, match=r"'zebra' in 2.*class_names\.txt"):
        read_voc(root, lists=["train"])
    assert "'zebra' in 2, 'motorcycle' in 1 (did you mean 'motorbike'?);" in notice
    assert str(root / "class_names.txt") in notice
    assert dataset.name == "voc12"
    (root / "class_names.txt").write_text("dog\nmotorcycle\naeroplane\nhead\n")
    (notice,) = read_voc(root, lists=["train"]).notices
    assert "'zebra' in 2; " in notice
    labels = root / "labels.csv"
    labels.write_text("image,labels\n2007_000001,dog\n2007_000002,\n2008_000003,\n")
    assert read_voc(root, lists=["train"], labels=labels).notices == ()


def test_a_folder_with_classes_of_its_own(root: Path) -> None:
    (root / "class_names.txt").write_text("zebra\n\ncow\n", encoding="utf-8")
    (root / "Annotations/2007_000002.xml").write_text(annotation("cow", "zebra"))
    dataset = read_voc(root, lists=["train"])
    assert (dataset.classes.names, dataset.classes.mask_ids) == (("zebra", "cow"), (1, 2))
    assert dataset.items["2007_000002"].labels == (0, 1)
    assert read_voc(root, lists=["train"], classes=["cow"]).classes.mask_ids == (2,)
    assert dataset.name == "VOC2012"
    (root / "class_names.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=r"class_names\.txt"):
        read_voc(root, lists=["train"])
