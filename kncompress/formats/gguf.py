"""GGUF files: one file with weights (mostly quantised), configuration and tokenizer, read through transformers.

The result is an ordinary float32 model without any mark of its origin.
"""

import copy
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from kncompress.errors import UserError
from kncompress.terminal import first_line

_MAGIC = b"GGUF"
_PACKAGES = ("gguf", "accelerate")


def check_file(folder: Path, name: str) -> None:
    """Raises UserError where the packages that read GGUF, or the file itself, are missing or it is something else."""
    for package in _PACKAGES:
        if find_spec(package) is None:
            raise UserError(
                f"model.gguf_file={name}: the package {package}, which reads it, is not installed; "
                "install it by `pip install 'kncompress[gguf]'`"
            )
    file = folder / name
    if not file.is_file():
        found = ", ".join(sorted(f.name for f in folder.glob("*.gguf"))) or "none"
        raise UserError(f"model.gguf_file={name}: no such file in {folder}; GGUF files there: {found}")
    with file.open("rb") as stream:
        if stream.read(len(_MAGIC)) != _MAGIC:
            raise UserError(f"model.gguf_file={name}: not a GGUF file")


def read_config(folder: Path, name: str) -> Any:
    """The transformers config that the header of a GGUF file describes; no weight is read."""
    check_file(folder, name)
    file = folder / name
    facts = file.stat()
    return copy.deepcopy(_read_config(folder, name, facts.st_size, facts.st_mtime_ns))


@lru_cache(maxsize=4)
def _read_config(folder: Path, name: str, size: int, modified: int) -> Any:
    # Seconds: the header holds the vocabulary. A verb asks for it more than once.
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(str(folder), gguf_file=name, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the reader has no error of its own for a damaged header
        raise damaged(folder, name, error) from error


def damaged(folder: Path, name: str, error: BaseException) -> UserError:
    """The error for a file that cannot be read."""
    return UserError(f"model.gguf_file={name}: cannot be read in {folder} ({first_line(error)})")


def as_ordinary_(model: Any) -> None:
    """Takes the marks of a quantised model off one whose weights have been turned to floats."""
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    for name in ("hf_quantizer", "quantization_method"):
        if hasattr(model, name):
            delattr(model, name)
    model.is_quantized = False
    for module in model.modules():
        if "_is_quantized" in getattr(getattr(module, "config", None), "__dict__", {}):
            del module.config._is_quantized
