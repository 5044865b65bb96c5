"""The report of an experiment: tables as text, Markdown and LaTeX, plots as SVG, and a page."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from lpcam.explain.web import page_environment, page_file
from lpcam.report.page import digest

Record = Mapping[str, Any]
Line = tuple[str, Sequence[tuple[float, float, float]]]
"""Name and points of a line of a plot: x, y and half the length of the error bar."""
WIDTH, HEIGHT = 460, 300  #: Size of a plot's view box.
LEFT, RIGHT, TOP, BOTTOM = 46, 14, 14, 58  #: Margins around the lines; the key is below.
SCORES = {"miou": "mIoU", "fp": "FP", "fn": "FN", "precision": "Precision", "recall": "Recall"}
COLOURS = ("#44709c", "#ae2e5c", "#2d7a6b", "#8a6d0b", "#6a4bb0", "#6b6570")
MARGIN = 0.06  #: Share of the range of values that is left free above and below the lines.


def percent(value: Record | None, *, signed: bool = False) -> str:
    """Mean and standard deviation of a score in percent, such as "45.2 ± 0.3".

    Example:
        >>> percent({"mean": 0.4517, "sd": 0.0031, "n": 3})
        '45.2 ± 0.3'
    """
    if value is None:
        return "–"
    text = f"{100 * value['mean']:{'+' if signed else ''}.1f}"
    return text if value["sd"] is None else f"{text} ± {100 * value['sd']:.1f}"


def table(results: Record) -> tuple[list[str], list[list[str]]]:
    """Head and cells of the table of an experiment, as text.

    A difference follows the score of what is compared, and the paper's figure with ours minus it.
    """
    rows, columns = results["rows"], results["columns"]
    compared = any(row["against"] for row in rows)
    published = [c for c in columns if any(c in row["published"] for row in rows)]
    several = len({row["arm"] for row in rows} | {row["arm"] for row in results["failed"]}) > 1
    head = [*(["Arm"] if several else []), "Method", "Threshold"]
    for column in columns:
        head += [SCORES[column], *(["difference"] if compared else [])]
        head += ["paper", "ours − paper"] if column in published else []
    lines = []
    for row in rows:
        threshold = row["threshold"]
        line = [*([row["arm"]] if several else []), row["method"]]
        line.append("–" if threshold is None else f"{threshold['mean']:.2f}")
        for column in columns:
            value, paper = row["values"][column], row["published"].get(column)
            line.append(percent(value))
            if compared:
                line.append(percent(row["difference"][column], signed=True))
            if column in published:
                line.append("–" if paper is None else f"{100 * paper:.1f}")
                line.append("–" if paper is None else f"{100 * (value['mean'] - paper):+.1f}")
        lines.append(line)
    for one in results["failed"]:
        reason = f"seed {one['seed']} failed: {' '.join(one['reason'].split())}"
        cells = [*([one["arm"]] if several else []), reason]
        lines.append([*cells, *["–"] * (len(head) - len(cells))])
    return head, lines


def markdown(results: Record) -> str:
    """The table in Markdown, with the conditions below it."""
    head, lines = table(results)
    rule = ["---"] * len(head)
    rows = [
        "| " + " | ".join(cell.replace("|", "\\|") for cell in one) + " |"
        for one in [head, rule, *lines]
    ]
    return "\n".join([*rows, "", conditions(results), ""])


def latex(results: Record) -> str:
    """The table in LaTeX, for the package booktabs."""
    head, lines = table(results)

    def row(cells: Sequence[str]) -> str:
        return " & ".join(map(_latex_text, cells)) + r" \\"

    columns = "l" * (len(head) - sum(name != "Arm" for name in head) + 1)
    columns += "r" * (len(head) - len(columns))
    body = [r"\toprule", row(head), r"\midrule", *map(row, lines), r"\bottomrule"]
    start, end = rf"\begin{{tabular}}{{{columns}}}", r"\end{tabular}"
    return "\n".join([f"% {conditions(results)}", start, *body, end, ""])


def _latex_text(text: str) -> str:
    for sign, written in (("\\", r"\textbackslash{}"), ("_", r"\_"), ("%", r"\%"), ("&", r"\&")):
        text = text.replace(sign, written)
    return text.replace("±", r"$\pm$").replace("−", "$-$").replace("–", "--")


def conditions(results: Record) -> str:
    """What the figures were measured under, in one line."""
    if not results["rows"]:
        return f"{results['title']}. No arm was scored."
    row = results["rows"][0]
    protocol = row["protocol"]
    sources = {"ground truth": "the best one by the truth of these images"}
    rules = [r for one in results["rows"] if (r := one["threshold_source"])]
    threshold = ", ".join(dict.fromkeys(sources.get(r, r) for r in rules)) or "none"
    crf = ", ".join(
        dict.fromkeys(str(one["protocol"].get("crf") or "none") for one in results["rows"])
    )
    facts = {
        "data": f"{protocol['dataset']}, {protocol['split']}, {row['images']} images",
        "labels": protocol["labels"],
        "scales": protocol.get("scales"),
        "flip": protocol.get("flip"),
        "threshold": threshold,
        "CRF": crf,
        "void": protocol["void"],
        "seeds": row["seeds"],
        "command": results["command"],
        "version": results["versions"].get("lpcam"),
    }
    told = "; ".join(f"{name}: {value}" for name, value in facts.items())
    return (
        f"{results['title']} ({results['size']}). Percent, mean ± standard deviation over seeds; "
        f"FP and FN are shares of the union, means over classes without the background; {told}."
    )


def svg(title: str, axis: str, lines: Sequence[Line], *, unit: str = "mIoU, %") -> str:
    """A plot as a file of SVG: lines with error bars; the y axis spans the values only.

    Args:
        lines: x, y and half an error bar of each point, in the units of the axes.
    """
    points = [point for _, own in lines for point in own]
    low, high = min(y - e for _, y, e in points), max(y + e for _, y, e in points)
    margin = MARGIN * (high - low) or 1.0
    low, high = low - margin, high + margin
    left, right = min(x for x, _, _ in points), max(x for x, _, _ in points)
    across = _scale(left, right if right > left else left + 1, LEFT, WIDTH - RIGHT)
    up = _scale(low, high, HEIGHT - BOTTOM, TOP)
    drawn = [
        {
            "name": name,
            "colour": COLOURS[place % len(COLOURS)],
            "points": [(across(x), up(y), up(y - e), up(y + e)) for x, y, e in own],
            "few": len(own) <= 24,
        }
        for place, (name, own) in enumerate(lines)
    ]
    xs = sorted({x for x, _, _ in points})
    columns = xs if len(xs) <= 12 else _ticks(left, right)
    return (
        page_environment()
        .get_template("plot.svg.jinja")
        .render(
            title=title,
            axis=axis,
            unit=unit,
            lines=drawn,
            rows=[(up(y), f"{y:g}") for y in _ticks(low, high)],
            columns=[(across(x), f"{x:g}") for x in columns],
            box={
                "width": WIDTH,
                "height": HEIGHT,
                "left": LEFT,
                "right": WIDTH - RIGHT,
                "bottom": HEIGHT - BOTTOM,
            },
        )
    )


def bars(title: str, names: Sequence[str], groups: Mapping[str, Sequence[float]]) -> str:
    """Bars as SVG: for each name one of every group (at most two), with its value in [0, 1]."""
    template = page_environment().get_template("bars.svg.jinja")
    return template.render(title=title, names=names, groups=groups, colours=COLOURS)


def _scale(start: float, end: float, low: float, high: float) -> Callable[[float], float]:
    return lambda value: round(low + (value - start) / (end - start) * (high - low), 1)


def _ticks(low: float, high: float) -> list[float]:
    """Four to nine round values from low to high."""
    power = 10.0 ** math.floor(math.log10((high - low) / 4))
    step = next(n * power for n in (1, 2, 2.5, 5, 10) if (high - low) / (n * power) <= 8)
    first = math.ceil(low / step)
    return [round(n * step, 10) for n in range(first, math.floor(high / step) + 1)]


def page(results: Record, plots: Sequence[Mapping[str, str]], links: Mapping[str, str]) -> str:
    """The report of an experiment: one self-contained HTML page.

    Args:
        plots: ``title`` of each plot, and ``svg`` or ``picture`` (a data URI).
        links: address of the report of each run that has one, by the run's name.
    """
    style, script = page_file("page.css"), page_file("sort.js")
    head, lines = table(results)
    policy = (
        f"default-src 'none'; img-src data:; style-src '{digest(style)}'; "
        f"script-src '{digest(script)}'; base-uri 'none'; form-action 'none'"
    )
    return (
        page_environment()
        .get_template("experiment.html.jinja")
        .render(
            results=results,
            policy=policy,
            style=Markup(style),
            script=Markup(script),
            head=head,
            lines=lines,
            conditions=conditions(results),
            plots=[
                {"picture": None, **one, "svg": Markup(one["svg"]) if "svg" in one else None}
                for one in plots
            ],
            links=links,
            percent=percent,
        )
    )
