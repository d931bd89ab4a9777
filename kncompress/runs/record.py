"""The record of a run: what was asked, with which code, on which machine, and what came of it."""

import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from json import dumps
from pathlib import Path
from types import TracebackType
from typing import Any, SupportsFloat

from filelock import FileLock

from kncompress.errors import CheckFailed, UserError
from kncompress.runs.config_file import config_differences, read_config, write_config
from kncompress.runs.lock import lock
from kncompress.runs.origin import code_commit, machine, versions
from kncompress.runs.process import Status, outcome, peak_memory, process_rank
from kncompress.runs.run_folder import begun_before, refuse_run, unfinished_run
from kncompress.runs.stored import read_result, read_run
from kncompress.runs.whole_file import remove_left_overs, write_text
from kncompress.terminal import first_line, named_line


class RunRecord:
    """A run folder's ``config.yaml``, ``run.json`` and ``result.json``; use :meth:`open`, then as a context.

    Leaving the context writes both JSON files: status finished, or failed or interrupted after an exception,
    which goes on its way. Only rank 0 writes; the other processes hold a record that does nothing.
    """

    def __init__(self, folder: Path, fields: dict[str, Any], lock: FileLock | None) -> None:
        self.folder = folder
        self.fields = fields
        self._lock = lock
        self._since = time.monotonic()
        self._wall_before: float = fields["wall_seconds"]
        self._metrics: dict[str, float | int | None] = {}
        self._model: str | None = None
        self._plan: str | None = None
        self._texts: list[dict[str, Any]] | None = None

    @classmethod
    def open(
        cls,
        folder: str | Path,
        verb: str,
        config: Mapping[str, Any],
        seed: int,
        resume: bool = False,
        rank: int | None = None,
        contents: Mapping[str, str] | None = None,
    ) -> "RunRecord":
        """Claim ``folder`` for a run, made if absent, and write its ``config.yaml`` and ``run.json``.

        Args:
            verb: the command's name, such as ``train``.
            config: the resolved configuration as a plain dict.
            resume: go on with the unfinished run in ``folder``. Its W&B id, start and seconds so far are
                kept; configuration values that differ from the earlier ones are noted under ``resumes``. A run
                without a key ``resume``, which goes on from nothing, needs none: one with the same configuration
                that was stopped before its end is begun again, and what it has left is written anew.
            rank: rank of this process; None: from the environment.
            contents: {key of the configuration: hash of the content that it names}, kept in ``run.json`` for
                ``run_folder.check_contents``.

        Raises:
            UserError: ``folder`` holds another run, or with ``resume`` none that could go on; or another
                process is at work in it.
        """
        folder = Path(folder).absolute()
        fields: dict[str, Any] = _new_fields(verb, seed) | {"contents": dict(contents or {})}
        if (process_rank() if rank is None else rank) != 0:
            return cls(folder, fields, None)
        _before(folder, verb, config, resume)  # before anything is written
        folder.mkdir(parents=True, exist_ok=True)
        taken = lock(folder, "resume" if resume else "run_dir")
        try:
            # Another process may have come and gone between the first look and the lock. It may still be writing how it
            # ended: where this one is refused, it leaves everything as it is.
            before = _before(folder, verb, config, resume)
            remove_left_overs(folder)
            if before is not None:
                fields = _resumed(folder, before, fields, config)
            record = cls(folder, fields, taken)
            write_config(folder / "config.yaml", config)
            (folder / "result.json").unlink(missing_ok=True)
            record.save()
        except BaseException:
            taken.release()
            raise
        _BEGUN.add(folder)
        return record

    @property
    def writes(self) -> bool:
        """Whether this process is the one that writes."""
        return self._lock is not None

    @property
    def wandb_id(self) -> str | None:
        """Id of the run's W&B run; setting it writes ``run.json``, so that a resume finds it."""
        return self.fields["wandb_id"]

    @wandb_id.setter
    def wandb_id(self, value: str) -> None:
        self.fields["wandb_id"] = value
        self.save()

    def save(self) -> None:
        """Write ``run.json`` with seconds and peak memory so far; what follows is lost to a SIGKILL."""
        if self.writes:
            self.fields["wall_seconds"] = round(self._wall_before + time.monotonic() - self._since, 3)
            self.fields["peak_memory_bytes"] = peak_memory()
            _write_json(self.folder / "run.json", self.fields)

    @contextmanager
    def tolerating(self, what: str) -> Iterator[None]:
        """Work that a run can do without: an error in the block becomes a warning, told and kept in ``run.json``."""
        try:
            yield
        except Exception as error:
            self.warn(f"{what}: {_one_line(error)}")

    def warn(self, text: str) -> None:
        """Tell a warning, and keep it in ``run.json``."""
        print(f"kncompress: warning: {text}", file=sys.stderr, flush=True)
        self.fields["warnings"].append(text)
        self.save()

    def finish(
        self,
        status: Status,
        metrics: Mapping[str, SupportsFloat] | None = None,
        model: str | Path | None = None,
        error: BaseException | None = None,
        plan: str | Path | None = None,
        texts: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        """Write ``result.json`` and complete ``run.json``.

        Args:
            metrics: flat names to numbers (0-dim tensors too). What is not finite is written as null, for
                JSON knows neither NaN nor infinity; the name stays, so that a reader sees that it was
                measured. None keeps those of an earlier call.
            model: model folder inside the run folder, absolute or relative to it. None keeps the earlier one.
            error: what ended the run; its first line goes into ``run.json``.
            plan: file of chosen factors inside the run folder, as ``model``; ``result.json`` names it only
                where there is one.
            texts: what models have written, as plain data; ``result.json`` has them only where there are any.

        Raises:
            TypeError: a metric is not a number.
            ValueError: ``model`` or ``plan`` lies outside the run folder or does not exist.
        """
        if metrics is not None:
            self._metrics = {name: _number(name, value) for name, value in metrics.items()}
        if model is not None:
            self._model = self._inside("model", Path(model))
        if plan is not None:
            self._plan = self._inside("plan", Path(plan))
        if texts is not None:
            self._texts = [dict(text) for text in texts]
        self.fields |= {"status": status, "ended": _now(), "error": None if error is None else _one_line(error)}
        self.fields["machine"] = machine()  # torch, and with it the accelerator, is known by now
        if self.writes:
            result: dict[str, Any] = {
                "verb": self.fields["verb"],
                "status": status,
                "metrics": self._metrics,
                "model": self._model,
            }
            if self._plan is not None:
                result["plan"] = self._plan
            if self._texts is not None:
                result["texts"] = self._texts
            _write_json(self.folder / "result.json", result)
            self.save()

    def _inside(self, name: str, given: Path) -> str:
        path = (self.folder / given).resolve()
        if not path.exists() or not path.is_relative_to(self.folder.resolve()):
            raise ValueError(f"{name}={given}: not in the run folder {self.folder}")
        return path.relative_to(self.folder.resolve()).as_posix()

    def close(self) -> None:
        """Let another process have the folder."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def __enter__(self) -> "RunRecord":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            status, code = outcome(error)
            if code or self.fields["status"] == "running":
                self.finish(status, error=error)
        finally:
            self.close()


def _new_fields(verb: str, seed: int) -> dict[str, Any]:
    return {
        "verb": verb,
        "status": "running",
        "command": list(sys.argv),
        "seed": seed,
        "git": code_commit(),
        "versions": versions(),
        "machine": machine(),
        "started": _now(),
        "ended": None,
        "wall_seconds": 0.0,
        "peak_memory_bytes": None,
        "wandb_id": None,
        "wandb_group": None,
        "wandb_tags": [],
        "error": None,
        "warnings": [],
        "resumes": [],
    }


_BEGUN: set[Path] = set()
"""Folders whose run this process has begun, or gone on with."""


def forget(folder: Path) -> None:
    """A job begins in ``folder``: what this process did there before is another one's."""
    _BEGUN.discard(folder.absolute())


def began(folder: Path) -> bool:
    """Whether the run in ``folder`` is that of the job at work, not an earlier or another process's one."""
    return folder.absolute() in _BEGUN


def keep_outcome(folder: Path, verb: str, outcome: Mapping[str, Any], began: bool) -> None:
    """Make ``result.json`` and ``run.json`` say how a job ended, where its record could not: it was never opened, or
    was closed before a signal or an error came.

    Args:
        outcome: ``status``, ``exit_code`` and, where there are any, ``error`` and ``metrics``.
        began: whether the run in ``folder`` is that of this job, and not an earlier one that could not be resumed.
    """
    file = folder / "result.json"
    if outcome["status"] != "finished" or not file.exists():
        metrics = {name: _number(name, value) for name, value in outcome.get("metrics", {}).items()}
        result = _readable(read_result, folder) or {"verb": verb, "metrics": metrics, "model": None}
        _write_json(file, result | {key: value for key, value in outcome.items() if key != "metrics"})
    run = _readable(read_run, folder) if began else {}
    if run and run.get("status") != outcome["status"]:
        _write_json(folder / "run.json", run | {"status": outcome["status"], "error": outcome.get("error")})


def _readable(read: Callable[[Path, str], dict[str, Any]], folder: Path) -> dict[str, Any]:
    """A record of this very job; one that was damaged meanwhile is written anew."""
    with suppress(UserError):
        return read(folder, str(folder))
    return {}


def _before(folder: Path, verb: str, config: Mapping[str, Any], resume: bool) -> dict[str, Any] | None:
    """``run.json`` of the run that goes on, or is begun again, in ``folder``; None where a new one begins there.

    Raises UserError where the folder holds a run that neither is possible for.
    """
    if resume:
        return unfinished_run(folder, verb)
    if "resume" not in config and begun_before(folder, verb):
        saved = read_config(folder / "config.yaml", f"run_dir={folder}")
        if not config_differences(saved, config):
            return unfinished_run(folder, verb, "run_dir")
    refuse_run(folder)
    return None


def _resumed(folder: Path, before: dict[str, Any], fields: dict[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    changed = config_differences(read_config(folder / "config.yaml"), config)
    resume = {"at": fields["started"], "command": fields["command"], "changed": changed}
    kept = {name: before[name] for name in ("started", "wall_seconds", "wandb_id", "command")}
    kept |= {name: before[name] for name in ("wandb_group", "wandb_tags") if name in before}  # older runs have none
    return fields | kept | {"resumes": [*before["resumes"], resume]}


def _number(name: str, value: SupportsFloat) -> float | int | None:
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"metric {name}={value!r}: not a number")
    return value if math.isfinite(value) else None


def _one_line(error: BaseException) -> str:
    return first_line(error) if isinstance(error, UserError | CheckFailed) else named_line(error)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_text(path, dumps(content, indent=2, allow_nan=False) + "\n")
