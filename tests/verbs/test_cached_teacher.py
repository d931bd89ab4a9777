"""``train objective.cache=``: the same blocks without the teacher, in one process and in two."""

from pathlib import Path
from typing import Any

import pytest
from verbs.conftest import read

from kncompress.runs.metrics_file import complete_rows
from kncompress.training.checkpoints import read_checkpoint
from kncompress.training.distillation import Distillation


def losses(run: str) -> list[str]:
    return [row["train/logits"] for row in complete_rows(Path(run, "metrics.csv")) if row.get("train/logits")]


def test_a_second_run_reads_what_the_first_has_drawn(
    command: Any, small: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*small, "objective=logits", "objective.cache=draws", "trainer.steps=20", "samples.count=0"]
    code, _, err = command("train", *words, "run_dir=first")
    assert code == 0, err
    assert "objective.cache: 0 of " in err and "26 bytes a token" in err
    asked = []
    plain = Distillation.logits
    monkeypatch.setattr(Distillation, "logits", lambda *a: asked.append(a[1]) or plain(*a))
    code, _, err = command("train", *words, "run_dir=second")
    assert code == 0, err
    assert len(set(map(id, asked))) == 1  # the student alone
    assert losses("first") == losses("second") != []
    weights = [read_checkpoint(Path(run, "checkpoints/last.ckpt"))["state_dict"] for run in ("first", "second")]
    assert all((weights[0][name] == weights[1][name]).all() for name in weights[0])
    exact = [word for word in words if "cache" not in word]
    assert command("train", *exact, "run_dir=exact")[0] == 0
    scores = [read(Path(run), "result.json")["metrics"]["kl/student"] for run in ("first", "exact")]
    assert scores[0] == pytest.approx(scores[1], rel=0.25)
    code, _, err = command("train", *words, "objective.samples=5", "run_dir=other")
    assert code == 2 and "draws: its draws are of another samples (12, not 5)" in err and err.count("kncompress:") == 1
