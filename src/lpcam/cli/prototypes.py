"""The command that lists the prototypes of a run and corrects them: prototypes."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lpcam
from lpcam.cli.command import RUN, Argument, Invocation, Lazy, command

if TYPE_CHECKING:
    from lpcam.method.prototypes import Prototypes

choices = Lazy("lpcam.method.choices")
reports = Lazy("lpcam.report.prototypes")

PLACES = re.compile(r"(?P<name>.+?)(?P<context>:context)?:(?P<numbers>\d+(,\d+)*)")
SHOWN = 12  #: Prototypes of each class and side that are listed, unless all are asked for.


def _places(text: str) -> list[dict[str, Any]]:
    """Centres as arguments of a `Choice`, from ``CLASS:NUMBER,...`` or ``CLASS:context:NUMBER``."""
    found = PLACES.fullmatch(text)
    if found is None:
        raise argparse.ArgumentTypeError(
            f"must be CLASS:NUMBER,NUMBER or CLASS:context:NUMBER, such as train:3,7, got {text!r}"
        )
    side = "context" if found["context"] else "foreground"
    return [
        {"class_name": found["name"], "side": side, "index": int(number)}
        for number in found["numbers"].split(",")
    ]


def _named(text: str) -> list[dict[str, Any]]:
    """Centres and their name, from ``CLASS:NUMBER,...=NAME``."""
    places, equals, name = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"must be CLASS:NUMBER=NAME, got {text!r}")
    return [{**place, "name": name.strip()} for place in _places(places)]


def _option(name: str, text: str, of: Any = _places, metavar: str = "CLASS:N,N") -> Argument:
    return Argument(name, type=of, action="append", default=[], metavar=metavar, help=text)


@command(
    "prototypes",
    RUN,
    _option("--drop", "Leave prototypes out, e.g. train:3,7 or train:context:2."),
    _option("--move", "Count foreground prototypes as context."),
    _option("--keep", "Use centres as prototypes, whatever rejected them."),
    _option("--name", "Name what prototypes show, e.g. train:4=head.", _named, "CLASS:N=NAME"),
    Argument("--reason", default="", help="Reason of these choices, for the file."),
    Argument("--all", action="store_true", dest="every", help="List all centres of each class."),
    group="look",
)
def prototypes(
    call: Invocation,
    run: Path,
    drop: Sequence[Any],
    move: Sequence[Any],
    keep: Sequence[Any],
    name: Sequence[Any],
    reason: str,
    every: bool,
) -> int:
    """List the prototypes of a run, or correct them in its prototypes.yaml."""
    given = [("drop", drop), ("context", move), ("keep", keep), (None, name)]
    made = [
        choices.Choice(**place, action=action, reason=reason)
        for action, options in given
        for places in options
        for place in places
    ]
    folder = lpcam.RunFolder(run)
    found = folder.choose(made)
    if not made:
        _print(folder, found, every)
        return 0
    for one in found.choices:
        print(f"{one.class_name} {one.side} {one.index}: {one.told}")
    recipe, at, path = (shlex.quote(str(p)) for p in (folder.recipe, run, folder.choices))
    print(f"\nwrote {path}")
    print(f"next: lpcam run {recipe} --run.folder {at} --lpcam.choices {path}")
    return 0


def _print(folder: lpcam.RunFolder, found: Prototypes, every: bool) -> None:
    """Print the centres of each class with score, size, choice and the file of their picture."""
    settings, chosen = folder.load_recipe().lpcam, {one.place: one for one in found.choices}
    for index, name in enumerate(found.classes):
        for side in reports.SIDES:
            centers = getattr(found, side)
            total, kept = int((centers.sizes[index] > 0).sum()), int(centers.keep[index].sum())
            print(f"{name}, {side}: {kept} prototypes of {total} centres")
            for number in reports.shown_numbers(centers, index, total if every else SHOWN):
                score, size = float(centers.scores[index, number]), centers.sizes[index, number]
                is_kept = bool(centers.keep[index, number])
                choice = chosen.get((name, side, number))
                words = [reports.rule_of(side, score, is_kept, settings, choice)]
                words += [f"name {choice.name}"] if choice and choice.name else []
                picture = folder.patch(index, side, number)
                words += [str(picture)] if picture.is_file() else []
                state = "kept" if is_kept else "-"
                print(f"  {number:>4}  {state:<5}{int(size):>6}  {'  '.join(words)}")
