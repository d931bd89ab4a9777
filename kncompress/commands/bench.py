"""``bench``: speed and memory, against rivals and against what this machine can do at best."""

import json
import platform
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import torch

from kncompress.bench.fit import measure_fit
from kncompress.bench.generate import measure_generation
from kncompress.bench.measurement import Measurement
from kncompress.bench.memory import measure_memory
from kncompress.bench.product import OUTER, PACKED, SPEEDY, measure_products
from kncompress.bench.runtimes import runtimes_of
from kncompress.bench.setting import Setting, setting_of
from kncompress.bench.startup import measure_startup
from kncompress.bench.step import measure_step
from kncompress.bench.table import draw, machine_line, markdown, rich_table
from kncompress.bench.tokens import measure_tokens
from kncompress.cli.presets import options, preset_file, read_factors
from kncompress.cli.spelling import choices_hint
from kncompress.config import BenchConfig
from kncompress.data.sources import sources_of
from kncompress.errors import UserError
from kncompress.runs.record import RunRecord
from kncompress.runs.whole_file import replacing, write_text
from kncompress.terminal import show
from kncompress.training.student import require_causal
from kncompress.training.trainer import keep_freed_memory


def check(config: BenchConfig) -> Setting:
    """Cheap checks before anything is written: model, factors, presets, and the text where it is read."""
    setting = setting_of(config)
    require_causal(setting.fields, "bench")
    _ = setting.plan  # the factors fit
    for name in config.presets:
        known = [*options("factors"), OUTER, PACKED, SPEEDY]
        if name not in known:
            raise UserError(f"presets={name}: no such factors; {choices_hint(name, known)}")
    most = setting.fields.max_position_embeddings
    if setting.sizes.sequence > most:
        given = "null" if config.tokens is None else config.tokens
        raise UserError(
            f"tokens={given}: a sequence takes {setting.sizes.sequence}, and the model has {most} positions"
        )
    if "generate" in config.chosen:
        runtimes_of(config, setting.device)
    if "tokens" in config.chosen:
        sources_of(config.data)
    return setting


def run(config: BenchConfig, run_dir: Path, setting: Setting) -> dict[str, float]:
    """Measure; ``run_dir`` gets ``bench.json``, ``table.md`` and ``bench.png``. Returns ``result.json``'s metrics."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    keep_freed_memory()  # as in training
    with RunRecord.open(run_dir, "bench", asdict(config), config.seed) as record:
        measured: list[Measurement] = []
        try:
            for part in config.chosen:
                for row in _parts(setting)[part]():
                    measured.append(row)
        except BaseException:
            if measured:  # hours, perhaps: kept where a later part fails
                _keep(run_dir, setting, measured)
            raise
        where = _keep(run_dir, setting, measured)
        metrics = {name: value for row in measured for name, value in row.metrics.items()}
        metrics |= {"machine/flops": setting.ceiling.flops, "machine/bandwidth": setting.ceiling.bandwidth}
        with record.tolerating("bench.png"):
            _draw(run_dir / "bench.png", measured, where)
        record.finish("finished", metrics)
        print(where)
        show(rich_table(measured))
        print(f"table: {run_dir / 'table.md'}")
    return metrics


def _keep(run_dir: Path, setting: Setting, measured: list[Measurement]) -> str:
    """Write ``bench.json`` and ``table.md``; returns the line that tells the machine."""
    where = machine_line(_device(setting), setting.precision, torch.get_num_threads(), setting.ceiling)
    values = {"machine": where, "measurements": [row.as_dict() for row in measured]}
    write_text(run_dir / "bench.json", json.dumps(values, indent=2) + "\n")
    write_text(run_dir / "table.md", markdown(measured, where))
    return where


def _parts(setting: Setting) -> dict[str, Callable[[], Iterator[Measurement]]]:
    plan = setting.plan
    files = {name: preset_file("factors", name) for name in setting.config.presets}
    presets = {name: read_factors(file) for name, file in files.items() if file is not None}
    return {
        "product": lambda: measure_products(setting, presets),
        "step": lambda: measure_step(setting, plan),
        "fit": lambda: measure_fit(setting, plan),
        "generate": lambda: measure_generation(setting, plan),
        "tokens": lambda: measure_tokens(setting),
        "startup": lambda: measure_startup(setting),
        "memory": lambda: measure_memory(setting, plan),
    }


def _device(setting: Setting) -> str:
    if setting.device.type == "cuda":
        return torch.cuda.get_device_name(setting.device)
    return platform.processor() or platform.machine()


def _draw(file: Path, measured: list[Measurement], where: str) -> None:
    if find_spec("matplotlib") is None:
        print("no picture: matplotlib is not installed (extra `reports`)")
        return
    if any(row.speedup is not None for row in measured):
        with replacing(file) as stream:
            draw(stream, measured, where)
