"""The folder of a run: its name, and taking it so that no two runs share one."""

import contextlib
import errno
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kncompress.errors import UserError
from kncompress.runs.lock import LOCK, in_use
from kncompress.runs.metrics_file import METRICS, complete_rows
from kncompress.runs.process import RUN_DIR, process_rank
from kncompress.runs.stored import GONE_ON_WITH, RUN, read_run

TRACES = ("run.json", "result.json", "metrics.csv", "checkpoints", "model", "wandb")
"""Any of these in a folder says that a run has been there."""
_HALF_WRITTEN = re.compile(r"\.(config\.yaml|run\.json)\.\d+\.tmp")
"""What a kill in the writing of a record leaves."""


def inherited() -> Path | None:
    """The folder that the main process of a distributed run has taken; None in a main process."""
    folder = os.environ.get(RUN_DIR)
    return Path(folder) if folder and process_rank() != 0 else None


def refuse_unknown(run_dir: str | None) -> None:
    """Raises UserError where another launcher starts the processes and no ``run_dir`` tells the folder."""
    started = os.environ.get("WORLD_SIZE", "1") != "1" or process_rank() != 0
    if started and run_dir is None and inherited() is None:
        raise UserError("run_dir=null: give run_dir=<folder> where torchrun or srun starts the processes")


def default_name(verb: str, choices: list[dict[str, Any]]) -> str:
    """``train-<experiment>`` or ``train-mini-kngpt2``, without the presets that differ between the jobs.

    ``choices`` has ``{group: preset}`` for each job.
    """
    for groups in (("experiment",), ("model", "factors", "data") if verb == "evaluate" else ("model", "factors")):
        parts = []
        for group in groups:
            values = {str(job[group]).strip("[]").replace(", ", "+") for job in choices if job.get(group)}
            parts += sorted(values) if len(values) == 1 else []
        if parts:
            return "-".join([verb, *parts]).replace("/", "-")
    return verb


def take(run_dir: str | None, name: str, verb: str | None = None) -> Path:
    """Make the run folder and return its absolute path.

    ``run_dir`` is the user's (UserError where it holds anything, but what a run of ``verb`` leaves that is killed
    before its record, which is removed); without it ``runs/<name>-<time>`` is made, with ``-2``, ``-3``, ... where
    another process took the name in the same second.
    """
    if run_dir is not None:
        folder = Path(run_dir).expanduser().absolute()
        if verb and folder.is_dir() and killed_at_the_start(folder, verb) and not in_use(folder):
            discard(folder, made=False)
        refuse_used(folder)
        _make(folder, f"run_dir={folder}")
        return folder
    parent = Path("runs").absolute()
    _make(parent, f"run_dir=null: {parent}")
    stem = f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    number = 1
    while True:
        folder = parent / (stem if number == 1 else f"{stem}-{number}")
        try:
            folder.mkdir()
        except FileExistsError:
            number += 1
        else:
            return folder


def _make(folder: Path, what: str) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise UserError(f"{what}: cannot be written: {error.strerror}; give run_dir=<another folder>") from None


def refuse_used(folder: Path) -> None:
    """Raises UserError where ``folder`` is a file or holds another run or other files."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"run_dir={folder}: a file; give a new folder")
    refuse_run(folder)
    if folder.is_dir() and any(entry.name != LOCK for entry in folder.iterdir()):
        raise UserError(f"run_dir={folder}: holds files; give a new or empty folder")


def refuse_run(folder: Path) -> None:
    """Raises UserError where a run has been in ``folder``."""
    trace = next((name for name in TRACES if (folder / name).exists()), None)
    if trace:
        raise UserError(f"run_dir={folder}: holds another run ({trace}); give a new folder, or resume={folder}")


def unfinished_run(folder: Path, verb: str, key: str = "resume") -> dict[str, Any]:
    """``run.json`` of the run of ``verb`` in ``folder``, which can be resumed. Raises UserError, which names ``key``,
    where it cannot."""
    name = f"{key}={folder}"
    if not (folder / "run.json").is_file():
        raise UserError(f"{name}: not a run folder (no run.json in it)")
    run = read_run(folder, name)
    for field in GONE_ON_WITH:
        if field not in run:
            raise UserError(f"{name}: {RUN}: has no {field}")
    if (folder / METRICS).is_file():
        complete_rows(folder / METRICS, name)
    if run["verb"] != verb:
        raise UserError(f"{name}: a run of {run['verb']}, not of {verb}")
    if run["status"] == "finished":
        raise UserError(f"{name}: this run is finished; name the folder of an unfinished run")
    return run


def begun_before(folder: Path, verb: str) -> bool:
    """Whether ``folder`` holds a run of ``verb`` that was stopped before its end: killed, interrupted, or failed.

    Raises UserError where its record is damaged.
    """
    if not (folder / RUN).is_file() or not (folder / "config.yaml").is_file():
        return False
    run = read_run(folder, f"run_dir={folder}")
    return run["verb"] == verb and run["status"] != "finished"


def check_contents(folder: Path, config: Any, contents: Mapping[str, str], key: str = "resume") -> None:
    """Raises UserError where the run in ``folder`` has read another model, tokenizer or text than is there now.

    Args:
        config: of the run, for the values that the error names.
        contents: {key of the configuration: hash of the content that it names}, as ``run.json`` has them.
        key: that the user has named the folder by.
    """
    for name, content in read_run(folder, f"{key}={folder}").get("contents", {}).items():
        if contents.get(name, content) != content:
            value = config
            for part in name.split("."):
                value = value.get(part) if isinstance(value, Mapping) else getattr(value, part, None)
            told = "is not what the run began with, its content has changed; put it back, or start a new run"
            raise UserError(f"{key}={folder}: {name}={value}: {told}")


def killed_at_the_start(folder: Path, verb: str) -> bool:
    """Whether ``folder`` holds what a run of ``verb`` leaves that is killed before its record, and nothing else."""
    log, hydra = f"{verb}.log", {path.name for path in (folder / ".hydra").glob("*")}
    found = {path.name for path in folder.glob("*") if not _HALF_WRITTEN.fullmatch(path.name)} - {LOCK}
    if found == {log}:
        return (folder / log).stat().st_size == 0
    if ".hydra" not in found or hydra - {"config.yaml", "hydra.yaml", "overrides.yaml"}:
        return False
    return found <= {".hydra", log} | ({"config.yaml"} if "hydra.yaml" in hydra else set())


def discard(folder: Path, made: bool) -> None:
    """Remove what was written for a run that never began, and the folder too if ``made`` for it.

    For folders that this command has made or found empty, or that ``killed_at_the_start`` knows.
    """
    hydra = [folder / ".hydra" / f"{name}.yaml" for name in ("config", "hydra", "overrides")]
    half = [path for path in folder.glob(".*.tmp") if _HALF_WRITTEN.fullmatch(path.name)]
    for file in [*hydra, *half, *folder.glob("*.log"), folder / "config.yaml", folder / LOCK]:
        file.unlink(missing_ok=True)
    for empty in (folder / ".hydra", *((folder,) if made else ())):
        with contextlib.suppress(OSError):  # it holds something of the user's or of the verb's
            empty.rmdir()
