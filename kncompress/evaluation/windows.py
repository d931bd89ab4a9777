"""Cutting one long token sequence into the windows that a model of limited context can score."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kncompress.errors import UserError

Tokens = Tensor | np.ndarray | Sequence[int]
"""One sequence of token ids: a 1-d tensor, a numpy array (memory-mapped too, any integer type), or a list."""


class Window(NamedTuple):
    """Tokens begin..end-1 are the model's input; the last ``targets`` of them are scored."""

    begin: int
    end: int
    targets: int


def sliding_windows(length: int, context: int, stride: int | None = None) -> list[Window]:
    """Windows over ``length`` tokens, as in transformers' guide to the perplexity of fixed-length models.

    Windows of ``context`` tokens begin at 0, stride, 2 stride, ...; the last ends with the text and may be
    shorter. Each scores the tokens that no earlier window held, but never its own first token, which has no
    left context in it.

    - stride < context: every token but the first of the text is scored once, and from the second window on
      with at least context - stride tokens on its left.
    - stride = context (null): no overlap; the first token of each window is not scored. A last window of a
      single token scores nothing and is left out.

    Raises:
        UserError: fewer than 2 tokens or a context below 2, or a stride outside 1..context.
    """
    stride = context if stride is None else stride
    if length < 2:
        raise UserError(f"tokens={length}: too short to score; perplexity needs at least 2")
    if context < 2:
        raise UserError(f"context={context}: must be 2 or more")
    if not 1 <= stride <= context:
        raise UserError(f"stride={stride}: must lie between 1 and context={context}")
    windows = []
    scored = 1  # tokens behind us: the first of the text is never scored
    for begin in range(0, length, stride):
        end = min(begin + context, length)
        first = max(scored, begin + 1)
        if first < end:
            windows.append(Window(begin, end, end - first))
        scored = end
        if end == length:
            break
    return windows


def batches(windows: Sequence[Window], batch_tokens: int) -> Iterator[list[Window]]:
    """Consecutive windows of one shape, at most ``batch_tokens`` input tokens together (at least one window).

    Windows of another shape (the first under overlap, a short last one) go by themselves: no padding, which
    could leak into the scores.
    """
    batch: list[Window] = []
    for window in windows:
        size = window.end - window.begin
        alike = batch and (size, window.targets) == (batch[0].end - batch[0].begin, batch[0].targets)
        if batch and (not alike or (len(batch) + 1) * size > batch_tokens):
            yield batch
            batch = []
        batch.append(window)
    if batch:
        yield batch


def read(tokens: Tokens, windows: Sequence[Window], first: int | None = None) -> Tensor:
    """The windows' tokens, (windows, size) int64; the windows are of one size. Reads no more than these.

    ``first`` stands in the place of each window's first token, which no window scores.
    """
    rows = [tokens[window.begin : window.end] for window in windows]
    ids = torch.stack(
        [row.long() if isinstance(row, Tensor) else torch.from_numpy(np.array(row, np.int64)) for row in rows]
    )
    if first is not None:
        ids[:, 0] = first
    return ids
