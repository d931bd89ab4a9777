"""Part ``step``: a step of intermediate-layer distillation, ours and the same written plainly, in fresh processes."""

import statistics
from collections.abc import Iterator
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from kncompress.anatomy.plan import Plan
from kncompress.bench.child import run_child
from kncompress.bench.measurement import OURS, Measurement
from kncompress.bench.rivals import Unavailable
from kncompress.bench.setting import Setting
from kncompress.bench.step_job import StepJob
from kncompress.compression.inspection import predict

PLAIN, KEPT = "plain", "plain_kept_memory"
"""The plain script as it is, and with an allocator that keeps freed memory, as ours has it (``keep_freed_memory``)."""
_SCRIPT = Path(__file__).resolve().parents[2] / "experiments" / "throughput" / "plain_step.py"
_OWN = ["-m", "kncompress.bench.step_process"]
_SAME_LOSS = 0.02


def measure_step(setting: Setting, plan: Plan) -> Iterator[Measurement]:
    """Seconds of a step and the peak of memory, over pairs of processes that take turns."""
    sizes, fields = setting.sizes, setting.fields
    shapes = plan.resolve(fields)
    job = StepJob(
        fields.to_dict(),
        {name: str(shape) for name, shape in shapes.items()},
        sizes.sequence,
        max(1, sizes.tokens // sizes.sequence),
        sizes.steps,
        setting.precision,
        setting.device.type,
        setting.config.seed,
    )
    kept = replace(job, keep_memory=True)
    found: dict[str, list[dict[str, Any]]] = {OURS: [], PLAIN: [], KEPT: []}
    missing: dict[str, str] = {}
    for number in range(sizes.processes):
        for name, command, given in ((OURS, _OWN, job), (PLAIN, _plain(), job), (KEPT, _plain(), kept)):
            if name in missing:
                continue
            setting.say(f"step: {name}, process {number + 1} of {sizes.processes}")
            try:
                if isinstance(command, str):
                    raise Unavailable(command)
                found[name].append(run_child(command, asdict(given)))
            except Unavailable as error:
                if name == OURS:
                    raise RuntimeError(f"step: {error}") from error
                missing[name] = str(error)
    ours = found[OURS][0]["loss"]
    for name in (PLAIN, KEPT):
        if found[name] and abs(ours - (theirs := found[name][0]["loss"])) > _SAME_LOSS * abs(theirs):
            missing[name] = f"another loss: {theirs:.4f}, ours {ours:.4f}"
    runs = {name: found[name] for name in found if found[name] and name not in missing}
    yield from _measurements(setting, job, plan, runs, missing)


def _plain() -> list[str] | str:
    """The plain script's command, or why there is none."""
    if not _SCRIPT.exists():
        return f"not installed (experiments/throughput/{_SCRIPT.name} comes with the checkout)"
    return "not installed (accelerate, extra `bench`)" if find_spec("accelerate") is None else [str(_SCRIPT)]


def _measurements(
    setting: Setting, job: StepJob, plan: Plan, runs: dict[str, list[dict[str, Any]]], missing: dict[str, str]
) -> Iterator[Measurement]:
    seconds = {name: statistics.median(s for run in runs[name] for s in run["seconds"]) for name in runs}
    peaks = {name: statistics.median(run["peak"] for run in runs[name]) for name in runs}
    waits = [wait for run in runs[OURS] for wait in run["waits"]]
    more = {"step/tokens_per_second": job.tokens / seconds[OURS], "step/data_wait": _share(waits, seconds[OURS])}
    what = f"{job.batch} x {job.sequence} tokens, {job.precision}, losses {_losses(runs)}"
    speedups, savings = {}, {}
    for name in (PLAIN, KEPT):
        if name not in runs:
            continue
        pairs = zip(runs[name], runs[OURS], strict=True)
        medians = [(statistics.median(a["seconds"]), statistics.median(b["seconds"])) for a, b in pairs]
        speedups[name] = statistics.median(a / b for a, b in medians)
        savings[name] = peaks[name] / peaks[OURS]
    if PLAIN in runs:
        more["step/memory_ratio"] = peaks[OURS] / peaks[PLAIN]
    bound = setting.ceiling.seconds(*_costs(setting, job, plan))
    baseline = PLAIN if PLAIN in runs else None
    yield Measurement("step", what, seconds, speedups, baseline, None, bound, missing=missing, more=more)
    yield Measurement(
        "step/peak", what, peaks, savings, baseline, None, _least_memory(setting, job, plan), "bytes", missing
    )


def _share(waits: list[float], step: float) -> float:
    return statistics.median(waits) / step if waits else 0.0


def _losses(runs: dict[str, list[dict[str, Any]]]) -> str:
    return " and ".join(f"{runs[name][0]['loss']:.3f}" for name in runs)


def _costs(setting: Setting, job: StepJob, plan: Plan) -> tuple[float, float]:
    """(operations, bytes): a forward pass of the teacher, three of the student, causal attention, AdamW's reads.

    The losses on attention maps form the scores of both models once more.
    """
    table, fields = predict(setting.fields, plan), setting.fields
    maps = table.multiply_adds_before + 3 * table.multiply_adds_after
    attention = fields.num_hidden_layers * job.sequence * fields.hidden_size  # scores and values, half of the square
    flops = 2 * job.tokens * (maps + 4 * attention + 2 * attention)
    # Weights are read forward and backward, gradients written; AdamW reads four tensors and writes three, float32.
    moved = table.parameters_before * 4 + table.parameters_after * (3 + 7) * 4
    return float(flops), float(moved)


def _least_memory(setting: Setting, job: StepJob, plan: Plan) -> float:
    """Bytes of both models, the student's gradients and AdamW's two moments, and one tensor of logits of each."""
    table = predict(setting.fields, plan)
    logits = 2 * job.tokens * setting.fields.vocab_size * setting.number_bytes
    return float(4 * table.parameters_before + 16 * table.parameters_after + logits)
