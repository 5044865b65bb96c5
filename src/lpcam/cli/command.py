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
    """The command line of a call, and the recipe values that it replaces."""

    line: str  #: The whole command line, recorded with scores and in files.
    changes: Mapping[str, Any]  #: Values of the recipe to replace, by dotted key.
    given_threads: int | None

    @property
    def threads(self) -> int:
        """Number of threads: those of ``--threads``, else all that may be used."""
        return self.given_threads or int(resources.available_threads())


class Argument:
    """An argument of a command, as ``ArgumentParser.add_argument`` takes it."""

    def __init__(self, *names: str, **settings: Any) -> None:
        self.names = names
        self.settings = settings


@dataclass(frozen=True)
class Command:
    """A command or, with a blank in its name, a subcommand."""

    name: str
    group: str
    help: str
    arguments: Sequence[Argument]
    work: Callable[..., int]
    recipe_values: bool = False  #: Whether ``--section.key value`` replaces values of a recipe.


GROUPS = ("start", "look", "use", "exchange", "about")
COMMANDS: dict[str, Command] = {}  #: All commands by name, in the order of their declaration.
PARENTS = {
    "data": "Check a data set, or make parts of one.",
    "import": "Read files of other programs.",
    "export": "Write masks, maps and models for other programs.",
}
"""Commands that have only subcommands."""


def command(
    name: str, *arguments: Argument, group: str = "exchange", recipe_values: bool = False
) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Declare a function of `Invocation` and arguments as a command; its docstring is the help."""

    def declare(work: Callable[..., int]) -> Callable[..., int]:
        text = " ".join((work.__doc__ or "").split())
        COMMANDS[name] = Command(name, group, text, arguments, work, recipe_values)
        return work

    return declare


def positive(text: str) -> int:
    """A positive integer."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text!r}")
    return int(text)


def _number(allowed: Callable[[float], bool], what: str) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not allowed(value):
            raise argparse.ArgumentTypeError(f"must be {what}, got {text!r}")
        return value

    return parse


positive_number = _number(lambda value: 0 < value < math.inf, "a positive number")
fraction = _number(lambda value: 0 <= value <= 1, "a number from 0 to 1")


def names(text: str) -> list[str]:
    """Names separated by commas."""
    found = [name.strip() for name in text.split(",")]
    if not all(found):
        raise argparse.ArgumentTypeError(
            f"{text!r} has an empty name; separate names by commas, such as train,val"
        )
    return found


RUN = Argument("run", type=Path, metavar="RUN", help="Folder of the run.")
THREADS = Argument("--threads", type=positive, metavar="N", help="Number of CPU threads.")
DEVICE = Argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
TRAINED_ON = Argument(
    "--trained-on",
    choices=("lpcam", "cam", "given", "truth"),
    help="Masks that the segmenter was trained on (default: the first that the run has).",
)


def parse_changes(rest: Sequence[str]) -> dict[str, Any]:
    """Values of a recipe from ``--section.key value`` and ``--section.key=value``."""
    pairs = {}
    words = iter(rest)
    for word in words:
        if not word.startswith("--"):
            raise LpcamError(
                f"unexpected argument {word!r}; replace a recipe's value with --section.key value"
            )
        key, equals, value = word.removeprefix("--").partition("=")
        pairs[key] = value if equals else next(words, None)
        if pairs[key] is None:
            raise LpcamError(f"--{key} has no value; write --{key} VALUE")
    return {key: recipes.parse_value(key, value) for key, value in pairs.items()}
