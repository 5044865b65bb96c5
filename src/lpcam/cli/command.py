"""Declaration of the commands of ``lpcam``: each is one decorated function."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from lpcam.runtime.errors import LpcamError


class Lazy:
    """A module that is imported when one of its names is first used.

    PyTorch alone takes seconds, and ``lpcam --help`` needs none of it.
    """

    def __init__(self, module: str) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(import_module(self._module), name)


recipes = Lazy("lpcam.pipeline.recipe")
resources = Lazy("lpcam.runtime.resources")


@dataclass(frozen=True)
class Invocation:
    """How a command was called."""

    line: str
    """The whole command line, recorded with scores and in files."""
    changes: Mapping[str, Any]
    """Values of the recipe to replace, by dotted key."""
    given_threads: int | None

    @property
    def threads(self) -> int:
        """Number of threads: those of ``--threads``, else all that may be used."""
        return self.given_threads or int(resources.available_threads())


@dataclass(frozen=True)
class Argument:
    """An argument of a command, as ``ArgumentParser.add_argument`` takes it."""

    names: tuple[str, ...]
    settings: Mapping[str, Any]


def argument(*names: str, **settings: Any) -> Argument:
    """Declare an argument of a command."""
    return Argument(names, settings)


@dataclass(frozen=True)
class Command:
    """A command or, with a blank in its name, a subcommand."""

    name: str
    group: str
    help: str
    arguments: Sequence[Argument]
    work: Callable[..., int]
    recipe_values: bool = False
    """Whether ``--section.key value`` replaces values of a recipe."""


GROUPS = ("start", "look", "use", "exchange", "about")
COMMANDS: dict[str, Command] = {}
"""All commands by name, in the order of their declaration."""
PARENTS = {
    "data": "Check a data set, or make parts of one.",
    "import": "Read files of other programs.",
    "export": "Write masks, maps and models for other programs.",
}
"""Commands that have only subcommands."""


def command(
    name: str, group: str, *arguments: Argument, recipe_values: bool = False
) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Declare the decorated function as a command; its docstring is the help.

    Args:
        name: what is typed, such as ``run`` or ``data check``.
        group: one of `GROUPS`.
        arguments: its arguments. The function gets an `Invocation` and, by name, their values,
            except for that of ``--threads``.
        recipe_values: whether it takes ``--section.key value``.
    """

    def declare(work: Callable[..., int]) -> Callable[..., int]:
        text = " ".join((work.__doc__ or "").split())
        COMMANDS[name] = Command(name, group, text, arguments, work, recipe_values)
        return work

    return declare


# -- Values of arguments -------------------------------------------------------------------------


def positive(text: str) -> int:
    """A positive integer."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text!r}")
    return int(text)


def positive_number(text: str) -> float:
    """A positive number."""
    return _number(text, lambda value: 0 < value < math.inf, "a positive number")


def fraction(text: str) -> float:
    """A number from 0 to 1."""
    return _number(text, lambda value: 0 <= value <= 1, "a number from 0 to 1")


def _number(text: str, allowed: Callable[[float], bool], what: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not allowed(value):
        raise argparse.ArgumentTypeError(f"must be {what}, got {text!r}")
    return value


def names(text: str) -> list[str]:
    """Names separated by commas."""
    found = [name.strip() for name in text.split(",")]
    if not all(found):
        raise argparse.ArgumentTypeError(
            f"{text!r} has an empty name; separate names by commas, such as train,val"
        )
    return found


RUN = argument("run", type=Path, metavar="RUN", help="Folder of the run.")
THREADS = argument("--threads", type=positive, metavar="N", help="Number of CPU threads.")
DEVICE = argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
TRAINED_ON = argument(
    "--trained-on",
    choices=("lpcam", "cam", "given", "truth"),
    help="Masks that the segmenter was trained on (default: the first that the run has).",
)
SIZE = argument(
    "--size",
    type=int,
    nargs=2,
    metavar=("HEIGHT", "WIDTH"),
    help="Size of every image, in pixels (default: any size; UperNet needs one).",
)


def size_options(size: list[int] | None) -> dict[str, Any]:
    """Arguments of an exporter for the one size that was asked for, if any."""
    return {} if size is None else {"size": tuple(size), "dynamic": False}


# -- Values of recipes ---------------------------------------------------------------------------


def parse_changes(rest: Sequence[str]) -> dict[str, Any]:
    """Values of a recipe from ``--section.key value`` and ``--section.key=value``.

    Raises:
        LpcamError: naming the argument that is neither, or a value that is not YAML.

    Example:
        >>> parse_changes(["--lpcam.tau", "0.25", "--run.seed=3"])
        {'lpcam.tau': 0.25, 'run.seed': 3}
    """
    pairs: list[tuple[str, str]] = []
    words = iter(rest)
    for word in words:
        key, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--"):
            raise LpcamError(
                f"unexpected argument {word!r}; replace a recipe's value with --section.key value"
            )
        if not equals:
            following = next(words, None)
            if following is None:
                raise LpcamError(f"--{key} has no value; write --{key} VALUE")
            value = following
        pairs.append((key, value))
    return {key: recipes.parse_value(key, value) for key, value in pairs}
