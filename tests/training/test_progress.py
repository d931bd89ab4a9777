"""What a person sees: lines in a log, a live bar on a terminal."""

import io
import logging
import re

import pytest

from kncompress.training import progress
from kncompress.training.progress import TrainingProgress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def no_complaint_of_a_closed_handler(monkeypatch):
    """A handler may hold the stderr of a test before, closed by now: its complaint would land in the live bar."""
    monkeypatch.setattr(logging, "raiseExceptions", False)


def run(fit, task, steps, stream=None, validate_every=None, **settings):
    stream = io.StringIO() if stream is None else stream
    callback = TrainingProgress(stream=stream, **settings.pop("progress", {}))
    callbacks = [callback, *settings.pop("callbacks", [])]
    fit(task, steps, validate_every, callbacks=callbacks, enable_progress_bar=True, **settings)
    return stream.getvalue()


def steps_in(text):
    return [int(step) for step in re.findall(r"^step (\d+)/\d+ \(\d+%\)  loss", text, re.MULTILINE)]


def test_plain_line_reads_as_promised(fit, linear_task):
    text = run(fit, linear_task(), 10, progress={"loss_is_cross_entropy": True})
    first = text.splitlines()[0]
    assert re.fullmatch(r"step 1/10 \(10%\)  loss 16  ppl 8,886,111  1234 tokens/s  eta \d:\d\d", first)


def test_about_every_twentieth_gets_one_line_and_the_last_step_is_there(fit, linear_task):
    assert steps_in(run(fit, linear_task(), 90)) == [*range(5, 90, 5), 90]
    assert steps_in(run(fit, linear_task(), 43)) == [*range(3, 43, 3), 43]


def test_slow_steps_get_a_line_by_time(fit, linear_task, monkeypatch):
    monkeypatch.setattr(progress, "SHARE", 2.0)
    monkeypatch.setattr(progress, "SECONDS", 0.0)
    assert steps_in(run(fit, linear_task(), 5)) == [1, 2, 3, 4, 5]


def test_micro_batches_make_no_lines_of_their_own(fit, linear_task, monkeypatch):
    monkeypatch.setattr(progress, "SECONDS", 0.0)
    assert steps_in(run(fit, linear_task(), 10, accumulate_grad_batches=4)) == list(range(1, 11))


def test_number_of_steps_is_found_from_epochs_too(fit, linear_task):
    from lightning.pytorch import Trainer
    from torch import ones
    from torch.utils.data import DataLoader, TensorDataset

    stream = io.StringIO()
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        callbacks=[TrainingProgress(stream=stream)],
    )
    data = DataLoader(TensorDataset(ones(4, 4)))
    trainer.fit(linear_task(), data, data)
    assert steps_in(stream.getvalue()) == list(range(1, 9))
    assert "step 8/8 (100%)" in stream.getvalue()


def test_each_validation_has_one_line_and_the_best_is_named(fit, linear_task):
    text = run(fit, linear_task(validation=[2.0, 3.0, 1.0]), 30, validate_every=10)
    assert [line for line in text.splitlines() if "validation" in line] == [
        "step 10/30 (33%)  validation loss 2  (best)",
        "step 20/30 (67%)  validation loss 3",
        "step 30/30 (100%)  validation loss 1  (best)",
    ]


def test_perplexity_is_not_read_from_a_loss_that_means_something_else(fit, linear_task):
    assert "ppl" not in run(fit, linear_task(), 5)

    task = linear_task()
    step = task.training_step

    def with_cross_entropy(batch, batch_idx):
        task.log("train/cross_entropy", 2.0)
        return step(batch, batch_idx)

    task.training_step = with_cross_entropy
    assert "ppl 7.39" in run(fit, task, 5, progress={"loss_is_cross_entropy": True})


def test_resume_counts_from_its_own_start(tmp_path, fit, linear_task):
    from kncompress.training.checkpoints import checkpoint_callbacks

    fit(linear_task(validation=[1.0]), 5, 5, callbacks=list(checkpoint_callbacks(tmp_path)))
    last = tmp_path / "checkpoints/last.ckpt"
    text = run(fit, linear_task(), 10, ckpt_path=last, callbacks=list(checkpoint_callbacks(tmp_path)))
    assert steps_in(text) == [6, 7, 8, 9, 10]


def test_terminal_gets_one_live_bar_with_the_same_figures(fit, linear_task):
    text = run(fit, linear_task(validation=[2.0]), 10, Terminal(), validate_every=10)
    assert "\x1b[" in text  # drawn in place
    assert "step 10/10 (100%)" in text and "1234 tokens/s" in text
    assert text.count("validation loss 2") == 1
    assert text.count("\n") <= 4  # a line for the validation, one for the bar, not one a step


def test_error_gives_the_terminal_back(fit, linear_task):
    stream, task = Terminal(), linear_task()
    task.on_train_batch_end = lambda *_: 1 / 0
    with pytest.raises(ZeroDivisionError):
        run(fit, task, 10, stream)
    text = stream.getvalue()
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1  # cursor hidden, cursor back
