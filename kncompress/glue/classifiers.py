"""Models and data of the GLUE suite: the bases from which every cell starts, classifiers, encoded tasks."""

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from kncompress.compression.own_text import with_own_text
from kncompress.compression.student_plan import StudentPlan
from kncompress.compression.text import calibration_text, check_calibration, fit_progress
from kncompress.config import (
    CalibrationConfig,
    DataConfig,
    FactorsConfig,
    FitConfig,
    GlueConfig,
    ModelConfig,
)
from kncompress.data.files import content_hash
from kncompress.data.tokens import tokenizer_fingerprint
from kncompress.errors import UserError
from kncompress.formats.pretrained import load_model
from kncompress.glue.finetuning import TaskData
from kncompress.glue.readers import GlueSource, find_source, fingerprint, first_examples
from kncompress.glue.sequences import Sequences, padding_token
from kncompress.glue.tasks import GlueTask, find_tasks
from kncompress.reading import Count, parse_json, read_json
from kncompress.training.given_student import check_student
from kncompress.training.student import (
    FitOptions,
    factor_,
    load_dense,
    locate,
    model_config,
    require_causal,
    tokenizer_of,
)

_FORMAT = 1
"""Of a fine-tuned teacher's fingerprint: raised when the same settings give another model."""


@dataclass(frozen=True)
class Student:
    """A student of the suite: a folder of its own, or the factors of the teacher."""

    name: str
    key: str
    """Configuration key that asks for it, for errors."""
    path: str | None = None
    factors: FactorsConfig | None = None
    plan: StudentPlan | None = None
    """What ``factors`` make of the teacher, once they are checked against it."""


@dataclass(frozen=True)
class SuiteParts:
    """What a suite is of."""

    students: list[Student]
    source: GlueSource
    tasks: list[GlueTask]


@dataclass(frozen=True)
class _Facts:
    layers: tuple[Count, ...] | None


@dataclass(frozen=True)
class Base:
    """A language model on disk whose classifier every cell fine-tunes."""

    name: str
    folder: Path
    layers: tuple[int, ...] | None = None
    """The teacher layer of each of its layers; None: evenly spread."""


def check_glue(config: GlueConfig, students: list[Student]) -> SuiteParts:
    """Everything that can be wrong before anything is written: data, models, factors; the students get their plans."""
    if config.model.path is None:
        raise UserError("model.path=null: glue needs a teacher that exists")
    if "ilkd" in config.all_training and not config.objective.needs_teacher:
        raise UserError("objective: compares with no teacher, which ilkd needs; give objective=glue_ilkd")
    source = find_source(config.data.source)
    tasks = find_tasks(config.tasks, source.tasks(), config.data.source)
    for task in tasks:
        source.check(task)
    if config.predictions:
        for task in tasks:
            if not task.test or (config.data.source != "hub" and not source.test(task)):
                raise UserError(f"predictions=true: data.source={source.name} has no test set of {task.id}")
    fields = model_config(config.model)
    require_causal(fields, "glue")
    if config.data.max_length > fields.max_position_embeddings:
        raise UserError(
            f"data.max_length={config.data.max_length}: the model has {fields.max_position_embeddings} positions"
        )
    tokenizer = tokenizer_of(config.model)
    name = config.model.tokenizer or config.model.path
    padding_token(tokenizer, name)
    if len(tokenizer) > fields.vocab_size:
        raise UserError(
            f"model.tokenizer={name}: the tokenizer has {len(tokenizer)} tokens and the model's embedding only "
            f"{fields.vocab_size} rows; give the tokenizer that the model was trained with"
        )
    planned = []
    for student in students:
        if student.factors is not None:
            student = replace(student, plan=StudentPlan.of(student.factors, fields))
            fit = _remembered(student)
            if fit.reads_text:
                check_calibration(fit.data, fit.calibration, fields)
        elif student.path is not None:
            objective = config.objective if "ilkd" in config.all_training else None
            check_student(student.path, fields, objective, student.key)
        planned.append(student)
    return SuiteParts(planned, source, tasks)


def teacher_base(model: ModelConfig, folder: Path, save: Any) -> Base:
    """The teacher before fine-tuning; one inside a GGUF file is written to ``folder`` by ``save``, once."""
    assert model.path is not None
    if model.gguf_file is None:
        return Base("teacher", locate(model.path))
    if not (folder / "config.json").is_file():
        save(load_dense(model), folder)
    return Base("teacher", folder)


@dataclass
class _Fit:
    """What a plan was made for: its keys ``made_for``."""

    start: str = "nearest"
    fit: FitConfig = field(default_factory=FitConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    data: DataConfig = field(default_factory=DataConfig)

    @property
    def reads_text(self) -> bool:
        return self.start in ("calibrated", "sequential")


def _remembered(student: Student) -> _Fit:
    """The fit and the text that a student's plan was made for; nearest factors where it remembers none.

    Raises UserError where a plan remembers what no fit has.
    """
    memory = {} if student.factors is None else student.factors.made_for
    return parse_json(json.dumps(memory).encode(), _Fit, f"{student.key}.made_for")


def student_base(student: Student, model: ModelConfig, folder: Path, save: Any) -> Base:
    """A student before fine-tuning; one of factors is made in ``folder``, once."""
    if student.path is not None:
        return Base(student.name, locate(student.path, key=student.key))
    assert student.plan is not None
    facts = folder.with_suffix(".json")
    if not facts.is_file():
        dense, fit = load_dense(model), _remembered(student)
        text = None
        if fit.reads_text:
            tokenizer = tokenizer_of(model)
            data = with_own_text(fit.data, dense, tokenizer)
            text = calibration_text(data, fit.calibration, dense.config, tokenizer)
        with fit_progress() as progress:
            table = factor_(dense, student.plan, fit.start, FitOptions(text, fit.fit, progress=progress))
        save(dense, folder, facts, {"layers": table.layers})
    layers = read_json(facts, _Facts, f"run_dir={facts.parent.parent}").layers
    return Base(student.name, folder, layers)


def load_classifier(folder: Path, task: GlueTask, padding: int) -> Any:
    """The language model in ``folder`` with a new head for ``task``, as transformers' own sequence classifier.

    The head's numbers come from torch's generator. ``padding`` is written into the model's config, by which
    transformers finds the last real token.
    """
    options: dict[str, Any] = {"num_labels": task.outputs, "pad_token_id": padding}
    options["problem_type"] = "regression" if task.is_regression else "single_label_classification"
    if task.labels:
        options["id2label"] = dict(enumerate(task.labels))
        options["label2id"] = {label: number for number, label in enumerate(task.labels)}
    return load_model(folder, "sequence-classification", dtype=torch.float32, **options)


def task_data(config: GlueConfig, source: GlueSource, task: GlueTask, tokenizer: Any) -> tuple[TaskData, str]:
    """The task, encoded, and a fingerprint of its examples."""
    train = first_examples(source.train(task), config.data.train_examples)
    dev = source.dev(task)
    name = config.model.tokenizer or str(config.model.path)
    encoded = {suffix: Sequences(examples, tokenizer, config.data.max_length) for suffix, examples in dev.items()}
    data = TaskData(
        task, Sequences(train, tokenizer, config.data.max_length), encoded, padding_token(tokenizer, name)
    )  # fmt: skip
    return data, ";".join(map(fingerprint, (train, *dev.values())))


def test_sets(
    config: GlueConfig, source: GlueSource, task: GlueTask, tasks: list[GlueTask], tokenizer: Any
) -> dict[str, tuple[GlueTask, Sequences]]:
    """{name of the prediction file: the task and its test set} that the model of ``task`` answers."""
    if config.predictions is False:
        return {}
    answered = [task, *(other for other in tasks if other.trained_as == task.id)]
    return {
        name: (other, Sequences(examples, tokenizer, config.data.max_length))
        for other in answered
        for name, examples in source.test(other).items()
    }


def prediction_lines(task: GlueTask, answers: torch.Tensor) -> str:
    """A prediction file as the benchmark's server takes it: a header, then number and label, or score, of each row."""
    if task.is_regression:
        values = [f"{value:.3f}" for value in answers.tolist()]
    else:
        values = [task.codes[label] for label in answers.tolist()]
    return "index\tprediction\n" + "".join(f"{number}\t{value}\n" for number, value in enumerate(values))


def teacher_fingerprint(config: GlueConfig, base: Base, task: GlueTask, examples: str, seed: int) -> str:
    """Changes with whatever could change the fine-tuned teacher: weights, tokenizer, task, examples, settings, seed."""
    files = sorted(file for file in base.folder.iterdir() if file.suffix in (".json", ".safetensors"))
    parts: dict[str, Any] = {
        "format": _FORMAT,
        "model": {file.name: content_hash(file) for file in files},
        "tokenizer": tokenizer_fingerprint(tokenizer_of(config.model)),
        "task": task.id,
        "examples": examples,
        "length": config.data.max_length,
        "optimizer": asdict(config.optimizer),
        "fine_tuning": asdict(config.fine_tuning),
        "seed": seed,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:20]
