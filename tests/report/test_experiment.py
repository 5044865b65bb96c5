"""Tables, plots and the page of an experiment."""

from __future__ import annotations

import copy
import xml.etree.ElementTree as ET
from typing import Any

import pytest

from lpcam.report import experiment as report

ROW = {
    "arm": "a",
    "method": "CAM",
    "stage": "seed",
    "images": 5,
    "threshold": {"mean": 0.25, "sd": None, "n": 1},
    "threshold_source": "ground truth",
    "seeds": [0],
    "runs": ["a-seed0"],
    "values": {"miou": {"mean": 0.4051, "sd": 0.0049, "n": 2}},
    "against": None,
    "difference": {"miou": None},
    "published": {},
    "protocol": {"dataset": "d", "split": "all", "labels": "labels.csv", "void": "255"},
}


@pytest.fixture
def results() -> dict[str, Any]:
    lpcam = copy.deepcopy(ROW) | {"method": "LPCAM <b>", "against": "a / CAM", "arm": "b_1"}
    lpcam["difference"] = {"miou": {"mean": -0.021, "sd": 0.001, "n": 2}}
    lpcam["published"] = {"miou": 0.488}
    return {
        "title": "Own",
        "about": "About.",
        "source": "Table 1",
        "size": "tiny",
        "command": "lpcam experiment own",
        "columns": ["miou"],
        "rows": [ROW, lpcam],
        "arms": [{"name": "a", "changes": {}}, {"name": "b_1", "changes": {"lpcam.tau": 0.1}}],
        "failed": [{"arm": "c", "seed": 1, "reason": "no\nspace"}],
        "times": [{"arm": "a", "seed": 0, "run": "a-seed0"}],
        "widths": {"a / CAM": {"best": 0.4, "from": 0.2, "to": 0.3, "width": 0.1}},
        "clustering_over_training": 0.5,
        "versions": {"lpcam": "1"},
    }


def test_a_table_has_differences_and_the_papers_figures(results: dict[str, Any]) -> None:
    head, lines = report.table(results)
    assert head == ["Arm", "Method", "Threshold", "mIoU", "difference", "paper", "ours − paper"]
    assert lines[0] == ["a", "CAM", "0.25", "40.5 ± 0.5", "–", "–", "–"]
    assert lines[1][3:] == ["40.5 ± 0.5", "-2.1 ± 0.1", "48.8", "-8.3"]
    assert lines[2][:2] == ["c", "seed 1 failed: no space"]
    assert len({len(line) for line in lines}) == 1


def test_markdown_and_latex_escape_what_they_must(results: dict[str, Any]) -> None:
    results["rows"][1]["method"] = "a|b"
    assert "a\\|b" in report.markdown(results)
    text = report.latex(results)
    assert r"b\_1" in text
    assert r"40.5 $\pm$ 0.5" in text
    assert text.count(r" \\") == 4
    assert "tabular}{llrrrrr}" in text


def test_conditions_say_how_the_figures_were_made(results: dict[str, Any]) -> None:
    told = report.conditions(results)
    for part in ("d, all, 5 images", "labels.csv", "lpcam experiment own", "CRF: none"):
        assert part in told


def test_a_plot_places_points_and_error_bars() -> None:
    text = report.svg("<title>", "tau", [("LPCAM", [(0.1, 40.0, 1.0), (0.3, 44.0, 0.0)])])
    root = ET.fromstring(text)
    space = "{http://www.w3.org/2000/svg}"
    (line,) = root.findall(f"{space}polyline")
    (x1, y1), (x2, y2) = (map(float, pair.split(",")) for pair in line.get("points", "").split())
    assert x1 < x2
    assert y1 > y2  # a higher value is further up
    assert len(root.findall(f"{space}circle")) == 2
    assert len(root.findall(f"{space}path")) == 1


def test_a_page_escapes_and_links_the_reports_of_runs(results: dict[str, Any]) -> None:
    plots = [{"title": "tau", "text": "", "svg": "<svg></svg>"}]
    page = report.page(results, plots, {"a-seed0": "runs/a-seed0/report.html"})
    assert "LPCAM &lt;b&gt;" in page
    assert '<a href="runs/a-seed0/report.html">seed 0</a>' in page
    assert "http" not in page.replace("http://www.w3.org", "").replace("http-equiv", "")
