"""Losses on attention, from queries and keys: no attention map has to be returned by the model.

Fused attention kernels return no maps, so the scores are computed again here:
scores[b, h, i, j] = scaling * query[b, h, i] . key[b, h, j], where query i may see keys 0..i; of a layer with a
``window`` of w tokens, keys i - w + 1..i; or, where the student's layer has a ``causal`` that is false (an encoder's),
every key. A layer may add a ``bias`` to its scores (ALiBi), or cap them: ``softcap`` * tanh(s / ``softcap``). The
arithmetic is float32 whatever the inputs and autocast are (float64 for float64 inputs). Blocks of
queries are compared with the keys that they may see and hardly any others: about half of the square where attention
is causal, never a whole (B, H, T, T) tensor.
"""

import math
from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from kncompress.distill.gradient import full_precision, wants_gradient, with_gradients

_CACHED = 2**19
"""Scores at a time on a CPU: as many as its nearest caches hold; passes over them then take half the time."""


class QueryKey(Protocol):
    """What an attention layer compares: query (B, H, T, hd), key (B, Hkv, T, hd), and the scores' factor."""

    @property
    def query(self) -> Tensor: ...
    @property
    def key(self) -> Tensor: ...
    @property
    def scaling(self) -> float: ...


def attention_kl(student: QueryKey, teacher: QueryKey, mask: Tensor | None = None) -> Tensor:
    """KL(teacher || student) of the attention maps, in nats per query: mean over batch, heads and queries.

    A map is the softmax of a query's scores over the keys that it may see. The term of KnGPT2
    (arXiv 2110.08152). Head sizes and numbers of key heads may differ between the two.

    Args:
        student: one layer's query (B, H, T, hd), key (B, Hkv, T, hd) and scaling.
        teacher: the same of the teacher, with equal B, H and T; it never receives a gradient.
        mask: (B, T), true at real tokens: padding is no key, and its queries do not count. Null: all real.

    Raises:
        ValueError: head counts, batches, lengths or windows differ.
    """
    return _compare(student, teacher, mask, _map_kl, per_query=True)


def attention_score_mse(student: QueryKey, teacher: QueryKey, mask: Tensor | None = None) -> Tensor:
    """Mean squared error of the scaled pre-softmax scores over the visible (query, key) pairs.

    The term of KroneckerBERT (arXiv 2109.06243). Arguments and errors as in ``attention_kl``.
    """
    return _compare(student, teacher, mask, _score_mse, per_query=False)


Hide = Callable[[Tensor, float], Tensor]
"""(scores (B, H, Tq, Tk), number): the same tensor, with that number where a query may not see a key."""


def _map_kl(student: Tensor, teacher: Tensor, hide: Hide) -> tuple[Tensor, Tensor]:
    """Sum of the KL over all queries, and its gradient by the student's scores; overwrites its inputs."""
    # A finite fill: the queries of padding see nothing, get uniform maps on both sides, and so add exactly 0.
    lowest = torch.finfo(student.dtype).min
    log_q = hide(student, lowest).log_softmax(-1)
    log_p = hide(teacher, lowest).log_softmax(-1)
    # exp of numbers that leave float32's normal range takes up to a hundred times as long, and all hidden pairs would
    # be there.
    least = math.log(torch.finfo(student.dtype).tiny) + 1
    p = torch.clamp(log_p, min=least, out=teacher).exp_()
    total = torch.dot(p.flatten(), log_p.sub_(log_q).flatten())
    return total, log_q.clamp_(min=least).exp_().sub_(p)


def _score_mse(student: Tensor, teacher: Tensor, hide: Hide) -> tuple[Tensor, Tensor]:
    """Sum of the squared differences of visible pairs, and its gradient by the student's scores."""
    difference = hide(student.sub_(teacher), 0.0)
    return torch.dot(difference.flatten(), difference.flatten()), difference.mul_(2)


def _compare(
    student: QueryKey,
    teacher: QueryKey,
    mask: Tensor | None,
    divergence: Callable[[Tensor, Tensor, Hide], tuple[Tensor, Tensor]],
    per_query: bool,
) -> Tensor:
    """Mean of ``divergence`` over queries or visible pairs, as a function of the student's query and key."""
    _check(student, teacher, mask)
    wanted = wants_gradient(student.query, student.key)
    mask = None if mask is None else mask.bool()
    span = _span(student)
    with torch.no_grad(), torch.autocast(student.query.device.type, enabled=False):
        query, key = full_precision(student.query) * student.scaling, full_precision(student.key)
        query_of_teacher = full_precision(teacher.query) * teacher.scaling
        key_of_teacher = full_precision(teacher.key)
        query_gradient, key_gradient = torch.zeros_like(query), torch.zeros_like(key)
        total, count = query.new_zeros(()), query.new_zeros((), dtype=torch.int64)
        for rows, queries, keys in _blocks(query, span):
            hide, visible = _visibility(queries, keys, span, None if mask is None else mask[rows], query.device)
            part, seen = query[rows, :, queries], key[rows, :, keys]
            where = rows, queries, keys
            scores_of_teacher = _scores(query_of_teacher[rows, :, queries], key_of_teacher[rows, :, keys])
            scores_of_teacher, _ = _changed(scores_of_teacher, teacher, where)
            scores, slope = _changed(_scores(part, seen), student, where)
            value, gradient = divergence(scores, scores_of_teacher, hide)
            total += value
            if slope is not None:
                gradient *= slope
            scored = visible.any(-1) if per_query else visible
            count += scored.sum() * (part.shape[0] * part.shape[1] // visible.shape[0])
            if wanted:
                grouped = _grouped(gradient, seen.shape[1])  # (B, Hkv, groups * queries, keys)
                query_gradient[rows, :, queries] = (grouped @ seen).reshape_as(part)
                key_gradient[rows, :, keys] += grouped.mT @ _grouped(part, seen.shape[1])
        value = total / count
        if not wanted:
            return value
        gradients = [
            (query_gradient * student.scaling / count).to(student.query.dtype),
            (key_gradient / count).to(student.key.dtype),  # the scaled query has it already
        ]
    return with_gradients(value, [student.query, student.key], gradients)


def _span(side: QueryKey) -> int | None:
    """How many keys up to its own position a query may see; None where later ones too."""
    if not getattr(side, "causal", True):
        return None
    length = side.query.shape[2]
    return min(getattr(side, "window", None) or length, length)


def _blocks(query: Tensor, span: int | None) -> Iterator[tuple[slice, slice, slice]]:
    """What is compared at a time: sequences, queries, and the keys among which are all that these may see."""
    batch, heads, length, _ = query.shape
    block = max(64, length // 8)
    for start in range(0, length, block):
        stop = min(start + block, length)
        keys = slice(0, length) if span is None else slice(max(0, start - span + 1), stop)
        rows = batch
        if query.device.type == "cpu":
            rows = max(1, min(batch, _CACHED // (heads * (stop - start) * (keys.stop - keys.start))))
        for first in range(0, batch, rows):
            yield slice(first, first + rows), slice(start, stop), keys


def _visibility(
    queries: slice, keys: slice, span: int | None, mask: Tensor | None, device: torch.device
) -> tuple[Hide, Tensor]:
    """How to hide scores of these queries with these keys, and which are seen: (1 or B, 1, queries, keys)."""
    before = queries.start - keys.start
    seen = torch.ones(queries.stop - queries.start, keys.stop - keys.start, dtype=torch.bool, device=device)[None, None]
    if span is not None:
        seen = seen.tril(before).triu(before - span + 1)
    if mask is None:
        whole = span is None or span >= queries.stop
        later = ~seen[..., before:] if whole else ~seen  # all keys before the block are seen

        def hide(scores: Tensor, number: float) -> Tensor:
            if span is not None:
                scores[..., before if whole else 0 :].masked_fill_(later, number)
            return scores

        return hide, seen
    visible = seen & mask[:, None, queries, None] & mask[:, None, None, keys]
    return lambda scores, number: scores.masked_fill_(~visible, number), visible


def _scores(query: Tensor, key: Tensor) -> Tensor:
    """(B, H, Tq, hd), scaled, x (B, Hkv, Tk, hd) -> (B, H, Tq, Tk); consecutive query heads share a key head."""
    batch, heads, queries, _ = query.shape
    return (_grouped(query, key.shape[1]) @ key.mT).view(batch, heads, queries, key.shape[2])


def _changed(scores: Tensor, side: QueryKey, where: tuple[slice, slice, slice]) -> tuple[Tensor, Tensor | None]:
    """Scores (B, H, Tq, Tk) with the layer's bias and cap, and the derivative by those without where it is not 1."""
    bias, softcap = getattr(side, "bias", None), getattr(side, "softcap", None)
    if bias is not None:
        rows, queries, keys = where
        bias = bias if bias.shape[0] == 1 else bias[rows]
        scores += (bias if bias.shape[2] == 1 else bias[:, :, queries])[..., keys].to(scores)
    if softcap is None:
        return scores, None
    bent = torch.tanh(scores / softcap)
    return bent * softcap, 1 - bent.square()


def _grouped(tensor: Tensor, key_heads: int) -> Tensor:
    """(B, H, T, X) -> (B, Hkv, H / Hkv * T, X): the rows that meet the same key head, one after the other."""
    return tensor.reshape(tensor.shape[0], key_heads, -1, tensor.shape[-1])


def _check(student: QueryKey, teacher: QueryKey, mask: Tensor | None) -> None:
    for name, side in (("student", student), ("teacher", teacher)):
        heads, key_heads = side.query.shape[1], side.key.shape[1]
        if heads % key_heads:
            raise ValueError(f"{name}: {key_heads} key heads do not divide {heads} query heads")
    (batch, heads, length), other = student.query.shape[:3], teacher.query.shape[:3]
    if heads != other[1]:
        raise ValueError(f"the student has {heads} attention heads and the teacher {other[1]}; they must be equal")
    if (batch, length) != (other[0], other[2]):
        raise ValueError(
            f"the student's queries are (batch {batch}, length {length}) and the teacher's "
            f"(batch {other[0]}, length {other[2]}); they must be equal"
        )
    spans = [span for span in map(_span, (student, teacher)) if span is not None]
    if len(set(spans)) > 1:
        raise ValueError(f"the student's queries see {spans[0]} keys at most and the teacher's {spans[1]}; not equal")
    if mask is not None and mask.shape != (batch, length):
        raise ValueError(f"mask {tuple(mask.shape)} does not fit (batch {batch}, length {length})")
