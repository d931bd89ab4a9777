"""``glue``: fine-tune a teacher on GLUE tasks, then its students, plain and by ILKD; a suite of resumable cells."""

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from filelock import FileLock
from lightning.pytorch.callbacks import Callback

from kncompress.cli.presets import existing_path, options, preset_file, read_factors
from kncompress.compression.compress import unique_parameters
from kncompress.config import GlueConfig, ObjectiveConfig
from kncompress.data.tokens import cache_root
from kncompress.errors import UserError
from kncompress.formats.pretrained import load_model, save_model
from kncompress.glue.cell_progress import CellProgress
from kncompress.glue.cells import Cell, check_cells, read_cell, read_cells, suite_metrics, write_cell, write_suite
from kncompress.glue.classifiers import (
    Base,
    Student,
    SuiteParts,
    check_glue,
    load_classifier,
    prediction_lines,
    student_base,
    task_data,
    teacher_base,
    teacher_fingerprint,
    test_sets,
)
from kncompress.glue.finetuning import TaskData, answers, fine_tune, predict
from kncompress.glue.readers import source_content
from kncompress.glue.sequences import Sequences
from kncompress.glue.tasks import GlueTask
from kncompress.reading import read_json
from kncompress.runs.record import RunRecord
from kncompress.runs.run_folder import check_contents
from kncompress.runs.whole_file import remove_left_overs, write_text
from kncompress.training.contents import contents
from kncompress.training.divergence import NonFiniteLoss
from kncompress.training.student import tokenizer_of
from kncompress.training.trainer import keep_freed_memory, quiet_lightning

_PLAIN = ObjectiveConfig()
_SCORES = "scores.json"
_ADVICE = "finished cells are kept; try a lower optimizer.lr or fine_tuning.gradient_clip"


def check(config: GlueConfig) -> SuiteParts:
    """Everything that can be wrong before anything is written: data, models, factors; returns what the suite is of."""
    parts = check_glue(config, _students(config))
    if config.resume is not None and config.run_dir is not None:
        check_contents(Path(config.run_dir), config, _contents(config, parts))
        check_cells(Path(config.run_dir))
    return parts


def _contents(config: GlueConfig, parts: SuiteParts) -> dict[str, str]:
    """Hashes of the models and files that the suite reads."""
    models = {student.key: student.path for student in parts.students}
    return contents(config.model, models=models) | {"data.source": source_content(parts.source, parts.tasks)}


def run(config: GlueConfig, run_dir: Path, parts: SuiteParts) -> dict[str, float]:
    """Run the suite in ``run_dir``: ``cells/``, ``table.md``, ``table.json``, ``predictions/``; returns the metrics."""
    quiet_lightning()
    keep_freed_memory()
    resume = config.resume is not None
    read = _contents(config, parts)
    with RunRecord.open(run_dir, "glue", asdict(config), config.seed, resume, contents=read) as record:
        suite = Suite(config, parts, run_dir)
        suite.run()
        cells = suite.cells()
        metrics = suite_metrics(cells)
        record.finish("finished", metrics)
        print(f"\n{write_suite(run_dir, cells)}\n{run_dir / 'table.md'}", flush=True)
    return metrics


def _students(config: GlueConfig) -> list[Student]:
    """The student, and the baselines: folders, or factors of the teacher."""
    found = []
    if config.training:
        factors = config.factors if config.student is None else None
        found.append(Student("student", "student", config.student, factors))
    for name, text in config.baselines.items():
        key = f"baselines.{name}"
        if not name.isidentifier() or name in ("teacher", "student") or name.endswith("_ilkd"):
            raise UserError(f"{key}={text}: {name} is taken or no name; give letters, digits and _")
        path = preset_file("factors", text) or existing_path(text)
        if path is not None and path.is_file():
            found.append(Student(name, key, factors=read_factors(path)))
        elif path is None and "/" not in text:
            presets = ", ".join(options("factors"))
            raise UserError(f"{key}={text}: no such folder, hub id, YAML file or preset of factors ({presets})")
        else:
            found.append(Student(name, key, path=text))
    return found


class Suite:
    """The cells of one run, in the order seed, task, model: the first seed gives a whole table."""

    def __init__(self, config: GlueConfig, parts: SuiteParts, run_dir: Path) -> None:
        self.config, self.source, self.tasks, self.run_dir = config, parts.source, parts.tasks, run_dir
        self.trained = [task for task in self.tasks if task.trained_as is None]
        self.tokenizer = tokenizer_of(config.model)
        self.teacher = teacher_base(config.model, run_dir / "bases" / "teacher", self._save)
        self.students = [student_base(s, config.model, run_dir / "bases" / s.name, self._save) for s in parts.students]
        self._data: dict[str, tuple[TaskData, str]] = {}
        self._tests: dict[str, dict[str, tuple[GlueTask, Sequences]]] = {}

    @property
    def recipes(self) -> list[tuple[str, Base, bool]]:
        """(name in tables, base, whether it learns from the teacher) of every student's training."""
        found = []
        for base in self.students:
            recipes = self.config.training if base.name == "student" else self.config.baseline_training
            found += [(base.name if r == "plain" else f"{base.name}_ilkd", base, r == "ilkd") for r in recipes]
        return found

    @property
    def whos(self) -> list[str]:
        """Names of all models, in the order of the table."""
        return ["teacher", *(who for who, _, _ in self.recipes)]

    def cells(self) -> list[Cell]:
        """Those that are finished."""
        return read_cells(self.run_dir, [task.id for task in self.trained], self.config.seed_list, self.whos)

    def run(self) -> None:
        """Every cell that is not finished."""
        wanted = [(seed, task) for seed in self.config.seed_list for task in self.trained]
        total, number = len(wanted) * len(self.whos), 0
        self._announce(total)
        for seed, task in wanted:
            missing = [who for who in self.whos if read_cell(self.run_dir, task.id, seed, who) is None]
            names = {who: f"{number + i + 1}/{total} {task.id} seed {seed} {who}" for i, who in enumerate(self.whos)}
            number += len(self.whos)
            if missing:
                folder = self._teacher(task, seed, names["teacher"])
                for who, base, distilled in self.recipes:
                    if who in missing:
                        self._student(task, seed, who, base, folder if distilled else None, names[who])

    def _announce(self, total: int) -> None:
        done = len(self.cells())
        parts = [f"{total} cells: {', '.join(task.id for task in self.trained)}; {', '.join(self.whos)}"]
        parts += [f"{done} of them finished"] if done else []
        if self.config.data.train_examples is not None:
            parts.append(f"at most {self.config.data.train_examples:,} training examples a task")
        print("; ".join(parts), flush=True)

    def data(self, task: GlueTask) -> tuple[TaskData, str]:
        """The task, encoded once, and the fingerprint of its examples."""
        if task.id not in self._data:
            self._data[task.id] = task_data(self.config, self.source, task, self.tokenizer)
        return self._data[task.id]

    def _teacher(self, task: GlueTask, seed: int, name: str) -> Path:
        """The folder of the fine-tuned teacher, from the cache or made now; finishes its cell."""
        _, examples = self.data(task)
        key = teacher_fingerprint(self.config, self.teacher, task, examples, seed)
        folder = cache_root(self.config.data.cache_dir) / "glue" / f"{task.id}-{key}"
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            cached = (folder / _SCORES).is_file()
            if not cached:
                remove_left_overs(folder.parent, f".{folder.name}.*")
                model, cell = self._tune(task, seed, "teacher", self.teacher, None, name)
                save_model(model, folder, self.tokenizer)
                write_text(folder / _SCORES, json.dumps(asdict(cell)) + "\n")
        if read_cell(self.run_dir, task.id, seed, "teacher") is None:
            scores = read_json(folder / _SCORES, Cell, f"data.cache_dir={folder}")
            self._finish(replace(scores, cached=cached), task, lambda: load_model(folder, "sequence-classification"))
        return folder

    def _student(self, task: GlueTask, seed: int, who: str, base: Base, teacher: Path | None, name: str) -> None:
        tutor = None if teacher is None else load_model(teacher, "sequence-classification", dtype=torch.float32)
        model, cell = self._tune(task, seed, who, base, tutor, name)
        if self.config.save_models:
            save_model(model, self.run_dir / "models" / task.id / f"seed{seed}" / who, self.tokenizer)
        self._finish(cell, task, lambda: model)

    def _tune(
        self, task: GlueTask, seed: int, who: str, base: Base, teacher: Any | None, name: str
    ) -> tuple[Any, Cell]:
        data, _ = self.data(task)
        config = self.config
        L.seed_everything(seed, verbose=False)  # of the new head, before anything else draws
        model = load_classifier(base.folder, task, data.padding)
        objective = _PLAIN if teacher is None else config.objective
        callbacks: list[Callback] = [NonFiniteLoss(_ADVICE), CellProgress(name)]
        done = fine_tune(
            model, teacher, data, objective, config.optimizer, config.fine_tuning, seed, base.layers, callbacks
        )
        cell = Cell(
            task.id, seed, who, done.scores, unique_parameters(model), len(data.train),
            sum(map(len, data.dev.values())), done.best_epoch, done.steps, round(done.seconds, 3),
            round(done.examples_per_second, 3), False, done.history,
        )  # fmt: skip
        return model, cell

    def _finish(self, cell: Cell, task: GlueTask, model: Any) -> None:
        """Write the predictions, then the cell, which says that all of it is there, then the tables."""
        if task.id not in self._tests:
            self._tests[task.id] = test_sets(self.config, self.source, task, self.tasks, self.tokenizer)
        if tests := self._tests[task.id]:
            self._predict(cell, model(), tests, self.data(task)[0].padding)
        write_cell(self.run_dir, cell)
        write_suite(self.run_dir, self.cells())

    def _predict(self, cell: Cell, model: Any, tests: Mapping[str, tuple[GlueTask, Sequences]], padding: int) -> None:
        folder = self.run_dir / "predictions" / cell.who / f"seed{cell.seed}"
        folder.mkdir(parents=True, exist_ok=True)
        for name, (task, sequences) in tests.items():
            logits = predict(model, sequences, padding, self.config.fine_tuning.batch_size)
            write_text(folder / f"{name}.tsv", prediction_lines(task, answers(logits, task)))

    def _save(self, model: Any, folder: Path, facts: Path | None = None, values: Any = None) -> None:
        save_model(model, folder, self.tokenizer)
        if facts is not None:
            write_text(facts, json.dumps(values) + "\n")
