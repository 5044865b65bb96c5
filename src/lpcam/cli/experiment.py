"""The command that compares runs: experiment."""

from __future__ import annotations

import sys
from pathlib import Path

from lpcam.cli.command import Argument, Invocation, Lazy, command, positive

definition = Lazy("lpcam.pipeline.experiments.definition")
dry_runs = Lazy("lpcam.pipeline.experiments.dry_run")
writing = Lazy("lpcam.pipeline.experiments.writing")
report = Lazy("lpcam.report.experiment")
console = Lazy("rich.console")
tables = Lazy("rich.table")


def _seeds(text: str) -> list[int]:
    return [int(one) for one in text.split(",")]


@command(
    "experiment",
    Argument("name", nargs="?", help="A bundled experiment, or an experiment's YAML file."),
    Argument("recipe", nargs="?", help="Recipe to run instead of that of the size."),
    Argument("--list", action="store_true", dest="listed", help="List the bundled experiments."),
    Argument(
        "--size",
        choices=("official", "light", "tiny"),
        default="light",
        help="What it runs on: the paper's data on a GPU, photographs on a CPU, or drawings "
        "(default: light).",
    ),
    Argument("--folder", type=Path, help="Folder (default: runs/experiments/NAME-SIZE)."),
    Argument("--seeds", type=_seeds, metavar="N,N", help="Random seeds (default: the size's)."),
    Argument("--processes", type=positive, default=1, metavar="N", help="Runs beside each other."),
    Argument(
        "--dry-run",
        action="store_true",
        help="Check that every arm can be built, and estimate time, memory and disk.",
    ),
    Argument("--yes", action="store_true", help="Go on although there are more than 200 runs."),
    group="look",
    recipe_values=True,
)
def experiment(
    call: Invocation,
    name: str | None,
    recipe: str | None,
    listed: bool,
    size: str,
    folder: Path | None,
    seeds: list[int] | None,
    processes: int,
    dry_run: bool,
    yes: bool,
) -> int:
    """Compare runs with changed settings: the paper's tables and figures, or your own."""
    if listed or name is None:
        for one in definition.bundled_experiments():
            made = definition.load_experiment(one)
            print(f"{one:<16}{made.source or '–':<10}{', '.join(made.sizes):<24}{made.title}")
        return 0
    place = folder or Path("runs/experiments") / f"{Path(name).stem}-{size}"
    how = {"recipe": recipe, "changes": dict(call.changes), "seeds": seeds}
    if dry_run:
        loaded = definition.load_experiment(name)
        print(dry_runs.describe(definition.plan(loaded, size, place, **how)))
        return 0
    most = None if yes else definition.MOST_ARMS
    run = writing.run_experiment
    results = run(name, size, place, **how, processes=processes, command=call.line, most=most)
    head, lines = report.table(results)
    table = tables.Table(*head, title=results["title"])
    for line in lines:
        table.add_row(*line)
    console.Console(width=None if sys.stdout.isatty() else 160).print(table)
    print(f"{report.conditions(results)}\nresults in {place}\nreport in {place / 'report.html'}")
    return 1 if results["failed"] else 0
