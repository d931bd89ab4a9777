"""``plan``: choose every map's factors within a parameter budget, by measured harm."""

import json
import os
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import lightning as L

from kncompress.config import PlanConfig
from kncompress.evaluation import Comparison
from kncompress.planner.budget import BudgetPlan, HarmTable, spend
from kncompress.planner.kept_harms import KeptHarms
from kncompress.planner.plan_files import command_line, draw_plan, plan_table, write_plan
from kncompress.planner.plan_forecast import plan_forecast
from kncompress.planner.planning import HARMS, check_plan, fit_and_score, measure, read_harms, texts
from kncompress.runs.record import RunRecord
from kncompress.runs.run_folder import begun_before, check_contents
from kncompress.runs.whole_file import write_text
from kncompress.training.contents import contents
from kncompress.training.student import load_to_fit, model_config
from kncompress.training.trainer import keep_freed_memory


def check(config: PlanConfig) -> HarmTable | None:
    """Cheap checks before anything is written: model, text, budget, memory and disk; returns the table that ``harm``
    names."""
    table = check_plan(config)
    if config.run_dir is not None and begun_before(Path(config.run_dir), "plan"):
        check_contents(Path(config.run_dir), config, _contents(config), "run_dir")
    plan_forecast(config, model_config(config.model), table).check(Path(config.run_dir or "runs").expanduser())
    return table


def _contents(config: PlanConfig) -> dict[str, str]:
    """Hashes of the model and the text: harms that are kept are of these."""
    return contents(config.model, config.data if config.harm is None or config.measures else None)


def run(config: PlanConfig, run_dir: Path, table: HarmTable | None = None) -> dict[str, float]:
    """Plan in ``run_dir``: ``harm.json``, ``plan.yaml``, ``plan.json``, ``plan.png``; returns the metrics.

    Each map's harms are kept in ``harms/`` as they come, until ``harm.json`` has them all.
    """
    keep_freed_memory()
    with RunRecord.open(run_dir, "plan", asdict(config), config.seed, contents=_contents(config)) as record:
        L.seed_everything(config.seed, verbose=False)
        needs = plan_forecast(config, model_config(config.model), table)
        print(f"plan {needs.line(needs.seconds())}", flush=True)
        # The moments are read three times: for the screening, the errors and the fit.
        with tempfile.TemporaryDirectory(prefix=".moments-", dir=run_dir) as folder:
            metrics = _plan(config, run_dir, table, record, folder)
        record.finish("finished", metrics, plan="plan.yaml")
    return metrics


def _plan(
    config: PlanConfig, run_dir: Path, table: HarmTable | None, record: RunRecord, folder: str
) -> dict[str, float]:
    model: Any = None
    if table is None or config.measures:
        model, tokenizer, data = load_to_fit(config.model, config.data, Path(folder))
        read = replace(config, data=data)
        text, harm_text = texts(read, model.config, tokenizer, folder)
    kept = KeptHarms(run_dir / "harms")
    if table is None and (run_dir / HARMS).is_file():  # of this very run, which was stopped later
        table = read_harms(run_dir, "run_dir")
    elif table is None:
        table = measure(config, model, text, harm_text, kept)
    write_text(run_dir / HARMS, json.dumps(table.as_dict()) + "\n")
    kept.remove([row.name for row in table.maps])
    plan = spend(table, config.budget, config.speed)
    file = write_plan(run_dir, plan, command_line())
    print(plan_table(plan))
    with record.tolerating("plan.png"):
        if not draw_plan(run_dir / "plan.png", plan):
            print("no picture: matplotlib is not installed (extra `reports`)")
    _print_totals(plan)
    metrics = _metrics(plan)
    if config.measures:
        compressed, score = fit_and_score(read, model, tokenizer, text, plan, Path(folder) / "parts")
        assert compressed.parameters_after == plan.parameters
        metrics |= _scores(score)
        print(
            f"measured on {score.tokens:,} tokens: KL {score.kl:.4f}, perplexity {score.student.perplexity:,.2f} "
            f"(dense {score.teacher.perplexity:,.2f})"
        )
    print(f"plan: {os.path.relpath(file)}")
    return metrics


def _print_totals(plan: BudgetPlan) -> None:
    table = plan.table
    print(
        f"\nparameters     {plan.parameters:>15,} of {table.parameters:,} ({plan.parameters / table.parameters:.1%}), "
        f"budget {plan.budget:,}\n"
        f"multiply-adds  {plan.multiply_adds:>15,} of {table.multiply_adds:,} "
        f"({plan.multiply_adds / table.multiply_adds:.1%}) per token\n"
        f"predicted KL   {plan.kl:>15.4f} nats per token"
    )


def _metrics(plan: BudgetPlan) -> dict[str, float]:
    table = plan.table
    return {
        "budget": plan.budget,
        "parameters/teacher": table.parameters,
        "parameters/student": plan.parameters,
        "multiply_adds/teacher": table.multiply_adds,
        "multiply_adds/student": plan.multiply_adds,
        "kl/predicted": plan.kl,
        "kl/sum": sum(plan.harms.values()),
        "exponent": table.exponent,
    }


def _scores(score: Comparison) -> dict[str, float]:
    return {
        "kl/measured": score.kl,
        "perplexity/teacher": score.teacher.perplexity,
        "perplexity/student": score.student.perplexity,
        "tokens": score.tokens,
    }
