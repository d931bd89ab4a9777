"""The folder of a sweep: which jobs it has (``sweep.json``), which of them are missing, and finding it again.

The same command goes on in the same folder: finished jobs are kept, the others resumed or started anew.
"""

import contextlib
import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kncompress.cli.overrides import quoted
from kncompress.cli.resume import differences_from_saved
from kncompress.cli.verbs import Verb
from kncompress.config import RunConfig
from kncompress.errors import UserError
from kncompress.reading import read_json
from kncompress.runs.lock import in_use
from kncompress.runs.stored import read_result, read_run
from kncompress.runs.whole_file import write_text

FILE = "sweep.json"
_HARMLESS = re.compile(
    r"\+*hydra(\.(sweeper\.(jobs|parallel|seed)|launcher\.n_jobs)=\d+|\.sweeper\.metrics=\[[\w/, ]*\]|/launcher=\w+)"
).fullmatch
"""Settings of Hydra that are numbers, names of metrics, or the name of a launcher."""


@dataclass
class Sweep:
    """``sweep.json``: what was asked for, and the jobs so far."""

    verb: str
    words: list[str]
    """The user's words, without those of ``OWN``."""
    overrides: list[str]
    """The same in Hydra's grammar."""
    metrics: list[str]
    """What a search minimises; empty for a list of jobs."""
    jobs: list[list[str]]
    """Overrides of each job in Hydra's grammar; a search adds jobs as it goes."""
    job_words: list[list[str]]
    """The same as the user would type them."""

    def write(self, folder: Path) -> None:
        """Write ``sweep.json``, whole or not at all."""
        write_text(folder / FILE, json.dumps(asdict(self), indent=2) + "\n")


def read_sweep(folder: Path) -> Sweep | None:
    """The sweep in ``folder``; None where there is none. Raises UserError where the file is damaged."""
    return read_json(folder / FILE, Sweep, f"run_dir={folder}") if (folder / FILE).is_file() else None


def refuse_code(folder: Path, sweep: Sweep) -> None:
    """Raises UserError where the words of a sweep that was found in a folder could do more than set values of a verb.

    The folder may be a stranger's. Settings of Hydra can name classes to build, ``${...}`` can look up the
    environment, and ``@`` puts a preset in another place.
    """
    for word in [*sweep.words, *sweep.overrides, *(word for words in sweep.jobs + sweep.job_words for word in words)]:
        hydras = word.lstrip("+~").startswith("hydra")
        if "${" in word or "_target_" in word or "@" in word.partition("=")[0] or (hydras and not _HARMLESS(word)):
            raise UserError(
                f"resume={folder}: its {FILE} has {word}, which is not taken from a folder; give the sweep's own "
                "command with run_dir=<folder> instead"
            )


def find_sweep(run_dir: str | None, name: str, sweep: Sweep) -> Path | None:
    """The folder in which an earlier command has begun ``sweep``; None for a new one.

    With ``run_dir`` the sweep there, which must be the same; without it the newest among ``runs/<name>-*`` that no
    other process is at work in.

    Raises UserError where ``run_dir`` holds another sweep.
    """
    if run_dir is not None:
        folder = Path(run_dir).expanduser().absolute()
        found = read_sweep(folder)
        if found is not None and not _same(found, sweep):
            raise UserError(f"run_dir={run_dir}: holds another sweep ({' '.join(found.words)}); give a new folder")
        return folder if found is not None else None
    for folder in sorted(Path("runs").absolute().glob(f"{name}-*"), reverse=True):
        with contextlib.suppress(UserError):  # a damaged one is not gone on with
            found = read_sweep(folder)
            if found is not None and _same(found, sweep) and not in_use(folder):
                return folder
    return None


def changed_job(verb: Verb, folder: Path, configs: Sequence[RunConfig]) -> str | None:
    """How the configuration of an earlier job differs from that of today, e.g. by an edited preset; None: not."""
    for number, config in enumerate(configs):
        job = folder / str(number)
        if (job / "config.yaml").is_file() and (job / "run.json").is_file():
            with contextlib.suppress(UserError):
                for key, (old, new) in differences_from_saved(verb, job, config).items():
                    return f"job {number} has {key}={old}, now {new}"
    return None


def result_of(folder: Path) -> dict[str, Any]:
    """``result.json`` of a job; status ``running`` where it has begun, nothing where it has not.

    Raises UserError where it is damaged: the job may have finished, and is not removed to be run again.
    """
    return read_result(folder, f"run_dir={folder}") or ({"status": "running"} if folder.exists() else {})


def done_elsewhere(job: Path) -> bool:
    """Whether a job has finished, or another process is at work on it."""
    return result_of(job).get("status") == "finished" or in_use(job)


def missing(folder: Path, numbers: Sequence[int]) -> list[int]:
    """Jobs that have not finished and that no other process is at work on."""
    return [number for number in numbers if not done_elsewhere(folder / str(number))]


def launched(verb: Verb, folder: Path, number: int, overrides: Sequence[str]) -> list[str]:
    """The overrides that start job ``number`` in its own folder, or resume it where its run can be.

    What an unfinished job has left that cannot be resumed is removed.
    """
    job = folder / str(number)
    words = [*overrides, f"hydra.sweep.subdir={number}"]
    if job.exists():
        run = read_run(job, f"run_dir={job}")
        if verb.resumes and run.get("status") in (
            "running",
            "failed",
            "interrupted",
        ):
            return [*words, f"++resume={quoted(str(job))}"]
        shutil.rmtree(job)
    return words


def _same(found: Sweep, asked: Sweep) -> bool:
    if (found.verb, found.overrides, found.metrics) != (asked.verb, asked.overrides, asked.metrics):
        return False
    return bool(asked.metrics) or found.jobs == asked.jobs
