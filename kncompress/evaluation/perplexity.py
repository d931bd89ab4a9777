"""Perplexity of causal language models on one long text.

Two protocols, both from one pass where the windows do not overlap:

- token-weighted: exp of the mean negative log-likelihood over all scored tokens;
- window mean: exp of the unweighted mean of the windows' mean losses, where a short last window counts as
  much as a full one. The Krony-PT repository (``perplexity_eval.py``) arrives at its published figures so,
  with windows of 1024. The two protocols differ by the last window alone, unless tokens are ignored.

``sliding_windows`` says which tokens are scored. Log-probabilities are float32 and their sums float64.
"""

import math
from dataclasses import dataclass
from typing import Unpack

import torch
from torch import Tensor, nn

from kncompress.errors import UserError
from kncompress.evaluation.scoring import Scoring, input_device, score_windows, windows_for
from kncompress.evaluation.token_mean import TokenMean
from kncompress.evaluation.windows import Tokens


@dataclass(frozen=True)
class Perplexity:
    """Scores of one model on one text."""

    nll: float
    """Negative log-likelihood in nats, mean over the scored tokens."""
    tokens: int
    """Tokens scored."""
    windows: int
    """Windows in which at least one token was scored."""
    window_nll: float | None
    """Unweighted mean over windows of their mean negative log-likelihood; null where windows overlap."""

    @property
    def perplexity(self) -> float:
        """Token-weighted perplexity."""
        return _exp(self.nll)

    @property
    def window_perplexity(self) -> float | None:
        """Perplexity by window mean; null where windows overlap."""
        return None if self.window_nll is None else _exp(self.window_nll)


def perplexity(
    model: nn.Module,
    tokens: Tokens,
    context: int,
    stride: int | None = None,
    limit: int | None = None,
    **how: Unpack[Scoring],
) -> Perplexity:
    """Score ``tokens`` with ``model``, on the model's device and in eval mode (its mode is restored).

    Args:
        model: a causal language model of transformers: ``model(input_ids=..., use_cache=False).logits``.
        tokens: 1-d sequence of token ids; a memory-mapped array is read window by window.
        context: tokens in a window.
        stride: tokens between the beginnings of windows; null: ``context``, no overlap.
        limit: use only the first tokens of the text; null: all.
        how: as in ``Scoring``.

    Raises:
        UserError: a text of fewer than 2 tokens, a context below 2 or beyond the model's positions, a stride
            outside 1..context, or nothing left to score.
    """
    tokens = tokens[:limit]
    windows = windows_for([model], tokens, context, stride)
    means = WindowMeans(input_device(model), how.get("world", 1))
    score_windows([model], tokens, windows, lambda values: means.update(values[0]), **how)
    return means.perplexity(overlap=stride is not None and stride < context)


def bits_per_byte(nll_sum: float, bytes: int) -> float:
    """Bits per byte of text: negative log-likelihood in nats over all tokens / (bytes x ln 2).

    Comparable between tokenizers, given that the same bytes are scored.

    Raises:
        UserError: no bytes.
    """
    if bytes < 1:
        raise UserError(f"bytes={bytes}: must be 1 or more")
    return nll_sum / (bytes * math.log(2))


class WindowMeans:
    """Running means of one negative log-likelihood, over tokens and over windows.

    Args:
        device: where the values lie.
        world: processes that share the windows; with 1 a surrounding process group is left alone.
    """

    def __init__(self, device: torch.device, world: int) -> None:
        self.over_tokens = TokenMean(sync_on_compute=world > 1).to(device)
        self.over_windows = TokenMean(sync_on_compute=world > 1).to(device)

    def update(self, values: Tensor) -> None:
        """Add one window, by its values per token (targets,)."""
        self.over_tokens.update(values.double().sum(), values.numel())
        self.over_windows.update(values.double().mean(), 1)

    def perplexity(self, overlap: bool = False) -> Perplexity:
        """The means of all processes; ``overlap``: the windows overlap, so that their mean says nothing.

        Raises:
            UserError: nothing was scored.
        """
        (total, tokens), (window_total, windows) = self.over_tokens.totals(), self.over_windows.totals()
        if not tokens:
            raise UserError("tokens=0: every token is ignored; there is nothing to score")
        return Perplexity(total / tokens, tokens, windows, None if overlap else window_total / windows)


def _exp(nll: float) -> float:
    try:
        return math.exp(nll)
    except OverflowError:
        return math.inf
