"""Tables of labels: three forms of one table, and what the errors say of each."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest

from lpcam.data.labels import LabelRow, LabelTable, read_labels
from lpcam.runtime.errors import DataError

FORMS = {
    "labels.csv": "image,labels\na.jpg,cow\nbarn/b,\nc.png,cow;dog\n",
    "hot.csv": "image,cow,dog\na.jpg,1,0\nbarn/b,0,0\nc.png,1,1\n",
    "hot_2.CSV": "\ufefffilename, cow, dog\r\na.jpg, 1.0 ,False\r\nbarn/b,0.0,0\r\n"
    "c.png,TRUE,1\r\n",
    "labels.jsonl": '{"image": "a.jpg", "labels": ["cow"], "author": {"name": 1}}\n'
    '{"image": "barn/b", "labels": []}\n{"labels": ["cow", "dog"], "image": "c.png"}',
}


def write(folder: Path, name: str, text: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize("name", FORMS)
def test_three_forms_say_the_same(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, name, FORMS[name])
    first = 1 if name.endswith("jsonl") else 2
    assert read_labels(path) == LabelTable(
        path,
        (
            LabelRow(first, "a.jpg", ("cow",)),
            LabelRow(first + 1, "barn/b", ()),
            LabelRow(first + 2, "c.png", ("cow", "dog")),
        ),
        ("cow", "dog") if "hot" in name else None,
    )


def test_lines_are_those_of_the_file(tmp_path: Path) -> None:
    csv = write(tmp_path, "a.csv", '\nimage,labels\n\n"a",cow\n,\n"b\n",cow\nc,cow\n')
    assert [(r.line, r.image) for r in read_labels(csv).rows] == [(4, "a"), (7, "b"), (8, "c")]
    # U+2028 ends a line of text, not one of JSON
    lines = '\n{"image": "a\u2028b", "labels": []}\r\n\n{"image": "c", "labels": []}\n'
    jsonl = write(tmp_path, "a.jsonl", lines)
    rows = read_labels(jsonl).rows
    assert [(r.line, r.image) for r in rows] == [(2, "a\u2028b"), (4, "c")]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "image,labels\n .\\barn\\{0}.jpg,a\\{0} ; \n"),
        ("hot.csv", "image, a\\{0}\nbarn\\{0}.jpg,1\n"),
        ("a.jsonl", '{{"image": " barn\\\\{0}.jpg", "labels": ["a\\\\{0} ", ""]}}'),
    ],
)
def test_names_have_one_unicode_form_and_those_of_images_slashes(
    tmp_path: Path, name: str, text: str
) -> None:
    text = text.format(unicodedata.normalize("NFD", "kälbchen"))
    (row,) = read_labels(write(tmp_path, name, text)).rows
    assert (row.image, row.labels) == ("barn/kälbchen.jpg", ("a\\kälbchen",))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "image\nx\n", "line 1 .*'image'"),
        ("a.csv", "name,cow\nx,1\n", "line 1 .*'name,cow'"),
        ("a.csv", "image,cow,cow\nx,1,1\n", "line 1: .*cow"),
        ("a.csv", "image,cow,dog\nx,1\n", "line 2 .* 2 .* 3"),
        ("a.csv", "image,cow,dog\nx,1,0\ny,1,2\n", "line 3 has '2' in the column 'dog'"),
        ("a.csv", "image,cow\nx,\n", "line 2 has '' in the column 'cow'"),
        ("a.csv", "image,breed\nx,cow\n", "'cow' in the column 'breed'.* call it 'labels'"),
        ("a.csv", "image,cow\n../x,1\n", r"line 2: .*'\.\./x'"),
        ("a.csv", "image,cow\n", "names no image"),
        ("a.jsonl", "", "names no image"),
        ("a.jsonl", '\n{"image": "x"', "line 2 is not JSON"),
        ("a.jsonl", '["x", ["cow"]]', "line 1 .*'image'"),
        ("a.jsonl", '{"image": "x"}', "line 1 .*'labels'"),
        ("a.jsonl", '{"image": "x", "labels": [1]}', "'labels'"),
        ("a.jsonl", '{"image": "x", "labels": ["\\ud800"]}', "'labels'"),
        ("a.jsonl", '{"image": "/x", "labels": []}', "line 1: .*'/x'"),
        ("a.jsonl", b'{"image": "\xff"}', "UTF-8"),
        ("a.json", "[]", r"\.csv, .*\.jsonl"),
    ],
)
def test_wrong_tables(tmp_path: Path, name: str, text: str | bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_labels(write(tmp_path, name, text))
