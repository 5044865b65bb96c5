"""train_aug from VOC and SBD: which images, which masks, and what is refused."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import scipy.sparse
from PIL import Image

from lpcam.data.dataset import with_mask_folder
from lpcam.data.masks import read_index_mask
from lpcam.data.sbd import make_train_aug
from lpcam.data.voc import read_voc
from lpcam.runtime.errors import DataError, LpcamError

SIZE = (4, 6)
TRAIN, VAL = ("2007_000001", "2007_000002"), ("2007_000003", "2007_000004")
SBD_TRAIN = ("2008_000001", "2007_000002", "2007_000003")
SBD_VAL = ("2008_000002",)


def write_mat(path: Path, values: object, *, name: str = "GTcls") -> None:
    """As SBD's own: a struct of the class mask, sparse boundaries and the classes."""
    boundaries = np.empty((20, 1), object)
    for n in range(20):
        boundaries[n, 0] = scipy.sparse.csc_matrix(SIZE, dtype=bool)
    fields = {"Boundaries": boundaries, "Segmentation": values, "CategoriesPresent": [[3]]}
    path.parent.mkdir(parents=True, exist_ok=True)
    scipy.io.savemat(path, {name: fields}, do_compression=True)


def voc_mask(image_id: str) -> np.ndarray:
    mask = np.full(SIZE, int(image_id[-1]), np.uint8)
    mask[0, 0] = 255
    return mask


def sbd_mask(image_id: str) -> np.ndarray:
    mask = np.zeros(SIZE, np.uint8)
    mask[1:, int(image_id[-1]) :] = 20
    return mask


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    root = tmp_path / "VOCdevkit" / "VOC2012"
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation", "Annotations"):
        (root / folder).mkdir(parents=True)
    for image_id in {*TRAIN, *VAL, *SBD_TRAIN, *SBD_VAL}:
        Image.new("RGB", SIZE[::-1]).save(root / "JPEGImages" / f"{image_id}.jpg")
        (root / "Annotations" / f"{image_id}.xml").write_text("<annotation/>")
    for name, ids in (("train", TRAIN), ("val", VAL)):
        (root / "ImageSets" / "Segmentation" / f"{name}.txt").write_text("\n".join(ids))
        for image_id in ids:
            image = Image.fromarray(voc_mask(image_id))
            image.putpalette(bytes(range(256)) * 3)
            image.save(root / "SegmentationClass" / f"{image_id}.png")
    return root


@pytest.fixture
def sbd(tmp_path: Path) -> Path:
    dataset = tmp_path / "benchmark_RELEASE" / "dataset"
    for name, ids in (("train", SBD_TRAIN), ("val", SBD_VAL)):
        for image_id in ids:
            write_mat(dataset / "cls" / f"{image_id}.mat", sbd_mask(image_id))
        (dataset / f"{name}.txt").write_text("".join(f"{i}\n" for i in ids))
    return dataset


IDS = (*TRAIN, "2008_000001", "2008_000002")
"""All of train, of SBD what is not in val, sorted."""


def list_of(voc: Path) -> Path:
    return voc / "ImageSets/Segmentation/train_aug.txt"


def counted(told: str) -> list[int]:
    """The numbers in the first line of what was done."""
    return [int(part.rpartition(" ")[2]) for part in told.partition("\n")[0].split(", ")]


def test_list_and_masks(voc: Path, sbd: Path) -> None:
    told = make_train_aug(voc.parent, sbd.parent, workers=2)
    assert counted(told) == [2, 2, 4, 1, 4, 6, 0]
    folder = voc / "SegmentationClassAug"
    assert str(list_of(voc)) in told and str(folder) in told
    assert list_of(voc).read_text() == "".join(f"{i}\n" for i in IDS)
    written = {path.stem: read_index_mask(path) for path in folder.iterdir()}
    assert written.keys() == {*TRAIN, *VAL, "2008_000001", "2008_000002"}
    for image_id, mask in written.items():
        own = voc_mask if image_id in (*TRAIN, *VAL) else sbd_mask
        np.testing.assert_array_equal(mask, own(image_id), err_msg=image_id)
    dataset = with_mask_folder(read_voc(voc, lists=["train_aug"]), folder)
    assert dataset.lists["train_aug"] == IDS
    assert all(item.mask is not None for item in dataset.items.values())


def test_a_second_call_goes_on_where_the_first_was(voc: Path, sbd: Path) -> None:
    make_train_aug(voc, sbd)
    list_of(voc).unlink()
    lost, kept = (voc / "SegmentationClassAug" / f"{i}.png" for i in ("2008_000002", "2008_000001"))
    lost.unlink()
    Image.fromarray(sbd_mask("2008_000001")).save(kept)  # equal values, other bytes
    before = kept.read_bytes()
    assert counted(make_train_aug(voc, sbd))[-2:] == [1, 5]
    assert list_of(voc).is_file() and lost.is_file()
    assert kept.read_bytes() == before


def test_nothing_that_differs_is_replaced(voc: Path, sbd: Path) -> None:
    make_train_aug(voc, sbd)
    for text in (
        "2008_000001\n2007_000001\n2009_000009\n",
        "".join(f"{i}\n" for i in reversed(IDS)),
    ):
        list_of(voc).write_text(text)
        with pytest.raises(DataError, match=r"train_aug\.txt exists"):
            make_train_aug(voc, sbd)
        assert list_of(voc).read_text() == text
    # the same list as integers
    list_of(voc).write_text("\n".join(i.replace("_", "") for i in IDS))
    make_train_aug(voc, sbd)
    Image.fromarray(np.zeros(SIZE, np.uint8)).save(voc / "SegmentationClassAug" / "2008_000001.png")
    with pytest.raises(DataError, match=r"2008_000001\.png .* differs from .*mat"):
        make_train_aug(voc, sbd)


def test_what_is_missing_is_told_before_anything_is_written(voc: Path, sbd: Path) -> None:
    (sbd / "cls" / "2008_000001.mat").unlink()
    (voc / "JPEGImages" / "2008_000002.jpg").unlink()
    with pytest.raises(DataError, match=r"2 files .*2008_000001\.mat"):
        make_train_aug(voc, sbd)
    assert not (voc / "SegmentationClassAug").exists()
    write_mat(sbd / "cls" / "2008_000001.mat", sbd_mask("2008_000001"))
    # SBD has copies of its images
    (sbd / "img").mkdir()
    Image.new("RGB", SIZE[::-1]).save(sbd / "img" / "2008_000002.jpg")
    make_train_aug(voc, sbd)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda sbd: (sbd / "val.txt").unlink(), r"val\.txt"),
        (lambda sbd: (sbd / "val.txt").write_text("\n"), r"val\.txt is empty"),
        (lambda sbd: (sbd / "val.txt").write_text("a\na\n"), "'a' twice"),
        (lambda sbd: (sbd / "val.txt").write_text("../a\n"), r"line 1: .*'\.\./a'"),
        (lambda sbd: (sbd / "cls").rename(sbd / "gone"), "dataset"),
    ],
)
def test_wrong_folders_of_sbd(voc: Path, sbd: Path, change: object, message: str) -> None:
    change(sbd)  # type: ignore[operator]
    with pytest.raises(DataError, match=message):
        make_train_aug(voc, sbd)


def test_a_mask_of_another_size(voc: Path, sbd: Path) -> None:
    write_mat(sbd / "cls" / "2008_000001.mat", np.ones((6, 4), np.uint8))
    with pytest.raises(DataError, match=r"2008_000001\.mat is 6 x 4 .*4 x 6"):
        make_train_aug(voc, sbd)
    assert not (voc / "ImageSets" / "Segmentation" / "train_aug.txt").exists()


@pytest.mark.parametrize(
    ("values", "name", "message"),
    [
        (np.full(SIZE, 21, np.uint8), "GTcls", r"uint8 \(4, 6\) .* 21 to 21"),
        (np.ones(SIZE), "GTcls", r"float64 \(4, 6\)"),
        (np.ones((4, 6, 2), np.uint8), "GTcls", r"uint8 \(4, 6, 2\)"),
        (np.zeros((0, 0), np.uint8), "GTcls", r"uint8 \(0, 0\)"),
        (np.ones(SIZE, np.uint8), "GTinst", "KeyError"),
    ],
)
def test_wrong_contents(voc: Path, sbd: Path, values: object, name: str, message: str) -> None:
    write_mat(sbd / "cls" / "2008_000001.mat", values, name=name)
    with pytest.raises(DataError, match=rf"2008_000001\.mat .*{message}"):
        make_train_aug(voc, sbd)


@pytest.mark.parametrize(
    "data", [b"\x89HDF\r\n\x1a\n" + bytes(100), b"cos\nsystem\n(S'touch canary'\ntR."]
)
def test_other_kinds_of_files(voc: Path, sbd: Path, data: bytes) -> None:
    (sbd / "cls" / "2008_000001.mat").write_bytes(data)
    with pytest.raises(DataError, match=r"2008_000001\.mat .*damaged"):
        make_train_aug(voc, sbd)
    assert not Path("canary").exists()


def test_without_scipy(voc: Path, sbd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(LpcamError, match=r"'lpcam\[objects\]'"):
        make_train_aug(voc, sbd)
