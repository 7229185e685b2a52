"""The direction of imports: a room imports only rooms before it, and the heavy libraries stay where they belong."""

from __future__ import annotations

import ast
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "autorank"

# From the lowest to the highest. A name stands for a module, or for a package with all its modules.
ROOMS: tuple[tuple[str, ...], ...] = (
    ("privacy", "trouble", "types", "errors"),
    (
        "copying",
        "layout",
        "memoryformat",
        "modules",
        "opcounts",
        "planfile",
        "pytrees",
        "remotelock",
        "remotestore",
        "seeding",
        "settings",
        "yamlfile",
    ),
    ("solvers",),
    ("formats",),
    ("quant",),
    ("measure",),
    ("profiling", "fitcache", "quanterrors", "plan", "compression", "sequential"),
    ("spacefile", "patterns", "candidates", "space"),
    ("objectives", "pareto", "front"),
    ("strategies",),
    ("tasks", "evaluate"),
    ("clock", "precision", "features", "recover", "teacher"),
    ("pulling",),
    ("gate",),
    ("config", "job", "schedule", "stopping", "progress"),
    ("fitestimate", "fitting", "errortable", "replay", "lossrise"),
    ("restore",),
    ("trial", "trialfiles"),
    ("journal", "usercode", "remotedir", "mirror", "remotewatch", "reuse", "following"),
    (
        "captions",
        "scene",
        "growth",
        "layermap",
        "layerrows",
        "importance",
        "plotting_base",
        "plotting_pareto",
        "plotting_layers",
        "plotting_importance",
        "plotting",
        "figures_html",
        "figures_html_table",
        "figures_png_base",
        "figures_png",
        "figures_png_layers",
        "figures",
    ),
    ("run_values", "run_inputs", "run_figures", "run_sync", "mlflow_ui", "mlflow_store", "tracking"),
    (
        "comparing",
        "artifacts",
        "deployment",
        "exportdir",
        "exporter",
        "weightfile",
        "report",
        "rerun",
        "export",
        "registry",
    ),
    (
        "beforehand",
        "prepare",
        "fronttime",
        "finish",
        "inline",
        "remotefiles",
        "trainable",
        "cluster",
        "reaper",
        "watching",
        "seats",
    ),
    ("orchestrate", "driver"),
    ("terminal",),
    ("sweep", "show", "demo"),
    ("dashboards",),
    ("jobfiles", "jobs", "cli_jobs"),
    ("cli",),
    ("jobrun",),
    ("testing",),
    ("__init__",),
)
LOWEST = ROOMS[0]
LEVELS = {name: level for level, room in enumerate(ROOMS) for name in room}

# Library → the only modules that may import it, in functions or outside.
ONLY = {
    "ray": {
        "autorank.cluster",
        "autorank.jobs",
        "autorank.orchestrate",
        "autorank.remotefiles",
        "autorank.trainable",
        "autorank.watching",
    },
    "fsspec": {"autorank.remotestore"},
    "mlflow": {"autorank.mlflow_store", "autorank.registry", "autorank.dashboards.mlflow_app"},
    "uvicorn": {"autorank.dashboards.server"},
}

# Loaded where they are needed, inside functions, so that a small sweep does not pay for them.
LAZY = frozenset(
    [
        "aiohttp",
        "dash",
        "datasets",
        "flask",
        "fsspec",
        "fvcore",
        "matplotlib",
        "mlflow",
        "onnx",
        "onnxruntime",
        "onnxscript",
        "optuna",
        "pandas",
        "plotext",
        "plotly",
        "ray",
        "requests",
        "sklearn",
        "tensorly",
        "timm",
        "torchvision",
        "uvicorn",
    ]
)

# Room → what it must not import although it lies before it.
FORBIDDEN = {
    "tasks": {"autorank.formats", "autorank.space", "autorank.strategies", "autorank.plan", "autorank.profiling"},
    "strategies": {"torch", "autorank.tasks", "autorank.plan", "autorank.formats", "autorank.profiling"},
    "objectives": {"torch"},
    "pareto": {"torch"},
    "front": {"torch"},
    "scene": {"torch"},
    "figures": {"torch"},
    "journal": {"torch"},
}

FOLDERS = {"autorank": PACKAGE, "autorank.dashboards": ROOT / "dashboards"}

FILES = {
    ".".join((package, *path.relative_to(folder).with_suffix("").parts)): path
    for package, folder in FOLDERS.items()
    for path in sorted(folder.rglob("*.py"))
}


def imported(tree: ast.AST) -> Iterator[str]:
    """Every dotted name that is imported anywhere in a tree; for autorank's own, the module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level:
            yield from (f"autorank.dashboards.{node.module or alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None
            for alias in node.names:
                yield own_module(f"{node.module}.{alias.name}") if node.module.startswith("autorank") else node.module


def own_module(name: str) -> str:
    """The module that a dotted name below autorank leads to: `a.b.Thing` is in `a.b`."""
    while name and name not in FILES and f"{name}.__init__" not in FILES:
        name = name.rpartition(".")[0]
    return name


def at_import(tree: ast.Module) -> Iterator[ast.stmt]:
    """The statements that run when a module is imported, those for type checkers left out."""
    waiting: list[ast.stmt] = list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting.extend(node.orelse)
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        waiting.extend(child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt))


def room(module: str) -> str:
    """`autorank.tasks.base` → tasks; the package itself → __init__."""
    return module.split(".")[1] if "." in module else "__init__"


def tree(module: str) -> ast.Module:
    return ast.parse(FILES[module].read_text(encoding="utf-8"))


def uses(module: str, name: str) -> bool:
    return any(found == name or found.startswith(f"{name}.") for found in imported(tree(module)))


@pytest.mark.parametrize("module", FILES)
def test_a_module_imports_only_rooms_before_its_own(module: str) -> None:
    assert room(module) in LEVELS, f"{module} belongs to no room: add it to ROOMS, as low as its imports allow"
    level = LEVELS[room(module)]
    wrong = {
        name
        for name in imported(tree(module))
        if name.split(".")[0] == "autorank" and LEVELS.get(room(name), len(ROOMS)) > level
    }
    assert not wrong, f"{module} imports from a later room: {sorted(wrong)}"


@pytest.mark.parametrize("name", sorted(ONLY))
def test_a_library_that_one_file_owns(name: str) -> None:
    assert {module for module in FILES if uses(module, name)} <= ONLY[name]


@pytest.mark.parametrize("module", [name for name in FILES if room(name) in LOWEST])
def test_types_and_errors_need_the_standard_library_only(module: str) -> None:
    tops = {name.split(".")[0] for name in imported(tree(module))}
    assert tops <= set(sys.stdlib_module_names) | {"autorank"}
    assert {room(name) for name in imported(tree(module)) if name.startswith("autorank")} <= {"types", "privacy"}


@pytest.mark.parametrize("module", FILES)
def test_imports_are_absolute(module: str) -> None:
    """Those among the modules of the dashboard are relative: type checkers find it under the name of its folder."""
    levels = {node.level for node in ast.walk(tree(module)) if isinstance(node, ast.ImportFrom)}
    assert levels <= ({0, 1} if room(module) == "dashboards" else {0})


@pytest.mark.parametrize("module", FILES)
def test_heavy_libraries_are_imported_inside_functions(module: str) -> None:
    found = {name.split(".")[0] for node in at_import(tree(module)) for name in imported(node)}
    assert not found & (LAZY - {"dash", "flask", "uvicorn"} if room(module) == "dashboards" else LAZY)


@pytest.mark.parametrize("name", sorted(FORBIDDEN))
def test_rooms_that_must_not_know_of_each_other(name: str) -> None:
    modules = [module for module in FILES if room(module) == name]
    assert modules
    wrong = {(module, other) for module in modules for other in FORBIDDEN[name] if uses(module, other)}
    assert not wrong


def test_every_room_exists() -> None:
    assert LEVELS.keys() == {room(module) for module in FILES}


def test_every_package_is_installed() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    folders = {path.parent for path in PACKAGE.rglob("*.py")}
    present = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert present | set(settings["package-dir"]) == set(settings["packages"])
    assert all((folder / "__init__.py").is_file() for folder in folders)
    assert all((ROOT / folder).is_dir() for folder in settings["package-dir"].values())


def test_no_public_name_is_hidden_by_a_module_of_the_same_name() -> None:
    """`import autorank.x` binds the module to `autorank.x`, and a function of that name would be gone."""
    import autorank

    modules = {"formats"}  # public as a module
    assert not (set(autorank.__all__) - modules) & {name.removeprefix("autorank.") for name in FILES}
