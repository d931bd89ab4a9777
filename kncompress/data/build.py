"""Building a token cache: one pass over the documents, which a killed process need not begin anew.

Tokens are appended to a file in a folder of its own. Every second the file is flushed, and then its length is recorded
along with the number of documents behind it; a later build cuts the file to that length and goes on with the next
document. Each document is tokenised by itself, so that the result does not depend on where it was stopped.
"""

import itertools
import json
import os
import shutil
import time
import zlib
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np

from kncompress.config import DataConfig
from kncompress.data import sources
from kncompress.data.progress import TokenisingProgress
from kncompress.errors import UserError
from kncompress.reading import SMALL, Count, checksum_text, crc32, read_json

SAVE_SECONDS = 1.0
"""Seconds between two records of the state: the most work that a kill costs."""
DOCUMENTS_AT_ONCE = 256
CHARACTERS_AT_ONCE = 2**20
"""A batch for the tokenizer ends with the first of the two; the documents of one batch are in memory at a time."""
TOKENS, FACTS, _STATE = "tokens.bin", "facts.json", "progress.json"


@dataclass(frozen=True)
class State:
    """What has been tokenised: documents of the split, their tokens, and their UTF-8 bytes."""

    documents: Count = 0
    tokens: Count = 0
    text_bytes: Count = 0
    crc: Count = 0
    """CRC-32 of the tokens' bytes."""


@dataclass(frozen=True)
class Facts:
    """``facts.json`` of a finished cache."""

    dtype: Literal["uint16", "uint32"]
    documents: Count
    tokens: Count
    text_bytes: Count
    checksum: str
    """Of tokens.bin, as ``reading.checksum`` makes it."""
    text: str
    tokenizer: str
    """Fingerprints of what it was made of."""


class Build:
    """Builds the cache ``folder``, beside which it works.

    Args:
        folder: put in place whole at the end, with tokens.bin and facts.json.
        made_of: fingerprints for facts.json.
        vocabulary: number of token ids, which decides between two bytes a token and four.
    """

    def __init__(self, folder: Path, made_of: dict[str, str], vocabulary: int) -> None:
        self.folder, self.made_of = folder, made_of
        self.partial = folder.with_name(f"{folder.name}.partial")
        self.dtype = np.dtype(np.uint16 if vocabulary <= 65_536 else np.uint32)

    def run(self, config: DataConfig, split: str, tokenizer: Any) -> None:
        """Tokenises what is not tokenised yet. Raises UserError where there is no text, OSError for a full disk."""
        self.partial.mkdir(exist_ok=True)
        state = self._recorded()
        reading = sources.Reading()
        progress = TokenisingProgress(f"tokenising the {split} text", reading)
        try:
            documents = sources.read_split(config, split, reading)
            for done, _ in enumerate(itertools.islice(documents, state.documents), start=1):
                if done % DOCUMENTS_AT_ONCE == 0:
                    progress.show(done)
            progress.skipped()
            with (self.partial / TOKENS).open("ab") as stream:
                stream.truncate(state.tokens * self.dtype.itemsize)
                state = self._append(stream, state, documents, tokenizer, config.text_format != "lines", progress)
        except UserError:
            shutil.rmtree(self.partial, ignore_errors=True)
            raise
        finally:
            progress.close()
        (self.partial / _STATE).unlink(missing_ok=True)
        counts = asdict(state)
        facts = {"dtype": self.dtype.name, "checksum": checksum_text(counts.pop("crc")), **counts, **self.made_of}
        _write(self.partial / FACTS, facts)
        self.partial.replace(self.folder)

    def _append(
        self,
        stream: BinaryIO,
        state: State,
        documents: Iterable[str],
        tokenizer: Any,
        end_of_text: bool,
        progress: TokenisingProgress,
    ) -> State:
        saved = time.monotonic()
        try:
            for batch in batches(documents):
                ids = encode(batch, tokenizer, end_of_text)
                content = np.concatenate(ids).astype(self.dtype).tobytes()
                stream.write(content)
                # One assignment, because an exception between two would record documents without their tokens.
                state = State(
                    state.documents + len(batch),
                    state.tokens + sum(map(len, ids)),
                    state.text_bytes + sum(len(document.encode()) for document in batch),
                    zlib.crc32(content, state.crc),
                )
                if time.monotonic() - saved >= SAVE_SECONDS:
                    self._record(stream, state)
                    saved = time.monotonic()
                progress.show(state.documents)
        finally:
            self._record(stream, state)
        return state

    def _record(self, stream: BinaryIO, state: State) -> None:
        stream.flush()
        os.fsync(stream.fileno())
        _write(self.partial / _STATE, asdict(state))

    def _recorded(self) -> State:
        """What an earlier process left and recorded as on disk; nothing without a valid record, or where damaged."""
        with suppress(UserError, OSError):
            state = read_json(self.partial / _STATE, State, str(self.partial), SMALL)
            with (self.partial / TOKENS).open("r+b") as stream:
                size = state.tokens * self.dtype.itemsize
                if os.fstat(stream.fileno()).st_size >= size:
                    stream.truncate(size)
                    if crc32(stream) == state.crc:
                        return state
        return State()


def batches(documents: Iterable[str]) -> Iterator[list[str]]:
    """Documents in lists of a size that suits a fast tokenizer."""
    batch: list[str] = []
    length = 0
    for document in documents:
        batch.append(document)
        length += len(document)
        if len(batch) >= DOCUMENTS_AT_ONCE or length >= CHARACTERS_AT_ONCE:
            yield batch
            batch, length = [], 0
    if batch:
        yield batch


def encode(documents: list[str], tokenizer: Any, end_of_text: bool = True) -> list[np.ndarray]:
    """Ids of each document, end-of-text appended where asked; no other special token is added."""
    end = [tokenizer.eos_token_id] if end_of_text else []
    # Without the masks, which are lists as long as the ids.
    options = {"return_attention_mask": False, "return_token_type_ids": False}
    rows = tokenizer(documents, add_special_tokens=False, verbose=False, **options)["input_ids"]
    return [np.asarray([*row, *end]) for row in rows]


def _write(path: Path, values: dict[str, Any]) -> None:
    """A JSON file that is there whole or as it was before."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w") as stream:
        json.dump(values, stream)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)
