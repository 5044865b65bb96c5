"""Streaming a large JSON object: every member and its place, however the file is cut."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lpcam.data.json_stream import stream_arrays
from lpcam.errors import DataError

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
@pytest.mark.parametrize("form", [{}, {"indent": 3}, {"separators": (",", ":")}])
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
            assert json.loads(data[offset : offset + length]) == value
            # nothing around it
            assert data[offset : offset + length] == data[offset : offset + length].strip()


def test_random_blanks_and_cuts(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)

    def blanks() -> str:
        return "".join(generator.choice(list(" \t\n\r"), generator.integers(0, 3)))

    def text(value: Any) -> str:
        if isinstance(value, dict):
            inner = ",".join(
                f"{blanks()}{json.dumps(k)}{blanks()}:{text(v)}" for k, v in value.items()
            )
            return f"{blanks()}{{{inner}{blanks()}}}{blanks()}"
        if isinstance(value, list):
            return f"{blanks()}[{','.join(map(text, value))}{blanks()}]{blanks()}"
        return f"{blanks()}{json.dumps(value, ensure_ascii=False)}{blanks()}"

    for window in (1, 2, 5, 11, 1000):
        path = write(tmp_path / "a.json", text({"a": VALUES, "b": [], "c": VALUES}))
        found = stream(path, "a", "b", "c", window=window)
        assert [m.value for m in found["a"]] == [m.value for m in found["c"]] == VALUES
        assert found["b"] == []


@pytest.mark.parametrize("number", ["12.5", "1e-7", "-0.25E+3", "123456"])
@pytest.mark.parametrize("window", range(1, 12))
def test_a_number_that_the_window_cuts_is_whole(tmp_path: Path, number: str, window: int) -> None:
    path = write(tmp_path / "a.json", f'{{"a":[{number}]}}')
    (member,) = stream(path, "a", window=window)["a"]
    assert member == (json.loads(number), 6, len(number))


def test_members_that_are_left_are_passed_over(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", json.dumps({"a": [1, 2, 3], "b": [4, 5]}))
    first = {key: next(members).value for key, members in stream_arrays(path, ["a", "b"])}
    assert first == {"a": 1, "b": 4}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("  ", r"an object, \{...\}, was expected \(byte 2, line 1, where the file ends\)"),
        ("[1]", r"an object, \{...\}, was expected, not '\[' \(byte 0, line 1\)"),
        ('{"a": [1, 2', r"',' or '\]' was expected \(byte 11, line 1, where the file ends"),
        ('{"a": [1,\n2}', r"',' or '\]' was expected, not '\}' \(byte 11, line 2\)"),
        ('{"a": [1, ]}', r"Expecting value \(byte 10, line 1\)"),
        ('{"é": 1,\n "a": [{"b": 1 "c"}]}', r"Expecting ',' delimiter \(byte 25, line 2\)"),
        ('{"a": [{"b": "cut', r"Unterminated string starting at \(byte 13, line 1\)"),
        ('{"a": [1]', r"',' was expected \(byte 9, line 1, where the file ends\)"),
        ('{"a": [1],}', r"a key in double quotes was expected, not '\}' \(byte 10"),
        ('{"a" [1]}', r"':' was expected, not '\['"),
        ('{"a": [1]} {', r"the object is followed by something else \(byte 11"),
        ('{"a": [1], "a": [2]}', "'a' stands twice"),
        ('{"a": {"b": 1}}', r"'a' is no array \(byte 6, line 1\)"),
        ('{"a": [' + "[" * 100_000, "it is nested too deeply"),
        ('{"a": [' + "1" * 5000 + "]}", "Exceeds the limit"),
        (b'{"a": ["\xff"]}', r"is no UTF-8 text \(invalid start byte at byte 8\)"),
        (b'{"a": ["\xc3', r"is no UTF-8 text \(unexpected end of data at byte 8\)"),
        ('{"a": [1]}'.encode("utf-16"), "is no UTF-8 text"),
    ],
)
@pytest.mark.parametrize("window", [1, 2**18])
def test_broken_files(tmp_path: Path, text: str | bytes, message: str, window: int) -> None:
    path = write(tmp_path / "a.json", text)
    with pytest.raises(DataError, match=message) as caught:
        stream(path, "a", window=window)
    assert str(path) in str(caught.value)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(DataError, match=f"cannot read {path}"):
            stream(path, "a")


def test_a_value_above_the_limit_is_refused_before_the_file_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", '{"a": [1, "' + "x" * 100_000 + '"]}')
    assert len(stream(path, "a", window=16, largest=200_000)["a"]) == 2
    read: list[int] = []
    with pytest.raises(DataError, match=r"larger than 1,000 bytes.*\(byte 10, line 1\)"):
        stream(path, "a", window=16, largest=1000, progress=lambda done, _: read.append(done))
    assert read[-1] < 5000


def test_a_mistake_is_found_where_it_is_not_at_the_end(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", '{"a": [{"b" 1}, ' + "1, " * 100_000 + "1]}")
    read: list[int] = []
    with pytest.raises(DataError, match=r"Expecting ':' delimiter \(byte 12"):
        stream(path, "a", window=64, progress=lambda done, _: read.append(done))
    assert read[-1] <= 256


def test_progress_counts_bytes(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", json.dumps({"a": list(range(1000))}))
    calls: list[tuple[int, int]] = []
    stream(path, "a", window=100, progress=lambda done, total: calls.append((done, total)))
    size = path.stat().st_size
    assert calls[-1] == (size, size)
    assert all(a[0] < b[0] for a, b in itertools.pairwise(calls))
