"""The distillation task: what it trains, what it leaves alone, what its checkpoints hold."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader, Dataset
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from kncompress.anatomy.activations import fuse_gelu_
from kncompress.compression.student_plan import StudentPlan
from kncompress.config import FactorConfig, FactorsConfig, ObjectiveConfig, OptimizerConfig
from kncompress.distill import Outputs
from kncompress.errors import UserError
from kncompress.training.distillation import switch_off_dropout
from kncompress.training.pretraining import ILKDPretraining
from kncompress.training.student import make_student

ALL_TERMS = ObjectiveConfig(embedding=1, attention=1, hidden=1, feed_forward=1, logits=1, cross_entropy=1)
FACTORS = FactorsConfig(layers="odd", embedding=FactorConfig(), mlp=FactorConfig(right=[2, 1]))


class Ids(Dataset[dict[str, torch.Tensor]]):
    """Fixed random blocks."""

    def __init__(self, blocks: int = 64) -> None:
        self.ids = torch.randint(0, 64, (blocks, 16), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


@pytest.fixture
def teacher() -> Any:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=64,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=16,
        bos_token_id=0,
        eos_token_id=0,
        initializer_range=0.3,
    )
    return GPT2LMHeadModel(config).eval()


def train(module: ILKDPretraining, steps: int, folder: Path, **options: Any) -> L.Trainer:
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
        check_val_every_n_epoch=None,
        default_root_dir=folder,
        **options,
    )
    trainer.fit(module, DataLoader(Ids(), batch_size=4), DataLoader(Ids(8), batch_size=4))
    return trainer


class TestTraining:
    def test_every_term_is_logged_and_the_loss_falls(self, teacher: Any, tmp_path: Path) -> None:
        student, *_ = make_student(teacher, StudentPlan.of(FACTORS, teacher.config), "random")
        module = ILKDPretraining(student, teacher, ALL_TERMS, OptimizerConfig(lr=1e-2), steps=30)
        before = copy.deepcopy(student.state_dict())
        first = train(module, 1, tmp_path).callback_metrics["train/loss"]
        metrics = train(module, 30, tmp_path).callback_metrics
        assert {f"train/{name}" for name in ObjectiveConfig.TERMS} <= metrics.keys()
        assert all(metrics[f"train/{name}"] > 0 for name in ObjectiveConfig.TERMS)
        assert metrics["train/loss"] < 0.8 * first
        assert metrics["validation/perplexity"] == pytest.approx(float(metrics["validation/loss"].exp()))
        changed = [k for k, v in student.state_dict().items() if not torch.equal(v, before[k])]
        assert any(k.endswith(".left") for k in changed) and any(k.endswith(".right") for k in changed)

    @pytest.mark.parametrize("tied", [True, False])
    def test_a_llama_learns_every_term_from_a_deeper_one(self, tied: bool, tmp_path: Path) -> None:
        """Grouped queries, SwiGLU, the layers of the student chosen from the teacher's."""
        config = LlamaConfig(
            vocab_size=64,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=16,
            tie_word_embeddings=tied,
            attention_dropout=0.5,
            initializer_range=0.3,
        )
        teacher = LlamaForCausalLM(config).eval()
        factors = dataclasses.replace(FACTORS, depth=[1, 2], qkv=FactorConfig(right=[2, 1]))
        if not tied:
            factors.maps = {"head": "32x16(x)2x1"}
        student, table = make_student(teacher, StudentPlan.of(factors, teacher.config), "nearest")
        layers = table.layers
        module = ILKDPretraining(student, teacher, ALL_TERMS, OptimizerConfig(lr=1e-2), steps=30, layers=layers)
        assert module.objective.layers == (1, 2)
        before = copy.deepcopy(student.state_dict())
        first = train(module, 1, tmp_path).callback_metrics["train/loss"]
        changed = {k for k, v in student.state_dict().items() if not torch.equal(v, before[k])}
        assert changed == set(before)
        metrics = train(module, 30, tmp_path).callback_metrics
        assert all(metrics[f"train/{name}"] > 0 for name in ObjectiveConfig.TERMS)
        assert metrics["train/loss"] < 0.9 * first
        assert {layer.self_attn.attention_dropout for layer in student.model.layers} == {0.0}

    def test_the_teacher_stays_as_it_was(self, teacher: Any, tmp_path: Path) -> None:
        before = copy.deepcopy(teacher.state_dict())
        student, *_ = make_student(teacher, StudentPlan.of(FACTORS, teacher.config), "nearest")
        module = ILKDPretraining(student, teacher, ALL_TERMS, OptimizerConfig(), steps=3)
        train(module, 3, tmp_path)
        assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
        module.train()
        assert module.student.training and not any(m.training for m in teacher.modules())
        assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())

    def test_validation_is_the_cross_entropy_over_all_blocks(self, teacher: Any, tmp_path: Path) -> None:
        student, *_ = make_student(teacher, StudentPlan.of(FactorsConfig(), teacher.config), "nearest")
        module = ILKDPretraining(student, None, ObjectiveConfig(), OptimizerConfig(lr=1e-12), steps=1)
        loss = train(module, 1, tmp_path, val_check_interval=1).callback_metrics["validation/loss"]
        with torch.no_grad():
            expected = teacher(input_ids=Ids(8).ids, labels=Ids(8).ids).loss
        assert float(loss) == pytest.approx(float(expected), rel=1e-4)

    def test_tokens_are_counted(self, teacher: Any, tmp_path: Path) -> None:
        module = ILKDPretraining(copy.deepcopy(teacher), None, ObjectiveConfig(), OptimizerConfig(), steps=3)
        trainer = train(module, 3, tmp_path, accumulate_grad_batches=2)
        assert module.tokens_seen == 3 * 2 * 4 * 16
        assert trainer.callback_metrics["train/tokens_per_second"] > 0

    @pytest.mark.parametrize("name", ["adamw", "muon"])
    def test_checkpoints_lack_the_teacher_and_restore_the_rest(self, teacher: Any, tmp_path: Path, name: str) -> None:
        def module() -> ILKDPretraining:
            student, *_ = make_student(teacher, StudentPlan.of(FACTORS, teacher.config), "nearest")
            return ILKDPretraining(student, teacher, ALL_TERMS, OptimizerConfig(name=name), steps=4)

        straight = module()
        train(straight, 2, tmp_path).save_checkpoint(tmp_path / "half.ckpt")
        straight.close()
        saved = torch.load(tmp_path / "half.ckpt", weights_only=True)
        assert not any(key.startswith("teacher.") for key in saved["state_dict"])
        assert saved["tokens_seen"] == 2 * 4 * 16

        resumed = module()
        resumed.load_state_dict(saved["state_dict"])
        resumed.on_load_checkpoint(saved)
        assert resumed.tokens_seen == straight.tokens_seen
        for key, value in straight.student.state_dict().items():
            assert torch.equal(value, resumed.student.state_dict()[key])
        first, second = (m.configure_optimizers()["optimizer"] for m in (straight, resumed))
        for optimizer in (first, second):
            # Loading shares tensors with what is loaded: one copy each.
            optimizer.load_state_dict(copy.deepcopy(saved["optimizer_states"][0]))
        for m, optimizer in ((straight, first), (resumed, second)):
            torch.manual_seed(1)
            m.student.zero_grad()
            m.student(input_ids=Ids().ids[:2], labels=Ids().ids[:2]).loss.backward()
            optimizer.step()
        for key, value in straight.student.state_dict().items():
            assert torch.equal(value, resumed.student.state_dict()[key]), key


@pytest.mark.parametrize("dropout", [False, True])
def test_layers_that_are_computed_again_give_the_same_gradients(teacher: Any, dropout: bool) -> None:
    """And leave no records of their second computation, nor a changed forward pass."""
    ids, gradients, kept = Ids().ids[:4], [], []
    for recompute in (False, True):
        student = copy.deepcopy(teacher).requires_grad_(True)
        module = ILKDPretraining(
            student, teacher, ALL_TERMS, OptimizerConfig(), 1, dropout, recompute=recompute
        ).train()
        seen: list[int] = []
        for layer in student.transformer.h:
            layer.mlp.c_fc.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        held: list[int] = []
        torch.manual_seed(0)
        with torch.autograd.graph.saved_tensors_hooks(lambda t, held=held: held.append(t.numel()) or t, lambda t: t):
            loss = module.objective(*module.outputs(input_ids=ids), ids).total
        module.forget()
        loss.backward()
        assert len(seen) == (4 if recompute else 2)
        assert not module.student_taps.records.attention and not module.student_taps.records.feed_forward
        gradients.append([parameter.grad for parameter in student.parameters()])
        kept.append(sum(held))
        module.close()
        assert not any("forward" in vars(layer) for layer in student.transformer.h)
    assert all(torch.equal(one, two) for one, two in zip(*gradients, strict=True))
    assert kept[1] < 0.6 * kept[0]


def test_a_checkpoint_that_lacks_student_weights_is_refused(teacher: Any) -> None:
    module = ILKDPretraining(copy.deepcopy(teacher), teacher, ALL_TERMS, OptimizerConfig(), steps=1)
    state = {k: v for k, v in module.state_dict().items() if not k.startswith("teacher.")}
    module.load_state_dict(dict(state))
    state.pop("student.transformer.wpe.weight")
    with pytest.raises(UserError, match=r"the checkpoint lacks student\.transformer\.wpe\.weight"):
        module.load_state_dict(state)


def test_distillation_without_a_teacher_is_refused(teacher: Any) -> None:
    with pytest.raises(ValueError, match="there is none"):
        ILKDPretraining(teacher, None, ALL_TERMS, OptimizerConfig(), steps=1)


def test_the_layers_kept_are_the_layers_learnt_from(teacher: Any) -> None:
    """At the start a student of the teacher's layers has nothing to learn from those that come first."""
    plan = StudentPlan.of(FactorsConfig(depth=[0]), teacher.config)
    student, _ = make_student(teacher, plan, "nearest")
    objective = ObjectiveConfig(hidden=1, feed_forward=1, cross_entropy=0)
    ids = Ids().ids[:2]
    for given, far in ((plan.layers, False), (None, True)):  # without them a single layer learns from the last one
        module = ILKDPretraining(student, teacher, objective, OptimizerConfig(), 1, False, given)
        with torch.no_grad():
            ours, theirs = (
                Outputs(model(input_ids=ids).logits, hidden=taps.hidden, feed_forward=taps.feed_forward)
                for model, taps in ((student, module.student_taps), (teacher, module.teacher_taps))
            )
        loss = module.objective(ours, theirs, ids).total
        module.close()
        assert (loss > 0.01) == far and (far or loss == 0)


def test_dropout_is_off_unless_asked(teacher: Any) -> None:
    ids = Ids().ids[:2]
    teacher.train()
    assert not torch.equal(teacher(input_ids=ids).logits, teacher(input_ids=ids).logits)
    switch_off_dropout(teacher)
    assert torch.equal(teacher(input_ids=ids).logits, teacher(input_ids=ids).logits)
    assert teacher.config.resid_pdrop == 0.1


def test_a_fused_activation_is_the_same_function(teacher: Any) -> None:
    """Logits and gradients; no activation of several calls is left, and the configuration is as it was."""
    ids = Ids().ids[:4]
    fused = copy.deepcopy(teacher)
    assert fuse_gelu_(fused) == 2
    assert fused.config.activation_function == teacher.config.activation_function == "gelu_new"
    for model in (teacher, fused):
        model(input_ids=ids, labels=ids).loss.backward()
    for wanted, found in zip(teacher.parameters(), fused.parameters(), strict=True):
        torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_gradients_are_clipped(teacher: Any, tmp_path: Path, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In both precisions; what Adam is given shows the norm, its step does not."""
    module = ILKDPretraining(teacher, None, ObjectiveConfig(), OptimizerConfig(), 2)
    seen: list[float] = []

    def note(*_: Any) -> None:
        norms = [p.grad.norm() for p in module.student.parameters() if p.grad is not None]
        seen.append(float(torch.stack(norms).norm()) if norms else 0.0)

    monkeypatch.setattr(module, "on_before_zero_grad", note)
    train(module, 2, tmp_path, gradient_clip_val=0.01, precision=precision)
    assert max(seen) == pytest.approx(0.01, rel=1e-3)
