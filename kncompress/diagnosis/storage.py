"""The folders that runs write to: whether they can be written, and what is free."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from kncompress.data.tokens import cache_root
from kncompress.diagnosis.findings import Finding, Level

AREA = "disk"
_GB = 10**9


def check_storage(run_dir: Path, least: float) -> list[Finding]:
    """Folders of runs, token caches, the hub's cache and temporary files; ``least`` free gigabytes."""
    places: tuple[tuple[str, Callable[[], Path], str], ...] = (
        ("runs", lambda: run_dir.parent, "run_dir=<folder>"),
        ("cache", lambda: cache_root(None), "KNCOMPRESS_CACHE=<folder>"),
        ("hub cache", hub_cache, f"{_hub_variable()}=<folder>"),
        ("temporary files", lambda: Path(tempfile.gettempdir()), "TMPDIR=<folder>"),
    )
    findings = []
    for name, place, change in places:
        try:
            findings.append(check_folder(name, place(), change, least))
        except RuntimeError:  # of expanduser
            text = "the variable begins with ~ and a user who is unknown here"
            findings.append(Finding(AREA, name, "broken", text, f"give another: {change}"))
    return findings


def hub_home() -> Path:
    """Where Hugging Face's libraries keep what is theirs: ``$HF_HOME``, else below ``$XDG_CACHE_HOME``."""
    home = os.environ.get("HF_HOME") or str(Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface")
    return Path(os.path.expandvars(home)).expanduser()


def hub_cache() -> Path:
    """Where models and data sets of the hub lie."""
    name = _hub_variable()
    return hub_home() / "hub" if name == "HF_HOME" else Path(os.path.expandvars(os.environ[name])).expanduser()


def _hub_variable() -> str:
    """The variable that moves ``hub_cache``."""
    return next((name for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE") if os.environ.get(name)), "HF_HOME")


def check_folder(name: str, folder: Path, change: str, least: float) -> Finding:
    """One folder, or where it does not exist yet the one above it; a file is written there and removed."""
    place = folder.absolute()
    text = f"{folder}"
    try:
        while not place.exists():
            place = place.parent
        with tempfile.NamedTemporaryFile(dir=place):
            pass
        free = shutil.disk_usage(place).free / _GB
    except OSError as error:
        # Models that lie in a read-only hub cache can still be read.
        level: Level = "note" if name == "hub cache" else "broken"
        return Finding(AREA, name, level, f"{text} cannot be written ({error.strerror})", f"give another: {change}")
    text += f", {free:,.1f} GB free"
    if free < least:
        return Finding(AREA, name, "note", text, f"make room, or give another: {change}")
    return Finding(AREA, name, "ok", text)
