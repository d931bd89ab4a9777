"""``evaluate``: perplexity of a model on a text source, by both protocols."""

import sys
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from kncompress.config import EvaluateConfig
from kncompress.data.sources import find_sources
from kncompress.data.tokenizer import ignored_token
from kncompress.data.tokens import token_stream
from kncompress.errors import UserError
from kncompress.metrics import bits_per_byte, perplexity
from kncompress.models.compress import unique_parameters
from kncompress.tasks.student import load_teacher, model_config, require_causal
from kncompress.tracking.record import RunRecord


def check(config: EvaluateConfig) -> None:
    """Cheap checks before anything is written: text and model exist, the window fits the model."""
    if config.model.path is None:
        raise UserError("model.path=null: evaluate needs a model that exists")
    key = config.data.split if config.data.split in ("validation", "test") else "source"
    source = getattr(config.data, key)
    find_sources(config.data.source if source is None else source, f"data.{key}", config.data.text_format)
    fields = model_config(config.model)
    require_causal(fields, "evaluate")
    positions = fields.max_position_embeddings
    window = config.context or positions
    if window > positions:
        raise UserError(f"context={window}: the model has {positions} positions")
    if config.stride is not None and config.stride > window:
        raise UserError(f"stride={config.stride}: larger than the window of {window} tokens")


def run(config: EvaluateConfig, run_dir: Path) -> dict[str, float]:
    """Score the text; returns the metrics that ``result.json`` holds."""
    check(config)
    with RunRecord.open(run_dir, "evaluate", asdict(config), config.seed) as record:
        model, tokenizer = load_teacher(config.model)
        stream = token_stream(config.data, config.data.split, tokenizer)
        window = config.context or model.config.max_position_embeddings
        with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True) as bar:
            task = bar.add_task("windows", total=None)
            score = perplexity(
                model,
                stream.tokens,
                window,
                config.stride,
                batch_tokens=config.batch_tokens,
                limit=config.tokens,
                ignore=ignored_token(tokenizer),
                progress=lambda done, total: bar.update(task, completed=done, total=total),
            )
        metrics: dict[str, float] = {
            "perplexity": score.perplexity,
            "nll": score.nll,
            "tokens": score.tokens,
            "windows": score.windows,
            "parameters": unique_parameters(model),
        }
        if score.window_perplexity is not None:
            metrics["perplexity_window_mean"] = score.window_perplexity
        if config.tokens is None or config.tokens >= len(stream):
            # The few tokens that no window scores count as the mean of the others.
            metrics["bits_per_byte"] = bits_per_byte(score.nll * len(stream), stream.text_bytes)
        record.finish("finished", metrics)
        Console().print(_table(config, window, metrics))
    return metrics


def _table(config: EvaluateConfig, window: int, metrics: dict[str, float]) -> Table:
    stride = config.stride or window
    table = Table(title=f"{config.model.path} on {config.data.source} ({config.data.split})", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_row("perplexity, token-weighted", f"{metrics['perplexity']:,.4f}")
    if "perplexity_window_mean" in metrics:
        table.add_row("perplexity, window mean", f"{metrics['perplexity_window_mean']:,.4f}")
    if "bits_per_byte" in metrics:
        table.add_row("bits per byte", f"{metrics['bits_per_byte']:.4f}")
    table.add_row("tokens scored", f"{metrics['tokens']:,.0f}")
    table.add_row("window / stride", f"{window:,} / {stride:,}")
    table.add_row("unique parameters", f"{metrics['parameters']:,.0f}")
    return table
