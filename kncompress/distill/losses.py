"""Losses on features, logits and labels: tensors in, a scalar in float32 out.

Inputs may be bfloat16 or float16, and autocast may be on: the arithmetic is float32 all the same (float64 for float64
inputs). Gradients of logits are rounded to the inputs' type before the upstream gradient scales them. In float16 the
smallest ones become 0, and no loss scale can prevent that. The teacher is a constant: no gradient ever reaches its
tensors, which may come from ``torch.inference_mode``. A mask (B, T) is true at the tokens that count; false
everywhere gives nan.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kncompress.distill.gradient import full_precision, wants_gradient, with_gradients

IGNORED = -100
"""Label of a token that is not scored (PyTorch's and transformers' default)."""

Chunk = int | Literal["auto"] | None
_NUMBERS = {"cpu": 2**18, "cuda": 2**26}
"""Numbers of a temporary at a time. On CPUs it fits in the cache: the five passes took 4 ns a number with a megabyte
and 9 ns with 200 megabytes. On GPUs it is large, so that the time of the calls does not count."""


def mse(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared error over all features and all unmasked tokens.

    Args:
        student: (B, T, D).
        teacher: (B, T, D).
        mask: (B, T), true at the tokens that count; null: all.

    Raises:
        ValueError: the shapes differ.
    """
    student, teacher = _rows(student, teacher, mask)
    # mse_loss would keep the teacher for the backward pass, which tensors of inference mode forbid.
    return (full_precision(student) - full_precision(teacher)).square().mean()


def logits_kl(
    student: Tensor, teacher: Tensor, temperature: float = 1.0, mask: Tensor | None = None, chunk: Chunk = "auto"
) -> Tensor:
    """KL(teacher || student) of softmax(logits / temperature), times temperature squared, in nats per token.

    The factor keeps the size of the gradients when the temperature changes (Hinton, Vinyals & Dean 2015,
    arXiv 1503.02531, section 2). Works through ``chunk`` tokens at a time, so that a float32 temporary takes
    chunk x V numbers; only the gradient, in the student's type, has the size of the logits.

    Args:
        student: (B, T, V) logits.
        teacher: (B, T, V) logits.
        temperature: greater than 0.
        mask: (B, T), true at the positions whose prediction counts; null: all.
        chunk: tokens at a time; ``auto``: by V and device; null: all at once. Changes memory and time, not the result.

    Raises:
        ValueError: the shapes differ (two vocabularies, say), or temperature or chunk is not positive.
    """
    student, teacher = _rows(student, teacher, mask)  # (N, V) each
    kl, _, gradient = _over_vocabulary(student, teacher, None, (1.0, 0.0), temperature, chunk)
    return kl if gradient is None else with_gradients(kl, [student], [gradient])


def cross_entropy(logits: Tensor, labels: Tensor, chunk: Chunk = "auto") -> Tensor:
    """Next-token cross-entropy in nats per scored token. The SHIFT is done here.

    The logits at position t are scored against the label at t + 1, so ``labels`` is the input itself (with
    -100 where a token is not to be scored), as transformers has it. The first label and the last position's
    logits take no part.

    Args:
        logits: (B, T, V).
        labels: (B, T) token ids, or -100.
        chunk: see ``logits_kl``.

    Raises:
        ValueError: the shapes do not fit together.
    """
    targets = _targets(logits, labels)
    flat = logits.flatten(0, 1)
    _, text, gradient = _over_vocabulary(flat, None, targets, (0.0, 1.0), 1.0, chunk)
    return text if gradient is None else with_gradients(text, [flat], [gradient])


def logits_kl_and_cross_entropy(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    weights: tuple[float, float],
    temperature: float = 1.0,
    chunk: Chunk = "auto",
    overwrite: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """(weighted sum, ``logits_kl``, ``cross_entropy``) in one walk through the logits; the sum alone has a graph.

    The student's softmax is computed once for both (at temperature 1), and there is one gradient of the size of the
    logits instead of two; with ``overwrite`` it takes the place of the teacher's logits, which are lost, where types
    agree. Other arguments and errors as in the two.
    """
    targets = _targets(student, labels)
    student, teacher = _rows(student, teacher, None)
    kl, text, gradient = _over_vocabulary(student, teacher, targets, weights, temperature, chunk, overwrite)
    total = weights[0] * kl + weights[1] * text
    return total if gradient is None else with_gradients(total, [student], [gradient]), kl, text


def _targets(logits: Tensor, labels: Tensor) -> Tensor:
    """(B T), the label that each position is to predict: shifting labels, not logits, spares a copy of (B, T, V)."""
    if logits.dim() != 3 or labels.shape != logits.shape[:2]:
        raise ValueError(
            f"labels {tuple(labels.shape)} do not fit logits {tuple(logits.shape)}; they are (B, T) beside (B, T, V)"
        )
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED).flatten()


def _over_vocabulary(
    student: Tensor,
    teacher: Tensor | None,
    targets: Tensor | None,
    weights: tuple[float, float],
    temperature: float,
    chunk: Chunk,
    overwrite: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(KL, cross-entropy, gradient of their weighted sum by ``student``); 0 for a term without teacher or targets.

    Per token, with p of the teacher, q of the student and t the temperature: d/dz of t^2 KL(p || softmax(z / t)) is
    t (q - p), and of the cross-entropy q - 1 at the label.
    """
    if temperature <= 0:
        raise ValueError(f"temperature={temperature}: must be greater than 0")
    tokens, vocabulary = student.shape
    step = tokens_at_once(chunk, tokens, vocabulary, student.device)
    wanted = wants_gradient(student)
    with torch.no_grad(), torch.autocast(student.device.type, enabled=False):
        kl, text = (full_precision(student.new_zeros(())) for _ in range(2))
        gradient = None
        if wanted:
            # A chunk of the teacher is read before the gradient is written there.
            lent = teacher if overwrite and teacher is not None and teacher.dtype == student.dtype else None
            gradient = torch.empty_like(student) if lent is None or lent.is_inference() else lent
        scored = torch.ones_like(kl) if targets is None else (targets != IGNORED).sum().to(kl.dtype)
        for start in range(0, tokens, step):
            part = slice(start, start + step)
            z = full_precision(student[part])
            moves: list[Tensor] = []
            log_q = z.log_softmax(-1) if targets is not None or temperature == 1 else z
            if targets is not None:
                labels = targets[part, None]
                counts = (labels != IGNORED).to(z.dtype)
                labels = labels.clamp(min=0)
                # Where nothing is scored the number at label 0 may be infinite.
                text -= log_q.gather(1, labels).masked_fill_(counts == 0, 0).sum()
                share = counts * (weights[1] / scored)
            if teacher is not None:
                log_q_warm = log_q if temperature == 1 else (z / temperature).log_softmax(-1)
                z = full_precision(teacher[part])
                log_p = (z if temperature == 1 else z / temperature).log_softmax(-1)
                p = log_p.exp()
                kl += torch.dot(p.flatten(), log_p.sub_(log_q_warm).flatten())
                scale = weights[0] * temperature / tokens
                if wanted and log_q_warm is not log_q:
                    moves.append(log_q_warm.exp_().sub_(p).mul_(scale))
            if gradient is None:
                continue
            if targets is not None or temperature == 1:
                own = log_q.exp_()
                if targets is None:  # exactly 0 where both agree
                    own.sub_(p).mul_(scale)
                elif teacher is not None and temperature == 1:
                    own.mul_(share + scale).sub_(p, alpha=scale)
                else:
                    own.mul_(share)
                if targets is not None:
                    own.scatter_add_(1, labels, -share)
                moves.append(own)
            gradient[part] = moves[0] if len(moves) == 1 else moves[0].add_(moves[1])
        return kl * temperature**2 / tokens, text / scored, gradient


def tokens_at_once(chunk: Chunk, tokens: int, vocabulary: int, device: torch.device) -> int:
    """Rows of a chunk: on a CPU as many as its nearest caches hold, elsewhere enough to fill the device."""
    if chunk is None:
        return max(tokens, 1)
    if chunk == "auto":
        return max(1, _NUMBERS.get(device.type, _NUMBERS["cuda"]) // max(vocabulary, 1))
    if chunk < 1:
        raise ValueError(f"chunk={chunk}: must be 1 or more")
    return chunk


def _rows(student: Tensor, teacher: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Both tensors as (tokens, features), unmasked tokens only, the teacher cut off from its graph."""
    if student.shape != teacher.shape:
        raise ValueError(f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} differ in shape")
    if mask is not None and mask.shape != student.shape[:-1]:
        raise ValueError(f"mask {tuple(mask.shape)} does not fit tensors {tuple(student.shape)}")
    student, teacher = student.flatten(0, -2), teacher.detach().flatten(0, -2)
    if mask is None:
        return student, teacher
    kept = mask.flatten().bool()
    return student[kept], teacher[kept]
