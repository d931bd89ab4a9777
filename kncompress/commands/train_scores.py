"""What a training has come to: the metrics of ``result.json`` and the rows of the table."""

import lightning as L

from kncompress.data.tokens import TokenStream
from kncompress.evaluation import Comparison, Perplexity, bits_per_byte
from kncompress.reports.summary import ModelScores, gap_closed
from kncompress.training.preparation import Scores, TrainingJob


def conclude(job: TrainingJob, start: Scores | None, end: Scores) -> tuple[dict[str, float], dict[str, ModelScores]]:
    """The metrics of ``result.json`` and the rows of the table, from the scores before and after training."""
    metrics: dict[str, float] = job.facts | {"tokens": job.batches.tokens, "steps": job.batches.steps or 0}
    rows: dict[str, ModelScores] = {}
    if isinstance(start, Comparison) and isinstance(end, Comparison):
        rows["teacher"] = _row("teacher", metrics["parameters/teacher"], start.teacher, job)
        rows["start"] = _row("student at the start", metrics["parameters/student"], start.student, job, start)
        rows["student"] = _row("student, trained", metrics["parameters/student"], end.student, job, end)
        metrics |= {"kl/start": start.kl, "kl/student": end.kl} | end.metrics
        share = gap_closed(*rows.values())
        if share is not None:
            metrics["gap_closed"] = share
    else:
        assert isinstance(end, Perplexity)
        rows["student"] = _row("model, trained", metrics["parameters/student"], end, job)
    for name, row in rows.items():
        scores = {"perplexity": row.perplexity, "bits_per_byte": row.bits_per_byte}
        metrics |= {f"{score}/{name}": value for score, value in scores.items() if value is not None}
    return metrics, rows


def score_unseen(job: TrainingJob, trainer: L.Trainer) -> tuple[dict[str, float], list[ModelScores]]:
    """Metrics and rows of the models on ``unseen``."""
    if job.unseen is None:
        return {}, []
    stream = job.unseen
    score = job.scores(trainer, stream)
    if isinstance(score, Perplexity):
        row = _row("model, unseen text", job.facts["parameters/student"], score, job, text=stream)
        return {"unseen/perplexity/student": score.perplexity}, [row]
    metrics = {"perplexity/teacher": score.teacher.perplexity, "perplexity/student": score.student.perplexity}
    metrics |= {"kl/student": score.kl} | score.metrics
    rows = [
        _row("teacher, unseen text", job.facts["parameters/teacher"], score.teacher, job, text=stream),
        _row("student, unseen text", job.facts["parameters/student"], score.student, job, score, stream),
    ]
    return {f"unseen/{name}": value for name, value in metrics.items()}, rows


def _row(
    name: str,
    parameters: float,
    score: Perplexity,
    job: TrainingJob,
    compared: Comparison | None = None,
    text: TokenStream | None = None,
) -> ModelScores:
    bits, text = None, text or job.test
    if job.test_tokens is None or job.test_tokens >= len(text):
        # The few tokens that no window scores count as the mean of the others.
        bits = bits_per_byte(score.nll * len(text), text.text_bytes)
    kl, same_top = (None, None) if compared is None else (compared.kl, compared.same_top)
    return ModelScores(name, int(parameters), score.perplexity, kl, bits, same_top)
