"""GLUE's metrics against their definitions, scipy, and scikit-learn where it is installed."""

import math
import warnings

import numpy as np
import pytest
import torch
from scipy import stats

from kncompress.glue.scores import glue_average, glue_scores, task_score

GENERATOR = np.random.default_rng(0)
TRUTH = GENERATOR.integers(0, 2, 200)
GUESS = np.where(GENERATOR.random(200) < 0.7, TRUTH, 1 - TRUTH)
SCORES = GENERATOR.uniform(0, 5, 200).round(1)  # with ties
ESTIMATES = (SCORES + GENERATOR.normal(0, 2, 200)).clip(0, 5)


def of_labels(guess: np.ndarray, truth: np.ndarray, classes: int = 2) -> dict[str, float]:
    names = ("matthews", "accuracy", "f1") if classes == 2 else ("matthews", "accuracy")
    return glue_scores(names, torch.tensor(guess), torch.tensor(truth), classes)


def test_labels_by_the_definitions() -> None:
    tp, tn = int((GUESS & TRUTH).sum()), int(((1 - GUESS) & (1 - TRUTH)).sum())
    fp, fn = int((GUESS & (1 - TRUTH)).sum()), int(((1 - GUESS) & TRUTH).sum())
    found = of_labels(GUESS, TRUTH)
    assert found["accuracy"] == pytest.approx((tp + tn) / 200)
    assert found["f1"] == pytest.approx(2 * tp / (2 * tp + fp + fn))
    product = math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert found["matthews"] == pytest.approx((tp * tn - fp * fn) / product, abs=1e-6)


def test_labels_by_scikit_learn() -> None:
    sklearn = pytest.importorskip("sklearn.metrics")
    found = of_labels(GUESS, TRUTH)
    assert found["matthews"] == pytest.approx(sklearn.matthews_corrcoef(TRUTH, GUESS), abs=1e-6)
    assert found["f1"] == pytest.approx(sklearn.f1_score(TRUTH, GUESS), abs=1e-6)
    assert found["accuracy"] == pytest.approx(sklearn.accuracy_score(TRUTH, GUESS), abs=1e-6)


def test_three_classes() -> None:
    truth, guess = GENERATOR.integers(0, 3, (2, 100))
    assert of_labels(guess, truth, 3)["accuracy"] == pytest.approx((truth == guess).mean())


def test_scores_by_scipy() -> None:
    found = glue_scores(("pearson", "spearman"), torch.tensor(ESTIMATES), torch.tensor(SCORES), 1)
    assert found["pearson"] == pytest.approx(stats.pearsonr(ESTIMATES, SCORES).statistic, abs=1e-6)
    assert found["spearman"] == pytest.approx(stats.spearmanr(ESTIMATES, SCORES).statistic, abs=1e-6)


def test_a_model_that_always_says_the_same_scores_0() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same = glue_scores(("pearson", "spearman"), torch.full((200,), 2.5), torch.tensor(SCORES, dtype=torch.float), 1)
        assert same == {"pearson": 0.0, "spearman": 0.0}
        assert of_labels(np.zeros(200, dtype=int), TRUTH)["matthews"] == 0.0


def test_averages() -> None:
    """MRPC 80 / 90 and CoLA 40: (85 + 40) / 2, not the mean of three metrics."""
    assert glue_average({"mrpc": task_score([0.8, 0.9]), "cola": task_score([0.4])}) == pytest.approx(0.625)


def test_an_unknown_metric() -> None:
    with pytest.raises(ValueError, match="bleu: not one of matthews"):
        glue_scores(("bleu",), torch.tensor([0, 1]), torch.tensor([0, 1]), 2)
