"""Streaming a large JSON object: every member and its place, at every window size."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from lpcam.data.coco.json_stream import stream_arrays
from lpcam.runtime.errors import DataError

VALUES: list[Any] = [
    {"id": 1, "text": 'quote " and \\ and / and \n', "nested": {"a": [[], {}, [1, [2]]]}},
    {"name": "Kühe, 牛, 🐄", "pair": "🐄🐄"},
    "a string with ] and } and , and [",
    -12.5e-3,
    1234567890123,
    0,
    True,
    None,
    [],
    {},
]


def stream(path: Path, *keys: str, **options: Any) -> dict[str, list[Any]]:
    return {key: list(members) for key, members in stream_arrays(path, keys, **options)}


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize("window", [1, 2, 3, 7, 64, 2**20])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("form", [{}, {"indent": 3}, {"separators": (" \r\t,", ":\n")}])
@pytest.mark.parametrize("ascii_only", [True, False])
def test_members_and_their_places(
    tmp_path: Path, window: int, mark: str, form: dict[str, Any], ascii_only: bool
) -> None:
    whole = {"info": {"é": [1, {"x": "]"}]}, "first": VALUES, "skipped": VALUES, "last": VALUES[:3]}
    text = mark + json.dumps(whole, ensure_ascii=ascii_only, **form)
    path = write(tmp_path / "a.json", text)
    found = stream(path, "last", "first", "absent", window=window)
    assert list(found) == ["first", "last"]
    data = path.read_bytes()
    for key, members in found.items():
        assert [member.value for member in members] == whole[key]
        for value, offset, length in members:
            piece = data[offset : offset + length]
            assert json.loads(piece) == value and piece == piece.strip()


@pytest.mark.parametrize("number", ["12.5", "1e-7", "-0.25E+3", "123456"])
@pytest.mark.parametrize("window", range(1, 12))
def test_a_number_at_the_end_of_the_window_is_whole(
    tmp_path: Path, number: str, window: int
) -> None:
    path = write(tmp_path / "a.json", f'{{"a":[{number}]}}')
    (member,) = stream(path, "a", window=window)["a"]
    assert member == (json.loads(number), 6, len(number))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "byte 0, the file ends"),
        ("[1]", "byte 0, found '\\['"),
        ('{"a": [1, 2', "byte 11, the file ends"),
        ('{"a": [1,\n2}', "byte 11, found '}'"),
        ('{"a": [1, ]}', "byte 10"),
        ('{"é": 1,\n "a": [{"b": 1 "c"}]}', "byte 25"),
        ('{"a": [{"b": "cut', "byte 13"),
        ('{"a": [1]', "byte 9, the file ends"),
        ('{"a": [1],}', "byte 10"),
        ('{"a" [1]}', "byte 5"),
        ('{"a": [1]} {', "byte 11"),
        ('{"a": [1], "a": [2]}', "'a' repeats"),
        ('{"a": {"b": 1}}', r"'a' is not an array \(byte 6"),
        ('{"a": [' + "[" * 100_000, "recursion"),
        ('{"a": [' + "1" * 5000 + "]}", "Exceeds the limit"),
        (b'{"a": ["\xff"]}', "not UTF-8"),
        (b'{"a": ["\xc3"]}', "not UTF-8"),
        ('{"a": [1]}'.encode("utf-16"), "byte 0"),
    ],
)
@pytest.mark.parametrize("window", [1, 2**18])
def test_broken_files(tmp_path: Path, text: str | bytes, message: str, window: int) -> None:
    path = write(tmp_path / "a.json", text)
    with pytest.raises(DataError, match=message) as caught:
        stream(path, "a", window=window)
    assert str(path) in str(caught.value)


def test_progress_counts_bytes(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", json.dumps({"a": list(range(1000))}))
    calls: list[tuple[int, int]] = []
    stream(path, "a", window=100, progress=lambda done, total: calls.append((done, total)))
    size = path.stat().st_size
    assert calls[-1] == (size, size)
    assert all(a[0] < b[0] for a, b in itertools.pairwise(calls))
