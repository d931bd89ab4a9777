"""Token streams: documents tokenised once into a memory-mapped cache, read as blocks of equal length."""

import hashlib
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor
from torch.utils.data import Dataset

from kncompress.config import DataConfig
from kncompress.data import sources
from kncompress.data.build import FACTS, TOKENS, Build, Facts
from kncompress.data.tokenizer import first_token
from kncompress.errors import UserError
from kncompress.reading import SMALL, checksum, read_json
from kncompress.runs.process import tell

IGNORED_LABEL = -100
LONGEST_BY_DEFAULT = 2048
"""Tokens in a window or block where nobody says: models of today have 131,072 positions, too many for most machines."""
WAIT_SECONDS = 3.0
"""A process that waits longer than this for another one's cache says so."""
_FORMAT = 4


@dataclass(frozen=True)
class TokenStream:
    """Tokens of a split, end-of-text after each document, on disk.

    ``tokens`` is a memory map of shape (n,), uint16, or uint32 for vocabularies above 65,535. ``text_bytes`` counts
    the UTF-8 bytes of the documents. ``first`` is the token that a block or window begins with, in the place of its
    own (``first_token``); None: it keeps its own.
    """

    tokens: np.ndarray
    documents: int
    text_bytes: int
    first: int | None = None

    def __len__(self) -> int:
        return len(self.tokens)


def cache_root(configured: str | None) -> Path:
    """Folder of the token caches: the configured one, ``$KNCOMPRESS_CACHE``, or the user's cache folder."""
    chosen = configured or os.environ.get("KNCOMPRESS_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "kncompress"


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


def default_context(positions: int | None) -> int:
    """Tokens in a window where the configuration names none: the model's ``positions`` (None: any), at most 2,048."""
    return min(positions or LONGEST_BY_DEFAULT, LONGEST_BY_DEFAULT)


def tell_default_context(key: str, positions: int | None) -> None:
    """Say where the default window is shorter than the model could read."""
    if positions and positions > LONGEST_BY_DEFAULT:
        window = f"windows of {LONGEST_BY_DEFAULT:,} of the model's {positions:,} positions"
        tell(f"{window}; {key}={positions} takes all")


def token_stream(config: DataConfig, split: str, tokenizer: Any) -> TokenStream:
    """The tokens of a split, from the cache or tokenised into it.

    The cache is keyed by the content of the text, the split and the tokenizer. One process builds it, under a lock, and
    puts it in place whole; a build that was killed is continued by the next one.

    Raises:
        UserError: no text, a cache folder that cannot be written, or a cache that is damaged or of something else.
    """
    text, vocabulary = sources.fingerprint(config, split), tokenizer_fingerprint(tokenizer)
    key = hashlib.sha256(f"{_FORMAT}|{text}|{vocabulary}".encode()).hexdigest()[:32]
    root = cache_root(config.cache_dir)
    folder = root / "tokens" / key
    if not folder.is_dir():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with _lock(folder.parent / f"{key}.lock", split):
                if not folder.is_dir():
                    build = Build(folder, {"text": text, "tokenizer": vocabulary}, len(tokenizer))
                    build.run(config, split, tokenizer)
        except OSError as error:
            raise UserError(f"data.cache_dir={root}: cannot be written ({error.strerror or error})") from error
    return replace(open_stream(folder, text, vocabulary), first=first_token(tokenizer))


def open_stream(folder: Path, text: str, tokenizer: str) -> TokenStream:
    """A finished cache. Raises UserError where it is damaged, or not of this text and tokenizer (fingerprints)."""
    where, file = f"data.cache_dir={folder}: this token cache", folder / TOKENS
    try:
        facts = read_json(folder / FACTS, Facts, f"{where} is damaged", SMALL)
        found = checksum(file)
    except (UserError, OSError) as error:
        reason = f"{where} is damaged: {TOKENS} cannot be read" if isinstance(error, OSError) else str(error)
        raise UserError(f"{reason}; delete the folder") from None
    dtype = np.dtype(facts.dtype)
    if found != facts.checksum or file.stat().st_size != facts.tokens * dtype.itemsize:
        raise UserError(f"{where} is damaged: {TOKENS} is not as it was written; delete the folder")
    if facts.tokenizer != tokenizer:
        raise UserError(f"{where} was made by another tokenizer; delete the folder")
    if facts.text != text:
        raise UserError(f"{where} was made of another text; delete the folder")
    return TokenStream(np.memmap(file, dtype, mode="r"), facts.documents, facts.text_bytes)


@contextmanager
def _lock(path: Path, split: str) -> Iterator[None]:
    lock = FileLock(path)
    try:
        lock.acquire(timeout=WAIT_SECONDS)
    except Timeout:
        print(f"waiting for another process that tokenises the {split} text ({path})", file=sys.stderr, flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


class Blocks(Dataset[dict[str, Tensor]]):
    """A token stream cut into blocks of ``context`` tokens, each with the stream's ``first`` token in front.

    A last short rest is left out.

    An item is {"input_ids": (context,) int64, "labels": (context,) int64 with -100 where the token is ``ignored``};
    the loss shifts the labels. Where ``numbered`` it has its "block" too, a number.
    """

    def __init__(self, stream: TokenStream, context: int, ignored: int | None = None, numbered: bool = False) -> None:
        if len(stream) < context:
            raise UserError(
                f"data.context={context}: the text has only {len(stream)} tokens, less than one block; "
                "give more text or a shorter context"
            )
        self.tokens, self.context, self.ignored, self.first = stream.tokens, context, ignored, stream.first
        self.numbered = numbered

    def __len__(self) -> int:
        return len(self.tokens) // self.context

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        start = index * self.context
        ids = torch.from_numpy(self.tokens[start : start + self.context].astype(np.int64))
        if self.first is not None:
            ids[0] = self.first
        labels = ids if self.ignored is None else ids.masked_fill(ids == self.ignored, IGNORED_LABEL)
        number = {"block": torch.tensor(index)} if self.numbered else {}
        return {"input_ids": ids, "labels": labels} | number
