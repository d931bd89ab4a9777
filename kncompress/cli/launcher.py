"""Starts the jobs of a sweep, each in its own folder."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from omegaconf import OmegaConf

from kncompress.cli.engine import Engine
from kncompress.cli.job import FAILED, Job
from kncompress.cli.resume import not_own
from kncompress.cli.sweep_folder import Sweep, launched, missing
from kncompress.cli.sweep_jobs import SweepJobs
from kncompress.runs.whole_file import write_text


@dataclass
class Launcher:
    """Starts jobs of a sweep in their folders through Hydra's launcher (local, joblib, submitit)."""

    engine: Engine
    job: Job
    folder: Path
    sweep: Sweep
    jobs: SweepJobs

    def add(self, overrides: Sequence[str]) -> int:
        """A new job; returns its number."""
        self.sweep.jobs.append(not_own(overrides))
        self.sweep.job_words.append(self.job.words(not_own(overrides)))
        self.sweep.write(self.folder)
        return len(self.sweep.jobs) - 1

    def check(self, overrides: Sequence[str]) -> None:
        """Raises UserError where no job can have these overrides."""
        self.jobs.ready([overrides])

    def find(self, overrides: Sequence[str]) -> int | None:
        """The number of the job that has these overrides; None where it is new."""
        words = not_own(overrides)
        return self.sweep.jobs.index(words) if words in self.sweep.jobs else None

    @property
    def stopped(self) -> bool:
        """Whether a failed job keeps others from starting."""
        return (self.folder / FAILED).exists()

    def run(self, numbers: Sequence[int]) -> None:
        """Run those of the jobs that have not finished; returns when all have ended."""
        numbers = missing(self.folder, numbers)
        if not numbers:
            return
        words = {n: launched(self.job.verb, self.folder, n, self.sweep.jobs[n]) for n in numbers}
        # A resumed job is checked in its folder, because its checkpoint is there.
        fresh = [n for n in numbers if not (self.folder / str(n)).exists()]
        ready = {n: job for n in fresh if (job := self.jobs.alone(self.sweep.jobs[n])) is not None}
        first = numbers[0]
        composed = (
            ready[first].composed if first in ready else self.engine.compose([*self.jobs.own, *self.sweep.jobs[first]])
        )
        node = self.engine.sweep_node(self.folder, self.jobs.own, composed)
        write_text(self.folder / "multirun.yaml", OmegaConf.to_yaml(node))
        task = replace(self.job, ready={str(self.folder / str(n)): job for n, job in ready.items()})
        self.engine.launch(task, node, words, {n: job.composed for n, job in ready.items()})
