"""Who may know whom, and how large a file may be: read from the source itself."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("tokbench", "baselines", "ssdd_models")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
LINES = 400
FUNCTION_LINES = 60
LONGER = ("train", "forward")  # a training loop, a forward pass
HEAVY = {"lpips", "dreamsim", "torch_fidelity", "diffusers", "transformers"}
WITHOUT_TORCH = (
    "tokbench.result", "tokbench.store", "tokbench.registry", "tokbench.protocols", "tokbench.metrics",
    "tokbench.check", "tokbench.compare", "tokbench.report.leaderboard",
    "tokbench.report.tables", "tokbench.report.plots", "tokbench.cli",
)  # fmt: skip
MAY_IMPORT = {"tokbench": set(), "ssdd_models": {"tokbench"}, "baselines": {"tokbench", "ssdd_models"}}
OF_SSDD = {"ssdd_models.layers", "ssdd_models.encoder"}  # what baselines may use


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Every module a file imports, and whether it does so at its top level."""
    tree = ast.parse(path.read_text())
    top = set(map(id, tree.body))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from ((f"{node.module}.{alias.name}", id(node) in top) for alias in node.names)


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_packages_know_only_what_they_may(path: Path) -> None:
    own = path.relative_to(ROOT).parts[0]
    for module, _ in imports(path):
        package = module.partition(".")[0]
        if package in PACKAGES and package != own:
            assert package in MAY_IMPORT[own], f"{own} imports {module}"
        if own == "baselines" and package == "ssdd_models":
            assert ".".join(module.split(".")[:2]) in OF_SSDD, f"baselines imports {module}"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_heavy_packages_are_imported_where_they_are_needed(path: Path) -> None:
    assert not [module for module, top in imports(path) if top and module.partition(".")[0] in HEAVY]


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_files_and_functions_stay_readable(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= LINES
    assert path.stem not in ("utils", "helpers", "common", "misc")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and not node.name.startswith(LONGER):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= FUNCTION_LINES, f"{node.name} has {length} lines"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_no_error_is_swallowed_whole(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"line {node.lineno}: bare except"
            assert getattr(node.type, "id", "") not in ("Exception", "BaseException"), f"line {node.lineno}"


def test_records_tables_and_names_do_not_import_torch() -> None:
    code = f"import sys, {', '.join(WITHOUT_TORCH)}; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
