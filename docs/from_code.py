"""Lists that are made from the code while the site is built, so that they cannot be out of date.

Directives: ``recipe-keys`` (every key of a recipe), ``commands`` (the command line), ``presets``
(the presets of every method) and ``modules`` (docstrings of modules, by name or ``package.*``).
"""

from __future__ import annotations

import argparse
import pkgutil
import re
import sys
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from docutils import nodes
from pydantic import BaseModel
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective
from sphinx.util.nodes import make_refnode

import lpcam
from lpcam.cli.main import _parser
from lpcam.pipeline.recipe import Recipe, describe_fields, section_model
from lpcam.runtime.settings import PresetModel


class _Made(SphinxDirective):
    """A directive that is replaced by the Markdown of its ``text``."""

    def text(self) -> str:
        """The Markdown."""
        return ""

    def run(self) -> list[nodes.Node]:
        """Parse the text in the place of the directive."""
        for module in ("lpcam.pipeline.recipe", "lpcam.runtime.settings", "lpcam.cli.main"):
            self.env.note_dependency(str(import_module(module).__file__))
        return self.parse_text_to_nodes(self.text(), allow_section_headings=True)


class RecipeKeys(_Made):
    """Tables of every key of a recipe, one for each section."""

    def text(self) -> str:
        sections: dict[str, list[str]] = {}
        for key, kind, meaning in describe_fields():
            section = key.rpartition(".")[0]
            row = f"| `{key}` | `{_cell(_plain(kind))}` | {_cell(meaning.replace('``', '`'))} |"
            sections.setdefault(section, []).append(row)
        return "\n\n".join(
            f"## {f'`{section}`' if section else 'Top level'}\n\n"
            "| key | values | what it means |\n|---|---|---|\n" + "\n".join(rows)
            for section, rows in sections.items()
        )


class Commands(_Made):
    """The help of every command."""

    def text(self) -> str:
        parts = []
        for name, parser in commands().items():
            about = parser.description or ""
            rows = [
                f"| {_names(action)} | {_cell(_meaning(action))} |"
                for action in parser._actions
                if not isinstance(action, argparse._HelpAction | argparse._SubParsersAction)
            ]
            usage = re.sub(r"\s+", " ", parser.format_usage().removeprefix("usage: ")).strip()
            parts.append(f"## `lpcam {name}`\n\n{about}\n\n```\n{usage}\n```\n")
            if rows:
                parts.append("| argument | what it means |\n|---|---|\n" + "\n".join(rows) + "\n")
            if parser.epilog:
                parts.append(re.sub(r"(--[a-z_.]+ [\w./]*\w)", r"`\1`", parser.epilog) + "\n")
        return "\n".join(parts)


class Presets(_Made):
    """The values of every preset: a table for each key that names one."""

    def text(self) -> str:
        return "\n\n".join(
            self.table(key, {name: model.preset_values(name) for name in model.preset_names()})
            for key, model in preset_sections(Recipe)
        )

    def table(self, key: str, presets: dict[str, dict[str, Any]]) -> str:
        """One table: presets side by side."""
        lines = [f"## `{key}`\n", "| | " + " | ".join(f"`{name}`" for name in presets) + " |"]
        lines.append("|---" * (len(presets) + 1) + "|")
        for name in dict.fromkeys(name for values in presets.values() for name in values):
            cells = [_value(values[name]) if name in values else "" for values in presets.values()]
            lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
        return "\n".join(lines)


class Modules(_Made):
    """Docstrings of modules: one name a line, ``package.*`` for all modules of a package."""

    has_content = True
    # timm adds an __all__ with the registered models alone to a module that registers any.
    wanted: ClassVar[str] = "   :members:\n   :ignore-module-all:\n   :special-members: __call__\n"

    def text(self) -> str:
        parts = []
        for name in matching(self.content):
            self.env.note_dependency(str(import_module(f"lpcam.{name}").__file__))
            parts.append(
                f"## `lpcam.{name}`\n\n```{{eval-rst}}\n.. automodule:: lpcam.{name}\n"
                f"{self.wanted}```\n"
            )
        return "\n".join(parts)


def commands() -> dict[str, argparse.ArgumentParser]:
    """The parser of each command, ``data check`` and its like too, in the order of the help."""
    (chooser,) = _choosers(_parser())
    found = {}
    for name, parser in _described(chooser).items():
        found[name] = parser
        for inner in _choosers(parser):
            found |= {f"{name} {work}": one for work, one in _described(inner).items()}
    return found


def _choosers(parser: argparse.ArgumentParser) -> list[Any]:
    return [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]


def _described(chooser: Any) -> dict[str, argparse.ArgumentParser]:
    return dict(chooser.choices)


def preset_sections(
    model: type[BaseModel], prefix: str = ""
) -> list[tuple[str, type[PresetModel]]]:
    """The keys of a recipe that name a preset, and the settings that are filled from it."""
    found: list[tuple[str, type[PresetModel]]] = []
    for name, field in model.model_fields.items():
        section = section_model(field.annotation)
        if section is not None and issubclass(section, PresetModel):
            found.append((f"{prefix}{name}.preset", section))
        elif section is not None:
            found += preset_sections(section, f"{prefix}{name}.")
    return found


def modules() -> list[str]:
    """Every module of the package, without the package's own name."""
    found = pkgutil.walk_packages(lpcam.__path__, "lpcam.")
    names = [module.name.removeprefix("lpcam.") for module in found]
    return sorted(name for name in names if not name.startswith("__"))


def matching(patterns: list[str]) -> list[str]:
    """The modules that patterns name, in their order; a pattern may match none."""
    chosen: list[str] = []
    for pattern in patterns:
        head = pattern.strip().removesuffix(".*")
        below = f"{head}." if pattern.strip().endswith(".*") else "\n"  # matches nothing
        chosen += [name for name in modules() if name == head or name.startswith(below)]
    return chosen


def _plain(kind: str) -> str:
    kind = re.sub(r"Annotated\[(\w+), FieldInfo\(.*?\]\)\]", r"\1", kind)
    kind = re.sub(r"Literal\[([^\]]*)\]", lambda m: m[1].replace("'", ""), kind)
    kind = re.sub(r"^Optional\[(.*)\]$", r"\1 | null", kind)
    return kind.replace("NoneType", "null").replace("None", "null").replace("tuple[", "list[")


def _value(value: Any) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _names(action: argparse.Action) -> str:
    if not action.option_strings:
        return f"`{action.metavar or action.dest}`"
    value = "" if action.nargs == 0 else f" {action.metavar or action.dest.upper()}"
    return ", ".join(f"`{option}{value}`" for option in action.option_strings)


def _meaning(action: argparse.Action) -> str:
    text = (action.help or "").replace("%(default)s", str(action.default))
    shown = action.default not in (None, argparse.SUPPRESS, False, True)
    note = f"default `{action.default}`" if shown and "default" not in text else ""
    return ", ".join(part for part in (text, note) if part)


def _signature(
    _app: Sphinx, _what: str, _name: str, thing: object, _options: Any, _given: str, _returns: str
) -> tuple[str, str] | None:
    """Records that are read from a recipe or a preset list their values below, not in a line."""
    return ("", "") if isinstance(thing, type) and issubclass(thing, BaseModel) else None


def _bars(
    _app: Sphinx, _what: str, _name: str, _thing: object, _options: Any, lines: list[str]
) -> None:
    """The bars of a norm, |f|, are no markup."""
    lines[:] = [
        "``".join(
            part if number % 2 else part.replace("|", "\\|")
            for number, part in enumerate(line.split("``"))
        )
        for line in lines
    ]


def _by_its_last_name(
    app: Sphinx, env: Any, node: Any, inner: nodes.TextElement
) -> nodes.Element | None:
    """What a docstring calls ``read_image``, if one module alone has it, or ``lpcam.LPCAM``."""
    if node.get("refdomain") != "py":
        return None
    objects = env.domains["py"].objects
    if node["reftarget"].startswith("lpcam."):
        module, _, name = node["reftarget"].rpartition(".")
        if module != "lpcam" or name not in lpcam._MODULES:
            thing = getattr(sys.modules.get(module), name, None)
            return inner if isinstance(thing, TypeVar) else None
        found = [f"{lpcam._MODULES[name]}.{name}"]  # the package's own names, where they live
    else:
        found = [name for name in objects if name.endswith(f".{node['reftarget']}")]
    if len(found) != 1 or found[0] not in objects:
        return None
    place = objects[found[0]]
    return make_refnode(app.builder, node["refdoc"], place.docname, place.node_id, inner)


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.add_directive("recipe-keys", RecipeKeys)
    app.add_directive("commands", Commands)
    app.add_directive("presets", Presets)
    app.add_directive("modules", Modules)
    app.connect("autodoc-process-signature", _signature)
    app.connect("autodoc-process-docstring", _bars)
    app.connect("missing-reference", _by_its_last_name)
    here = Path(__file__)
    app.connect("env-before-read-docs", lambda _app, env, _names: env.note_dependency(str(here)))
    return {"parallel_read_safe": True}
