"""last.ckpt and best.ckpt: when they are written, that they resume a run exactly, that they are whole."""

import math
import pickle

import pytest
import torch

from kncompress.errors import UserError
from kncompress.training.checkpoints import _PARTS, BestCheckpoint, WholeFileCheckpointIO, checkpoint_callbacks
from kncompress.training.divergence import DivergedError, NonFiniteLoss


def options(folder, every=None):
    return {"callbacks": list(checkpoint_callbacks(folder, every)), "plugins": [WholeFileCheckpointIO()]}


def step_of(path):
    return torch.load(path, weights_only=True)["global_step"]


def test_last_is_renewed_where_validation_got_worse(tmp_path, fit, linear_task):
    fit(linear_task(validation=[1.0, 2.0, 3.0]), 6, 2, **options(tmp_path))
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]
    assert step_of(tmp_path / "checkpoints/best.ckpt") == 2
    assert step_of(tmp_path / "checkpoints/last.ckpt") == 6


def test_best_is_the_lowest_finite_validation_loss(tmp_path, fit, linear_task):
    values = [float("nan"), 3.0, 1.5, float("-inf"), 2.0]
    fit(linear_task(validation=values), 10, 2, **options(tmp_path))
    assert step_of(tmp_path / "checkpoints/best.ckpt") == 6


def test_last_is_saved_every_so_many_steps_and_at_the_end(tmp_path, fit, linear_task):
    folder = tmp_path / "checkpoints"
    seen = []
    task = linear_task()
    task.on_train_batch_start = lambda *_: seen.append(step_of(folder / "last.ckpt") if folder.exists() else 0)
    fit(task, 7, **options(tmp_path, every=3))
    assert seen == [0, 0, 0, 3, 3, 3, 6]
    assert step_of(folder / "last.ckpt") == 7


@pytest.mark.parametrize("every", [None, 2, 4], ids=["with validation", "between", "at the same steps"])
def test_resumed_run_equals_an_uninterrupted_one(tmp_path, fit, linear_task, every):
    whole = linear_task()
    fit(whole, 12, 4, **options(tmp_path / "whole", every))
    first = linear_task()
    fit(first, 8, 4, **options(tmp_path / "parts", every))
    second = linear_task()
    last = tmp_path / "parts/checkpoints/last.ckpt"
    trainer = fit(second, 12, 4, ckpt_path=last, **options(tmp_path / "parts", every))
    assert trainer.global_step == 12
    assert torch.equal(whole.map.weight, second.map.weight)
    assert first.validated_at + second.validated_at == whole.validated_at == [4, 8, 12]


def test_checkpoint_after_a_validation_knows_its_result(tmp_path, fit, linear_task):
    fit(linear_task(validation=[2.0, 1.0]), 4, 2, **options(tmp_path, every=2))
    state = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)
    best = next(value for key, value in state["callbacks"].items() if key.startswith("BestCheckpoint"))
    assert best["best_model_score"] == 1.0


def test_moved_run_folder_keeps_its_best_score(tmp_path, fit, linear_task):
    fit(linear_task(validation=[1.0, 2.0]), 4, 2, **options(tmp_path / "old"))
    (tmp_path / "old").rename(tmp_path / "new")
    callbacks = options(tmp_path / "new")
    last = tmp_path / "new/checkpoints/last.ckpt"
    fit(linear_task(validation=[1.5]), 6, 2, ckpt_path=last, **callbacks)
    best = callbacks["callbacks"][0]
    assert isinstance(best, BestCheckpoint)
    assert best.best_model_path == str((tmp_path / "new/checkpoints/best.ckpt").resolve())
    assert step_of(tmp_path / "new/checkpoints/best.ckpt") == 2  # 1.5 did not beat 1.0
    assert step_of(last) == 6


def test_save_that_breaks_off_leaves_the_old_file(tmp_path):
    writer, path = WholeFileCheckpointIO(), tmp_path / "last.ckpt"
    whole = {"global_step": 1} | {part: [] for part in _PARTS}
    writer.save_checkpoint(whole, path)
    with pytest.raises((AttributeError, pickle.PicklingError, TypeError)):
        writer.save_checkpoint({"weights": torch.ones(10), "bad": lambda: None}, path)
    assert writer.load_checkpoint(path) == whole
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


def test_nothing_is_unpickled(tmp_path):
    path = tmp_path / "last.ckpt"
    torch.save({"hyper_parameters": NonFiniteLoss()}, path)
    with pytest.raises(UserError, match="not tensors and plain values alone"):
        WholeFileCheckpointIO().load_checkpoint(path, weights_only=False)


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_divergence_stops_before_weights_or_checkpoints_are_harmed(tmp_path, fit, linear_task, kind):
    reference = linear_task()
    fit(reference, 5)
    task, settings = linear_task(poison={5: kind}), options(tmp_path, every=2)
    settings["callbacks"].append(NonFiniteLoss())
    with pytest.raises(DivergedError, match=f"the {kind} of step 6 is not finite") as caught:
        fit(task, 10, **settings)
    assert caught.value.step == 6
    assert torch.equal(task.map.weight, reference.map.weight)
    state = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)
    assert state["global_step"] == 4
    assert all(tensor.isfinite().all() for tensor in state["state_dict"].values())


def test_divergence_in_a_micro_batch_is_found(tmp_path, fit, linear_task):
    task = linear_task()
    plain = task.training_step
    task.training_step = lambda batch, batch_idx: plain(batch, batch_idx) * (math.inf if batch_idx == 5 else 1)
    with pytest.raises(DivergedError) as caught:
        fit(task, 10, callbacks=[NonFiniteLoss()], accumulate_grad_batches=4)
    assert caught.value.step == 2  # batches 4 to 7 make the second step
