"""The wheel: built, installed in a new environment outside the checkout, and run there."""

import ast
import os
import subprocess
import sys
import sysconfig
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from waiting import PATIENCE

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    line = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = folder.glob("*.whl")
    return built


def test_runs_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    python = venv / "bin" / "python"
    paths = sysconfig.get_paths(vars={"base": str(venv), "platbase": str(venv)})
    site = Path(paths["purelib"])
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", str(wheel)]
    subprocess.run(install, check=True)
    # The dependencies, which weigh gigabytes, are those of this environment; a path file in it is not read, so
    # the checkout does not come with them.
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    work = tmp_path / "elsewhere"
    work.mkdir()
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "KNCOMPRESS"))}
    environment |= {"OMP_NUM_THREADS": "2", "KNCOMPRESS_CACHE": str(tmp_path / "cache")}

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(python), *words],
            cwd=work,
            env=environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )

    where = run("-c", "import kncompress; print(kncompress.__file__)")
    assert Path(where.stdout.strip()).is_relative_to(site), where.stdout + where.stderr
    words = [
        "+experiment=wikitext_ilkd",
        "trainer.steps=2",
        "trainer.batch_tokens=1024",
        "calibration.tokens=1024",
        "repair.passes=1",
        "run_dir=run",
        "logger=csv",
    ]
    # A short test text: scoring the sample's takes longer than the steps.
    (work / "test.txt").write_text("The river runs past the old mill and down to the sea. " * 100)
    done = run("-m", "kncompress", "train", *words, "data.test=test.txt")
    assert done.returncode == 0, done.stderr
    assert (work / "run" / "model" / "model.safetensors").exists()
    script = subprocess.run([str(venv / "bin" / "kncompress"), "--version"], capture_output=True, text=True, check=True)
    assert script.stdout.split() == ["kncompress", PROJECT["version"]]


def _imported(folder: Path) -> set[str]:
    """Top-level names that the Python files of a folder import from elsewhere."""
    found: set[str] = set()
    for file in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.partition(".")[0])
    return found - set(sys.stdlib_module_names) - {"kncompress"}


def test_what_the_package_imports_is_declared() -> None:
    extras = PROJECT["optional-dependencies"].values()
    declared = {
        canonicalize_name(Requirement(text).name) for group in [PROJECT["dependencies"], *extras] for text in group
    }
    owners = packages_distributions()
    known_through = {"yaml": "omegaconf"}  # the YAML reader of omegaconf
    for name in _imported(ROOT / "kncompress"):
        names = {canonicalize_name(owner) for owner in owners.get(known_through.get(name, name), [name])}
        assert names & declared, f"{name} is imported, but pyproject.toml does not name it"
