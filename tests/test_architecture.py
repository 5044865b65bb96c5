"""The structure of the package: which packages may import which, and what no file may hold."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))
from size import Tree, package_of  # noqa: E402

PACKAGES = [
    "runtime",
    "data",
    "training",
    "classifiers",
    "method",
    "evaluation",
    "refine",
    "explain",
    "formats",
    "segmentation",
    "report",
    "hosts",
    "pipeline",
    "cli",
]
"""From the bottom: a package imports only from itself and from those before it."""
SOURCE = ROOT / "src" / "lpcam"
TREE = Tree(ROOT)
MODULES = sorted(TREE.modules)


def tree(module: str) -> ast.Module:
    return TREE.trees[TREE.modules[module]]


def test_the_packages_are_those_of_the_plan() -> None:
    entries = {name.removesuffix(".py") for name in TREE.entries()}
    assert entries == {*PACKAGES, "__init__", "__main__", "assets"}


@pytest.mark.parametrize("module", [name for name in MODULES if package_of(name) in PACKAGES])
def test_imports_come_from_the_same_package_or_one_before_it(module: str) -> None:
    allowed = PACKAGES[: PACKAGES.index(package_of(module)) + 1]
    above = [o for o in TREE.imports(module, anywhere=True) if package_of(o) not in allowed]
    # the package's face has the version alone
    assert [name for name in above if name != "lpcam"] == []


def test_no_files_import_each_other_in_a_circle() -> None:
    graph = {module: TREE.imports(module, anywhere=True) for module in MODULES if module != "lpcam"}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"circle: {' -> '.join([*path, module])}"
        if module not in done:
            for other in sorted(graph.get(module, ())):
                visit(other, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())
    assert done


def test_no_file_is_longer_than_600_lines() -> None:
    long = {p.name: n for p in TREE.sources if (n := len(p.read_text("utf-8").splitlines())) > 600}
    assert not long


@pytest.mark.parametrize("module", MODULES)
def test_public_names_have_docstrings(module: str) -> None:
    whole = tree(module)
    places: list[tuple[str, ast.AST]] = [("", whole)]
    lacking = [] if ast.get_docstring(whole) or not whole.body else [module]
    while places:
        prefix, place = places.pop()
        for node in ast.iter_child_nodes(place):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                continue
            if node.name.startswith("_") or _says_itself(node):
                continue
            if not ast.get_docstring(node):
                lacking.append(f"{module}.{prefix}{node.name}")
            if isinstance(node, ast.ClassDef):
                places.append((f"{prefix}{node.name}.", node))
    assert not lacking, f"no docstring: {lacking}"


def _says_itself(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> bool:
    """A setter, or a property that returns in one line what its name and type say."""
    marks = {ast.unparse(decorator).rpartition(".")[2] for decorator in node.decorator_list}
    return "setter" in marks or ("property" in marks and len(node.body) == 1)


@pytest.mark.parametrize("module", MODULES)
def test_nothing_is_pickled(module: str) -> None:
    """Neither pickle nor what pickles behind the scenes: torch.save, torch.load, np.load.

    Two modules read files of other programs, with an unpickler that is cut down to arrays and with
    torch's own that only loads weights; the first also writes such files.
    """
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = {alias.name.split(".")[0] for alias in node.names}
            names.add(str(getattr(node, "module", "")).split(".")[0])
            allowed = {"pickle"} if module == "lpcam.formats.pickled_arrays" else set()
            picklers = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
            assert not names & (picklers - allowed)
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        assert called not in ("pickle.load", "pickle.loads", "pickle.dump", "pickle.dumps")
        if module == "lpcam.formats.weights" and called == "torch.load":
            given = {word.arg: ast.unparse(word.value) for word in node.keywords}
            assert given.get("weights_only") == "True", f"{module} line {node.lineno}"
            continue
        assert called not in ("torch.save", "torch.load"), f"{module} line {node.lineno}"
        if called in ("np.load", "np.save", "np.savez", "np.lib.format.write_array"):
            given = {word.arg: ast.unparse(word.value) for word in node.keywords}
            assert given.get("allow_pickle") == "False", f"{module} line {node.lineno}"


TEXTS = [p for p in SOURCE.rglob("*") if p.suffix in (".py", ".yaml")]


@pytest.mark.parametrize("path", TEXTS, ids=lambda p: p.relative_to(SOURCE).as_posix())
def test_no_absolute_path(path: Path) -> None:
    text = path.read_text("utf-8")
    roots = "home|root|tmp|work|usr|mnt|data|opt|etc|var"
    assert not re.findall(rf"""["'\s(=](/(?:{roots})\b[^"'\s]*)""", text)
    assert not re.findall(r"[A-Z]:\\\\", text)
    if path.suffix == ".py":
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert not re.fullmatch(r"/\w+(/[\w.]+)+", node.value), node.value


@pytest.mark.parametrize("module", MODULES)
def test_no_module_uses_global_randomness(module: str) -> None:
    """Randomness only through explicit generators."""
    made = "default_rng|Generator|PCG64|SeedSequence"
    for node in ast.walk(tree(module)):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        assert not re.match(rf"(np|numpy)\.random\.(?!{made})", called), called
        assert not re.match(r"random\.\w+", called), called
        if called in ("torch.rand", "torch.randn", "torch.randint", "torch.randperm"):
            assert any(word.arg == "generator" for word in node.keywords), (module, node.lineno)
