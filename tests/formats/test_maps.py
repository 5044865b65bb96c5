"""Map files of other programs: every dialect in, every dialect out, and nothing mistaken."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hostile import Call
from numpy.typing import NDArray

from lpcam.data.dataset import ClassTable
from lpcam.data.map_files import MapFile, map_path, read_maps, write_maps
from lpcam.formats.labels import read_classes
from lpcam.formats.map_folders import (
    export_maps,
    import_maps,
    read_foreign_maps,
    write_foreign_maps,
)
from lpcam.formats.registry import MAP_FORMATS
from lpcam.runtime.errors import ArtefactError, DataError, LpcamError

HEIGHT, WIDTH = 9, 13
SIZE = (HEIGHT, WIDTH)
FARM = ClassTable(("dog", "cow", "sheep"), (12, 10, 17))
"""Some classes of VOC, not in its order."""


def planes(count: int, *size: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).random((count, *(size or SIZE)), dtype=np.float32)


def maps(*keys: int) -> MapFile:
    return MapFile(
        np.array(keys, dtype=np.int64), planes(len(keys), 3, 4, seed=1), planes(len(keys))
    )


def style_of(found: MapFile) -> str:
    return str(found.made_by["imported"]["style"])


def saved(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = np.empty((), dtype=object)
    whole[()] = value
    np.save(path, value if isinstance(value, np.ndarray) else whole, allow_pickle=True)
    return path


def irn(path: Path, *, keys: Any = (3, 14), extra: int = 0, torch_inside: bool = False) -> Path:
    count = len(keys) + extra
    content: dict[str, Any] = {
        "keys": np.array(keys),
        "cam": planes(count, 3, 4, seed=1),
        "high_res": planes(count),
    }
    for name in ("keys", "cam") if torch_inside else ("high_res",):
        content[name] = torch.from_numpy(content[name])
    return saved(path, content)


@pytest.mark.parametrize("torch_inside", [True, False], ids=["of CAM", "of LPCAM"])
def test_irn_files_are_read_as_they_are(tmp_path: Path, torch_inside: bool) -> None:
    found = read_foreign_maps(irn(tmp_path / "a.npy", torch_inside=torch_inside), size=SIZE)
    assert found.keys.tolist() == [3, 14] and found.keys.dtype == np.int64
    assert np.array_equal(found.cam, planes(2, 3, 4, seed=1))
    assert np.array_equal(found.high_res, planes(2))
    record = found.made_by["imported"]
    assert record["file"] == "a.npy" and record["style"] == "irn" and len(record["digest"]) == 32


def test_psa_files_are_sorted_by_class_and_get_a_small_map(tmp_path: Path) -> None:
    full = np.zeros((2, 8, 8), np.float32)
    full[0] = 0.25
    full[1, :4] = 1.0
    found = read_foreign_maps(saved(tmp_path / "a.npy", {7: full[1], 0: torch.tensor(full[0])}))
    assert style_of(found) == "psa" and found.keys.tolist() == [0, 7]
    assert np.array_equal(found.high_res, full)
    # bilinear without aligned corners takes the mean of the four pixels in the middle of a cell
    assert found.cam.tolist() == [[[0.25, 0.25]] * 2, [[1, 1], [0, 0]]]


def test_after_a_crf_the_style_has_to_be_named(tmp_path: Path) -> None:
    full = planes(3) + 0.1
    full /= full.sum(axis=0)
    path = saved(tmp_path / "a.npy", {0: full[0], 3: full[1], 20: full[2]})
    with pytest.raises(ArtefactError, match=r"a.npy is refused: .*psa: .*psa-crf: "):
        read_foreign_maps(path)
    found = read_foreign_maps(path, style="psa-crf")
    assert found.keys.tolist() == [2, 19] and np.array_equal(found.high_res, full[1:])
    assert read_foreign_maps(path, style="psa").keys.tolist() == [0, 3, 20]
    with pytest.raises(ArtefactError, match="plane 0"):
        read_foreign_maps(saved(tmp_path / "b.npy", {3: full[1]}), style="psa-crf")


def test_the_published_ways_of_having_no_class(tmp_path: Path) -> None:
    none = np.zeros(0, np.int64)
    ways = {
        "lpcam": {"keys": none, "cam": planes(0, 3, 4), "high_res": planes(0)},
        "torch": {"keys": torch.zeros(0).long(), "cam": torch.zeros(0, 3, 4), "high_res": None},
        "amn": {"keys": none},
        "empty": {},
        "background alone": {"keys": none, "cam": planes(1, 3, 4), "high_res": planes(1)},
    }
    for name, content in ways.items():
        found = read_foreign_maps(saved(tmp_path / f"{name}.npy", content), size=SIZE)
        assert found.keys.dtype == np.int64
        shapes = [array.shape for array in (found.keys, found.cam, found.high_res)]
        assert shapes == [(0,), (0, 3, 4), (0, *SIZE)]
        write_maps(tmp_path / "a.npz", found, dtype="float16")
    assert read_foreign_maps(tmp_path / "lpcam.npy").high_res.shape == (0, *SIZE)
    for name in ("amn", "empty"):
        with pytest.raises(ArtefactError, match="the size of its image must be given"):
            read_foreign_maps(tmp_path / f"{name}.npy")


ONE, TWO = np.array([1]), np.array([1, 2])
WRONG: dict[str, tuple[Any, str]] = {
    "array": (np.ones(3), r"float64 \(3,\)"),
    "list": ([1], "list"),
    "other keys": ({"a": 1, "b": 2}, "the keys 'a', 'b'; .*'keys' .* by class"),
    "text among classes": ({1: planes(1)[0], "a": 1}, "the keys 1, 'a'"),
    "float keys": ({"keys": np.ones(2)}, r"'keys' are float64 \(2,\)"),
    "flat keys": ({"keys": np.ones((2, 1), int)}, r"'keys' are int64 \(2, 1\)"),
    "no maps": ({"keys": ONE}, "no 'high_res'"),
    "planes": ({"keys": ONE, "high_res": planes(3)}, "3 planes and 'keys' 1"),
    "too few": ({"keys": TWO, "high_res": planes(1)}, "1 planes and 'keys' 2"),
    "cam": (
        {"keys": ONE, "high_res": planes(1), "cam": planes(1, 4, 4)},
        r"'cam' is \(1, 4, 4\) .* \(1, 3, 4\)",
    ),
    "repeats": ({"keys": np.array([1, 1]), "high_res": planes(2)}, r"\[1, 1\] repeat"),
    "below 0": ({"keys": np.array([-1]), "high_res": planes(1)}, r"\[-1\]"),
    "class below 0": ({-1: planes(1)[0]}, "the keys -1"),
    "class above any": ({2**63: planes(1)[0]}, "the keys 9"),
    "bytes": ({"keys": ONE, "high_res": np.ones((1, 9, 13), "u1")}, "uint8"),
    "no array": ({1: [1.0]}, r"class 1 is list"),
    "negative": ({1: -planes(1)[0]}, "class 1"),
    "nan": ({1: np.full(SIZE, np.nan, "f4")}, "class 1"),
    "too large": ({1: np.full(SIZE, 1e300)}, "class 1"),
    "empty side": ({1: np.zeros((0, 5), "f4")}, r"class 1 is \(0, 5\)"),
    "sizes": ({1: planes(1)[0], 2: planes(1, 4, 4)[0]}, r"\(4, 4\), \(9, 13\)"),
    "sides of no planes": (
        {"keys": np.zeros(0, int), "high_res": np.zeros((0, 10**6, 10**6), np.float32)},
        "100,000,000 pixels",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_files_are_refused_by_name(tmp_path: Path, name: str) -> None:
    content, message = WRONG[name]
    path = saved(tmp_path / "a.npy", content)
    with pytest.raises(ArtefactError, match=f"map file .*a.npy is refused: .*{message}"):
        read_foreign_maps(path)


def test_keys_are_mask_values_less_1(tmp_path: Path) -> None:
    """Of a part of a larger data set they are not the label indices."""
    whole = maps(2, 0)
    for style, keys in (("irn", [16, 11]), ("psa", [16, 11]), ("psa-crf", [0, 17, 12])):
        background = 0.5 if style == "psa-crf" else None
        path = tmp_path / "a.npy"
        write_foreign_maps(path, whole, style, background=background, classes=FARM)
        dictionary = loaded(path)
        assert (dictionary["keys"].tolist() if "keys" in dictionary else list(dictionary)) == keys
        back = read_foreign_maps(path, style=style, classes=FARM)
        order = [back.keys.tolist().index(key) for key in (2, 0)]
        assert np.array_equal(back.high_res[order], whole.high_res)
        assert back.made_by["classes"] == ["dog", "cow", "sheep"]
    assert "classes" not in read_foreign_maps(path, style="psa").made_by


def test_maps_of_classes_that_are_not_chosen_are_dropped(tmp_path: Path) -> None:
    irn(tmp_path / "in" / "a.npy", keys=(9, 11, 16))
    irn(tmp_path / "in" / "b.npy", keys=(9,))
    irn(tmp_path / "in" / "c.npy", keys=(9, 3))  # bird's
    done = import_maps(
        tmp_path / "in", tmp_path / "out", classes=FARM, chosen=["sheep", "dog"], normalise=True
    )
    found = read_maps(map_path(tmp_path / "out", "a"))
    assert found.keys.tolist() == [1, 0] and found.made_by["classes"] == ["sheep", "dog"]
    expected = planes(3)[1:]
    assert close(found, expected / expected.max(axis=(1, 2), keepdims=True))
    assert read_maps(map_path(tmp_path / "out", "b")).high_res.shape == (0, *SIZE)
    assert done.ids == ("a", "b") and done.without_class == ("b",)
    assert "it has the key 3, and no class has the mask value 4;" in done.skipped[0].reason
    assert "maps of classes not chosen were dropped: cow 2" in done.summary().splitlines()
    with pytest.raises(DataError, match="unknown class 'cot'"):
        import_maps(tmp_path / "in", tmp_path / "out", classes=FARM, chosen=["cot"])


def test_classes_go_out_beside_the_maps_and_come_back(tmp_path: Path) -> None:
    write_maps(map_path(tmp_path / "ours", "a"), maps(1), dtype="float16")
    out = tmp_path / "out"
    export_maps(tmp_path / "ours", out, "irn", ["a"], classes=FARM)
    assert (out / "classes.txt").read_bytes() == b"dog\t12\ncow\t10\nsheep\t17\n"
    assert read_classes(out / "classes.txt") == FARM
    export_maps(tmp_path / "ours", out, "irn", ["a"], classes=FARM)
    (out / "classes.txt").write_text("\ufeffa b 3\n\n c \n", "utf-8")
    assert read_classes(out / "classes.txt") == ClassTable(("a b 3", "c"), (1, 2))
    with pytest.raises(DataError, match=r"classes\.txt is there already with other contents"):
        export_maps(tmp_path / "ours", out, "irn", ["a"], classes=FARM)
    for text, message in (
        ("a\t1\nb\tx\n", r"classes\.txt line 2: 'x' after the tab "),
        ("a\t1\nb\t1\n", r"classes\.txt: .*mask ids lists 1 twice"),
        ("a\t0\n", r"classes\.txt: mask ids 0 are outside 1\.\.254"),
        ("", r"classes\.txt: no classes were given"),
    ):
        (out / "classes.txt").write_text(text)
        with pytest.raises(DataError, match=message):
            read_classes(out / "classes.txt")


def test_maps_of_another_image_or_table_are_refused(tmp_path: Path) -> None:
    path = irn(tmp_path / "a.npy")
    with pytest.raises(ArtefactError, match=r"maps are \(9, 13\) .*, the image \(9, 14\)"):
        read_foreign_maps(path, size=(9, 14))
    table = ClassTable(tuple("abcdefghijklmno"), tuple(range(1, 16)))
    short = ClassTable(table.names[:14], table.mask_ids[:14])
    with pytest.raises(ArtefactError, match="has the key 14, and no class has the mask value 15;"):
        read_foreign_maps(path, classes=short)
    assert read_foreign_maps(path, classes=table).keys.tolist() == [3, 14]
    with pytest.raises(ArtefactError, match="2 planes and 'keys' 2 classes"):
        read_foreign_maps(path, style="amn")
    with pytest.raises(ArtefactError, match="the keys 'keys', 'cam'"):
        read_foreign_maps(path, style="psa")
    with pytest.raises(LpcamError, match=r"'sem'.* irn, amn, psa, psa-crf"):
        read_foreign_maps(path, style="sem")


def test_a_map_file_that_runs_code_is_refused_and_does_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    path = saved(tmp_path / "in" / "a.npy", {"keys": Call(os.system, f"echo > {marker}")})
    with pytest.raises(ArtefactError, match=r"a.npy is refused: it asks for '\w+.system'"):
        read_foreign_maps(path)
    with pytest.raises(ArtefactError, match=r"can be used: .* asks for '\w+.system'"):
        import_maps(path.parent, tmp_path / "out")
    assert not marker.exists()
    np.load(path, allow_pickle=True)
    assert marker.exists(), "the file does not work"


def loaded(path: Path) -> Any:
    """As other programs read it."""
    with warnings.catch_warnings(action="error"):
        return np.load(path, allow_pickle=True).item()


@pytest.mark.parametrize("style", MAP_FORMATS)
@pytest.mark.parametrize("keys", [(3, 14), (0,), ()])
def test_what_is_written_is_read_again(tmp_path: Path, style: str, keys: tuple[int, ...]) -> None:
    whole = maps(*keys)
    background = 0.25 if style in ("amn", "psa-crf") else None
    write_foreign_maps(tmp_path / "a.npy", whole, style, background=background)
    named: Any = style if style.startswith("psa") else "auto"
    found = read_foreign_maps(tmp_path / "a.npy", size=SIZE, style=named)
    assert style_of(found) == style or not keys
    assert np.array_equal(found.keys, whole.keys)
    assert np.array_equal(found.high_res, whole.high_res)
    if not style.startswith("psa"):
        assert np.array_equal(found.cam, whole.cam)


def test_the_dictionaries_are_those_of_the_field(tmp_path: Path) -> None:
    def written(whole: MapFile, style: str, background: float | None = None) -> Any:
        write_foreign_maps(tmp_path / "a.npy", whole, style, background=background)
        return loaded(tmp_path / "a.npy")

    whole = maps(3, 14)
    found = written(whole, "irn")
    assert list(found) == ["keys", "cam", "high_res"]
    assert found["keys"].dtype == np.int64 and found["cam"].dtype == np.float32
    # programs of the field work on them in place, and make tensors of them
    found["high_res"] /= 2
    torch.from_numpy(found["cam"]).mul_(2)
    found = written(whole, "amn", 0.25)
    assert found["high_res"].shape == (3, *SIZE) and found["cam"].shape == (3, 3, 4)
    assert (found["high_res"][0] == 0.25).all() and found["keys"].tolist() == [3, 14]
    found = written(whole, "psa")
    assert list(found) == [3, 14] and np.array_equal(found[14], whole.high_res[1])
    found = written(whole, "psa-crf", 0.5)
    assert list(found) == [0, 4, 15] and (found[0] == 0.5).all()
    assert list(written(maps(), "amn", 0.5)) == ["keys"]
    assert written(maps(), "psa") == {}


def test_the_background_belongs_to_its_styles(tmp_path: Path) -> None:
    for style, background in (("amn", None), ("psa-crf", None), ("irn", 0.5), ("psa", 0.5)):
        with pytest.raises(DataError, match=f"'{style}'"):
            write_foreign_maps(tmp_path / "a.npy", maps(1), style, background=background)
        with pytest.raises(DataError, match=f"'{style}'"):
            export_maps(tmp_path, tmp_path / "out", style, [], classes=FARM, background=background)
    assert list(tmp_path.iterdir()) == []


def close(found: MapFile, expected: NDArray[np.float32]) -> bool:
    return bool(np.allclose(found.high_res, expected, atol=expected.max() / 4000))


def test_a_folder_is_imported_with_its_origin(tmp_path: Path) -> None:
    irn(tmp_path / "in" / "2007_000032.npy")
    irn(tmp_path / "in" / "barn" / "cow 7.npy", keys=(1,), extra=1)
    saved(tmp_path / "in" / "c.npy", {5: planes(1)[0]})
    saved(tmp_path / "in" / "d.npy", {"keys": np.zeros(0, int), "high_res": planes(0)})
    (tmp_path / "in" / "e.npy").write_bytes(b"damaged")
    done = import_maps(tmp_path / "in", tmp_path / "out")
    assert done.ids == ("2007_000032", "barn/cow 7", "c", "d") and done.without_class == ("d",)
    assert done.styles == {"irn": 2, "amn": 1, "psa": 1}
    assert [skip.id for skip in done.skipped] == ["e"] and "damaged" in done.skipped[0].reason
    summary = done.summary().splitlines()
    assert summary[0] == f"4 map files (1 amn, 2 irn, 1 psa) in {tmp_path / 'out'}"
    assert len(summary) == 4
    assert summary[3].startswith("1 left out, the first: map file")
    found = read_maps(map_path(tmp_path / "out", "barn/cow 7"))
    assert found.keys.tolist() == [1] and close(found, planes(2)[1:])
    assert found.made_by["imported"]["style"] == "amn"
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").rglob("*.npz")}
    assert import_maps(tmp_path / "in", tmp_path / "out", workers=2).ids == done.ids
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").rglob("*.npz")} == before


def test_files_are_found_however_their_images_are_named(tmp_path: Path) -> None:
    for name in ("000000000009", "COCO_val2014_000000000042", "2007000032"):
        irn(tmp_path / "in" / f"{name}.npy")
    ids = ["COCO_train2014_000000000009", "000000000042", "2007_000032"]
    assert import_maps(tmp_path / "in", tmp_path / "out", ids).ids == tuple(ids)
    assert all(map_path(tmp_path / "out", i).is_file() for i in ids)
    irn(tmp_path / "in" / "COCO_train2014_000000000009.npy")
    with pytest.raises(DataError, match="of one image; keep one"):
        import_maps(tmp_path / "in", tmp_path / "out", ids)


def test_images_without_a_file(tmp_path: Path) -> None:
    irn(tmp_path / "in" / "a.npy")
    done = import_maps(tmp_path / "in", tmp_path / "out", ["a", "b"])
    assert done.ids == ("a",) and "has no file of it" in done.skipped[0].reason
    sizes = {"a": SIZE, "b": (5, 7)}
    done = import_maps(
        tmp_path / "in", tmp_path / "out", ["a", "b"], sizes=sizes, no_file_no_class=True
    )
    assert done.ids == ("a", "b") and done.without_class == ("b",)
    assert done.styles == {"irn": 1, "no file": 1}
    assert read_maps(map_path(tmp_path / "out", "b")).high_res.shape == (0, 5, 7)
    with pytest.raises(DataError, match=r"none of the 1 images has a file .* 'a'.npy, .* 'b'"):
        import_maps(tmp_path / "in", tmp_path / "out", ["b"], sizes=sizes, no_file_no_class=True)
    with pytest.raises(DataError, match=r"there is no .npy file in .*none"):
        import_maps(tmp_path / "none", tmp_path / "out")
    with pytest.raises(DataError, match="could leave its folder"):
        import_maps(tmp_path / "in", tmp_path / "out", ["a", "../a"])
    with pytest.raises(ArtefactError, match=r"can be used: .*the image \(1, 1\)"):
        import_maps(tmp_path / "in", tmp_path / "out", ["a"], sizes={"a": (1, 1)})


def test_a_folder_goes_out_and_comes_back(tmp_path: Path) -> None:
    ids = ["COCO_train2014_000000000009", "barn/cow"]
    for item_id, keys in zip(ids, [(1, 79), ()], strict=True):
        write_maps(map_path(tmp_path / "ours", item_id), maps(*keys), dtype="float16")
    files = export_maps(
        tmp_path / "ours", tmp_path / "theirs", "amn", ids, background=0.5, bare_digits=True
    )
    names = [f.relative_to(tmp_path / "theirs").as_posix() for f in files]
    assert names == ["000000000009.npy", "barn/cow.npy"]
    sizes = dict.fromkeys(ids, SIZE)
    back = import_maps(tmp_path / "theirs", tmp_path / "back", ids, sizes=sizes)
    assert back.ids == tuple(ids) and back.without_class == ("barn/cow",)
    for item_id in ids:
        first, again = (read_maps(map_path(tmp_path / f, item_id)) for f in ("ours", "back"))
        assert np.array_equal(first.keys, again.keys)
        assert np.allclose(first.high_res, again.high_res, atol=1e-6)
        assert np.allclose(first.cam, again.cam, atol=1e-6)
    with pytest.raises(DataError, match="would be written to one file"):
        export_maps(tmp_path / "ours", tmp_path / "theirs", "psa", [ids[0], ids[0]])
    with pytest.raises(ArtefactError, match=r"cannot read .*other.npz"):
        export_maps(tmp_path / "ours", tmp_path / "theirs", "psa", ["other"])
