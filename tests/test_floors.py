"""The plan of the house: a file imports only from floors below its own."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import kncompress

PACKAGE = Path(kncompress.__file__).parent
FLOORS = {
    "errors": -1, "config": 0, "hub": 0, "kron": 1, "models": 2, "distill": 2, "data": 2, "metrics": 2, "tasks": 3,
    "tracking": 4, "evaluation": 4, "diagnosis": 4, "commands": 5, "__main__": 6,
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


def test_only_commands_know_hydra() -> None:
    for file in PACKAGE.rglob("*.py"):
        if file.relative_to(PACKAGE).parts[0] != "commands":
            assert not any(module.split(".")[0] == "hydra" for module in imports(file)), file
