"""Fingerprints of what a run reads, kept in its record: a resumed run is to read the same."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

from kncompress.config import DataConfig, ModelConfig
from kncompress.data.files import content_hash
from kncompress.data.sources import sources_of, without_own
from kncompress.data.tokenizer import load_tokenizer
from kncompress.data.tokens import tokenizer_fingerprint
from kncompress.training.student import locate, tokenizer_if_any


def contents(
    model: ModelConfig, data: DataConfig | None = None, models: Mapping[str, str | None] | None = None
) -> dict[str, str]:
    """{key of the configuration: hash of the content that it names}.

    Args:
        model: its weights and config.json, and the tokenizer.
        data: the text.
        models: other models, by their key.
    """
    paths = {"model.path": model.path, **(models or {})}
    found = {key: _model(path, model.gguf_file if key == "model.path" else None) for key, path in paths.items() if path}
    tokenizer = None
    if model.path is not None:
        tokenizer = tokenizer_if_any(model)
    elif model.tokenizer is not None:
        tokenizer = load_tokenizer(locate(model.tokenizer, "tokenizer", "model.tokenizer"))
    if tokenizer is not None:
        found["model.tokenizer"] = tokenizer_fingerprint(tokenizer)
    for key in ("source", "validation", "test"):
        if data is not None and getattr(data, key) is not None:
            sources = sources_of(without_own(data), key)  # what the model writes is decided by the model
            found[f"data.{key}"] = _hash([source.fingerprint() for source in sources])
    return found


def _model(path: str, gguf_file: str | None) -> str:
    folder = locate(path, gguf_file or "weights")
    files = [folder / gguf_file] if gguf_file else [folder / "config.json", *sorted(folder.glob("*.safetensors"))]
    return _hash([f"{file.name}:{content_hash(file)}" for file in files if Path(file).is_file()])


def _hash(parts: list[str]) -> str:
    return hashlib.sha256("|".join(parts).encode()).hexdigest()
