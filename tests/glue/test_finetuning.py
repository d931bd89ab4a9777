"""Fine-tuning: the last real token, padding that counts for nothing, best weights, saving and loading."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from kncompress.compression.student_plan import StudentPlan
from kncompress.compression.text import calibration_text
from kncompress.config import (
    CalibrationConfig,
    DataConfig,
    FactorConfig,
    FactorsConfig,
    FineTuningConfig,
    FitConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
)
from kncompress.data.tokenizer import train_tokenizer
from kncompress.errors import UserError
from kncompress.formats.pretrained import load_config, load_model, save_model
from kncompress.glue.classifiers import Student, load_classifier, prediction_lines, student_base
from kncompress.glue.files import Example
from kncompress.glue.finetuning import (
    GLUEFineTuning,
    TaskData,
    answers,
    evaluate,
    fine_tune,
    predict,
    sequence_logits,
)
from kncompress.glue.sequences import Collate, Sequences
from kncompress.glue.tasks import TASKS
from kncompress.kron import KroneckerEmbedding, KroneckerLinear
from kncompress.training.student import FitOptions, factor_

ILKD = ObjectiveConfig(embedding=1.0, attention=1.0, hidden=1.0, feed_forward=1.0, logits=1.0, cross_entropy=1.0)
GOOD, BAD = "a fine bright film that moves", "a dull grey film that drags and drags"
TEXTS = [f"{text} {word}" for word in ("on", "along", "here", "there", "slowly now") for text in (GOOD, BAD)]
SMALL = {"vocab_size": 300, "bos_token_id": 0, "eos_token_id": 0}
FACTORS = FactorsConfig(embedding=FactorConfig([1, 2]), qkv=FactorConfig([2, 1]), mlp=FactorConfig([2, 1]))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(TEXTS * 3, 280, context=32)


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a language model of 2 layers, 16 wide."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("bases") / request.param
    if request.param == "gpt2":
        model: Any = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=32, **SMALL))
    else:
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        model = LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=32, tie_word_embeddings=True, **SMALL))
    return save_model(model, folder)


@pytest.fixture(scope="module")
def factored(base: Path) -> Path:
    """The same, every kind of map and the embedding factored."""
    model = GPT2LMHeadModel.from_pretrained(base) if base.name == "gpt2" else LlamaForCausalLM.from_pretrained(base)
    factor_(model, StudentPlan.of(FACTORS, model.config), "nearest")
    return save_model(model, base.with_name(f"{base.name}-factored"))


def data_of(name: str, tokenizer: Any) -> TaskData:
    task = TASKS[name]
    labels = [float(i % 2 * 4 + 0.5) if task.is_regression else i % 2 for i in range(len(TEXTS))]
    examples = [Example((t,) if len(task.texts) == 1 else (t, t), n) for t, n in zip(TEXTS, labels, strict=True)]
    return TaskData(task, Sequences(examples, tokenizer, 32), {"": Sequences(examples[::-1], tokenizer, 32)}, 0)


def batch_of(tokenizer: Any, extra: int = 0) -> dict[str, Tensor]:
    """Sentences of several lengths, with ``extra`` columns of padding beyond the longest."""
    sequences = data_of("sst2", tokenizer).train
    batch = Collate(0)([sequences[i] for i in range(6)])
    for name in ("input_ids", "attention_mask"):
        batch[name] = torch.nn.functional.pad(batch[name], (0, extra))
    assert batch["attention_mask"].sum(-1).unique().numel() > 1
    return batch


@pytest.mark.parametrize("compressed", [False, True])
def test_the_last_real_token_is_the_one_that_transformers_takes(
    compressed: bool, base: Path, factored: Path, tokenizer: Any
) -> None:
    model = load_classifier(factored if compressed else base, TASKS["mnli"], 0)
    assert any(isinstance(m, KroneckerLinear | KroneckerEmbedding) for m in model.modules()) == compressed
    assert model.config.pad_token_id == 0 and model.config.id2label == {
        0: "entailment",
        1: "neutral",
        2: "contradiction",
    }
    batch = batch_of(tokenizer, extra=3)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    found = sequence_logits(model, ids, mask)
    assert found.shape == (6, 3)
    torch.testing.assert_close(found, model(input_ids=ids, attention_mask=mask).logits)
    for row in range(6):  # each by itself, without any padding
        alone = ids[row : row + 1, : int(mask[row].sum())]
        torch.testing.assert_close(found[row : row + 1], sequence_logits(model, alone, torch.ones_like(alone)))


def module_of(student: Any, teacher: Any, task: str = "sst2", objective: ObjectiveConfig = ILKD) -> GLUEFineTuning:
    return GLUEFineTuning(student, teacher, TASKS[task], objective, OptimizerConfig(), 10, dropout=False)


def test_padding_changes_no_term_and_no_gradient(base: Path, factored: Path, tokenizer: Any) -> None:
    student, teacher = load_classifier(factored, TASKS["sst2"], 0), load_classifier(base, TASKS["sst2"], 0)
    module = module_of(student, teacher)
    found = []
    for extra in (0, 7):
        batch = batch_of(tokenizer, extra)
        # What stands at padding must not matter either.
        batch["input_ids"][batch["attention_mask"] == 0] = extra
        mask = batch["attention_mask"]
        loss = module.objective(
            *module.outputs(input_ids=batch["input_ids"], attention_mask=mask), batch["labels"], mask
        )
        student.zero_grad()
        loss.total.backward()
        found.append((loss.terms, [p.grad.clone() for p in student.parameters() if p.grad is not None]))
    assert set(found[0][0]) == {"embedding", "attention", "hidden", "feed_forward", "logits", "cross_entropy"}
    assert all(value > 0 for value in found[0][0].values())
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-3, atol=1e-5)
    assert all(p.grad is None for p in teacher.parameters())
    module.close()


def test_a_copy_of_the_teacher_has_nothing_to_learn_from_it(base: Path, tokenizer: Any) -> None:
    teacher = load_classifier(base, TASKS["sst2"], 0)
    student = load_classifier(base, TASKS["sst2"], 0)
    student.load_state_dict(teacher.state_dict())
    module, batch = module_of(student, teacher), batch_of(tokenizer)
    mask = batch["attention_mask"]
    terms = module.objective(
        *module.outputs(input_ids=batch["input_ids"], attention_mask=mask), batch["labels"], mask
    ).terms
    assert {name for name, value in terms.items() if value > 1e-9} == {"cross_entropy"}
    module.close()


def tune(student: Any, teacher: Any, data: TaskData, objective: ObjectiveConfig, **settings: Any) -> Any:
    given = {"epochs": 10, "batch_size": 4, "accelerator": "cpu", "precision": "fp32"} | settings
    rates = OptimizerConfig(lr=given.pop("lr", 2e-2), weight_decay=0.0)
    return fine_tune(student, teacher, data, objective, rates, FineTuningConfig(**given), seed=1)


def test_a_task_is_learnt_and_saved(base: Path, factored: Path, tokenizer: Any, tmp_path: Path) -> None:
    """Teacher, then the student by ILKD; the saved student scores the same, loaded by plain transformers."""
    task = "sst2" if base.name == "llama" else "stsb"
    data = data_of(task, tokenizer)
    teacher = load_classifier(base, TASKS[task], 0)
    first = TASKS[task].metrics[0]
    assert tune(teacher, None, data, ObjectiveConfig(), dropout=False).scores[first] > 0.95
    student = load_classifier(factored, TASKS[task], 0)
    start = predict(student, data.train, 0, 4)
    before = [p.clone() for p in teacher.parameters()]
    done = tune(student, teacher, data, ILKD)
    assert done.scores[first] > 0.95 and done.steps == 10 * 3 and done.examples_per_second > 0
    assert set(done.history[0]) == {
        "train/loss", *(f"train/{name}" for name in ILKD.TERMS), *TASKS[task].metrics, "score",
    }  # fmt: skip
    assert done.history[-1]["train/cross_entropy"] < done.history[0]["train/cross_entropy"]
    assert all(torch.equal(a, b) for a, b in zip(before, teacher.parameters(), strict=True))
    assert not torch.allclose(start, predict(student, data.train, 0, 4))

    save_model(student, tmp_path / "student", tokenizer)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "student").eval()
    assert any(isinstance(m, KroneckerLinear) for m in loaded.modules())
    assert evaluate(loaded, data, 4) == evaluate(student, data, 4) == done.scores
    ids, mask = (batch_of(tokenizer)[name] for name in ("input_ids", "attention_mask"))
    with torch.no_grad():
        torch.testing.assert_close(
            loaded(input_ids=ids, attention_mask=mask).logits, sequence_logits(student, ids, mask)
        )


def test_the_weights_of_the_best_epoch_are_kept_and_training_stops(base: Path, tokenizer: Any) -> None:
    data = data_of("sst2", tokenizer)
    student = load_classifier(base, TASKS["sst2"], 0)
    done = tune(student, None, data, ObjectiveConfig(), epochs=30, patience=2, lr=2e-2)
    scores = [epoch["score"] for epoch in done.history]
    assert done.best_epoch == scores.index(max(scores)) + 1
    assert len(scores) == min(30, done.best_epoch + 2) < 30
    assert evaluate(student, data, 4) == done.scores == {"accuracy": max(scores)}


def test_a_seed_repeats_a_training(base: Path, tokenizer: Any) -> None:
    data, found = data_of("sst2", tokenizer), []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        student = load_classifier(base, TASKS["sst2"], 0)
        settings = FineTuningConfig(epochs=2, batch_size=4, accelerator="cpu", precision="fp32")
        fine_tune(student, None, data, ObjectiveConfig(), OptimizerConfig(), settings, seed)
        found.append(predict(student, data.train, 0, 4))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_predictions_keep_the_order_of_the_examples(base: Path, tokenizer: Any) -> None:
    model, sequences = load_classifier(base, TASKS["sst2"], 0), data_of("sst2", tokenizer).train
    together = predict(model, sequences, 0, 3)
    for index in range(len(sequences)):
        ids = torch.from_numpy(sequences.ids[index])[None].long()
        alone = sequence_logits(model, ids, torch.ones_like(ids)).detach()
        torch.testing.assert_close(together[index : index + 1], alone)


def test_prediction_files_are_those_of_the_benchmark() -> None:
    logits = torch.tensor([[2.0, 1.0], [0.0, 3.0]])
    assert prediction_lines(TASKS["cola"], answers(logits, TASKS["cola"])) == "index\tprediction\n0\t0\n1\t1\n"
    rte = prediction_lines(TASKS["rte"], answers(logits, TASKS["rte"]))
    assert rte == "index\tprediction\n0\tentailment\n1\tnot_entailment\n"
    scores = torch.tensor([[5.4], [3.21049], [-1.0]])
    stsb = prediction_lines(TASKS["stsb"], answers(scores, TASKS["stsb"]))
    assert stsb == "index\tprediction\n0\t5.000\n1\t3.210\n2\t0.000\n"


def test_a_student_of_a_plan_is_fitted_as_the_plan_says(base: Path, tokenizer: Any, tmp_path: Path) -> None:
    """With its start, and on its text; a plan that remembers nothing gives nearest factors."""
    (tmp_path / "text.txt").write_text("\n\n".join(TEXTS * 40))
    tokenizer.save_pretrained(base)
    data = {"source": str(tmp_path / "text.txt"), "cache_dir": str(tmp_path)}
    memory = {"start": "calibrated", "calibration": {"tokens": 256, "context": 16}, "data": data}
    model = ModelConfig(path=str(base))

    def made(name: str, made_for: dict[str, Any]) -> Any:
        factors = replace(FACTORS, made_for=made_for)
        student = Student(name, "factors", factors=factors, plan=StudentPlan.of(factors, load_config(base)))
        folder = tmp_path / name

        def save(dense: Any, folder: Path, facts: Path, values: dict[str, Any]) -> None:
            save_model(dense, folder)
            facts.write_text(json.dumps(values))

        return load_model(student_base(student, model, folder, save).folder)

    expected = load_model(base)
    text = calibration_text(DataConfig(**data), CalibrationConfig(tokens=256, context=16), expected.config, tokenizer)
    factor_(expected, StudentPlan.of(FACTORS, expected.config), "calibrated", FitOptions(text, FitConfig()))
    found, nearest = made("planned", memory), made("plain", {})
    kept = dict(nearest.named_parameters())
    assert all(torch.equal(p, q) for p, q in zip(found.parameters(), expected.parameters(), strict=True))
    assert any(not torch.equal(p, kept[name]) for name, p in found.named_parameters())
    with pytest.raises(UserError, match=r"factors\.made_for: .*sweps"):
        made("wrong", {"fit": {"sweps": 3}})
