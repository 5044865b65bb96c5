"""Count the size and the structure of the package: ``python tools/size.py [ROOT]``."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

EXTRACTORS = ("lpcam.method.extractors", "lpcam.extract")
STAGES = ("pipeline/stages", "stages")


class Tree:
    """The Python files of a checkout.

    Args:
        root: of the checkout.
    """

    def __init__(self, root: Path) -> None:
        self.package = root / "src" / "lpcam"
        self.sources = sorted((root / "src").rglob("*.py"))
        self.tests = sorted((root / "tests").rglob("*.py"))
        self.trees = {p: ast.parse(p.read_text("utf-8")) for p in self.sources}
        self.modules = {self._module(path): path for path in self.sources}

    def _module(self, path: Path) -> str:
        parts = path.relative_to(self.package.parent).with_suffix("").parts
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    def imports(self, module: str, *, anywhere: bool = False) -> set[str]:
        """Modules of the package that a module imports, at its top or anywhere in it."""
        found, tree = set(), self.trees[self.modules[module]]
        for node in ast.walk(tree) if anywhere else tree.body:
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                inner = [f"{node.module}.{alias.name}" for alias in node.names]
                names = [name if name in self.modules else str(node.module) for name in inner]
            else:
                continue
            found |= {name for name in names if name in self.modules}
        return found - {module}

    def closure(self, module: str) -> set[str]:
        """A module and all that it imports, directly or not."""
        found, waiting = set(), [module]
        while waiting:
            name = waiting.pop()
            if name not in found:
                found.add(name)
                waiting += self.imports(name)
        return found

    def circles(self) -> list[set[str]]:
        """Groups of packages that import each other."""
        graph: dict[str, set[str]] = {}
        for module in self.modules:
            mine = package_of(module)
            graph.setdefault(mine, set())
            graph[mine] |= {package_of(other) for other in self.imports(module, anywhere=True)} - {
                mine
            }
        reach = {name: _reachable(graph, name) for name in graph}
        groups = [frozenset({b for b in graph if b in reach[a] and a in reach[b]}) for a in graph]
        return [set(group) for group in sorted(set(groups), key=sorted) if len(group) > 1]

    def inner_imports(self) -> int:
        """Number of import statements inside functions."""
        return sum(
            isinstance(node, ast.Import | ast.ImportFrom)
            for tree in self.trees.values()
            for function in _functions(tree)
            for node in _own_nodes(function)
        )

    def uses_of_any(self) -> int:
        """Number of uses of ``Any`` in the stages of a run."""
        folder = next(self.package / name for name in STAGES if (self.package / name).is_dir())
        return sum(
            isinstance(node, ast.Name) and node.id == "Any"
            for path, tree in self.trees.items()
            if path.is_relative_to(folder)
            for node in ast.walk(tree)
        )

    def entries(self) -> list[str]:
        """What lies at the top of the package."""
        return sorted(
            p.name for p in self.package.iterdir() if p.name not in ("__pycache__", "py.typed")
        )


def package_of(module: str) -> str:
    """The part of the package that a module belongs to, such as ``data``."""
    return module.split(".")[1] if "." in module else module


def lines(path: Path) -> int:
    """Number of lines of a file."""
    return len(path.read_text("utf-8").splitlines())


def _reachable(graph: dict[str, set[str]], start: str) -> set[str]:
    found, waiting = set(), [*graph[start]]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += graph[name]
    return found


def _functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def _own_nodes(function: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a function without those of functions inside it."""
    for node in ast.iter_child_nodes(function):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node
            yield from _own_nodes(node)


def main(root: Path) -> None:
    """Print the counts as a Markdown table."""
    tree = Tree(root)
    largest = max(tree.sources, key=lines)
    extractors = next(name for name in EXTRACTORS if name in tree.modules)
    circles = tree.circles()
    rows = {
        "entries at the top of `src/lpcam`": len(tree.entries()),
        "lines of Python in `src/`": sum(map(lines, tree.sources)),
        "lines of tests": sum(map(lines, tree.tests)),
        f"largest file ({largest.name})": lines(largest),
        "import closure of the extractors": sum(
            lines(tree.modules[name]) for name in tree.closure(extractors)
        ),
        "imports inside functions": tree.inner_imports(),
        "uses of `Any` in the stages": tree.uses_of_any(),
        "packages in a circle": len(set().union(*circles)) if circles else 0,
    }
    print("| | count |\n|---|---|")
    for name, count in rows.items():
        print(f"| {name} | {count:,} |")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parents[1])
