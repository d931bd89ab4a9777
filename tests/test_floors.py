"""The plan of the house: a file imports only from floors below its own."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import kncompress

PACKAGE = Path(kncompress.__file__).parent
FLOORS = {
    "errors": -2, "terminal": -2, "reading": -1, "config": 0, "hub": 0, "runs": 0, "kron": 1, "data": 2, "distill": 2,
    "anatomy": 2, "compression": 3, "formats": 3, "evaluation": 3, "diagnosis": 3, "training": 4, "glue": 5,
    "planner": 5, "bench": 6, "reports": 6, "cli": 7, "commands": 8, "__main__": 9,
}  # fmt: skip
# The package itself is its version, and the hook that registers the plug-in by name.
ANYWHERE = {"kncompress"}


def imports(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names if node.module == "kncompress")
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def room(module: str) -> str:
    return module.split(".")[1]


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda f: str(f.relative_to(PACKAGE)))
def test_no_import_climbs(file: Path) -> None:
    own = file.relative_to(PACKAGE).with_suffix("").parts[0]
    if own == "__init__":
        return
    for module in imports(file):
        if not module.startswith("kncompress") or module in ANYWHERE or module == "kncompress.__version__":
            continue
        other = room(module)
        assert other == own or FLOORS[other] < FLOORS[own], f"{file.name} imports {module}"


def test_kron_needs_torch_alone() -> None:
    allowed = {"torch", "kncompress", "math", "re", "typing", "dataclasses", "collections", "functools", "contextlib"}
    for file in (PACKAGE / "kron").glob("*.py"):
        for module in imports(file):
            assert module.split(".")[0] in allowed, f"{file.name} imports {module}"
            assert not module.startswith("kncompress.") or room(module) == "kron"


def test_only_cli_and_commands_know_hydra() -> None:
    for file in PACKAGE.rglob("*.py"):
        if file.relative_to(PACKAGE).parts[0] not in ("cli", "commands"):
            assert not any(module.split(".")[0] == "hydra" for module in imports(file)), file


def test_no_files_import_each_other_in_a_circle() -> None:
    """Imports at the top of a file; those inside functions come late on purpose."""
    names = {".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts): file for file in PACKAGE.rglob("*.py")}
    graph: dict[str, set[str]] = {}
    for name, file in names.items():
        top = [node for node in ast.parse(file.read_text()).body if isinstance(node, ast.ImportFrom) and node.module]
        found = {f"{node.module}.{alias.name}" for node in top for alias in node.names}
        graph[name] = (found | {str(node.module) for node in top}) & set(names)
    TopologicalSorter(graph).prepare()  # raises CycleError and names the files
