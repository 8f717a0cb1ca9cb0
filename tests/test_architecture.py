"""Who may know whom and what stays readable, read from the source; docs/architecture.md lists the rooms."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from baselines.published import PUBLISHED
from tests import ROOT

PACKAGES = ("tokbench", "baselines", "ssdd_models")
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob("*.py"))
}
PAGES = [ROOT / name for name in ("docs/architecture.md", "CONTRIBUTING.md")]
# Rooms and root modules of tokbench in the order of the data: each imports only from those before it.
ROWS = re.findall(r"^\| `(\w+)` \| .* \|( yes)? \|$", PAGES[0].read_text(), re.MULTILINE)
ORDER = [name for name, _ in ROWS]
FUNCTION_LINES = 60  # a forward pass may be longer
MOST_MODULES = {"tokbench": 8, "ssdd_models": 12}  # beside __init__; 10 elsewhere. SSDD's are the parts of one paper
HEAVY = {"lpips", "dreamsim", "torch_fidelity", "diffusers", "transformers"}
WITHOUT_TORCH = [name for name, torch in ROWS if not torch and (ROOT / "tokbench" / name).is_dir()]
MAY_IMPORT = {"tokbench": set(), "ssdd_models": {"tokbench"}, "baselines": {"tokbench", "ssdd_models"}}
OF_SSDD = {"ssdd_models.layers", "ssdd_models.encoder"}  # what baselines may use


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Every module a file imports, inside functions too, and whether it does so at its top level."""
    tree = ast.parse(path.read_text())
    top = set(map(id, tree.body))
    annotations = {
        id(node)
        for block in tree.body
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if id(node) in annotations:
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in FILES else node.module, id(node) in top


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


@pytest.mark.parametrize("module", FILES)
def test_packages_know_only_what_they_may(module: str) -> None:
    own = module.partition(".")[0]
    for other, _ in imports(FILES[module]):
        package = other.partition(".")[0]
        if package in PACKAGES and package != own:
            assert package in MAY_IMPORT[own], f"{own} imports {other}"
        if own == "baselines" and package == "ssdd_models":
            assert ".".join(other.split(".")[:2]) in OF_SSDD, f"baselines imports {other}"


@pytest.mark.parametrize("module", [name for name in FILES if room(name) in ORDER and name.startswith("tokbench.")])
def test_rooms_import_only_from_rooms_before_them(module: str) -> None:
    for other, _ in imports(FILES[module]):
        if other.startswith("tokbench.") and room(other) in ORDER:
            assert ORDER.index(room(other)) <= ORDER.index(room(module)), f"{module} imports {other}"


def test_every_room_has_its_place_in_the_order() -> None:
    assert {room(name) for name in FILES if name.startswith("tokbench.")} == set(ORDER)
    assert set(WITHOUT_TORCH) == {"records", "report", "comparison", "sharing"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_the_pages_name_is_there(page: Path) -> None:
    named = re.findall(r"`([\w./]+/[\w.]+\.\w+)`", page.read_text())
    assert named
    assert not [name for name in named if not (ROOT / name).exists() and not (ROOT / "tokbench" / name).exists()]


def test_no_import_goes_in_a_circle() -> None:
    graph = {name: {other for other, _ in imports(path) if other in FILES and other != name}
             for name, path in FILES.items()}  # fmt: skip
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"circle: {' -> '.join(error.args[1])}")


def test_rooms_hold_few_modules() -> None:
    families = {row.kind for row in PUBLISHED.values()}  # one module a family, however many there are
    for folder in sorted({path.parent for path in FILES.values()}):
        where = folder.relative_to(ROOT).as_posix()
        modules = {path.stem for path in folder.glob("*.py")} - {"__init__"}
        if where == "baselines/families":
            modules -= families
        assert len(modules) <= MOST_MODULES.get(where, 10), f"{where} has {len(modules)}"


@pytest.mark.parametrize("module", [name for name, path in FILES.items() if path.name == "__init__.py"])
def test_every_room_says_what_it_is(module: str) -> None:
    assert ast.get_docstring(ast.parse(FILES[module].read_text())), f"{module} has no docstring"


@pytest.mark.parametrize("module", FILES)
def test_heavy_packages_are_imported_where_they_are_needed(module: str) -> None:
    assert not [other for other, top in imports(FILES[module]) if top and other.partition(".")[0] in HEAVY]


@pytest.mark.parametrize("path", sorted((ROOT / "tests").rglob("test_*.py")), ids=lambda path: path.stem)
def test_tests_can_be_collected_where_diffusers_is_missing(path: Path) -> None:
    assert not {other.partition(".")[0] for other, top in imports(path) if top} & {"diffusers", "transformers"}


@pytest.mark.parametrize("module", FILES)
def test_functions_stay_readable(module: str) -> None:
    assert module.rpartition(".")[2] not in ("utils", "helpers", "common", "misc")
    for node in ast.walk(ast.parse(FILES[module].read_text())):
        if isinstance(node, ast.FunctionDef) and node.name != "forward":
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= FUNCTION_LINES, f"{node.name} has {length} lines"


@pytest.mark.parametrize("room", WITHOUT_TORCH)
def test_records_tables_and_verdicts_do_not_import_torch(room: str) -> None:
    modules = [name for name in FILES if name.startswith(f"tokbench.{room}.") and not name.endswith("pytest_plugin")]
    code = f"import sys, tokbench.registry, tokbench.cli, {', '.join(modules)}; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
