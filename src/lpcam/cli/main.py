"""Command-line interface: parses the arguments, calls a command and reports errors."""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import sys
from collections.abc import Sequence

from lpcam.cli import (  # noqa: F401 - they declare the commands
    data,
    doctor,
    experiment,
    explain,
    export,
    prototypes,
    run,
)
from lpcam.cli.command import COMMANDS, GROUPS, PARENTS, Command, Invocation, parse_changes
from lpcam.runtime.errors import LpcamError
from lpcam.runtime.versions import __version__

DESCRIPTION = (
    "Object masks from image-level labels, with class activation maps that show the whole object "
    "(LPCAM)."
)
RECIPE_VALUES = (
    "Any value of the recipe can be replaced: --section.key value, e.g. --lpcam.tau 0.25 "
    "--run.folder runs/try. Values are YAML; 'lpcam recipe --fields' lists all keys."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the ``lpcam`` command.

    Returns the exit status: 0, 1 if images were skipped, 2 for an error, 130 if it was interrupted.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = _parser()
    options, rest = parser.parse_known_args(joined(given))
    command: Command = options.work
    if rest and not command.recipe_values:
        parser.error(f"unknown arguments: {' '.join(rest)}")
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        values = {name: value for name, value in vars(options).items() if name != "work"}
        line = shlex.join(["lpcam", *given])
        call = Invocation(line, parse_changes(rest), values.pop("threads", None))
        return command.work(call, **values)
    except LpcamError as error:
        print(f"lpcam: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of a pipe, such as head, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        resumes = command.recipe_values or command.name == "demo"
        print(
            "lpcam: stopped" + ("; run the same command again to resume" if resumes else ""),
            file=sys.stderr,
        )
        return 130


def joined(given: Sequence[str]) -> list[str]:
    """The words with each value of a recipe joined to its key, as argparse does not know those."""
    command = COMMANDS.get(given[0]) if given else None
    if command is None or not command.recipe_values:
        return list(given)
    own = {name for one in command.arguments for name in one.names} | {"--help"}
    words: list[str] = []
    for word in given:
        last = words[-1] if words else ""
        if last.startswith("--") and "=" not in last and last not in own and word[:2] != "--":
            words[-1] = f"{last}={word}"
        else:
            words.append(word)
    return words


class _Parser(argparse.ArgumentParser):
    """A parser whose help lists the commands in groups."""

    def format_help(self) -> str:
        shown = [(c.group, n, c.help) for n, c in COMMANDS.items() if " " not in n]
        shown += [("exchange", name, text) for name, text in PARENTS.items()]
        lines = [self.format_usage(), DESCRIPTION, ""]
        for group in GROUPS:
            lines.append(f"{group}:")
            lines += [f"  {name:<13}{text}" for own, name, text in shown if own == group]
            lines.append("")
        lines.append("lpcam COMMAND --help shows the arguments of a command.")
        return "\n".join(lines) + "\n"


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="lpcam", usage="lpcam [--version] COMMAND ...")
    parser.add_argument("--version", action="version", version=f"lpcam {__version__}")
    top = parser.add_subparsers(
        required=True, metavar="COMMAND", parser_class=argparse.ArgumentParser
    )
    groups = {
        name: top.add_parser(name, help=text, description=text).add_subparsers(
            required=True, metavar="WHAT"
        )
        for name, text in PARENTS.items()
    }
    for found in COMMANDS.values():
        parent, _, last = found.name.rpartition(" ")
        own = (groups[parent] if parent else top).add_parser(
            last,
            help=found.help,
            description=found.help,
            epilog=RECIPE_VALUES if found.recipe_values else None,
            allow_abbrev=False,
        )
        for one in found.arguments:
            own.add_argument(*one.names, **one.settings)
        own.set_defaults(work=found)
    return parser
