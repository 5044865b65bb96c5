"""Files about the project that other programs and people read."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from lpcam.data.images import MAXIMUM_PIXELS
from lpcam.explain.serve.app import Limits
from lpcam.runtime.versions import __version__

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def citation() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    return found


def test_the_citation_has_what_its_format_requires(citation: dict[str, Any]) -> None:
    """Citation File Format 1.2.0, section "Valid keys": four keys, and those of a reference."""
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert citation["cff-version"] == "1.2.0"
    assert citation["version"] == __version__
    paper = citation["preferred-citation"]
    assert {"authors", "title", "type"} <= set(paper)
    assert paper["type"] == "conference-paper"
    for person in (*citation["authors"], *paper["authors"]):
        assert "name" in person or {"family-names", "given-names"} <= set(person)


def test_the_paper_is_that_of_the_readme(citation: dict[str, Any]) -> None:
    paper, readme = citation["preferred-citation"], (ROOT / "README.md").read_text("utf-8")
    plain = " ".join(readme.split())
    assert paper["title"] in plain
    assert str(paper["year"]) in plain
    for person in paper["authors"]:
        assert f"{person['given-names'][0]}. {person['family-names']}" in plain


def llms() -> ModuleType:
    spec = importlib.util.spec_from_file_location("llms", DOCS / "llms.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_list_for_programs_has_every_page_once() -> None:
    text = llms().llms_text(DOCS)
    targets = re.findall(r"^- \[[^\]]+\]\(([^)]+)\.html\): \S", text, re.MULTILINE)
    assert len(targets) == len(set(targets))
    pages = [*DOCS.glob("*.md"), *DOCS.glob("how-to/*.md"), *DOCS.glob("*/index.md")]
    wanted = {p.relative_to(DOCS).with_suffix("").as_posix() for p in pages} - {"index"}
    assert set(targets) == wanted
    assert text.startswith("# LPCAM\n\n> ")


def test_the_security_policy_names_the_limits_that_hold() -> None:
    text, limits = (ROOT / "SECURITY.md").read_text("utf-8"), Limits()
    assert f"{MAXIMUM_PIXELS // 10**6} megapixels" in text
    assert f"{limits.size // 2**20} MiB, {limits.seconds:g} s to arrive" in text
    assert f"{limits.waiting} waiting" in text
