"""Perplexity of causal language models on one long text, and their divergence from a teacher.

Two protocols, both from one pass where the windows do not overlap:

- token-weighted: exp of the mean negative log-likelihood over all scored tokens;
- window mean: exp of the unweighted mean of the windows' mean losses, where a short last window counts as
  much as a full one. The Krony-PT repository (``perplexity_eval.py``) arrives at its published figures so,
  with windows of 1024. The two protocols differ by the last window alone, unless tokens are ignored.

``sliding_windows`` says which tokens are scored. Log-probabilities are float32 and their sums float64.
"""

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kncompress.errors import UserError
from kncompress.evaluation.token_mean import TokenMean
from kncompress.evaluation.windows import Tokens, Window, batches, read, sliding_windows

_CHUNK_NUMBERS = 2**24
"""Numbers in one float32 temporary of (tokens x vocabulary): 64 MiB."""

Progress = Callable[[int, int], None]


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

    @property
    def nll_sum(self) -> float:
        """Negative log-likelihood of all scored tokens together, in nats."""
        return self.nll * self.tokens


@dataclass(frozen=True)
class Comparison:
    """Teacher and student on the same windows."""

    kl: float
    """KL(teacher || student) of the next-token distributions, in nats per scored token."""
    teacher: Perplexity
    student: Perplexity

    @property
    def tokens(self) -> int:
        """Tokens scored."""
        return self.student.tokens


def perplexity(
    model: nn.Module,
    tokens: Tokens,
    context: int,
    stride: int | None = None,
    *,
    batch_tokens: int = 8192,
    limit: int | None = None,
    ignore: int | None = None,
    bf16: bool = False,
    progress: Progress | None = None,
    rank: int = 0,
    world: int = 1,
) -> Perplexity:
    """Score ``tokens`` with ``model``, on the model's device and in eval mode (its mode is restored).

    Args:
        model: a causal language model of transformers: ``model(input_ids=..., use_cache=False).logits``.
        tokens: 1-d sequence of token ids; a memory-mapped array is read window by window.
        context: tokens in a window.
        stride: tokens between the beginnings of windows; null: ``context``, no overlap.
        batch_tokens: most tokens in one forward pass (one window at least). The result does not depend on it.
        limit: use only the first tokens of the text; null: all.
        ignore: token id whose positions are not scored; it stays visible as context.
        bf16: bfloat16 autocast for the forward pass; otherwise autocast is off, whatever surrounds the call.
        progress: called as ``progress(windows done, windows in all)`` after every batch.
        rank: this process among ``world`` that score the text together, each its share of the windows. All of
            them get the result for the whole text.
        world: number of such processes; 1: this call does not communicate.

    Raises:
        UserError: a text of fewer than 2 tokens, a context below 2 or beyond the model's positions, a stride
            outside 1..context, or nothing left to score.
    """
    tokens = tokens[:limit]
    windows = _windows([model], tokens, context, stride)
    (score,) = _score([model], tokens, windows, batch_tokens, ignore, bf16, progress, rank, world)
    return _perplexity(score, overlap=stride is not None and stride < context)


def compare(
    teacher: nn.Module,
    student: nn.Module,
    tokens: Tokens,
    context: int,
    *,
    batch_tokens: int = 8192,
    limit: int | None = None,
    ignore: int | None = None,
    bf16: bool = False,
    progress: Progress | None = None,
    rank: int = 0,
    world: int = 1,
) -> Comparison:
    """KL(teacher || student) and the perplexities of both, in one pass over windows that do not overlap.

    The KL is taken at the positions that predict a scored token. Arguments and errors as in ``perplexity``; a
    UserError also where the vocabularies differ.
    """
    tokens = tokens[:limit]
    models = [teacher, student]
    windows = _windows(models, tokens, context, None)
    scores = _score(models, tokens, windows, batch_tokens, ignore, bf16, progress, rank, world)
    of_teacher, of_student, kl = (_perplexity(score, overlap=False) for score in scores)
    return Comparison(kl.nll, of_teacher, of_student)


def bits_per_byte(nll_sum: float, bytes: int) -> float:
    """Bits per byte of text: negative log-likelihood in nats over all tokens / (bytes x ln 2).

    Comparable between tokenizers, given that the same bytes are scored.

    Raises:
        UserError: no bytes.
    """
    if bytes < 1:
        raise UserError(f"bytes={bytes}: must be 1 or more")
    return nll_sum / (bytes * math.log(2))


class _Score:
    """Running means of one quantity, over tokens and over windows."""

    def __init__(self, device: torch.device, world: int) -> None:
        # Alone, a surrounding process group is none of our business: a sync would wait for the others.
        self.over_tokens = TokenMean(sync_on_compute=world > 1).to(device)
        self.over_windows = TokenMean(sync_on_compute=world > 1).to(device)

    def update(self, values: Tensor) -> None:
        """Add one window, by its values per token (targets,)."""
        self.over_tokens.update(values.double().sum(), values.numel())
        self.over_windows.update(values.double().mean(), 1)


def _perplexity(score: _Score, overlap: bool) -> Perplexity:
    (total, tokens), (window_total, windows) = score.over_tokens.totals(), score.over_windows.totals()
    if not tokens:
        raise UserError("tokens=0: every token is ignored; there is nothing to score")
    return Perplexity(total / tokens, tokens, windows, None if overlap else window_total / windows)


def _windows(models: Sequence[nn.Module], tokens: Tokens, context: int, stride: int | None) -> list[Window]:
    if np.ndim(tokens) != 1:
        raise ValueError(f"tokens have {np.ndim(tokens)} dimensions; they must be one sequence")
    for model in models:
        positions = getattr(getattr(model, "config", None), "max_position_embeddings", None)
        if positions is not None and context > positions:
            raise UserError(f"context={context}: longer than the model's {positions} positions")
    return sliding_windows(len(tokens), context, stride)


def _score(
    models: Sequence[nn.Module],
    tokens: Tokens,
    windows: Sequence[Window],
    batch_tokens: int,
    ignore: int | None,
    bf16: bool,
    progress: Progress | None,
    rank: int,
    world: int,
) -> list[_Score]:
    """Negative log-likelihood under each model and, where there are two, KL(first || second)."""
    device = next(models[-1].parameters()).device
    scores = [_Score(device, world) for _ in range(len(models) + (len(models) == 2))]
    windows = windows[rank::world]
    done = 0
    with torch.inference_mode(), _evaluating(models):
        for batch in batches(windows, batch_tokens):
            ids = read(tokens, batch).to(device)  # (windows, size)
            count = batch[0].targets
            logits = [_target_logits(model, ids, count, bf16).to(device) for model in models]
            for i in range(len(batch)):
                targets = ids[i, -count:]
                values = _token_scores([each[i] for each in logits], targets)  # (scores, targets)
                if ignore is not None:
                    values = values[:, targets != ignore]
                if values.shape[1]:
                    for score, row in zip(scores, values, strict=True):
                        score.update(row)
            done += len(batch)
            if progress is not None:
                progress(done, len(windows))
    return scores


def _token_scores(logits: Sequence[Tensor], targets: Tensor) -> Tensor:
    """Per target, negative log-likelihood under each model and, for two, their KL: (scores, targets)."""
    vocabularies = {each.shape[-1] for each in logits}
    if len(vocabularies) > 1:
        raise UserError(f"vocabulary: {' and '.join(str(each.shape[-1]) for each in logits)} tokens; must be equal")
    chunk = max(1, _CHUNK_NUMBERS // logits[0].shape[-1])
    parts = []
    for start in range(0, len(targets), chunk):
        part = slice(start, start + chunk)
        logs = [each[part].float().log_softmax(-1) for each in logits]
        rows = [-log.gather(-1, targets[part, None]).squeeze(-1) for log in logs]
        if len(logs) == 2:
            rows.append((logs[0].exp() * (logs[0] - logs[1])).sum(-1))
        parts.append(torch.stack(rows))
    return torch.cat(parts, dim=-1)


def _target_logits(model: nn.Module, ids: Tensor, targets: int, bf16: bool) -> Tensor:
    """Logits that predict the last ``targets`` tokens of each window: (windows, targets, V)."""
    device = next(model.parameters()).device
    # Under overlap most positions are context alone: spare their row of the head where the model can.
    forward = inspect.signature(model.forward).parameters
    extra: dict[str, Any] = {"logits_to_keep": targets + 1} if "logits_to_keep" in forward else {}
    # No cache: weights cast in inference mode must not survive in the cache of a surrounding autocast.
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16, cache_enabled=False):
        logits = model(input_ids=ids.to(device), use_cache=False, **extra).logits
    return logits[:, -targets - 1 : -1]


@contextmanager
def _evaluating(models: Sequence[nn.Module]) -> Iterator[None]:
    """Eval mode for all models; afterwards each of their modules has the mode that it had."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


def _exp(nll: float) -> float:
    try:
        return math.exp(nll)
    except OverflowError:
        return math.inf
