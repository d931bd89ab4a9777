"""Sentences and sentence pairs as token sequences, in batches of like lengths.

Format for a causal model: the beginning-of-sequence token where the tokenizer puts one by itself, the first text and,
of a pair, a line feed and the second text, without the spaces around them. Nothing follows, so the last real token is
the end of the text, which has read everything before it: its hidden state goes to the head. A sequence that is too long
loses tokens at the end of its longer text. Batches are padded on the right, which the causal mask keeps out of sight of
every real token.
"""

import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from kncompress.data.tokenizer import first_token
from kncompress.errors import UserError
from kncompress.glue.files import Example

SEPARATOR = "\n"
_BUCKET = 50
"""Batches whose sequences are sorted by length together."""
_TEXTS_AT_ONCE = 1000


def padding_token(tokenizer: Any, name: str) -> int:
    """Id with which batches are padded: the pad token, or the end of text where there is none (GPT-2).

    Raises UserError where the tokenizer has neither.
    """
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise UserError(
        f"model.tokenizer={name}: has neither a pad nor an end-of-text token to fill up batches with; give a tokenizer "
        "that has one"
    )


def encode(examples: Sequence[Example], tokenizer: Any, length: int) -> list[list[int]]:
    """Token ids of each example, at most ``length`` of them and at least one."""
    begin = first_token(tokenizer)
    starts = [] if begin is None else [begin]
    between = tokenizer(SEPARATOR, add_special_tokens=False)["input_ids"]
    found = []
    for start in range(0, len(examples), _TEXTS_AT_ONCE):
        part = examples[start : start + _TEXTS_AT_ONCE]
        flat = [text.strip() for example in part for text in example.texts]
        # verbose: no warning about texts longer than the model, which are cut here.
        ids = iter(tokenizer(flat, add_special_tokens=False, verbose=False)["input_ids"])
        for example in part:
            texts = [next(ids) for _ in example.texts]
            first, *rest = _shortened(texts, length - len(starts) - len(between) * (len(texts) - 1))
            found.append([*starts, *first, *(token for text in rest for token in (*between, *text))] or between[:1])
    return found


def _shortened(texts: list[list[int]], length: int) -> list[list[int]]:
    """The texts cut at their ends to ``length`` tokens in all, the longer one first."""
    if len(texts) == 1:
        return [texts[0][:length]]
    first, second = texts
    half = length // 2
    if len(first) + len(second) <= length:
        return texts
    if len(second) <= half:
        return [first[: length - len(second)], second]
    if len(first) <= length - half:
        return [first, second[: length - len(first)]]
    return [first[: length - half], second[:half]]


Row = tuple[np.ndarray, int | float | None]
"""Token ids (T,), int32, and the label."""


class Sequences(Dataset[Row]):
    """Encoded examples with their labels."""

    def __init__(self, examples: Sequence[Example], tokenizer: Any, length: int) -> None:
        # Arrays: a list of Python's numbers takes nine times the memory.
        self.ids = [np.array(ids, dtype=np.int32) for ids in encode(examples, tokenizer, length)]
        self.labels = [example.label for example in examples]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Row:
        return self.ids[index], self.labels[index]


class Collate:
    """A batch: input_ids and attention_mask (B, T), and labels (B,): int64, or float32 for scores, if there are any."""

    def __init__(self, padding: int) -> None:
        self.padding = padding

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        longest = max(len(ids) for ids, _ in rows)
        ids = torch.full((len(rows), longest), self.padding, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for number, (tokens, _) in enumerate(rows):
            ids[number, : len(tokens)] = torch.from_numpy(tokens)
            mask[number, : len(tokens)] = 1
        batch = {"input_ids": ids, "attention_mask": mask}
        labels = [label for _, label in rows if label is not None]
        return batch | {"labels": torch.tensor(labels)} if labels else batch


class LikeLengths(Sampler[list[int]]):
    """Batches of ``size`` indices in a new random order at each pass, of similar length within a batch.

    Shuffled, then sorted by length within stretches of 50 batches, then the batches shuffled. The order of pass n
    depends on ``seed`` and n alone. The last batch of a pass may be smaller.
    """

    def __init__(self, lengths: Sequence[int], size: int, seed: int) -> None:
        self.lengths, self.size, self.seed, self.passes = lengths, size, seed, 0

    def __len__(self) -> int:
        return -(-len(self.lengths) // self.size)

    def __iter__(self) -> Iterator[list[int]]:
        chance = random.Random(f"{self.seed}:{self.passes}")
        self.passes += 1
        order = list(range(len(self.lengths)))
        chance.shuffle(order)
        batches = []
        for start in range(0, len(order), self.size * _BUCKET):
            near = sorted(order[start : start + self.size * _BUCKET], key=self.lengths.__getitem__)
            batches += [near[place : place + self.size] for place in range(0, len(near), self.size)]
        chance.shuffle(batches)
        return iter(batches)


def training_loader(sequences: Sequences, size: int, padding: int, seed: int) -> DataLoader:
    """Shuffled batches of ``size`` examples."""
    sampler = LikeLengths([len(ids) for ids in sequences.ids], size, seed)
    return DataLoader(sequences, batch_sampler=sampler, collate_fn=Collate(padding))


def scoring_loader(sequences: Sequences, size: int, padding: int) -> tuple[DataLoader, list[int]]:
    """Batches of all examples by length, and the index of each example in the order in which they come."""
    order = sorted(range(len(sequences)), key=lambda index: len(sequences.ids[index]))
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    return DataLoader(sequences, batch_sampler=batches, collate_fn=Collate(padding)), order
