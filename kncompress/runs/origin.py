"""Where a result comes from: the code's commit, the versions installed, the machine."""

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = (
    "kncompress",
    "torch",
    "lightning",
    "transformers",
    "tokenizers",
    "safetensors",
    "datasets",
    "numpy",
    "hydra-core",
    "omegaconf",
    "wandb",
    "torchmetrics",
)
CODE = Path(__file__).resolve().parents[1]


def code_commit(package: Path = CODE) -> dict[str, Any]:
    """Return ``{"sha", "dirty"}`` of the git checkout that holds ``package``; both None outside one.

    ``dirty`` tells of changes to the code and its configuration, not of run folders lying about. A package
    installed into somebody else's checkout (a virtual environment, say) is not part of that checkout.
    """
    nothing: dict[str, Any] = {"sha": None, "dirty": None}
    if _git(package, "ls-files", "--error-unmatch", "--", "errors.py") is None:
        return nothing
    sha = _git(package, "rev-parse", "HEAD")
    state = _git(package, "status", "--porcelain", "--", ".", ":/conf", ":/pyproject.toml")
    if sha is None or state is None:
        return nothing
    return {"sha": sha, "dirty": bool(state)}


def _git(folder: Path, *arguments: str) -> str | None:
    # A run started from a git hook inherits variables that point at the hook's repository.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    environment["GIT_OPTIONAL_LOCKS"] = "0"
    command = ["git", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def versions() -> dict[str, str | None]:
    """Return the versions of Python and of the packages that shape a result, read without importing them."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def machine() -> dict[str, Any]:
    """Return platform, processor, cores this process may use, memory in bytes, and the accelerators in use.

    Accelerators are None until torch has been imported: looking for one earlier would cost seconds.
    """
    return {
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": _cores(),
        "memory": _memory(),
        "accelerators": _accelerators(),
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _cores() -> int | None:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None


def _accelerators() -> list[str] | None:
    torch = sys.modules.get("torch")
    if torch is None:
        return None
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
