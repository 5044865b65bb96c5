"""Files: whole or not at all, equal bytes for equal contents, and named when damaged."""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from safetensors.torch import save

from lpcam.data.map_files import MapFile, read_maps, write_maps
from lpcam.runtime.errors import ArtefactError
from lpcam.runtime.files import (
    digest_bytes,
    digest_file,
    digest_json,
    read_bytes,
    read_json,
    read_tensors,
    write_bytes,
    write_json,
    write_tensors,
)


def maps(count: int = 2, height: int = 9, width: int = 13, factor: float = 1.0) -> MapFile:
    random = np.random.default_rng(0)
    high_res = random.random((count, height, width), dtype=np.float32) * np.float32(factor)
    cam = random.random((count, -(-height // 4), -(-width // 4)), dtype=np.float32)
    return MapFile(np.arange(count) * 3, cam, high_res, {"method": "LPCAM", "digest": "ab"})


def test_bytes_replace_an_earlier_file_and_make_folders(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "file"
    write_bytes(path, b"one")
    write_bytes(path, b"two")
    assert read_bytes(path) == b"two"
    assert list(path.parent.iterdir()) == [path]
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EIO])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_failure_keeps_the_earlier_file_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    path = tmp_path / "file"
    write_bytes(path, b"one")
    monkeypatch.setattr(os, call, Mock(side_effect=OSError(number, os.strerror(number))))
    with pytest.raises(ArtefactError, match="file: "):
        write_bytes(path, b"two")
    monkeypatch.setattr(os, call, Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_bytes(path, b"two")
    assert path.read_bytes() == b"one"
    assert list(tmp_path.iterdir()) == [path]


def test_digests_are_blake2b_of_the_contents(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    assert digest_file(tmp_path / "file") == digest_bytes(b"abc")
    assert digest_bytes(b"abc") == "cf4ab791c62b8d2b2109c90275287816"  # by `b2sum -l 128`
    assert digest_json({"a": 1, "b": (1, 2)}) == digest_json({"b": [1, 2], "a": 1})
    assert digest_json({"a": 1}) == digest_bytes(b'{"a":1}')


def test_json_is_sorted_utf8_with_an_end_of_line(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    write_json(path, {"b": [1, 2.5], "a": "牛"})
    assert path.read_text("utf-8") == '{\n  "a": "牛",\n  "b": [\n    1,\n    2.5\n  ]\n}\n'
    assert read_json(path) == {"a": "牛", "b": [1, 2.5]}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}, "\udcff", Path("a")])
def test_json_refuses(tmp_path: Path, value: object) -> None:
    path = tmp_path / "file.json"
    with pytest.raises(ArtefactError, match=r"file\.json as JSON"):
        write_json(path, {"a": value})
    with pytest.raises(ArtefactError, match="as JSON"):
        digest_json({"a": value})
    assert not path.exists()


@pytest.mark.parametrize("data", [b"", b'{"a":', b"\xff\xfe", b"[" * 100_000])
def test_damaged_json_is_named(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "file.json"
    path.write_bytes(data)
    with pytest.raises(ArtefactError, match=r"file\.json is damaged"):
        read_json(path)


@pytest.mark.parametrize("read", [read_json, read_tensors, read_maps, digest_file])
def test_missing_file_is_named(tmp_path: Path, read: Any) -> None:
    with pytest.raises(ArtefactError, match="none: No such file"):
        read(tmp_path / "none")


def test_tensors_come_back_with_types_and_metadata(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    weight = torch.arange(6.0).view(2, 3)
    tensors = {"weight": weight, "tied": weight, "view": weight.t(), "half": weight.half()}
    tensors |= {"count": torch.tensor(3), "empty": torch.zeros(0, 4)}
    metadata = {"classes": ["cow", "牛"], "preset": {"tau": 0.1}}
    write_tensors(path, tensors, metadata)
    read, found = read_tensors(path)
    assert found == metadata
    torch.testing.assert_close(read, tensors, rtol=0, atol=0)


def test_equal_contents_give_equal_bytes(tmp_path: Path) -> None:
    tensors = {name: torch.full((3,), float(ord(name))) for name in "abcdefgh"}
    turned = dict(reversed(tensors.items()))
    write_tensors(tmp_path / "one", tensors, {"x": 1, "y": 2})
    write_tensors(tmp_path / "two", turned, {"y": 2, "x": 1})
    assert digest_file(tmp_path / "one") == digest_file(tmp_path / "two")
    for name in ("one", "two"):
        write_maps(tmp_path / name, maps(), dtype="uint8")
    assert digest_file(tmp_path / "one") == digest_file(tmp_path / "two")


def test_damaged_and_foreign_tensor_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    write_tensors(path, {"a": torch.ones(100)}, {})
    whole = path.read_bytes()
    for data in (b"", b"text", whole[:20], whole[:-1], b"\xff" * 200):
        path.write_bytes(data)
        with pytest.raises(ArtefactError, match=r"file\.safetensors is damaged"):
            read_tensors(path)
    for metadata in (None, {"format": "pt"}, {"lpcam": "[]"}):
        path.write_bytes(save({"a": torch.ones(2)}, metadata))
        with pytest.raises(ArtefactError, match=r"file\.safetensors was not written by this"):
            read_tensors(path)
    path.write_bytes(save({"a": torch.ones(2)}, {"lpcam": '{"format": 2, "metadata": {}}'}))
    with pytest.raises(ArtefactError, match="format 2"):
        read_tensors(path)


TYPES: list[tuple[Literal["uint8", "float16"], float]] = [("uint8", 1 / 510), ("float16", 1 / 4096)]


@pytest.mark.parametrize("factor", [1.0, 0.3, 1e-30, 7e4, 1e38])
@pytest.mark.parametrize(("dtype", "error"), TYPES)
def test_maps_come_back_within_the_stated_error(
    tmp_path: Path, dtype: Literal["uint8", "float16"], error: float, factor: float
) -> None:
    path = tmp_path / "a" / "牛 1.npz"
    given = maps(factor=factor)
    write_maps(path, given, dtype=dtype)
    read = read_maps(path)
    assert read.made_by == given.made_by
    np.testing.assert_array_equal(read.keys, given.keys)
    for name in ("cam", "high_res"):
        got, expected = getattr(read, name), getattr(given, name)
        maximum = expected.max(axis=(1, 2), keepdims=True)
        assert got.dtype == np.float32
        assert got.shape == expected.shape
        assert (np.abs(got - expected) <= maximum * np.float32(error * 1.001)).all()
        np.testing.assert_array_equal(got.max(axis=(1, 2), keepdims=True), maximum)


def test_a_uint8_map_in_0_to_1_is_255_times_its_value(tmp_path: Path) -> None:
    high_res = np.array([[[0, 0.1, 0.5, 1]]], dtype=np.float32)
    given = MapFile(np.array([4]), np.ones((1, 1, 1), np.float32), high_res, {})
    write_maps(tmp_path / "a.npz", given, dtype="uint8")
    with np.load(tmp_path / "a.npz", allow_pickle=False) as archive:  # any program can read it
        assert archive["format"] == "fg"
        assert archive["high_res"].dtype == np.uint8
        assert archive["high_res"].tolist() == [[[0, 26, 128, 255]]]
        assert archive["high_res_scale"].tolist() == [1]


@pytest.mark.parametrize("dtype", ["uint8", "float16"])
def test_no_class_and_flat_maps(tmp_path: Path, dtype: Literal["uint8", "float16"]) -> None:
    path = tmp_path / "a.npz"
    write_maps(path, maps(count=0), dtype=dtype)
    read = read_maps(path)
    assert read.keys.shape == (0,) and read.keys.dtype == np.int64
    assert read.high_res.shape == (0, 9, 13) and read.cam.shape == (0, 3, 4)
    write_maps(path, maps(factor=0), dtype=dtype)
    assert (read_maps(path).high_res == 0).all()


def with_value(name: str, value: float) -> dict[str, Any]:
    plane = getattr(maps(), name)
    plane[1, 0, 0] = value
    return {name: plane}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keys": np.array([1, 1])}, r"keys \[1, 1\]"),
        ({"keys": np.array([-1, 1])}, r"keys \[-1, 1\]"),
        ({"keys": np.array([0, 1], dtype=np.int32)}, "keys are int32"),
        ({"cam": np.zeros((2, 3, 3), np.float32)}, r"cam is .*\(2, 3, 4\)"),
        ({"high_res": np.zeros((9, 13), np.float32)}, r"high_res .*\(9, 13\)"),
        ({"made_by": {"a": np.nan}}, "made_by"),
        *((with_value("cam", v), r"a\.npz.*cam") for v in (np.nan, -np.inf)),
        *((with_value("high_res", v), r"a\.npz.*high_res") for v in (np.inf, -1e-6)),
    ],
)
def test_maps_that_do_not_fit(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ArtefactError, match=message):
        write_maps(tmp_path / "a.npz", replace(maps(), **change), dtype="uint8")
    assert not (tmp_path / "a.npz").exists()


def test_damaged_map_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    write_maps(path, maps(), dtype="uint8")
    whole = path.read_bytes()
    for data in (b"", b"text", *(whole[:cut] for cut in range(10, len(whole), 97))):
        path.write_bytes(data)
        with pytest.raises(ArtefactError, match=r"a\.npz is damaged or of another kind"):
            read_maps(path)


def test_foreign_npz_and_pickles_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, keys=np.arange(2))
    with pytest.raises(ArtefactError, match=r"another kind .*cam is not a file"):
        read_maps(path)
    np.savez(path, keys=np.array([{"a": 1}], dtype=object), cam=1)
    with pytest.raises(ArtefactError, match="allow_pickle=False"):
        read_maps(path)
    write_maps(path, maps(), dtype="uint8")
    with np.load(path) as archive:
        members = dict(archive)
    np.savez(path, **{**members, "format": np.array("bg_first")})
    with pytest.raises(ArtefactError, match="its format is 'bg_first', not 'fg'"):
        read_maps(path)
    np.savez(path, **{**members, "cam_scale": np.array([np.nan, 1], dtype=np.float32)})
    with pytest.raises(ArtefactError, match="cam has negative, NaN"):
        read_maps(path)
