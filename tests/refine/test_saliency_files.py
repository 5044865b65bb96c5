"""Saliency maps: every kind of file gives the same values, and what is unclear is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lpcam.refine import saliency_maps as saliency
from lpcam.refine.saliency_maps import find_saliency, read_saliency, read_values, saliency_maximum
from lpcam.runtime.errors import DataError

LEVELS = np.arange(256, dtype=np.uint8).reshape(8, 32)


def save(folder: Path, values: np.ndarray | Image.Image, name: str = "a.png") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if name.endswith(".npy"):
        np.save(path, values)
    else:
        (values if isinstance(values, Image.Image) else Image.fromarray(values)).save(path)
    return folder


def palette(levels: np.ndarray) -> Image.Image:
    """A palette that turns the order of the indices around."""
    image = Image.fromarray(255 - levels)
    image.putpalette([255 - i for i in range(256) for _ in range(3)])
    return image


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("a.png", LEVELS),
        ("a.png", np.repeat(LEVELS[:, :, None], 3, axis=2)),
        ("a.png", Image.merge("LA", [Image.fromarray(LEVELS), Image.new("L", (32, 8), 255)])),
        ("a.png", palette(LEVELS)),
        ("a.png", LEVELS.astype(np.uint16) * 257),
        ("a.tiff", LEVELS / np.float32(255)),
        ("a.npy", LEVELS),
        ("a.npy", LEVELS / 255),
        ("a.npy", LEVELS / np.float32(255) * np.float32(1 + 1e-7)),
        ("a.npy", np.asfortranarray(LEVELS.astype(np.float16) / 255)),
    ],
)
def test_every_kind_of_file(tmp_path: Path, name: str, values: np.ndarray) -> None:
    found = read_saliency(save(tmp_path, values, name), "a", (8, 32))
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, LEVELS)
    values = read_values(tmp_path / name)
    assert values.dtype == np.float32 and values.max() <= 1
    np.testing.assert_allclose(values, LEVELS / 255, atol=3e-4)


def test_other_sizes_are_resized(tmp_path: Path) -> None:
    """Twice as wide: new pixel centres lie at quarters of the old distances."""
    save(tmp_path, np.array([[0, 200]], np.uint8))
    found = read_saliency(tmp_path, "a", (2, 4))
    np.testing.assert_array_equal(found, [[0, 50, 150, 200]] * 2)
    # one plane, stored in two ways, stays one plane
    small, large = LEVELS[:4, :8], (5, 19)
    save(tmp_path, small)
    save(tmp_path, small / np.float32(255), "b.npy")
    first, second = (read_saliency(tmp_path, name, large) for name in "ab")
    np.testing.assert_array_equal(first, second)
    assert first.shape == large


def test_a_binary_map_of_8_bits_needs_its_maximum(tmp_path: Path) -> None:
    save(tmp_path, np.array([[0, 1]], np.uint8))
    with pytest.raises(DataError, match=r"maximum=1; .*maximum=255"):
        read_saliency(tmp_path, "a", (1, 2))
    assert read_saliency(tmp_path, "a", (1, 2), maximum=1).tolist() == [[0, 255]]
    assert read_saliency(tmp_path, "a", (1, 2), maximum=255).tolist() == [[0, 1]]
    save(tmp_path, np.zeros((1, 2), np.uint8))
    assert read_saliency(tmp_path, "a", (1, 2)).tolist() == [[0, 0]]
    save(tmp_path, np.array([[0, 100]], np.float32), "c.npy")
    assert read_saliency(tmp_path, "c", (1, 2), maximum=100).tolist() == [[0, 255]]


def test_the_folder_tells_masks_of_0_and_1_from_dark_maps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mask = np.array([[0, 1]], np.uint8)

    def maximum(**files: np.ndarray) -> float | None:
        folder = tmp_path / "-".join(files)
        names = {name: f"{name}.{'npy' if name.startswith('n') else 'png'}" for name in files}
        for name, values in files.items():
            save(folder, values, names[name])
        return saliency_maximum(folder / name for name in names.values())

    assert maximum(a=mask, b=mask, c=0 * mask) == 1
    assert maximum(a=mask.astype(np.uint16), n=mask.astype(np.float32)) == 1
    assert maximum(a=mask, b=mask, d=LEVELS) == 255
    assert read_values(tmp_path / "a-b-d" / "a.png", maximum=255).tolist() == [
        [0, pytest.approx(1 / 255)]
    ]
    assert maximum(a=0 * mask) is None  # a later one may be of either kind
    assert maximum(e=LEVELS.astype(np.uint16) * 257) is None
    assert maximum(d=LEVELS, n=LEVELS / np.float32(255)) is None
    assert maximum(n=LEVELS / np.float32(255), d=LEVELS) is None
    assert maximum() is None
    # a part of many files, from one end to the other
    opened: list[Path] = []
    plane = saliency._plane
    monkeypatch.setattr(saliency, "LOOKED_AT", 4)
    monkeypatch.setattr(saliency, "_plane", lambda path: opened.append(path) or plane(path))
    assert maximum(**{f"m{n}": mask for n in range(10)}) == 1
    assert [path.stem for path in opened] == ["m9", "m0", "m3", "m6", "m9"]


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("a.npy", np.array([[0, 255.0]]), "0 to 255; expected 0 to 1 "),
        ("a.npy", np.array([[np.nan, 1]]), "values from nan to nan"),
        ("a.tif", np.array([[0, 2]], np.float32), "values from 0 to 2; expected 0 to 1"),
        ("a.tif", np.array([[0, 70000]], np.int32), "to 70000; expected 0 to 65535"),
        ("a.npy", np.array([[1, 2]]), r"is int64 \(1, 2\); expected \(H, W\) of floats"),
        ("a.npy", np.zeros((0, 2)), r"is float64 \(0, 2\)"),
        ("a.png", Image.new("RGBA", (2, 2), (9, 9, 9, 100)), "transparent"),
    ],
)
def test_wrong_maps(tmp_path: Path, name: str, values: np.ndarray, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_saliency(save(tmp_path, values, name), "a", (1, 2))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "canary",))

    for name in ("a.png", "b.npy", "c.tif"):
        (tmp_path / name).write_bytes(b"no image")
        with pytest.raises(DataError, match=r"cannot read .*" + name):
            read_saliency(tmp_path, name[0], (1, 2))
    np.save(tmp_path / "d.npy", np.array([[Trap()]], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match=r"d\.npy"):
        read_saliency(tmp_path, "d", (1, 2))
    assert not (tmp_path / "canary").exists()
    np.savez(tmp_path / "e", a=LEVELS)
    (tmp_path / "e.npz").rename(tmp_path / "e.npy")
    with pytest.raises(DataError, match="archive"):
        read_saliency(tmp_path, "e", (1, 2))


def test_maps_are_found_before_work(tmp_path: Path) -> None:
    save(tmp_path, LEVELS, "barn/a.png")
    save(tmp_path, LEVELS, "b.npy")
    found = find_saliency(tmp_path, ["b", "barn/a"])
    assert found == {"b": tmp_path / "b.npy", "barn/a": tmp_path / "barn" / "a.png"}
    with pytest.raises(DataError, match=r"2 images .*'c'"):
        find_saliency(tmp_path, ["b", "c", "d"])
    save(tmp_path, LEVELS, "b.tif")
    with pytest.raises(DataError, match=r"'b' .*b\.npy and b\.tif"):
        find_saliency(tmp_path, ["b"])
    with pytest.raises(DataError, match=r"'\.\./b'"):
        find_saliency(tmp_path / "barn", ["../b"])
    with pytest.raises(DataError, match="gone"):
        read_saliency(tmp_path / "gone", "b", (8, 32))
