"""GLUE's official metrics by torchmetrics, and the average over tasks.

Every score is a share: 0.5 is what tables show as 50. A task's score is the mean of its metrics: of Pearson and
Spearman correlation, of F1 and accuracy, of accuracy on the matched and the mismatched set. The average is the mean of
the tasks' scores, each task counted once, as on the benchmark's leaderboard. Which tasks are in it (WNLI is often left
out) has to be told along with it.
"""

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor
from torchmetrics import functional as F

NAMES = ("matthews", "accuracy", "f1", "pearson", "spearman")


def glue_scores(names: Sequence[str], predictions: Tensor, targets: Tensor, classes: int) -> dict[str, float]:
    """{metric: score} of a whole set, for ``names`` among ``NAMES``.

    Args:
        predictions: labels (N,), int64, or scores (N,).
        targets: of the same kind. Label 1 is the positive one of F1.
        classes: number of labels.

    A correlation, Matthews' too, with predictions that are all the same is 0, as the benchmark has it.
    """
    scores = {name: _score(name, predictions, targets, classes) for name in names}
    # Seven digits: the label metrics are float32.
    return {name: round(score, 7) if math.isfinite(score) else 0.0 for name, score in scores.items()}


def _score(name: str, predictions: Tensor, targets: Tensor, classes: int) -> float:
    if name not in ("accuracy", "f1") and (len(predictions.unique()) == 1 or len(targets.unique()) == 1):
        return 0.0  # torchmetrics gives nan, and for Matthews some other number
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The variance of predictions or target is close to zero")
        match name:
            case "matthews":
                found = F.matthews_corrcoef(predictions, targets, task="multiclass", num_classes=classes)
            case "accuracy":
                found = F.accuracy(predictions, targets, task="multiclass", num_classes=classes, average="micro")
            case "f1":
                found = F.f1_score(predictions, targets, task="binary")
            case "pearson":
                found = F.pearson_corrcoef(predictions.double(), targets.double())
            case "spearman":
                found = F.spearman_corrcoef(predictions.double(), targets.double())
            case _:
                raise ValueError(f"{name}: not one of {', '.join(NAMES)}")
    return float(found)


def task_score(scores: Iterable[float]) -> float:
    """A task's score: the mean of its metrics over its dev sets."""
    values = list(scores)
    return math.fsum(values) / len(values)


def glue_average(tasks: Mapping[str, float]) -> float:
    """The mean of the tasks' scores."""
    return task_score(tasks.values())
