"""Teacher, student and tokenizer as a configuration asks for them."""

import copy
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Any, cast

import torch

from kncompress.config import FactorsConfig, ModelConfig
from kncompress.data.tokenizer import check_fit, load_tokenizer, train_tokenizer
from kncompress.errors import UserError
from kncompress.models.compress import CompressionReport, Start, compress_
from kncompress.models.plan import plan_from_config
from kncompress.models.pretrained import load_model

ASSET = "asset:"


def locate(path: str) -> str:
    """``asset:mini`` as the folder inside the package; anything else as it is. Raises UserError if there is none."""
    if not path.startswith(ASSET):
        return path
    folder = Path(str(resources.files("kncompress"))) / "assets" / path.removeprefix(ASSET)
    if not folder.is_dir():
        known = sorted(f.name for f in folder.parent.glob("*") if (f / "config.json").exists())
        raise UserError(f"model.path={path}: no such model in the package; it has {', '.join(known) or 'none'}")
    return str(folder)


def load_dense(config: ModelConfig) -> Any:
    """The model alone, float32 and in evaluation mode."""
    assert config.path is not None
    return load_model(locate(config.path), dtype=torch.float32)


def load_teacher(config: ModelConfig) -> tuple[Any, Any]:
    """Model (float32, evaluation mode) and tokenizer, checked against each other."""
    assert config.path is not None
    tokenizer = load_tokenizer(config.tokenizer or locate(config.path))
    model = load_dense(config)
    check_fit(tokenizer, model.config.vocab_size, config.tokenizer or config.path)
    return model, tokenizer


def tokenizer_if_any(config: ModelConfig) -> Any | None:
    """The tokenizer of a model, or None: factoring the weights needs none."""
    assert config.path is not None
    try:
        return load_tokenizer(config.tokenizer or locate(config.path))
    except UserError:
        if config.tokenizer is not None:
            raise
        return None


def model_config(config: ModelConfig) -> Any:
    """The transformers config of a model, without its weights. Raises UserError where there is none."""
    from transformers import AutoConfig

    if config.architecture is not None:
        values = dict(config.architecture)
        kind = values.pop("model_type", None)
        try:
            return AutoConfig.for_model(kind, **values)
        except ValueError as error:
            raise UserError(f"model.architecture.model_type={kind}: {str(error).splitlines()[0]}") from error
    assert config.path is not None
    path = locate(config.path)
    try:
        return AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UserError(f"model.path={config.path}: no model there ({str(error).splitlines()[0]})") from error


def new_model(config: ModelConfig, documents: Iterable[str]) -> tuple[Any, Any]:
    """A model with random weights, and its tokenizer: the one that is named, or one trained on ``documents``."""
    from transformers import AutoModelForCausalLM

    fields = model_config(config)
    context = fields.max_position_embeddings
    if config.tokenizer is not None:
        tokenizer = load_tokenizer(config.tokenizer)
    else:
        tokenizer = train_tokenizer(documents, fields.vocab_size, context)
    check_fit(tokenizer, fields.vocab_size, config.tokenizer or "trained on the text")
    fields.bos_token_id = tokenizer.bos_token_id
    fields.eos_token_id = tokenizer.eos_token_id
    return AutoModelForCausalLM.from_config(fields), tokenizer


def factor_(model: Any, factors: FactorsConfig, start: str) -> CompressionReport:
    """Factors the maps of ``model`` in place."""
    return compress_(model, plan_from_config(factors, model.config), cast(Start, start))


def make_student(teacher: Any, factors: FactorsConfig, start: str) -> tuple[Any, CompressionReport]:
    """A copy of ``teacher`` with its maps factored, and the report on it."""
    student = copy.deepcopy(teacher)
    report = factor_(student, factors, start)
    student.requires_grad_(True)
    return student, report
