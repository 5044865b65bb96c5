"""The house: who may import whom, and what no room may hold."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "lpcam"
FLOORS: dict[int, str] = {
    0: "errors version presets data.items",
    1: "arrays backbones network_files structure linear objects localisation "
    "data.json_stream "
    "functional clustering masks metrics storage progress processes parallel resources "
    "refine.permutohedral refine.saliency_maps",
    2: "finder wrap faithfulness onnx_files "
    "networks.base networks.registry networks.deeplabv2 networks.upernet networks.wideresnet38 "
    "data.check data.classes data.coco data.coco_files data.coco_index data.coco_masks "
    "data.creatures data.detect data.folder data.huggingface data.images data.jitter data.labels "
    "data.saliency data.sbd data.truth data.voc "
    "formats.base formats.coco_json formats.cvat formats.label_studio formats.labels "
    "formats.map_folders formats.maps formats.outlines formats.overlays formats.regions "
    "formats.voc formats.yolo networks.mctformer "
    "classifier prototypes extract features sheet explain.maps explain.web",
    3: "recipe probe train evaluation pretraining ledger starting "
    "report.images report.meaning report.collect report.page report.charts report.tables "
    "compat.gradcam head peers data.estimate data.survey formats.masks "
    "hosts.amn hosts.base hosts.edam hosts.mctformer refine.psa refine.base "
    "refine.crf refine.levels refine.pamr refine.saliency_fusion refine.ternary refine.walk "
    "engine pickles segmentation.augment segmentation.export segmentation.files "
    "segmentation.losses segmentation.predict segmentation.segmenter segmentation.train "
    "report.segmenters refine.irn explain.explainer explain.files",
    4: "exporting pipeline demo stages.context stages.classify stages.maps stages.prototypes "
    "stages.seeds stages.evaluate stages.refine stages.report stages.segment stages.host "
    "stages.training stages.irn stages.psa serve",
    5: "cli data_commands __main__",
}
FLOOR = {name: floor for floor, names in FLOORS.items() for name in names.split()}
MODULES = sorted(
    ".".join(path.relative_to(SOURCE).with_suffix("").parts) for path in SOURCE.rglob("*.py")
)


def tree(module: str) -> ast.Module:
    return ast.parse(SOURCE.joinpath(*module.split(".")).with_suffix(".py").read_text("utf-8"))


def imports(module: str) -> set[str]:
    """Modules of the package that a module imports, anywhere in it."""
    found = set()
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import in line {node.lineno}"
            names = [str(node.module)]
            # "from lpcam.data import items" imports a module too
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        inner = [name.removeprefix("lpcam.") for name in names if name.startswith("lpcam.")]
        found |= {name for name in inner if name in MODULES}
    return found - {module}


def test_every_module_has_a_floor() -> None:
    rooms = [name for name in MODULES if not name.endswith("__init__")]
    assert sorted(rooms) == sorted(FLOOR)


@pytest.mark.parametrize("module", [name for name in MODULES if not name.endswith("__init__")])
def test_imports_come_from_the_same_or_a_lower_floor(module: str) -> None:
    above = {other for other in imports(module) if FLOOR[other] > FLOOR[module]}
    assert not above, f"{module} (floor {FLOOR[module]}) imports {above} from above"


def test_there_is_no_circle() -> None:
    graph = {module: imports(module) for module in MODULES}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"circle: {' -> '.join([*path, module])}"
        if module not in done:
            for other in sorted(graph[module]):
                visit(other, (*path, module))
            done.add(module)

    for module in MODULES:
        visit(module, ())
    assert done == set(MODULES)


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
    """A property that returns in one line what its name and type say."""
    return (
        isinstance(node, ast.FunctionDef)
        and any(isinstance(d, ast.Name) and d.id == "property" for d in node.decorator_list)
        and len(node.body) == 1
    )


@pytest.mark.parametrize("module", MODULES)
def test_nothing_is_pickled(module: str) -> None:
    """Pickle, and what uses it (torch.save, torch.load, np.load), only where foreign files are."""
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = {alias.name.split(".")[0] for alias in node.names}
            names.add(str(getattr(node, "module", "")).split(".")[0])
            allowed = {"pickle"} if module == "arrays" else set()
            pickling = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
            assert not names & (pickling - allowed)
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        if module == "pickles" and called == "torch.load":  # the one importer of foreign files
            given = {word.arg: ast.unparse(word.value) for word in node.keywords}
            assert given.get("weights_only") == "True", f"{module} line {node.lineno}"
            continue
        unsafe = ("torch.save", "torch.load", "pickle.load", "pickle.loads", "pickle.Unpickler")
        assert called not in unsafe, f"{module} line {node.lineno}"
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
