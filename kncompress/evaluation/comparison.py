"""How far a student is from its teacher on a text: what people who compress models look at today.

The figures are those of llama.cpp's report (its tool ``perplexity`` with ``--kl-divergence``): the KL divergence of
the next-token distributions per token with its quantiles, how often both models have the same likeliest token, and the
logarithm of the ratio of their perplexities with its standard error.
"""

import math
from dataclasses import dataclass
from typing import Unpack

import torch
from torch import Tensor, nn
from torchmetrics import CatMetric

from kncompress.evaluation.perplexity import Perplexity, WindowMeans
from kncompress.evaluation.scoring import Scoring, input_device, score_windows, windows_for
from kncompress.evaluation.windows import Tokens


@dataclass(frozen=True)
class Comparison:
    """Teacher and student on the same windows."""

    kl: float
    """KL(teacher || student) of the next-token distributions, in nats, mean over the scored tokens."""
    kl_median: float
    kl_99: float
    """99% quantile of the KL per token."""
    kl_999: float
    """99.9% quantile of the KL per token."""
    same_top: float
    """Share of the tokens where both models have the same likeliest token, in percent."""
    log_ratio_error: float
    """Standard error of ``log_ratio``; the tokens count as independent."""
    teacher: Perplexity
    student: Perplexity

    @property
    def tokens(self) -> int:
        """Tokens scored."""
        return self.student.tokens

    @property
    def log_ratio(self) -> float:
        """Natural logarithm of (perplexity of the student / perplexity of the teacher)."""
        return self.student.nll - self.teacher.nll

    @property
    def metrics(self) -> dict[str, float]:
        """As ``result.json`` names them."""
        return {
            "compare/kl_mean": self.kl,
            "compare/kl_median": self.kl_median,
            "compare/kl_99": self.kl_99,
            "compare/kl_999": self.kl_999,
            "compare/same_top": self.same_top,
            "compare/log_ppl_ratio": self.log_ratio,
            "compare/log_ppl_ratio_error": self.log_ratio_error,
        }


ANCHORS = (("8 bits", 0.0002, 99.2), ("5 bits", 0.005, 96.5), ("3 bits", 0.1, 86.0))
"""What rounding the weights of 8B models costs: name, mean KL, same likeliest token in percent.

Published by llama.cpp; of 3 bits the middle of 0.05 to 0.16 and of 82 to 90%.
"""


def compare(
    teacher: nn.Module,
    student: nn.Module,
    tokens: Tokens,
    context: int,
    limit: int | None = None,
    **how: Unpack[Scoring],
) -> Comparison:
    """How far ``student`` is from ``teacher``, in one pass over windows that do not overlap.

    Everything is taken at the positions that predict a scored token. Arguments and errors as in ``perplexity``; a
    UserError also where the vocabularies differ.
    """
    tokens = tokens[:limit]
    models = [teacher, student]
    device, world = input_device(student), how.get("world", 1)
    means = [WindowMeans(device, world) for _ in models]
    # One column a token: KL, same likeliest token, difference of the negative log-likelihoods.
    columns = CatMetric(nan_strategy="disable", sync_on_compute=world > 1).to(device)

    def take(values: Tensor) -> None:
        of_teacher, of_student, kl, same = values
        means[0].update(of_teacher)
        means[1].update(of_student)
        columns.update(torch.stack([kl, same, of_student - of_teacher], dim=1))

    score_windows(models, tokens, windows_for(models, tokens, context, None), take, **how)
    scores = [each.perplexity() for each in means]
    kl, same, difference = columns.compute().double().cpu().T
    # torch.quantile takes no more than 2^24 values.
    ordered = kl.sort().values
    median, near, far = (float(ordered[math.ceil(share * len(kl)) - 1]) for share in (0.5, 0.99, 0.999))
    error = float(difference.std() / math.sqrt(len(kl))) if len(kl) > 1 else math.nan
    return Comparison(float(kl.mean()), median, near, far, 100 * float(same.mean()), error, *scores)
