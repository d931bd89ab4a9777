"""Distillation from tokens that were drawn from the teacher once, in the place of its logits.

KL(p || q) = E_p[-log q] - H(p): the mean over K tokens drawn from p is an unbiased estimate of the first part, and its
gradient one of the KL's (random sampling knowledge distillation, arXiv 2503.16870). The K most likely tokens are none:
they leave out what the teacher thinks of all others.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kncompress.distill.gradient import full_precision, wants_gradient, with_gradients
from kncompress.distill.losses import tokens_at_once


class Draws(NamedTuple):
    """What is kept of a teacher's next-token distributions."""

    tokens: Tensor
    """(B, T, K) ids drawn from softmax(logits / temperature), with repetition."""
    entropy: Tensor
    """(B, T) of those distributions, nats."""


def draw(logits: Tensor, count: int, temperature: float, generator: torch.Generator) -> Draws:
    """Draw ``count`` tokens from each distribution.

    Args:
        logits: (B, T, V) of the teacher.
        generator: on the device of ``logits``.
    """
    log_p = (full_precision(logits) / temperature).log_softmax(-1)
    p = log_p.exp()
    tokens = torch.multinomial(p.flatten(0, 1), count, replacement=True, generator=generator)
    return Draws(tokens.unflatten(0, logits.shape[:2]), -(p * log_p).sum(-1))


def sampled_kl(student: Tensor, draws: Draws, temperature: float = 1.0) -> Tensor:
    """``logits_kl``, estimated: the same in the mean over all draws, value and gradient.

    Args:
        student: (B, T, V) logits.
        draws: made with the same temperature.

    Raises:
        ValueError: the draws are of other tokens than the logits.
    """
    if draws.entropy.shape != student.shape[:2] or draws.tokens.shape[:2] != student.shape[:2]:
        raise ValueError(f"draws {tuple(draws.tokens.shape)} do not fit logits {tuple(student.shape)}")
    logits, ids = student.flatten(0, 1), draws.tokens.flatten(0, 1)
    rows, vocabulary = logits.shape
    step = tokens_at_once("auto", rows, vocabulary, student.device)
    share, wanted = 1.0 / ids.shape[1], wants_gradient(student)
    with torch.no_grad(), torch.autocast(student.device.type, enabled=False):
        total = -full_precision(draws.entropy).sum()
        gradient = torch.empty_like(logits) if wanted else None
        for start in range(0, rows, step):
            part = slice(start, start + step)
            log_q = (full_precision(logits[part]) / temperature).log_softmax(-1)
            total = total - log_q.gather(1, ids[part]).sum() * share
            if gradient is not None:
                q = log_q.exp_()
                q.scatter_add_(1, ids[part], torch.full_like(ids[part], -share, dtype=q.dtype))
                gradient[part] = q.mul_(temperature / rows)
        value = total * (temperature**2 / rows)
    return value if gradient is None else with_gradients(value, [student], [gradient.view_as(student)])
