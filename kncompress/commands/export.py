"""``export``: a model in a form that runs without this package, checked before it is kept."""

import math
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from kncompress.anatomy.families import FAMILIES
from kncompress.anatomy.in_turn import in_turn
from kncompress.anatomy.sites import language_task
from kncompress.anatomy.unpack import unpack_
from kncompress.compression.compress import unique_parameters
from kncompress.compression.multiply_out import multiply_out_
from kncompress.compression.parts import Parts
from kncompress.config import ExportConfig
from kncompress.data.sources import split_sources
from kncompress.data.tokenizer import ignored_token
from kncompress.data.tokens import token_stream
from kncompress.errors import CheckFailed, UserError
from kncompress.evaluation import perplexity
from kncompress.formats.merged import read_merged_, write_merged
from kncompress.formats.onnx_decoder import cache_sizes
from kncompress.formats.onnx_dynamic import write_dynamic
from kncompress.formats.onnx_folder import GRAPH, accompany
from kncompress.formats.onnx_graph import check_packages, write_decoder, write_onnx
from kncompress.formats.onnx_integers import write_integers
from kncompress.formats.onnx_session import OnnxDecoder, OnnxModel, largest_difference
from kncompress.formats.pretrained import load_model, load_stored, save_model, to_dense
from kncompress.formats.stored import stored_type
from kncompress.runs.record import RunRecord
from kncompress.runs.whole_file import filling
from kncompress.terminal import stages
from kncompress.training.student import locate, model_config, require_causal, tokenizer_if_any, tokenizer_of

_CLASSIFIER = "ForSequenceClassification"
_WINDOW = 1024
"""Most tokens in a window of the text."""
_ALLOWED = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 8e-2}
"""Most that a logit may change, as a share of the largest. In 16 bits it allows ten roundings, each 2^-10 (float16)
or 2^-7 (bfloat16) of a number."""
_RISE = {8: 0.02, 4: 1.0}
"""Bits -> ``int8_tolerance`` where it is left open."""
_ROUNDINGS = 3
"""In a model of many layers 16 bits alone change more than that. Then this many times their change is allowed: two
models that round differently can be twice as far from each other as each is from float32."""


def check(config: ExportConfig) -> None:
    """Cheap checks before anything is written: the model, the packages and, for ``int8``, the text exist."""
    if config.model.path is None:
        raise UserError("model.path=null: export needs a model that exists")
    if config.format in ("onnx", "int8"):
        check_packages(f"format={config.format}")
    fields = model_config(config.model)
    if config.cache:
        if _is_classifier(fields):
            raise UserError("cache=true: a classifier has no use for one; leave it out")
        require_causal(fields, "export cache=true")
    if _integers(config):
        key = f"bits={config.bits}" if config.bits else "format=int8"
        if _is_classifier(fields):
            raise UserError(f"{key}: is measured by the perplexity of a language model, and this is a classifier")
        require_causal(fields, f"export {key}")
        split_sources(config.data, config.data.split)
        tokenizer_of(config.model)


def run(config: ExportConfig, run_dir: Path) -> dict[str, float]:
    """Write and check the export in ``run_dir``; returns the metrics that ``result.json`` holds."""
    with RunRecord.open(run_dir, "export", asdict(config), config.seed) as record:
        metrics: dict[str, float] = {}
        if config.dtype == "stored":
            folder, gguf_file, _ = _source(config)
            config = replace(config, dtype=(None if gguf_file else stored_type(folder)) or "float32")
        made = {"dense": _dense, "merged": _merged, "onnx": _onnx, "int8": _int8}[config.format]
        try:
            file = made(config, run_dir, metrics)
        except CheckFailed as error:
            record.finish("failed", metrics, error=error)
            raise
        metrics["bytes"] = sum(f.stat().st_size for f in ([file] if file.is_file() else file.rglob("*")))
        record.finish("finished", metrics, file)
        print(_summary(config, metrics, file))
    return metrics


def _generates(fields: Any) -> bool:
    return language_task(fields) == "causal-lm" and not _is_classifier(fields)


def _is_classifier(fields: Any) -> bool:
    return any(name.endswith(_CLASSIFIER) for name in fields.architectures or ())


def _source(config: ExportConfig) -> tuple[Path, str | None, str | None]:
    """Folder, GGUF file and task of the model, as ``load_model`` takes them."""
    assert config.model.path is not None
    task = "sequence-classification" if _is_classifier(model_config(config.model)) else None
    return locate(config.model.path, config.model.gguf_file or "weights"), config.model.gguf_file, task


def _load(config: ExportConfig, dtype: str = "float32") -> Any:
    """The model as transformers reads it in this type.

    Casting a loaded model would also round its rotary frequencies, which transformers keeps in float32.
    """
    folder, gguf_file, task = _source(config)
    return load_model(folder, task, gguf_file, dtype=getattr(torch, dtype))


def _whole(config: ExportConfig, metrics: dict[str, float]) -> Any:
    """The model in float32 and in memory."""
    model = _load(config)
    metrics["parameters"] = unique_parameters(model)
    if _integers(config) and not config.packed:
        unpack_(model)
    return model


def _in_type(config: ExportConfig, model: Any, metrics: dict[str, float]) -> Any:
    """``model``, which is in float32, in the type of the export; notes how far that alone moves the logits."""
    if config.dtype == "float32":
        return model
    rounded = _load(config, config.dtype)
    metrics["logits/rounding"] = largest_difference(model, rounded, config.seed)
    return rounded


def _dense(config: ExportConfig, run_dir: Path, metrics: dict[str, float]) -> Path:
    """From the model's files into those of the folder, and both compared, with a layer at a time in memory."""
    source, folder = _source(config), run_dir / "model"
    dense = load_stored(*source)
    metrics["parameters"] = unique_parameters(dense)
    dtype = getattr(torch, config.dtype)
    with TemporaryDirectory(prefix=".parts.", dir=run_dir) as temporary, filling(folder) as fresh:
        files: list[Path] = []
        if dense.config.model_type in FAMILIES:
            parts = Parts(Path(temporary), dtype)
            metrics["maps/difference"] = multiply_out_(dense, parts, _ALLOWED["float32"], config.seed)
            files = parts.files
        metrics["parameters/dense"] = unique_parameters(dense)
        save_model(dense, fresh, tokenizer_if_any(config.model), dtype, parts=files)
        model, written = load_stored(*source), load_stored(fresh, task=source[2])
        with in_turn(model, dtype), in_turn(written, dtype):
            if dtype != torch.float32:
                with in_turn(load_stored(*source)) as exact:
                    metrics["logits/rounding"] = largest_difference(exact, model, config.seed)
            _compare(config, model, written, metrics)
    return folder


def _merged(config: ExportConfig, run_dir: Path, metrics: dict[str, float]) -> Path:
    model = _whole(config, metrics)
    dense = to_dense(model)
    _compare(config, model, dense, metrics, "float32")  # 16 bits would hide a slip
    metrics["parameters/dense"] = unique_parameters(dense)
    file = run_dir / "merged.safetensors"
    fresh = file.with_name(f".{file.name}.tmp")
    try:
        write_merged(dense, fresh, getattr(torch, config.dtype))
        read_merged_(dense, fresh)
        _compare(config, _in_type(config, model, metrics), dense, metrics)
        fresh.replace(file)
    finally:
        fresh.unlink(missing_ok=True)
    return file


def _onnx(config: ExportConfig, run_dir: Path, metrics: dict[str, float]) -> Path:
    model = _in_type(config, _whole(config, metrics), metrics)
    folder = run_dir / "model"
    sizes = cache_sizes(model) if config.cache is not False and _generates(model.config) else []
    if (config.cache or config.bits) and not sizes:
        key = f"bits={config.bits}" if config.bits else "cache=true"
        raise UserError(
            f"{key}: a {model.config.model_type} has an attention of its own, for which there is no operator with a "
            "cache; leave it out for a graph that scores"
        )
    with TemporaryDirectory(prefix=".onnx.", dir=run_dir) as temporary, filling(folder) as fresh:
        floats = (Path(temporary) if config.bits else fresh) / GRAPH
        with stages("export", 4) as tell:
            if sizes:
                write_decoder(model, sizes, floats, tell)
            else:
                write_onnx(model, floats, tell)
            tell("comparing it with the model")
            session = OnnxDecoder if sizes else OnnxModel
            _compare(config, model, session(floats, model.config), metrics)
        if config.bits:
            if config.dynamic:
                write_dynamic(floats, fresh / GRAPH)
            else:
                write_integers(floats, fresh / GRAPH, config.bits, config.group)
            _check_text(config, OnnxDecoder, floats, fresh / GRAPH, model, metrics)
        accompany(model, tokenizer_if_any(config.model), fresh, sizes)
    metrics["cache"] = float(bool(sizes))
    return folder


def _int8(config: ExportConfig, run_dir: Path, metrics: dict[str, float]) -> Path:
    model, folder = _whole(config, metrics), run_dir / "model"
    with TemporaryDirectory(prefix=".onnx.", dir=run_dir) as temporary, filling(folder) as fresh:
        floats = Path(temporary) / "model.onnx"
        write_onnx(model, floats)
        _compare(config, model, OnnxModel(floats, model.config), metrics)
        write_dynamic(floats, fresh / "model_int8.onnx")
        _check_text(config, OnnxModel, floats, fresh / "model_int8.onnx", model, metrics)
        accompany(model, tokenizer_of(config.model), fresh, [])
    return folder


def _check_text(
    config: ExportConfig, session: Any, floats: Path, integers: Path, model: Any, metrics: dict[str, float]
) -> None:
    """Raises CheckFailed where ``integers`` raises the perplexity on ``data`` by more than ``int8_tolerance``."""
    tokenizer = tokenizer_of(config.model)
    stream = token_stream(config.data, config.data.split, tokenizer)

    def scored(file: Path) -> float:
        score = perplexity(
            session(file, model.config),
            stream.tokens,
            min(_WINDOW, model.config.max_position_embeddings),
            batch_tokens=_WINDOW,
            limit=config.tokens,
            ignore=ignored_token(tokenizer),
            first=stream.first,
        )
        metrics["tokens"] = score.tokens
        return score.perplexity

    name = _integers(config)
    metrics["perplexity/onnx"], metrics[f"perplexity/{name}"] = scored(floats), scored(integers)
    rise = metrics[f"perplexity/{name}"] / metrics["perplexity/onnx"] - 1
    allowed = config.int8_tolerance or _RISE[config.bits or 8]
    if not (math.isfinite(rise) and rise <= allowed):
        raise CheckFailed(
            f"int8_tolerance={allowed:g}: {name} raises the perplexity by {rise:.2%}, from "
            f"{metrics['perplexity/onnx']:,.2f} to {metrics[f'perplexity/{name}']:,.2f}, and was not kept; "
            f"allow more, or take format=onnx{' without bits' if config.bits else ''}"
        )


def _integers(config: ExportConfig) -> str | None:
    """What the weights' integers are called; None: there are none."""
    if config.dynamic:
        return "dynamic"
    return f"bits{config.bits}" if config.bits else ("int8" if config.format == "int8" else None)


def _compare(config: ExportConfig, model: Any, other: Any, metrics: dict[str, float], dtype: str | None = None) -> None:
    """Raises CheckFailed where the logits of two models of one type differ by more than ``tolerance``."""
    dtype = dtype or config.dtype
    allowed = config.tolerance or max(_ALLOWED[dtype], _ROUNDINGS * metrics.get("logits/rounding", 0.0))
    found = metrics["logits/difference"] = largest_difference(model, other, config.seed)
    if not found <= allowed:
        raise CheckFailed(
            f"tolerance={allowed:g}: the logits of the export differ by {found:.3g} of the largest in {dtype}; nothing "
            "was kept"
        )


def _summary(config: ExportConfig, metrics: dict[str, float], file: Path) -> str:
    lines = [
        f"{config.model.path} as {config.format}, {metrics['bytes']:,.0f} bytes: {file}",
        f"logits differ by {metrics['logits/difference']:.2g} of the largest",
    ]
    if "cache" in metrics:
        lines.append("it generates, with a cache" if metrics["cache"] else "it scores: no cache between calls")
    if "logits/rounding" in metrics:
        lines[1] += f"; {config.dtype} alone changes them by {metrics['logits/rounding']:.2g}"
    if name := _integers(config):
        lines = lines[:1]
        lines.append(
            f"perplexity {metrics[f'perplexity/{name}']:,.2f} on {metrics['tokens']:,.0f} tokens; "
            f"{metrics['perplexity/onnx']:,.2f} before"
        )
    return "\n".join(lines)
