"""Losses on features, logits and labels: tensors in, a scalar in float32 out.

Inputs may be bfloat16 or float16, and autocast may be on: the arithmetic is float32 all the same (float64 for
float64 inputs). The teacher is a constant: no gradient ever reaches its tensors, which may come from
``torch.inference_mode``. A mask (B, T) is true at the tokens that count; false everywhere gives nan.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kncompress.distill.gradient import full_precision, wants_gradient, with_gradients

IGNORED = -100
"""Label of a token that is not scored (PyTorch's and transformers' default)."""


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
    student: Tensor,
    teacher: Tensor,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    chunk: int | None = 1024,
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
        chunk: tokens at a time; null: all at once. Changes memory, not the result.

    Raises:
        ValueError: the shapes differ (two vocabularies, say), or temperature or chunk is not positive.
    """
    if temperature <= 0:
        raise ValueError(f"temperature={temperature}: must be greater than 0")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk={chunk}: must be 1 or more")
    student, teacher = _rows(student, teacher, mask)  # (N, V) each
    wanted = wants_gradient(student)
    with torch.no_grad():
        tokens = student.shape[0]
        total = full_precision(student.new_zeros(()))
        gradient = torch.empty_like(student) if wanted else None
        step = chunk or max(tokens, 1)
        for start in range(0, tokens, step):
            part = slice(start, start + step)
            log_q = (full_precision(student[part]) / temperature).log_softmax(-1)
            log_p = (full_precision(teacher[part]) / temperature).log_softmax(-1)
            p = log_p.exp()
            total += (p * log_p.sub_(log_q)).sum()
            if gradient is not None:
                # d/dz of T^2 KL(p || softmax(z / T)) = T (q - p), here as part of a mean over tokens.
                gradient[part] = log_q.exp_().sub_(p).mul_(temperature / tokens)
        value = total * temperature**2 / tokens
    return value if gradient is None else with_gradients(value, [student], [gradient])


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Next-token cross-entropy in nats per scored token. The SHIFT is done here.

    The logits at position t are scored against the label at t + 1, so ``labels`` is the input itself (with
    -100 where a token is not to be scored), as transformers has it. The first label and the last position's
    logits take no part.

    Args:
        logits: (B, T, V).
        labels: (B, T) token ids, or -100.

    Raises:
        ValueError: the shapes do not fit together.
    """
    if logits.dim() != 3 or labels.shape != logits.shape[:2]:
        raise ValueError(
            f"labels {tuple(labels.shape)} do not fit logits {tuple(logits.shape)}; they are (B, T) beside (B, T, V)"
        )
    # Shifting the labels rather than the logits spares a copy of (B, T, V).
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
    return F.cross_entropy(full_precision(logits).flatten(0, 1), targets.flatten(), ignore_index=IGNORED)


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
