"""The drawn file is one of COCO, contenders agree, and the table is printed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import coco_index


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert coco_index.main(["--quick"]) == 0
    printed = capsys.readouterr().out
    assert "## COCO index" in printed
    assert "60 images, 400 annotations" in printed
    assert "| lpcam | 60, " in printed
    assert ("| pycocotools | 60, " in printed) == ("Painting: 59 masks" in printed)


def test_contenders_find_the_same_labels(tmp_path: Path) -> None:
    pytest.importorskip("pycocotools", reason="pip install 'lpcam[coco]'")
    path = coco_index.draw(tmp_path, 50, 300)
    content = json.loads(path.read_text("utf-8"))
    assert (len(content["images"]), len(content["annotations"])) == (50, 300)
    assert {one["iscrowd"] for one in content["annotations"]} == {0, 1}
    ours, theirs = coco_index.ours(str(path)), coco_index.theirs(str(path))
    assert ours["images"] == theirs["images"] == 50
    assert ours["labels"] == theirs["labels"] > 50
