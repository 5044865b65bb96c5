"""The documentation says what is so: messages, commands, links, code and the site itself."""

from __future__ import annotations

import argparse
import ast
import importlib.util
import re
import shlex
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

from lpcam.cli.command import COMMANDS, parse_changes
from lpcam.cli.main import _parser, joined
from lpcam.pipeline.recipe import bundled_recipes, describe_fields

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
# The change log tells of what was, too.
PAGES = sorted(
    [
        *(p for p in ROOT.glob("*.md") if p.stem != "CHANGELOG"),
        *(p for p in DOCS.rglob("*.md") if "_build" not in p.parts),
    ],
)
FENCE = re.compile(r"^(`{3,}|~{3,})([^\n]*)\n(.*?)^\1 *$", re.MULTILINE | re.DOTALL)
WILD = "\0"


def by_name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def blocks(page: Path) -> list[tuple[str, str]]:
    """(language, text) of each fenced block."""
    return [(m[2].strip(), m[3]) for m in FENCE.finditer(page.read_text("utf-8"))]


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return FENCE.sub("", page.read_text("utf-8"))


# -- Messages ----------------------------------------------------------------------------------


def literals() -> list[str]:
    """Every text in the source; what is filled in stands as WILD."""
    found = []
    for path in (ROOT / "src").rglob("*.py"):
        tree = ast.parse(path.read_text("utf-8"))
        inner = {id(part) for node in ast.walk(tree) for part in _parts(node)}
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(_text(part) for part in node.values))
            elif isinstance(node, ast.Constant) and id(node) not in inner:
                found.append(_text(node))
    return found


def _parts(node: ast.AST) -> list[ast.expr]:
    return node.values if isinstance(node, ast.JoinedStr) else []


def _text(node: ast.AST) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.sub(r"%\.?\d*[sdgf]", WILD, node.value)
    return WILD


@cache
def pattern(message: str) -> tuple[list[str], re.Pattern[str]]:
    """The pieces of a quoted message between its ``...``, and what matches them in this order."""
    pieces = [piece for part in message.split("...") if (piece := part.strip(" "))]
    joined = f"[^\\w]*{WILD}.*?".join(map(re.escape, pieces))
    return pieces, re.compile(joined, re.DOTALL)


def says(template: str, message: str) -> bool:
    """Whether the pieces of a message follow each other in a text.

    What the text fills in must stand as ``...`` in the message.
    """
    pieces, wanted = pattern(message)
    there = all(piece in template for piece in pieces)  # quicker than the pattern
    return there and wanted.search(template) is not None


def quoted_messages() -> list[str]:
    text = (DOCS / "troubleshooting.md").read_text("utf-8")
    return re.findall(r"^\| `(.+?)` \|", text, re.MULTILINE)


def test_the_test_of_messages_can_fail() -> None:
    template = f"the recipe {WILD} has version {WILD}, this lpcam reads"
    assert says(template, "the recipe ... has version ..., this lpcam")
    assert not says(template, "the recipe ... has versions ..., this lpcam")
    assert not says(template, "the recipe X has version")
    assert not says(template, "this lpcam reads ... the recipe")


def test_every_quoted_message_is_in_the_source() -> None:
    messages, templates = quoted_messages(), literals()
    assert len(messages) > 30
    strange = [m for m in messages if not any(says(template, m) for template in templates)]
    assert not strange, f"no such message in src/: {strange}"


def test_messages_are_in_the_order_of_the_alphabet() -> None:
    keys = [
        "".join(c for c in m.lower() if c.isalnum() or c == " ").strip() for m in quoted_messages()
    ]
    assert keys == sorted(keys)


# -- Links -------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """Of the headings, as code hosts and myst-parser make them."""
    headings = re.findall(r"^#+ +(.+?) *$", prose(page), re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
    return {heading.strip().replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)\s]+)\)", prose(page))
    for target in targets:
        if re.match(r"[a-z]+:", target):
            assert target.startswith("https://"), target
            continue
        path, _, anchor = target.partition("#")
        place = (page.parent / path).resolve() if path else page
        assert place.is_file(), f"{by_name(page)}: {target}"
        assert place.is_relative_to(ROOT), f"{by_name(page)}: {target} leaves the repository"
        assert not anchor or anchor in anchors(place), f"{by_name(page)}: {target}"


@pytest.mark.parametrize("page", [p for p in PAGES if p.is_relative_to(DOCS)], ids=by_name)
def test_a_page_is_in_the_table_of_contents(page: Path) -> None:
    listed = {DOCS / "index.md"}
    for other in DOCS.rglob("*.md"):
        for kind, text in blocks(other):
            if kind == "{toctree}":
                names = [line for line in text.splitlines() if line and not line.startswith(":")]
                listed |= {other.parent / f"{name}.md" for name in names}
    assert page in listed


def test_every_picture_is_shown_and_small() -> None:
    shown = {
        (page.parent / target).resolve()
        for page in PAGES
        for target in re.findall(r"!\[[^\]]{10,}\]\(([^)\s]+)\)", prose(page))
    }
    pictures = {p.resolve() for p in (DOCS / "images").iterdir()}
    assert pictures == shown  # with a text for those who do not see them
    assert not [p.name for p in pictures if p.stat().st_size > 250_000]


# -- Commands ----------------------------------------------------------------------------------


def commands(page: Path) -> list[str]:
    """Every ``lpcam ...`` of a page, in blocks (with lines that go on) and in the text."""
    lines = []
    for kind, text in blocks(page):
        if kind in ("", "sh", "bash", "console"):
            joined = re.sub(r"\\\n\s*|\n  +(?=\S)", " ", text)
            lines += [line.strip().removeprefix("$ ") for line in joined.splitlines()]
    lines += [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(page))]
    return [line for line in lines if re.match(r"(torchrun .* -m )?lpcam( (?!\[)|$)", line)]


def check_command(line: str) -> None:
    """Parse one quoted command as the command line would."""
    words = shlex.split(line[line.index("lpcam") :], comments=True)
    words = [word for word in words[1:] if word != "..."]
    parser = _parser()
    (chooser,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    if " ".join(words) in ("", *chooser.choices, *COMMANDS):
        return  # the name of a command in a sentence
    options, rest = parser.parse_known_args(joined(words))
    if not options.work.recipe_values:
        assert not rest, f"unknown arguments {rest}"
        return
    known = {key for key, _, _ in describe_fields()}
    sections = {key.rpartition(".")[0] for key in known}
    for key in parse_changes(rest):
        assert key in known | sections, f"no key {key} in a recipe"
    if (
        options.recipe
        and options.recipe.islower()
        and "/" not in options.recipe
        and "." not in options.recipe
    ):
        assert options.recipe in bundled_recipes()


# The commands of docs/extend/ name methods that tests/extensions/ runs.
@pytest.mark.parametrize("page", [p for p in PAGES if p.parent.name != "extend"], ids=by_name)
def test_commands_parse(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for line in commands(page):
        try:
            check_command(line)
        except SystemExit as stop:
            if stop.code:
                pytest.fail(f"{line}: {capsys.readouterr().err}")


@pytest.mark.parametrize(
    "line", ["lpcam runs X", "lpcam runs", "lpcam run X --lpcam.taus 1", "lpcam init F --weight"]
)
def test_the_test_of_commands_can_fail(line: str) -> None:
    with pytest.raises((SystemExit, AssertionError)):
        check_command(line)


def test_options_in_the_text_are_known() -> None:
    known = {f"--{key}" for key, _, _ in describe_fields()}
    known |= {key.rpartition(".")[0] for key in known}
    for page in PAGES:
        for option in re.findall(r"`(--[a-z]+\.[a-z_.]+)", prose(page)):
            assert option in known, f"{by_name(page)}: {option}"
        for key in re.findall(  # data.yaml is a file of YOLO
            r"`((?!data\.yaml)(?:lpcam|maps|seeds|run|data|classifier)\.[a-z_.]+)`", prose(page)
        ):
            assert f"--{key}" in known or _is_module(key), f"{by_name(page)}: {key}"


def _is_module(name: str) -> bool:
    """A module, a function of one, or a group of entry points; no key."""
    groups = "hosts refinements readers networks formats map_formats clusterings"
    if name in {f"lpcam.{group}" for group in groups.split()}:
        return True
    module, _, last = name.rpartition(".")
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return hasattr(importlib.import_module(module), last)


def test_every_command_has_a_place_in_the_guides() -> None:
    (chooser,) = (a for a in _parser()._actions if isinstance(a, argparse._SubParsersAction))
    told = " ".join(line for page in PAGES if page.is_relative_to(DOCS) for line in commands(page))
    assert not [name for name in chooser.choices if f"lpcam {name}" not in told]


# -- Code --------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_python_blocks_compile_and_import_what_exists(page: Path) -> None:
    for kind, text in blocks(page):
        if kind != "python":
            continue
        tree = compile(text, by_name(page), "exec", ast.PyCF_ONLY_AST)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("lpcam"):
                module = importlib.import_module(str(node.module))
                assert not [a.name for a in node.names if not hasattr(module, a.name)]


# -- Models ------------------------------------------------------------------------------------


def listed_families() -> dict[str, str]:
    """Each "library family" of docs/models.md, in small letters, with the rest of its row."""
    found = {}
    text = (DOCS / "models.md").read_text("utf-8").partition("## Outcomes")[0]
    for line in text.splitlines():
        cells = line.strip("| ").split(" | ")
        if len(cells) == 4 and cells[0] in ("timm", "torchvision", "transformers"):
            for family in cells[1].split(", "):
                name = f"{cells[0]} {family}".lower()
                assert name not in found, name
                found[name] = " | ".join(cells[2:])
    return found


def test_the_table_of_models_says_what_the_tests_of_models_find() -> None:
    from classifiers.test_wrapped import HUGGING_FACE, MEAN, TOKEN  # noqa: PLC0415 - slow

    listed = listed_families()

    def row(name: str) -> str:
        name = name.replace(", mean", " with mean pooling").partition(",")[0]
        name = name.removesuffix("-like").lower()
        near = [one for one in listed if name == one or name.startswith(f"{one} ")]
        assert near, f"docs/models.md has no {name}"
        return listed[max(near, key=len)]

    for name, (_, _, (height, width), _) in MEAN.items():
        told = row(name)
        assert "`LPCAM(model)`" in told, name
        assert ("one size" in told) == ("scale 1" in told) == (height == width), name
    for name in TOKEN:
        assert '`LPCAM(model, pool="token")`' in row(name), name
    for name in HUGGING_FACE:
        assert row(f"transformers {name}").endswith("`LPCAM(model)`"), name


# -- The site ----------------------------------------------------------------------------------


def extension() -> ModuleType:
    pytest.importorskip("sphinx", reason="the site needs pip install 'lpcam[docs]'")
    spec = importlib.util.spec_from_file_location("from_code", DOCS / "from_code.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_module_is_in_the_reference() -> None:
    made = extension()
    wanted = [
        name
        for page in (DOCS / "reference").glob("*.md")
        for kind, text in blocks(page)
        if kind == "{modules}"
        for name in made.matching(text.split())
    ]
    assert len(wanted) == len(set(wanted))
    packages = {n.rpartition(".")[0] for n in made.modules()}
    assert sorted(set(wanted) | packages - {""}) == sorted(set(made.modules()) | packages - {""})


def test_the_site_loads_nothing() -> None:
    site = ROOT / "build" / "docs"
    if not site.is_dir():
        pytest.skip("the site is not built: make docs")
    page = re.compile(
        r"""<(?:script|img|link|iframe)\b[^>]*?(?:src|href)=["'](?:https?:)?//[^"']*"""
    )
    for path in site.rglob("*.html"):
        assert not page.findall(path.read_text("utf-8")), path.name
    for path in site.rglob("*.css"):
        assert not re.findall(r"(?:@import|url\()\s*[\"']?(?:https?:)?//", path.read_text("utf-8"))
    keys = (site / "reference" / "recipe.html").read_text("utf-8")
    assert all(f">{key}<" in keys for key, _, _ in describe_fields())
