"""What ``train`` does besides training where it is asked to: plan the shapes before, export and report after."""

import os
from pathlib import Path
from typing import Any

from kncompress.anatomy.mapped import give_back_freed
from kncompress.anatomy.plan import Plan
from kncompress.anatomy.sites import anatomy_of
from kncompress.commands import export, plan
from kncompress.compression.forecast import PROGRAM
from kncompress.compression.inspection import predict
from kncompress.compression.student_plan import StudentPlan
from kncompress.config import ExportConfig, FactorsConfig, ModelConfig, PlanConfig, TrainConfig
from kncompress.errors import UserError
from kncompress.formats.onnx_graph import check_packages
from kncompress.planner.budget import budget_count, spend
from kncompress.planner.plan_forecast import plan_forecast
from kncompress.planner.planning import read_harms
from kncompress.reports.report_page import report_page
from kncompress.runs.past_runs import read_runs
from kncompress.runs.process import process_rank
from kncompress.runs.record import RunRecord
from kncompress.runs.stored import read_run
from kncompress.runs.whole_file import write_text
from kncompress.training.processes import started_outside
from kncompress.training.student import model_config

PLAN, PAGE = "plan", "report.html"
_NUMBER = 4
"""Bytes of a float32."""


def check_parts(config: TrainConfig) -> None:
    """Raises UserError where a part that is asked for cannot be done: nothing is written yet."""
    for format in config.export:
        if format in ("onnx", "int8"):
            check_packages(f"export=[{format}]")
    if config.budget is None:
        return
    if config.factors != FactorsConfig():
        raise UserError(f"budget={config.budget:g}: plans the factors of all maps by itself; give factors=dense")
    outside = started_outside()
    if outside is not None and outside[1] > 1:
        raise UserError(
            f"budget={config.budget:g}: one process plans, and {outside[0]} has started {outside[1]}; run `plan` "
            "first, then train with factors=<its plan.yaml>"
        )
    plan.check(_planning(config, None))


def planned(config: TrainConfig, run_dir: Path) -> StudentPlan:
    """The student of ``budget``, planned in ``run_dir/plan``, where a stopped run finds its harms again.

    The first process plans; Lightning starts the others later.
    """
    folder = run_dir / PLAN
    if process_rank() == 0 and not _finished(folder):
        planning = _planning(config, folder)
        plan.run(planning, folder, plan.check(planning))
        give_back_freed()
    assert config.budget is not None
    spent = spend(read_harms(folder, "run_dir"), config.budget, config.speed)
    return StudentPlan.of(FactorsConfig(maps=spent.maps), model_config(config.model))


def _planning(config: TrainConfig, folder: Path | None) -> PlanConfig:
    return PlanConfig(
        run_dir=None if folder is None else str(folder),
        seed=config.seed,
        model=config.model,
        data=config.data,
        calibration=config.calibration,
        fit=config.fit,
        repair=config.repair,
        budget=config.budget or 1.0,
        speed=config.speed,
        sums=False,
        measure=False,
    )


def _finished(folder: Path) -> bool:
    return read_run(folder, f"run_dir={folder}").get("status") == "finished"


def outlook(config: TrainConfig) -> str:
    """What will be done, and what it takes, in a line for each part."""
    fields = model_config(config.model)
    teacher = predict(fields, Plan()).parameters_before
    assert config.budget is not None
    student = budget_count(config.budget, teacher)
    time = config.trainer
    length = f"{time.minutes:g} minutes" if time.minutes is not None else f"{time.steps} steps" if time.steps else None
    tokens = f"{time.tokens:,} tokens" if time.tokens else "one pass over the text"
    memory = PROGRAM + _NUMBER * (teacher + 4 * student + time.micro_batch_tokens * _kept_of_a_token(fields))
    disk = _NUMBER * student * (2 * 3 + 1) / 1e9  # two checkpoints with Adam's two moments, and the model
    planning = plan_forecast(_planning(config, None), fields, None)
    text = f"{config.calibration.tokens:,} tokens of {_names(config.data.source)}"
    passes = f"; {config.repair.passes} passes of repair" if config.repair.passes else ""
    lines = [
        f"shrink: {config.model.path}, {teacher:,} parameters, to {student:,} ({student / teacher:.1%})",
        f"  plan     in {PLAN}/, where a stopped run finds it again; {planning.line(planning.seconds())}",
        f"  fit      start={config.start}, on {text}{passes}",
        f"  distil   {length or tokens}; about {memory / 1e9:.1f} GB of memory, {disk:.1f} GB on disk",
        f"  compare  with the dense model{'' if config.unseen is None else f', also on {_names(config.unseen)}'}",
    ]
    lines += [f"  export   {format}: export-{format}/" for format in config.export]
    return "\n".join([*lines, f"  report   {PAGE}"] if config.report else lines)


def _kept_of_a_token(fields: Any) -> float:
    """Numbers that a training step keeps of each token at once: logits of both models and their gradient; of every
    layer of the student about 12 times its width and 5 times that of its feed-forward (measured on SmolLM2)."""
    anatomy = anatomy_of(fields)
    widths = [
        12 * site.in_features + 5 * site.out_features
        for site in anatomy.sites.values()
        if site.layer is not None and site.name.endswith("mlp.up")
    ]
    return 3 * fields.vocab_size + sum(widths)


def _names(source: Any) -> str:
    return ", ".join(map(str, source)) if isinstance(source, list) else str(source)


def export_all(config: TrainConfig, record: RunRecord) -> None:
    """The finished model in every format of ``export``; what fails is a warning, the model stays."""
    for format in config.export:
        folder = record.folder / f"export-{format}"
        with record.tolerating(f"export={format}"):
            if not _finished(folder):
                model = ModelConfig(path=str(record.folder / "model"))
                own: dict[str, Any] = {"run_dir": str(folder), "seed": config.seed, "data": config.data}
                wanted = ExportConfig(model=model, format=format, **own)
                export.check(wanted)
                export.run(wanted, folder)


def write_page(record: RunRecord) -> None:
    """``report.html`` of this run alone; plotly may be missing."""
    with record.tolerating(PAGE):
        file = record.folder / PAGE
        write_text(file, report_page(read_runs([str(record.folder)]), record.folder.name, {}))
        print(f"report: {os.path.relpath(file)}", flush=True)
