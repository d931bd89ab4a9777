"""Running causal language models over the windows of a text, and what comes out for each token that they predict.

Log-probabilities are float32, whatever the model computes in.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from kncompress.errors import UserError
from kncompress.evaluation.windows import Tokens, Window, batches, read, sliding_windows

_CHUNK_NUMBERS = 2**24
"""Numbers in one float32 temporary of (tokens x vocabulary): 64 MiB."""
LOGITS = 2**28
"""Numbers in the logits of one forward pass at most, 1 GiB in float32: a longer window is read in pieces."""

Progress = Callable[[int, int], None]


class Scoring(TypedDict, total=False):
    """How the windows of a text are run through models: keyword arguments of ``score_windows`` and what calls it."""

    batch_tokens: int
    """Most tokens in one forward pass, one window at least. The result does not depend on it."""
    ignore: int | None
    """Token id whose positions are not scored; it stays visible as context."""
    first: int | None
    """Token id that every window begins with, in the place of its own first token (``first_token``)."""
    bf16: bool
    """bfloat16 autocast for the forward pass; otherwise autocast is off, whatever surrounds the call."""
    progress: Progress | None
    """Called as ``progress(windows done, windows in all)`` after every batch."""
    rank: int
    """This process among ``world`` that score the text together, each its share of the windows. All of them get the
    result for the whole text."""
    world: int
    """Number of such processes; 1: the call does not communicate."""


def input_device(model: nn.Module) -> torch.device:
    """Where a model takes its tokens: at its first weight, or at the first that is there, where weights are away until
    they are needed."""
    there = (parameter.device for parameter in model.parameters() if not parameter.is_meta)
    return next(there, torch.device("cpu"))


def windows_for(models: Sequence[nn.Module], tokens: Tokens, context: int, stride: int | None) -> list[Window]:
    """Windows of ``context`` tokens that all the models can read, ``stride`` apart (None: no overlap).

    Raises:
        UserError: a model has fewer positions, or as in ``sliding_windows``.
    """
    if np.ndim(tokens) != 1:
        raise ValueError(f"tokens have {np.ndim(tokens)} dimensions; they must be one sequence")
    for model in models:
        positions = getattr(getattr(model, "config", None), "max_position_embeddings", None)
        if positions is not None and context > positions:
            raise UserError(f"context={context}: longer than the model's {positions} positions")
    return sliding_windows(len(tokens), context, stride)


def score_windows(
    models: Sequence[nn.Module],
    tokens: Tokens,
    windows: Sequence[Window],
    take: Callable[[Tensor], None],
    *,
    batch_tokens: int = 8192,
    ignore: int | None = None,
    first: int | None = None,
    bf16: bool = False,
    progress: Progress | None = None,
    rank: int = 0,
    world: int = 1,
) -> None:
    """Run one model, or a teacher and a student, over the windows and hand on what each window gives.

    Args:
        models: on any devices, in any mode; each gets its mode back.
        tokens: 1-d sequence of token ids.
        windows: of ``sliding_windows``.
        take: called once for each window that scores anything, with a float32 tensor (rows, targets). The rows are the
            negative log-likelihood of each model and, of two, KL(first || second) and whether both have the same
            likeliest token (0 or 1).
        batch_tokens, ignore, first, bf16, progress, rank, world: as in ``Scoring``.

    Raises:
        UserError: the models' vocabularies differ.
    """
    device = input_device(models[-1])
    room = max(1, LOGITS // max(map(_vocabulary, models)))
    shares = [list(batches(windows[each::world], min(batch_tokens, room))) for each in range(world)]
    windows = windows[rank::world]
    done = 0
    with _no_gradients(models), _evaluating(models):
        for batch in shares[rank]:
            ids = read(tokens, batch, first).to(device)  # (windows, size)
            count = batch[0].targets
            found: list[list[Tensor]] = [[] for _ in batch]
            done_targets = 0
            for logits in zip(*(_predictions(model, ids, count, bf16, room) for model in models), strict=True):
                until = done_targets + logits[0].shape[1]
                for i in range(len(batch)):
                    targets = ids[i, ids.shape[1] - count :][done_targets:until]
                    found[i].append(_token_scores([each[i].to(device) for each in logits], targets))
                done_targets = until
            for i, parts in enumerate(found):
                targets = ids[i, -count:]
                values = torch.cat(parts, dim=-1)  # (rows, targets)
                if ignore is not None:
                    values = values[:, targets != ignore]
                if values.shape[1]:
                    take(values)
            done += len(batch)
            if progress is not None:
                progress(done, len(windows))
        if world > 1 and any(map(_in_shards, models)):
            _keep_in_step(models, shares, rank, room)


def _in_shards(model: nn.Module) -> bool:
    """Whether all processes must run a forward pass of ``model`` together."""
    return isinstance(next(model.parameters()), DTensor)


def _no_gradients(models: Sequence[nn.Module]) -> AbstractContextManager[object]:
    # Weights that are gathered in inference mode could not be trained afterwards.
    return torch.no_grad() if any(map(_in_shards, models)) else torch.inference_mode()


def _keep_in_step(models: Sequence[nn.Module], shares: Sequence[Sequence[list[Window]]], rank: int, room: int) -> None:
    """As many more forward passes, of a few tokens, as a process with a larger share makes."""
    passes = [sum(_passes(models[-1], batch, room) for batch in share) for share in shares]
    ids = torch.zeros(1, 2, dtype=torch.int64, device=input_device(models[-1]))
    for _ in range(max(passes) - passes[rank]):
        for model in models:
            model(input_ids=ids, use_cache=False)


def _token_scores(logits: Sequence[Tensor], targets: Tensor) -> Tensor:
    """The rows that ``score_windows`` hands on, (rows, targets)."""
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
            rows.append((logs[0].argmax(-1) == logs[1].argmax(-1)).float())
        parts.append(torch.stack(rows))
    return torch.cat(parts, dim=-1)


def _vocabulary(model: nn.Module) -> int:
    return getattr(getattr(model, "config", None), "vocab_size", None) or 1


def _predictions(model: nn.Module, ids: Tensor, targets: int, bf16: bool, room: int) -> Iterator[Tensor]:
    """Logits that predict the last ``targets`` tokens of each window, in order: (windows, some of them, V).

    One pass gives them all where they, and the window, are at most ``room`` positions. A longer window is read in
    pieces, which see the ones before through the model's cache.
    """
    device = input_device(model)
    ids = ids.to(device)
    spares = "logits_to_keep" in inspect.signature(model.forward).parameters
    first, end = ids.shape[1] - targets - 1, ids.shape[1] - 1

    def logits(part: Tensor, keep: int, **cache: Any) -> Any:
        # Where the model can, the head is spared positions that are context alone.
        extra: dict[str, Any] = {"logits_to_keep": keep} if spares else {}
        # No cache of casts: weights cast in inference mode must not survive in that of a surrounding autocast.
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16, cache_enabled=False):
            return model(input_ids=part, **cache, **extra)

    if _fits(model, ids.shape[0], ids.shape[1], targets, room):
        yield logits(ids, targets + 1, use_cache=False).logits[:, -targets - 1 : -1]
        return
    step = max(1, room // len(ids))
    seen = None
    for begin in range(0, end, step):
        stop = min(begin + step, end)
        wanted = stop - max(begin, first)
        found = logits(ids[:, begin:stop], max(wanted, 1), use_cache=True, past_key_values=seen)
        seen = found.past_key_values
        if wanted > 0:
            yield found.logits[:, -wanted:]


def _fits(model: nn.Module, windows: int, size: int, targets: int, room: int) -> bool:
    """Whether windows of ``size`` tokens go through the model in one pass."""
    forward = inspect.signature(model.forward).parameters
    kept = targets + 1 if "logits_to_keep" in forward else size
    return kept * windows <= room or "past_key_values" not in forward


def _passes(model: nn.Module, batch: list[Window], room: int) -> int:
    """Forward passes that ``_predictions`` makes."""
    size = batch[0].end - batch[0].begin
    if _fits(model, len(batch), size, batch[0].targets, room):
        return 1
    return -(-(size - 1) // max(1, room // len(batch)))


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
