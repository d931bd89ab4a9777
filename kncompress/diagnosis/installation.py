"""Python, the packages and their declared versions, and whether what is installed computes."""

import platform
import tomllib
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from kncompress.diagnosis.findings import Finding
from kncompress.terminal import named_line

AREA = "installation"
_FOR_DEVELOPERS = ("dev", "docs")


def declared() -> tuple[str, dict[str, list[Requirement]]]:
    """The range of Python versions, and the packages asked for, ``{extra: [...]}``; ``""`` are those of every install.

    From the metadata of the installed package, or from ``pyproject.toml`` of the checkout that it is run in.
    """
    project = Path(__file__).resolve().parents[2] / "pyproject.toml"
    if project.is_file():
        table = tomllib.loads(project.read_text(encoding="utf-8"))["project"]
        groups = {"": table["dependencies"], **table["optional-dependencies"]}
        return table["requires-python"], {name: [Requirement(text) for text in g] for name, g in groups.items()}
    found = metadata.metadata("kncompress")
    extras = ["", *(found.get_all("Provides-Extra") or [])]
    wanted: dict[str, list[Requirement]] = {name: [] for name in extras}
    for requirement in map(Requirement, metadata.requires("kncompress") or []):
        marker = requirement.marker
        place = next((name for name in extras if marker is None or marker.evaluate({"extra": name})), None)
        if place is not None:
            wanted[place].append(requirement)
    return found["Requires-Python"], wanted


def check_installation() -> list[Finding]:
    """Python, packages, extras, and a Kronecker product computed in two ways."""
    python, groups = declared()
    return [
        check_python(python, platform.python_version()),
        *check_packages(groups[""]),
        *(check_extra(name, wanted) for name, wanted in groups.items() if name and name not in _FOR_DEVELOPERS),
        *check_works(),
    ]


def check_python(wanted: str, version: str) -> Finding:
    """Whether this Python is in the declared range."""
    if SpecifierSet(wanted).contains(version, prereleases=True):
        return Finding(AREA, "Python", "ok", f"{version} ({wanted})")
    todo = f"make a virtual environment with a Python {wanted}"
    return Finding(AREA, "Python", "broken", f"{version}, but {wanted} is needed", todo)


def check_packages(wanted: Iterable[Requirement]) -> list[Finding]:
    """One finding for all packages that are as declared, and one for each other."""
    good, bad = [], []
    for requirement in wanted:
        version, fits = _installed(requirement)
        if version and fits:
            good.append(f"{requirement.name} {version}")
            continue
        state = "missing" if version is None else f"{version}, outside the range that is supported"
        text = f"{state} ({requirement.specifier or 'any version'})"
        bad.append(Finding(AREA, requirement.name, "broken", text, f"pip install '{_plain(requirement)}'"))
    return ([Finding(AREA, "packages", "ok", ", ".join(good))] if good else []) + bad


def check_extra(name: str, wanted: Iterable[Requirement]) -> Finding:
    """Whether an extra is there; one that is not is no fault."""
    lacking = [_plain(requirement) for requirement in wanted if not all(_installed(requirement))]
    if not lacking:
        return Finding(AREA, f"extra {name}", "ok", "installed")
    todo = f"where you need it: pip install 'kncompress[{name}]'"
    return Finding(AREA, f"extra {name}", "note", f"lacks {', '.join(lacking)}", todo)


def _installed(requirement: Requirement) -> tuple[str | None, bool]:
    """The installed version, or None, and whether it is in the declared range."""
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return None, False
    return version, requirement.specifier.contains(version, prereleases=True)


def _plain(requirement: Requirement) -> str:
    return f"{requirement.name}{requirement.specifier}"


def check_works() -> list[Finding]:
    """Imports what the verbs need and computes with it; an error becomes a finding."""
    return [
        attempt("Kronecker layers", _product, "reinstall torch: pip install --force-reinstall torch"),
        attempt("transformers", _loader, "reinstall transformers: pip install --force-reinstall transformers"),
        attempt("bundled teacher", _teacher, "reinstall kncompress: its assets are incomplete"),
    ]


def attempt(name: str, work: Callable[[], str], todo: str, area: str = AREA) -> Finding:
    """``work`` returns what is to be told; whatever it raises is the finding."""
    try:
        return Finding(area, name, "ok", work())
    except Exception as error:
        return Finding(area, name, "broken", named_line(error), todo)


def _product() -> str:
    import torch

    from kncompress.kron import KroneckerLinear, KroneckerShape

    layer = KroneckerLinear(KroneckerShape((4, 2), (2, 4), 2))
    x = torch.randn(3, 8)
    difference = float((layer(x) - layer.to_dense()(x)).detach().abs().max())
    if not difference < 1e-5:
        raise ArithmeticError(f"a factored map and its dense twin differ by {difference:.2g}")
    return f"a factored map and its dense twin agree (torch {torch.__version__})"


def _loader() -> str:
    from transformers.quantizers import auto

    if "kronecker" not in auto.AUTO_QUANTIZER_MAPPING:
        raise LookupError("the loader of compressed folders is not registered")
    return "reads compressed folders"


def _teacher() -> str:
    from safetensors import safe_open

    folder = Path(__file__).resolve().parents[1] / "assets" / "mini"
    with safe_open(folder / "model.safetensors", framework="np") as file:
        count = len(list(file.keys()))
    return f"{count} tensors"
