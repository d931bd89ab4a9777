"""Token streams: documents tokenised once into a memory-mapped cache, read as blocks of equal length."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor
from torch.utils.data import Dataset

from kncompress.config import DataConfig
from kncompress.data import sources
from kncompress.errors import UserError

IGNORED_LABEL = -100
_FORMAT = 1
_DOCUMENTS_AT_ONCE = 256


@dataclass(frozen=True)
class TokenStream:
    """Tokens of a split, end-of-text after each document, on disk.

    ``tokens`` is a memory map of shape (n,), uint16, or uint32 for vocabularies above 65,535. ``text_bytes`` counts
    the UTF-8 bytes of the documents.
    """

    tokens: np.ndarray
    documents: int
    text_bytes: int

    def __len__(self) -> int:
        return len(self.tokens)


def cache_root(configured: str | None) -> Path:
    """Folder of the token caches: the configured one, ``$KNCOMPRESS_CACHE``, or the user's cache folder."""
    chosen = configured or os.environ.get("KNCOMPRESS_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "kncompress"


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Hash of everything that decides how text becomes ids."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        state = json.loads(backend.to_str())
        # Calls to the tokenizer set these two as a side effect; they do not change ids of unpadded text.
        state.pop("padding", None)
        state.pop("truncation", None)
        text = json.dumps(state, sort_keys=True)
    else:
        text = json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return hashlib.sha256(f"{text}|{tokenizer.eos_token_id}".encode()).hexdigest()


def token_stream(
    config: DataConfig, split: str, tokenizer: Any, progress: Callable[[int, int], None] | None = None
) -> TokenStream:
    """The tokens of a split, from the cache or tokenised into it.

    The cache is keyed by the content of the text, the split and the tokenizer; it is built under a lock and put in
    place whole, so that a killed or concurrent process leaves no half-written one.
    """
    key = hashlib.sha256(
        f"{_FORMAT}|{sources.fingerprint(config, split)}|{tokenizer_fingerprint(tokenizer)}".encode()
    ).hexdigest()[:32]
    root = cache_root(config.cache_dir)
    folder = root / "tokens" / key
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"data.cache_dir={root}: cannot be written ({error.strerror})") from None
    with FileLock(folder.parent / f"{key}.lock"):
        if not folder.exists():
            _build(folder, sources.read_split(config, split), tokenizer, config.text_format != "lines", progress)
    return _open(folder)


def encode(documents: Iterable[str], tokenizer: Any, end_of_text: bool = True) -> Iterator[np.ndarray]:
    """Ids of each document, end-of-text appended where asked; no other special token is added."""
    chunk: list[str] = []
    end = [tokenizer.eos_token_id] if end_of_text else []

    def flush() -> Iterator[np.ndarray]:
        if chunk:
            ids = tokenizer(chunk, add_special_tokens=False, verbose=False)["input_ids"]
            yield from (np.asarray([*row, *end]) for row in ids)
            chunk.clear()

    for document in documents:
        chunk.append(document)
        if len(chunk) == _DOCUMENTS_AT_ONCE:
            yield from flush()
    yield from flush()


def _build(
    folder: Path,
    documents: list[str],
    tokenizer: Any,
    end_of_text: bool,
    progress: Callable[[int, int], None] | None,
) -> None:
    dtype = np.uint16 if len(tokenizer) <= 65_536 else np.uint32
    partial = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    try:
        with (partial / "tokens.bin").open("wb") as stream:
            for done, ids in enumerate(encode(documents, tokenizer, end_of_text), start=1):
                stream.write(ids.astype(dtype).tobytes())
                if progress:
                    progress(done, len(documents))
        facts = {
            "dtype": np.dtype(dtype).name,
            "documents": len(documents),
            "text_bytes": sum(len(d.encode()) for d in documents),
        }
        (partial / "facts.json").write_text(json.dumps(facts))
        partial.replace(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _open(folder: Path) -> TokenStream:
    try:
        facts = json.loads((folder / "facts.json").read_text())
        tokens = np.memmap(folder / "tokens.bin", dtype=facts["dtype"], mode="r")
    except (OSError, ValueError, KeyError):
        raise UserError(f"data.cache_dir={folder}: this token cache is damaged; delete the folder") from None
    return TokenStream(tokens, facts["documents"], facts["text_bytes"])


class Blocks(Dataset[dict[str, Tensor]]):
    """A token stream cut into blocks of ``context`` tokens; a last short rest is left out.

    An item is {"input_ids": (context,) int64, "labels": (context,) int64 with -100 where the token is ``ignored``};
    the loss shifts the labels.
    """

    def __init__(self, stream: TokenStream, context: int, ignored: int | None = None) -> None:
        if len(stream) < context:
            raise UserError(
                f"data.context={context}: the text has only {len(stream)} tokens, less than one block; "
                "give more text or a shorter context"
            )
        self.tokens, self.context, self.ignored = stream.tokens, context, ignored

    def __len__(self) -> int:
        return len(self.tokens) // self.context

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        start = index * self.context
        ids = torch.from_numpy(self.tokens[start : start + self.context].astype(np.int64))
        labels = ids if self.ignored is None else ids.masked_fill(ids == self.ignored, IGNORED_LABEL)
        return {"input_ids": ids, "labels": labels}
