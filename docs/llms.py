"""``llms.txt`` of the site: every page with its address and one line, for programs that read it.

The lines are those of the tables in ``index.md`` and ``how-to.md``, so that nothing is kept twice.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

_ROW = re.compile(r"^\| *(.*?) *\| *(.*?) *\|$", re.MULTILINE)
_LINK = re.compile(r"\[([^\]]+)\]\(([^)#]+)\.md\)")


def llms_text(docs: Path) -> str:
    """Text of ``llms.txt``: title, summary, and the pages below a heading for each table."""
    index = (docs / "index.md").read_text("utf-8")
    title, summary = (part.strip() for part in index.split("\n\n")[:2])
    parts = [title, "> " + " ".join(summary.split())]
    for heading, name in (("Documentation", "index.md"), ("How to", "how-to.md")):
        lines = []
        for cells in _ROW.findall((docs / name).read_text("utf-8")):
            for cell, other in (cells, cells[::-1]):
                if (link := _LINK.fullmatch(cell)) is not None:
                    about = _LINK.sub(r"\1", other)
                    lines.append(f"- [{link[1]}]({link[2]}.html): {about}")
        parts.append("\n".join([f"## {heading}", "", *lines]))
    return "\n\n".join(parts) + "\n"


def write_llms(app: Any, problem: Exception | None) -> None:
    """Write ``llms.txt`` beside the pages; called by Sphinx at the end of a build."""
    if problem is None and app.builder.format == "html":
        (Path(app.outdir) / "llms.txt").write_text(llms_text(Path(app.srcdir)), "utf-8")


def setup(app: Any) -> dict[str, bool]:
    """Called by Sphinx."""
    app.connect("build-finished", write_llms)
    return {"parallel_read_safe": True}
