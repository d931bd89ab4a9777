"""Distillation: losses between a student and its teacher, and the objective that weighs them."""

from kncompress.distill.attention import attention_kl, attention_score_mse
from kncompress.distill.classification import SequenceObjective
from kncompress.distill.layers import layer_mapping
from kncompress.distill.losses import cross_entropy, logits_kl, logits_kl_and_cross_entropy, mse
from kncompress.distill.objective import Loss, Objective, Outputs

__all__ = [
    "Loss",
    "Objective",
    "Outputs",
    "SequenceObjective",
    "attention_kl",
    "attention_score_mse",
    "cross_entropy",
    "layer_mapping",
    "logits_kl",
    "logits_kl_and_cross_entropy",
    "mse",
]
