"""Model folders: save, load, and give back a plain dense model."""

import copy
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from kncompress.anatomy.families import LANGUAGE_MODELS
from kncompress.anatomy.mapped import HALVES, ONE_FILE, let_go
from kncompress.anatomy.mark import factored_maps
from kncompress.anatomy.sites import check_sizes, heads_agree, language_task
from kncompress.anatomy.swap import unswap_
from kncompress.errors import UserError
from kncompress.formats import gguf
from kncompress.formats.card import CardFacts, card_text
from kncompress.formats.placed import tell_placement
from kncompress.formats.plugin import check_keys, register
from kncompress.formats.stored import check_config, check_weights, reason_of, settle, stored_type, write_checksums
from kncompress.formats.verified import check_finite, check_folder
from kncompress.hub import local_folder
from kncompress.runs.whole_file import filling, write_text
from kncompress.terminal import silenced

__all__ = ["load_config", "load_model", "register", "save_model", "to_dense"]

TASKS = LANGUAGE_MODELS | {"sequence-classification": "AutoModelForSequenceClassification"}
"""Task -> auto class of transformers."""

_BAD_FILES = (OSError, ValueError, KeyError, RuntimeError)
"""What transformers raises for a folder whose files do not fit each other."""


def save_model(
    model: Any,
    folder: str | Path,
    tokenizer: Any = None,
    dtype: torch.dtype | str | None = None,
    facts: CardFacts | None = None,
    parts: Sequence[Path] = (),
) -> Path:
    """Write a model folder (config, safetensors, tokenizer, card) for ``from_pretrained``; whole or not at all.

    Args:
        model: transformers model, compressed or dense. Weights that are shared are written once.
        folder: replaced if it is a model folder already.
        tokenizer: saved along with the model.
        dtype: type of the written weights, ``torch.float16`` or ``"float16"``; None: float32.
        facts: what README.md, the model card, tells beside what the model itself shows.
        parts: safetensors files that hold the model's weights, in the type of the folder; above ``ONE_FILE`` bytes
            they become its shards, else one file is written.

    Raises:
        UserError: ``folder`` exists and is neither empty nor a model folder, or a number is too large for ``dtype``.
        CheckFailed: what was written does not load as the model that it was made of; nothing is kept.
    """
    folder = Path(folder)
    taken = folder.is_file() or (folder.is_dir() and any(folder.iterdir()))
    if taken and not (folder / "config.json").exists():
        raise UserError(f"{folder}: exists and is no model folder; name another or remove it")
    target = getattr(torch, dtype) if isinstance(dtype, str) else dtype or torch.float32
    if any(p.dtype != target for p in model.parameters() if p.is_floating_point()):
        model = copy.deepcopy(model).to(target)
        subject = f"dtype={str(target).removeprefix('torch.')}"
        check_finite(model, subject, "is too large for it; take bfloat16 or float32")
    if not heads_agree(model):
        model.config.tie_word_embeddings = False  # or the head would not come back
    folder.parent.mkdir(parents=True, exist_ok=True)
    with filling(folder) as fresh:
        if sum(file.stat().st_size for file in parts) > ONE_FILE:
            _assemble(model, fresh, parts)
        else:
            with _no_bars():
                model.save_pretrained(fresh)
            let_go(model.parameters())
        if tokenizer is not None:
            tokenizer.save_pretrained(fresh)
        write_checksums(fresh)
        check_folder(model, fresh, load_model)
        let_go(model.parameters())
        (fresh / "README.md").write_text(card_text(model, facts), encoding="utf-8")
    return folder


def _assemble(model: Any, folder: Path, parts: Sequence[Path]) -> None:
    """What ``save_pretrained`` writes, with files that are there already for the weights: linked, so that they cost
    neither time nor room, or copied where the file system has no links."""
    from safetensors import safe_open

    dtype = next(model.parameters()).dtype
    model.config.dtype, model.config.architectures = str(dtype).removeprefix("torch."), [type(model).__name__]
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    weights: dict[str, str] = {}
    for file in parts:
        try:
            os.link(file, folder / file.name)
        except OSError:
            shutil.copy2(file, folder / file.name)
        with safe_open(file, framework="pt") as opened:
            weights |= dict.fromkeys(opened.keys(), file.name)
    facts = {"total_parameters": model.num_parameters(), "total_size": sum(file.stat().st_size for file in parts)}
    index = {"metadata": facts, "weight_map": dict(sorted(weights.items()))}
    write_text(folder / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")


def load_model(path: str | Path, task: str | None = None, gguf_file: str | None = None, **options: Any) -> Any:
    """A model from a folder or hub id, dense or compressed, in evaluation mode; missing weights are an error.

    Args:
        path: folder or hub id; once the folder is there, the network is not asked for anything.
        task: ``causal-lm``, ``masked-lm`` or ``sequence-classification`` (whose head may be new); None: the language
            model of the family, ``causal-lm`` for all but BERT.
        gguf_file: GGUF file in that folder to read instead of safetensors; its weights become ``options["dtype"]``.
        options: for ``from_pretrained``, e.g. ``dtype``, ``num_labels`` or what ``placement`` gives.

    Raises:
        UserError: no such model, a damaged file, weights that do not fit or would have to be unpickled.
    """
    if task not in (None, *TASKS):
        raise UserError(f"task={task}: not one of {', '.join(TASKS)}")
    import transformers

    register()
    folder = local_folder(path, gguf_file or "weights")
    if gguf_file is not None:
        options |= {"gguf_file": gguf_file, "config": load_config(folder, gguf_file)}
    else:
        check_weights(folder, path)
        config = load_config(folder)
        # Given by hand, a config takes the fields that transformers would have set in one of its own.
        for name in [name for name in options if name not in ("dtype", "torch_dtype") and hasattr(config, name)]:
            setattr(config, name, options.pop(name))
        options |= {"config": config, "use_safetensors": True}
    auto = getattr(transformers, TASKS[task or language_task(options["config"])])
    try:
        # transformers' table of keys that do not fit becomes an error of one line; weights that are away are told here
        with _no_bars(), silenced("transformers", "accelerate.big_modeling"):
            model, loading = auto.from_pretrained(
                str(folder),
                output_loading_info=True,
                local_files_only=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,  # an error below, that names them
                **options,
            )
    except _BAD_FILES as error:
        if gguf_file is not None:
            raise gguf.damaged(folder, gguf_file, error) from error
        raise UserError(f"model.path={path}: {reason_of(error)}") from error
    if gguf_file is not None:
        gguf.as_ordinary_(model)
    for name, found, wanted in sorted(loading["mismatched_keys"])[:1]:
        raise UserError(f"model.path={path}: {name} is {list(found)} in the weights and {list(wanted)} in config.json")
    check_keys(model, loading["missing_keys"], loading["unexpected_keys"], str(path))
    check_finite(model, f"model.path={path}", "is not a finite number")
    tell_placement(model, str(path))
    return model


def load_stored(path: str | Path, gguf_file: str | None = None, task: str | None = None) -> Any:
    """A model as ``load_model`` gives it, in the type of its files, whose weights stay in the files until they are read
    (``anatomy.mapped``). Of weights of several types, and from GGUF: in float32 and in memory.
    """
    folder = local_folder(path, gguf_file or "weights")
    if gguf_file is None:
        check_weights(folder, path)
    kind = (None if gguf_file else stored_type(folder)) or "float32"
    model = load_model(path, task, gguf_file, dtype=getattr(torch, kind))
    for name, buffer in model.named_buffers():
        # Numbers that the model is made with, rounded with its weights: the float32 model has them exact.
        owner, _, own = name.rpartition(".")
        if buffer.dtype in HALVES and name not in model.state_dict():
            exact = getattr(model.get_submodule(owner), f"scalar_{own}", None)
            if exact is None:
                return load_model(path, task, gguf_file, dtype=torch.float32)
            model.get_submodule(owner).register_buffer(own, torch.tensor(exact, dtype=torch.float32), persistent=False)
    return model


def load_config(path: str | Path, gguf_file: str | None = None) -> Any:
    """The transformers config of a folder or hub id, or that inside a GGUF file; nothing else is read or downloaded.

    Raises UserError where there is none, or one that transformers does not take.
    """
    from transformers import AutoConfig

    register()
    folder = local_folder(path, gguf_file or "config")
    if gguf_file is not None:
        config = gguf.read_config(folder, gguf_file)
        check_sizes(config, f"model.gguf_file={gguf_file}")
        return config
    check_config(folder, path)
    try:
        config = AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # each config class has checks of its own
        raise UserError(f"model.path={path}: no model there ({reason_of(error)})") from error
    check_sizes(config, f"model.path={path}: config.json")
    settle(config, folder, path)
    return config


@contextmanager
def _no_bars() -> Iterator[None]:
    """Hides transformers' progress bars, which a local folder is too quick for; downloads have theirs elsewhere."""
    from transformers.utils import logging

    if not logging.is_progress_bar_enabled():
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
