"""Measures a model's harms, spends a budget on them, and measures the plan that comes of it."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import torch

from kncompress.anatomy.in_turn import in_turn
from kncompress.anatomy.mapped import twin
from kncompress.anatomy.plan import Plan
from kncompress.anatomy.sites import anatomy_of
from kncompress.compression.compress import CompressionTable, Start, compress_
from kncompress.compression.inspection import predict
from kncompress.compression.layerwise import CalibrationText
from kncompress.compression.parts import Parts
from kncompress.compression.student_plan import StudentPlan
from kncompress.compression.text import calibration_text, check_calibration, fit_progress
from kncompress.config import FactorsConfig, PlanConfig
from kncompress.data.tokenizer import ignored_token
from kncompress.data.tokens import token_stream
from kncompress.errors import UserError
from kncompress.evaluation import Comparison, compare
from kncompress.planner.budget import BudgetPlan, HarmTable, spend
from kncompress.planner.kept_harms import KeptHarms
from kncompress.planner.ladder import unmeasured_table
from kncompress.planner.sensitivity import measure_harms
from kncompress.reading import one_line, read_json
from kncompress.training.student import model_config, require_causal
from kncompress.training.trainer import takes_bf16

HARMS = "harm.json"


def check_plan(config: PlanConfig) -> HarmTable | None:
    """Cheap checks before anything is written; the earlier table where ``harm`` names one.

    Raises UserError.
    """
    if config.model.path is None:
        raise UserError("model.path=null: plan needs a model that exists")
    fields = model_config(config.model)
    require_causal(fields, "plan")
    dense = predict(fields, Plan())
    sizes = unmeasured_table(anatomy_of(fields), dense.parameters_before)
    table = None if config.harm is None else read_harms(Path(config.harm))
    if table is not None:
        known = {row.name: row.parameters for row in table.maps}
        if known != {row.name: row.parameters for row in sizes.maps} or table.parameters != sizes.parameters:
            other = f"{one_line(table.model)}, {table.parameters:,} parameters"
            raise UserError(f"harm={config.harm}: is of another model ({other})")
    if table is None or config.measures:
        check_calibration(config.data, config.calibration, fields)
    spend(table or sizes, config.budget, config.speed)
    return table


def read_harms(folder: Path, key: str = "harm") -> HarmTable:
    """The table that an earlier run left in its folder. Raises UserError, which names ``key``, where there is none, or
    a damaged one."""
    file, subject = folder / HARMS, f"{key}={folder}"
    if not file.is_file():
        raise UserError(f"{subject}: has no {HARMS}; name the folder of a finished plan")
    table = read_json(file, HarmTable, subject)
    try:
        table.check()
    except ValueError as error:
        raise UserError(f"{subject}: {HARMS}: {error}") from error
    return table


def texts(config: PlanConfig, fields: Any, tokenizer: Any, folder: str) -> tuple[CalibrationText, CalibrationText]:
    """The text for the moments and, after it, the text for the harms. Where the text is short, its end serves for
    both.

    The moments are kept in ``folder`` where the configuration names none, and what finds no room in memory.
    """
    wanted = config.calibration.tokens
    found = calibration_text(config.data, config.calibration, fields, tokenizer, more=config.harm_tokens)
    found = replace(found, moments=found.moments or folder, scratch=folder)
    begin = max(0, min(wanted, len(found.tokens) - config.harm_tokens))
    return replace(found, tokens=found.tokens[:wanted]), replace(found, tokens=found.tokens[begin:])


def measure(
    config: PlanConfig, model: Any, text: CalibrationText, harm_text: CalibrationText, kept: KeptHarms
) -> HarmTable:
    """The table of harms of a model; ``kept`` has those that an earlier start of the same run has measured."""
    bf16 = takes_bf16(config.precision, "cpu")
    words = f"{config.data.source}: {len(text.tokens):,} tokens for the moments, {len(harm_text.tokens):,} for the KL"
    with fit_progress() as progress:
        facts = str(config.model.path), words
        found = measure_harms(
            model, text, harm_text, config.fit, bf16, facts, config.harms_by, config.sums, progress, kept
        )
    return replace(found, made_for=made_for(config))


def made_for(config: PlanConfig) -> dict[str, Any]:
    """The fit and the text of a plan, as values of ``factors.made_for``: the start, and what is not by default."""
    text = replace(config.calibration, moments=None)
    data = replace(config.data, validation=None, test=None, cache_dir=None, split="auto")
    given: dict[str, Any] = {"fit": config.fit, "calibration": text, "data": data}
    found: dict[str, Any] = {"start": config.start}
    for name, section in given.items():
        default = asdict(type(section)())
        values = {key: value for key, value in asdict(section).items() if value != default[key]}
        if name == "data" and "source" in values:
            values["source"] = _absolute(values["source"])
        if values:
            found[name] = values
    return found


def _absolute(source: Any) -> Any:
    """A source, or a list of them, with paths that hold from every folder."""
    if isinstance(source, list):
        return [_absolute(one) for one in source]
    path = Path(str(source)).expanduser()
    return str(path.absolute()) if path.exists() else source


def fit_and_score(
    config: PlanConfig, model: Any, tokenizer: Any, text: CalibrationText, plan: BudgetPlan, folder: Path
) -> tuple[CompressionTable, Comparison]:
    """What ``compress`` makes of the plan, and its scores on the validation split; its weights lie in ``folder``, those
    of ``model`` where they are, and one layer of each is in float32 at a time."""
    student, parts = twin(model), Parts(folder, torch.float32)
    maps = StudentPlan.of(FactorsConfig(maps=plan.maps), model.config).maps
    with fit_progress() as progress:
        start = cast(Start, config.start)
        made = compress_(student, maps, start, progress, None, text, config.fit, config.repair, parts)
    stream = token_stream(config.data, "validation", tokenizer)
    with in_turn(model), in_turn(student):
        score = compare(
            model,
            student,
            stream.tokens,
            text.context,
            limit=config.validation_tokens,
            ignore=ignored_token(tokenizer),
            first=stream.first,
        )
    return made, score
