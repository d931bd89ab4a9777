"""``generate``: a model goes on with a text; with ``compare`` another model beside it, token by token."""

import itertools
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from kncompress.config import GenerateConfig, ModelConfig, PlacedModelConfig
from kncompress.data.files import text_file, text_lines
from kncompress.errors import UserError
from kncompress.evaluation.continuation import Continuation, Writer, continuation, prompt_ids
from kncompress.formats.onnx_folder import GENAI, check_backend, load_decoder
from kncompress.formats.placed import placement
from kncompress.runs.process import checked_for
from kncompress.runs.record import RunRecord
from kncompress.training.student import (
    load_teacher,
    locate,
    model_config,
    require_causal,
    second_model,
    size_of,
    tokenizer_of,
)


def check(config: GenerateConfig) -> list[str]:
    """Cheap checks before anything is written: models exist, each prompt fits each of them; returns the prompts."""
    if config.model.path is None:
        raise UserError("model.path=null: generate needs a model that exists")
    if config.accelerator == "gpu" and not torch.cuda.is_available() and checked_for() is None:
        raise UserError("accelerator=gpu: there is no GPU here; accelerator=cpu needs none")
    if config.backend == "onnx" and config.accelerator == "gpu":
        raise UserError("accelerator=gpu: backend=onnx runs on the CPU")
    placement(config.model)
    check_backend(locate(config.model.path, config.model.gguf_file or "config"), config.backend, config.model.path)
    prompts = _prompts(config)
    require_causal(model_config(config.model), "generate")
    _check_prompts(config.model, prompts, "model")
    if config.compare is not None:
        _check_prompts(second_model(config.compare, "generate", config.model), prompts, "compare")
    return prompts


def run(config: GenerateConfig, run_dir: Path, prompts: list[str]) -> dict[str, float]:
    """Write texts; returns the metrics of ``result.json``, which has the texts too."""
    with RunRecord.open(run_dir, "generate", asdict(config), config.seed) as record:
        writers = {"model": _writer(config.model, config.accelerator, config.backend == "onnx")}
        if config.compare is not None:
            other = second_model(config.compare, "generate", config.model)
            exported = (locate(str(other.path), other.gguf_file or "config") / GENAI).exists()
            writers["compare"] = _writer(other, config.accelerator, exported)
        seconds = dict.fromkeys(writers, 0.0)
        texts: list[dict[str, Any]] = []
        for prompt, sample in itertools.product(prompts, range(config.samples)):
            growing = {
                role: _timed(continuation(writer, prompt, config, config.seed + sample), seconds, role)
                for role, writer in writers.items()
            }
            written = _stream(prompt, growing["model"]) if len(growing) == 1 else _beside(prompt, writers, growing)
            texts += [
                {"prompt": prompt, "sample": sample, "model": writers[role].name} | asdict(found)
                for role, found in written.items()
            ]
        metrics: dict[str, float] = {}
        for role, writer in writers.items():
            tokens = sum(text["tokens"] for text in texts[list(writers).index(role) :: len(writers)])
            metrics |= {f"{unit}/{role}": size for unit, size in size_of(writer.model).items()}
            metrics |= {
                f"tokens/{role}": tokens,
                f"tokens_per_second/{role}": tokens / seconds[role],
            }
        record.finish("finished", metrics, texts=texts)
    return metrics


def _prompts(config: GenerateConfig) -> list[str]:
    if config.prompts is None:
        return [str(prompt) for prompt in (config.prompt if isinstance(config.prompt, list) else [config.prompt])]
    file = text_file(Path(config.prompts).expanduser(), "prompts")
    if file.rows is not None:
        raise UserError(f"prompts={config.prompts}: rows of {file.rows}; give a text file with a prompt on each line")
    found = [line.rstrip("\n") for line in text_lines(file.path, "prompts") if line.strip()]
    if not found:
        raise UserError(f"prompts={config.prompts}: has no line with text; write a prompt on each line")
    return found


def _check_prompts(model: ModelConfig, prompts: list[str], key: str) -> None:
    fields, tokenizer = model_config(model), tokenizer_of(model)
    for prompt in prompts:
        count, positions = len(prompt_ids(tokenizer, prompt)), fields.max_position_embeddings
        if count > positions:
            start = prompt if len(prompt) <= 20 else f"{prompt[:20]}..."
            raise UserError(f"prompt={start}: {count} tokens; {key}={model.path} has {positions} positions")


def _writer(config: PlacedModelConfig, accelerator: str, exported: bool) -> Writer:
    if exported:
        return Writer(
            str(config.path), load_decoder(locate(str(config.path), "config"), str(config.path)), tokenizer_of(config)
        )
    model, tokenizer = load_teacher(config)
    if accelerator != "cpu" and torch.cuda.is_available() and config.device_map is None:
        model.cuda()
    return Writer(str(config.path), model, tokenizer)


def _timed(growing: Iterator[Continuation], seconds: dict[str, float], role: str) -> Iterator[Continuation]:
    while True:
        began = time.perf_counter()
        found = next(growing, None)
        seconds[role] += time.perf_counter() - began
        if found is None:
            return
        yield found


def _stream(prompt: str, growing: Iterator[Continuation]) -> dict[str, Continuation]:
    """One text, on standard output as it comes."""
    print(prompt, end="", flush=True)
    shown, found = 0, Continuation()
    for found in growing:
        print(found.text[shown:], end="", flush=True)
        shown = len(found.text)
    print("\n", flush=True)
    return {"model": found}


def _beside(
    prompt: str, writers: dict[str, Writer], growing: dict[str, Iterator[Continuation]]
) -> dict[str, Continuation]:
    """Texts in columns: as they come in a terminal, else when they are whole."""
    console = Console()
    found = {role: Continuation() for role in writers}
    with Live(console=console, auto_refresh=False, vertical_overflow="visible") as live:
        for step in itertools.zip_longest(*growing.values()):
            found |= {role: now for role, now in zip(growing, step, strict=True) if now is not None}
            if console.is_terminal:
                live.update(_columns(prompt, writers, found), refresh=True)
        live.update(_columns(prompt, writers, found), refresh=True)
    return found


def _columns(prompt: str, writers: dict[str, Writer], found: dict[str, Continuation]) -> Table:
    table = Table(title=Text(prompt), title_justify="left", expand=True)
    for writer in writers.values():
        ((unit, size),) = size_of(writer.model).items()
        table.add_column(Text(f"{writer.name}, {size:,} {unit}"), ratio=1)
    table.add_row(*(Text(text.text) for text in found.values()))
    return table
