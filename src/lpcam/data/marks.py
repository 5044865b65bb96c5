"""Marks of data sets of other tools: what they are, and how LPCAM can use them."""

from __future__ import annotations

import re
from contextlib import suppress
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

FOREIGN_FILES: dict[str, Any] = yaml.safe_load(
    resources.files("lpcam.data").joinpath("foreign_files.yaml").read_text("utf-8")
)
"""What is known of other tools' files: ``marks``, and image files that are ``unread``."""
_OPENED = 5  # files whose contents are looked at for a mark


def other_format(path: Path) -> str:
    """Text that names the format of a folder's or file's marks and what to do; empty if none."""
    root, names = (path, _names(path)) if path.is_dir() else (path.parent, [path.name])
    for mark in FOREIGN_FILES["marks"]:
        contents = mark.get("contents")
        found = [[m for n in names if (m := re.search(p, n))] for p in mark["paths"]]
        for match in found[0][:_OPENED] if all(found) else ():
            if not contents or re.search(contents.encode(), _head(root / match.string)):
                folder = f"{root}/{match[1] or ''}" if match.groups() else ""
                return (
                    f"{match.string} is of {mark['name']}; {mark['advice'].replace('{}', folder)}"
                )
    return ""


def _names(root: Path) -> list[str]:
    """Paths of visible files below a folder."""
    paths = (path.relative_to(root) for path in sorted(root.rglob("*")) if path.is_file())
    return [p.as_posix() for p in paths if not any(part.startswith(".") for part in p.parts)]


def _head(path: Path) -> bytes:
    with suppress(OSError), path.open("rb") as file:
        return file.read(1 << 16)
    return b""
