"""The command that lists the prototypes of a run and corrects them: prototypes."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path
from typing import Any

import lpcam
from lpcam.cli.command import RUN, Argument, Invocation, Lazy, command

choices = Lazy("lpcam.method.choices")
reports = Lazy("lpcam.report.prototypes")

CENTRES = re.compile(r"(.+?)(:context)?:(\d+(?:,\d+)*)(?:=(.*))?")
SHOWN = 12  #: Centres of each class and side that are listed, unless all are asked for.


def _centres(text: str) -> list[dict[str, Any]]:
    """Centres and perhaps their name: CLASS:NUMBER,NUMBER=NAME or CLASS:context:NUMBER."""
    found = CENTRES.fullmatch(text)
    if found is None:
        raise argparse.ArgumentTypeError(
            f"must be CLASS:NUMBER,NUMBER or CLASS:context:NUMBER, such as train:3,7, got {text!r}"
        )
    class_name, context, numbers, name = found.groups()
    own = {"class_name": class_name, "side": "context" if context else "foreground", "name": name}
    return [{**own, "index": int(number)} for number in numbers.split(",")]


def _option(name: str, text: str, metavar: str = "CLASS:N,N") -> Argument:
    own: dict[str, Any] = {"type": _centres, "action": "extend", "default": []}
    return Argument(name, metavar=metavar, help=text, **own)


@command(
    "prototypes",
    RUN,
    _option("--drop", "Leave prototypes out, e.g. train:3,7 or train:context:2."),
    _option("--move", "Count foreground prototypes as context."),
    _option("--keep", "Use centres as prototypes, whatever rejected them."),
    _option("--name", "Name what prototypes show, e.g. train:4=head.", "CLASS:N=NAME"),
    Argument("--reason", default="", help="Reason of these choices, for the file."),
    Argument("--all", action="store_true", dest="every", help="List all centres of each class."),
    group="look",
)
def prototypes(call: Invocation, run: Path, reason: str, every: bool, **options: Any) -> int:
    """List the prototypes of a run, or correct them in its prototypes.yaml."""
    actions = {"drop": "drop", "move": "context", "keep": "keep", "name": None}
    made = [
        choices.Choice(**centre, action=action, reason=reason)
        for option, action in actions.items()
        for centre in options[option]
    ]
    folder = lpcam.RunFolder(run)
    found = folder.choose(made)
    if made:
        print(
            "\n".join(
                f"{one.class_name} {one.side} {one.index}: {one.told}" for one in found.choices
            )
        )
        recipe, at, path = (shlex.quote(str(p)) for p in (folder.recipe, run, folder.choices))
        print(f"\nwrote {path}\nnext: lpcam run {recipe} --run.folder {at} --lpcam.choices {path}")
        return 0
    settings, chosen = folder.load_recipe().lpcam, {one.place: one for one in found.choices}
    for index, name in enumerate(found.classes):
        for side in reports.SIDES:
            centers = getattr(found, side)
            total, kept = int((centers.sizes[index] > 0).sum()), int(centers.keep[index].sum())
            print(f"{name}, {side}: {kept} prototypes of {total} centres")
            for number in reports.shown_numbers(centers, index, total if every else SHOWN):
                score, size = (
                    float(centers.scores[index, number]),
                    int(centers.sizes[index, number]),
                )
                choice, is_kept = (
                    chosen.get((name, side, number)),
                    bool(centers.keep[index, number]),
                )
                words = [reports.rule_of(side, score, is_kept, settings, choice)]
                words += filter(None, [centers.fire_text(index, number)])
                words += [f"name {choice.name}"] if choice and choice.name else []
                picture = folder.patch(index, side, number)
                words += [str(picture)] if picture.is_file() else []
                state = "kept" if is_kept else "-"
                print(f"  {number:>4}  {state:<5}{size:>6}  {'  '.join(words)}")
    return 0
