"""The objective of fine-tuning: inner terms as in pre-training; logits and labels are those of whole sequences."""

import torch.nn.functional as F
from torch import Tensor

from kncompress.config import ObjectiveConfig
from kncompress.distill.gradient import full_precision
from kncompress.distill.losses import logits_kl
from kncompress.distill.objective import Objective


class SequenceObjective(Objective):
    """``Objective`` with logits (B, C) of C classes, or (B, 1) of a score, and labels (B,).

    ``cross_entropy`` is the loss on the labels: cross-entropy in nats per sequence, or the squared error of a score.
    ``logits`` is KL(teacher || student) of the classes, times temperature squared, or the squared difference of the
    scores. The terms on the insides are means over the real tokens of the batch.

    Args:
        config: weights; see ``Objective``.
        layers: see ``Objective``.
        regression: the label is a score.
    """

    walks_once = False

    def __init__(
        self, config: ObjectiveConfig, layers: tuple[int, ...] | None = None, regression: bool = False
    ) -> None:
        super().__init__(config, layers)
        self.regression = regression

    def _on_labels(self, logits: Tensor, labels: Tensor) -> Tensor:
        logits = full_precision(logits)
        if logits.dim() != 2 or labels.shape != logits.shape[:1]:
            raise ValueError(f"labels {tuple(labels.shape)} do not fit logits {tuple(logits.shape)}")
        if self.regression:
            return (logits[:, 0] - labels).square().mean()
        return F.cross_entropy(logits, labels)

    def _on_logits(self, student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
        if student.shape != teacher.shape:
            raise ValueError(f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} differ in shape")
        if self.regression:
            return (full_precision(student) - full_precision(teacher.detach())).square().mean()
        # One position a sequence; the mask is that of tokens.
        return logits_kl(student[:, None], teacher[:, None], self.config.temperature)
