"""Model folders: save, load, and give back a plain dense model."""

import copy
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from kncompress.errors import UserError
from kncompress.models.compress import factored_maps
from kncompress.models.plugin import check_keys, register
from kncompress.models.swap import unswap_

__all__ = ["load_model", "register", "save_model", "to_dense"]

TASKS = {
    "causal-lm": "AutoModelForCausalLM",
    "sequence-classification": "AutoModelForSequenceClassification",
}
"""Task -> auto class of transformers."""


def save_model(model: Any, folder: str | Path, tokenizer: Any = None, dtype: torch.dtype | str | None = None) -> Path:
    """Write a model folder (config, safetensors, tokenizer) for ``from_pretrained``; whole or not at all.

    Args:
        model: transformers model, compressed or dense. Weights that are shared are written once.
        folder: replaced if it is a model folder already.
        tokenizer: saved along with the model.
        dtype: type of the written weights, ``torch.float16`` or ``"float16"``; None: float32.

    Raises:
        UserError: ``folder`` exists and is neither empty nor a model folder.
    """
    folder = Path(folder)
    taken = folder.is_file() or (folder.is_dir() and any(folder.iterdir()))
    if taken and not (folder / "config.json").exists():
        raise UserError(f"{folder}: exists and is no model folder; name another or remove it")
    target = getattr(torch, dtype) if isinstance(dtype, str) else dtype or torch.float32
    if any(p.dtype != target for p in model.parameters() if p.is_floating_point()):
        model = copy.deepcopy(model).to(target)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as parent:
        fresh, stale = Path(parent) / "new", Path(parent) / "old"
        with _no_bars():
            model.save_pretrained(fresh)
        if tokenizer is not None:
            tokenizer.save_pretrained(fresh)
        if folder.exists():
            folder.replace(stale)
        try:
            fresh.replace(folder)
        except OSError:
            if stale.exists():
                stale.replace(folder)
            raise
        shutil.rmtree(stale, ignore_errors=True)
    return folder


def load_model(path: str | Path, task: str = "causal-lm", **options: Any) -> Any:
    """A model from a folder or hub id, dense or compressed, in evaluation mode; missing weights are an error.

    Args:
        path: what ``from_pretrained`` takes.
        task: ``causal-lm`` or ``sequence-classification`` (whose head may be new).
        options: for ``from_pretrained``, e.g. ``dtype`` or ``num_labels``.

    Raises:
        UserError: no such model, or its weights do not fit.
    """
    if task not in TASKS:
        raise UserError(f"task={task}: not one of {', '.join(TASKS)}")
    import transformers

    register()
    auto = getattr(transformers, TASKS[task])
    try:
        with _no_bars(quiet=Path(path).exists()):
            model, loading = auto.from_pretrained(str(path), output_loading_info=True, **options)
    except OSError as error:
        raise UserError(f"model.path={path}: {str(error).splitlines()[0]}") from error
    check_keys(model, loading["missing_keys"], loading["unexpected_keys"], str(path))
    return model


@contextmanager
def _no_bars(quiet: bool = True) -> Iterator[None]:
    """Hides transformers' progress bars, which a local folder is too quick for; downloads keep theirs."""
    from transformers.utils import logging

    if not quiet or not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


def to_dense(model: Any) -> Any:
    """A copy of a compressed model in transformers' plain form; equal outputs, loads without this package."""
    dense = copy.deepcopy(model)
    if factored_maps(dense):
        unswap_(dense)
        del dense.config.quantization_config
    return dense
