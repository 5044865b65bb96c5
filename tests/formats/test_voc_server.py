"""The archive for the VOC test server."""

from __future__ import annotations

import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lpcam.data.dataset import ClassTable
from lpcam.data.masks import read_index_mask
from lpcam.data.voc import CLASSES as VOC_CLASSES
from lpcam.formats.voc_server import write_voc_server
from lpcam.runtime.errors import ArtefactError, DataError

VOC = ClassTable(VOC_CLASSES, tuple(range(1, 21)))
IDS = ["2008_000006", "2008_000011", "2012_004331"]


@pytest.fixture
def masks(tmp_path: Path) -> Path:
    """One of grey values, two with palettes; and one of an image that is not asked for."""
    root = tmp_path / "masks"
    root.mkdir()
    rng = np.random.default_rng(0)
    for number, name in enumerate([*IDS, "2008_000099"]):
        picture = Image.fromarray(rng.integers(0, 21, (6 + number, 8)).astype(np.uint8))
        if number:
            picture.putpalette([0] * 768)
        picture.save(root / f"{name}.png")
    return root


def test_the_servers_layout(masks: Path, tmp_path: Path) -> None:
    archive = write_voc_server(masks, IDS, VOC, tmp_path / "server")
    assert archive == tmp_path / "server" / "comp6_test_cls.tar.gz"
    inner = "results/VOC2012/Segmentation/comp6_test_cls"
    expected = {f"{inner}/{name}.png" for name in IDS}
    files = {p.relative_to(tmp_path / "server") for p in (tmp_path / "server").rglob("*.*")}
    assert files == {Path(name) for name in [*expected, archive.name]}
    with tarfile.open(archive) as packed:
        members = packed.getmembers()
        assert [m.name for m in members] == sorted(expected)
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname) for m in members} == {(0, 0, 0, "", "")}
        packed.extractall(tmp_path / "unpacked", filter="data")
    for name in IDS:
        unpacked = tmp_path / "unpacked" / inner / f"{name}.png"
        assert unpacked.read_bytes() == (tmp_path / "server" / inner / f"{name}.png").read_bytes()
        np.testing.assert_array_equal(
            read_index_mask(unpacked), read_index_mask(masks / f"{name}.png")
        )
        palette = Image.open(unpacked).getpalette()
        assert palette is not None and palette[:6] == [0, 0, 0, 128, 0, 0]


def test_the_archive_depends_on_the_masks_alone(masks: Path, tmp_path: Path) -> None:
    one = write_voc_server(masks, IDS, VOC, tmp_path / "1")
    some = ClassTable(("cat", "dog"), (8, 12))
    two = write_voc_server(masks, IDS[::-1], some, tmp_path / "2")
    assert one.read_bytes() == two.read_bytes()
    assert one.read_bytes()[4:8] == bytes(4)  # gzip's date
    assert write_voc_server(masks, IDS, VOC, tmp_path / "1").read_bytes() == two.read_bytes()


@pytest.mark.parametrize("value", [21, 254, 255])
def test_values_that_the_server_does_not_take(masks: Path, tmp_path: Path, value: int) -> None:
    Image.fromarray(np.full((3, 3), value, np.uint8)).save(masks / f"{IDS[1]}.png")
    with pytest.raises(DataError, match=rf"2008_000011\.png has the value {value}"):
        write_voc_server(masks, IDS, VOC, tmp_path / "server")
    assert not (tmp_path / "server").exists()


@pytest.mark.parametrize(
    "name", ["barn/2008_000006", "../2008_000006", "2008000006", "2010_000000"]
)
def test_images_that_are_not_vocs_or_have_no_mask(masks: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=name):
        write_voc_server(masks, [name], VOC, tmp_path / "server")
    assert not (tmp_path / "server").exists()


def test_other_bad_input_for_the_server(masks: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cow, bird"):
        write_voc_server(masks, IDS, ClassTable(("cow", "bird"), (1, 2)), tmp_path / "server")
    write_voc_server(masks, IDS, VOC, tmp_path / "server")
    with pytest.raises(ArtefactError, match=r"2012_004331\.png"):
        write_voc_server(masks, IDS[:2], VOC, tmp_path / "server")
    (masks / f"{IDS[0]}.png").write_bytes(b"broken")
    with pytest.raises(DataError, match="damaged or not an image"):
        write_voc_server(masks, IDS, VOC, tmp_path / "server")
