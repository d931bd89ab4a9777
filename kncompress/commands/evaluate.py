"""``evaluate``: perplexity of a model on a text source, by both protocols; or its scores on tasks, or on last words."""

import itertools
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from kncompress.compression.compress import unique_parameters
from kncompress.config import EvaluateConfig
from kncompress.data.files import text_file, text_lines
from kncompress.data.sources import find_sources, split_sources
from kncompress.data.tokenizer import ignored_token
from kncompress.data.tokens import default_context, tell_default_context, token_stream
from kncompress.errors import UserError
from kncompress.evaluation import bits_per_byte, compare, last_words, perplexity
from kncompress.evaluation.comparison import ANCHORS
from kncompress.evaluation.harness import check_tasks, flips, load_tasks, score_tasks
from kncompress.evaluation.quantised import quantise_
from kncompress.formats.onnx_folder import check_backend, load_decoder
from kncompress.formats.placed import placement
from kncompress.runs.record import RunRecord
from kncompress.terminal import counting, show
from kncompress.training.student import (
    load_teacher,
    locate,
    model_config,
    require_causal,
    second_model,
    size_of,
    tokenizer_of,
)


def check(config: EvaluateConfig) -> None:
    """Cheap checks before anything is written: text or tasks and model exist, the window fits the model."""
    if config.model.path is None:
        raise UserError("model.path=null: evaluate needs a model that exists")
    placement(config.model)
    check_backend(locate(config.model.path, config.model.gguf_file or "config"), config.backend, config.model.path)
    if config.tasks:
        check_tasks(config.tasks, config.allow_code)
    elif config.lambada is not None:
        if not _has_lines(config.lambada):
            find_sources(config.lambada, "lambada", column=config.data.column)
    else:
        split_sources(config.data, config.data.split)
    fields = model_config(config.model)
    require_causal(fields, "evaluate")
    if config.compare is not None:
        _check_alike(config)
    positions = fields.max_position_embeddings
    window = config.context or default_context(positions)
    if window > positions:
        raise UserError(f"context={window}: the model has {positions} positions")
    if config.stride is not None and config.stride > window:
        raise UserError(f"stride={config.stride}: larger than the window of {window} tokens")


def _check_alike(config: EvaluateConfig) -> None:
    """The two models must read the same tokens, and the window must fit both."""
    assert config.compare is not None
    other = second_model(config.compare, "evaluate", config.model)
    own, others = model_config(config.model), model_config(other)
    if own.vocab_size != others.vocab_size:
        raise UserError(
            f"compare={config.compare}: has a vocabulary of {others.vocab_size:,} tokens, model={config.model.path} "
            f"one of {own.vocab_size:,}; give the model that it was made from"
        )
    if tokenizer_of(config.model).get_vocab() != tokenizer_of(other).get_vocab():
        raise UserError(f"compare={config.compare}: its tokenizer differs from that of model={config.model.path}")
    if config.context is not None and config.context > others.max_position_embeddings:
        raise UserError(
            f"context={config.context}: compare={config.compare} has {others.max_position_embeddings} positions"
        )


def run(config: EvaluateConfig, run_dir: Path) -> dict[str, float]:
    """Score the text or the tasks; returns the metrics that ``result.json`` holds."""
    tasks = load_tasks(config.tasks, config.shots, config.seed) if config.tasks else None
    passages = _passages(config.lambada, config.data.column, config.limit) if config.lambada is not None else None
    with RunRecord.open(run_dir, "evaluate", asdict(config), config.seed) as record:
        model, tokenizer = _model_and_tokenizer(config)
        rounded = {"bytes": quantise_(model, config.bits, config.group)} if config.bits else {}
        positions, other = model.config.max_position_embeddings, None
        if config.compare is not None:
            other, _ = load_teacher(second_model(config.compare, "evaluate", config.model))
            positions = min(positions, other.config.max_position_embeddings)
        longest, window = config.context or positions, config.context or default_context(positions)
        if config.context is None and passages is None and tasks is None:
            tell_default_context("context", positions)
        metrics: dict[str, float]
        if passages is not None:
            metrics = _last_words(config, passages, model, tokenizer, longest)
            table = _task_table(config, metrics)
        elif tasks is not None:
            metrics = _tasks(config, tasks, model, other, tokenizer, longest)
            table = _task_table(config, metrics)
        elif other is not None:
            metrics = _comparison(config, model, other, tokenizer, window)
            table = _comparison_table(config, window, metrics)
        else:
            metrics = _perplexity(config, model, tokenizer, window)
            table = _table(config, window, metrics)
        metrics |= size_of(model) | rounded
        if config.bits:
            _add_bytes(table, config, metrics["bytes"])
        record.finish("finished", metrics)
        show(table)
    return metrics


def _model_and_tokenizer(config: EvaluateConfig) -> tuple[Any, Any]:
    if config.backend == "onnx":
        path = str(config.model.path)
        return load_decoder(locate(path, "config"), path), tokenizer_of(config.model)
    return load_teacher(config.model)


def _add_size(table: Table, metrics: dict[str, float]) -> None:
    name = "parameters" if "parameters" in metrics else "bytes"
    table.add_row("unique parameters" if name == "parameters" else name, f"{metrics[name]:,.0f}")


def _perplexity(config: EvaluateConfig, model: Any, tokenizer: Any, window: int) -> dict[str, float]:
    stream = token_stream(config.data, config.data.split, tokenizer)
    with counting("windows") as progress:
        score = perplexity(
            model,
            stream.tokens,
            window,
            config.stride,
            batch_tokens=config.batch_tokens,
            limit=config.tokens,
            ignore=ignored_token(tokenizer),
            first=stream.first,
            progress=progress,
        )
    metrics: dict[str, float] = {
        "perplexity": score.perplexity,
        "nll": score.nll,
        "tokens": score.tokens,
        "windows": score.windows,
        **size_of(model),
    }
    if score.window_perplexity is not None:
        metrics["perplexity_window_mean"] = score.window_perplexity
    if config.tokens is None or config.tokens >= len(stream):
        # Tokens that no window scores are few, and count as the mean of the others.
        metrics["bits_per_byte"] = bits_per_byte(score.nll * len(stream), stream.text_bytes)
    return metrics


def _comparison(config: EvaluateConfig, model: Any, other: Any, tokenizer: Any, window: int) -> dict[str, float]:
    stream = token_stream(config.data, config.data.split, tokenizer)
    with counting("windows") as progress:
        found = compare(
            other,
            model,
            stream.tokens,
            window,
            batch_tokens=config.batch_tokens,
            limit=config.tokens,
            ignore=ignored_token(tokenizer),
            first=stream.first,
            progress=progress,
        )
    return {
        "perplexity": found.student.perplexity,
        "nll": found.student.nll,
        "tokens": found.tokens,
        "windows": found.student.windows,
        **size_of(model),
        "compare/perplexity": found.teacher.perplexity,
        "compare/parameters": unique_parameters(other),
    } | found.metrics


def _tasks(
    config: EvaluateConfig, tasks: dict[str, Any], model: Any, other: Any | None, tokenizer: Any, window: int
) -> dict[str, float]:
    batch = max(1, config.batch_tokens // default_context(window))
    metrics, items = score_tasks(model, tokenizer, tasks, window, batch, config.limit)
    if other is not None:
        others, other_items = score_tasks(other, tokenizer, tasks, window, batch, config.limit)
        metrics |= {f"compare/{name}": value for name, value in others.items()} | flips(items, other_items)
    return metrics


def _has_lines(source: str) -> bool:
    """Whether it is a file of running text, whose lines are the passages."""
    path = Path(source).expanduser()
    return path.is_file() and text_file(path, "lambada").rows is None


def _passages(source: str, column: str | None, limit: int | None) -> list[str]:
    """Every passage of the source, or the first ones, in order."""
    texts: Iterable[str]
    if _has_lines(source):
        texts = text_lines(Path(source).expanduser(), "lambada")
    else:
        texts = (text for found in find_sources(source, "lambada", column=column) for text in found.documents("all"))
    passages = list(itertools.islice((text for text in texts if text.strip()), limit))
    if not passages:
        raise UserError(f"lambada={source}: has no text; give passages, one a row or a line")
    single = next((text for text in passages if " " not in text.strip()), None)
    if single is not None:
        raise UserError(f"lambada={source}: the passage {single.strip()[:40]!r} has one word; give two or more")
    return passages


def _last_words(
    config: EvaluateConfig, passages: list[str], model: Any, tokenizer: Any, window: int
) -> dict[str, float]:
    with counting("passages") as progress:
        score = last_words(model, tokenizer, passages, window, config.batch_tokens, progress=progress)
    return {
        "lambada/accuracy": score.accuracy,
        "lambada/perplexity": score.perplexity,
        "lambada/items": float(score.passages),
    }


def _add_bytes(table: Table, config: EvaluateConfig, count: float) -> None:
    groups = "whole rows" if config.group is None else f"groups of {config.group}"
    metric = [""] if len(table.columns) > 2 else []
    table.add_row(f"bytes in {config.bits} bits, {groups}", *metric, f"{count:,.0f}")


def _comparison_table(config: EvaluateConfig, window: int, metrics: dict[str, float]) -> Table:
    """The figures, and below them what rounding the weights of an 8B model costs."""
    table = Table(title=f"{config.model.path} against {config.compare}", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_row("perplexity", f"{metrics['perplexity']:,.4f}")
    table.add_row("perplexity of compare", f"{metrics['compare/perplexity']:,.4f}")
    ratio, error = metrics["compare/log_ppl_ratio"], metrics["compare/log_ppl_ratio_error"]
    table.add_row("ln of their ratio", f"{ratio:.4f} \u00b1 {error:.4f}")
    for name, label in (("mean", "mean"), ("median", "median"), ("99", "99%"), ("999", "99.9%")):
        table.add_row(f"KL per token, {label}", f"{metrics[f'compare/kl_{name}']:.4f}")
    table.add_row("same top token", f"{metrics['compare/same_top']:.2f}%")
    _add_size(table, metrics)
    table.add_row("unique parameters of compare", f"{metrics['compare/parameters']:,.0f}")
    table.add_row("tokens scored", f"{metrics['tokens']:,.0f}")
    table.add_row("window", f"{window:,}", end_section=True)
    for name, kl, same_top in ANCHORS:
        table.add_row(f"8B models in {name} (llama.cpp)", f"KL {kl:g}, same top {same_top:g}%")
    return table


def _task_table(config: EvaluateConfig, metrics: dict[str, float]) -> Table:
    table = Table("task", "metric", title=str(config.model.path), title_justify="left")
    for column in ("value", "\u00b1", "items"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, value in metrics.items():
        task, _, metric = name.partition("/")
        if metric != "items" and "_stderr" not in metric:
            first, slash, kept = name.partition(f"/{metric.partition('/')[0]}")
            error = metrics.get(f"{first}{slash}_stderr{kept}")
            items = metrics.get(f"{task}/items")
            table.add_row(
                task,
                metric,
                f"{value:,.4f}",
                "" if error is None else f"{error:,.4f}",
                "" if items is None else f"{items:,.0f}",
            )
    return table


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
    _add_size(table, metrics)
    return table
